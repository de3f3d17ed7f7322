//! A loaded model, its threads and its memory, which jobs share.

use std::sync::Arc;

use tokio::sync::OnceCell;

use crate::budget::Budget;
use crate::engine::Pool;
use crate::fetch::Fetcher;
use crate::limits::COMPANY;
use crate::prepare::Preparer;
use crate::{Engines, LoadedModel, Precision, Result, ScoreJob, engine_options};

/// A loaded model that jobs share.
pub(crate) struct SharedEngine {
    /// SHA-256 of the model.
    pub(crate) hash: String,
    /// Of all engines: "cuda:0 (...), cuda:1 (...)".
    pub(crate) device: String,
    pub(crate) precision: Precision,
    pub(crate) pool: Pool,
    pub(crate) preparer: Arc<Preparer>,
    /// Fetches the images of addresses.
    pub(crate) fetcher: Arc<Fetcher>,
    /// Memory for the chunks of all jobs.
    pub(crate) budget: Budget,
    /// Memory for the row groups that are read.
    pub(crate) row_groups: Budget,
    /// Memory for the outputs that are written.
    pub(crate) outputs: Budget,
}

/// An engine that is loaded when the first shard is open: most of what can be wrong shows before, and where everything is done
/// no weights are needed.
pub(crate) struct LazyEngine<'a> {
    model: &'a LoadedModel,
    job: &'a ScoreJob,
    pub(crate) engines: Engines,
    pub(crate) hash: String,
    memory: Option<u64>,
    loaded: OnceCell<SharedEngine>,
}

impl<'a> LazyEngine<'a> {
    /// Of the options of `job`; shards hold at most `memory` bytes together.
    pub(crate) fn new(model: &'a LoadedModel, job: &'a ScoreJob, memory: Option<u64>) -> Result<Self> {
        let (engines, hash) = (job.engine.find()?, model.hash()?);
        Ok(Self { model, job, engines, hash, memory, loaded: OnceCell::new() })
    }

    /// Loads it, if nobody has yet.
    pub(crate) async fn get(&self) -> Result<&SharedEngine> {
        self.loaded.get_or_try_init(|| async { self.load() }).await
    }

    fn load(&self) -> Result<SharedEngine> {
        let Self { model, job, engines, .. } = self;
        let config = model.checkpoint.config();
        let options = engine_options(config, &job.engine, engines, job.heads, job.itm_token);
        let scorers = model.scorers(engines, &options)?;
        let parts = (model.image.clone(), model.tokenizer.clone());
        let preparer = Preparer::new(job.engine.threads, parts, config.text.positions, job.policy)?;
        let devices: Vec<String> = scorers.iter().map(|scorer| scorer.info().device.clone()).collect();
        let part = |parts, of| self.memory.map_or_else(Budget::default, |bytes| Budget::part(bytes, parts, of));
        let budget = part(1, 2);
        Ok(SharedEngine {
            hash: self.hash.clone(),
            device: devices.join(", "),
            precision: engines.precision,
            pool: Pool::start(scorers, Some(COMPANY), &budget, engines.ahead()),
            preparer: Arc::new(preparer),
            fetcher: Arc::new(Fetcher::new(job.engine.fetches_per_host)),
            budget,
            row_groups: part(1, 4),
            outputs: part(1, 4),
        })
    }
}
