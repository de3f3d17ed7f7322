//! Where rows come from and scores go: objects in stores, Parquet shards, models of the hub.
//!
//! ```text
//! Location --Footer, Columns--> ShardReader --batches--> rows(batch) --> ...scores... --> ShardWriter --commit--> Location
//! hub id ------fetch_model----> a folder in the local hub cache
//! bucket ------fetch_stored_model----> a folder in our own cache
//! ```
//!
//! Everything is async and only reads, waits and writes; Parquet's own computing runs on blocking threads, where its
//! panics on damaged files are contained. Every byte goes through [`object_store`], so this crate knows no files but the
//! hub cache and leftovers of killed runs. It knows nothing of images, captions or models beyond their column types.
//!
//! Invariants: one row group of a shard is in memory at a time; an output carries every input column unchanged, in the
//! order of the input; an output is visible whole or not at all.
#![forbid(unsafe_code)]

mod access;
mod answers;
mod buckets;
mod columns;
mod earlier;
mod error;
mod features;
mod footer;
mod hub;
mod listing;
mod location;
mod models;
mod names;
mod object;
mod output;
mod partial;
mod paths;
mod reader;
mod rows;
mod selection;
mod stats;
mod types;
mod upload;
mod views;
mod web;
mod writer;

pub use access::{Access, blocking, is_below};
pub use buckets::is_remote;
pub use columns::{CaptionKind, ColumnOptions, Columns, ImageKind};
pub use earlier::EarlierScores;
pub use error::{Error, Result};
pub use footer::Footer;
pub use hub::{FileProgress, HubConfig, fetch_model, fetch_model_with};
pub use listing::{ListLimits, Listing, URI_BYTES_MAX, is_flat, is_pattern, pattern_prefix};
pub use location::{Location, ObjectInfo};
pub use models::fetch_stored_model;
pub use names::{below, parts_below};
pub use object::WrittenObject;
pub use output::{
    CaptionScore, FINGERPRINT, OutputHeads, OutputOptions, OutputRows, ROWS_ALL, ROWS_KEPT, ROWS_REJECTED, RowScore,
    rows_of,
};
pub use partial::remove_leftovers;
pub use reader::{Batches, ShardReader};
pub use rows::{CaptionCell, ImageCell, InputRow, key_texts, row, rows};
pub use selection::Select;
pub use stats::{FoundStats, read_stats, remove_stats, stats_location, write_stats};
pub use upload::{check_writable, uploads_settled};
pub use web::{Address, Refusal, WebAddress, WebAnswer, WebClient, WebError};
pub use writer::{ShardWriter, Written};
