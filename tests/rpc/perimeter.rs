//! Clients that take room and give nothing for it. Each test fills what there is of something, and then a client comes in
//! all the same; and whatever is refused says why in the way of gRPC.

use std::io::Write;
use std::net::TcpStream;
use std::time::Duration;

use capsieve_rpc::v1;
use capsieve_rpc::v1::scoring_service_client::ScoringServiceClient;
use futures::StreamExt;
use http_body::Frame;
use http_body_util::StreamBody;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tonic::body::Body;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tonic_types::StatusExt;
use tower::{Service, ServiceExt};

use super::limits::closed;
use super::server::{Server, Shards, call, of_pairs, of_shards, pairs, wait};

pub(super) const SCORE_BATCH: &str = "/capsieve.v1.ScoringService/ScoreBatch";
pub(super) const MODEL_INFO: &str = "/capsieve.v1.ScoringService/GetModelInfo";
pub(super) const HEALTH_CHECK: &str = "/grpc.health.v1.Health/Check";
/// What reading a message takes: the bytes as they come, and while the buffer grows. Measured: 60 MB for 16.
const READING_BYTES: u64 = 128 << 20;

pub(super) async fn connect(server: &Server) -> Channel {
    Channel::from_shared(server.endpoint()).unwrap().connect().await.unwrap()
}

/// A body of what is sent, open until the sender is dropped.
pub(super) fn body() -> (mpsc::UnboundedSender<Vec<u8>>, Body) {
    let (sender, sent) = mpsc::unbounded_channel();
    let frames = tokio_stream::wrappers::UnboundedReceiverStream::new(sent);
    (sender, Body::new(StreamBody::new(frames.map(|bytes: Vec<u8>| Ok::<_, Status>(Frame::data(bytes.into()))))))
}

/// A message as gRPC frames it.
pub(super) fn framed(message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    [&[0][..], &length, message].concat()
}

/// The answer to a request.
pub(super) async fn open(channel: Channel, path: &str, body: Body) -> http::Response<Body> {
    open_with(channel, path, &[], body).await
}

/// The answer to a request with some more headers.
pub(super) async fn open_with(
    mut channel: Channel,
    path: &str,
    headers: &[(&str, &str)],
    body: Body,
) -> http::Response<Body> {
    let request = http::Request::post(format!("http://localhost{path}")).header("te", "trailers");
    let request = request.header("content-type", "application/grpc");
    let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
    channel.ready().await.unwrap().call(request.body(body).unwrap()).await.unwrap()
}

/// The status that a request gets before any message.
pub(super) async fn ask(channel: Channel, path: &str, body: Body) -> Status {
    let answer = open(channel, path, body).await;
    Status::from_header_map(answer.headers()).unwrap_or_else(|| panic!("an answer: {answer:?}"))
}

/// Sends `start`, and then nothing.
pub(super) async fn half(channel: Channel, path: &'static str, start: Vec<u8>) -> Status {
    let (sender, body) = body();
    sender.send(start).unwrap();
    ask(channel, path, body).await
}

/// The same with a deadline that nobody but the worker looks at: tonic's channel has a timer of its own.
async fn half_until(server: &Server, path: &str, deadline: &str) -> Status {
    let stream = tokio::net::TcpStream::connect(&server.address).await.unwrap();
    let (client, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let request = http::Request::post(format!("http://localhost{path}")).header("te", "trailers");
    let request = request.header("content-type", "application/grpc").header("grpc-timeout", deadline);
    let (answer, mut body) = client.ready().await.unwrap().send_request(request.body(()).unwrap(), false).unwrap();
    body.send_data(vec![0, 0].into(), false).unwrap();
    Status::from_header_map(answer.await.unwrap().headers()).unwrap()
}

/// The head of a message, and a tenth of what it promises.
pub(super) fn beginning() -> Vec<u8> {
    [&[0, 0, 0, 1, 0][..], &[10; 25]].concat()
}

/// A field of a message that has a length.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut wire = vec![number << 3 | 2];
    let mut length = bytes.len();
    while length >= 0x80 {
        wire.push(length as u8 | 0x80);
        length >>= 7;
    }
    wire.push(length as u8);
    wire.extend(bytes);
    wire
}

