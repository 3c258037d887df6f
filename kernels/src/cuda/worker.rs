//! A thread for what takes too long for the engine's. It does one job after another, and who asked looks now and then whether
//! theirs is done.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::{self, JoinHandle};

use super::driver::DriverError;

/// The thread. When this is dropped, it ends after the jobs it was given.
#[derive(Debug)]
pub(super) struct Worker<J, R> {
    name: &'static str,
    jobs: Option<Sender<(J, Sender<Outcome<R>>)>>,
    thread: Option<JoinHandle<()>>,
}

type Outcome<R> = Result<R, DriverError>;

impl<J: Send + 'static, R: Send + 'static> Worker<J, R> {
    /// A job that panics fails alone.
    pub fn start(name: &'static str, mut work: impl FnMut(J) -> Outcome<R> + Send + 'static) -> Self {
        let (jobs, asked) = channel::<(J, Sender<Outcome<R>>)>();
        let run = move || {
            for (job, done) in asked {
                let outcome = catch_unwind(AssertUnwindSafe(|| work(job))).unwrap_or_else(|panic| {
                    Err(DriverError::Failed(format!("a panic on thread {name}: {}", message(&*panic))))
                });
                // Nobody to tell: it is not wanted any more.
                let _ = done.send(outcome);
            }
        };
        // Without the thread nobody receives jobs, which whoever asks is told.
        let thread = thread::Builder::new().name(name.to_owned()).spawn(run).ok();
        Self { name, jobs: Some(jobs), thread }
    }

    pub fn ask(&self, job: J) -> Pending<R> {
        let (done, outcome) = channel();
        if let Some(jobs) = &self.jobs {
            // If there is no thread, the job goes, and with it the sender of its outcome.
            let _ = jobs.send((job, done));
        }
        Pending { worker: self.name, outcome }
    }
}

impl<J, R> Drop for Worker<J, R> {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // Its panics are caught.
            let _ = thread.join();
        }
    }
}

/// A job asked for.
#[derive(Debug)]
pub(super) struct Pending<R> {
    worker: &'static str,
    outcome: Receiver<Outcome<R>>,
}

impl<R> Pending<R> {
    /// What came of it, once, when it is done.
    ///
    /// # Errors
    /// When it failed or panicked, or there is no thread.
    pub fn poll(&self) -> Option<Outcome<R>> {
        match self.outcome.try_recv() {
            Ok(outcome) => Some(outcome),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => {
                Some(Err(DriverError::Failed(format!("there is no thread {}", self.worker))))
            }
        }
    }
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome<R>(pending: &Pending<R>) -> Result<R, String> {
        loop {
            match pending.poll() {
                Some(outcome) => return outcome.map_err(|error| error.to_string()),
                None => thread::yield_now(),
            }
        }
    }

    fn half(number: u32) -> Outcome<u32> {
        assert_ne!(number, 7, "an unlucky number");
        if number.is_multiple_of(2) { Ok(number / 2) } else { Err(DriverError::Failed(format!("{number} is odd"))) }
    }

    #[test]
    fn a_job_that_fails_or_panics_says_so_and_the_next_one_is_done() {
        let worker = Worker::start("halves", half);
        let [even, odd, unlucky, last] = [4, 5, 7, 8].map(|number| worker.ask(number));
        assert_eq!((outcome(&even), outcome(&odd)), (Ok(2), Err("5 is odd".to_owned())));
        let panic = outcome(&unlucky).unwrap_err();
        assert!(panic.starts_with("a panic on thread halves: ") && panic.contains("an unlucky number"), "{panic}");
        assert_eq!(outcome(&last), Ok(4));
    }

    #[test]
    fn what_was_asked_for_is_done_before_the_thread_ends() {
        let worker = Worker::start("halves", half);
        let pending = [2, 4, 6].map(|number| worker.ask(number));
        drop(worker);
        assert_eq!(pending.map(|pending| pending.poll()), [Some(Ok(1)), Some(Ok(2)), Some(Ok(3))]);
    }

    #[test]
    fn a_job_without_a_thread_fails() {
        // As if the system gave none: nobody receives.
        let (jobs, _) = channel::<(u32, Sender<Outcome<u32>>)>();
        let worker = Worker { name: "halves", jobs: Some(jobs), thread: None };
        assert_eq!(outcome(&worker.ask(2)), Err("there is no thread halves".to_owned()));
    }
}
