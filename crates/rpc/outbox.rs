//! The messages of a call on their way to its client, and what they keep until he has them: the call's place.
//!
//! tonic asks for a message when the client has room for it, so what he does not take stays here, a few messages of a call.
//! A client that takes nothing for long loses them and the place; why is the last that he hears.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::sync::oneshot;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::gate::Admitted;
use crate::v1::ScoreBatchResponse;
use crate::{status, v1};

/// Messages that wait for the client, of at most [`crate::chunks::CHUNK_BYTES_MAX`] and a token each.
const MESSAGES: usize = 2;
const STALLED: &str = "CLIENT_STALLED";

/// The client's end: the stream of a call.
pub(crate) struct Messages {
    kept: Arc<Mutex<Kept>>,
    _gone: oneshot::Sender<()>,
}

struct Kept {
    received: Receiver<ScoreBatchResponse>,
    /// Why the stream ends, where that is no summary.
    end: Option<Status>,
    place: Option<Admitted>,
}

/// The call's end.
pub(crate) struct Outbox {
    messages: Option<Sender<ScoreBatchResponse>>,
    kept: Weak<Mutex<Kept>>,
    gone: oneshot::Receiver<()>,
    /// How long the client may take nothing; none: for ever.
    patience: Option<Duration>,
}

/// Both ends; the place is kept until the client's is dropped or given up.
pub(crate) fn outbox(place: Admitted, patience: Option<Duration>) -> (Outbox, Messages) {
    let ((messages, received), (alive, gone)) = (channel(MESSAGES), oneshot::channel());
    let kept = Arc::new(Mutex::new(Kept { received, end: None, place: Some(place) }));
    let outbox = Outbox { messages: Some(messages), kept: Arc::downgrade(&kept), gone, patience };
    (outbox, Messages { kept, _gone: alive })
}

impl Outbox {
    /// Waits for room, and until the client was given up.
    pub(crate) async fn send(&self, event: v1::score_batch_response::Event) -> Result<(), Status> {
        let messages = self.messages.as_ref().expect("nothing is sent behind the end");
        let sending = messages.send(ScoreBatchResponse { event: Some(event) });
        let sent = match self.patience {
            Some(patience) => tokio::time::timeout(patience, sending).await.map_err(|_| stalled())?,
            None => sending.await,
        };
        sent.map_err(|_| Status::cancelled("the client is gone"))
    }

    /// Returns when the client is gone.
    pub(crate) async fn closed(&self) {
        match &self.messages {
            Some(messages) => messages.closed().await,
            None => std::future::pending().await,
        }
    }

    /// No more comes: the client sees the end behind what he has not taken yet, if he takes it within `patience`; an error if
    /// he did not.
    pub(crate) async fn end(mut self, status: Option<Status>, patience: Option<Duration>) -> Result<(), Status> {
        let Some(kept) = self.kept.upgrade() else { return Ok(()) };
        lock(&kept).end = status;
        drop(kept);
        // Only now does he see it.
        self.messages = None;
        let Some(patience) = patience else { return Ok(()) };
        match (tokio::time::timeout(patience, &mut self.gone).await, self.kept.upgrade()) {
            (Err(_), Some(kept)) => give_up(&mut lock(&kept)),
            _ => Ok(()),
        }
    }
}

/// The messages make room; a client that comes back finds out, and goes on by what he has.
fn give_up(kept: &mut Kept) -> Result<(), Status> {
    let mut lost = false;
    while kept.received.try_recv().is_ok() {
        lost = true;
    }
    kept.place = None;
    if lost {
        kept.end = Some(stalled());
        return Err(stalled());
    }
    Ok(())
}

fn stalled() -> Status {
    let why = "the client takes no messages: go on by the resume tokens when it does";
    status::with_reason(Code::Unavailable, STALLED, why)
}

/// Whether a call ended because its client took nothing: he has had his time.
pub(crate) fn is_stalled(status: &Status) -> bool {
    status.get_details_error_info().is_some_and(|info| info.reason == STALLED)
}

fn lock(kept: &Mutex<Kept>) -> MutexGuard<'_, Kept> {
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}

impl futures::Stream for Messages {
    type Item = Result<ScoreBatchResponse, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut kept = lock(&self.kept);
        match std::task::ready!(kept.received.poll_recv(context)) {
            Some(message) => Poll::Ready(Some(Ok(message))),
            None => Poll::Ready(kept.end.take().map(Err)),
        }
    }
}
