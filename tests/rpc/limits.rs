//! What clients may take: memory, time, connections. Each test is a client that takes more.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use capsieve_prep::RgbImage;
use capsieve_rpc::v1;
use capsieve_rpc::v1::scoring_service_client::ScoringServiceClient;
use futures::StreamExt;
use http_body_util::StreamBody;
use tonic::body::Body;
use tonic::codec::CompressionEncoding;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tower::{Service, ServiceExt};

use super::server::{Server, Shards, call, of_pairs, of_shards, pairs, wait};
use crate::support::{png, shard, write_parquet};

/// The decoder's own memory for an image of the test: its pixels, and as many again while they are converted.
const DECODING_BYTES: u64 = 2 * 3 * 20_000_000;
/// Allocator, stacks, connections; measured: 60 MB.
const SLACK_BYTES: u64 = 120 << 20;

#[test]
fn memory_is_bounded_whatever_the_clients_do() {
    let shards = Shards::new(&[]);
    // One colour: 20 million pixels in a few kilobytes.
    let bomb = png(&RgbImage { width: 5000, height: 4000, pixels: vec![128; 60_000_000] });
    let rows: Vec<_> = (0..400).map(|row| (Some(bomb.clone()), Some(format!("bomb {row}")))).collect();
    write_parquet(&shards.path("in/bombs.parquet"), &shard(&rows), 100);
    let plain: Vec<_> = pairs(5000, 0).into_iter().filter(|(image, _)| image.as_ref().unwrap().len() > 20).collect();
    write_parquet(&shards.path("in/plain.parquet"), &shard(&plain), 1000);
    let limit = 64_u64 << 20;
    let arguments = ["--allow-uri", &shards.root(), "--memory-limit", &limit.to_string(), "--max-calls", "60"];
    let threads = ["--threads", "2"];
    let server = Server::start(&[&arguments[..], &threads].concat());
    let (_, before) = server.memory();
    wait(async {
        let mut stalled = Vec::new();
        // Readers that stop at once, calls of bombs, requests full of images that nobody reads on.
        for i in 0..60 {
            let request = match i % 3 {
                0 => of_shards(&[shards.text("in/plain.parquet")]),
                1 => of_shards(&[shards.text("in/bombs.parquet")]),
                _ => of_pairs(&rows[..32]),
            };
            let mut client = server.client().await;
            let mut stream = client.score_batch(request).await.unwrap().into_inner();
            drop(stream.message().await);
            stalled.push((client, stream));
        }
        tokio::time::sleep(Duration::from_secs(5)).await;
        drop(stalled);
        assert_eq!(call(&mut server.client().await, of_pairs(&pairs(3, 0))).await.entries().len(), 3);
    });
    let (peak, _) = server.memory();
    let requests = 20 * 32 * bomb.len() as u64;
    let most = before + limit + 2 * DECODING_BYTES + requests + SLACK_BYTES;
    println!("{} MB before, {} at the peak, {} allowed", before >> 20, peak >> 20, most >> 20);
    assert!(peak < most, "{before} bytes before, {peak} at the peak, {most} allowed");
}

#[test]
fn messages_are_limited_before_and_after_decompression() {
    let server = Server::start(&["--max-message-bytes", "1000000"]);
    let (_, before) = server.memory();
    let large = |bytes: usize| {
        let mut request = of_pairs(&pairs(1, 0));
        request.request_id = "r".repeat(bytes);
        request
    };
    wait(async {
        for encoding in [None, Some(CompressionEncoding::Gzip), Some(CompressionEncoding::Zstd)] {
            let client = || async {
                let client = server.client().await;
                encoding.map_or(client.clone(), |encoding| client.send_compressed(encoding))
            };
            // Zeros: a thousandth of it when compressed.
            let refused = call(&mut client().await, large(200 << 20)).await;
            assert_eq!(refused.status().code(), Code::ResourceExhausted, "{encoding:?}: {:?}", refused.end);
            assert!(refused.status().message().contains("1000000"), "the limit is said: {:?}", refused.end);
            let taken = call(&mut client().await, large(900_000)).await;
            assert_eq!(taken.status().code(), Code::InvalidArgument, "{encoding:?}: read, and the field is too long");
        }
    });
    let (peak, _) = server.memory();
    assert!(peak < before + (64 << 20), "{before} bytes before, {peak} at the peak");
}

