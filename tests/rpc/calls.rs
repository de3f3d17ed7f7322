//! Scores by every way in are the same; every refusal has its code, its details and its words.

use capsieve_rpc::v1;
use capsieve_rpc::v1::score_batch_request::Source;
use capsieve_rpc::v1::score_batch_response::Event;
use tonic::{Code, Request};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_types::StatusExt;

use super::server::{Entry, Server, Shards, call, of_pairs, of_shards, pairs, wait};
use crate::support::{capsieve, floats, read_parquet, texts};

/// The entries of a shard as `capsieve score` writes them.
fn scored_file(path: &std::path::Path, shard: u32) -> Vec<Entry> {
    let batch = read_parquet(path);
    let bits = |name: &str| floats(&batch, name).into_iter().map(|score| score.unwrap_or(f32::NAN).to_bits());
    let statuses = texts(&batch, "score_status").into_iter().map(Option::unwrap);
    bits("itm_score")
        .zip(bits("cosine_score"))
        .zip(statuses)
        .enumerate()
        .map(|(row, ((itm, cosine), status))| (shard, row as u64, 0, itm, cosine, status))
        .collect()
}

fn normal(mut entries: Vec<Entry>) -> Vec<Entry> {
    for entry in &mut entries {
        // One NaN is as good as another.
        for bits in [&mut entry.3, &mut entry.4] {
            if f32::from_bits(*bits).is_nan() {
                *bits = f32::NAN.to_bits();
            }
        }
    }
    entries
}

#[test]
fn every_way_in_gives_the_same_bits() {
    let shards = Shards::new(&[100, 37]);
    for name in ["a", "b"] {
        let (input, output) = (shards.text(&format!("in/{name}.parquet")), shards.text(&format!("{name}.parquet")));
        let ran = capsieve(&["score", "--model", "synthetic:tiny", "--input", &input, "--output", &output]);
        assert_eq!(ran.code, Some(3), "{ran:?}");
    }
    let file = |name: &str, shard| normal(scored_file(&shards.path(&format!("{name}.parquet")), shard));
    let want = [file("a", 0), file("b", 1)].concat();
    for more in [&[][..], &["--batch-size", "3"], &["--batch-latency-ms", "0"]] {
        let server = Server::start(&[&["--allow-uri", &shards.root()], more].concat());
        wait(async {
            let mut client = server.client().await;
            let prefix = shards.text("in") + "/";
            let answer = call(&mut client, of_shards(&[&prefix])).await;
            assert_eq!(normal(answer.entries()), want, "a prefix, {more:?}");
            let summary = answer.summary();
            assert_eq!((summary.rows, summary.failed, summary.shards), (137, 19, 2));
            assert_eq!(summary.errors.get("decode_failed"), Some(&19));
            let mut calls = tokio::task::JoinSet::new();
            for _ in 0..8 {
                let mut client = server.client().await;
                calls.spawn(async move { call(&mut client, of_pairs(&pairs(100, 0))).await });
            }
            while let Some(answer) = calls.join_next().await {
                assert_eq!(normal(answer.unwrap().entries()), file("a", 0), "pairs that come with the call");
            }
            let sink = v1::ParquetSink { uri: shards.text("out") + "/", overwrite: true, ..Default::default() };
            let answer = call(&mut client, v1::ScoreBatchRequest { sink: Some(sink), ..of_shards(&[prefix]) }).await;
            assert_eq!(answer.entries(), [], "scores go to the sink");
            let written =
                [scored_file(&shards.path("out/a.parquet"), 0), scored_file(&shards.path("out/b.parquet"), 1)];
            assert_eq!(normal(written.concat()), want, "the sink");
            assert_eq!((answer.summary().rows, answer.summary().failed), (137, 19));
        });
    }
}

#[test]
fn heads_thresholds_keys_and_captions() {
    let server = Server::start(&[]);
    wait(async {
        let mut client = server.client().await;
        let mut request = of_pairs(&pairs(3, 0));
        let Some(Source::Pairs(given)) = &mut request.source else { unreachable!() };
        given.items[1].captions = vec!["one".to_owned(), "two".to_owned(), "x ".repeat(600)];
        given.items[2].captions.clear();
        request.heads = vec![v1::Head::Itm.into()];
        request.thresholds = Some(v1::Thresholds { min_itm: Some(0.0), min_cosine: None });
        request.request_id = "mine".to_owned();
        let answer = call(&mut client, request).await;
        let rows: Vec<_> = answer.entries().into_iter().map(|entry| (entry.1, entry.2, entry.5)).collect();
        let want = [(0, 0, "ok"), (1, 0, "ok"), (1, 1, "ok"), (1, 2, "caption_too_long"), (2, 0, "null_caption")];
        assert_eq!(rows, want.map(|(row, caption, status)| (row, caption, status.to_owned())));
        for event in &answer.events {
            match event {
                Event::Started(started) => assert_eq!(started.request_id, "mine"),
                Event::Chunk(chunk) => {
                    assert!(chunk.cosine_score.is_empty(), "the head was not asked for");
                    assert_eq!(chunk.keep, [true, true, true, false, false]);
                    assert_eq!(chunk.key, ["00000", "00001", "00001", "00001", "00002"]);
                }
                _ => {}
            }
        }
        assert_eq!((answer.summary().rows, answer.summary().scored, answer.summary().pairs), (3, 2, 3));
    });
}

