//! Shards by the names of their files: what a call is told of a prefix is what it gets, and nothing of a prefix is lost.

use capsieve_rpc::v1;
use capsieve_rpc::v1::score_batch_response::Event;
use tonic::Code;
use tonic_types::StatusExt;

use super::server::{Answer, Server, Shards, call, of_chunk, of_shards, pairs, wait, with_tokens};
use crate::support::{capsieve, names, read_parquet, shard, write_parquet};

/// Names that mean another file, or none, when they are taken for a part of a URI; each has its number of rows.
const NAMES: [&str; 8] = [
    "h#z.parquet",
    "q?r.parquet",
    "sp ace.parquet",
    "sub/x%21.parquet",
    "ünï.parquet",
    "x!.parquet",
    "x%21.parquet",
    "x%2521.parquet",
];

fn nasty() -> Shards {
    let shards = Shards::new(&[]);
    std::fs::create_dir(shards.path("in/sub")).unwrap();
    for (number, name) in NAMES.iter().enumerate() {
        write_parquet(&shards.path(&format!("in/{name}")), &shard(&pairs(40 + number, number)), 16);
    }
    shards
}

fn listed(answer: &Answer) -> &[String] {
    match answer.events.first() {
        Some(Event::Started(started)) => &started.shards,
        other => panic!("{other:?} {:?}", answer.end),
    }
}

fn reason(answer: &Answer) -> (Code, String) {
    let status = answer.status();
    (status.code(), status.get_details_error_info().map(|info| info.reason).unwrap_or_default())
}

#[test]
fn shards_of_a_prefix_are_called_by_uris_that_lead_to_them() {
    let shards = nasty();
    let server = Server::start(&["--allow-uri", &shards.root()]);
    wait(async {
        let mut client = server.client().await;
        let plain = call(&mut client, of_shards(&[shards.text("in") + "/"])).await;
        let want = plain.entries();
        for prefix in [shards.text("in") + "/", format!("file://{}/", shards.text("in"))] {
            let answer = call(&mut client, of_shards(&[&prefix])).await;
            assert_eq!(answer.entries(), want, "{prefix}");
            let uris = listed(&answer).to_vec();
            assert_eq!(uris.len(), NAMES.len());
            for (index, uri) in (0..).zip(&uris) {
                // By its URI alone, as `submit` asks for it again.
                let alone = call(&mut client, of_shards(&[uri])).await.entries();
                let of_all: Vec<_> = want.iter().filter(|entry| entry.0 == index).cloned().collect();
                assert_eq!(alone.len(), of_all.len(), "{uri}");
                assert!(alone.iter().zip(&of_all).all(|(alone, all)| (alone.1, alone.3) == (all.1, all.3)), "{uri}");
            }
            // And from the middle, by name and token.
            let tokens = answer.events.iter().filter_map(|event| match event {
                Event::Chunk(chunk) if of_chunk(chunk)[0].1 == 0 => Some(chunk.resume_token.to_vec()),
                _ => None,
            });
            let rest = call(&mut client, with_tokens(of_shards(&uris), tokens.collect())).await.entries();
            assert!(!rest.is_empty() && rest.iter().all(|entry| want.contains(entry)), "{prefix}");
        }
    });
}

#[test]
fn outputs_of_a_prefix_have_the_names_of_their_inputs() {
    let shards = nasty();
    std::fs::remove_dir_all(shards.path("in/sub")).unwrap();
    let server = Server::start(&["--allow-uri", &shards.root()]);
    let (endpoint, input, output) =
        (server.endpoint(), format!("file://{}/", shards.text("in")), format!("file://{}/", shards.text("out")));
    let ran = capsieve(&["submit", "--endpoint", &endpoint, "--input", &input, "--output", &output]);
    assert_eq!(ran.code, Some(3), "{}", ran.stderr);
    let shown = names(&shards.path("out"));
    for (number, name) in NAMES.iter().enumerate().filter(|(_, name)| !name.contains('/')) {
        assert_eq!(read_parquet(&shards.path(&format!("out/{name}"))).num_rows(), 40 + number, "{name}");
        assert!(shown.contains(&name.replace(".parquet", ".stats.json")), "{name}: {shown:?}");
    }
    assert_eq!(shown.len(), 2 * (NAMES.len() - 1), "{shown:?}");
}

