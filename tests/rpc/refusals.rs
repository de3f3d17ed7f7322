//! What a client is told that gets nothing: whatever it sent, the status fits its headers, has a reason, and a name that is in
//! the worker's log too.

use capsieve_rpc::v1;
use capsieve_rpc::v1::score_batch_request::Source;
use capsieve_rpc::v1::scoring_service_client::ScoringServiceClient;
use http_body_util::BodyExt;
use prost::Message;
use tonic::body::Body;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use super::perimeter::{
    HEALTH_CHECK, MODEL_INFO, SCORE_BATCH, beginning, body, connect, framed, guarded, open_with, trusted,
};
use super::server::{Server, Shards, of_pairs, of_shards, pairs, wait};

/// What the smallest clients take is twice as much.
const HEADERS_BYTES_MAX: usize = 8 << 10;

/// What a request gets that is refused.
struct Refusal {
    status: Status,
    /// What it came in: the answer's headers, or what follows an answer that ends at once.
    headers: http::HeaderMap,
}

impl Refusal {
    /// Of a request that is sent as these bytes.
    async fn of(server: &Server, path: &str, headers: &[(&str, &str)], bytes: Vec<u8>) -> Self {
        let (sender, body) = body();
        sender.send(bytes).unwrap();
        drop(sender);
        Self::of_body(server, path, headers, body).await
    }

    async fn of_body(server: &Server, path: &str, headers: &[(&str, &str)], body: Body) -> Self {
        let answer = open_with(connect(server).await, path, headers, body).await;
        let mut headers = answer.headers().clone();
        if !headers.contains_key("grpc-status") {
            headers = answer.into_body().collect().await.unwrap().trailers().unwrap().clone();
        }
        Self { status: Status::from_header_map(&headers).unwrap(), headers }
    }

    fn header_bytes(&self) -> usize {
        self.headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum()
    }
}

#[test]
fn long_names_leave_room_for_the_status() {
    let shards = Shards::new(&[1]);
    let server = Server::start(&["--allow-uri", &shards.root()]);
    let with_column = |column: v1::ColumnMapping| {
        let mut request = of_shards(&[shards.text("in/a.parquet")]);
        let Some(Source::Shards(shards)) = &mut request.source else { unreachable!() };
        shards.columns = Some(column);
        request
    };
    let folder = format!("/{}", "\u{e9}".repeat(120));
    let long = "z".repeat(20_000);
    let most = "\u{e9}".repeat(512);
    wait(async {
        for (request, code, field) in [
            (of_shards(&[folder.repeat(16)]), Code::PermissionDenied, ""),
            (of_shards(&[format!("{}{}/", shards.root(), folder.repeat(16))]), Code::NotFound, ""),
            (with_column(v1::ColumnMapping { image: most, ..Default::default() }), Code::FailedPrecondition, ""),
            (
                with_column(v1::ColumnMapping { image: long.clone(), ..Default::default() }),
                Code::InvalidArgument,
                "shards.columns.image",
            ),
            (
                with_column(v1::ColumnMapping { caption: long.clone(), ..Default::default() }),
                Code::InvalidArgument,
                "shards.columns.caption",
            ),
            (
                with_column(v1::ColumnMapping { key: long, ..Default::default() }),
                Code::InvalidArgument,
                "shards.columns.key",
            ),
        ] {
            let request = v1::ScoreBatchRequest { request_id: "\u{e9}".repeat(128), ..request };
            let refusal = Refusal::of(&server, SCORE_BATCH, &[], framed(&request.encode_to_vec())).await;
            let (status, bytes) = (&refusal.status, refusal.header_bytes());
            assert_eq!(status.code(), code, "{status:?}");
            assert!(bytes < HEADERS_BYTES_MAX, "{bytes} bytes: {status:?}");
            let violation = status.get_details_bad_request().map(|bad| bad.field_violations[0].field.clone());
            assert_eq!(violation.unwrap_or_default(), field, "{status:?}");
        }
    });
}

