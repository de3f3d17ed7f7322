//! Clients that vanish, stall, or speak no gRPC: the worker goes on, and its memory and its queue come back.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, RecordBatch, StringArray};
use capsieve_prep::RgbImage;
use capsieve_rpc::v1::score_batch_request::Source;
use capsieve_rpc::v1::score_batch_response::Event;
use tonic::{Code, Request};
use tonic_types::StatusExt;

use super::server::{Server, Shards, call, narrow, of_pairs, of_shards, pairs, wait, with_tokens};
use crate::support::{list_shard, picture, png, shard, write_parquet};

/// A gauge of the metrics.
pub(crate) fn gauge(server: &Server, name: &str) -> f64 {
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

/// 3000 rows of one row group; keys of 4 KB make 12 MB of the scores, and of the row group.
fn wide_shard(path: &std::path::Path) {
    let batch = shard(&pairs(3000, 0));
    let mut state = 1_u64;
    let mut key = || {
        std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            char::from(b'!' + (state >> 58) as u8)
        })
        .take(4000)
        .collect::<String>()
    };
    let keys: StringArray = (0..3000).map(|_| Some(key())).collect();
    let columns = vec![Arc::new(keys) as ArrayRef, batch.column(1).clone(), batch.column(2).clone()];
    write_parquet(path, &RecordBatch::try_new(batch.schema(), columns).unwrap(), 3000);
}

#[test]
fn stalled_readers_stall_nobody_else() {
    let shards = Shards::new(&[40]);
    wide_shard(&shards.path("in/wide.parquet"));
    let rows = 3000;
    // 32 MiB for chunks, 16 for row groups: one of these at a time.
    let arguments = ["--allow-uri", &shards.root(), "--memory-limit", &(64 << 20).to_string()];
    let server = Server::start(&[&arguments[..], &["--metrics-listen", "127.0.0.1:0"]].concat());
    wait(async {
        let mut stalled = Vec::new();
        for _ in 0..16 {
            let mut client = narrow(&server).await;
            let request = of_shards(&[shards.text("in/wide.parquet")]);
            let mut stream = client.score_batch(request).await.unwrap().into_inner();
            // Every one of them gets to its first scores though all before it have stopped reading.
            let first = loop {
                if let Some(Event::Chunk(chunk)) = stream.message().await.unwrap().unwrap().event {
                    break chunk.row.len();
                }
            };
            stalled.push((client, stream, first));
        }
        let mut client = server.client().await;
        for _ in 0..10 {
            assert_eq!(call(&mut client, of_pairs(&pairs(10, 0))).await.entries().len(), 10);
            assert_eq!(call(&mut client, of_shards(&[shards.text("in/a.parquet")])).await.entries().len(), 40);
        }
        assert_eq!(gauge(&server, "capsieve_calls_in_flight"), 16.0, "they do stall");
        // Who reads on gets everything, once.
        let (_client, mut stream, mut got) = stalled.pop().unwrap();
        while let Some(message) = stream.message().await.unwrap() {
            if let Some(Event::Chunk(chunk)) = message.event {
                assert_eq!(chunk.row[0], got as u64);
                got += chunk.row.len();
            }
        }
        assert_eq!(got, rows);
    });
    comes_to_rest(&server);
}

#[test]
fn who_stalls_for_long_is_ended() {
    let shards = Shards::new(&[]);
    wide_shard(&shards.path("in/wide.parquet"));
    let arguments = ["--allow-uri", &shards.root(), "--stall-timeout", "0.3", "--metrics-listen", "127.0.0.1:0"];
    let server = Server::start(&arguments);
    wait(async {
        let mut client = narrow(&server).await;
        let request = of_shards(&[shards.text("in/wide.parquet")]);
        let mut stream = client.score_batch(request.clone()).await.unwrap().into_inner();
        stream.message().await.unwrap();
        comes_to_rest(&server);
        // What was on its way still comes, then the reason; from there the call goes on.
        let (mut rows, mut token) = (0, Vec::new());
        let status = loop {
            match stream.message().await {
                Ok(message) => {
                    if let Some(Event::Chunk(chunk)) = message.unwrap().event {
                        (rows, token) = (rows + chunk.row.len(), chunk.resume_token.to_vec());
                    }
                }
                Err(status) => break status,
            }
        };
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
        assert_eq!(status.get_details_error_info().unwrap().reason, "CLIENT_STALLED");
        let request = if token.is_empty() { request } else { with_tokens(request, vec![token]) };
        let rest = call(&mut server.client().await, request).await.entries().len();
        assert_eq!(rows + rest, 3000);
    });
}

