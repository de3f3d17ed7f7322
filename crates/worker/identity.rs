//! What an output was made from: told by a fingerprint, and said in words in its metadata.

use capsieve_engine::ItmToken;
use capsieve_store::{FINGERPRINT, Footer, Location, ObjectInfo, rows_of};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::model::hex;
use crate::{Precision, ScoreJob};

const MODEL: &str = "capsieve.model";
const PRECISION: &str = "capsieve.precision";
const OPTIONS: &str = "capsieve.options";
const SOURCE: &str = "capsieve.source";
/// Digits of a hash that a person compares.
const SHORT: usize = 12;

/// Of one shard's output.
pub(crate) struct Identity {
    /// SHA-256 over everything that decides the content of the output.
    pub(crate) fingerprint: String,
    /// File metadata: `capsieve.model` and so on, the fingerprint too.
    pub(crate) metadata: Vec<(String, String)>,
}

impl Identity {
    pub(crate) fn new(
        job: &ScoreJob,
        (hash, precision): (&str, Precision),
        input: &Location,
        info: &ObjectInfo,
    ) -> Self {
        let (options, precision) = (options(job).to_string(), precision.name());
        let version = (info.size, &info.e_tag, info.modified);
        let fingerprint = hex(&Sha256::digest(format!("2 {hash} {precision} {version:?} {options}")));
        let heads: Vec<&str> = [(job.heads.itm, "itm"), (job.heads.cosine, "cosine")]
            .into_iter()
            .filter_map(|(on, name)| on.then_some(name))
            .collect();
        let modified = info.modified.duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs();
        let etag = info.e_tag.as_deref().unwrap_or_default();
        let source = json!({ "uri": input.to_string(), "size": info.size, "etag": etag, "modified": modified });
        let metadata = [
            ("capsieve.version", env!("CARGO_PKG_VERSION").to_owned()),
            (MODEL, hash.to_owned()),
            (PRECISION, precision.to_owned()),
            ("capsieve.heads", heads.join(",")),
            ("capsieve.itm_token", token(job).to_owned()),
            (OPTIONS, options),
            (SOURCE, source.to_string()),
            (FINGERPRINT, fingerprint.clone()),
        ];
        let metadata = metadata.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        Self { fingerprint, metadata }
    }

    /// Whether a shard is this work's output of these rows.
    pub(crate) fn made(&self, output: &Footer, rows: &str) -> bool {
        output.schema().metadata().get(FINGERPRINT) == Some(&self.fingerprint) && rows_of(output) == rows
    }

    /// What the work that made `output` had that is different here, where it is to have these rows; with both sides.
    pub(crate) fn difference(&self, output: &Footer, rows: &str) -> String {
        let there = output.schema().metadata();
        if !there.contains_key(FINGERPRINT) {
            return "it is no output of this program".to_owned();
        }
        let here = |key: &str| self.metadata.iter().find(|(known, _)| known == key).map(|(_, value)| value.as_str());
        let sides = |key: &str| (there.get(key).map_or("", String::as_str), here(key).unwrap_or_default());
        let mut found = Vec::new();
        for (key, name) in [(MODEL, "model"), (PRECISION, "precision")] {
            let (there, here) = sides(key);
            if there != here {
                let short = |text: &str| text.chars().take(SHORT).collect::<String>();
                found.push(format!("{name} {} there, {} here", short(there), short(here)));
            }
        }
        for (key, only) in [(OPTIONS, None), (SOURCE, Some(["size", "etag", "modified"]))] {
            let (there, here) = sides(key);
            found.extend(differences(there, here, only.as_ref().map(|only| &only[..])));
        }
        if rows_of(output) != rows {
            found.push(format!("{} rows there, {rows} rows here", rows_of(output)));
        }
        match found.is_empty() {
            true => "made by another version of this program".to_owned(),
            false => found.join("; "),
        }
    }
}

/// The entries of two JSON objects that differ.
fn differences(there: &str, here: &str, only: Option<&[&str]>) -> Vec<String> {
    let read = |text: &str| serde_json::from_str::<Map<String, Value>>(text).unwrap_or_default();
    let (there, here) = (read(there), read(here));
    let mut keys: Vec<&String> = there.keys().chain(here.keys()).collect();
    keys.sort_unstable();
    keys.dedup();
    let side = |object: &Map<String, Value>, key: &str| object.get(key).map_or("nothing".to_owned(), Value::to_string);
    keys.into_iter()
        .filter(|key| only.is_none_or(|only| only.contains(&key.as_str())) && there.get(*key) != here.get(*key))
        .map(|key| {
            format!("{}{key} {} there, {} here", only.map_or("", |_| "input's "), side(&there, key), side(&here, key))
        })
        .collect()
}

fn token(job: &ScoreJob) -> &'static str {
    if job.itm_token == ItmToken::Cls { "cls" } else { "enc" }
}

/// The options that decide what is in an output, by the names that users give them. What is not asked for is left out.
fn options(job: &ScoreJob) -> Value {
    let ScoreJob { columns, heads, thresholds, policy, select, .. } = job;
    let all = [
        ("image-column", json!(columns.image)),
        ("caption-column", json!(columns.caption)),
        ("key-column", json!(columns.key)),
        ("itm", json!(heads.itm)),
        ("cosine", json!(heads.cosine)),
        ("itm-token", json!(token(job))),
        ("min-itm", json!(thresholds.min_itm)),
        ("min-cosine", json!(thresholds.min_cosine)),
        ("max-caption-tokens", json!(policy.tokens_max)),
        ("max-image-pixels", json!(policy.image_pixels_max)),
        ("drop-images", json!(job.drop_images)),
        ("kept-only", json!(job.kept_only)),
        ("select", json!(select.name())),
    ];
    let asked = all.into_iter().filter(|(_, value)| !value.is_null() && *value != json!(false));
    Value::Object(asked.map(|(name, value)| (name.to_owned(), value)).collect())
}
