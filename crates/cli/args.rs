//! The options of every command. Each also reads the environment variable `CAPSIEVE_<OPTION>`.

mod score;
mod worker;

use std::path::PathBuf;

use capsieve_worker::{DeviceChoice, EngineChoice, Heads, ItmToken, Precision, SynthSize};
use clap::builder::FalseyValueParser;
use clap::{ArgAction, Args as Group, Parser, Subcommand, ValueEnum};

pub(crate) use score::{OnShardError, ScoreArgs, Selection};
pub(crate) use worker::{ServeArgs, SubmitArgs};

/// Scores image-caption pairs with BLIP's image-text matching model, so that noisy captions can be thrown out.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true, max_term_width = 110)]
#[command(after_help = "Exit status: 0 done, 1 failed, 2 wrong usage, 3 done but some rows have no score.\n\
                        Every option also reads an environment variable CAPSIEVE_<OPTION>.")]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) log: LogArgs,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Group)]
pub(crate) struct LogArgs {
    /// How log lines on standard error look
    #[arg(long, global = true, env = "CAPSIEVE_LOG_FORMAT", value_name = "FORMAT", default_value = "text")]
    pub(crate) log_format: LogFormat,
    /// More log lines; twice: even more
    #[arg(short, long, global = true, env = "CAPSIEVE_VERBOSE", action = ArgAction::Count)]
    pub(crate) verbose: u8,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Scores the bundled shard with the bundled small model and shows how well the noise was found
    Demo(DemoArgs),
    /// Scores a Parquet shard: the same rows with their scores come out
    Score(Box<ScoreArgs>),
    /// Serves scores over gRPC until it is told to end
    Serve(Box<ServeArgs>),
    /// Has a running worker score shards, shows its progress, and goes on where a cut call stopped
    Submit(Box<SubmitArgs>),
    /// Shows what a checkpoint or a shard is, and what of it would be scored
    Inspect(InspectArgs),
    /// Writes a seeded random checkpoint in Hugging Face's layout, for benchmarks
    Synth(SynthArgs),
    /// Measures pairs/s of the engine alone and of the whole pipeline
    Bench(BenchArgs),
}

#[derive(Clone, Debug, Group)]
pub(crate) struct EngineArgs {
    /// What computes: auto, cpu, cuda or cuda:N[,N...]
    #[arg(long, env = "CAPSIEVE_DEVICE", default_value = "auto", value_parser = device)]
    pub(crate) device: Device,
    /// Arithmetic of the products; the CPU has f32, bf16 and int8, cards all but int8; auto: f32 and f16
    #[arg(long, env = "CAPSIEVE_PRECISION", default_value = "auto")]
    pub(crate) precision: PrecisionArg,
    /// Images that go through the engine at a time: a number, or auto
    #[arg(long, env = "CAPSIEVE_BATCH_SIZE", value_name = "N|auto", default_value = "auto", value_parser = batch_size)]
    pub(crate) batch_size: BatchSize,
    /// Threads of the engine and of the preparation; 0: one per core
    #[arg(long, env = "CAPSIEVE_THREADS", value_name = "N", default_value_t = 0, value_parser = threads)]
    pub(crate) threads: usize,
}

#[derive(Clone, Debug, Group)]
pub(crate) struct FetchArgs {
    /// Images fetched at a time from one web server or bucket; 64 in all
    #[arg(long, env = "CAPSIEVE_FETCHES_PER_HOST", value_name = "N", value_parser = fetches,
          default_value_t = capsieve_worker::limits::FETCHES_PER_HOST)]
    pub(crate) fetches_per_host: usize,
}

#[derive(Debug, Group)]
pub(crate) struct ColumnArgs {
    /// Column of the images, if it is not to be found by name
    #[arg(long, env = "CAPSIEVE_IMAGE_COLUMN", value_name = "NAME")]
    pub(crate) image_column: Option<String>,
    /// Column of the captions, if it is not to be found by name
    #[arg(long, env = "CAPSIEVE_CAPTION_COLUMN", value_name = "NAME")]
    pub(crate) caption_column: Option<String>,
    /// Column of the keys, if it is not to be found by name
    #[arg(long, env = "CAPSIEVE_KEY_COLUMN", value_name = "NAME")]
    pub(crate) key_column: Option<String>,
}

