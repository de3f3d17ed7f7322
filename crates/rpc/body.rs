//! A request's body, held to a time and a size while it arrives.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use http_body::{Frame, SizeHint};
use tokio::sync::OwnedSemaphorePermit;
use tonic::Status;
use tonic::body::Body;

use crate::status;

/// A body that must be here in time, and no larger than this.
pub(crate) struct LimitedBody {
    body: Body,
    late: Pin<Box<tokio::time::Sleep>>,
    left: usize,
    _room: Option<OwnedSemaphorePermit>,
}

impl LimitedBody {
    /// Limits `body`, which holds `room` until it is here.
    pub(crate) fn new(body: Body, timeout: Duration, bytes: usize, room: Option<OwnedSemaphorePermit>) -> Self {
        Self { body, late: Box::pin(tokio::time::sleep(timeout)), left: bytes, _room: room }
    }

    fn count(&mut self, frame: Frame<bytes::Bytes>) -> Result<Frame<bytes::Bytes>, Status> {
        let bytes = frame.data_ref().map_or(0, bytes::Bytes::len);
        let why = "the request is larger than this method takes";
        self.left = self.left.checked_sub(bytes).ok_or_else(|| status::too_large(why))?;
        Ok(frame)
    }
}

impl http_body::Body for LimitedBody {
    type Data = bytes::Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<bytes::Bytes>, Status>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(context) {
            return Poll::Ready(frame.map(|frame| self.count(frame?)));
        }
        let late = self.late.as_mut().poll(context);
        late.map(|()| Some(Err(Status::deadline_exceeded("the request did not arrive in time"))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