#[cfg(unix)]
#[test]
fn a_prefix_with_an_entry_that_cannot_be_used_is_an_error() {
    use std::os::unix::fs::symlink;
    let shards = Shards::new(&[3]);
    let server = Server::start(&["--allow-uri", &shards.text("in")]);
    let prefix = shards.text("in") + "/";
    wait(async {
        let mut client = server.client().await;
        std::fs::write(shards.path("in/b\nc.parquet"), b"").unwrap();
        let answer = call(&mut client, of_shards(&[&prefix])).await;
        assert_eq!(reason(&answer), (Code::FailedPrecondition, "PREFIX_UNUSABLE".to_owned()));
        assert!(answer.status().message().contains("b\\nc.parquet"), "{:?}", answer.end);
        std::fs::remove_file(shards.path("in/b\nc.parquet")).unwrap();
        for target in ["../out/secret.parquet", "../none"] {
            std::fs::write(shards.path("out/secret.parquet"), b"").unwrap();
            symlink(target, shards.path("in/b.parquet")).unwrap();
            let answer = call(&mut client, of_shards(&[&prefix])).await;
            assert_eq!(reason(&answer), (Code::PermissionDenied, "URI_NOT_ALLOWED".to_owned()), "{target}");
            let message = answer.status().message();
            assert!(message.starts_with(&format!("{prefix}b.parquet is not within")), "{message}");
            std::fs::remove_file(shards.path("in/b.parquet")).unwrap();
        }
        symlink("loop", shards.path("in/loop")).unwrap();
        let answer = call(&mut client, of_shards(&[format!("{prefix}loop/a.parquet")])).await;
        assert_eq!(reason(&answer), (Code::NotFound, "NOT_FOUND".to_owned()));
        assert_eq!(call(&mut client, of_shards(&[&prefix])).await.summary().rows, 3);
    });
}

/// A sink is confined however its folder is spelt.
#[cfg(unix)]
#[test]
fn a_folder_that_is_missing_is_no_way_out() {
    let shards = Shards::new(&[3]);
    std::os::unix::fs::symlink("../out", shards.path("in/link")).unwrap();
    let server = Server::start(&["--allow-uri", &shards.text("in")]);
    wait(async {
        let mut client = server.client().await;
        for sink in ["link/x.parquet", "none/../link/x.parquet", "none/../link/"] {
            let uri = shards.text("in/") + sink;
            let sink = v1::ParquetSink { uri, overwrite: true, ..Default::default() };
            let request = v1::ScoreBatchRequest { sink: Some(sink), ..of_shards(&[shards.text("in/a.parquet")]) };
            let answer = call(&mut client, request).await;
            assert_eq!(answer.status().code(), Code::PermissionDenied, "{:?}", answer.end);
        }
    });
    assert_eq!(names(&shards.path("out")), [""; 0]);
}

#[test]
fn statistics_of_others_are_not_replaced() {
    let shards = Shards::new(&[3]);
    let precious = shards.path("out/precious.stats.json");
    std::fs::write(&precious, "mine").unwrap();
    let server = Server::start(&["--allow-uri", &shards.root()]);
    wait(async {
        let mut client = server.client().await;
        let request = |overwrite| {
            let sink = v1::ParquetSink { uri: shards.text("out/precious.parquet"), overwrite, ..Default::default() };
            v1::ScoreBatchRequest { sink: Some(sink), ..of_shards(&[shards.text("in/a.parquet")]) }
        };
        let answer = call(&mut client, request(false)).await;
        assert_eq!(reason(&answer), (Code::AlreadyExists, "OUTPUT_EXISTS".to_owned()));
        assert!(answer.status().message().contains("precious.stats.json"), "{:?}", answer.end);
        assert_eq!(std::fs::read_to_string(&precious).unwrap(), "mine");
        assert_eq!(names(&shards.path("out")), ["precious.stats.json"]);
        // Who says so replaces it, and then it is ours.
        assert!(call(&mut client, request(true)).await.end.is_none());
        std::fs::remove_file(shards.path("out/precious.parquet")).unwrap();
        assert!(call(&mut client, request(false)).await.end.is_none());
    });
}
