//! A pool of compute threads for short parallel regions.
//!
//! A step of the model is some hundred regions of 20 to 500 µs. A worker therefore spins for a moment before it parks, and
//! the caller never waits for a worker that has not claimed a task: on a busy machine a late worker costs nothing.

use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle, Thread};

/// Polls of an idle worker before it parks: some tens of microseconds.
const SPINS_BEFORE_PARK: u32 = 4_000;

/// The most tasks one region can have: the width of the two counters in a [`Ticket`].
pub const MAX_TASKS: usize = (1 << 20) - 1;

/// Region number, number of tasks and next task, in one atomic word: who claims a task also knows its region is alive,
/// because the region cannot end before the claimed task is done.
#[derive(Clone, Copy)]
struct Ticket(u64);

impl Ticket {
    fn new(region: u64, num_tasks: usize) -> Self {
        Self(region << 40 | (num_tasks as u64) << 20)
    }
    fn region(self) -> u64 {
        self.0 >> 40
    }
    fn num_tasks(self) -> usize {
        (self.0 >> 20) as usize & MAX_TASKS
    }
    fn next_task(self) -> usize {
        self.0 as usize & MAX_TASKS
    }
    fn has_task(self) -> bool {
        self.next_task() < self.num_tasks()
    }
}

type Task = dyn Fn(usize) + Sync;

struct Shared {
    ticket: AtomicU64,
    completed: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
    num_parked: AtomicUsize,
    /// The running region's closure. Written by the caller before it publishes a ticket, read after claiming a task.
    task: UnsafeCell<*const Task>,
}

// SAFETY: `task` is the only field that is not `Sync`/`Send` by itself. It is written only between regions, published by a
// release store of `ticket`, and read only after an acquire on `ticket` that claimed a task of that region.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer is dereferenced only while the region that owns it runs.
unsafe impl Send for Shared {}

impl Shared {
    /// Runs tasks of the current region until none is left.
    fn work(&self) {
        loop {
            let ticket = Ticket(self.ticket.fetch_add(1, Ordering::Acquire));
            if !ticket.has_task() {
                // Undo nothing: the counter of a finished region is overwritten by the next one.
                return;
            }
            // SAFETY: a task of this region was claimed, so `run` has not returned and the closure is alive.
            let task = unsafe { &**self.task.get() };
            if catch_unwind(AssertUnwindSafe(|| task(ticket.next_task()))).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.completed.fetch_add(1, Ordering::Release);
        }
    }

    fn worker_loop(&self) {
        let mut seen = 0;
        while !self.stop.load(Ordering::Acquire) {
            let mut spins = 0;
            loop {
                let ticket = Ticket(self.ticket.load(Ordering::Acquire));
                if ticket.region() != seen && ticket.has_task() {
                    seen = ticket.region();
                    break;
                }
                if self.stop.load(Ordering::Acquire) {
                    return;
                }
                spins += 1;
                if spins < SPINS_BEFORE_PARK {
                    std::hint::spin_loop();
                } else {
                    self.num_parked.fetch_add(1, Ordering::SeqCst);
                    let ticket = Ticket(self.ticket.load(Ordering::SeqCst));
                    let nothing_new = ticket.region() == seen || !ticket.has_task();
                    if nothing_new && !self.stop.load(Ordering::SeqCst) {
                        thread::park();
                    }
                    self.num_parked.fetch_sub(1, Ordering::SeqCst);
                    spins = 0;
                }
            }
            self.work();
        }
    }
}

/// Threads of our own for the kernels. The thread that calls [`ThreadPool::run`] works too.
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    threads: Vec<Thread>,
    /// `run` must not be entered twice at once: `Cell` makes the pool `!Sync`, so one thread owns it.
    _not_sync: PhantomData<std::cell::Cell<()>>,
}

impl std::fmt::Debug for ThreadPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ThreadPool").field("num_threads", &self.num_threads()).finish()
    }
}

