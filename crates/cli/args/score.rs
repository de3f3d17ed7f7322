//! The options of `capsieve score`.

use capsieve_worker::{Partition, STATUSES, Select};
use clap::builder::{FalseyValueParser, PossibleValuesParser};
use clap::{ArgAction, Args as Group, ValueEnum};

use super::worker::memory;
use super::{ColumnArgs, EngineArgs, FetchArgs, Head, OutputArgs, Token, caption_tokens, pixels};

#[derive(Debug, Group)]
pub(crate) struct ScoreArgs {
    /// A checkpoint folder, a bucket's prefix (s3://bucket/model/), a hub id, or synthetic:tiny|base|large[:SEED]
    #[arg(long, env = "CAPSIEVE_MODEL")]
    pub(crate) model: String,
    /// What to score: Parquet files, folders (every *.parquet below), or patterns such as 'in/**/*.parquet'
    #[arg(long, env = "CAPSIEVE_INPUT", value_name = "URI", required = true, num_args = 1..)]
    pub(crate) input: Vec<String>,
    /// Where the scored shards go: a folder that ends in '/', where they keep their names, or the file for a single shard
    #[arg(long, env = "CAPSIEVE_OUTPUT", value_name = "URI")]
    pub(crate) output: String,
    #[command(flatten)]
    pub(crate) columns: ColumnArgs,
    /// Scores to compute
    #[arg(long, env = "CAPSIEVE_HEADS", value_delimiter = ',', default_value = "itm,cosine")]
    pub(crate) heads: Vec<Head>,
    #[command(flatten)]
    pub(crate) output_rows: OutputArgs,
    /// Writes only the rows that pass the thresholds
    #[arg(long, env = "CAPSIEVE_KEPT_ONLY", value_parser = FalseyValueParser::new(), action = ArgAction::SetTrue)]
    pub(crate) kept_only: bool,
    /// Writes the rows that do not pass there, as --output says for the others; implies --kept-only
    #[arg(long, env = "CAPSIEVE_REJECTED", value_name = "URI")]
    pub(crate) rejected: Option<String>,
    /// Which captions of its list a kept row is written with: all, those that pass the thresholds, or the best one of them
    #[arg(long, env = "CAPSIEVE_SELECT", value_name = "CAPTIONS", default_value = "all")]
    pub(crate) select: Selection,
    /// Scores the rows of complete outputs again that have one of these statuses, such as fetch_failed
    #[arg(long, env = "CAPSIEVE_RETRY_STATUS", value_name = "STATUS", value_delimiter = ',',
          value_parser = PossibleValuesParser::new(STATUSES))]
    pub(crate) retry_status: Vec<String>,
    /// First token of the matching head: cls as transformers, enc as the published weights were trained
    #[arg(long, env = "CAPSIEVE_ITM_TOKEN", value_name = "TOKEN", default_value = "cls")]
    pub(crate) itm_token: Token,
    /// What a shard does that cannot be scored: the others are scored and the exit status is 1, or 3
    #[arg(long, env = "CAPSIEVE_ON_SHARD_ERROR", value_name = "ACTION", default_value = "fail")]
    pub(crate) on_shard_error: OnShardError,
    /// Scores every N-th shard, beginning with the I-th (from 0); auto or auto/N: I is JOB_COMPLETION_INDEX or
    /// SLURM_ARRAY_TASK_ID
    #[arg(long, env = "CAPSIEVE_PARTITION", value_name = "I/N", value_parser = partition)]
    pub(crate) partition: Option<Share>,
    /// Says what would be done, and does nothing
    #[arg(long, env = "CAPSIEVE_DRY_RUN", value_parser = FalseyValueParser::new(), action = ArgAction::SetTrue)]
    pub(crate) dry_run: bool,
    /// Bytes that shards hold together beside the model: half for rows, a quarter for row groups that are read, a quarter for
    /// outputs
    #[arg(long, env = "CAPSIEVE_MEMORY_LIMIT", value_name = "BYTES", default_value_t = 4 << 30, value_parser = memory)]
    pub(crate) memory_limit: u64,
    /// Cuts longer captions to N tokens, the first and last marker included, instead of refusing them
    #[arg(long, env = "CAPSIEVE_MAX_CAPTION_TOKENS", value_name = "N", value_parser = caption_tokens)]
    pub(crate) max_caption_tokens: Option<usize>,
    /// Images with more pixels are refused before they are decoded
    #[arg(long, env = "CAPSIEVE_MAX_IMAGE_PIXELS", value_name = "N", value_parser = pixels,
          default_value_t = capsieve_worker::limits::IMAGE_PIXELS_MAX)]
    pub(crate) max_image_pixels: u64,
    #[command(flatten)]
    pub(crate) fetches: FetchArgs,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnShardError {
    Fail,
    Skip,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Selection {
    All,
    Matching,
    Best,
}

impl From<Selection> for Select {
    fn from(selection: Selection) -> Self {
        match selection {
            Selection::All => Self::All,
            Selection::Matching => Self::Matching,
            Selection::Best => Self::Best,
        }
    }
}

/// A worker's share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Share(pub(crate) Partition);

fn partition(text: &str) -> Result<Share, String> {
    share(text, |name| std::env::var(name).ok())
}

fn share(text: &str, variable: impl Fn(&str) -> Option<String>) -> Result<Share, String> {
    let bad = || format!("expected I/N with I from 0 to N - 1, auto or auto/N, found {text:?}");
    let number = |name: &str| {
        let found = variable(name)?;
        Some(found.parse::<usize>().map_err(|_| format!("{name} is {found:?}, which is no number")))
    };
    let of = |name: &str| number(name).transpose();
    let (index, count) = text.split_once('/').map_or((text, None), |(index, count)| (index, Some(count)));
    let count = count.map(|count| count.parse::<usize>().map_err(|_| bad())).transpose()?;
    let (index, count) = match (index, count) {
        ("auto", count) => match (of("JOB_COMPLETION_INDEX")?, of("SLURM_ARRAY_TASK_ID")?) {
            (Some(index), _) => (index, count.ok_or("Kubernetes does not say how many workers there are: auto/N")?),
            (None, Some(task)) => match count {
                // A task that is submitted again, alone, keeps its number.
                Some(count) => (task, count),
                // The numbers of an array job may begin anywhere; they are taken to be one after another.
                None => {
                    let index = task.checked_sub(of("SLURM_ARRAY_TASK_MIN")?.unwrap_or_default()).ok_or_else(bad)?;
                    (index, of("SLURM_ARRAY_TASK_COUNT")?.ok_or("SLURM_ARRAY_TASK_COUNT is not set: auto/N")?)
                }
            },
            (None, None) => return Err("neither JOB_COMPLETION_INDEX nor SLURM_ARRAY_TASK_ID is set".to_owned()),
        },
        (index, Some(count)) => (index.parse().map_err(|_| bad())?, count),
        (_, None) => return Err(bad()),
    };
    if index >= count {
        return Err(format!("worker {index} of {count}: the first one is 0, the last {}", count.saturating_sub(1)));
    }
    Ok(Share(Partition { index, count }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_come_from_the_option_or_the_scheduler() {
        let kubernetes = |name: &str| (name == "JOB_COMPLETION_INDEX").then(|| "3".to_owned());
        let slurm = |name: &str| {
            let known =
                [("SLURM_ARRAY_TASK_ID", "12"), ("SLURM_ARRAY_TASK_MIN", "10"), ("SLURM_ARRAY_TASK_COUNT", "4")];
            known.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        };
        let nothing = |_: &str| None;
        let is = |index, count| Ok(Share(Partition { index, count }));
        assert_eq!(share("0/1", nothing), is(0, 1));
        assert_eq!(share("7/8", kubernetes), is(7, 8));
        assert_eq!(share("auto/5", kubernetes), is(3, 5));
        assert_eq!(share("auto", slurm), is(2, 4));
        assert_eq!(share("auto/20", slurm), is(12, 20), "task 12, whichever others were submitted with it");
        assert!(share("auto/9", slurm).is_err());
        for bad in ["", "1", "/", "1/", "/2", "2/2", "0/0", "-1/2", "a/b", "auto/x", "auto", "auto/2"] {
            assert!(share(bad, nothing).is_err(), "{bad}");
        }
        assert!(share("auto", kubernetes).is_err(), "of how many");
        assert!(share("auto/3", kubernetes).is_err(), "there is no fourth of three");
    }
}
