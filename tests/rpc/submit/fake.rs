//! A worker that does what a test tells it, and the messages it sends.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use capsieve_rpc::v1;
use capsieve_rpc::v1::score_batch_request::Source;
use capsieve_rpc::v1::score_batch_response::Event;
use capsieve_rpc::v1::scoring_service_server::{ScoringService, ScoringServiceServer};
use futures::StreamExt;
use tonic::body::Body;
use tonic::{Request, Response, Status};

/// What the worker does with a call.
pub(crate) struct Turn {
    pub(crate) events: Box<dyn Iterator<Item = Event> + Send>,
    /// Between two messages.
    pub(crate) pause: Duration,
    /// Behind them: this status, or nothing but the end of the stream.
    pub(crate) end: Option<Status>,
}

pub(crate) fn turn(events: Vec<Event>, end: Option<Status>) -> Turn {
    Turn { events: Box::new(events.into_iter()), pause: Duration::ZERO, end }
}

pub(crate) fn cut() -> Option<Status> {
    Some(Status::unavailable("cut"))
}

type Script = dyn Fn(usize, &v1::ScoreBatchRequest) -> Turn + Send + Sync;

/// A worker that keeps what it was asked, and gives to each call the turn that its script has for it.
#[derive(Clone)]
pub(crate) struct Fake {
    script: Arc<Script>,
    requests: Arc<Mutex<Vec<v1::ScoreBatchRequest>>>,
    pub(crate) times: Arc<Mutex<Vec<Instant>>>,
    /// Streams that are over, for whatever reason.
    pub(crate) streams_over: Arc<Mutex<usize>>,
    /// Names of shards in a request at most.
    pub(crate) shard_bytes: usize,
    /// HTTP's codes by which a proxy answers the first calls, the last one first.
    pub(crate) proxied: Arc<Mutex<Vec<u16>>>,
    /// Connections are told to go when they are so old, and cut a little later.
    pub(crate) connection_age: Option<Duration>,
    /// What stood in `authorization`.
    pub(crate) tokens: Arc<Mutex<Vec<Option<String>>>>,
}

struct Over(Arc<Mutex<usize>>);

impl Drop for Over {
    fn drop(&mut self) {
        *self.0.lock().unwrap() += 1;
    }
}

#[tonic::async_trait]
impl ScoringService for Fake {
    type ScoreBatchStream = Pin<Box<dyn futures::Stream<Item = Result<v1::ScoreBatchResponse, Status>> + Send>>;

    async fn score_batch(
        &self,
        request: Request<v1::ScoreBatchRequest>,
    ) -> Result<Response<Self::ScoreBatchStream>, Status> {
        let token =
            request.metadata().get("authorization").map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
        self.tokens.lock().unwrap().push(token);
        let request = request.into_inner();
        if uris(&request).iter().map(String::len).sum::<usize>() > self.shard_bytes {
            self.turn(request);
            return Err(Status::resource_exhausted("the message is too large"));
        }
        let Turn { events, pause, end } = self.turn(request);
        let over = Over(Arc::clone(&self.streams_over));
        let messages = futures::stream::iter(events).then(move |event| async move {
            // A sleep of nothing lasts a millisecond.
            if !pause.is_zero() {
                tokio::time::sleep(pause).await;
            }
            Ok(v1::ScoreBatchResponse { event: Some(event) })
        });
        let stream = messages.chain(futures::stream::iter(end.map(Err))).map(move |message| {
            let _held = &over;
            message
        });
        Ok(Response::new(Box::pin(stream)))
    }

    async fn get_model_info(
        &self,
        _: Request<v1::GetModelInfoRequest>,
    ) -> Result<Response<v1::GetModelInfoResponse>, Status> {
        Err(Status::unimplemented("not asked for"))
    }
}

impl Fake {
    pub(crate) fn new(script: impl Fn(usize, &v1::ScoreBatchRequest) -> Turn + Send + Sync + 'static) -> Self {
        Self {
            script: Arc::new(script),
            requests: Arc::default(),
            times: Arc::default(),
            streams_over: Arc::default(),
            tokens: Arc::default(),
            proxied: Arc::default(),
            connection_age: None,
            shard_bytes: usize::MAX,
        }
    }

