//! The adapters on the device: a tier above the host's memory, of a fixed number of bytes.
//!
//! An adapter comes when a sequence wants it: a thread lays it out, its bytes go to the device beside the steps under way, and
//! the sequence runs once they are there. The one used longest ago goes when there is no room, but none that a lease holds.
//!
//! Who asks for one before a step (`place`) has only the books looked into, which say what goes. The driver is called while the
//! step runs (`bring`): to take memory and to give it back takes time, and may wait for the card.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::mem;
use std::sync::{Arc, Weak};
use std::time::Instant;

use crate::canonical::AdapterWeights;
use crate::device::{AdapterTier, DeviceError, Lease, Placement};
use crate::low_rank::LowRank;

use super::adapter_layout::{AdapterBytes, AdapterLayout};
use super::driver::{DeviceMemory, Driver, DriverError, Transfer};
use super::step_data::Needs;
use super::worker::{Pending, Worker};

pub(super) struct Adapters<D: Driver> {
    /// Blocks of the decoder, and the linear layers of each.
    sites: (usize, usize),
    budget: usize,
    used: usize,
    entries: HashMap<String, Entry<D>>,
    /// Counts the uses: the smaller, the longer ago.
    clock: u64,
    layouts: Worker<(Arc<AdapterWeights>, (usize, usize)), AdapterBytes>,
    /// By generation, in the order they were asked for, which is that of the thread.
    laid_out: VecDeque<(String, Pending<AdapterBytes>)>,
    /// Of adapters that have gone; given back before memory is taken.
    evicted: Vec<D::Memory>,
    loads: u64,
    evictions: u64,
    transfer_seconds: f64,
}

/// What a step needs to know of an adapter.
#[derive(Debug, Clone, Copy)]
pub(super) struct Placed {
    /// Of its table.
    pub address: u64,
    pub needs: Needs,
    /// The greatest rank of its pairs.
    pub max_rank: usize,
}

struct Entry<D: Driver> {
    state: State<D>,
    needs: Needs,
    max_rank: usize,
    bytes: usize,
    is_pinned: bool,
    lease: Lease,
    last_used: u64,
    /// Of the host's adapter: when that has gone, nobody will ask for this one again.
    weights: Weak<AdapterWeights>,
}

enum State<D: Driver> {
    /// Its bytes are being laid out.
    LaidOut,
    Sent {
        transfer: D::Transfer,
        since: Instant,
    },
    Ready(D::Memory),
    /// Told to whoever asks next.
    Failed(DriverError),
}

impl<D: Driver> fmt::Debug for Adapters<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Adapters").field("used", &self.used).field("budget", &self.budget).finish_non_exhaustive()
    }
}

impl<D: Driver> Adapters<D> {
    /// For a decoder of `sites.0` blocks of `sites.1` linear layers; `budget` in bytes.
    pub fn new(sites: (usize, usize), budget: usize) -> Self {
        Self {
            sites,
            budget,
            used: 0,
            entries: HashMap::new(),
            clock: 0,
            layouts: Worker::start(
                "lorry-device-adapters",
                |(weights, sites): (Arc<AdapterWeights>, (usize, usize))| {
                    Ok(AdapterLayout::of(&weights, sites).into_bytes())
                },
            ),
            laid_out: VecDeque::new(),
            evicted: Vec::new(),
            loads: 0,
            evictions: 0,
            transfer_seconds: 0.0,
        }
    }

    pub fn tier(&self) -> AdapterTier {
        let is_ready = |entry: &&Entry<D>| matches!(entry.state, State::Ready(_));
        AdapterTier {
            resident: self.entries.values().filter(is_ready).count(),
            resident_bytes: self.used,
            loads: self.loads,
            evictions: self.evictions,
            transfer_seconds: self.transfer_seconds,
        }
    }

    /// An adapter that rows may run with.
    ///
    /// # Errors
    /// When it has not been placed.
    pub fn placed(&self, generation: &str) -> Result<Placed, DeviceError> {
        match self.entries.get(generation) {
            Some(Entry { state: State::Ready(memory), needs, max_rank, .. }) => {
                Ok(Placed { address: memory.address(), needs: *needs, max_rank: *max_rank })
            }
            _ => Err(DeviceError::NotPlaced(generation.to_owned())),
        }
    }

