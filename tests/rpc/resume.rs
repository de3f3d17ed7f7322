//! Calls that are cut, and go on: every row exactly once.

use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, StringArray};
use capsieve_rpc::v1::score_batch_request::Source;
use capsieve_rpc::v1::score_batch_response::Event;
use sha2::{Digest, Sha256};
use tonic::Code;

use super::server::{Entry, Server, Shards, call, narrow, of_chunk, of_pairs, of_shards, pairs, wait, with_tokens};
use crate::support::{list_shard, picture, program, run, write_parquet};

#[test]
fn a_call_cut_after_any_message_goes_on_with_the_next_row() {
    let shards = Shards::new(&[150, 1, 70]);
    let server = Server::start(&["--allow-uri", &shards.root()]);
    let other = Server::start(&["--allow-uri", &shards.root()]);
    let request = of_shards(&[shards.text("in") + "/"]);
    wait(async {
        let (mut client, mut second) = (server.client().await, other.client().await);
        let whole = call(&mut client, request.clone()).await;
        let want = whole.entries();
        assert_eq!(want.len(), 221);
        for cut in 1..whole.events.len() {
            let mut stream = client.score_batch(request.clone()).await.unwrap().into_inner();
            let (mut got, mut over, mut tokens) = (Vec::<Entry>::new(), Vec::new(), std::collections::HashMap::new());
            for _ in 0..cut {
                match stream.message().await.unwrap().unwrap().event.unwrap() {
                    Event::Chunk(chunk) => {
                        got.extend(of_chunk(&chunk));
                        tokens.insert(chunk.shard_index, chunk.resume_token.to_vec());
                    }
                    Event::ShardDone(done) => {
                        over.push(done.shard_index);
                        tokens.insert(done.shard_index, done.resume_token.to_vec());
                    }
                    _ => {}
                }
            }
            drop(stream);
            // On another worker, which has the same model.
            let rest = call(&mut second, with_tokens(request.clone(), tokens.into_values().collect())).await;
            got.extend(rest.entries());
            let skipped = rest.events.iter().filter_map(|event| match event {
                Event::ShardDone(done) => done.skipped.then_some(done.shard_index),
                _ => None,
            });
            assert_eq!(skipped.collect::<Vec<_>>(), over, "what is done is not begun again, cut after {cut}");
            assert_eq!(got.len(), want.len(), "cut after {cut} messages");
            assert!(got.iter().zip(&want).all(|(got, want)| got.1 == want.1 && got.3 == want.3), "cut after {cut}");
        }
    });
}

/// One row of many captions with long keys fills several chunks, and is cut between any two of them.
#[test]
fn a_call_cut_within_a_row_goes_on_with_its_next_caption() {
    let shards = Shards::new(&[]);
    let captions = |count: usize| Some((0..count).map(|i| Some(format!("caption {i}"))).collect());
    let rows =
        vec![(Some(picture(1)), captions(2)), (Some(picture(2)), captions(2500)), (Some(picture(3)), captions(3))];
    let batch = list_shard(&rows);
    let keys = (0..3).map(|row| Some(format!("{row}").repeat(4000))).collect::<StringArray>();
    let columns = vec![Arc::new(keys) as ArrayRef, batch.column(1).clone(), batch.column(2).clone()];
    write_parquet(&shards.path("in/a.parquet"), &RecordBatch::try_new(batch.schema(), columns).unwrap(), 10);
    let server = Server::start(&["--allow-uri", &shards.root()]);
    let request = of_shards(&[shards.text("in/a.parquet")]);
    wait(async {
        let mut client = server.client().await;
        let whole = call(&mut client, request.clone()).await;
        let want = whole.entries();
        assert_eq!(want.len(), 2505);
        let chunks: Vec<_> = whole
            .events
            .iter()
            .filter_map(|event| if let Event::Chunk(chunk) = event { Some(chunk) } else { None })
            .collect();
        assert!(chunks.len() > 4, "{} chunks", chunks.len());
        let mut got = Vec::new();
        for chunk in &chunks {
            got.extend(of_chunk(chunk));
            let token = chunk.resume_token.to_vec();
            let rest = call(&mut client, with_tokens(request.clone(), vec![token])).await.entries();
            let both: Vec<Entry> = got.iter().cloned().chain(rest).collect();
            let places = |entries: &[Entry]| entries.iter().map(|entry| (entry.1, entry.2)).collect::<Vec<_>>();
            assert_eq!(places(&both), places(&want), "cut after {} entries", got.len());
        }
    });
}

/// A token as it would be with other numbers in it.
fn forged(token: &[u8], row: u64, caption: u64) -> Vec<u8> {
    let mut fields: serde_json::Value = serde_json::from_slice(&token[9..]).unwrap();
    (fields["r"], fields["c"]) = (row.into(), caption.into());
    let json = serde_json::to_vec(&fields).unwrap();
    [&token[..1], &Sha256::digest(&json)[..8], &json].concat()
}

