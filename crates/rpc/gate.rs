//! What a request meets before its message is read: who asks, is the worker ready, is there room, and for how long.
//!
//! A call takes its place when its request is here and read, not before: requests that are arriving are bounded apart, so
//! nobody holds a place by sending half of one. Messages are decompressed and decoded when they are whole, just before they take
//! their place, so memory of requests is bounded by places times message size, and as much again for those that arrive.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{HeaderValue, Request, Response};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tonic::body::Body;
use tonic::{Code, Status};
use tower::{Layer, Service};

use crate::activity::{Activity, InFlight};
use crate::arrivals::Arrivals;
use crate::body::{AnswerBody, LimitedBody, Room};
use crate::deadline;
use crate::serve::Phase;
use crate::status;
use crate::tokens::Tokens;

const SCORE_BATCH: &str = "/capsieve.v1.ScoringService/ScoreBatch";
const HEALTH: &str = "/grpc.health.v1.Health/";
/// Time and bytes for requests of every other method: names and addresses.
const SMALL_TIMEOUT: Duration = Duration::from_secs(30);
const SMALL_BYTES_MAX: usize = 64 << 10;
/// The same for health checks without a token: the name of a service.
const STRANGER_TIMEOUT: Duration = Duration::from_secs(5);
const STRANGER_BYTES_MAX: usize = 1 << 10;

/// A place that a call takes, until it is dropped.
#[derive(Debug)]
pub(crate) struct Admitted {
    _permit: OwnedSemaphorePermit,
}

impl Admitted {
    fn new(permit: OwnedSemaphorePermit) -> Self {
        metrics::gauge!("capsieve_calls_in_flight").increment(1.0);
        Self { _permit: permit }
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        metrics::gauge!("capsieve_calls_in_flight").decrement(1.0);
    }
}

/// Places for calls.
#[derive(Clone)]
pub(crate) struct Admission {
    pub(crate) calls: Arc<Semaphore>,
    pub(crate) phase: watch::Receiver<Phase>,
}

impl Admission {
    /// A place for a call whose request is here. It may be gone, and a drain begun, since the request was let in.
    pub(crate) fn admit(&self) -> Result<Admitted, Status> {
        let taken = Arc::clone(&self.calls).try_acquire_owned();
        // Only now: a drain that begins after this look waits for the place.
        self.ready()?;
        taken.map(Admitted::new).map_err(|_| full())
    }

    /// Whether a request may be sent at all, so that nobody sends it in vain.
    fn let_in(&self) -> Result<(), Status> {
        self.ready()?;
        if self.calls.available_permits() == 0 { Err(full()) } else { Ok(()) }
    }

    fn ready(&self) -> Result<(), Status> {
        let unavailable = |reason, why| Err(status::with_reason(Code::Unavailable, reason, why));
        match *self.phase.borrow() {
            Phase::Loading => unavailable("NOT_READY", "the worker is loading its model"),
            Phase::Draining | Phase::Cut => unavailable("DRAINING", "the worker is draining: ask another one"),
            Phase::Serving => Ok(()),
        }
    }
}

fn full() -> Status {
    status::exhausted("the worker has as many calls as it takes")
}

/// See the module.
#[derive(Clone)]
pub(crate) struct Gate {
    pub(crate) tokens: Option<Arc<Tokens>>,
    /// Lets health checks through without a token.
    pub(crate) open_health: bool,
    pub(crate) admission: Admission,
    pub(crate) arrivals: Arc<Arrivals>,
    /// Requests of other methods that are arriving.
    pub(crate) small: Arc<Semaphore>,
    /// A call's request must have arrived by then, and be no larger.
    pub(crate) request_timeout: Duration,
    pub(crate) message_bytes: usize,
}

impl Gate {
    fn admit(&self, request: &mut Request<Body>) -> Result<Option<InFlight>, Status> {
        let path = request.uri().path();
        let activity = request.extensions().get::<Arc<Activity>>();
        let known = |tokens: &Arc<Tokens>| tokens.accept(request.headers().get(http::header::AUTHORIZATION));
        if !self.tokens.as_ref().is_none_or(known) {
            if !(self.open_health && path.starts_with(HEALTH)) {
                let why = "a valid bearer token is required";
                return Err(status::with_reason(Code::Unauthenticated, "TOKEN_REQUIRED", why));
            }
            let in_flight = activity.and_then(Activity::accept_stranger);
            let why = "the connection has as many health checks as it may";
            let in_flight = in_flight.ok_or_else(|| status::exhausted(why))?;
            limit(request, STRANGER_TIMEOUT, STRANGER_BYTES_MAX, Room::None);
            return Ok(Some(in_flight));
        }
        let in_flight = activity.map(Activity::accept);
        if path == SCORE_BATCH {
            self.admission.let_in()?;
            // tonic looks at the size again after decompression.
            limit(request, self.request_timeout, self.message_bytes, Room::Call(self.arrivals.begin()));
        } else {
            let why = "the worker answers as many small requests as it takes";
            let room = Arc::clone(&self.small).try_acquire_owned().map_err(|_| status::exhausted(why))?;
            limit(request, SMALL_TIMEOUT, SMALL_BYTES_MAX, Room::Small(room));
        }
        Ok(in_flight)
    }
}

fn limit(request: &mut Request<Body>, timeout: Duration, bytes: usize, room: Room) {
    let body = std::mem::take(request.body_mut());
    *request.body_mut() = Body::new(LimitedBody::new(body, timeout, bytes, room));
}

impl<S> Layer<S> for Gate {
    type Service = Gated<S>;

    fn layer(&self, inner: S) -> Gated<S> {
        Gated { gate: self.clone(), inner }
    }
}

/// A service behind the gate.
#[derive(Clone)]
pub(crate) struct Gated<S> {
    gate: Gate,
    inner: S,
}

impl<S> Service<Request<Body>> for Gated<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let in_flight = match self.gate.admit(&mut request) {
            Ok(in_flight) => in_flight,
            Err(status) => return Box::pin(std::future::ready(Ok(status.into_http()))),
        };
        let deadline = deadline::of(request.headers());
        if let Some(deadline) = deadline {
            request.extensions_mut().insert(deadline);
        }
        let answer = self.inner.call(request);
        Box::pin(async move {
            let mut answer = match deadline {
                // The service has a timer of its own that ends at the same moment, and it is asked first: it knows more.
                Some(deadline) => match tokio::time::timeout_at(deadline.0.into(), answer).await {
                    Ok(answer) => answer?,
                    Err(_) => return Ok(status::late("the call's deadline passed before it began").into_http()),
                },
                None => answer.await?,
            };
            // What tonic says of a message that is too large; gRPC's word for it is another.
            if let Some(code) = answer.headers_mut().get_mut("grpc-status")
                && *code == HeaderValue::from(Code::OutOfRange as i32)
            {
                *code = HeaderValue::from(Code::ResourceExhausted as i32);
            }
            Ok(answer.map(|body| Body::new(AnswerBody::new(body, in_flight))))
        })
    }
}
