//! Copies beside the steps under way. A thread hands their bytes to the card, through page-locked memory of its own: to copy them
//! there takes time that the engine's thread has not.

use std::mem;
use std::sync::Arc;

use super::Memory;
use super::card::{Card, Lane};
use super::staging::{Event, Outgoing};
use crate::cuda::driver::{DriverError, Transfer};
use crate::cuda::worker::{Pending, Worker};

/// The memory, and what is reached when all is there.
type Copied = (Memory, Event);

#[derive(Debug)]
pub(super) struct Transfers(Worker<(Vec<u8>, Memory), Copied>);

impl Transfers {
    pub fn start(card: &Arc<Card>) -> Self {
        let card = card.clone();
        // Taken with the first transfer: many servers have none.
        let mut outgoing = None;
        Self(Worker::start("lorry-transfer", move |(bytes, memory): (Vec<u8>, Memory)| {
            fill(&card, &mut outgoing, &bytes, memory)
        }))
    }

    /// Copies `bytes` to the memory, which holds as many.
    pub fn send(&self, bytes: Vec<u8>, memory: Memory) -> Sent {
        Sent(State::Waiting(self.0.ask((bytes, memory))))
    }
}

fn fill(
    card: &Arc<Card>,
    outgoing: &mut Option<Outgoing>,
    bytes: &[u8],
    memory: Memory,
) -> Result<Copied, DriverError> {
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
    Waiting(Pending<Copied>),
    /// For the card.
    Copied(Memory, Event),
    /// It has been handed over, or has failed.
    Over,
}

impl Transfer for Sent {
    type Memory = Memory;

    fn poll(&mut self) -> Result<Option<Memory>, DriverError> {
        if let State::Waiting(pending) = &self.0 {
            let Some(copied) = pending.poll() else { return Ok(None) };
            self.0 = State::Over;
            let (memory, event) = copied?;
            self.0 = State::Copied(memory, event);
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
