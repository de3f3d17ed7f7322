//! What operators rely on: traces, request ids, an end that loses nothing.

use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use capsieve_rpc::v1::score_batch_response::Event;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use tonic::{Code, Request, Response, Status};
use tonic_types::StatusExt;

use super::server::{Answer, Entry, Server, Shards, call, of_chunk, of_pairs, of_shards, pairs, wait, with_tokens};
use crate::support::{capsieve, program, run};

/// A collector of spans.
struct Collector(Mutex<Sender<Span>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let resources = request.into_inner().resource_spans;
        let spans = resources.into_iter().flat_map(|resource| resource.scope_spans).flat_map(|scope| scope.spans);
        let sender = self.0.lock().unwrap();
        spans.for_each(|span| sender.send(span).unwrap());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

async fn collector() -> (String, Receiver<Span>) {
    let (sender, spans) = channel();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let service = TraceServiceServer::new(Collector(Mutex::new(sender)));
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
    (format!("http://{address}"), spans)
}

fn attribute(span: &Span, key: &str) -> Option<Value> {
    let found = span.attributes.iter().find(|attribute| attribute.key == key)?;
    found.value.clone()?.value
}

#[test]
fn calls_are_traced_as_a_part_of_their_client_s_trace() {
    let shards = Shards::new(&[40]);
    wait(async {
        let (endpoint, spans) = collector().await;
        let arguments = ["--allow-uri", &shards.root(), "--otlp-endpoint", &endpoint];
        let mut server = Server::start(&arguments);
        let mut client = server.client().await;
        let mut request = of_shards(&[shards.text("in/a.parquet")]);
        request.request_id = "job-7".to_owned();
        let mut request = Request::new(request);
        let (trace, parent) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
        request.metadata_mut().insert("traceparent", format!("00-{trace}-{parent}-01").parse().unwrap());
        let mut stream = client.score_batch(request).await.unwrap().into_inner();
        while stream.message().await.unwrap().is_some() {}
        // And one that ends in an error, without a trace of its client's.
        let denied = call(&mut client, of_shards(&["/etc/passwd"])).await;
        assert_eq!(denied.status().code(), Code::PermissionDenied);
        // What was not sent yet is sent at the end.
        server.signal("-TERM");
        let (code, server) = tokio::task::spawn_blocking(move || (server.ended(), server)).await.unwrap();
        assert_eq!(code, Some(0));
        let spans: Vec<Span> = spans.try_iter().collect();
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let of_job: Vec<&Span> = spans.iter().filter(|span| hex(&span.trace_id) == trace).collect();
        let of_call =
            of_job.iter().find(|span| hex(&span.parent_span_id) == parent).expect("the client's span is the parent");
        assert_eq!(of_call.name, "capsieve.v1.ScoringService/ScoreBatch");
        assert_eq!(attribute(of_call, "request_id"), Some(Value::StringValue("job-7".to_owned())));
        assert_eq!(attribute(of_call, "rpc.grpc.status_code"), Some(Value::IntValue(0)));
        let of_shard = of_job.iter().find(|span| span.parent_span_id == of_call.span_id).expect("the shard's span");
        assert_eq!((of_shard.name.as_str(), attribute(of_shard, "rows")), ("shard", Some(Value::IntValue(40))));
        assert!(matches!(attribute(of_shard, "engine_seconds"), Some(Value::DoubleValue(seconds)) if seconds > 0.0));
        let code = Some(Value::IntValue(Code::PermissionDenied as i64));
        assert!(spans.iter().any(|span| attribute(span, "rpc.grpc.status_code") == code), "{spans:?}");
        // The log names the request too.
        let log = server.log.lock().unwrap();
        assert!(log.lines().any(|line| line.contains("job-7") && line.contains("call done")), "{log}");
    });
}

#[test]
fn a_collector_that_is_not_there_stops_nobody() {
    let mut server = Server::start(&["--otlp-endpoint", "http://127.0.0.1:9"]);
    wait(async {
        assert_eq!(call(&mut server.client().await, of_pairs(&pairs(3, 0))).await.entries().len(), 3);
    });
    server.signal("-TERM");
    assert_eq!(server.ended(), Some(0));
    let ran = capsieve(&["serve", "--model", "synthetic:tiny", "--otlp-endpoint", "not an address"]);
    assert!(ran.code == Some(1) && ran.stderr.contains("--otlp-endpoint"), "{ran:?}");
}

#[test]
fn every_request_has_a_name_and_every_refusal_says_it() {
    let server = Server::start(&[]);
    wait(async {
        let mut client = server.client().await;
        let named = |id: &str, mut request: capsieve_rpc::v1::ScoreBatchRequest| {
            request.request_id = id.to_owned();
            request
        };
        for request in [of_shards(&["/etc/passwd"]), of_pairs(&[])] {
            let refused = call(&mut client, named("mine", request)).await;
            let info = refused.status().get_details_request_info().expect("it says which request");
            assert_eq!(info.request_id, "mine");
        }
        // Without one the worker makes one up, another each time.
        let mut ids = std::collections::HashSet::new();
        for _ in 0..3 {
            let answer = call(&mut client, of_pairs(&pairs(1, 0))).await;
            let Some(Event::Started(started)) = answer.events.first() else { panic!("{:?}", answer.end) };
            assert!(started.request_id.len() >= 16 && ids.insert(started.request_id.clone()));
        }
    });
}

/// A call's rows so far and its last token.
async fn until_it_ends(
    mut stream: tonic::Streaming<capsieve_rpc::v1::ScoreBatchResponse>,
) -> (Vec<Entry>, Vec<u8>, Option<Status>) {
    let (mut rows, mut token) = (Vec::new(), Vec::new());
    loop {
        match stream.message().await {
            Ok(Some(message)) => {
                if let Some(Event::Chunk(chunk)) = message.event {
                    rows.extend(of_chunk(&chunk));
                    token = chunk.resume_token.to_vec();
                }
            }
            Ok(None) => return (rows, token, None),
            Err(status) => return (rows, token, Some(status)),
        }
    }
}

fn same(mut got: Vec<Entry>, rest: Answer, want: &[Entry]) {
    got.extend(rest.entries());
    let of = |entries: &[Entry]| entries.iter().map(|entry| (entry.1, entry.5.clone())).collect::<Vec<_>>();
    assert_eq!(of(&got), of(want), "every row once");
}

#[test]
fn many_calls_under_sigterm_end_with_a_code_and_their_exact_position() {
    let shards = Shards::new(&[1500]);
    let mut server = Server::start(&["--allow-uri", &shards.root(), "--drain-timeout", "0.3"]);
    let other = Server::start(&["--allow-uri", &shards.root()]);
    let request = || of_shards(&[shards.text("in/a.parquet")]);
    wait(async {
        let mut second = other.client().await;
        let want = call(&mut second, request()).await.entries();
        let mut calls = tokio::task::JoinSet::new();
        for _ in 0..12 {
            let stream = server.client().await.score_batch(request()).await.unwrap().into_inner();
            calls.spawn(until_it_ends(stream));
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
        server.signal("-TERM");
        let mut cut = 0;
        while let Some(ended) = calls.join_next().await {
            let (rows, token, status) = ended.unwrap();
            let Some(status) = status else {
                assert_eq!(rows.len(), want.len());
                continue;
            };
            cut += 1;
            assert_eq!(status.code(), Code::Unavailable, "{status:?}");
            let tokens = if token.is_empty() { vec![] } else { vec![token] };
            same(rows, call(&mut second, with_tokens(request(), tokens)).await, &want);
        }
        assert!(cut > 0, "no call was cut: the test is too slow");
    });
    assert_eq!(server.ended(), Some(0));
}

#[test]
fn a_second_signal_ends_the_drain() {
    let shards = Shards::new(&[4000]);
    let mut server = Server::start(&["--allow-uri", &shards.root(), "--batch-size", "1", "--drain-timeout", "600"]);
    wait(async {
        let mut client = server.client().await;
        let stream = client.score_batch(of_shards(&[shards.text("in/a.parquet")])).await.unwrap().into_inner();
        server.signal("-TERM");
        server.wait_for("draining");
        server.signal("-INT");
        let (_, _, status) = until_it_ends(stream).await;
        assert_eq!(status.expect("it is cut").code(), Code::Unavailable);
    });
    assert_eq!(server.ended(), Some(0));
}

#[test]
fn a_shard_that_cannot_be_read_on_ends_the_call_with_its_position() {
    let shards = Shards::new(&[3000]);
    let server = Server::start(&["--allow-uri", &shards.root(), "--batch-size", "1"]);
    let request = || of_shards(&[shards.text("in/a.parquet")]);
    let (path, aside) = (shards.path("in/a.parquet"), shards.path("aside"));
    wait(async {
        let mut client = server.client().await;
        let want = call(&mut client, request()).await.entries();
        let mut stream = client.score_batch(request()).await.unwrap().into_inner();
        let mut rows = Vec::new();
        while rows.is_empty() {
            if let Some(Event::Chunk(chunk)) = stream.message().await.unwrap().unwrap().event {
                rows = of_chunk(&chunk);
            }
        }
        std::fs::rename(&path, &aside).unwrap();
        let (more, token, status) = until_it_ends(stream).await;
        rows.extend(more);
        let status = status.expect("it cannot be read to its end");
        assert_eq!(status.code(), Code::NotFound, "{status:?}");
        assert!(!rows.is_empty() && rows.len() < want.len(), "{} rows", rows.len());
        // The store is back.
        std::fs::rename(&aside, &path).unwrap();
        same(rows, call(&mut client, with_tokens(request(), vec![token])).await, &want);
    });
}

#[test]
fn a_health_check_without_a_token_where_that_is_wanted() {
    let shards = Shards::new(&[]);
    std::fs::write(shards.path("tokens"), "secret\n").unwrap();
    let server = Server::start(&["--token-file", &shards.text("tokens"), "--open-health"]);
    wait(async {
        let channel = tonic::transport::Channel::from_shared(server.endpoint()).unwrap().connect().await.unwrap();
        let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
        let request = tonic_health::pb::HealthCheckRequest { service: String::new() };
        assert!(health.check(request).await.is_ok());
        let refused = server.client().await.get_model_info(capsieve_rpc::v1::GetModelInfoRequest {}).await;
        assert_eq!(refused.unwrap_err().code(), Code::Unauthenticated, "health alone is open");
    });
}

#[test]
fn submit_says_what_it_cannot_do() {
    let shards = Shards::new(&[5]);
    let server = Server::start(&["--allow-uri", &shards.root()]);
    let endpoint = server.endpoint();
    let submit = |arguments: &[&str]| run(program().args(["submit", "--patience", "0"]).args(arguments));
    let input = shards.text("in/a.parquet");
    for (arguments, words) in [
        (&["--endpoint", "http://127.0.0.1:9", "--input", &input][..], "127.0.0.1:9"),
        (&["--endpoint", &endpoint, "--input", "/etc/passwd"], "PERMISSION_DENIED"),
        (&["--endpoint", &endpoint, "--input", &shards.text("in/none.parquet")], "none.parquet"),
        (&["--endpoint", "nonsense nonsense", "--input", &input], "no endpoint"),
    ] {
        let ran = submit(arguments);
        assert!(ran.code == Some(1) && ran.stderr.contains(words) && ran.stdout.is_empty(), "{arguments:?}: {ran:?}");
    }
}

/// A hub that takes connections and says nothing: the model is being fetched for as long as it is asked for.
#[test]
fn health_is_answered_while_the_model_is_fetched() {
    let hub = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let cache = tempfile::tempdir().unwrap();
    let mut command = program();
    command.args(["serve", "--model", "someone/some-model", "--listen", "127.0.0.1:0"]);
    command.env("HF_HUB_OFFLINE", "0").env("HF_ENDPOINT", format!("http://{}", hub.local_addr().unwrap()));
    command.env("HF_HUB_CACHE", cache.path()).env("HF_HOME", cache.path());
    let mut server = Server::spawn(command);
    wait(async {
        let channel = tonic::transport::Channel::from_shared(server.endpoint()).unwrap().connect().await.unwrap();
        let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
        let answer = health.check(tonic_health::pb::HealthCheckRequest::default()).await.unwrap();
        assert_eq!(answer.into_inner().status(), tonic_health::pb::health_check_response::ServingStatus::NotServing);
    });
    server.signal("-TERM");
    assert_eq!(server.ended(), Some(0));
    // What is wrong at once is said before anything is fetched.
    let ran = capsieve(&["serve", "--model", "someone/some-model", "--token-file", "/no/such/file"]);
    assert!(
        ran.code == Some(1) && ran.stderr.contains("/no/such/file") && !ran.stderr.contains("listening"),
        "{ran:?}"
    );
}