/// Requests with a field that cannot be, and its name.
fn bad_fields() -> Vec<(v1::ScoreBatchRequest, &'static str)> {
    let pair = || of_pairs(&pairs(1, 0));
    let thresholds = |min_itm, min_cosine| Some(v1::Thresholds { min_itm, min_cosine });
    let mut long_key = pair();
    if let Some(Source::Pairs(given)) = &mut long_key.source {
        given.items[0].key = "k".repeat(5000);
    }
    let sink = v1::ParquetSink { uri: "/x/y.parquet".to_owned(), ..Default::default() };
    vec![
        (v1::ScoreBatchRequest::default(), "source"),
        (of_pairs(&[]), "pairs.items"),
        (of_shards::<&str>(&[]), "shards.uris"),
        (of_shards(&[String::new()]), "shards.uris[0]"),
        (of_shards(&["a\nb".to_owned()]), "shards.uris[0]"),
        (v1::ScoreBatchRequest { heads: vec![0], ..pair() }, "heads[0]"),
        (v1::ScoreBatchRequest { heads: vec![1, 77], ..pair() }, "heads[1]"),
        (v1::ScoreBatchRequest { on_error: 9, ..pair() }, "on_error"),
        (v1::ScoreBatchRequest { thresholds: thresholds(Some(1.5), None), ..pair() }, "thresholds.min_itm"),
        (v1::ScoreBatchRequest { thresholds: thresholds(Some(f32::NAN), None), ..pair() }, "thresholds.min_itm"),
        (v1::ScoreBatchRequest { thresholds: thresholds(None, Some(0.5)), ..pair() }, "thresholds.min_cosine"),
        (v1::ScoreBatchRequest { request_id: "x".repeat(300), ..pair() }, "request_id"),
        (v1::ScoreBatchRequest { sink: Some(v1::ParquetSink::default()), ..pair() }, "sink.uri"),
        (v1::ScoreBatchRequest { sink: Some(sink), ..pair() }, "sink"),
        (long_key, "pairs.items[0].key"),
    ]
}