    /// As [`crate::device::Device::place`].
    pub fn place(
        &mut self,
        generation: &str,
        weights: &Arc<AdapterWeights>,
        is_pinned: bool,
    ) -> Result<Placement, DeviceError> {
        self.clock += 1;
        if let Some(entry) = self.entries.get_mut(generation) {
            (entry.last_used, entry.is_pinned) = (self.clock, is_pinned);
            let lease = entry.lease.clone();
            match &entry.state {
                State::Ready(_) => return Ok(Placement::Ready(lease)),
                State::LaidOut | State::Sent { .. } => return Ok(Placement::Loading(lease)),
                State::Failed(error) => {
                    let error = error.clone();
                    self.entries.remove(generation);
                    return Err(error.into());
                }
            }
        }
        let bytes = AdapterLayout::of(weights, self.sites).len();
        if bytes > self.budget {
            return Err(DeviceError::AdapterTooLarge { wanted: bytes, budget: self.budget });
        }
        if !self.make_room(bytes) {
            return Ok(Placement::Full);
        }
        let pending = self.layouts.ask((weights.clone(), self.sites));
        self.laid_out.push_back((generation.to_owned(), pending));
        self.used += bytes;
        let sites = || weights.sites().chain(weights.head_delta());
        let needs = Needs {
            has_adapters: true,
            scales_inputs: sites().any(|site| site.input_scale.is_some()),
            replaces_head: weights.head.is_some() && weights.head_delta().is_none(),
        };
        let max_rank = sites().filter_map(|site| site.low_rank.as_ref().map(LowRank::rank)).max().unwrap_or(0);
        let (lease, last_used, weights) = (Lease::default(), self.clock, Arc::downgrade(weights));
        let placement = Placement::Loading(lease.clone());
        let entry = Entry { state: State::LaidOut, needs, max_rank, bytes, is_pinned, lease, last_used, weights };
        self.entries.insert(generation.to_owned(), entry);
        Ok(placement)
    }

    /// As [`crate::device::Device::bring_adapters`]. What fails concerns those alone who want that adapter.
    pub fn bring(&mut self, driver: &D) -> bool {
        self.evicted.clear();
        let mut has_news = false;
        while let Some(bytes) = self.laid_out.front().and_then(|(_, pending)| pending.poll()) {
            let Some((generation, _)) = self.laid_out.pop_front() else { break };
            let state = match bytes.and_then(|bytes| self.send(driver, bytes)) {
                Ok(transfer) => State::Sent { transfer, since: Instant::now() },
                Err(error) => State::Failed(error),
            };
            has_news |= matches!(state, State::Failed(_));
            if let Some(entry) = self.entries.get_mut(&generation) {
                entry.state = state;
            }
        }
        for entry in self.entries.values_mut() {
            if let State::Sent { transfer, since } = &mut entry.state
                && let Some(arrived) = transfer.poll().transpose()
            {
                has_news = true;
                entry.state = match arrived {
                    Ok(memory) => {
                        self.transfer_seconds += since.elapsed().as_secs_f64();
                        self.loads += 1;
                        State::Ready(memory)
                    }
                    Err(error) => State::Failed(error),
                };
            }
            if matches!(entry.state, State::Failed(_)) {
                self.used -= mem::take(&mut entry.bytes);
            }
        }
        // Nobody will ask what became of these.
        self.entries.retain(|_, entry| !matches!(entry.state, State::Failed(_)) || entry.weights.strong_count() > 0);
        has_news
    }

    /// Sends the bytes, after making room if the device has less than the budget promises.
    fn send(&mut self, driver: &D, bytes: AdapterBytes) -> Result<D::Transfer, DriverError> {
        let memory = loop {
            match driver.allocate_unset(bytes.len()) {
                Err(DriverError::OutOfMemory { .. }) if self.evict_one() => self.evicted.clear(),
                other => break other?,
            }
        };
        driver.send(bytes.relocate(memory.0.address()), memory)
    }

    /// Whether `bytes` more fit, after what had to go.
    fn make_room(&mut self, bytes: usize) -> bool {
        while self.used + bytes > self.budget {
            if !self.evict_one() {
                return false;
            }
        }
        true
    }

    /// Lets go what nobody can ask for any more, or else what was used longest ago, the pinned last; false when all are held or
    /// under way.
    fn evict_one(&mut self) -> bool {
        let idle = self
            .entries
            .iter()
            .filter(|(_, entry)| matches!(entry.state, State::Ready(_)) && Arc::strong_count(&entry.lease.0) == 1);
        let victim = idle.min_by_key(|(_, entry)| (entry.weights.strong_count() > 0, entry.is_pinned, entry.last_used));
        let Some(victim) = victim.map(|(generation, _)| generation.clone()) else { return false };
        let Some(entry) = self.entries.remove(&victim) else { return false };
        self.used -= entry.bytes;
        self.evictions += 1;
        if let State::Ready(memory) = entry.state {
            self.evicted.push(memory);
        }
        true
    }
}
