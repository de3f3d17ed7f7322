//! What a client is told that gets nothing: whatever it sent, the status fits its headers, has a reason, and a name that is in
//! the worker's log too.

use capsieve_rpc::v1;
use capsieve_rpc::v1::score_batch_request::Source;
use prost::Message;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use super::perimeter::{SCORE_BATCH, body, connect, framed, open};
use super::server::{Server, Shards, of_shards, wait};

/// What the smallest clients take is twice as much.
const HEADERS_BYTES_MAX: usize = 8 << 10;

/// The refusal of a request that is sent as these bytes, and the bytes of its headers.
async fn refused(server: &Server, bytes: Vec<u8>) -> (Status, usize) {
    let (sender, body) = body();
    sender.send(bytes).unwrap();
    drop(sender);
    let answer = open(connect(server).await, SCORE_BATCH, body).await;
    let status = Status::from_header_map(answer.headers()).unwrap_or_else(|| panic!("an answer: {answer:?}"));
    (status, answer.headers().iter().map(|(name, value)| name.as_str().len() + value.len()).sum())
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
            let (status, bytes) = refused(&server, framed(&request.encode_to_vec())).await;
            assert_eq!(status.code(), code, "{status:?}");
            assert!(bytes < HEADERS_BYTES_MAX, "{bytes} bytes: {status:?}");
            let violation = status.get_details_bad_request().map(|bad| bad.field_violations[0].field.clone());
            assert_eq!(violation.unwrap_or_default(), field, "{status:?}");
        }
    });
}