    fn turn(&self, request: v1::ScoreBatchRequest) -> Turn {
        let mut requests = self.requests.lock().unwrap();
        self.times.lock().unwrap().push(Instant::now());
        requests.push(request);
        (self.script)(requests.len() - 1, &requests[requests.len() - 1])
    }

    /// Begins to serve; its endpoint.
    pub(crate) async fn serve(&self) -> String {
        self.serve_at("127.0.0.1:0").await
    }

    pub(crate) async fn serve_at(&self, address: &str) -> String {
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let service = ScoringServiceServer::new(self.clone()).max_decoding_message_size(16 << 20);
        let proxy = Proxy { fake: self.clone(), service };
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        let mut server = tonic::transport::Server::builder();
        if let Some(age) = self.connection_age {
            server = server.max_connection_age(age).max_connection_age_grace(age / 10);
        }
        tokio::spawn(server.add_service(proxy).serve_with_incoming(incoming));
        format!("http://{address}")
    }

    pub(crate) fn requests(&self) -> Vec<v1::ScoreBatchRequest> {
        self.requests.lock().unwrap().clone()
    }
}

/// What stands before the worker, and may answer in its stead.
#[derive(Clone)]
struct Proxy {
    fake: Fake,
    service: ScoringServiceServer<Fake>,
}

impl tonic::server::NamedService for Proxy {
    const NAME: &'static str = "capsieve.v1.ScoringService";
}

impl tower::Service<http::Request<Body>> for Proxy {
    type Response = http::Response<Body>;
    type Error = std::convert::Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        if let Some(code) = self.fake.proxied.lock().unwrap().pop() {
            let answer = http::Response::builder().status(code).body(Body::default()).unwrap();
            return Box::pin(std::future::ready(Ok(answer)));
        }
        tower::Service::call(&mut self.service, request)
    }
}

pub(crate) fn uris(request: &v1::ScoreBatchRequest) -> &[String] {
    match &request.source {
        Some(Source::Shards(shards)) => &shards.uris,
        _ => &[],
    }
}

pub(crate) fn tokens(request: &v1::ScoreBatchRequest) -> Vec<&[u8]> {
    match &request.source {
        Some(Source::Shards(shards)) => shards.resume_tokens.iter().map(AsRef::as_ref).collect(),
        _ => Vec::new(),
    }
}

pub(crate) fn started<S: AsRef<str>>(shards: &[S]) -> Event {
    let shards = shards.iter().map(|shard| shard.as_ref().to_owned()).collect();
    Event::Started(v1::ScoreStarted { model_hash: "model".to_owned(), shards, ..Default::default() })
}

/// Scores of rows and captions; the token names the last row.
pub(crate) fn chunk(shard_index: u32, entries: &[(u64, u32)]) -> Event {
    let (row, caption) = entries.iter().copied().unzip();
    let token = format!("{shard_index}:{}", entries.last().unwrap().0);
    let scores = vec![0.5; entries.len()];
    Event::Chunk(v1::ScoreChunk {
        shard_index,
        row,
        caption,
        itm_score: scores.clone(),
        cosine_score: scores,
        resume_token: token.into(),
        ..Default::default()
    })
}

pub(crate) fn done(shard_index: u32, rows: u64) -> Event {
    Event::ShardDone(v1::ShardDone { shard_index, rows, scored: rows, ..Default::default() })
}

pub(crate) fn progress(rows: u64, pairs: u64) -> Event {
    Event::Progress(v1::ScoreProgress { rows, pairs, rows_total: 100, ..Default::default() })
}

pub(crate) fn summary(pairs: u64) -> Event {
    Event::Summary(v1::ScoreSummary { pairs, ..Default::default() })
}

/// A turn that lists what it is asked for and does it, a row a shard.
pub(crate) fn all(request: &v1::ScoreBatchRequest) -> Turn {
    let uris = uris(request);
    let dones = (0..u32::try_from(uris.len()).unwrap()).map(|shard| done(shard, 1));
    let lists: Vec<Event> = uris.chunks(10_000).map(started).collect();
    let pairs = uris.len() as u64;
    let events = lists.into_iter().chain(dones).chain(std::iter::once_with(move || summary(pairs)));
    Turn { events: Box::new(events), ..turn(Vec::new(), None) }
}
