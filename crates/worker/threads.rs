//! The threads that prepare rows, shared by all jobs: whichever job has had the least of their time is served next, so that ten
//! small images do not wait for ten thousand large ones (fair queueing by time: Demers, Keshav and Shenker, 1989). A task that
//! was begun is finished; what nobody waits for any more is not begun.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

type Task = Box<dyn FnOnce() + Send>;

/// See the module.
pub(crate) struct Threads {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Tasks came, or the end.
    changed: Condvar,
    next_job: AtomicU64,
}

#[derive(Default)]
struct State {
    /// Jobs with waiting tasks.
    jobs: Vec<Waiting>,
    /// Nanoseconds that the job served last had had: a job that comes, or comes back, begins there.
    clock: u64,
    closed: bool,
}

struct Waiting {
    job: u64,
    spent: Arc<AtomicU64>,
    tasks: VecDeque<Task>,
}

/// A job's place among the others.
#[derive(Debug)]
pub(crate) struct Turn {
    job: u64,
    /// Nanoseconds of the threads that it has had, or would have had if it had come earlier.
    spent: Arc<AtomicU64>,
}

/// The result of a task to be, and how long the task took; an error if it panicked.
pub(crate) type Done<T> = oneshot::Receiver<(T, Duration)>;

impl Threads {
    /// Starts so many threads; 0: one per core.
    pub(crate) fn start(count: usize) -> std::io::Result<Self> {
        let count = if count == 0 { std::thread::available_parallelism().map_or(1, usize::from) } else { count };
        let shared = Arc::<Shared>::default();
        let mut threads = Self { shared: Arc::clone(&shared), threads: Vec::with_capacity(count) };
        for number in 0..count {
            let shared = Arc::clone(&shared);
            let thread = std::thread::Builder::new().name(format!("prepare-{number}"));
            threads.threads.push(thread.spawn(move || shared.work())?);
        }
        Ok(threads)
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.threads.len()
    }

    /// A job that will bring tasks.
    pub(crate) fn join(&self) -> Turn {
        Turn { job: self.shared.next_job.fetch_add(1, Ordering::Relaxed), spent: Arc::default() }
    }

    /// Queues tasks of a job, which are begun in their order.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        turn: &Turn,
        tasks: impl Iterator<Item = impl FnOnce() -> T + Send + 'static>,
    ) -> Vec<Done<T>> {
        let (tasks, done): (VecDeque<Task>, Vec<Done<T>>) = tasks.map(task).unzip();
        if !tasks.is_empty() {
            self.shared.lock().add(turn, tasks);
            self.shared.changed.notify_all();
        }
        done
    }
}

