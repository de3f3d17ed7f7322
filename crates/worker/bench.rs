//! The job `bench`: pairs/s of the engine alone and of the whole pipeline, rows/s of preparation alone, on the rows of the
//! bundled shard or of the user's.

mod machine;
mod source;
mod watched;

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use capsieve_engine::{Batch, Heads, ItmToken, Options, Scorer, Stage};
use capsieve_store::{ColumnOptions, Location, OutputHeads, OutputOptions, ShardWriter};
use serde::Serialize;

use self::machine::{peak_memory, processor_seconds};
use self::source::{Source, Until};
use self::watched::Watched;
use crate::budget::Budget;
use crate::engine::Pool;
use crate::limits::BATCH_TOKENS;
use crate::pipeline::{self, Output, Stages, prepare_alone};
use crate::prepare::Preparer;
use crate::{CaptionPolicy, EngineChoice, Error, LoadedModel, Progress, Result, engine_options};

/// Passes whose operations are timed one by one.
const PROFILE_PASSES: usize = 2;

/// Seconds of preparation alone beside the other parts: it is measured in milliseconds a row.
const PREPARATION_SECONDS_MAX: f64 = 2.0;

/// What to measure.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// What computes and how; of several cards the first.
    pub engine: EngineChoice,
    /// URI of the shard whose rows are measured; none: the bundled one.
    pub input: Option<String>,
    /// Names of its columns, where they are not to be detected.
    pub columns: ColumnOptions,
    /// Captions of an image of the bundled shard.
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
    /// Captions of an image, on average.
    pub captions: f64,
    /// Tokens of a caption, on average.
    pub tokens: f64,
    /// Seconds to load the weights.
    pub load_seconds: f64,
    /// Pairs/s of the engine alone, median of its batches.
    pub engine_pairs_per_second: f64,
    /// The same as multiply-adds times two, of the operations that were done.
    pub engine_gflops: f64,
    /// What the device reaches at best: a card with a product of 8192 x 8192 x 8192 in this precision, a processor with
    /// multiply-adds between registers; measured just before.
    pub ceiling_gflops: f64,
    /// Kinds of operation in one pass of the engine, most costly first, each operation waited for.
    pub stages: Vec<StageReport>,
    /// Reading and preparation with no engine beside them.
    pub preparation: PreparationReport,
    /// Images/s of preparation, all threads, while the engine works beside it.
    pub prepare_images_per_second: f64,
    /// Pairs/s from Parquet to Parquet.
    pub pipeline_pairs_per_second: f64,
    /// The part of the time between the engine's first and last batch in that in which it had nothing to do.
    pub engine_idle_share: f64,
    /// Largest memory of the process so far; `None` where the system does not tell.
    pub peak_memory_bytes: Option<u64>,
}

/// Rows from Parquet to model input: read, decoded, resized, tokenised.
#[derive(Clone, Debug, Serialize)]
pub struct PreparationReport {
    /// The shard; none: the bundled one.
    pub input: Option<String>,
    /// Pixels of a side of the model's images.
    pub image_size: usize,
    /// Threads that prepare; reading has its own.
    pub threads: usize,
    /// Rows that were measured.
    pub rows: usize,
    /// Of these, rows that no engine could score.
    pub failed: usize,
    /// Rows/s of the whole program.
    pub rows_per_second: f64,
    /// Rows in a second of one processor, reading included; none where the system does not tell.
    pub rows_per_second_per_core: Option<f64>,
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

/// What all parts of the benchmark work with.
struct Bench<'a> {
    model: &'a LoadedModel,
    options: &'a BenchOptions,
    source: Source,
    preparer: Arc<Preparer>,
}

/// Measures a model: preparation for a moment, then the engine on one batch again and again, then the whole pipeline for about
/// as long.
///
/// # Errors
/// The model cannot be loaded, the shard cannot be read, or there is no temporary folder.
pub async fn bench(model: &LoadedModel, options: &BenchOptions) -> Result<BenchReport> {
    let bench = Bench::new(model, options).await?;
    let preparation = bench.preparation(options.seconds.min(PREPARATION_SECONDS_MAX)).await?;
    let config = model.checkpoint.config();
    let engines = options.engine.find()?;
    let engine_options = engine_options(config, &options.engine, &engines, options.heads, ItmToken::Cls);
    let ceiling = capsieve_engine::ceiling(&model.checkpoint, &engine_options)?;
    let start = Instant::now();
    let mut scorer = model.scorer(&engine_options)?;
    let load_seconds = start.elapsed().as_secs_f64();
    let engine_options = Options { images_max: scorer.info().images_max, ..engine_options };
    let batch = bench.batch(engine_options.images_max).await?;
    let engine = engine(options, &batch, scorer.as_mut())?;
    let captions = batch.captions() as f64 / batch.images() as f64;
    let tokens = batch.tokens() as f64 / batch.captions() as f64;
    let (device, precision) = (scorer.info().device.clone(), scorer.info().precision.name());
    // With less than two batches nothing would be between them.
    let count = ((options.seconds * engine / captions).ceil() as usize).next_multiple_of(engine_options.images_max);
    let count = count.max(2 * engine_options.images_max);
    let pipeline = bench.pipeline((scorer, engines.ahead()), count).await?;
    let peak_memory_bytes = peak_memory();
    // A second model: the first one is gone by now.
    let stages =
        capsieve_engine::profile(&model.checkpoint, &model.image.pixel_lut(), &engine_options, &batch, PROFILE_PASSES)?;
    let flops_per_pair = stages.iter().map(|stage| stage.flops).sum::<f64>() / batch.captions() as f64;
    Ok(BenchReport {
        model: model.name.clone(),
        device,
        precision,
        batch_size: engine_options.images_max,
        captions,
        tokens,
        load_seconds,
        engine_pairs_per_second: engine,
        engine_gflops: engine * flops_per_pair / 1e9,
        ceiling_gflops: ceiling / 1e9,
        stages: stages.into_iter().map(StageReport::from).collect(),
        preparation,
        prepare_images_per_second: pipeline.images_per_second,
        pipeline_pairs_per_second: pipeline.pairs_per_second,
        engine_idle_share: pipeline.idle_share,
        peak_memory_bytes,
    })
}