#[test]
fn small_on_the_wire_is_not_large_in_memory() {
    let server = Server::start(&[]);
    let (_, before) = server.memory();
    let most = (16 << 20) - 64;
    let empty = |number: u8| [number << 3 | 2, 0].repeat(most / 2);
    wait(async {
        let channel = connect(&server).await;
        for (message, name) in [
            (field(1, &empty(1)), "pairs.items"),
            (field(1, &field(1, &empty(4))), "pairs.items.captions"),
            (field(2, &empty(1)), "shards.uris"),
            (field(2, &empty(3)), "shards.resume_tokens"),
            ([0x18, 1].repeat(most / 2), "heads"),
            (field(3, &vec![1; most]), "heads"),
            (vec![0xff; 100], "request"),
            (beginning(), "request"),
        ] {
            let (sender, body) = body();
            sender.send(framed(&message)).unwrap();
            drop(sender);
            let status = ask(channel.clone(), SCORE_BATCH, body).await;
            assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
            assert_eq!(status.get_details_bad_request().unwrap().field_violations[0].field, name);
        }
        let (sender, body) = body();
        sender.send(framed(&[0x0a])).unwrap();
        drop(sender);
        assert_eq!(ask(channel, MODEL_INFO, body).await.code(), Code::InvalidArgument);
        let info = server.client().await.get_model_info(v1::GetModelInfoRequest {}).await.unwrap().into_inner();
        assert_eq!((info.pairs_items_max, info.pairs_captions_max), (16_384, 65_536));
    });
    let (peak, _) = server.memory();
    println!("{} MB before, {} at the peak", before >> 20, peak >> 20);
    assert!(peak < before + READING_BYTES, "{before} bytes before, {peak} at the peak");
}

#[test]
fn what_does_not_speak_http2_is_closed_at_once() {
    let server = Server::start(&["--handshake-timeout", "600"]);
    for garbage in [&b"GET / HTTP/1.1\r\n"[..], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r.", &[0x16, 3, 1]] {
        let mut stream = TcpStream::connect(&server.address).unwrap();
        stream.write_all(garbage).unwrap();
        closed(stream);
    }
    // And what speaks it in pieces is a client.
    wait(async { assert_eq!(call(&mut server.client().await, of_pairs(&pairs(3, 0))).await.entries().len(), 3) });
}

/// A server that asks for the token "secret", but not for health checks.
pub(super) fn guarded(shards: &Shards, arguments: &[&str]) -> Server {
    std::fs::write(shards.path("tokens"), "secret\n").unwrap();
    Server::start(&[&["--token-file", &shards.text("tokens"), "--open-health"], arguments].concat())
}

pub(super) fn trusted<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", "Bearer secret".parse().unwrap());
    request
}

#[test]
fn connections_without_an_accepted_request_make_room() {
    let arguments = ["--handshake-timeout", "1", "--keepalive", "0.2", "--max-connections", "3"];
    let server = guarded(&Shards::new(&[]), &arguments);
    wait(async {
        let mut strangers = Vec::new();
        for _ in 0..3 {
            // All that can be done without a token; the channel answers pings.
            let channel = connect(&server).await;
            let refused = ScoringServiceClient::new(channel.clone()).get_model_info(v1::GetModelInfoRequest {}).await;
            assert_eq!(refused.unwrap_err().code(), Code::Unauthenticated);
            let watched = HealthClient::new(channel.clone()).watch(HealthCheckRequest::default()).await;
            strangers.push((channel, watched.unwrap()));
        }
        let mut client = ScoringServiceClient::new(connect(&server).await);
        assert!(client.get_model_info(trusted(v1::GetModelInfoRequest {})).await.is_ok());
        // It was accepted, so it stays, longer than they could.
        tokio::time::sleep(Duration::from_millis(1500)).await;
        assert!(client.get_model_info(trusted(v1::GetModelInfoRequest {})).await.is_ok());
    });
}

#[test]
fn idle_connections_make_room_and_busy_ones_stay() {
    let server = Server::start(&["--idle-timeout", "1", "--keepalive", "0.5", "--max-connections", "1"]);
    wait(async {
        let (mut first, mut second) = (server.client().await, server.client().await);
        // In turn: each waits until the other's connection is given up.
        for _ in 0..2 {
            for client in [&mut first, &mut second] {
                let mut tries = 0;
                // One that is closed while it is used says so, and is opened again, as every client of gRPC does it.
                while client.get_model_info(v1::GetModelInfoRequest {}).await.is_err() {
                    tries += 1;
                    assert!(tries < 3, "it is opened again");
                }
            }
        }
        let mut watched =
            HealthClient::new(connect(&server).await).watch(HealthCheckRequest::default()).await.unwrap().into_inner();
        assert!(watched.message().await.unwrap().is_some());
        let more = tokio::time::timeout(Duration::from_millis(2500), watched.message()).await;
        assert!(more.is_err(), "it is cut while an answer is on its way: {more:?}");
    });
}

