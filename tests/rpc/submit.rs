//! `submit` against a worker that does what a test tells it: cuts, silence, refusals, lists of any length.

use std::collections::HashSet;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use capsieve_rpc::v1::score_batch_request::Source;
use capsieve_rpc::v1::score_batch_response::Event;
use capsieve_rpc::v1::scoring_service_server::{ScoringService, ScoringServiceServer};
use capsieve_rpc::{Submission, SubmitError, Update, v1};
use futures::StreamExt;
use tonic::body::Body;
use tonic::{Code, Request, Response, Status};

use super::server::{of_pairs, of_shards, pairs, wait};
use crate::support::{Ran, program, run};

/// What the worker does with a call.
struct Turn {
    events: Box<dyn Iterator<Item = Event> + Send>,
    /// Between two messages.
    pause: Duration,
    /// Behind them: this status, or nothing but the end of the stream.
    end: Option<Status>,
    /// Instead of all that: a proxy's answer.
    http: Option<u16>,
}

fn turn(events: Vec<Event>, end: Option<Status>) -> Turn {
    Turn { events: Box::new(events.into_iter()), pause: Duration::ZERO, end, http: None }
}

fn cut() -> Option<Status> {
    Some(Status::unavailable("cut"))
}

type Script = dyn Fn(usize, &[String]) -> Turn + Send + Sync;

/// A worker that keeps what it was asked, and gives to each call the turn that its script has for it.
#[derive(Clone)]
struct Fake {
    script: Arc<Script>,
    requests: Arc<Mutex<Vec<v1::ScoreBatchRequest>>>,
    times: Arc<Mutex<Vec<Instant>>>,
    /// Streams that are over, for whatever reason.
    streams_over: Arc<Mutex<usize>>,
    /// Names of shards in a request at most.
    shard_bytes: usize,
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
        let request = request.into_inner();
        if uris(&request).iter().map(String::len).sum::<usize>() > self.shard_bytes {
            self.turn(request);
            return Err(Status::resource_exhausted("the message is too large"));
        }
        let Turn { events, pause, end, .. } = self.turn(request);
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
    fn new(script: impl Fn(usize, &[String]) -> Turn + Send + Sync + 'static) -> Self {
        Self {
            script: Arc::new(script),
            requests: Arc::default(),
            times: Arc::default(),
            streams_over: Arc::default(),
            shard_bytes: usize::MAX,
        }
    }

    fn turn(&self, request: v1::ScoreBatchRequest) -> Turn {
        let mut requests = self.requests.lock().unwrap();
        self.times.lock().unwrap().push(Instant::now());
        let uris = uris(&request).to_vec();
        requests.push(request);
        (self.script)(requests.len() - 1, &uris)
    }

    /// Begins to serve; its endpoint.
    async fn serve(&self) -> String {
        self.serve_at("127.0.0.1:0").await
    }

    async fn serve_at(&self, address: &str) -> String {
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let service = ScoringServiceServer::new(self.clone()).max_decoding_message_size(16 << 20);
        let proxy = Proxy { fake: self.clone(), service };
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        tokio::spawn(tonic::transport::Server::builder().add_service(proxy).serve_with_incoming(incoming));
        format!("http://{address}")
    }

    fn requests(&self) -> Vec<v1::ScoreBatchRequest> {
        self.requests.lock().unwrap().clone()
    }
}

/// What stands before the worker: answers in plain HTTP where the script says so.
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
        let number = self.fake.requests.lock().unwrap().len();
        if let Some(code) = (self.fake.script)(number, &[]).http {
            self.fake.turn(v1::ScoreBatchRequest::default());
            let answer = http::Response::builder().status(code).body(Body::default()).unwrap();
            return Box::pin(std::future::ready(Ok(answer)));
        }
        tower::Service::call(&mut self.service, request)
    }
}

fn uris(request: &v1::ScoreBatchRequest) -> &[String] {
    match &request.source {
        Some(Source::Shards(shards)) => &shards.uris,
        _ => &[],
    }
}

fn tokens(request: &v1::ScoreBatchRequest) -> Vec<&[u8]> {
    match &request.source {
        Some(Source::Shards(shards)) => shards.resume_tokens.iter().map(AsRef::as_ref).collect(),
        _ => Vec::new(),
    }
}