#[test]
fn every_refusal_has_its_code_and_names_what_is_wrong() {
    let shards = Shards::new(&[20]);
    std::fs::write(shards.path("in/text.parquet"), "no parquet at all").unwrap();
    std::fs::write(shards.path("out/taken.parquet"), "somebody else's").unwrap();
    let server = Server::start(&["--allow-uri", &shards.root(), "--max-message-bytes", "20000", "--heads", "itm"]);
    let good = shards.text("in/a.parquet");
    let shard = |uri: &str| of_shards(&[shards.text(uri)]);
    let sink = |uri: &str| {
        let sink = v1::ParquetSink { uri: shards.text(uri), ..Default::default() };
        v1::ScoreBatchRequest { sink: Some(sink), ..of_shards(&[&good]) }
    };
    let pair = || of_pairs(&pairs(1, 0));
    let fail = v1::ErrorPolicy::Fail.into();
    let token = super::server::with_tokens(shard("in/a.parquet"), vec![b"rubbish".to_vec()]);
    let cases: Vec<(v1::ScoreBatchRequest, Code, &str)> = vec![
        (shard("in/none.parquet"), Code::NotFound, "NOT_FOUND"),
        (shard("out/empty/"), Code::NotFound, "NOT_FOUND"),
        (shard("in/a.parquet/b.parquet"), Code::NotFound, "NOT_FOUND"),
        (shard(&format!("in/{}.parquet", "n".repeat(300))), Code::InvalidArgument, "URI_INVALID"),
        (shard("in/text.parquet"), Code::FailedPrecondition, "SHARD_UNREADABLE"),
        (of_shards(&["/etc/hostname".to_owned()]), Code::PermissionDenied, "URI_NOT_ALLOWED"),
        (of_shards(&["s3://bucket/a.parquet".to_owned()]), Code::PermissionDenied, "URI_NOT_ALLOWED"),
        (sink("out/none/x.parquet"), Code::NotFound, "OUTPUT_FOLDER_NOT_FOUND"),
        (sink("out/taken.parquet"), Code::AlreadyExists, "OUTPUT_EXISTS"),
        (sink("in/a.parquet"), Code::InvalidArgument, "SINK_INVALID"),
        (v1::ScoreBatchRequest { on_error: fail, ..shard("in/a.parquet") }, Code::Aborted, "ROW_FAILED"),
        (v1::ScoreBatchRequest { heads: vec![2], ..pair() }, Code::FailedPrecondition, "HEAD_NOT_LOADED"),
        (token, Code::InvalidArgument, "RESUME_TOKEN_INVALID"),
    ];
    wait(async {
        let mut client = server.client().await;
        for (request, field) in bad_fields() {
            let answer = call(&mut client, request).await;
            let status = answer.status();
            assert_eq!(status.code(), Code::InvalidArgument, "{field}: {status:?}");
            let details = status.get_details_bad_request().unwrap();
            assert_eq!(details.field_violations[0].field, field);
            assert!(status.message().starts_with(field), "{status:?}");
        }
        for (request, code, reason) in cases {
            let answer = call(&mut client, request).await;
            let status = answer.status();
            let info = status.get_details_error_info().unwrap_or_else(|| panic!("{reason}: {status:?}"));
            assert_eq!((status.code(), info.reason.as_str(), info.domain.as_str()), (code, reason, "capsieve"));
            let fields = status.get_details_bad_request().map(|bad| bad.field_violations[0].field.clone());
            let named = fields
                .as_deref()
                .is_some_and(|field| ["shards.uris", "sink.uri", "shards.resume_tokens"].contains(&field));
            assert_eq!(named, code == Code::InvalidArgument, "{reason}: {fields:?}");
        }
        let answer = call(&mut client, of_pairs(&[(Some(vec![0; 30_000]), Some("a".to_owned()))])).await;
        assert_eq!(answer.status().code(), Code::ResourceExhausted, "{:?}", answer.end);
        assert!(answer.status().message().contains("20000"), "the limit is said");
        // After all that the worker still works.
        assert_eq!(call(&mut client, pair()).await.entries().len(), 1);
    });
}

#[test]
fn one_shard_by_many_names_is_scored_once() {
    let shards = Shards::new(&[20]);
    #[cfg(unix)]
    std::os::unix::fs::symlink(shards.path("in/a.parquet"), shards.path("link.parquet")).unwrap();
    let server = Server::start(&["--allow-uri", &shards.root()]);
    let file = format!("file://{}", shards.text("in/a.parquet"));
    let names = [shards.text("in/a.parquet"), shards.text("out/../in/a.parquet"), file, shards.text("in") + "/"];
    let link = cfg!(unix).then(|| shards.text("link.parquet"));
    let names: Vec<String> = names.into_iter().chain(link).collect();
    wait(async {
        let answer = call(&mut server.client().await, of_shards(&names)).await;
        assert_eq!((answer.entries().len(), answer.summary().shards), (20, 1));
    });
}

#[test]
fn a_long_list_of_shards_comes_in_several_messages() {
    let shards = Shards::new(&[1]);
    let deep = format!("in/{}/{}", "d".repeat(200), "e".repeat(200));
    std::fs::create_dir_all(shards.path(&deep)).unwrap();
    for number in 0..3000 {
        std::fs::hard_link(shards.path("in/a.parquet"), shards.path(&format!("{deep}/{number:05}.parquet"))).unwrap();
    }
    let server = Server::start(&["--allow-uri", &shards.root()]);
    wait(async {
        // A client with gRPC's usual limit.
        let mut client = server.client().await.max_decoding_message_size(4 << 20);
        let answer = call(&mut client, of_shards(&[shards.text("in") + "/"])).await;
        let parts = answer.events.iter().map_while(|event| match event {
            Event::Started(started) => Some(started.shards.clone()),
            _ => None,
        });
        let parts: Vec<Vec<String>> = parts.collect();
        assert!(parts.len() > 1 && parts.iter().all(|part| !part.is_empty()));
        let listed = parts.concat();
        assert_eq!((listed.len(), answer.summary().shards), (3001, 3001));
        assert!(listed.is_sorted());
    });
}