/// What becomes of the rows, whoever scores them.
#[derive(Debug, Group)]
pub(crate) struct OutputArgs {
    /// Least itm_score of a row to keep, 0 to 1; adds the column keep
    #[arg(long, env = "CAPSIEVE_MIN_ITM", value_name = "X", value_parser = probability)]
    pub(crate) min_itm: Option<f32>,
    /// Least cosine_score of a row to keep, -1 to 1; adds the column keep
    #[arg(long, env = "CAPSIEVE_MIN_COSINE", value_name = "X", value_parser = cosine, allow_negative_numbers = true)]
    pub(crate) min_cosine: Option<f32>,
    /// Leaves the image column out of the output
    #[arg(long, env = "CAPSIEVE_DROP_IMAGES", value_parser = FalseyValueParser::new(), action = ArgAction::SetTrue)]
    pub(crate) drop_images: bool,
    /// What a row without a score does: its scores are null, or the job fails
    #[arg(long, env = "CAPSIEVE_ON_ERROR", value_name = "ACTION", default_value = "null")]
    pub(crate) on_error: OnError,
    /// Replaces outputs that are there
    #[arg(long, env = "CAPSIEVE_OVERWRITE", value_parser = FalseyValueParser::new(), action = ArgAction::SetTrue)]
    pub(crate) overwrite: bool,
}

#[derive(Debug, Group)]
pub(crate) struct DemoArgs {
    /// Folder for the scored shard, made if need be
    #[arg(long, env = "CAPSIEVE_OUT", value_name = "DIR", default_value = "capsieve-demo")]
    pub(crate) out: PathBuf,
    /// Threads of the engine and of the preparation; 0: one per core
    #[arg(long, env = "CAPSIEVE_THREADS", value_name = "N", default_value_t = 0, value_parser = threads)]
    pub(crate) threads: usize,
}

#[derive(Debug, Group)]
pub(crate) struct InspectArgs {
    /// A Parquet shard, a checkpoint folder or file, a bucket's prefix, a hub id, or synthetic:tiny|base|large[:SEED]
    #[arg(value_name = "URI_OR_DIR", env = "CAPSIEVE_TARGET")]
    pub(crate) target: String,
    #[command(flatten)]
    pub(crate) columns: ColumnArgs,
}

#[derive(Debug, Group)]
pub(crate) struct SynthArgs {
    /// Shape of the model
    #[arg(long, env = "CAPSIEVE_SIZE")]
    pub(crate) size: Size,
    /// Seed of the weights
    #[arg(long, env = "CAPSIEVE_SEED", value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
    /// Folder for the checkpoint, made if need be
    #[arg(long, env = "CAPSIEVE_OUT", value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Writes into a folder that holds something
    #[arg(long, env = "CAPSIEVE_OVERWRITE", value_parser = FalseyValueParser::new(), action = ArgAction::SetTrue)]
    pub(crate) overwrite: bool,
}

