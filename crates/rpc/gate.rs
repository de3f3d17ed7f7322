//! What a request meets before its message is read: who asks, is the worker ready, is there room, and for how long.
//!
//! A call takes its place when its request is here and read, not before: requests that are arriving are bounded apart, so
//! nobody holds a place by sending half of one. Messages are decompressed and decoded when they are whole, just before they take
//! their place, so memory of requests is bounded by places times message size, and as much again for those that arrive.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{Request, Response};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tonic::body::Body;
use tonic::{Code, Status};
use tower::{Layer, Service};

use crate::activity::{Activity, InFlight, Kind};
use crate::arrivals::{Arrivals, Arriving};
use crate::body::{AnswerBody, LimitedBody};
use crate::deadline;
use crate::refusal::{self, CallName};
use crate::serve::Phase;
use crate::status;
use crate::tokens::Tokens;

const SCORE_BATCH: &str = "/capsieve.v1.ScoringService/ScoreBatch";
const HEALTH: &str = "/grpc.health.v1.Health/";
const REFLECTION: &str = "/grpc.reflection.";
/// Time and bytes for requests of every other method: at most the name of a service.
const SMALL_TIMEOUT: Duration = Duration::from_secs(5);
const SMALL_BYTES_MAX: usize = 1 << 10;
/// The same for reflection: a stream of questions, of a person too.
const REFLECTION_TIMEOUT: Duration = Duration::from_secs(30);
const REFLECTION_BYTES_MAX: usize = 64 << 10;

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
    /// A call's request must have arrived by then, and be no larger.
    pub(crate) request_timeout: Duration,
    pub(crate) message_bytes: usize,
}

impl Gate {
    fn admit(&self, request: &mut Request<Body>) -> Result<Option<InFlight>, Status> {
        let kind = kind(request.uri().path());
        let call = request.uri().path() == SCORE_BATCH;
        let activity = request.extensions().get::<Arc<Activity>>();
        let known = |tokens: &Arc<Tokens>| tokens.accept(request.headers().get(http::header::AUTHORIZATION));
        if !self.tokens.as_ref().is_none_or(known) {
            if !(self.open_health && kind == Kind::Health) {
                let why = "a valid bearer token is required";
                return Err(status::with_reason(Code::Unauthenticated, "TOKEN_REQUIRED", why));
            }
            let in_flight = activity.map(|activity| activity.accept_stranger(kind).ok_or_else(few)).transpose()?;
            limit(request, SMALL_TIMEOUT, SMALL_BYTES_MAX, None);
            return Ok(in_flight);
        }
        let in_flight = activity.map(|activity| activity.accept(kind).ok_or_else(few)).transpose()?;
        if call {
            self.admission.let_in()?;
            let connection = activity.map_or(u64::MAX, |activity| activity.number());
            let arriving = self.arrivals.begin(connection);
            // tonic looks at the size again after decompression.
            limit(request, self.request_timeout, self.message_bytes, Some(arriving));
        } else if kind == Kind::Reflection {
            limit(request, REFLECTION_TIMEOUT, REFLECTION_BYTES_MAX, None);
        } else {
            limit(request, SMALL_TIMEOUT, SMALL_BYTES_MAX, None);
        }
        Ok(in_flight)
    }
}

fn kind(path: &str) -> Kind {
    match path {
        health if health.starts_with(HEALTH) => Kind::Health,
        reflection if reflection.starts_with(REFLECTION) => Kind::Reflection,
        _ => Kind::Other,
    }
}

fn few() -> Status {
    status::exhausted("the connection has as many health checks, or streams of reflection, as it may")
}

fn limit(request: &mut Request<Body>, timeout: Duration, bytes: usize, arriving: Option<Arriving>) {
    let body = std::mem::take(request.body_mut());
    *request.body_mut() = Body::new(LimitedBody::new(body, timeout, bytes, arriving));
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
        let name = (request.uri().path() == SCORE_BATCH).then(CallName::new);
        let in_flight = match self.gate.admit(&mut request) {
            Ok(in_flight) => in_flight,
            Err(status) => {
                let refused = refusal::complete(status.into_http(), name.as_ref());
                return Box::pin(std::future::ready(Ok(refused)));
            }
        };
        if let Some(name) = name.clone() {
            request.extensions_mut().insert(name);
        }
        let deadline = deadline::of(request.headers());
        if let Some(deadline) = deadline {
            request.extensions_mut().insert(deadline);
        }
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = match deadline {
                // The service has a timer of its own that ends at the same moment, and it is asked first: it knows more.
                Some(deadline) => match tokio::time::timeout_at(deadline.0.into(), answer).await {
                    Ok(answer) => answer?,
                    Err(_) => status::late("the call's deadline passed before it began").into_http(),
                },
                None => answer.await?,
            };
            let answer = refusal::complete(answer, name.as_ref());
            Ok(answer.map(|body| Body::new(AnswerBody::new(body, in_flight))))
        })
    }
}