/// A call is over when its client has it: until then it has its place, and its scores are bounded by places.
#[test]
fn scores_that_nobody_takes_keep_their_place_and_not_for_ever() {
    let arguments = ["--max-calls", "3", "--stall-timeout", "1", "--metrics-listen", "127.0.0.1:0"];
    let server = Server::start(&arguments);
    let mut request = of_pairs(&pairs(1, 0));
    if let Some(Source::Pairs(given)) = &mut request.source {
        // A few kilobytes that make two million of scores.
        given.items[0].key = "k".repeat(4096);
        given.items[0].captions = vec!["a".to_owned(); 480];
    }
    wait(async {
        let mut unread = Vec::new();
        for _ in 0..3 {
            let mut client = narrow(&server).await;
            unread.push((client.score_batch(request.clone()).await.unwrap().into_inner(), client));
        }
        let start = Instant::now();
        while gauge(&server, "capsieve_queue_depth") > 0.0 && start.elapsed() < Duration::from_secs(20) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(gauge(&server, "capsieve_calls_in_flight"), 3.0, "they are computed, and not over");
        let mut client = server.client().await;
        let refused = call(&mut client, of_pairs(&pairs(2, 0))).await;
        assert_eq!(refused.status().code(), Code::ResourceExhausted, "{:?}", refused.end);
        comes_to_rest(&server);
        assert_eq!(call(&mut client, of_pairs(&pairs(2, 0))).await.entries().len(), 2);
        for (mut stream, _client) in unread {
            let status = loop {
                match stream.message().await {
                    Ok(Some(message)) => assert!(!matches!(message.event, Some(Event::Summary(_)))),
                    Ok(None) => panic!("a stream without its end looks done"),
                    Err(status) => break status,
                }
            };
            assert_eq!(status.get_details_error_info().unwrap().reason, "CLIENT_STALLED", "{status:?}");
        }
    });
}

/// A small call beside giants of every kind, which are still there when it is done.
#[test]
fn ten_pairs_do_not_wait_for_giants() {
    let shards = Shards::new(&[]);
    let captions = |_: usize| Some((0..4000).map(|i| Some(format!("a caption of some words, number {i}"))).collect());
    let rows: Vec<_> = (0..60).map(|row| (Some(picture(row as u64)), captions(row))).collect();
    write_parquet(&shards.path("in/captions.parquet"), &list_shard(&rows), 60);
    let bomb = png(&RgbImage { width: 6000, height: 6000, pixels: vec![128; 108_000_000] });
    // Equal ones would be decoded once.
    let bomb = |row: u8| [&bomb[..], &[row]].concat();
    let bombs: Vec<_> = (0..12).map(|row| (Some(bomb(row)), Some(format!("bomb {row}")))).collect();
    let arguments = ["--allow-uri", &shards.root(), "--metrics-listen", "127.0.0.1:0", "--threads", "2"];
    let server = Server::start(&arguments);
    let giants = [of_shards(&[shards.text("in/captions.parquet")]), of_pairs(&bombs)];
    wait(async {
        let mut running = tokio::task::JoinSet::new();
        for i in 0..16 {
            let (mut client, giant) = (server.client().await, giants[i % 2].clone());
            running.spawn(async move { call(&mut client, giant).await });
        }
        while gauge(&server, "capsieve_calls_in_flight") < 16.0 {
            assert!(running.try_join_next().is_none(), "none of them is refused");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
        let mut client = server.client().await;
        for _ in 0..3 {
            assert_eq!(call(&mut client, of_pairs(&pairs(10, 0))).await.entries().len(), 10);
        }
        assert_eq!(gauge(&server, "capsieve_calls_in_flight"), 16.0, "the giants are all still there");
    });
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
