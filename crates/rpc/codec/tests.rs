//! Requests by hand: bombs, and bytes that are no request.

use bytes::{BufMut, Bytes};
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use super::{CAPTIONS_MAX, HEADS_MAX, ITEMS_MAX, SHARDS_MAX, decode};
use crate::v1;
use crate::v1::image_captions::Image;
use crate::v1::score_batch_request::Source;

/// A field with a length.
fn field(number: u32, bytes: &[u8]) -> Vec<u8> {
    let mut wire = Vec::new();
    encode_key(number, WireType::LengthDelimited, &mut wire);
    encode_varint(bytes.len() as u64, &mut wire);
    wire.put_slice(bytes);
    wire
}

fn request(wire: impl Into<Bytes>) -> Result<v1::ScoreBatchRequest, Status> {
    decode(wire.into())
}

/// The field that a request is refused for.
fn refused(wire: Vec<u8>) -> String {
    let status = request(wire).expect_err("it is refused");
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    let details = status.get_details_bad_request().expect("it says which field");
    details.field_violations[0].field.clone()
}

fn ordinary() -> [v1::ScoreBatchRequest; 2] {
    let item = |i: u8| v1::ImageCaptions {
        key: format!("key {i}"),
        image: Some(if i.is_multiple_of(2) {
            Image::ImageBytes(vec![i; 5000].into())
        } else {
            Image::ImageUri("/data/a.png".to_owned())
        }),
        captions: vec![format!("caption {i}"), String::new()],
    };
    let pairs = v1::InlinePairs { items: (0..40).map(item).collect() };
    let shards = v1::ParquetShards {
        uris: vec!["/data/".to_owned(), "/other/x.parquet".to_owned()],
        columns: Some(v1::ColumnMapping { image: "image".to_owned(), ..Default::default() }),
        resume_tokens: vec![vec![1, 2, 3].into(), Bytes::new()],
    };
    [Source::Pairs(pairs), Source::Shards(shards)].map(|source| v1::ScoreBatchRequest {
        source: Some(source),
        heads: vec![1, 2],
        thresholds: Some(v1::Thresholds { min_itm: Some(0.5), min_cosine: None }),
        sink: Some(v1::ParquetSink { uri: "/out/".to_owned(), drop_images: true, overwrite: false }),
        request_id: "job".to_owned(),
        on_error: 2,
    })
}

#[test]
fn ordinary_requests_are_what_they_were() {
    for given in ordinary() {
        let wire = given.encode_to_vec();
        let read = request(wire.clone()).unwrap();
        assert_eq!(read, given);
        assert_eq!(read.encode_to_vec(), wire);
    }
    assert_eq!(request(Vec::new()).unwrap(), v1::ScoreBatchRequest::default());
    // Fields that are not known yet pass, groups of the past included.
    let group = [&[0x9b, 0x06][..], &field(7, b"x"), &[0x9c, 0x06]].concat();
    let later = [field(1000, b"later"), group, vec![0xf8, 0x3e, 1], ordinary()[0].encode_to_vec()].concat();
    assert_eq!(request(later).unwrap(), ordinary()[0]);
}

#[test]
fn as_many_as_are_taken_and_one_more() {
    let (item, caption, uri, token) = (field(1, &[]), field(4, &[]), field(1, &[]), field(3, &[]));
    for (part, most, number, name) in [
        (&item, ITEMS_MAX, 1, "pairs.items"),
        (&uri, SHARDS_MAX, 2, "shards.uris"),
        (&token, SHARDS_MAX, 2, "shards.resume_tokens"),
    ] {
        assert!(request(field(number, &part.repeat(most))).is_ok(), "{name}");
        assert_eq!(refused(field(number, &part.repeat(most + 1))), name);
        // In two halves of the same field, and with the other source between them.
        let half = field(number, &part.repeat(most / 2 + 1));
        assert_eq!(refused([half.clone(), half.clone()].concat()), name);
        let other = field(3 - number, &[]);
        assert_eq!(refused([half.clone(), other, half].concat()), name);
    }
    // Captions of all items count together.
    let of = |captions: usize| field(1, &field(1, &caption.repeat(captions)));
    assert!(request([of(CAPTIONS_MAX - 1), of(1)].concat()).is_ok());
    assert_eq!(refused([of(CAPTIONS_MAX), of(1)].concat()), "pairs.items.captions");
}