fn started<S: AsRef<str>>(shards: &[S]) -> Event {
    let shards = shards.iter().map(|shard| shard.as_ref().to_owned()).collect();
    Event::Started(v1::ScoreStarted { model_hash: "model".to_owned(), shards, ..Default::default() })
}

/// Scores of rows and captions; the token names the last row.
fn chunk(shard_index: u32, entries: &[(u64, u32)]) -> Event {
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

fn done(shard_index: u32, rows: u64) -> Event {
    Event::ShardDone(v1::ShardDone { shard_index, rows, scored: rows, ..Default::default() })
}

fn progress(rows: u64, pairs: u64) -> Event {
    Event::Progress(v1::ScoreProgress { rows, pairs, rows_total: 100, ..Default::default() })
}

fn summary(pairs: u64) -> Event {
    Event::Summary(v1::ScoreSummary { pairs, ..Default::default() })
}

/// A turn that lists what it is asked for and does it, a row a shard.
fn all(uris: &[String]) -> Turn {
    let dones = (0..u32::try_from(uris.len()).unwrap()).map(|shard| done(shard, 1));
    let lists: Vec<Event> = uris.chunks(10_000).map(started).collect();
    let pairs = uris.len() as u64;
    let events = lists.into_iter().chain(dones).chain(std::iter::once_with(move || summary(pairs)));
    Turn { events: Box::new(events), ..turn(Vec::new(), None) }
}

fn submission(endpoint: String, request: v1::ScoreBatchRequest) -> Submission {
    Submission {
        endpoint,
        root: None,
        identity: None,
        token: None,
        request,
        patience: Duration::from_secs(20),
        delay_max: Duration::from_millis(5),
    }
}

fn with_sink(request: v1::ScoreBatchRequest, uri: &str) -> v1::ScoreBatchRequest {
    let sink = v1::ParquetSink { uri: uri.to_owned(), ..Default::default() };
    v1::ScoreBatchRequest { sink: Some(sink), ..request }
}

async fn submit(submission: &Submission) -> Result<v1::ScoreSummary, SubmitError> {
    capsieve_rpc::submit(submission, |_| Ok(())).await
}

#[test]
fn a_sign_of_life_renews_patience() {
    wait(async {
        // Five calls of 0.6 s each, far beyond the patience in all, and no scores; then the shard is done.
        let fake = Fake::new(|call, _| {
            let alive = (0..6).map(|i| progress((call * 6 + i) as u64, 0));
            let events: Vec<Event> = std::iter::once(started(&["/a"])).chain(alive).collect();
            let last = vec![started(&["/a"]), done(0, 60), summary(60)];
            let turn = if call < 5 { turn(events, cut()) } else { turn(last, None) };
            Turn { pause: Duration::from_millis(100), ..turn }
        });
        let request = with_sink(of_shards(&["/a"]), "/out.parquet");
        let submission = Submission { patience: Duration::from_secs(1), ..submission(fake.serve().await, request) };
        let total = submit(&submission).await.unwrap();
        assert_eq!((total.rows, total.shards, fake.requests().len()), (60, 1, 6));
        assert!(total.seconds > 3.0, "it took longer than the patience: {}", total.seconds);
    });
}

#[test]
fn a_worker_that_gets_nowhere_is_given_up() {
    wait(async {
        // It lives, but comes no farther than before.
        let fake = Fake::new(|_, _| turn(vec![started(&["/a"]), progress(0, 0), progress(7, 7)], cut()));
        let request = with_sink(of_shards(&["/a"]), "/out.parquet");
        let error = submit(&submission(fake.serve().await, request.clone())).await.unwrap_err();
        assert!(matches!(error, SubmitError::Stuck { attempts: 20, code: Code::Unavailable, .. }), "{error:?}");
        let words = error.to_string();
        assert!(words.contains("http://127.0.0.1") && words.contains("UNAVAILABLE: cut"), "{words}");
        assert_eq!(fake.requests().len(), 21, "the first came farther than none");
        // Accepted, and not even alive.
        let fake = Fake::new(|_, _| turn(vec![started(&["/a"])], cut()));
        let error = submit(&submission(fake.serve().await, request.clone())).await.unwrap_err();
        assert!(matches!(error, SubmitError::Stuck { attempts: 20, .. }), "{error:?}");
        // One that comes a row farther each time is not.
        let fake = Fake::new(|call, _| match call {
            0..40 => turn(vec![started(&["/a"]), progress(call as u64 + 1, 0)], cut()),
            _ => turn(vec![started(&["/a"]), done(0, 50), summary(0)], None),
        });
        assert_eq!(submit(&submission(fake.serve().await, request)).await.unwrap().rows, 50);
    });
}

#[test]
fn only_steps_make_the_delays_short_again() {
    wait(async {
        let fake = Fake::new(|call, _| match call {
            0..5 => turn(vec![started(&["/a"]), progress(0, 0)], cut()),
            5 => turn(vec![started(&["/a"]), chunk(0, &[(0, 0)])], cut()),
            _ => turn(vec![started(&["/a"]), done(0, 0), summary(0)], None),
        });
        let delay_max = Duration::from_secs(10);
        let submission = Submission { delay_max, ..submission(fake.serve().await, of_shards(&["/a"])) };
        submit(&submission).await.unwrap();
        let times = fake.times.lock().unwrap().clone();
        let waits: Vec<Duration> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(waits[4] > Duration::from_secs(3), "they grow: {waits:?}");
        assert!(waits[5] < Duration::from_secs(1), "a step makes them short: {waits:?}");
    });
}

#[test]
fn what_is_left_is_asked_for_by_name() {
    wait(async {
        let fake = Fake::new(|call, uris| match call {
            // Before the whole list is there, nothing is known.
            0 => turn(vec![started(&["/in/a", "/in/b"])], cut()),
            // The list in two parts; the second shard is cut within its second row.
            1 => {
                let list = [started(&["/in/a", "/in/b"]), started(&["/in/c", "/in/d"])];
                let a = [chunk(0, &[(0, 0), (1, 0), (1, 1)]), done(0, 2)];
                let b = [chunk(1, &[(0, 0), (1, 0)])];
                turn([&list[..], &a, &b].concat(), Some(Status::deadline_exceeded("a proxy has enough")))
            }
            // The indices are others here.
            2 => turn(vec![started(uris), chunk(0, &[(1, 1), (2, 0)]), done(0, 2), chunk(1, &[(0, 0)])], cut()),
            _ => turn(vec![started(uris), done(0, 0), chunk(1, &[(0, 0), (0, 1)]), done(1, 1), summary(3)], None),
        });
        let mut request = of_shards(&["/in/"]);
        request.request_id = "mine".to_owned();
        let (mut seen, mut last) = (Vec::new(), v1::ScoreProgress::default());
        let on = |update: &Update<'_>| {
            if let Event::Chunk(chunk) = update.event {
                let uri = &update.shards[chunk.shard_index as usize];
                seen.extend(chunk.row.iter().zip(&chunk.caption).map(|(row, caption)| (uri.clone(), *row, *caption)));
            }
            assert!(update.so_far.rows >= last.rows && update.so_far.shards_done >= last.shards_done);
            last = update.so_far;
            Ok(())
        };
        let total = capsieve_rpc::submit(&submission(fake.serve().await, request.clone()), on).await.unwrap();
        let requests = fake.requests();
        assert_eq!((&requests[0], &requests[1]), (&request, &request), "until the list is known: the user's request");
        assert_eq!(
            (uris(&requests[2]), tokens(&requests[2])),
            (&["/in/b", "/in/c", "/in/d"].map(str::to_owned)[..], vec![&b"1:1"[..]])
        );
        assert_eq!(
            (uris(&requests[3]), tokens(&requests[3])),
            (&["/in/c", "/in/d"].map(str::to_owned)[..], vec![&b"1:0"[..]])
        );
        assert!(requests.iter().all(|request| request.request_id == "mine"));
        assert_eq!((total.rows, total.scored, total.failed, total.pairs, total.shards), (7, 7, 0, 10, 4));
        assert_eq!((last.rows, last.shards_done, last.shards_total), (7, 4, 4));
        assert_eq!(seen.len(), seen.iter().collect::<HashSet<_>>().len(), "nothing twice");
        assert_eq!(seen.len(), 10);
    });
}

