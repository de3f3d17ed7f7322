//! A request as the worker takes it, or the field that cannot be.

use capsieve_worker::limits::URI_BYTES_MAX;
use capsieve_worker::{CallRequest, ColumnOptions, Heads, Pair, PairImage, Sink, Source, Thresholds};
use tonic::Status;

use crate::status::bad_field;
use crate::v1;
use crate::v1::image_captions::Image;
use crate::v1::score_batch_request::Source as Given;

/// Bytes of a key and of a request id at most.
const KEY_BYTES_MAX: usize = 4096;
const REQUEST_ID_BYTES_MAX: usize = 256;
/// Bytes of a column's name at most.
const COLUMN_BYTES_MAX: usize = 1024;

/// The worker's form of a request. `all` are the heads that an empty list means.
pub(crate) fn convert(request: v1::ScoreBatchRequest, all: Heads) -> Result<CallRequest, Status> {
    let heads = heads(&request.heads, all)?;
    let thresholds = thresholds(request.thresholds, heads)?;
    let sink = request.sink.map(sink).transpose()?;
    let fail_on_row = match v1::ErrorPolicy::try_from(request.on_error) {
        Ok(v1::ErrorPolicy::Fail) => true,
        Ok(v1::ErrorPolicy::Null | v1::ErrorPolicy::Unspecified) => false,
        Err(_) => return Err(bad_field("on_error", format!("{} is no policy", request.on_error))),
    };
    let source = match request.source {
        Some(Given::Pairs(pairs)) if sink.is_some() => {
            drop(pairs);
            return Err(bad_field("sink", "pairs that come with the call are streamed back"));
        }
        Some(Given::Pairs(pairs)) => Source::Pairs(items(pairs.items)?),
        Some(Given::Shards(shards)) => self::shards(shards)?,
        None => return Err(bad_field("source", "pairs or shards are required")),
    };
    Ok(CallRequest { source, heads, thresholds, fail_on_row, sink })
}

/// A request id goes into logs and headers.
pub(crate) fn check_id(id: &str) -> Result<(), Status> {
    if id.len() > REQUEST_ID_BYTES_MAX || id.contains(char::is_control) {
        let why = format!("at most {REQUEST_ID_BYTES_MAX} bytes without control characters");
        return Err(bad_field("request_id", why));
    }
    Ok(())
}

fn heads(given: &[i32], all: Heads) -> Result<Heads, Status> {
    if given.is_empty() {
        return Ok(all);
    }
    let mut heads = Heads { itm: false, cosine: false };
    for (i, head) in given.iter().enumerate() {
        match v1::Head::try_from(*head) {
            Ok(v1::Head::Itm) => heads.itm = true,
            Ok(v1::Head::Cosine) => heads.cosine = true,
            Ok(v1::Head::Unspecified) | Err(_) => {
                return Err(bad_field(&format!("heads[{i}]"), format!("{head} is no head")));
            }
        }
    }
    Ok(heads)
}

fn thresholds(given: Option<v1::Thresholds>, heads: Heads) -> Result<Thresholds, Status> {
    let given = given.unwrap_or_default();
    let check = |name: &str, value: Option<f32>, least: f32, on: bool| match value {
        Some(value) if !(least..=1.0).contains(&value) => {
            Err(bad_field(&format!("thresholds.{name}"), format!("{value} is not from {least} to 1")))
        }
        Some(_) if !on => Err(bad_field(&format!("thresholds.{name}"), "its head is not among the heads")),
        _ => Ok(()),
    };
    check("min_itm", given.min_itm, 0.0, heads.itm)?;
    check("min_cosine", given.min_cosine, -1.0, heads.cosine)?;
    Ok(Thresholds { min_itm: given.min_itm, min_cosine: given.min_cosine })
}

fn sink(given: v1::ParquetSink) -> Result<Sink, Status> {
    check_uri("sink.uri", &given.uri)?;
    Ok(Sink { uri: given.uri, drop_images: given.drop_images, overwrite: given.overwrite })
}

fn items(items: Vec<v1::ImageCaptions>) -> Result<Vec<Pair>, Status> {
    if items.is_empty() {
        return Err(bad_field("pairs.items", "at least one is required"));
    }
    let pair = |(i, item): (usize, v1::ImageCaptions)| {
        if item.key.len() > KEY_BYTES_MAX {
            return Err(bad_field(&format!("pairs.items[{i}].key"), format!("at most {KEY_BYTES_MAX} bytes")));
        }
        let image = match item.image {
            None => PairImage::None,
            Some(Image::ImageBytes(bytes)) => PairImage::Bytes(bytes),
            Some(Image::ImageUri(uri)) => {
                check_uri(&format!("pairs.items[{i}].image_uri"), &uri)?;
                PairImage::Uri(uri)
            }
        };
        Ok(Pair { key: item.key, image, captions: item.captions })
    };
    items.into_iter().enumerate().map(pair).collect()
}

fn shards(given: v1::ParquetShards) -> Result<Source, Status> {
    if given.uris.is_empty() {
        return Err(bad_field("shards.uris", "at least one is required"));
    }
    for (i, uri) in given.uris.iter().enumerate() {
        check_uri(&format!("shards.uris[{i}]"), uri)?;
    }
    let name = |name: String| (!name.is_empty()).then_some(name);
    let v1::ColumnMapping { image, caption, key } = given.columns.unwrap_or_default();
    for (field, name) in [("image", &image), ("caption", &caption), ("key", &key)] {
        if name.len() > COLUMN_BYTES_MAX {
            return Err(bad_field(&format!("shards.columns.{field}"), format!("at most {COLUMN_BYTES_MAX} bytes")));
        }
    }
    let columns = ColumnOptions { image: name(image), caption: name(caption), key: name(key) };
    let tokens = given.resume_tokens.into_iter().map(Vec::from).collect();
    Ok(Source::Shards { uris: given.uris, columns, tokens })
}

fn check_uri(field: &str, uri: &str) -> Result<(), Status> {
    match uri {
        "" => Err(bad_field(field, "it is empty")),
        long if long.len() > URI_BYTES_MAX => Err(bad_field(field, format!("at most {URI_BYTES_MAX} bytes"))),
        odd if odd.contains(char::is_control) => Err(bad_field(field, "it has control characters")),
        _ => Ok(()),
    }
}
