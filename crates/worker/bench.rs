//! The job `bench`: pairs/s of the engine alone and of the whole pipeline, on rows made in memory.

use std::sync::Arc;
use std::time::Instant;

use arrow_array::builder::{ListBuilder, StringBuilder};
use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, BinaryArray, RecordBatch, StringArray};
use capsieve_engine::{Batch, Config, Heads, ItmToken, Options, Scorer, Stage};
use capsieve_store::{
    Access, ColumnOptions, Columns, Location, OutputHeads, OutputOptions, OutputRows, Select, ShardReader, ShardWriter,
};
use futures::{StreamExt, pin_mut, stream};
use serde::Serialize;

use crate::budget::Budget;
use crate::demo::SHARD;
use crate::engine::Pool;
use crate::fetch::Fetcher;
use crate::limits::CHUNK_ROWS;
use crate::pipeline::{self, Images, Output, Stages};
use crate::prepare::Preparer;
use crate::rows::Ready;
use crate::{CaptionPolicy, EngineChoice, Error, LoadedModel, Progress, Result, engine_options};

/// Columns are found by their usual names.
const DETECT: ColumnOptions = ColumnOptions { image: None, caption: None, key: None };

/// Passes whose operations are timed one by one.
const PROFILE_PASSES: usize = 2;

/// What to measure.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// What computes and how; of several cards the first.
    pub engine: EngineChoice,
    /// Captions of an image.
    pub captions: usize,
    /// Seconds to measure for, at least one batch.
    pub seconds: f64,
    /// Which scores.
    pub heads: Heads,
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct BenchReport {
    /// The model.
    pub model: String,
    /// "cpu (avx512, 2 threads)"
    pub device: String,
    /// "f32"
    pub precision: &'static str,
    /// Images of a batch.
    pub batch_size: usize,
    /// Captions of an image.
    pub captions: usize,
    /// Tokens of a caption, on average.
    pub tokens: f64,
    /// Seconds to load the weights.
    pub load_seconds: f64,
    /// Pairs/s of the engine alone, median of its batches.
    pub engine_pairs_per_second: f64,
    /// The same as multiply-adds times two.
    pub engine_gflops: f64,
    /// What the device reaches at best: a card with a product of 8192 x 8192 x 8192 in this precision, a processor with
    /// multiply-adds between registers; measured just before.
    pub ceiling_gflops: f64,
    /// Kinds of operation in one pass of the engine, most costly first, each operation waited for.
    pub stages: Vec<StageReport>,
    /// Images/s of preparation, all threads, while the engine works beside it.
    pub prepare_images_per_second: f64,
    /// Pairs/s from Parquet to Parquet.
    pub pipeline_pairs_per_second: f64,
    /// Largest memory of the process so far; `None` where the system does not tell.
    pub peak_memory_bytes: Option<u64>,
}

/// Operations of one kind in one pass over a batch.
#[derive(Clone, Debug, Serialize)]
pub struct StageReport {
    /// "product 1024 -> 4096, gelu"
    pub name: String,
    /// How often it is done.
    pub calls: usize,
    /// Milliseconds of all calls together.
    pub milliseconds: f64,
    /// 10^9 multiply-adds times two a second; 0 where they do not matter.
    pub gflops: f64,
}

impl From<Stage> for StageReport {
    fn from(stage: Stage) -> Self {
        let Stage { name, calls, seconds, flops } = stage;
        Self { name, calls, milliseconds: seconds * 1e3, gflops: flops / seconds / 1e9 }
    }
}

/// The rows that are measured: the bundled shard's images and captions.
struct Rows {
    images: BinaryArray,
    captions: StringArray,
}