#[test]
fn totals_of_a_sink_are_over_all_attempts() {
    wait(async {
        let fake = Fake::new(|call, uris| match call {
            // Pairs 20 are said when the first shard is done; 33 are of the second too, which is cut.
            0 => turn(
                vec![started(&["/a", "/b", "/c"]), progress(5, 9), done(0, 10), progress(10, 20), progress(16, 33)],
                cut(),
            ),
            // An earlier run has written the second.
            _ => {
                let there = v1::ShardDone { shard_index: 0, rows: 8, scored: 7, skipped: true, ..Default::default() };
                let there = v1::ShardDone { errors: [("earlier".to_owned(), 1)].into(), ..there };
                turn(vec![started(uris), Event::ShardDone(there), progress(2, 3), done(1, 4), summary(6)], None)
            }
        });
        let request = with_sink(of_shards(&["/in/"]), "/out/");
        let mut last = v1::ScoreProgress::default();
        let on = |update: &Update<'_>| {
            assert!(update.so_far.rows >= last.rows && update.so_far.pairs >= last.pairs, "the bar never falls back");
            last = update.so_far;
            Ok(())
        };
        let total = capsieve_rpc::submit(&submission(fake.serve().await, request), on).await.unwrap();
        assert_eq!((total.rows, total.scored, total.failed, total.pairs, total.shards), (22, 21, 1, 26, 3));
        assert_eq!(total.errors.get("earlier"), Some(&1));
        assert_eq!((last.rows, last.shards_done, last.shards_total), (22, 3, 3));
        assert_eq!(fake.requests()[1].sink, fake.requests()[0].sink);
    });
}