impl ThreadPool {
    /// `num_threads` counts the calling thread, so `num_threads - 1` workers are started.
    pub fn new(num_threads: usize) -> Self {
        let shared = Arc::new(Shared {
            ticket: AtomicU64::new(0),
            completed: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            num_parked: AtomicUsize::new(0),
            task: UnsafeCell::new(&noop as *const Task),
        });
        let workers: Vec<_> = (1..num_threads.max(1))
            .filter_map(|index| {
                let shared = Arc::clone(&shared);
                // A worker that cannot be started is missed only in speed: the caller runs every task nobody claims.
                thread::Builder::new().name(format!("lorry-kernel-{index}")).spawn(move || shared.worker_loop()).ok()
            })
            .collect();
        let threads = workers.iter().map(|w| w.thread().clone()).collect();
        Self { shared, workers, threads, _not_sync: PhantomData }
    }

    pub fn num_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(i)` once for each `i` in `0..num_tasks`, in any order and on any thread, and returns when all are done.
    ///
    /// # Panics
    /// When a task panicked, or `num_tasks` is over [`MAX_TASKS`].
    pub fn run(&self, num_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        assert!(num_tasks <= MAX_TASKS, "{num_tasks} tasks in one region");
        if num_tasks <= 1 || self.workers.is_empty() {
            (0..num_tasks).for_each(task);
            return;
        }
        let shared = &*self.shared;
        let region = Ticket(shared.ticket.load(Ordering::Relaxed)).region().wrapping_add(1) & ((1 << 24) - 1);
        shared.completed.store(0, Ordering::Relaxed);
        // SAFETY: no region is running (`&self` is not shared between threads and `run` returns only when all claimed tasks
        // are done), so nobody reads `task` now. The lifetime is erased for the time of this call only.
        unsafe { *shared.task.get() = std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const Task>(task) };
        shared.ticket.store(Ticket::new(region, num_tasks).0, Ordering::SeqCst);
        if shared.num_parked.load(Ordering::SeqCst) > 0 {
            self.threads.iter().for_each(Thread::unpark);
        }
        shared.work();
        let mut spins = 0_u32;
        while shared.completed.load(Ordering::Acquire) < num_tasks {
            spins += 1;
            if spins < SPINS_BEFORE_PARK {
                std::hint::spin_loop();
            } else {
                // A worker was descheduled in the middle of its task: let it have this core.
                thread::yield_now();
            }
        }
        if shared.panicked.swap(false, Ordering::Relaxed) {
            panic!("a kernel task panicked");
        }
    }
}

fn noop(_: usize) {}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.threads.iter().for_each(Thread::unpark);
        for worker in self.workers.drain(..) {
            // A worker catches its tasks' panics, so there is nothing to report here.
            let _ = worker.join();
        }
    }
}

/// A slice that tasks of one region write to at places that do not overlap.
pub(crate) struct DisjointMut<'a, T> {
    start: *mut T,
    len: usize,
    _slice: PhantomData<&'a mut [T]>,
}

// SAFETY: access goes through `slice`, whose callers promise that no two live ranges overlap.
unsafe impl<T: Send> Sync for DisjointMut<'_, T> {}

impl<'a, T> DisjointMut<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), _slice: PhantomData }
    }

    /// # Safety
    /// No other range taken from `self` and still in use may overlap this one.
    #[allow(clippy::mut_from_ref)] // that is this type's purpose
    pub(crate) unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start.checked_add(len).is_some_and(|end| end <= self.len), "range outside the slice");
        // SAFETY: within bounds (checked above) and not aliased (the caller's promise).
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_exactly_once() {
        let pool = ThreadPool::new(4);
        for num_tasks in [0, 1, 2, 3, 100, 5000] {
            let counts: Vec<AtomicUsize> = (0..num_tasks).map(|_| AtomicUsize::new(0)).collect();
            for round in 1..20 {
                pool.run(num_tasks, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == round));
            }
        }
    }

    #[test]
    fn workers_wake_after_parking() {
        let pool = ThreadPool::new(2);
        for _ in 0..20 {
            thread::sleep(std::time::Duration::from_millis(2));
            let sum = AtomicUsize::new(0);
            pool.run(64, &|i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            assert_eq!(sum.load(Ordering::Relaxed), 64 * 63 / 2);
        }
    }

    #[test]
    fn a_panicking_task_panics_the_caller_and_leaves_the_pool_usable() {
        let pool = ThreadPool::new(3);
        let outcome = catch_unwind(AssertUnwindSafe(|| pool.run(8, &|i| assert_ne!(i, 5))));
        assert!(outcome.is_err());
        let sum = AtomicUsize::new(0);
        pool.run(8, &|i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.load(Ordering::Relaxed), 28);
    }
}