/// Measures a model: first the engine on one batch again and again, then the whole pipeline for about as long.
///
/// # Errors
/// The model cannot be loaded, or there is no temporary folder.
pub async fn bench(model: &LoadedModel, bench: &BenchOptions) -> Result<BenchReport> {
    let rows = Rows::bundled().await?;
    let config = model.checkpoint.config().clone();
    let engines = bench.engine.find()?;
    let options = engine_options(&config, &bench.engine, &engines, bench.heads, ItmToken::Cls);
    let ceiling = capsieve_engine::ceiling(&model.checkpoint, &options)?;
    let start = Instant::now();
    let mut scorer = model.scorer(&options)?;
    let load_seconds = start.elapsed().as_secs_f64();
    let options = Options { images_max: scorer.info().images_max, ..options };
    let batch = engine_batch(model, bench, &options, &rows)?;
    let engine = engine(bench, &batch, scorer.as_mut())?;
    let tokens = batch.tokens() as f64 / batch.captions() as f64;
    let (device, precision) = (scorer.info().device.clone(), scorer.info().precision.name());
    let count = ((bench.seconds * engine / bench.captions as f64).ceil() as usize).next_multiple_of(options.images_max);
    let (pipeline, prepare) = pipeline(model, bench, &rows, (scorer, engines.ahead()), count).await?;
    let peak_memory_bytes = peak_memory();
    // A second model: the first one is gone by now.
    let stages =
        capsieve_engine::profile(&model.checkpoint, &model.image.pixel_lut(), &options, &batch, PROFILE_PASSES)?;
    Ok(BenchReport {
        model: model.name.clone(),
        device,
        precision,
        batch_size: options.images_max,
        captions: bench.captions,
        tokens,
        load_seconds,
        engine_pairs_per_second: engine,
        engine_gflops: engine * flops_per_pair(&config, bench.captions, tokens, bench.heads) / 1e9,
        ceiling_gflops: ceiling / 1e9,
        stages: stages.into_iter().map(StageReport::from).collect(),
        prepare_images_per_second: prepare,
        pipeline_pairs_per_second: pipeline,
        peak_memory_bytes,
    })
}

impl Rows {
    async fn bundled() -> Result<Self> {
        let folder = tempfile::tempdir().map_err(temporary)?;
        let path = folder.path().join("shard.parquet");
        std::fs::write(&path, SHARD).map_err(temporary)?;
        let reader = ShardReader::open(&Location::parse(&path.display().to_string())?, &DETECT).await?;
        let rows = usize::try_from(reader.rows()).unwrap_or(usize::MAX);
        let batches = reader.into_stream(rows);
        pin_mut!(batches);
        let (mut images, mut captions) = (Vec::new(), Vec::new());
        while let Some(batch) = batches.next().await.transpose()? {
            let column = |name: &str| batch.column_by_name(name).expect("a bundled column");
            images.extend(column("image").as_binary_view().iter().flatten().map(<[u8]>::to_vec));
            captions.extend(column("caption").as_string_view().iter().flatten().map(str::to_owned));
        }
        Ok(Self { images: images.iter().map(|image| Some(image.as_slice())).collect(), captions: captions.into() })
    }

    /// No two are equal, for what is equal is scored once: decoders do not mind what stands behind an image.
    fn image(&self, i: usize) -> Vec<u8> {
        [self.images.value(i % self.images.len()), &i.to_le_bytes()].concat()
    }

    fn caption(&self, i: usize) -> String {
        format!("{} {i}", self.captions.value(i % self.captions.len()))
    }

    /// `count` rows from row `first` on, each with `captions` captions, cycling through the bundled ones.
    fn batch(&self, first: usize, count: usize, captions: usize) -> RecordBatch {
        let images: BinaryArray = (first..first + count).map(|i| Some(self.image(i))).collect();
        let column: ArrayRef = if captions == 1 {
            Arc::new((first..first + count).map(|i| Some(self.caption(i))).collect::<StringArray>())
        } else {
            let mut lists = ListBuilder::new(StringBuilder::new());
            for i in first..first + count {
                (0..captions).for_each(|c| lists.values().append_value(self.caption(i * captions + c)));
                lists.append(true);
            }
            Arc::new(lists.finish())
        };
        RecordBatch::try_from_iter([("image", Arc::new(images) as ArrayRef), ("caption", column)])
            .expect("two columns of one length")
    }
}

fn temporary(source: std::io::Error) -> Error {
    Error::File { path: "a temporary folder".to_owned(), source }
}

/// A full batch of the bundled rows.
fn engine_batch(model: &LoadedModel, bench: &BenchOptions, options: &Options, rows: &Rows) -> Result<Batch> {
    let mut batch = Batch::new(model.image.size);
    let bad = |source| Error::Preprocessing { model: model.name.clone(), source };
    let limits = capsieve_prep::DecodeLimits::default();
    for i in 0..options.images_max {
        let pixels = capsieve_prep::prepare_image(&rows.image(i), &model.image, &limits);
        batch.push_image(&pixels.expect("a bundled image"));
        for c in 0..bench.captions {
            batch.push_caption(&model.tokenizer.encode(&rows.caption(i * bench.captions + c)).map_err(bad)?);
        }
    }
    Ok(batch)
}