#[test]
fn what_one_request_cannot_name_goes_in_several() {
    wait(async {
        let names = |count: usize, length: usize| -> Vec<String> {
            (0..count).map(|shard| format!("/in/{shard:0length$}.parquet")).collect()
        };
        for (count, length, want) in [(150_002, 8, vec![100_000, 50_000]), (5_000, 4_000, vec![2_084, 2_084, 830])] {
            let list = names(count, length);
            let first = list.clone();
            let fake = Fake::new(move |call, uris| match call {
                0 => {
                    let head = first.chunks(1_000).map(started).collect::<Vec<_>>();
                    turn([head, vec![done(0, 1), done(1, 1)]].concat(), cut())
                }
                _ => all(uris),
            });
            let request = with_sink(of_shards(&["/in/"]), "/out/");
            let total = submit(&submission(fake.serve().await, request)).await.unwrap();
            let requests = fake.requests();
            let asked: Vec<usize> = requests[1..].iter().map(|request| uris(request).len()).collect();
            assert_eq!(asked, want, "{count} shards");
            assert!(requests.iter().all(|request| uris(request).iter().map(String::len).sum::<usize>() <= 8 << 20));
            let named: Vec<&String> = requests[1..].iter().flat_map(uris).collect();
            assert!(named.iter().zip(&list[2..]).all(|(named, want)| *named == want));
            assert_eq!((total.rows, total.shards), (count as u64, u32::try_from(count).unwrap()));
        }
    });
}

#[test]
fn a_worker_that_takes_less_gets_smaller_requests() {
    wait(async {
        let list: Vec<String> = (0..2000).map(|shard| format!("/in/{shard:0100}.parquet")).collect();
        let first = list.clone();
        let script = move |call, uris: &[String]| match call {
            0 => turn(vec![started(&first), done(0, 1)], cut()),
            _ => all(uris),
        };
        let fake = Fake { shard_bytes: 64 << 10, ..Fake::new(script) };
        let total = submit(&submission(fake.serve().await, of_shards(&["/in/"]))).await.unwrap();
        assert_eq!(total.shards, 2000);
        assert!(fake.requests().len() > 4, "{}", fake.requests().len());
    });
}

