//! Copies beside the steps under way. A thread hands their bytes to the card, through page-locked memory of its own: to copy them
//! there takes time that the engine's thread has not.

use std::mem;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::{self, JoinHandle};

use super::Memory;
use super::card::{Card, Lane};
use super::staging::{Event, Outgoing};
use crate::cuda::driver::{DriverError, Transfer};

/// The memory, and what is reached when all is there.
type Copied = Result<(Memory, Event), DriverError>;

struct Job {
    bytes: Vec<u8>,
    memory: Memory,
    copied: Sender<Copied>,
}

/// The thread, which ends with this.
#[derive(Debug)]
pub(super) struct Transfers {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Transfers {
    pub fn start(card: &Arc<Card>) -> Result<Self, DriverError> {
        let (jobs, asked) = channel::<Job>();
        let card = card.clone();
        let work = move || {
            // Taken with the first transfer: many servers have none.
            let mut outgoing = None;
            for Job { bytes, memory, copied } in asked {
                // Nobody to tell: it is not wanted any more.
                let _ = copied.send(fill(&card, &mut outgoing, &bytes, memory));
            }
        };
        let thread = thread::Builder::new().name("lorry-transfer".to_owned()).spawn(work);
        let thread = thread.map_err(|error| DriverError::Failed(format!("no thread for transfers: {error}")))?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread) })
    }

    /// Copies `bytes` to the memory, which holds as many.
    pub fn send(&self, bytes: Vec<u8>, memory: Memory) -> Sent {
        let (copied, receiver) = channel();
        if let Some(jobs) = &self.jobs {
            // If the thread has ended, the receiver says so.
            let _ = jobs.send(Job { bytes, memory, copied });
        }
        Sent(State::Waiting(receiver))
    }
}

impl Drop for Transfers {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // A panic on it has been reported where it happened.
            let _ = thread.join();
        }
    }
}

fn fill(card: &Arc<Card>, outgoing: &mut Option<Outgoing>, bytes: &[u8], memory: Memory) -> Copied {
    let outgoing = match outgoing {
        Some(outgoing) => outgoing,
        None => outgoing.insert(Outgoing::new(card, Lane::Transfer)?),
    };
    // SAFETY: within the memory (`part` checks), which waits for the card when it is dropped.
    unsafe { outgoing.write(memory.part(0, bytes.len()), bytes)? };
    Ok((memory, outgoing.mark()?))
}

/// A copy under way.
#[derive(Debug)]
pub struct Sent(State);

#[derive(Debug)]
enum State {
    /// For the thread.
    Waiting(Receiver<Copied>),
    /// For the card.
    Copied(Memory, Event),
    /// It has been handed over, or has failed.
    Over,
}

impl Transfer for Sent {
    type Memory = Memory;

    fn poll(&mut self) -> Result<Option<Memory>, DriverError> {
        if let State::Waiting(receiver) = &self.0 {
            match receiver.try_recv() {
                Err(TryRecvError::Empty) => return Ok(None),
                copied => {
                    self.0 = State::Over;
                    let ended = || Err(DriverError::Failed("the thread of transfers has ended".to_owned()));
                    let (memory, event) = copied.unwrap_or_else(|_| ended())?;
                    self.0 = State::Copied(memory, event);
                }
            }
        }
        match mem::replace(&mut self.0, State::Over) {
            State::Copied(memory, event) => {
                if event.is_reached()? {
                    return Ok(Some(memory));
                }
                self.0 = State::Copied(memory, event);
            }
            State::Waiting(_) | State::Over => {}
        }
        Ok(None)
    }
}