fn task<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> (Task, Done<T>) {
    let (done, result) = oneshot::channel();
    let task = move || {
        if done.is_closed() {
            return;
        }
        let start = Instant::now();
        let result = work();
        // Whoever waited may have gone meanwhile.
        drop(done.send((result, start.elapsed())));
    };
    (Box::new(task), result)
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic in here would be a bug of ours; what it left is still a queue.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut state = self.lock();
        loop {
            if let Some((task, spent)) = state.next() {
                drop(state);
                let start = Instant::now();
                // Whoever waits for it sees that it broke down.
                drop(catch_unwind(AssertUnwindSafe(task)));
                spent.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
                state = self.lock();
            } else if state.closed {
                return;
            } else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

impl State {
    fn add(&mut self, turn: &Turn, tasks: VecDeque<Task>) {
        if let Some(waiting) = self.jobs.iter_mut().find(|waiting| waiting.job == turn.job) {
            waiting.tasks.extend(tasks);
            return;
        }
        // Time that it did not ask for is not owed to it.
        turn.spent.fetch_max(self.clock, Ordering::Relaxed);
        self.jobs.push(Waiting { job: turn.job, spent: Arc::clone(&turn.spent), tasks });
    }

    /// A task of the job that has had the least.
    fn next(&mut self) -> Option<(Task, Arc<AtomicU64>)> {
        let spent = |waiting: &Waiting| waiting.spent.load(Ordering::Relaxed);
        let place = (0..self.jobs.len()).min_by_key(|place| spent(&self.jobs[*place]))?;
        self.clock = self.clock.max(spent(&self.jobs[place]));
        let waiting = &mut self.jobs[place];
        let (task, spent) = (waiting.tasks.pop_front()?, Arc::clone(&waiting.spent));
        if waiting.tasks.is_empty() {
            self.jobs.swap_remove(place);
        }
        Some((task, spent))
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closed = true;
        state.jobs.clear();
        drop(state);
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            // The last owner may be a task itself.
            if thread.thread().id() != std::thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use super::*;

    fn busy(milliseconds: u64) {
        std::thread::sleep(Duration::from_millis(milliseconds));
    }

    #[test]
    fn a_small_job_overtakes_a_large_one() {
        let threads = Threads::start(1).unwrap();
        let (large, small) = (threads.join(), threads.join());
        let begun = Arc::new(AtomicU64::new(0));
        let slow = (0..1000).map(|_| {
            let begun = Arc::clone(&begun);
            move || {
                begun.fetch_add(1, Ordering::SeqCst);
                busy(20);
            }
        });
        let mut slow = threads.run(&large, slow);
        slow.remove(2).blocking_recv().unwrap();
        let before = begun.load(Ordering::SeqCst);
        for done in threads.run(&small, (0..10).map(|_| || busy(1))) {
            done.blocking_recv().unwrap();
        }
        let after = begun.load(Ordering::SeqCst);
        assert!(after - before <= 3, "{} tasks of 20 ms while 10 of 1 ms waited", after - before);
        // What nobody waits for is not begun, though what comes behind it is.
        drop(slow);
        threads.run(&large, std::iter::once(|| ())).remove(0).blocking_recv().unwrap();
        assert!(begun.load(Ordering::SeqCst) <= after + 2);
    }

    #[test]
    fn who_comes_late_is_not_owed_the_time_before() {
        let turn = |job, spent| Turn { job, spent: Arc::new(AtomicU64::new(spent)) };
        let tasks = || (0..2).map(|_| Box::new(|| ()) as Task).collect();
        let (mut state, early, late) = (State::default(), turn(0, 1000), turn(1, 0));
        state.add(&early, tasks());
        assert!(state.next().is_some());
        state.add(&late, tasks());
        assert_eq!(late.spent.load(Ordering::Relaxed), 1000);
    }

    #[test]
    fn jobs_share_the_time_whatever_their_tasks_cost() {
        let threads = Threads::start(2).unwrap();
        let counts: Vec<_> = [1_u64, 4, 8]
            .into_iter()
            .map(|cost| {
                let (turn, count) = (threads.join(), Arc::new(AtomicU64::new(0)));
                let tasks = (0..10_000).map(|_| {
                    let count = Arc::clone(&count);
                    move || {
                        busy(cost);
                        count.fetch_add(cost, Ordering::SeqCst);
                    }
                });
                (threads.run(&turn, tasks), turn, count)
            })
            .collect();
        busy(600);
        let spent: Vec<u64> =
            counts.iter().map(|(_, turn, _)| turn.spent.load(Ordering::Relaxed) / 1_000_000).collect();
        let (least, most) = (*spent.iter().min().unwrap(), *spent.iter().max().unwrap());
        assert!(least > 100 && most - least <= 40, "{spent:?} ms");
    }

    #[test]
    fn a_task_that_panics_costs_its_result_and_no_thread() {
        let threads = Threads::start(1).unwrap();
        let turn = threads.join();
        let tasks = (0..3).map(|number| move || if number == 1 { panic!("on purpose") } else { number });
        let done: Vec<_> = threads.run(&turn, tasks).into_iter().map(|done| done.blocking_recv().ok()).collect();
        assert_eq!(done.iter().map(|done| done.map(|(n, _)| n)).collect::<Vec<_>>(), [Some(0), None, Some(2)]);
    }
}
