//! The store crate from outside: shards written with the Arrow library, read, scored and written by ours, and read back
//! with the Arrow library. Nothing here touches the network or the user's hub cache.

mod columns;
mod damage;
mod hub;
mod listing;
mod location;
mod models;
mod output;
mod selection;
mod types;
mod views;

use std::fs::File;
use std::future::Future;
use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch};
use arrow::compute::concat_batches;
use capsieve_store::{
    CaptionScore, ColumnOptions, Location, OutputHeads, OutputOptions, Result, RowScore, ShardReader, ShardWriter,
    Written,
};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::file::properties::WriterProperties;

/// Small enough that every test shard has several batches and row groups.
const BATCH_ROWS: usize = 3;

fn wait<F: Future>(future: F) -> F::Output {
    tokio::runtime::Runtime::new().unwrap().block_on(future)
}

fn at(folder: &Path, name: &str) -> Location {
    Location::parse(folder.join(name).to_str().unwrap()).unwrap()
}

/// A batch of named columns, all of them nullable.
fn batch(columns: Vec<(&str, ArrayRef)>) -> RecordBatch {
    RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(name, array)| (name, array, true))).unwrap()
}

fn write(path: &Path, batch: &RecordBatch) {
    let properties = WriterProperties::builder().set_max_row_group_row_count(Some(4)).build();
    write_with(path, batch, properties);
}

fn write_with(path: &Path, batch: &RecordBatch, properties: WriterProperties) {
    let mut writer = ArrowWriter::try_new(File::create(path).unwrap(), batch.schema(), Some(properties)).unwrap();
    writer.write(batch).unwrap();
    writer.close().unwrap();
}

/// All rows of a file, its key-value metadata in the schema.
fn read(path: &Path) -> RecordBatch {
    let builder = ParquetRecordBatchReaderBuilder::try_new(File::open(path).unwrap()).unwrap();
    let schema = Arc::clone(builder.schema());
    let batches: Vec<RecordBatch> = builder.build().unwrap().map(|batch| batch.unwrap()).collect();
    concat_batches(&schema, &batches).unwrap().with_schema(schema).unwrap()
}

fn options() -> OutputOptions {
    OutputOptions {
        metadata: vec![("capsieve.version".to_owned(), "0.1.0".to_owned())],
        ..OutputOptions::new(OutputHeads { itm: true, cosine: true })
    }
}

/// A row that was scored, one caption.
fn scored(itm: f32, cosine: f32) -> RowScore {
    scored_list(&[(itm, cosine)])
}

fn scored_list(scores: &[(f32, f32)]) -> RowScore {
    let score = |(itm, cosine): &(f32, f32)| CaptionScore { itm: Some(*itm), cosine: Some(*cosine), fault: None };
    RowScore { status: "ok", error: None, scores: scores.iter().map(score).collect() }
}

fn failed(status: &'static str) -> RowScore {
    RowScore { status, error: Some(format!("{status} for a reason")), scores: Vec::new() }
}

/// Reads a shard and writes it with the scores that `score` gives each row number.
async fn rescore(
    input: &Location,
    output: &Location,
    options: &OutputOptions,
    score: impl Fn(usize) -> RowScore,
) -> Result<Written> {
    let reader = ShardReader::open(input, &ColumnOptions::default()).await?;
    let mut writer = ShardWriter::create(output, reader.schema(), reader.columns(), options).await?;
    let mut batches = reader.into_batches(BATCH_ROWS);
    let mut first = 0;
    while let Some(batch) = batches.next().await? {
        let scores: Vec<RowScore> = (first..first + batch.num_rows()).map(&score).collect();
        first += batch.num_rows();
        writer.write(&batch, &scores).await?;
    }
    writer.commit(&[]).await
}

/// What a folder holds, hidden files too.
fn listed(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
