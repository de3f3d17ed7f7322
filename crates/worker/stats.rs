//! What a finished shard has to say: `NAME.stats.json` beside the output, and its heart in the output's own metadata, so that a
//! run killed between the two loses nothing.

use std::collections::BTreeMap;

use capsieve_store::{Footer, Written, WrittenObject};
use serde::{Deserialize, Serialize};

use crate::pipeline::Totals;
use crate::{Precision, ScoreJob};

/// Key of the counts in the output's metadata.
const SUMMARY: &str = "capsieve.summary";

/// What became of the rows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Rows of the input: scored + failed.
    pub rows: u64,
    /// Rows with a score.
    pub scored: u64,
    /// Rows without one.
    pub failed: u64,
    /// Failed rows by reason.
    pub errors: BTreeMap<String, u64>,
    /// Captions scored in this run.
    pub pairs: u64,
    /// Rows that pass the thresholds, where there are any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<u64>,
    /// Rows of the output: all, or the kept ones.
    pub written: u64,
}

/// Rows that are not kept, where they are written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rejected {
    /// Their URI.
    pub output: String,
    /// How many.
    pub rows: u64,
    /// Bytes of the object.
    pub bytes: u64,
    /// Its entity tag, see [`Stats::etag`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub etag: Option<String>,
}

/// What a finished job has to say; also the content of `NAME.stats.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Stats {
    /// Version of the program.
    pub version: String,
    /// URI of the input.
    pub input: String,
    /// URI of the output.
    pub output: String,
    /// SHA-256 of the model.
    pub model: String,
    /// SHA-256 of all that decides the output: the input's version, the model, the options.
    pub fingerprint: String,
    /// "cpu (avx512, 2 threads)"; not there where a killed run could not say.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub device: String,
    /// "f32"
    pub precision: String,
    /// What became of the rows.
    #[serde(flatten)]
    pub counts: Counts,
    /// Bytes of the output.
    pub bytes: u64,
    /// The store's name for the output's content: these statistics speak of no other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub etag: Option<String>,
    /// Rows that are not kept, where they are written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rejected: Option<Rejected>,
    /// Busy seconds by stage; stages overlap, so they add up to more than `total`. Empty where a killed run could not say.
    #[serde(default)]
    pub seconds: BTreeMap<String, f64>,
    /// Pairs by total seconds, the model's loading excluded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pairs_per_second: Option<f64>,
}

impl Counts {
    /// Of a shard whose rows are all written.
    pub(crate) fn new(totals: &Totals, written: &Written) -> Self {
        let mut errors = totals.statuses.clone();
        let scored = errors.remove("ok").unwrap_or_default();
        Self {
            rows: written.rows,
            scored,
            failed: errors.values().sum(),
            errors: errors.into_iter().map(|(reason, rows)| (reason.to_owned(), rows)).collect(),
            pairs: totals.pairs,
            kept: written.kept,
            written: written.rows_written,
        }
    }

    /// As entries of the output's metadata.
    pub(crate) fn notes(&self) -> Vec<(String, String)> {
        let counts = serde_json::to_string(self).expect("names and numbers");
        vec![(SUMMARY.to_owned(), counts)]
    }

    /// Of an output that has them in its metadata.
    pub(crate) fn of(output: &Footer) -> Option<Self> {
        let counts: Self = serde_json::from_str(output.schema().metadata().get(SUMMARY)?).ok()?;
        Some(counts).filter(|counts| counts.written <= counts.rows)
    }
}

impl Stats {
    /// Of an output, without what only the run knows that made it.
    pub(crate) fn new(
        job: &ScoreJob,
        (hash, precision): (&str, Precision),
        fingerprint: &str,
        (counts, object, rejected_object): (Counts, WrittenObject, Option<WrittenObject>),
    ) -> Self {
        let rows = counts.rows - counts.written;
        let rejected = |(output, WrittenObject { bytes, e_tag })| Rejected { output, rows, bytes, etag: e_tag };
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            input: job.input.clone(),
            output: job.output.clone(),
            model: hash.to_owned(),
            fingerprint: fingerprint.to_owned(),
            device: String::new(),
            precision: precision.name().to_owned(),
            rejected: job.rejected.clone().zip(rejected_object).map(rejected),
            counts,
            bytes: object.bytes,
            etag: object.e_tag,
            seconds: BTreeMap::new(),
            pairs_per_second: None,
        }
    }

    /// With what the run knows that made the output: it took `total` seconds.
    pub(crate) fn timed(self, device: &str, totals: &Totals, total: f64) -> Self {
        let seconds = [
            ("read", totals.read),
            ("decode", totals.prepare),
            ("engine", totals.engine),
            ("write", totals.write),
            ("total", total),
        ];
        Self {
            device: device.to_owned(),
            seconds: seconds.map(|(stage, seconds)| (stage.to_owned(), seconds)).into(),
            pairs_per_second: Some(totals.pairs as f64 / total.max(1e-9)),
            ..self
        }
    }
}
