//! What a request meets before its message is read: is the worker ready, who asks, and is there room for another call.
//!
//! Messages are decoded only for calls that were admitted, so their memory is bounded by calls times message size.

use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime};

use http::{HeaderValue, Request, Response};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tonic::body::Body;
use tonic::{Code, Status};
use tower::{Layer, Service};

use crate::body::LimitedBody;
use crate::serve::Phase;
use crate::status;

const SCORE_BATCH: &str = "/capsieve.v1.ScoringService/ScoreBatch";
const HEALTH: &str = "/grpc.health.v1.Health/";
/// Time and bytes for requests of every other method: names and addresses.
const SMALL_TIMEOUT: Duration = Duration::from_secs(30);
const SMALL_BYTES_MAX: usize = 64 << 10;
/// A token file is looked at this often at most.
const TOKENS_AGE: Duration = Duration::from_secs(1);
/// Bytes of a token file at most.
const TOKENS_BYTES_MAX: u64 = 1 << 20;

/// Bearer tokens from a file, one a line; read again when the file changes.
#[derive(Debug)]
pub struct Tokens {
    path: PathBuf,
    known: Mutex<Known>,
}

#[derive(Debug)]
struct Known {
    /// SHA-256 of each: comparing hashes in constant time says nothing about the tokens.
    hashes: Vec<[u8; 32]>,
    written: Option<SystemTime>,
    looked: Instant,
}

impl Tokens {
    /// Reads the file.
    ///
    /// # Errors
    /// It cannot be read or holds no token.
    pub fn open(path: &Path) -> std::io::Result<Self> {
        let (hashes, written) = read(path)?;
        let known = Mutex::new(Known { hashes, written, looked: Instant::now() });
        Ok(Self { path: path.to_owned(), known })
    }

    /// Whether a request's `authorization` is one of the tokens.
    pub fn accept(&self, header: Option<&HeaderValue>) -> bool {
        let Some(token) = header.and_then(|value| value.as_bytes().strip_prefix(b"Bearer ")) else { return false };
        let hash = Sha256::digest(token);
        let mut known = self.known.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if known.looked.elapsed() >= TOKENS_AGE {
            known.looked = Instant::now();
            self.renew(&mut known);
        }
        let same = |accepted: Choice, one: &[u8; 32]| accepted | one.ct_eq(hash.as_slice());
        known.hashes.iter().fold(Choice::from(0), same).into()
    }

    fn renew(&self, known: &mut Known) {
        let written = std::fs::metadata(&self.path).and_then(|meta| meta.modified()).ok();
        if written == known.written {
            return;
        }
        match read(&self.path) {
            Ok((hashes, written)) => (known.hashes, known.written) = (hashes, written),
            // A file that is being replaced must not lock everybody out.
            Err(error) => tracing::warn!("{}: {error}: the tokens stay as they were", self.path.display()),
        }
    }
}

/// The tokens of a file's text: one a line, without a byte order mark, comments (`#`) and blank lines.
pub fn token_lines(text: &str) -> impl Iterator<Item = &str> {
    let lines = text.trim_start_matches('\u{feff}').lines().map(str::trim);
    lines.filter(|line| !line.is_empty() && !line.starts_with('#'))
}

fn read(path: &Path) -> std::io::Result<(Vec<[u8; 32]>, Option<SystemTime>)> {
    let meta = std::fs::metadata(path)?;
    if meta.len() > TOKENS_BYTES_MAX {
        return Err(std::io::Error::other("too large for a file of tokens"));
    }
    let text = std::fs::read_to_string(path)?;
    let hashes: Vec<[u8; 32]> = token_lines(&text).map(|token| Sha256::digest(token).into()).collect();
    if hashes.is_empty() {
        return Err(std::io::Error::other("it holds no token: one a line is expected"));
    }
    Ok((hashes, meta.modified().ok()))
}

/// Room that a call takes, until it is dropped. Travels in the request's extensions.
#[derive(Clone, Debug)]
pub(crate) struct Admitted {
    _room: Arc<Room>,
}

#[derive(Debug)]
struct Room {
    _permit: OwnedSemaphorePermit,
}

impl Room {
    fn new(permit: OwnedSemaphorePermit) -> Self {
        metrics::gauge!("capsieve_calls_in_flight").increment(1.0);
        Self { _permit: permit }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        metrics::gauge!("capsieve_calls_in_flight").decrement(1.0);
    }
}

/// See the module.
#[derive(Clone)]
pub(crate) struct Gate {
    pub(crate) tokens: Option<Arc<Tokens>>,
    /// Lets health checks through without a token.
    pub(crate) open_health: bool,
    pub(crate) calls: Arc<Semaphore>,
    /// Requests of other methods that are arriving.
    pub(crate) small: Arc<Semaphore>,
    pub(crate) phase: watch::Receiver<Phase>,
    /// A call's request must have arrived by then.
    pub(crate) request_timeout: Duration,
}

impl Gate {
    fn admit(&self, request: &mut Request<Body>) -> Result<(), Status> {
        let path = request.uri().path();
        let health = path.starts_with(HEALTH);
        let known = |tokens: &Arc<Tokens>| tokens.accept(request.headers().get(http::header::AUTHORIZATION));
        let trusted = health && self.open_health || self.tokens.as_ref().is_none_or(known);
        if !trusted {
            let why = "a valid bearer token is required";
            return Err(status::with_reason(Code::Unauthenticated, "TOKEN_REQUIRED", why));
        }
        if path != SCORE_BATCH {
            let Ok(room) = Arc::clone(&self.small).try_acquire_owned() else {
                return Err(status::exhausted("the worker answers as many small requests as it takes"));
            };
            limit(request, SMALL_TIMEOUT, SMALL_BYTES_MAX, Some(room));
            return Ok(());
        }
        let unavailable = |reason, why| Err(status::with_reason(Code::Unavailable, reason, why));
        match *self.phase.borrow() {
            Phase::Loading => return unavailable("NOT_READY", "the worker is loading its model"),
            Phase::Draining | Phase::Cut => return unavailable("DRAINING", "the worker is draining: ask another one"),
            Phase::Serving => {}
        }
        let Ok(room) = Arc::clone(&self.calls).try_acquire_owned() else {
            return Err(status::exhausted("the worker has as many calls as it takes"));
        };
        request.extensions_mut().insert(Admitted { _room: Arc::new(Room::new(room)) });
        // How large a message may be is tonic's to check: before and after decompression.
        limit(request, self.request_timeout, usize::MAX, None);
        Ok(())
    }
}

fn limit(request: &mut Request<Body>, timeout: Duration, bytes: usize, room: Option<OwnedSemaphorePermit>) {
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
        if let Err(status) = self.gate.admit(&mut request) {
            return Box::pin(std::future::ready(Ok(status.into_http())));
        }
        let answer = self.inner.call(request);
        Box::pin(async move {
            let mut answer = answer.await?;
            // What tonic says of a message that is too large; gRPC's word for it is another.
            if let Some(code) = answer.headers_mut().get_mut("grpc-status")
                && *code == HeaderValue::from(Code::OutOfRange as i32)
            {
                *code = HeaderValue::from(Code::ResourceExhausted as i32);
            }
            Ok(answer)
        })
    }
}
