//! Bodies that are held to something: a request to a time and a size while it arrives, an answer to what it keeps until it
//! is sent.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body::{Body as _, Frame, SizeHint};
use tonic::body::Body;
use tonic::{Code, Status};

use crate::activity::InFlight;
use crate::arrivals::Arriving;
use crate::status;

/// Bytes before a message: whether it is compressed, and its length.
pub(crate) const MESSAGE_HEAD_BYTES: usize = 5;

/// A body that must be here in time, and no larger than this.
pub(crate) struct LimitedBody {
    body: Body,
    late: Pin<Box<tokio::time::Sleep>>,
    bytes_max: usize,
    left: usize,
    /// Of a call: its part of what they may bring.
    arriving: Option<Arriving>,
    /// What is here of a call's request. It is given on as a whole: once decompressed and decoded it may be larger by far,
    /// and by then it must have a place. Copied, for small frames would keep the larger buffers alive that they came in.
    here: BytesMut,
    over: bool,
}

impl LimitedBody {
    /// Limits `body` to `bytes_max`; a call's is one of those that are `arriving` until it is here.
    pub(crate) fn new(body: Body, timeout: Duration, bytes_max: usize, arriving: Option<Arriving>) -> Self {
        let late = Box::pin(tokio::time::sleep(timeout));
        // What clients are told of calls is the size of a message; of the others nobody needs to know it to the byte.
        let left = if arriving.is_some() { bytes_max + MESSAGE_HEAD_BYTES } else { bytes_max };
        Self { body, late, bytes_max, left, arriving, here: BytesMut::new(), over: false }
    }

    fn count(&mut self, data: &Bytes) -> Result<(), Status> {
        let why = || format!("the request is larger than {} bytes", self.bytes_max);
        self.left = self.left.checked_sub(data.len()).ok_or_else(|| status::too_large(why()))?;
        if let Some(arriving) = &self.arriving {
            arriving.add(data.len());
        }
        Ok(())
    }

    /// The next bytes to give on, as soon as they are here.
    fn poll_data(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Bytes, Status>>> {
        while !self.over {
            let Some(frame) = ready!(Pin::new(&mut self.body).poll_frame(context)).transpose()? else {
                self.over = true;
                break;
            };
            // Requests of gRPC have no trailers.
            let Ok(data) = frame.into_data() else { continue };
            self.count(&data)?;
            if self.arriving.is_none() {
                return Poll::Ready(Some(Ok(data)));
            }
            self.here.extend_from_slice(&data);
        }
        Poll::Ready((!self.here.is_empty()).then(|| Ok(std::mem::take(&mut self.here).freeze())))
    }
}

impl http_body::Body for LimitedBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some(arriving) = &self.arriving
            && arriving.given_up(context.waker())
        {
            let why = "too many requests are arriving, and this one has been for longest";
            return Poll::Ready(Some(Err(status::exhausted(why))));
        }
        if let Poll::Ready(data) = self.poll_data(context) {
            return Poll::Ready(data.map(|data| data.map(Frame::data)));
        }
        let late = "the request did not arrive in time";
        let late = || status::with_reason(Code::DeadlineExceeded, "REQUEST_TIMEOUT", late);
        self.late.as_mut().poll(context).map(|()| Some(Err(late())))
    }
}

/// An answer that keeps its request in flight until it is sent.
pub(crate) struct AnswerBody {
    body: Body,
    _in_flight: Option<InFlight>,
}

impl AnswerBody {
    pub(crate) fn new(body: Body, in_flight: Option<InFlight>) -> Self {
        Self { body, _in_flight: in_flight }
    }
}

impl http_body::Body for AnswerBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