#[test]
fn what_cannot_be_read_is_the_clients_fault() {
    let server = Server::start(&[]);
    let message = framed(&of_pairs(&pairs(1, 0)).encode_to_vec());
    let flagged = |flag: u8, message: &[u8]| [&[flag], &message[1..]].concat();
    let garbage = flagged(1, &framed(b"garbage"));
    let (malformed, not_there) =
        ((Code::InvalidArgument, "REQUEST_MALFORMED"), (Code::Unimplemented, "NOT_IMPLEMENTED"));
    wait(async {
        for (path, encoding, bytes, (code, reason)) in [
            (SCORE_BATCH, "identity", Vec::new(), malformed),
            (SCORE_BATCH, "identity", message[..message.len() - 2].to_vec(), malformed),
            (SCORE_BATCH, "identity", message[..3].to_vec(), malformed),
            (SCORE_BATCH, "identity", flagged(7, &message), malformed),
            (SCORE_BATCH, "identity", flagged(1, &message), malformed),
            (SCORE_BATCH, "gzip", garbage.clone(), malformed),
            (SCORE_BATCH, "zstd", garbage.clone(), malformed),
            (MODEL_INFO, "identity", Vec::new(), malformed),
            (MODEL_INFO, "gzip", garbage.clone(), malformed),
            (HEALTH_CHECK, "identity", vec![7; 5], malformed),
            (SCORE_BATCH, "deflate", message.clone(), not_there),
            ("/capsieve.v1.ScoringService/Nothing", "identity", message.clone(), not_there),
            ("/a.B/C", "identity", message.clone(), not_there),
        ] {
            let refusal = Refusal::of(&server, path, &[("grpc-encoding", encoding)], bytes).await;
            let status = &refusal.status;
            assert_eq!(status.code(), code, "{path} {encoding}: {status:?}");
            let info = status.get_details_error_info().unwrap_or_else(|| panic!("{path} {encoding}: {status:?}"));
            assert_eq!((info.reason.as_str(), info.domain.as_str()), (reason, "capsieve"));
            assert!(!status.message().is_empty());
            if encoding == "deflate" {
                let taken = refusal.headers["grpc-accept-encoding"].to_str().unwrap();
                assert!(taken.contains("zstd") && taken.contains("gzip"), "{taken}");
            }
        }
    });
}

/// The name of the call that was refused.
fn name(status: &Status) -> String {
    let info = status.get_details_request_info().unwrap_or_else(|| panic!("no name: {status:?}"));
    info.request_id
}

#[test]
fn every_refused_call_has_a_name_that_is_logged_once() {
    let shards = Shards::new(&[4000]);
    let limits = ["--max-calls", "1", "--max-message-bytes", "10000", "--request-timeout", "0.5"];
    let work = ["--allow-uri", &shards.root(), "--batch-size", "1"];
    let mut server = guarded(&shards, &[&limits[..], &work].concat());
    let token = ("authorization", "Bearer secret");
    let request = |id: &str| v1::ScoreBatchRequest { request_id: id.to_owned(), ..of_pairs(&pairs(1, 0)) };
    let bytes = |request: v1::ScoreBatchRequest| framed(&request.encode_to_vec());
    let nobody_s = wait(async {
        let mut seen = Vec::new();
        for (headers, bytes, code) in [
            (&[token][..], bytes(request("a\nb")), Code::InvalidArgument),
            (&[token], framed(&[0xff; 9]), Code::InvalidArgument),
            (&[token], vec![7; 9], Code::InvalidArgument),
            (&[token], bytes(request(&"x".repeat(20_000))), Code::ResourceExhausted),
            (&[token, ("grpc-encoding", "deflate")], bytes(request("")), Code::Unimplemented),
            (&[token], bytes(v1::ScoreBatchRequest::default()), Code::InvalidArgument),
        ] {
            let Refusal { status, .. } = Refusal::of(&server, SCORE_BATCH, headers, bytes).await;
            assert_eq!(status.code(), code, "{status:?}");
            seen.push(name(&status));
        }
        let (sender, never) = body();
        sender.send(beginning()).unwrap();
        let late = Refusal::of_body(&server, SCORE_BATCH, &[token], never).await.status;
        assert_eq!(late.code(), Code::DeadlineExceeded, "{late:?}");
        // The client's own, where it could be read.
        let mine = v1::ScoreBatchRequest { request_id: "mine".to_owned(), ..Default::default() };
        assert_eq!(name(&Refusal::of(&server, SCORE_BATCH, &[token], bytes(mine)).await.status), "mine");
        let mut client = ScoringServiceClient::new(connect(&server).await);
        let long = client.score_batch(trusted(of_shards(&[shards.text("in/a.parquet")]))).await.unwrap();
        let full = Refusal::of(&server, SCORE_BATCH, &[token], bytes(request(""))).await.status;
        assert_eq!(full.code(), Code::ResourceExhausted, "{full:?}");
        assert!(full.get_details_retry_info().is_some(), "{full:?}");
        let unknown = Refusal::of(&server, SCORE_BATCH, &[], bytes(request(""))).await.status;
        assert_eq!(unknown.code(), Code::Unauthenticated, "{unknown:?}");
        server.signal("-TERM");
        server.wait_for("draining");
        let draining = Refusal::of(&server, SCORE_BATCH, &[token], bytes(request(""))).await.status;
        assert_eq!(draining.get_details_error_info().unwrap().reason, "DRAINING");
        drop(long);
        seen.extend([&late, &full, &draining].map(name));
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), 9, "each has its own: {seen:?}");
        // The last of them; the log is read by a thread of its own.
        server.wait_for(&name(&draining));
        let log = server.log.lock().unwrap().clone();
        for name in seen.iter().map(String::as_str).chain(["mine"]) {
            let ends = ["call refused: ", "call ended: "];
            let lines: Vec<&str> =
                log.lines().filter(|line| line.contains(name) && ends.iter().any(|end| line.contains(end))).collect();
            assert_eq!(lines.len(), 1, "{name}: {lines:?} of {log}");
        }
        name(&unknown)
    });
    assert_eq!(server.ended(), Some(0));
    assert!(!server.log.lock().unwrap().contains(&nobody_s), "strangers do not fill the disk");
}
