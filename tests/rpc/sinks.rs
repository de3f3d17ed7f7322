//! Calls with a sink: outputs that are there, that are being written, that lie where inputs are looked for.

use capsieve_rpc::v1;
use capsieve_rpc::v1::score_batch_response::Event;
use tonic::Code;
use tonic_types::StatusExt;

use super::server::{Answer, Server, Shards, call, of_shards, wait, with_tokens};
use super::stress::gauge;
use crate::support::{capsieve, read_parquet, shard, write_parquet};

fn to(shards: &Shards, input: &str, sink: &str, overwrite: bool) -> v1::ScoreBatchRequest {
    let sink = v1::ParquetSink { uri: shards.text("") + sink, drop_images: false, overwrite };
    v1::ScoreBatchRequest { sink: Some(sink), ..of_shards(&[shards.text("") + input]) }
}

fn done(answer: &Answer) -> Vec<v1::ShardDone> {
    assert!(answer.end.is_none(), "{:?}", answer.end);
    let done = |event: &Event| if let Event::ShardDone(done) = event { Some(done.clone()) } else { None };
    answer.events.iter().filter_map(done).collect()
}

/// Size and time of a file, which a new one does not share.
fn version(shards: &Shards, name: &str) -> (u64, std::time::SystemTime) {
    let meta = std::fs::metadata(shards.path(name)).unwrap();
    (meta.len(), meta.modified().unwrap())
}

#[test]
fn a_cut_call_that_overwrites_does_not_write_again_what_is_done() {
    let shards = Shards::new(&[40, 30]);
    let server = Server::start(&["--allow-uri", &shards.root()]);
    let request = || to(&shards, "in/", "out/", true);
    wait(async {
        let mut client = server.client().await;
        let first = done(&call(&mut client, request()).await);
        assert!(first.len() == 2 && first.iter().all(|done| !done.skipped && !done.resume_token.is_empty()));
        let token = first[0].resume_token.to_vec();
        let (a, b) = (version(&shards, "out/a.parquet"), version(&shards, "out/b.parquet"));
        // The first call was cut after its first shard, as far as its client knows.
        let resumed = call(&mut client, with_tokens(request(), vec![token.clone()])).await;
        let again = done(&resumed);
        assert_eq!((again[0].skipped, again[1].skipped), (true, false));
        assert_eq!((again[0].rows, again[0].scored), (40, 34), "what is known of it");
        assert_eq!(version(&shards, "out/a.parquet"), a);
        assert_ne!(version(&shards, "out/b.parquet"), b, "no token: overwritten as asked");
        // The token says done, but its output is another one now.
        std::fs::write(shards.path("out/a.parquet"), "not ours").unwrap();
        let replaced = done(&call(&mut client, with_tokens(request(), vec![token.clone()])).await);
        assert!(!replaced[0].skipped);
        assert_eq!(read_parquet(&shards.path("out/a.parquet")).num_rows(), 40);
        // Tokens of another sink, or of a stream, are for other work.
        std::fs::create_dir(shards.path("other")).unwrap();
        let other = with_tokens(to(&shards, "in/", "other/", true), vec![token.clone()]);
        assert_eq!(call(&mut client, other).await.status().code(), Code::FailedPrecondition);
        let streamed = with_tokens(of_shards(&[shards.text("in") + "/"]), vec![token]);
        assert_eq!(call(&mut client, streamed).await.status().code(), Code::FailedPrecondition);
    });
}

#[test]
fn identical_calls_at_a_time_all_find_the_output() {
    let shards = Shards::new(&[200]);
    let server = Server::start(&["--allow-uri", &shards.root(), "--batch-size", "4"]);
    for overwrite in [false, true] {
        wait(async {
            let mut calls = tokio::task::JoinSet::new();
            for _ in 0..6 {
                let (mut client, request) =
                    (server.client().await, to(&shards, "in/a.parquet", "out/a.parquet", overwrite));
                calls.spawn(async move { call(&mut client, request).await });
            }
            for answer in calls.join_all().await {
                assert_eq!(done(&answer)[0].rows, 200, "overwrite: {overwrite}");
            }
        });
        let names = crate::support::names(&shards.path("out"));
        assert_eq!(names, ["a.parquet", "a.stats.json"], "nothing is left over");
        assert_eq!(read_parquet(&shards.path("out/a.parquet")).num_rows(), 200);
    }
}