#[test]
fn what_another_attempt_mends_is_tried_again() {
    let ends = [
        Turn { http: Some(503), ..turn(Vec::new(), None) },
        Turn { http: Some(502), ..turn(Vec::new(), None) },
        Turn { http: Some(500), ..turn(Vec::new(), None) },
        turn(Vec::new(), Some(Status::deadline_exceeded("a proxy has enough"))),
        turn(vec![started(&["/a"]), progress(0, 0)], Some(Status::deadline_exceeded("a proxy has enough"))),
        // No summary, and no error either.
        turn(vec![started(&["/a"]), progress(0, 0)], None),
        turn(vec![started(&["/a"])], Some(Status::unknown("h2 protocol error"))),
        turn(vec![started(&["/a"])], Some(Status::cancelled("by somebody"))),
    ];
    let count = ends.len();
    let ends = Mutex::new(ends.map(Some));
    wait(async move {
        // The script is asked twice about a call: the proxy looks ahead.
        let fake = Fake::new(move |call, uris| match ends.lock().unwrap().get_mut(call) {
            None => turn(vec![started(&["/a"]), chunk(0, &[(0, 0)]), done(0, 1), summary(1)], None),
            Some(end) if uris.is_empty() && end.as_ref().is_some_and(|end| end.http.is_none()) => turn(vec![], None),
            Some(end) if uris.is_empty() => {
                Turn { http: end.as_ref().and_then(|end| end.http), ..turn(Vec::new(), None) }
            }
            Some(end) => end.take().unwrap(),
        });
        let total = submit(&submission(fake.serve().await, of_shards(&["/a"]))).await.unwrap();
        assert_eq!((total.rows, fake.requests().len()), (1, count + 1));
    });
}

#[test]
fn a_worker_that_comes_late_is_waited_for() {
    wait(async {
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let fake = Fake::new(|_, uris| all(uris));
        let submission = submission(format!("http://{address}"), of_shards(&["/a"]));
        let submitting = tokio::spawn(async move { submit(&submission).await });
        tokio::time::sleep(Duration::from_millis(500)).await;
        fake.serve_at(&address).await;
        assert_eq!(submitting.await.unwrap().unwrap().shards, 1);
    });
}

#[test]
fn errors_say_who_what_and_what_to_do() {
    wait(async {
        let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let patience = Duration::from_millis(300);
        let absent = Submission { patience, ..submission(format!("http://{nobody}"), of_shards(&["/a"])) };
        let error = submit(&absent).await.unwrap_err();
        assert!(matches!(error, SubmitError::Unreachable { .. }), "{error:?}");
        let words = error.to_string();
        for part in [&nobody.to_string(), "could not be reached for 300ms", "refused", "check the address"] {
            assert!(words.contains(part), "no {part:?} in {words}");
        }
        let fake = Fake::new(|_, _| turn(Vec::new(), Some(Status::permission_denied("/a is not allowed"))));
        let endpoint = fake.serve().await;
        let words = submit(&submission(endpoint.clone(), of_shards(&["/a"]))).await.unwrap_err().to_string();
        assert_eq!(fake.requests().len(), 1, "asked once");
        for part in [&endpoint, "PERMISSION_DENIED", "/a is not allowed", "--allow-uri"] {
            assert!(words.contains(part), "no {part:?} in {words}");
        }
        // It answers, but with nothing that brings the work on.
        let fake = Fake::new(|_, _| turn(vec![started(&["/a"])], cut()));
        let lost = Submission { patience: Duration::ZERO, ..submission(fake.serve().await, of_shards(&["/a"])) };
        let error = submit(&lost).await.unwrap_err();
        assert!(matches!(error, SubmitError::Lost { code: Code::Unavailable, .. }), "{error:?}");
        let pairs = submit(&submission(endpoint, of_pairs(&pairs(1, 0)))).await.unwrap_err();
        assert!(matches!(pairs, SubmitError::Pairs), "{pairs:?}");
    });
}

#[test]
fn messages_that_contradict_each_other_lose_no_row_in_silence() {
    wait(async {
        let other = |uri: &str, hash: &str| {
            let shards = vec![uri.to_owned()];
            Event::Started(v1::ScoreStarted { model_hash: hash.to_owned(), shards, ..Default::default() })
        };
        let uneven = v1::ScoreChunk { row: vec![0, 1], caption: vec![0], ..Default::default() };
        let turns: Vec<(Vec<Event>, &str)> = vec![
            (vec![started(&["/a"]), summary(0)], "not of each shard"),
            (vec![started(&["/a"]), chunk(1, &[(0, 0)])], "has not listed"),
            (vec![started(&["/a"]), done(0, 1), chunk(0, &[(1, 0)])], "is done"),
            (vec![started(&["/a"]), Event::Chunk(uneven)], "different lengths"),
            (vec![started(&["/a"]), progress(0, 0), started(&["/b"])], "behind other messages"),
            (vec![other("/b", "model"), progress(0, 0)], "not asked for"),
            (vec![other("/a", "another"), progress(0, 0)], "its model"),
        ];
        for (events, words) in turns {
            let fake = Fake::new(move |call, _| match call {
                0 => turn(vec![started(&["/a"]), progress(0, 0)], cut()),
                _ => turn(events.clone(), None),
            });
            let error = submit(&submission(fake.serve().await, of_shards(&["/"]))).await.unwrap_err();
            assert!(matches!(error, SubmitError::Contract { .. }) && error.to_string().contains(words), "{error}");
        }
    });
}