#[derive(Debug, Group)]
pub(crate) struct BenchArgs {
    /// A checkpoint folder, a bucket's prefix (s3://bucket/model/), a hub id, or synthetic:tiny|base|large[:SEED]
    #[arg(long, env = "CAPSIEVE_MODEL", default_value = "synthetic:base")]
    pub(crate) model: String,
    /// A shard whose rows are measured instead of the bundled ones
    #[arg(long, env = "CAPSIEVE_INPUT", value_name = "URI")]
    pub(crate) input: Option<String>,
    /// Captions of each image of the bundled shard
    #[arg(long, env = "CAPSIEVE_CAPTIONS_PER_IMAGE", value_name = "N", default_value_t = 1, value_parser = captions,
        conflicts_with = "input")]
    pub(crate) captions_per_image: usize,
    /// Measures reading and preparation alone, and no engine
    #[arg(long, env = "CAPSIEVE_PREPARE_ONLY", value_parser = FalseyValueParser::new(), action = ArgAction::SetTrue)]
    pub(crate) prepare_only: bool,
    /// Seconds to measure the engine for, and about as long the pipeline; or preparation, with --prepare-only
    #[arg(long, env = "CAPSIEVE_SECONDS", value_name = "S", default_value_t = 10.0, value_parser = seconds)]
    pub(crate) seconds: f64,
    /// Scores to compute
    #[arg(long, env = "CAPSIEVE_HEADS", value_delimiter = ',', default_value = "itm,cosine")]
    pub(crate) heads: Vec<Head>,
    /// Prints JSON instead of a table
    #[arg(long, env = "CAPSIEVE_JSON", value_parser = FalseyValueParser::new(), action = ArgAction::SetTrue)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) columns: ColumnArgs,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Head {
    Itm,
    Cosine,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnError {
    Null,
    Fail,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Token {
    Cls,
    Enc,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Size {
    Tiny,
    Base,
    Large,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PrecisionArg {
    Auto,
    F32,
    Tf32,
    Bf16,
    F16,
    Int8,
}

impl From<EngineArgs> for EngineChoice {
    fn from(args: EngineArgs) -> Self {
        let precision = match args.precision {
            PrecisionArg::Auto => None,
            PrecisionArg::F32 => Some(Precision::F32),
            PrecisionArg::Tf32 => Some(Precision::Tf32),
            PrecisionArg::Bf16 => Some(Precision::Bf16),
            PrecisionArg::F16 => Some(Precision::F16),
            PrecisionArg::Int8 => Some(Precision::Int8),
        };
        Self {
            device: args.device.0,
            precision,
            batch_size: args.batch_size.0,
            threads: args.threads,
            ..Self::default()
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Device(pub(crate) DeviceChoice);

/// Images of a batch; 0: the worker chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BatchSize(pub(crate) usize);

/// The heads of a list.
pub(crate) fn heads(list: &[Head]) -> Heads {
    Heads { itm: list.contains(&Head::Itm), cosine: list.contains(&Head::Cosine) }
}

impl From<Token> for ItmToken {
    fn from(token: Token) -> Self {
        match token {
            Token::Cls => Self::Cls,
            Token::Enc => Self::Enc,
        }
    }
}

impl From<Size> for SynthSize {
    fn from(size: Size) -> Self {
        match size {
            Size::Tiny => Self::Tiny,
            Size::Base => Self::Base,
            Size::Large => Self::Large,
        }
    }
}

fn device(text: &str) -> Result<Device, String> {
    let bad = || "expected auto, cpu, cuda or cuda:N[,N...]".to_owned();
    let number = |number: &str| number.parse().map_err(|_| bad());
    let numbers = |list: &str| list.split(',').map(number).collect::<Result<Vec<usize>, _>>();
    let choice = match text {
        "auto" => DeviceChoice::Auto,
        "cpu" => DeviceChoice::Cpu,
        "cuda" => DeviceChoice::Cuda(vec![0]),
        other => DeviceChoice::Cuda(numbers(other.strip_prefix("cuda:").ok_or_else(bad)?)?),
    };
    Ok(Device(choice))
}

fn batch_size(text: &str) -> Result<BatchSize, String> {
    if text == "auto" {
        return Ok(BatchSize(0));
    }
    number(text, 1, 4096).map(BatchSize).map_err(|reason| format!("{reason}, or auto"))
}

fn threads(text: &str) -> Result<usize, String> {
    number(text, 0, 1024)
}

fn fetches(text: &str) -> Result<usize, String> {
    number(text, 1, capsieve_worker::limits::FETCHES)
}

fn captions(text: &str) -> Result<usize, String> {
    number(text, 1, 1000)
}

/// [CLS] and [SEP] always stay.
fn caption_tokens(text: &str) -> Result<usize, String> {
    number(text, 2, 1 << 20)
}

fn number(text: &str, least: usize, most: usize) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number| (least..=most).contains(number));
    number.ok_or_else(|| format!("expected a whole number from {least} to {most}"))
}

fn pixels(text: &str) -> Result<u64, String> {
    let number = text.parse().ok().filter(|number| *number > 0);
    number.ok_or_else(|| "expected a whole number of pixels, at least 1".to_owned())
}

fn probability(text: &str) -> Result<f32, String> {
    within(text, 0.0, 1.0)
}

fn cosine(text: &str) -> Result<f32, String> {
    within(text, -1.0, 1.0)
}

fn within(text: &str, least: f32, most: f32) -> Result<f32, String> {
    let number = text.parse().ok().filter(|number| (least..=most).contains(number));
    number.ok_or_else(|| format!("expected a number from {least} to {most}"))
}

fn seconds(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number| (0.0..=3600.0).contains(number));
    number.ok_or_else(|| "expected seconds from 0 to 3600".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_options_are_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn every_option_reads_its_variable() {
        for command in Args::command().get_subcommands() {
            for option in command.get_arguments().filter_map(|option| option.get_long().map(|name| (name, option))) {
                let expected = format!("CAPSIEVE_{}", option.0.to_uppercase().replace('-', "_"));
                let found = option.1.get_env().and_then(|name| name.to_str());
                assert_eq!(found, Some(expected.as_str()), "--{} of {}", option.0, command.get_name());
            }
        }
    }
}
