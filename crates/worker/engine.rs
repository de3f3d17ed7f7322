//! Which devices compute, and batches to them: one scorer and one thread a device, one queue for all.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::JoinHandle;
use std::time::Instant;

use capsieve_engine::{Batch, Device, Info, PairScore, Precision, Scorer};
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

use crate::limits::BATCHES_WAITING;
use crate::{Error, Result};

/// What the user asks to compute with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first card if there is one that can be used, else the processor.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// These cards.
    Cuda(Vec<usize>),
}

/// What computes and how.
#[derive(Clone, Debug, Default)]
pub struct EngineChoice {
    /// The devices.
    pub device: DeviceChoice,
    /// Arithmetic; none: f16 on cards, f32 on the processor.
    pub precision: Option<Precision>,
    /// Images of a batch; 0 chooses.
    pub batch_size: usize,
    /// Threads of a CPU engine and of the preparation; 0: one per core.
    pub threads: usize,
}

/// Devices that are there, and their arithmetic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Engines {
    /// At least one.
    pub devices: Vec<Device>,
    /// Of all of them.
    pub precision: Precision,
}

impl EngineChoice {
    /// Looks what is there.
    ///
    /// # Errors
    /// A card that was asked for cannot be used, or the processor is to compute in another precision than f32.
    pub fn find(&self) -> Result<Engines> {
        let devices = match &self.device {
            DeviceChoice::Cpu => vec![Device::Cpu],
            DeviceChoice::Cuda(ordinals) => {
                for ordinal in ordinals {
                    capsieve_engine::check_cuda(*ordinal)?;
                }
                ordinals.iter().map(|ordinal| Device::Cuda(*ordinal)).collect()
            }
            DeviceChoice::Auto => match capsieve_engine::check_cuda(0) {
                Ok(()) => vec![Device::Cuda(0)],
                Err(error) if cfg!(feature = "cuda") => {
                    tracing::info!("computing on the CPU: {error}");
                    vec![Device::Cpu]
                }
                Err(_) => vec![Device::Cpu],
            },
        };
        let default = if devices == [Device::Cpu] { Precision::F32 } else { Precision::F16 };
        let precision = self.precision.unwrap_or(default);
        if devices == [Device::Cpu] && precision != Precision::F32 {
            return Err(Error::CpuPrecision { precision: precision.name() });
        }
        Ok(Engines { devices, precision })
    }
}

/// Where a batch's images came from: chunk, row, and which of the row's captions are in the batch.
pub(crate) type Places = Vec<(u64, usize, Vec<bool>)>;

struct Job {
    batch: Batch,
    places: Places,
}

/// A batch that was scored.
pub(crate) struct Finished {
    pub(crate) batch: Batch,
    pub(crate) places: Places,
    pub(crate) scores: Result<Vec<PairScore>, capsieve_engine::Error>,
    pub(crate) seconds: f64,
}

/// What a scorer's thread gives back: a batch, or the panic that ended it.
type Ended = std::thread::Result<Finished>;

/// Scorers at work, each on a thread of its own.
pub(crate) struct Pool {
    info: Info,
    jobs: Option<Sender<Job>>,
    finished: Receiver<Ended>,
    threads: Vec<JoinHandle<()>>,
    /// Batches given and not yet taken back.
    pub(crate) under_way: usize,
}

impl Pool {
    /// Starts a thread for each scorer. The batch is as large as the smallest takes.
    pub(crate) fn new(scorers: Vec<Box<dyn Scorer>>) -> Self {
        let smallest = scorers.iter().min_by_key(|scorer| scorer.info().images_max).expect("at least one scorer");
        let info = smallest.info().clone();
        let (jobs, queue) = bounded(BATCHES_WAITING);
        // Bounded by the jobs: each gives one.
        let (done, finished) = unbounded();
        let start = |(i, scorer)| {
            let (queue, done) = (Receiver::clone(&queue), Sender::clone(&done));
            let thread = std::thread::Builder::new().name(format!("scorer-{i}"));
            thread.spawn(move || work(scorer, &queue, &done)).expect("a thread for each device")
        };
        let threads = scorers.into_iter().enumerate().map(start).collect();
        Self { info, jobs: Some(jobs), finished, threads, under_way: 0 }
    }

    pub(crate) fn info(&self) -> &Info {
        &self.info
    }

    /// Whether another batch would have to wait.
    pub(crate) fn full(&self) -> bool {
        self.under_way >= self.threads.len() + BATCHES_WAITING
    }

    /// Gives a batch to whichever scorer is free first; there is room unless the pool is full.
    pub(crate) fn submit(&mut self, batch: Batch, places: Places) {
        self.under_way += 1;
        let jobs = self.jobs.as_ref().expect("the pool is open until it is dropped");
        // Without a thread that listens there is a panic to take.
        let _ = jobs.send(Job { batch, places });
    }

    /// The next batch that is done, in any order. A scorer's panic is a bug and goes on as one.
    pub(crate) fn take(&mut self) -> Finished {
        let ended = self.finished.recv().expect("a thread gives back a batch or its panic");
        self.under_way -= 1;
        ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.jobs = None;
        // What was queued for a job that failed is not scored any more.
        while self.finished.try_recv().is_ok() {}
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Scores batches until there are none; brings the next one to the device while one is computed.
fn work(mut scorer: Box<dyn Scorer>, queue: &Receiver<Job>, done: &Sender<Ended>) {
    let mut waiting: Option<Job> = None;
    while let Some(job) = waiting.take().or_else(|| queue.recv().ok()) {
        waiting = queue.try_recv().ok();
        let next = waiting.as_ref().map(|next| &next.batch);
        let scored = catch_unwind(AssertUnwindSafe(|| score(scorer.as_mut(), job, next)));
        // After a panic the scorer is not used again.
        let ended = scored.is_err();
        if done.send(scored).is_err() || ended {
            return;
        }
    }
}

fn score(scorer: &mut dyn Scorer, Job { batch, places }: Job, next: Option<&Batch>) -> Finished {
    let (start, mut scores) = (Instant::now(), Vec::new());
    let scored = match next {
        Some(next) => scorer.score_ahead(&batch, next, &mut scores),
        None => scorer.score(&batch, &mut scores),
    };
    Finished { batch, places, scores: scored.map(|()| scores), seconds: start.elapsed().as_secs_f64() }
}