/// A worker that scores for ever.
fn endless() -> Fake {
    Fake::new(|_, _| {
        let rows = (0u64..).map(|row| chunk(0, &[(row, 0), (row, 1)]));
        let events = std::iter::once(started(&["/a"])).chain(rows);
        Turn { events: Box::new(events), pause: Duration::from_millis(1), ..turn(Vec::new(), None) }
    })
}

/// `capsieve submit` of `/a`.
fn command(endpoint: &str) -> std::process::Command {
    let mut command = program();
    command.args(["submit", "--input", "/a", "--endpoint", endpoint]);
    command
}

/// Serves on a runtime of its own while `work` runs the program.
fn beside(fake: &Fake, work: impl FnOnce(&str)) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let endpoint = runtime.block_on(fake.serve());
    work(&endpoint);
}

#[test]
fn a_reader_that_has_seen_enough_stops_the_job() {
    use std::io::BufRead;
    let fake = endless();
    beside(&fake, |endpoint| {
        let mut child = command(endpoint).spawn().unwrap();
        let mut line = String::new();
        std::io::BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.contains("\"shard\":\"/a\""), "{line}");
        // The pipe is closed.
        let ran = child.wait_with_output().unwrap();
        let words = String::from_utf8(ran.stderr).unwrap();
        assert_eq!(ran.status.code(), Some(1), "{words}");
        assert!(words.starts_with("error: standard output was closed") && words.lines().count() == 1, "{words}");
        let start = Instant::now();
        while *fake.streams_over.lock().unwrap() == 0 {
            assert!(start.elapsed() < Duration::from_secs(10), "the call is cancelled");
            std::thread::sleep(Duration::from_millis(5));
        }
    });
}

#[test]
#[cfg(unix)]
fn an_interruption_says_what_stays() {
    for (more, words) in [
        (&[][..], "the lines that were printed stay"),
        (&["--output", "/out/"], "the shards that the worker has finished stay, the same command goes on"),
        (&["--output", "/out/", "--overwrite"], "without --overwrite"),
    ] {
        let fake = endless();
        beside(&fake, |endpoint| {
            // Nobody reads its output: it is full when the signal comes.
            let child = command(endpoint).args(more).spawn().unwrap();
            std::thread::sleep(Duration::from_millis(1500));
            let sent = std::process::Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
            assert!(sent.success());
            let start = Instant::now();
            let ran = child.wait_with_output().unwrap();
            let stderr = String::from_utf8(ran.stderr).unwrap();
            assert!(ran.status.code() == Some(1) && stderr.contains(words), "{stderr}");
            assert!(start.elapsed() < Duration::from_secs(10), "at once");
        });
    }
}

#[test]
fn the_token_is_a_line_as_the_worker_reads_it() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokens");
    for (text, want) in [
        ("\u{feff}# of the team\n\n  secret  \nother\n", Some("Bearer secret")),
        ("\u{feff}secret\r\n", Some("Bearer secret")),
        ("# nothing\n\n", None),
    ] {
        std::fs::write(&file, text).unwrap();
        let seen = Arc::new(Mutex::new(None));
        let fake = Fake::new(|_, uris| all(uris));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let endpoint = runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let into = Arc::clone(&seen);
            let look = move |request: Request<()>| {
                *into.lock().unwrap() =
                    request.metadata().get("authorization").map(|value| value.to_str().unwrap().to_owned());
                Ok(request)
            };
            let service = ScoringServiceServer::with_interceptor(fake.clone(), look);
            let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
            tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
            format!("http://{address}")
        });
        let ran: Ran = run(command(&endpoint).args(["--token-file", file.to_str().unwrap()]));
        assert_eq!(seen.lock().unwrap().as_deref(), want, "{text:?}: {ran:?}");
        assert_eq!(ran.code, Some(if want.is_some() { 0 } else { 1 }), "{text:?}: {ran:?}");
        assert!(want.is_some() || ran.stderr.contains("holds no token"), "{ran:?}");
    }
}