#[test]
fn positions_that_are_nowhere_are_refused() {
    let shards = Shards::new(&[50]);
    let server = Server::start(&["--allow-uri", &shards.root()]);
    let request = of_shards(&[shards.text("in/a.parquet")]);
    wait(async {
        let mut client = server.client().await;
        let whole = call(&mut client, request.clone()).await;
        let token = whole.events.iter().find_map(|event| match event {
            Event::Chunk(chunk) => Some(chunk.resume_token.to_vec()),
            _ => None,
        });
        let token = token.unwrap();
        for (row, caption, want) in [
            (49, 0, Ok(1)),
            (50, 0, Ok(0)),
            (51, 0, Err(())),
            (u64::MAX, 0, Err(())),
            (7, 1, Err(())),
            (7, u64::MAX, Err(())),
        ] {
            let answer = call(&mut client, with_tokens(request.clone(), vec![forged(&token, row, caption)])).await;
            match want {
                Ok(entries) => assert_eq!(answer.entries().len(), entries),
                Err(()) => assert_eq!(answer.status().code(), Code::InvalidArgument, "row {row}, caption {caption}"),
            }
        }
    });
}

/// The image of a row is gone when its call goes on: the captions that were not sent yet are failures, none is lost.
#[test]
fn a_row_that_fails_when_it_is_resumed_says_so_for_the_rest_of_its_captions() {
    let shards = Shards::new(&[]);
    std::fs::write(shards.path("in/1.png"), picture(1)).unwrap();
    let captions: Option<Vec<_>> = Some((0..2500).map(|i| Some(format!("caption {i}"))).collect());
    let batch = list_shard(&[(Some(picture(0)), captions)]);
    let key: ArrayRef = Arc::new(StringArray::from(vec!["k".repeat(4000)]));
    let columns = [
        ("key", key),
        ("image", Arc::new(StringArray::from(vec!["1.png"])) as ArrayRef),
        ("caption", batch.column(2).clone()),
    ];
    write_parquet(&shards.path("in/a.parquet"), &RecordBatch::try_from_iter(columns).unwrap(), 10);
    let server = Server::start(&["--allow-uri", &shards.root()]);
    let request = of_shards(&[shards.text("in/a.parquet")]);
    wait(async {
        let mut client = server.client().await;
        let whole = call(&mut client, request.clone()).await;
        let first =
            whole.events.iter().find_map(|event| if let Event::Chunk(chunk) = event { Some(chunk) } else { None });
        let (sent, token) = (first.unwrap().row.len(), first.unwrap().resume_token.to_vec());
        std::fs::remove_file(shards.path("in/1.png")).unwrap();
        let rest = call(&mut client, with_tokens(request, vec![token])).await.entries();
        let want = (0, u32::try_from(sent).unwrap(), "fetch_failed");
        assert_eq!(rest.iter().map(|entry| (entry.1, entry.2, entry.5.as_str())).collect::<Vec<_>>(), [want]);
    });
}

#[test]
fn tokens_of_other_work_are_refused() {
    let shards = Shards::new(&[150]);
    let server = Server::start(&["--allow-uri", &shards.root()]);
    let other = Server::listen("synthetic:tiny:7", &["--allow-uri", &shards.root()]);
    other.wait_for("serving");
    let third = Server::start(&["--allow-uri", &shards.root(), "--itm-token", "enc"]);
    let request = of_shards(&[shards.text("in/a.parquet")]);
    wait(async {
        let mut client = server.client().await;
        let whole = call(&mut client, request.clone()).await;
        let token = whole.events.iter().find_map(|event| match event {
            Event::Chunk(chunk) => Some(chunk.resume_token.to_vec()),
            _ => None,
        });
        let whole_token = token.unwrap();
        let resumed = with_tokens(request.clone(), vec![whole_token.clone()]);
        let rest = call(&mut client, resumed.clone()).await;
        assert!(rest.entries().len() < 150 && !rest.entries().is_empty());
        let refused = call(&mut other.client().await, resumed.clone()).await;
        assert_eq!(refused.status().code(), Code::FailedPrecondition, "another model");
        let refused = call(&mut third.client().await, resumed.clone()).await;
        assert_eq!(refused.status().code(), Code::FailedPrecondition, "another first token of the matching head");
        let twice = with_tokens(request.clone(), vec![whole_token.clone(), whole_token.clone()]);
        assert_eq!(call(&mut client, twice).await.status().code(), Code::InvalidArgument, "two tokens of one shard");
        let mut heads = resumed.clone();
        heads.heads = vec![1];
        assert_eq!(call(&mut client, heads).await.status().code(), Code::FailedPrecondition, "other heads");
        std::fs::copy(shards.path("in/a.parquet"), shards.path("in/new.parquet")).unwrap();
        std::fs::rename(shards.path("in/new.parquet"), shards.path("in/a.parquet")).unwrap();
        let refused = call(&mut client, resumed).await;
        assert_eq!(refused.status().code(), Code::FailedPrecondition, "another version of the shard");
    });
}