#[test]
fn a_deadline_covers_the_whole_stream() {
    let shards = Shards::new(&[2000]);
    let server = Server::start(&["--allow-uri", &shards.root(), "--batch-size", "1"]);
    wait(async {
        let mut client = server.client().await;
        let mut request = Request::new(of_shards(&[shards.text("in/a.parquet")]));
        request.metadata_mut().insert("grpc-timeout", "150m".parse().unwrap());
        let mut stream = client.score_batch(request).await.unwrap().into_inner();
        // A client that reads slowly.
        let ended = loop {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            match stream.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("a call of 2000 rows is over in 150 ms"),
                Err(status) => break status,
            }
        };
        assert_eq!(ended.code(), Code::DeadlineExceeded, "{ended:?}");
    });
}

#[test]
fn too_many_calls_are_told_to_come_again() {
    let shards = Shards::new(&[3000]);
    let server = Server::start(&["--allow-uri", &shards.root(), "--max-calls", "2", "--batch-size", "1"]);
    wait(async {
        let mut client = server.client().await;
        let request = || of_shards(&[shards.text("in/a.parquet")]);
        let first = client.score_batch(request()).await.unwrap();
        let second = client.score_batch(request()).await.unwrap();
        let refused = client.score_batch(request()).await.unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted);
        assert!(refused.get_details_retry_info().unwrap().retry_delay.is_some());
        drop((first, second));
        // Their room comes back.
        for attempt in 0.. {
            match client.score_batch(of_pairs(&pairs(1, 0))).await {
                Ok(_) => break,
                Err(status) => assert!(attempt < 200, "{status:?}"),
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    });
}

#[test]
fn health_follows_the_phases() {
    let mut server = Server::listen("synthetic:base", &["--drain-timeout", "20"]);
    wait(async {
        let channel = tonic::transport::Channel::from_shared(server.endpoint()).unwrap().connect().await.unwrap();
        let mut health = HealthClient::new(channel.clone());
        let mut status = async |service: &str| {
            let request = HealthCheckRequest { service: service.to_owned() };
            health.check(request).await.map(|answer| answer.into_inner().status())
        };
        for service in ["", "capsieve.v1.ScoringService"] {
            assert_eq!(status(service).await.unwrap(), ServingStatus::NotServing, "{service:?} while loading");
        }
        let mut client = server.client().await;
        let early = call(&mut client, of_pairs(&pairs(1, 0))).await;
        assert_eq!(early.status().code(), Code::Unavailable);
        assert_eq!(client.get_model_info(v1::GetModelInfoRequest {}).await.unwrap_err().code(), Code::Unavailable);
        server.wait_for("serving");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        for service in ["", "capsieve.v1.ScoringService"] {
            assert_eq!(status(service).await.unwrap(), ServingStatus::Serving, "{service:?}");
        }
        assert_eq!(status("no.Such").await.unwrap_err().code(), Code::NotFound);
        let info = client.get_model_info(v1::GetModelInfoRequest {}).await.unwrap().into_inner();
        assert_eq!((info.image_size, info.itm_token.as_str(), info.precision.as_str()), (384, "cls", "f32"));
        assert!(info.model_hash.len() == 64 && info.device.starts_with("cpu") && info.heads == [1, 2]);
    });
    server.signal("-TERM");
    assert_eq!(server.ended(), Some(0));
}

#[test]
fn reflection_lists_the_service() {
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
    use tonic_reflection::pb::v1::{ServerReflectionRequest, ServerReflectionResponse};
    let server = Server::start(&[]);
    wait(async {
        let channel = tonic::transport::Channel::from_shared(server.endpoint()).unwrap().connect().await.unwrap();
        let mut client = ServerReflectionClient::new(channel);
        let mut ask = async |request: MessageRequest| -> ServerReflectionResponse {
            let request = ServerReflectionRequest { host: String::new(), message_request: Some(request) };
            let answers = client.server_reflection_info(tokio_stream::iter([request])).await.unwrap();
            answers.into_inner().message().await.unwrap().unwrap()
        };
        let listed = ask(MessageRequest::ListServices(String::new())).await;
        let Some(MessageResponse::ListServicesResponse(list)) = listed.message_response else { panic!("{listed:?}") };
        let names: Vec<String> = list.service.into_iter().map(|service| service.name).collect();
        assert!(names.contains(&"capsieve.v1.ScoringService".to_owned()), "{names:?}");
        assert!(names.contains(&"grpc.health.v1.Health".to_owned()), "{names:?}");
        let symbol = "capsieve.v1.ScoringService.ScoreBatch".to_owned();
        let found = ask(MessageRequest::FileContainingSymbol(symbol)).await;
        assert!(matches!(found.message_response, Some(MessageResponse::FileDescriptorResponse(_))), "{found:?}");
    });
}
