//! A worker that stays: one loaded model, its engines, and the limits that all its calls share. Knows no gRPC.

use std::sync::Arc;
use std::time::Duration;

use capsieve_engine::{Batch, Device, Heads, Info, ItmToken, Scorer};
use capsieve_store::{Access, ColumnOptions};

use crate::budget::Budget;
use crate::call::{Call, CallRequest};
use crate::engine::{Pool, engine_options};
use crate::fetch::Fetcher;
use crate::plan::Names;
use crate::prepare::Preparer;
use crate::shared::SharedEngine;
use crate::{CaptionPolicy, EngineChoice, LoadedModel, Result, ScoreJob, Select, Thresholds};

/// What a worker is started with.
#[derive(Clone, Debug)]
pub struct WorkerOptions {
    /// Scores that calls may ask for.
    pub heads: Heads,
    /// First token of the matching head.
    pub itm_token: ItmToken,
    /// What is too long and too large.
    pub policy: CaptionPolicy,
    /// What computes and how.
    pub engine: EngineChoice,
    /// How long a row waits for others to share its batch with.
    pub latency: Duration,
    /// Bytes that calls hold together, beside the model and the messages themselves: a half for chunks of rows, a quarter for row
    /// groups, three sixteenths for outputs, the rest for names of shards.
    pub memory_bytes: u64,
    /// What calls may read and write.
    pub access: Access,
}

/// What a worker serves.
#[derive(Clone, Debug)]
pub struct WorkerInfo {
    /// The model as the user named it.
    pub model: String,
    /// SHA-256 of weights, configuration, tokenizer and image preparation.
    pub hash: String,
    /// What computes: "cpu (avx512, 2 threads)".
    pub device: String,
    /// "f32"
    pub precision: &'static str,
    /// Scores that calls may ask for.
    pub heads: Heads,
    /// First token of the matching head.
    pub itm_token: ItmToken,
    /// Side of the images as the model takes them.
    pub image_size: usize,
    /// Longest caption in tokens.
    pub tokens_max: usize,
    /// Most images of a batch.
    pub batch_images: usize,
}

/// A loaded model that calls share.
pub struct Worker {
    engine: SharedEngine,
    info: WorkerInfo,
    options: WorkerOptions,
    names: Names,
}

impl Worker {
    /// Loads the model onto its devices and scores one pair on each, so that the first call finds everything warm.
    ///
    /// # Errors
    /// No such device, no memory, a checkpoint that cannot be used.
    pub fn start(model: &LoadedModel, options: WorkerOptions) -> Result<Arc<Self>> {
        let engines = options.engine.find()?;
        let config = model.checkpoint.config();
        let engine_options = engine_options(config, &options.engine, &engines, options.heads, options.itm_token);
        let mut scorers = model.scorers(&engines, &engine_options)?;
        scorers.iter_mut().try_for_each(|scorer| warm_up(scorer.as_mut()))?;
        let infos: Vec<Info> = scorers.iter().map(|scorer| scorer.info().clone()).collect();
        let devices: Vec<&str> = infos.iter().map(|info| info.device.as_str()).collect();
        let parts = (model.image.clone(), model.tokenizer.clone());
        let preparer = Preparer::new(options.engine.threads, parts, config.text.positions, options.policy)?;
        let part = |parts, of| Budget::part(options.memory_bytes, parts, of);
        let budget = part(1, 2);
        let engine = SharedEngine {
            hash: model.hash()?,
            device: devices.join(", "),
            precision: engines.precision,
            pool: Pool::start(scorers, Some(options.latency), &budget, engines.devices[0] != Device::Cpu),
            preparer: Arc::new(preparer),
            fetcher: Arc::new(Fetcher::new(options.engine.fetches_per_host)),
            budget,
            row_groups: part(1, 4),
            outputs: part(3, 16),
        };
        let info = WorkerInfo {
            model: model.name.clone(),
            hash: engine.hash.clone(),
            device: engine.device.clone(),
            precision: engine.precision.name(),
            heads: options.heads,
            itm_token: options.itm_token,
            image_size: config.vision.image_size,
            tokens_max: config.text.positions,
            batch_images: engine.pool.queue().info().images_max,
        };
        let names = Names::new(usize::try_from(options.memory_bytes / 16).unwrap_or(usize::MAX));
        Ok(Arc::new(Self { engine, info, options, names }))
    }

    /// What it serves.
    pub fn info(&self) -> &WorkerInfo {
        &self.info
    }

    /// What calls may read and write.
    pub fn access(&self) -> &Access {
        &self.options.access
    }

    /// Rows of all calls that wait for an engine.
    pub fn queue_depth(&self) -> usize {
        self.engine.pool.queue().depth()
    }

    /// Accepts a call: lists its shards and checks what can be checked without reading them.
    ///
    /// # Errors
    /// What is asked for is not there, not allowed, or contradicts itself.
    pub async fn call(self: &Arc<Self>, request: CallRequest) -> Result<Call> {
        Call::new(Arc::clone(self), request).await
    }

    /// Returns when an engine broke down: then nothing is scored any more, and the process had better end.
    pub async fn broke_down(&self) {
        self.engine.pool.queue().broke_down().await;
    }

    pub(crate) fn names(&self) -> &Names {
        &self.names
    }

    pub(crate) fn engine(&self) -> &SharedEngine {
        &self.engine
    }

    /// A job with this worker's part of the options.
    pub(crate) fn job(&self) -> ScoreJob {
        ScoreJob {
            input: String::new(),
            output: String::new(),
            columns: ColumnOptions::default(),
            heads: self.options.heads,
            itm_token: self.options.itm_token,
            thresholds: Thresholds::default(),
            policy: self.options.policy,
            rejected: None,
            kept_only: false,
            select: Select::All,
            drop_images: false,
            fail_on_row: false,
            overwrite: false,
            retry: Vec::new(),
            engine: self.options.engine.clone(),
        }
    }
}

fn warm_up(scorer: &mut dyn Scorer) -> Result<()> {
    let size = scorer.info().config.vision.image_size;
    let mut batch = Batch::new(size);
    batch.push_image(&vec![0; size * size * 3]);
    batch.push_caption(&[0]);
    Ok(scorer.score(&batch, &mut Vec::new())?)
}