/// Workers are killed and started again under a `submit`, which gives every row once.
#[test]
#[cfg(unix)]
fn submit_goes_on_when_its_worker_dies() {
    let shards = Shards::new(&[900, 300]);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let listen = port.to_string();
    let arguments = ["--allow-uri", &shards.root(), "--listen", &listen, "--batch-size", "1"];
    let start = || {
        let mut command = program();
        // --listen of the helper comes first: clap takes the last.
        command.args(["serve", "--model", "synthetic:tiny"]).args(arguments);
        command.stderr(std::process::Stdio::null()).spawn().unwrap()
    };
    let mut worker = start();
    let submitting = std::thread::spawn({
        let (endpoint, input) = (format!("http://{listen}"), shards.text("in") + "/");
        move || run(program().args(["submit", "--endpoint", &endpoint, "--input", &input, "--patience", "60"]))
    });
    let mut kills = 0;
    while !submitting.is_finished() && kills < 6 {
        std::thread::sleep(std::time::Duration::from_millis(250));
        worker.kill().unwrap();
        worker.wait().unwrap();
        kills += 1;
        worker = start();
    }
    let ran = submitting.join().unwrap();
    worker.kill().unwrap();
    worker.wait().unwrap();
    assert_eq!(ran.code, Some(3), "{} kills: {}", kills, ran.stderr);
    let rows: Vec<(String, u64)> = ran
        .stdout
        .lines()
        .map(|line| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            (line["shard"].as_str().unwrap().to_owned(), line["row"].as_u64().unwrap())
        })
        .collect();
    let mut once = rows.clone();
    once.sort();
    once.dedup();
    assert_eq!((rows.len(), once.len()), (1200, 1200), "every row exactly once after {kills} kills");
    assert!(ran.stderr.contains("1200 rows, 1028 scored, 172 without a score"), "{}", ran.stderr);
}

#[test]
#[cfg(unix)]
fn a_drain_lets_short_calls_end_and_cuts_long_ones_with_a_position() {
    let shards = Shards::new(&[4000]);
    let request = of_shards(&[shards.text("in/a.parquet")]);
    for (timeout, finishes) in [("60", true), ("0.2", false)] {
        let arguments = ["--allow-uri", &shards.root(), "--batch-size", "1", "--drain-timeout", timeout];
        let mut server = Server::start(&arguments);
        wait(async {
            let mut client = server.client().await;
            let mut stream = client.score_batch(request.clone()).await.unwrap().into_inner();
            let (mut rows, mut last) = (0, Vec::new());
            let mut ended = None;
            loop {
                match stream.message().await {
                    Ok(Some(message)) => match message.event.unwrap() {
                        Event::Chunk(chunk) => {
                            if rows == 0 {
                                server.signal("-TERM");
                                server.wait_for("draining");
                                let refused = client.score_batch(request.clone()).await.unwrap_err();
                                assert_eq!(refused.code(), Code::Unavailable, "no new calls: {refused:?}");
                            }
                            rows += chunk.row.len();
                            last = chunk.resume_token.to_vec();
                        }
                        Event::Summary(_) => ended = Some(true),
                        _ => {}
                    },
                    Ok(None) => break,
                    Err(status) => {
                        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
                        ended = Some(false);
                        break;
                    }
                }
            }
            assert_eq!(ended, Some(finishes), "after {rows} rows");
            if !finishes {
                let other = Server::start(&["--allow-uri", &shards.root()]);
                let rest = call(&mut other.client().await, with_tokens(request.clone(), vec![last])).await;
                assert_eq!(rows + rest.entries().len(), 4000);
            }
        });
        assert_eq!(server.ended(), Some(0), "{}", server.log.lock().unwrap());
    }
}

/// Inline pairs have no positions: a drain waits for who has not read everything yet.
#[test]
#[cfg(unix)]
fn a_drain_waits_until_the_scores_are_taken() {
    let mut server = Server::start(&["--drain-timeout", "60"]);
    let mut request = of_pairs(&pairs(2, 0));
    if let Some(Source::Pairs(given)) = &mut request.source {
        given.items[0].key = "k".repeat(4096);
        given.items[0].captions = vec!["a".to_owned(); 480];
    }
    wait(async {
        let mut client = narrow(&server).await;
        let mut stream = client.score_batch(request).await.unwrap().into_inner();
        stream.message().await.unwrap();
        server.signal("-TERM");
        server.wait_for("draining: 1 calls");
        // Longer than the last words of a worker that has nothing left to do.
        tokio::time::sleep(std::time::Duration::from_secs(3)).await;
        let (mut entries, mut done) = (0, false);
        while let Some(message) = stream.message().await.unwrap() {
            match message.event.unwrap() {
                Event::Chunk(chunk) => entries += chunk.row.len(),
                Event::Summary(_) => done = true,
                _ => {}
            }
        }
        assert_eq!((entries, done), (481, true));
    });
    assert_eq!(server.ended(), Some(0));
}