/// Measures reading and preparation alone: no weight is loaded.
///
/// # Errors
/// The shard cannot be read, or there is no temporary folder.
pub async fn bench_preparation(model: &LoadedModel, options: &BenchOptions) -> Result<PreparationReport> {
    Bench::new(model, options).await?.preparation(options.seconds).await
}

/// What a run of the pipeline showed.
struct Run {
    pairs_per_second: f64,
    images_per_second: f64,
    idle_share: f64,
}

impl<'a> Bench<'a> {
    async fn new(model: &'a LoadedModel, options: &'a BenchOptions) -> Result<Self> {
        let source = match &options.input {
            Some(uri) => Source::shard(uri, &options.columns).await?,
            None => Source::bundled(options.captions).await?,
        };
        let parts = (model.image.clone(), model.tokenizer.clone());
        let positions = model.checkpoint.config().text.positions;
        let preparer = Preparer::new(options.engine.threads, parts, positions, CaptionPolicy::default())?;
        Ok(Self { model, options, source, preparer: Arc::new(preparer) })
    }

    async fn preparation(&self, seconds: f64) -> Result<PreparationReport> {
        let (mut rows, mut failed) = (0, 0);
        let (start, processors) = (Instant::now(), processor_seconds());
        let input = self.source.rows(Until::Time(start + Duration::from_secs_f64(seconds)))?;
        let parts = (&self.source.images, &self.source.columns);
        prepare_alone(input, parts, &self.preparer, |chunk| {
            rows += chunk.rows.len();
            failed += chunk.rows.iter().filter(|row| row.is_err()).count();
            ControlFlow::Continue(())
        })
        .await?;
        let taken = start.elapsed().as_secs_f64();
        let used = processors.and_then(|before| Some(processor_seconds()? - before)).filter(|used| *used > 0.0);
        Ok(PreparationReport {
            input: self.options.input.clone(),
            image_size: self.model.image.size,
            threads: self.preparer.threads(),
            rows,
            failed,
            rows_per_second: rows as f64 / taken,
            rows_per_second_per_core: used.map(|used| rows as f64 / used),
        })
    }

    /// A full batch of the shard's rows.
    async fn batch(&self, images_max: usize) -> Result<Batch> {
        let mut batch = Batch::new(self.model.image.size);
        let input = self.source.rows(Until::Rows(images_max.max(self.source.len())))?;
        let parts = (&self.source.images, &self.source.columns);
        prepare_alone(input, parts, &self.preparer, |chunk| {
            for row in chunk.rows.into_iter().flatten() {
                // As the queue fills batches.
                let crowded = batch.images() > 0 && batch.tokens() + row.tokens() > BATCH_TOKENS;
                if crowded || batch.images() == images_max {
                    return ControlFlow::Break(());
                }
                let row = row.parts().swap_remove(0);
                batch.push_image(&row.pixels);
                row.captions.iter().flatten().for_each(|caption| batch.push_caption(caption));
            }
            ControlFlow::Continue(())
        })
        .await?;
        if batch.images() == 0 {
            let uri = self.source.uri().to_owned();
            return Err(Error::NothingToMeasure { uri, what: "no row that can be scored" });
        }
        Ok(batch)
    }

    /// `count` rows through the whole pipeline, from the shard to a Parquet file.
    async fn pipeline(&self, (scorer, ahead): (Box<dyn Scorer>, bool), count: usize) -> Result<Run> {
        let folder = tempfile::tempdir().map_err(temporary)?;
        let output = Location::parse(&folder.path().join("scored.parquet").display().to_string())?;
        let heads = self.options.heads;
        let output_options = OutputOptions::new(OutputHeads { itm: heads.itm, cosine: heads.cosine });
        let Source { schema, columns, images, .. } = &self.source;
        let (scorer, hours) = Watched::new(scorer);
        let pool = Pool::start(vec![Box::new(scorer)], None, &Budget::default(), ahead);
        let stages = Stages {
            input: self.source.rows(Until::Rows(count))?,
            earlier: None,
            images: images.clone(),
            preparer: Arc::clone(&self.preparer),
            share: pool.queue().join(heads, Progress::default()),
            budget: Budget::default(),
            output: Output::Shard(Box::new(ShardWriter::create(&output, schema, columns, &output_options).await?)),
            columns: columns.clone(),
            first_row: 0,
            fail_on_row: self.options.input.is_none(),
        };
        let start = Instant::now();
        let totals = pipeline::run(stages).await?;
        Ok(Run {
            pairs_per_second: totals.pairs as f64 / start.elapsed().as_secs_f64(),
            images_per_second: count as f64 / totals.prepare,
            idle_share: hours.idle_share(),
        })
    }
}

fn temporary(source: std::io::Error) -> Error {
    Error::File { path: "a temporary folder".to_owned(), source }
}

/// Pairs/s of full batches, median.
fn engine(options: &BenchOptions, batch: &Batch, scorer: &mut dyn Scorer) -> Result<f64> {
    let (mut times, mut scores) = (Vec::new(), Vec::new());
    let start = Instant::now();
    while times.len() < 2 || start.elapsed().as_secs_f64() < options.seconds {
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