#[test]
fn a_small_output_does_not_wait_for_large_ones() {
    let shards = Shards::new(&[6]);
    // Large by its size alone: noise as images, which are refused.
    let noise: Vec<u8> = (0..3_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let rows: Vec<_> = (0..40).map(|row| (Some(noise.clone()), Some(format!("row {row}")))).collect();
    for name in ["x", "y", "z"] {
        let many: Vec<_> = rows.iter().chain(&super::server::pairs(4000, 1)).cloned().collect();
        write_parquet(&shards.path(&format!("in/{name}.parquet")), &shard(&many), 8);
    }
    let limit = (256 << 20).to_string();
    let arguments = ["--allow-uri", &shards.root(), "--memory-limit", &limit, "--metrics-listen", "127.0.0.1:0"];
    let server = Server::start(&[&arguments[..], &["--batch-size", "1"]].concat());
    wait(async {
        let mut running = tokio::task::JoinSet::new();
        for name in ["x", "y", "z"] {
            let (mut client, name) = (server.client().await, format!("{name}.parquet"));
            let request = to(&shards, &format!("in/{name}"), &format!("out/{name}"), false);
            running.spawn(async move { call(&mut client, request).await });
        }
        while gauge(&server, "capsieve_calls_in_flight") < 3.0 {
            assert!(running.try_join_next().is_none(), "none of them is refused");
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        let small = call(&mut server.client().await, to(&shards, "in/a.parquet", "out/a.parquet", false)).await;
        assert_eq!(done(&small)[0].rows, 6);
        assert!(running.try_join_next().is_none(), "the large ones are all still there");
        for large in running.join_all().await {
            assert_eq!(done(&large)[0].rows, 4040);
        }
    });
}

#[test]
fn a_sink_below_its_input_is_refused_however_it_is_spelt() {
    let shards = Shards::new(&[3]);
    std::fs::create_dir(shards.path("in/scored")).unwrap();
    std::os::unix::fs::symlink(shards.path("in/scored"), shards.path("link")).unwrap();
    let server = Server::start(&["--allow-uri", &shards.root()]);
    wait(async {
        let mut client = server.client().await;
        for sink in ["in/scored/", "in/", "in/new.parquet", "out/../in/scored/x.parquet", "link/"] {
            let answer = call(&mut client, to(&shards, "in/", sink, false)).await;
            let status = answer.status();
            assert_eq!(status.code(), Code::InvalidArgument, "{sink}: {status:?}");
            assert_eq!(status.get_details_bad_request().unwrap().field_violations[0].field, "sink.uri", "{sink}");
        }
        // A shard by its own name has no such neighbours.
        assert_eq!(done(&call(&mut client, to(&shards, "in/a.parquet", "in/scored/", false)).await).len(), 1);
    });
}

#[test]
fn complete_outputs_with_failed_rows_fail_who_asks_for_none() {
    let shards = Shards::new(&[20]);
    let (input, output) = (shards.text("in/a.parquet"), shards.text("out/a.parquet"));
    let server = Server::start(&["--allow-uri", &shards.root()]);
    wait(async {
        let mut client = server.client().await;
        assert_eq!(done(&call(&mut client, to(&shards, "in/a.parquet", "out/a.parquet", false)).await)[0].scored, 17);
        let fail = v1::ScoreBatchRequest { on_error: 2, ..to(&shards, "in/a.parquet", "out/a.parquet", false) };
        let answer = call(&mut client, fail).await;
        assert_eq!(answer.status().code(), Code::Aborted, "{:?}", answer.end);
        assert_eq!(answer.status().get_details_error_info().unwrap().reason, "ROW_FAILED");
    });
    // The same on the command line.
    let score = |more: &[&str]| {
        capsieve(&[&["score", "--model", "synthetic:tiny", "--input", &input, "--output", &output][..], more].concat())
    };
    assert_eq!(score(&[]).code, Some(3));
    let ran = score(&["--on-error", "fail"]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stderr.contains("3 rows of"), "{}", ran.stderr);
}