#[test]
fn health_checks_without_a_token_take_nothing_from_others() {
    let server = guarded(&Shards::new(&[]), &[]);
    wait(async {
        let mut checks = JoinSet::new();
        let mut channels = Vec::new();
        for _ in 0..40 {
            let channel = connect(&server).await;
            for _ in 0..8 {
                checks.spawn(half(channel.clone(), HEALTH_CHECK, vec![0, 0, 0]));
            }
            channels.push(channel);
        }
        // Beyond its share a connection gets nothing, which also shows that its others are there.
        for channel in &channels {
            let refused = half(channel.clone(), HEALTH_CHECK, vec![0, 0, 0]).await;
            assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
        }
        let mut client = ScoringServiceClient::new(connect(&server).await);
        assert!(client.get_model_info(trusted(v1::GetModelInfoRequest {})).await.is_ok());
        // They are given little time.
        while let Some(given_up) = checks.join_next().await {
            let given_up = given_up.unwrap();
            let reason = given_up.get_details_error_info().map(|info| info.reason);
            assert_eq!(reason.as_deref(), Some("REQUEST_TIMEOUT"), "{given_up:?}");
        }
        // And little room.
        let long = HealthCheckRequest { service: "s".repeat(2000) };
        let refused = HealthClient::new(connect(&server).await).check(long).await.unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
    });
}

fn given_up(status: &Status) {
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    assert!(status.get_details_retry_info().is_some(), "{status:?}");
}

#[test]
fn half_sent_requests_keep_nobody_out() {
    let server = Server::start(&["--max-calls", "2", "--max-message-bytes", "1000000"]);
    wait(async {
        let channel = connect(&server).await;
        let mut requests = JoinSet::new();
        // Four for each call may arrive. Of one more than that, one is told to come again; and then of the client's too.
        for _ in 0..9 {
            requests.spawn(half(channel.clone(), SCORE_BATCH, beginning()));
        }
        given_up(&requests.join_next().await.unwrap().unwrap());
        assert_eq!(call(&mut server.client().await, of_pairs(&pairs(3, 0))).await.entries().len(), 3);
        given_up(&requests.join_next().await.unwrap().unwrap());
        assert!(requests.try_join_next().is_none(), "no more than is needed");
        // By their bytes: two of the largest.
        let large = || [&[0][..], &1_000_000_u32.to_be_bytes(), &[0; 900_000]].concat();
        requests.abort_all();
        while requests.join_next().await.is_some() {}
        for _ in 0..3 {
            requests.spawn(half(connect(&server).await, SCORE_BATCH, large()));
        }
        given_up(&requests.join_next().await.unwrap().unwrap());
        assert_eq!(requests.len(), 2);
        assert_eq!(call(&mut server.client().await, of_pairs(&pairs(3, 0))).await.entries().len(), 3);
    });
}

#[test]
fn a_drain_waits_for_calls_only_and_takes_none_that_arrives_later() {
    let shards = Shards::new(&[4000]);
    let arguments = ["--allow-uri", &shards.root(), "--batch-size", "1", "--drain-timeout", "600"];
    let mut server = Server::start(&arguments);
    wait(async {
        let mut client = server.client().await;
        let long = client.score_batch(of_shards(&[shards.text("in/a.parquet")])).await.unwrap();
        let message = framed(&field(6, b"late"));
        let (sender, body) = body();
        sender.send(message[..7].to_vec()).unwrap();
        let channel = connect(&server).await;
        let late = tokio::spawn(async move { ask(channel, SCORE_BATCH, body).await });
        // And one that never arrives.
        let never = tokio::spawn(half(connect(&server).await, SCORE_BATCH, beginning()));
        tokio::time::sleep(Duration::from_millis(300)).await;
        server.signal("-TERM");
        server.wait_for("draining: 1 calls are running");
        sender.send(message[7..].to_vec()).unwrap();
        drop(sender);
        let refused = late.await.unwrap();
        assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
        assert_eq!(refused.get_details_error_info().unwrap().reason, "DRAINING");
        assert!(!never.is_finished());
        drop((long, client));
    });
    assert_eq!(server.ended(), Some(0));
}

#[test]
fn every_deadline_has_a_reason() {
    let server = Server::start(&["--request-timeout", "0.5"]);
    wait(async {
        // The client's own deadline, in every method: the time in which a request arrives is a part of it.
        for path in [SCORE_BATCH, MODEL_INFO, HEALTH_CHECK] {
            for timeout in ["100m", "1m", "1n"] {
                let late = half_until(&server, path, timeout).await;
                assert_eq!(late.code(), Code::DeadlineExceeded, "{path} {timeout}: {late:?}");
                let info = late.get_details_error_info().unwrap();
                assert_eq!((info.reason.as_str(), info.domain.as_str()), ("DEADLINE", "capsieve"), "{path}");
            }
        }
        let late = half_until(&server, SCORE_BATCH, "1H").await;
        assert_eq!(late.code(), Code::DeadlineExceeded, "{late:?}");
        assert_eq!(late.get_details_error_info().unwrap().reason, "REQUEST_TIMEOUT");
    });
}