#[test]
fn heads_packed_or_not() {
    let one = [0x18, 1];
    assert_eq!(request(one.repeat(HEADS_MAX)).unwrap().heads.len(), HEADS_MAX);
    assert_eq!(refused(one.repeat(HEADS_MAX + 1)), "heads");
    assert_eq!(request(field(3, &[2; HEADS_MAX])).unwrap().heads.len(), HEADS_MAX);
    assert_eq!(refused(field(3, &[2; HEADS_MAX + 1])), "heads");
    assert_eq!(refused([field(3, &[2; HEADS_MAX]), one.to_vec()].concat()), "heads");
    // Numbers of two bytes are counted once each.
    assert_eq!(request(field(3, &[0x80, 1].repeat(HEADS_MAX))).unwrap().heads.len(), HEADS_MAX);
}

#[test]
fn what_is_no_request_is_the_clients_fault() {
    for wire in [
        vec![0x0a],                                        // A key, and no length.
        vec![0x0a, 5, 1],                                  // Shorter than it says.
        vec![0x0a, 2, 0x0a, 100],                          // An item that is longer than its list.
        [vec![0x0a, 2, 0x0a, 100], vec![0; 200]].concat(), // The same, with enough behind it.
        vec![0x08, 1],                                     // `pairs` as a number.
        vec![0x0b, 0x0c],                                  // `pairs` as a group.
        vec![0x0c],                                        // The end of a group that did not begin.
        vec![0x9b, 0x06],                                  // A group that does not end.
        [0x9b, 0x06].repeat(200),                          // Nested beyond every limit.
        [0x9b, 0x06].repeat(1 << 20),
        vec![0x00, 1],                           // Field 0.
        vec![0x0e, 1],                           // A kind that does not exist.
        vec![0xff; 20],                          // A number without an end.
        field(6, &[0xff, 0xfe]),                 // A request id that is no UTF-8.
        field(1, &field(1, &field(4, &[0xc0]))), // A caption that is none.
    ] {
        assert_eq!(refused(wire.clone()), "request", "{:?}", &wire[..wire.len().min(20)]);
    }
    for given in ordinary() {
        let wire = given.encode_to_vec();
        for cut in 1..wire.len().min(400) {
            if let Err(status) = request(wire[..cut].to_vec()) {
                assert_eq!(status.code(), Code::InvalidArgument);
            }
        }
    }
}

/// Whatever the bytes are: no panic, and prost's verdict where the walk has none of its own.
#[test]
fn random_bytes() {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let seeds = ordinary().map(|given| given.encode_to_vec());
    for round in 0..20_000 {
        let wire: Vec<u8> = if round % 2 == 0 {
            (0..random() % 64).map(|_| (random() % if round % 4 == 0 { 256 } else { 40 }) as u8).collect()
        } else {
            let mut wire = seeds[round / 2 % 2].clone();
            for _ in 0..=random() % 4 {
                let at = random() as usize % wire.len();
                wire[at] = random() as u8;
            }
            wire
        };
        let (ours, prosts) = (request(wire.clone()), v1::ScoreBatchRequest::decode(&wire[..]));
        match (ours, prosts) {
            // NaN thresholds are equal by their bytes alone.
            (Ok(ours), Ok(prosts)) => assert_eq!(ours.encode_to_vec(), prosts.encode_to_vec()),
            (Err(status), _) => assert_eq!(status.code(), Code::InvalidArgument, "{wire:?}"),
            (Ok(_), Err(error)) => panic!("{error}: {wire:?}"),
        }
    }
}