/// A request that begins with `start` and then says nothing.
async fn half_a_request(server: &Server, path: &str, start: Vec<u8>) -> http::Response<Body> {
    let silent = futures::stream::iter([Ok::<_, Status>(http_body::Frame::data(start.into()))])
        .chain(futures::stream::pending());
    let request = http::Request::post(format!("{}{path}", server.endpoint()))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Body::new(StreamBody::new(silent)))
        .unwrap();
    let mut channel = Channel::from_shared(server.endpoint()).unwrap().connect().await.unwrap();
    channel.ready().await.unwrap().call(request).await.unwrap()
}

#[test]
fn requests_that_do_not_arrive_are_given_up() {
    let server = Server::start(&["--request-timeout", "0.3", "--max-calls", "1"]);
    wait(async {
        // Five bytes of a message's head, then a tenth of what it promises.
        let start = [&[0, 0, 0, 1, 0][..], &[10; 25]].concat();
        let begun = Instant::now();
        let answer = half_a_request(&server, "/capsieve.v1.ScoringService/ScoreBatch", start).await;
        let code = answer.headers().get("grpc-status").cloned();
        assert_eq!(code.unwrap(), (Code::DeadlineExceeded as i32).to_string(), "{answer:?}");
        assert!(begun.elapsed() < Duration::from_secs(20));
        // The call's room is free again.
        assert_eq!(call(&mut server.client().await, of_pairs(&pairs(3, 0))).await.entries().len(), 3);
        // The small methods take small requests only.
        let flood = [&[0, 0, 1, 0, 0][..], &[0; 1 << 16]].concat();
        let answer = half_a_request(&server, "/capsieve.v1.ScoringService/GetModelInfo", flood).await;
        let code = answer.headers().get("grpc-status").cloned();
        assert_eq!(code.unwrap(), (Code::ResourceExhausted as i32).to_string(), "{answer:?}");
    });
}

/// Whether the worker closes a connection, and after how long.
pub(super) fn closed(mut stream: TcpStream) -> Duration {
    let begun = Instant::now();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut bytes = [0; 1024];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => return begun.elapsed(),
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return begun.elapsed(),
            Err(error) => panic!("still open after {:?}: {error}", begun.elapsed()),
        }
    }
}

#[test]
fn connections_that_show_no_client_make_room() {
    let arguments = ["--handshake-timeout", "0.5", "--keepalive", "0.5", "--max-connections", "3"];
    let server = Server::start(&arguments);
    let connect = || TcpStream::connect(&server.address).unwrap();
    // Silent from the start; a byte of the opening now and then; opened, and then gone without a word.
    let silent = connect();
    let mut slow = connect();
    let mut opened = connect();
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    opened.write_all(preface).and_then(|()| opened.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0])).unwrap();
    let dripping = std::thread::spawn(move || {
        for byte in &preface[..20] {
            if slow.write_all(&[*byte]).is_err() {
                break;
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        closed(slow)
    });
    // All places are taken; a client comes in all the same, when theirs are given up.
    wait(async {
        let mut client = server.client().await;
        assert_eq!(call(&mut client, of_pairs(&pairs(3, 0))).await.entries().len(), 3);
    });
    for stream in [silent, opened] {
        assert!(closed(stream) < Duration::from_secs(20));
    }
    assert!(dripping.join().unwrap() < Duration::from_secs(20));
}

#[test]
fn idle_clients_stay_and_old_connections_go() {
    let server = Server::start(&["--keepalive", "0.2", "--max-connection-age", "1"]);
    wait(async {
        let mut client: ScoringServiceClient<Channel> = server.client().await;
        // Longer than both; tonic's channel answers pings, and connects again when it was told to go.
        for _ in 0..3 {
            tokio::time::sleep(Duration::from_millis(800)).await;
            let info = client.get_model_info(Request::new(v1::GetModelInfoRequest {})).await;
            assert!(info.is_ok(), "{info:?}");
        }
    });
}
