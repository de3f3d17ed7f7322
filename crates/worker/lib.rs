//! The pipeline between store, prep and engine, and the jobs built on it: score, demo, inspect, synth, bench.
//!
//! ```text
//! shard -> read (async) -> prepare (own threads) -> engine (own thread) -> write (async) -> scored shard
//! ```
//!
//! Every arrow is a bounded channel in `pipeline.rs`; every bound stands in [`limits`]. Knows no gRPC and prints nothing:
//! what a person sees is the caller's business. Invariants: one result for each input row, in input order; a bad row never
//! costs another row; the output is there whole or not at all.
#![forbid(unsafe_code)]

mod bench;
mod budget;
mod call;
mod dataset;
mod demo;
mod engine;
mod error;
mod fetch;
mod found;
mod hosts;
mod identity;
mod inspect;
pub mod limits;
mod model;
mod pairs;
mod pipeline;
mod plan;
mod prepare;
mod progress;
mod queue;
mod ranking;
mod resume;
mod rows;
mod score;
mod scores;
mod service;
mod shards;
mod shared;
mod stats;
mod synth;
mod threads;

pub use bench::{BenchOptions, BenchReport, PreparationReport, StageReport, bench, bench_preparation};
pub use call::{Call, CallRequest, Event, Events, ScoredRows, ShardDone, Sink, Source};
pub use capsieve_engine::{Heads, ItmToken, Precision, give_large_buffers_back, share_heaps};
pub use capsieve_store::Error as StoreError;
pub use capsieve_store::{Access, CaptionScore, ColumnOptions, RowScore, Select, uploads_settled};
pub use dataset::{DatasetJob, DatasetReport, Prospect, look_at_dataset, score_dataset};
pub use demo::{DemoReport, DemoRow, NoiseReport, demo};
pub use engine::{DeviceChoice, EngineChoice, Engines, engine_options};
pub use error::{Error, Result};
pub use inspect::{CheckpointReport, Inspection, ShardReport, inspect};
pub use model::{LoadedModel, ModelSource};
pub use pairs::{Pair, PairImage};
pub use pipeline::Ticket;
pub use prepare::{CaptionPolicy, STATUSES};
pub use progress::Progress;
pub use ranking::{precision_recall, roc_auc};
pub use resume::Position;
pub use score::{Outcome, Outlook, ScoreJob, Thresholds, score};
pub use service::{Worker, WorkerInfo, WorkerOptions};
pub use shards::Partition;
pub use stats::{Counts, Rejected, Stats};
pub use synth::{SynthSize, synth};
