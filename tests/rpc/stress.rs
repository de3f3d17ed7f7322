//! Clients that vanish, stall, or speak no gRPC: the worker goes on, and its memory and its queue come back.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use capsieve_rpc::v1::score_batch_response::Event;
use tonic::Request;

use super::server::{Server, Shards, call, of_pairs, of_shards, pairs, wait};

/// A gauge of the metrics.
fn gauge(server: &Server, name: &str) -> f64 {
    let url = server.metrics.as_ref().unwrap();
    let address = url.strip_prefix("http://").and_then(|rest| rest.strip_suffix("/metrics")).unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let line = answer.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name} in {answer}"));
    line.rsplit_once(' ').unwrap().1.parse().unwrap()
}

fn comes_to_rest(server: &Server) {
    let start = Instant::now();
    while gauge(server, "capsieve_calls_in_flight") > 0.0 || gauge(server, "capsieve_queue_depth") > 0.0 {
        assert!(start.elapsed() < Duration::from_secs(20), "calls or rows are left over");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn five_hundred_clients_that_vanish_leave_nothing() {
    let shards = Shards::new(&[600]);
    let server = Server::start(&["--allow-uri", &shards.root(), "--metrics-listen", "127.0.0.1:0"]);
    let request = || of_shards(&[shards.text("in/a.parquet")]);
    let vanish = async |calls: usize| {
        let mut client = server.client().await;
        for i in 0..calls {
            let mut stream = client.score_batch(request()).await.unwrap().into_inner();
            for _ in 0..i % 4 {
                drop(stream.message().await);
            }
            if i % 10 == 9 {
                // With its connection.
                client = server.client().await;
            }
        }
    };
    wait(vanish(100));
    comes_to_rest(&server);
    let (_, before) = server.memory();
    wait(vanish(500));
    comes_to_rest(&server);
    let (_, after) = server.memory();
    assert!(after < before + (48 << 20), "{before} bytes before, {after} after");
    wait(async { assert_eq!(call(&mut server.client().await, request()).await.entries().len(), 600) });
}

#[test]
fn a_stalled_reader_stalls_nobody_else() {
    let shards = Shards::new(&[3000]);
    let server = Server::start(&["--allow-uri", &shards.root(), "--metrics-listen", "127.0.0.1:0"]);
    wait(async {
        let mut stalled = Vec::new();
        for _ in 0..20 {
            let mut client = server.client().await;
            let mut stream = client.score_batch(of_shards(&[shards.text("in/a.parquet")])).await.unwrap().into_inner();
            stream.message().await.unwrap().unwrap();
            stalled.push((client, stream));
        }
        let mut client = server.client().await;
        let begun = Instant::now();
        for _ in 0..20 {
            assert_eq!(call(&mut client, of_pairs(&pairs(10, 0))).await.entries().len(), 10);
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
        // Who reads on gets everything.
        let (_, mut stream) = stalled.pop().unwrap();
        let mut rows = 0;
        while let Some(message) = stream.message().await.unwrap() {
            if let Some(Event::Chunk(chunk)) = message.event {
                rows += chunk.row.len();
            }
        }
        assert_eq!(rows, 3000);
    });
    comes_to_rest(&server);
}

#[test]
fn what_is_no_grpc_harms_nobody() {
    let server = Server::start(&["--metrics-listen", "127.0.0.1:0", "--max-connections", "40"]);
    let connect = || TcpStream::connect(&server.address).unwrap();
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let garbage: Vec<u8> = (0..4096_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    // Half-open: connected, silent.
    let _silent: Vec<TcpStream> = (0..10).map(|_| connect()).collect();
    // Slow: a byte of the preface now and then.
    let mut slow = connect();
    slow.write_all(&preface[..3]).unwrap();
    for bytes in [&garbage[..], b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", &[0; 100], b"\x16\x03\x01\x02\x00"] {
        let mut stream = connect();
        drop(stream.write_all(bytes));
    }
    for frame in [&garbage[..], &[0xff; 64], &[0, 0, 0, 4, 0, 0, 0, 0, 0]] {
        let mut stream = connect();
        drop(stream.write_all(preface).and_then(|()| stream.write_all(frame)));
    }
    wait(async {
        let mut client = server.client().await;
        // Headers beyond every limit.
        let mut request = Request::new(of_pairs(&pairs(1, 0)));
        request.metadata_mut().insert("x-large", "v".repeat(1 << 16).parse().unwrap());
        assert!(client.score_batch(request).await.is_err());
        let mut client = server.client().await;
        assert_eq!(call(&mut client, of_pairs(&pairs(3, 0))).await.entries().len(), 3);
    });
    comes_to_rest(&server);
}

#[test]
fn ten_thousand_resets_are_survived() {
    let server = Server::start(&["--metrics-listen", "127.0.0.1:0"]);
    wait(async {
        let mut client = server.client().await;
        for i in 0..10_000 {
            let mut other = client.clone();
            let mut calling = Box::pin(other.score_batch(of_pairs(&pairs(1, 0))));
            // Sent, not waited for.
            let _ = futures::poll!(&mut calling);
            drop(calling);
            if i % 100 == 0 {
                tokio::task::yield_now().await;
                client = server.client().await;
            }
        }
        assert_eq!(call(&mut server.client().await, of_pairs(&pairs(3, 0))).await.entries().len(), 3);
    });
    comes_to_rest(&server);
}