/// Pairs/s of full batches, median.
fn engine(bench: &BenchOptions, batch: &Batch, scorer: &mut dyn Scorer) -> Result<f64> {
    let (mut times, mut scores) = (Vec::new(), Vec::new());
    let start = Instant::now();
    while times.len() < 2 || start.elapsed().as_secs_f64() < bench.seconds {
        let start = Instant::now();
        // As the pipeline does it: the next batch is brought to the device meanwhile.
        scorer.score_ahead(batch, batch, &mut scores)?;
        times.push(start.elapsed().as_secs_f64());
    }
    // The first batch touches every buffer for the first time.
    let mut times = times.split_off(1);
    times.sort_by(f64::total_cmp);
    Ok(batch.captions() as f64 / times[times.len() / 2])
}

/// Pairs/s of `count` rows from memory to a Parquet file, and images/s of the preparation.
async fn pipeline(
    model: &LoadedModel,
    bench: &BenchOptions,
    rows: &Rows,
    (scorer, ahead): (Box<dyn Scorer>, bool),
    count: usize,
) -> Result<(f64, f64)> {
    let folder = tempfile::tempdir().map_err(temporary)?;
    let output = Location::parse(&folder.path().join("scored.parquet").display().to_string())?;
    let schema = rows.batch(0, 1, bench.captions).schema();
    let columns = Columns::detect(&schema, &DETECT, "the benchmark's rows")?;
    let heads = OutputHeads { itm: bench.heads.itm, cosine: bench.heads.cosine };
    let options = OutputOptions {
        heads,
        drop_images: false,
        select: Select::All,
        rows: OutputRows::All,
        min_itm: None,
        min_cosine: None,
        metadata: Vec::new(),
        overwrite: false,
    };
    let chunks: Vec<_> = (0..count).step_by(CHUNK_ROWS).map(|first| (first, CHUNK_ROWS.min(count - first))).collect();
    let parts = (model.image.clone(), model.tokenizer.clone());
    let pool = Pool::start(vec![scorer], None, ahead);
    let stages = Stages {
        input: Ready(stream::iter(
            chunks.into_iter().map(|(first, rows_of)| Ok(rows.batch(first, rows_of, bench.captions))),
        )),
        earlier: None,
        images: Images { beside: None, access: Access::everything(), fetcher: Arc::new(Fetcher::new(0)) },
        preparer: Arc::new(Preparer::new(
            bench.engine.threads,
            parts,
            model.checkpoint.config().text.positions,
            CaptionPolicy::default(),
        )?),
        share: pool.queue().join(bench.heads, Progress::default()),
        budget: Budget::default(),
        output: Output::Shard(Box::new(ShardWriter::create(&output, &schema, &columns, &options).await?)),
        columns,
        first_row: 0,
        fail_on_row: true,
    };
    let start = Instant::now();
    let totals = pipeline::run(stages).await?;
    Ok((totals.pairs as f64 / start.elapsed().as_secs_f64(), count as f64 / totals.prepare))
}

/// Multiply-adds times two of a pair: its share of the image, and its caption in each head.
fn flops_per_pair(config: &Config, captions: usize, tokens: f64, heads: Heads) -> f64 {
    let (vision, text) = (&config.vision, &config.text);
    let (v, f, t, g) = (vision.hidden as f64, vision.intermediate as f64, text.hidden as f64, text.intermediate as f64);
    let (patches, n) = (vision.patches() as f64, vision.patches() as f64 + 1.0);
    let patch = 3.0 * (vision.patch_size * vision.patch_size) as f64;
    let layer = n * v * (4.0 * v + 2.0 * f) + 2.0 * n * n * v;
    let mut image = patches * v * patch + vision.layers as f64 * layer;
    let own = 4.0 * t * t + 2.0 * t * g + 2.0 * tokens * t;
    let mut token = if heads.cosine { own } else { 0.0 };
    if heads.itm {
        image += text.layers as f64 * n * v * 2.0 * t;
        token += own + 2.0 * t * t + 2.0 * n * t;
    }
    2.0 * (image / captions as f64 + tokens * text.layers as f64 * token)
}

/// The process's largest resident memory, where the system has /proc.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kb| kb * 1024)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use super::*;

    #[test]
    fn flops_of_the_large_model_are_the_known_ones() {
        // 411.7 GFLOP a pair at 20 tokens: counted by hand, and timm lists 191.2 GMAC for the image encoder.
        let model = LoadedModel::synthetic(capsieve_engine::SyntheticSize::Large, 0).unwrap();
        let heads = Heads { itm: true, cosine: true };
        let flops = flops_per_pair(model.checkpoint.config(), 1, 20.0, heads) / 1e9;
        assert!((flops - 411.7).abs() < 0.5, "{flops}");
    }
}
