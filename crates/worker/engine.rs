//! Which devices compute, and batches to them: one scorer and one thread a device, one queue for all.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use capsieve_engine::{Batch, Config, Device, Heads, ItmToken, Options, Precision, Scorer};
use crossbeam_channel::{Receiver, Sender, unbounded};

use crate::budget::Budget;
use crate::limits::BATCH_TOKENS;
use crate::pipeline::stage;
use crate::queue::{Job, Queue};
use crate::{Error, Result};

/// Images of a batch where the user does not say: enough rows that every product runs at full speed and the weights are
/// read once for several images; more only takes memory (some 40 kB a token row of the large model).
const IMAGES_LARGE: usize = 8;
const IMAGES_SMALL: usize = 32;
/// Images of a batch on a card: 58 images of 577 tokens fill the 132 multiprocessors of an H100 to 99 % with tiles of
/// 128 x 256; 64 would leave a last wave nearly empty.
const IMAGES_CARD: usize = 58;
/// Caption tokens of a text pass on a card: all captions of a batch in one.
const TOKENS_CARD: usize = BATCH_TOKENS;
/// Width from which a model counts as large.
const LARGE_FROM: usize = 512;

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
    /// Images fetched at a time from one web server or bucket; 0: [`crate::limits::FETCHES_PER_HOST`].
    pub fetches_per_host: usize,
}

/// Devices that are there, and their arithmetic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Engines {
    /// At least one.
    pub devices: Vec<Device>,
    /// Of all of them.
    pub precision: Precision,
}

impl Engines {
    /// Whether batches are brought to the device while another one is computed.
    pub(crate) fn ahead(&self) -> bool {
        self.devices != [Device::Cpu]
    }
}

impl EngineChoice {
    /// Looks what is there.
    ///
    /// # Errors
    /// A card that was asked for cannot be used, or the device does not have this precision.
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
        let (device, has): (_, &[Precision]) = match devices[0] {
            Device::Cpu => ("cpu", &[Precision::F32, Precision::Bf16, Precision::Int8]),
            Device::Cuda(_) => ("cuda", &[Precision::F16, Precision::Bf16, Precision::Tf32, Precision::F32]),
        };
        if !has.contains(&precision) {
            let has = has.iter().map(|precision| precision.name()).collect::<Vec<_>>().join(", ");
            return Err(Error::DevicePrecision { precision: precision.name(), device, has });
        }
        Ok(Engines { devices, precision })
    }
}

/// The engine's options for a model of this shape on the first of these devices.
pub fn engine_options(
    config: &Config,
    choice: &EngineChoice,
    engines: &Engines,
    heads: Heads,
    itm_token: ItmToken,
) -> Options {
    let EngineChoice { batch_size, threads, .. } = *choice;
    let (device, precision) = (engines.devices[0], engines.precision);
    let (images, tokens_max) = match device {
        Device::Cuda(_) => (IMAGES_CARD, TOKENS_CARD),
        Device::Cpu if config.vision.hidden >= LARGE_FROM => (IMAGES_LARGE, config.text.positions),
        Device::Cpu => (IMAGES_SMALL, config.text.positions),
    };
    let images_max = if batch_size == 0 { images } else { batch_size };
    Options { device, precision, threads, images_max, tokens_max, heads, itm_token }
}

/// Engines at work behind a [`Queue`], each on a thread of its own, and one thread that fills their batches.
pub(crate) struct Pool {
    queue: Arc<Queue>,
    /// The largest batch is as large as the smallest engine takes.
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// Starts the threads. `latency` is how long a row waits for others to share its batch with; none: until the batch is full
    /// or its call is in a hurry. `memory` is what the rows hold: where it is short none waits for others. `ahead`: the engines
    /// bring the next batch to their device while they compute one.
    pub(crate) fn start(
        scorers: Vec<Box<dyn Scorer>>,
        latency: Option<Duration>,
        memory: &Budget,
        ahead: bool,
    ) -> Self {
        let smallest = scorers.iter().min_by_key(|scorer| scorer.info().images_max).expect("at least one scorer");
        let queue = Arc::new(Queue::new(smallest.info().clone(), latency, memory.clone()));
        // Both bounded by what engines want: a batch or two for each.
        let ((to_engines, jobs), (give_back, spare)) = (unbounded(), unbounded());
        let mut threads: Vec<_> = scorers
            .into_iter()
            .enumerate()
            .map(|(i, scorer)| {
                let (queue, jobs, give_back) = (Arc::clone(&queue), Receiver::clone(&jobs), Sender::clone(&give_back));
                spawn(format!("engine-{i}"), move || work(scorer, &queue, &jobs, &give_back, ahead))
            })
            .collect();
        let of_batches = Arc::clone(&queue);
        threads.push(spawn("batches".to_owned(), move || fill(&of_batches, &to_engines, &spare)));
        Self { queue, threads }
    }

    pub(crate) fn queue(&self) -> &Arc<Queue> {
        &self.queue
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.queue.close(false);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn spawn(name: String, work: impl FnOnce() + Send + 'static) -> JoinHandle<()> {
    std::thread::Builder::new().name(name).spawn(work).expect("a thread for each device")
}

/// Fills batches whenever an engine wants one.
fn fill(queue: &Queue, to_engines: &Sender<Job>, spare: &Receiver<Batch>) {
    loop {
        let empty = spare.try_recv().unwrap_or_else(|_| Batch::new(queue.info().config.vision.image_size));
        let Some(job) = queue.next_batch(empty) else { return };
        if to_engines.send(job).is_err() {
            return;
        }
    }
}

/// Scores batches until there are none. With `ahead` the next one is on its way to the device while one is computed, and
/// the one after that is being filled.
fn work(mut scorer: Box<dyn Scorer>, queue: &Queue, jobs: &Receiver<Job>, give_back: &Sender<Batch>, ahead: bool) {
    let mut waiting: Option<Job> = None;
    queue.want(1 + usize::from(ahead));
    while let Some(job) = waiting.take().or_else(|| jobs.recv().ok()) {
        if ahead {
            waiting = jobs.try_recv().ok();
            queue.want(1);
        }
        let next = waiting.as_ref().map(|next| &next.batch);
        let usable = catch_unwind(AssertUnwindSafe(|| score(scorer.as_mut(), job, next)));
        let Ok((batch, true)) = usable else {
            // A panic is a bug, a lost card a fact: either way this engine scores no more.
            queue.close(true);
            return;
        };
        drop(give_back.send(batch));
        if !ahead {
            queue.want(1);
        }
    }
}

/// Scores a batch; gives back its memory and whether the engine can go on.
fn score(scorer: &mut dyn Scorer, job: Job, next: Option<&Batch>) -> (Batch, bool) {
    if job.in_vain() {
        return (job.batch, true);
    }
    let (start, mut scores) = (Instant::now(), Vec::new());
    let scored = match next {
        Some(next) => scorer.score_ahead(&job.batch, next, &mut scores),
        None => scorer.score(&job.batch, &mut scores),
    };
    metrics::histogram!("capsieve_batch_pairs").record(job.batch.captions() as f64);
    stage("engine", start.elapsed().as_secs_f64());
    let lost = matches!(scored, Err(capsieve_engine::Error::Card { .. }));
    (job.deliver(scored.map(|()| scores), start.elapsed()), !lost)
}
