//! One server: its queue, its memory for adapters, and its engine.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lorry::adapter::canonical::Adapter;
use lorry::adapter::residency::{ItemId, Reservation, Residency, Urgency};
use lorry::engine::EngineConfig;
use lorry::engine::request::PromptOutput;
use lorry::engine::sequence::{Sequence, SequenceId};

use crate::cost::Cost;
use crate::machine::Machine;
use crate::trace::Arrival;

/// What all replicas have alike.
#[derive(Debug)]
pub struct Hardware {
    pub engine: EngineConfig,
    pub cost: Cost,
    pub num_blocks: usize,
    pub adapter_bytes: u64,
    pub adapters_budget_bytes: u64,
    pub min_residency: Duration,
    pub max_wait: Duration,
    /// Seconds to load an adapter.
    pub load_seconds: f64,
}

/// An adapter of which only the name matters.
pub fn adapter(name: &str) -> Arc<Adapter> {
    Arc::new(Adapter { name: name.to_owned(), generation: name.to_owned(), ..Adapter::default() })
}

/// What became of a request.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    pub refused: Option<Refusal>,
    pub is_cold: bool,
    /// Seconds since the beginning.
    pub first_token: f64,
    pub end: f64,
    /// Seconds without a token after the first.
    pub longest_gap: f64,
    pub num_tokens: usize,
    pub num_cached_tokens: usize,
}

impl Outcome {
    /// A token is seen, or several that come together.
    pub fn see_token(&mut self, now: f64) {
        if self.end == 0.0 {
            self.first_token = now;
        } else {
            self.longest_gap = self.longest_gap.max(now - self.end);
        }
        self.end = now;
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Every place in the queue is taken.
    Overloaded,
    /// No memory became free for its adapter.
    OutOfMemory,
    /// The prompt leaves no room in the context.
    TooLong,
}

/// What happens at a replica at some time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Happening {
    Step,
    Load,
}

/// Sums over a run.
#[derive(Debug, Clone, Copy, Default)]
pub struct Totals {
    pub num_steps: usize,
    pub num_rows: f64,
    pub busy_seconds: f64,
    pub num_loads: usize,
    pub num_evictions: usize,
    pub num_preempted: usize,
    /// Of this machine, for planning steps.
    pub planning: Duration,
}

impl Totals {
    pub fn add(&mut self, other: &Self) {
        self.num_steps += other.num_steps;
        self.num_rows += other.num_rows;
        self.busy_seconds += other.busy_seconds;
        self.num_loads += other.num_loads;
        self.num_evictions += other.num_evictions;
        self.num_preempted += other.num_preempted;
        self.planning += other.planning;
    }
}

struct Load {
    adapter: usize,
    since: f64,
    /// Requests.
    waiters: Vec<usize>,
}

/// A request in the engine.
struct Running {
    request: usize,
    item: Option<ItemId>,
    is_planned: bool,
}

pub struct Replica {
    machine: Machine,
    residency: Residency,
    /// By adapter.
    resident: HashMap<usize, ItemId>,
    adapter_of: HashMap<ItemId, usize>,
    /// Leases.
    held: HashMap<ItemId, usize>,
    loads: VecDeque<Load>,
    /// One at a time, as the folder's thread does it.
    loading: Option<(Load, ItemId)>,
    num_items: u64,
    /// What came while a step was under way.
    incoming: Vec<(usize, Option<ItemId>)>,
    running: HashMap<SequenceId, Running>,
    num_sequences: u64,
    num_in_flight: usize,
    is_stepping: bool,
    pub totals: Totals,
}

/// What a replica does not know itself.
pub struct World<'a> {
    pub hardware: &'a Hardware,
    pub arrivals: &'a [Arrival],
    /// Of each arrival.
    pub adapter_of: &'a [Option<usize>],
    pub adapters: &'a [Arc<Adapter>],
    pub outcomes: &'a mut [Outcome],
}

impl World<'_> {
    /// What a server makes of a request's length: cut to what the context leaves.
    fn max_tokens(&self, request: usize) -> usize {
        let Arrival { prompt_tokens, max_tokens, .. } = self.arrivals[request];
        max_tokens.min(self.hardware.engine.context_length.saturating_sub(prompt_tokens))
    }
}

impl Replica {
    pub fn new(hardware: &Hardware) -> Self {
        Self {
            machine: Machine::new(&hardware.engine, hardware.num_blocks),
            residency: Residency::new(hardware.adapters_budget_bytes, hardware.min_residency),
            resident: HashMap::new(),
            adapter_of: HashMap::new(),
            held: HashMap::new(),
            loads: VecDeque::new(),
            loading: None,
            num_items: 0,
            incoming: Vec::new(),
            running: HashMap::new(),
            num_sequences: 0,
            num_in_flight: 0,
            is_stepping: false,
            totals: Totals::default(),
        }
    }

    /// Loads adapters before the first request, as far as there is room.
    pub fn fill(&mut self, adapters: &[usize], hardware: &Hardware) {
        for &adapter in adapters {
            let (item, bytes) = (ItemId(self.num_items), hardware.adapter_bytes);
            let reserved = self.residency.reserve(item, bytes, Urgency::Fill, Duration::ZERO, |_| false);
            if !matches!(reserved, Reservation::Granted { .. }) {
                return;
            }
            self.num_items += 1;
            self.keep(adapter, item, 0.0, hardware);
        }
    }

    /// A load has ended.
    fn keep(&mut self, adapter: usize, item: ItemId, now: f64, hardware: &Hardware) {
        self.residency.commit(item, hardware.adapter_bytes, false, Duration::from_secs_f64(now));
        self.resident.insert(adapter, item);
        self.adapter_of.insert(item, adapter);
    }

    /// Requests accepted and not ended.
    pub fn num_in_flight(&self) -> usize {
        self.num_in_flight
    }

    /// Whether nothing is left of all requests.
    pub fn is_clean(&self) -> bool {
        let scheduler = self.machine.scheduler();
        scheduler.is_empty() && scheduler.blocks_used() == 0 && self.held.is_empty() && self.num_in_flight == 0
    }

    pub fn arrive(&mut self, now: f64, request: usize, world: &mut World<'_>) {
        if world.max_tokens(request) == 0 {
            return refuse(request, Refusal::TooLong, world);
        }
        if self.num_in_flight >= world.hardware.engine.max_queued {
            return refuse(request, Refusal::Overloaded, world);
        }
        self.num_in_flight += 1;
        let Some(adapter) = world.adapter_of[request] else { return self.incoming.push((request, None)) };
        if let Some(&item) = self.resident.get(&adapter) {
            self.residency.touch(item, Duration::from_secs_f64(now));
            return self.admit(request, item);
        }
        world.outcomes[request].is_cold = true;
        let known = self.loading.as_mut().map(|(load, _)| load).into_iter().chain(&mut self.loads);
        match known.into_iter().find(|load| load.adapter == adapter) {
            Some(load) => load.waiters.push(request),
            None => self.loads.push_back(Load { adapter, since: now, waiters: vec![request] }),
        }
    }

    fn admit(&mut self, request: usize, item: ItemId) {
        *self.held.entry(item).or_default() += 1;
        self.incoming.push((request, Some(item)));
    }

    /// Begins what can be begun now; when it ends.
    pub fn begin(&mut self, now: f64, world: &mut World<'_>) -> Vec<(f64, Happening)> {
        let mut begun = Vec::new();
        if self.loading.is_none() && self.begin_load(now, world) {
            begun.push((now + world.hardware.load_seconds, Happening::Load));
        }
        if !self.is_stepping
            && let Some(seconds) = self.begin_step(world)
        {
            begun.push((now + seconds, Happening::Step));
        }
        begun
    }

    /// The first load that there is memory for; those that waited for too long are refused.
    fn begin_load(&mut self, now: f64, world: &mut World<'_>) -> bool {
        let mut index = 0;
        while index < self.loads.len() {
            let item = ItemId(self.num_items);
            let held = &self.held;
            let bytes = world.hardware.adapter_bytes;
            let is_held = |item| held.contains_key(&item);
            match self.residency.reserve(item, bytes, Urgency::Request, Duration::from_secs_f64(now), is_held) {
                Reservation::Granted { evicted } => {
                    self.num_items += 1;
                    self.totals.num_loads += 1;
                    self.totals.num_evictions += evicted.len();
                    for item in evicted {
                        let adapter = self.adapter_of.remove(&item);
                        adapter.and_then(|adapter| self.resident.remove(&adapter));
                    }
                    self.loading = self.loads.remove(index).map(|load| (load, item));
                    return true;
                }
                Reservation::Wait if now < self.loads[index].since + world.hardware.max_wait.as_secs_f64() => {
                    index += 1
                }
                Reservation::Wait | Reservation::TooLarge => {
                    let load = self.loads.remove(index);
                    for request in load.into_iter().flat_map(|load| load.waiters) {
                        self.num_in_flight -= 1;
                        refuse(request, Refusal::OutOfMemory, world);
                    }
                }
            }
        }
        false
    }

    fn begin_step(&mut self, world: &mut World<'_>) -> Option<f64> {
        for (request, item) in std::mem::take(&mut self.incoming) {
            let arrival = &world.arrivals[request];
            let adapter = world.adapter_of[request].map(|adapter| world.adapters[adapter].clone());
            let id = SequenceId(self.num_sequences);
            self.num_sequences += 1;
            let prompt = prompt(request, world.adapter_of[request], arrival);
            let sequence = Sequence::new(id, &prompt, world.max_tokens(request), adapter, PromptOutput::Nothing);
            self.machine.enqueue(sequence.for_account(arrival.account.clone()));
            self.running.insert(id, Running { request, item, is_planned: false });
        }
        let begin = Instant::now();
        let (work, seconds) = self.machine.begin_step(&world.hardware.cost)?;
        self.totals.planning += begin.elapsed();
        for planned in &self.machine.scheduler().plan().sequences {
            if let Some(running) = self.running.get_mut(&planned.id).filter(|running| !running.is_planned) {
                running.is_planned = true;
                world.outcomes[running.request].num_cached_tokens = planned.first_position;
            }
        }
        self.totals.num_steps += 1;
        self.totals.num_rows += work.num_rows();
        self.totals.busy_seconds += seconds;
        self.is_stepping = true;
        Some(seconds)
    }

    pub fn end_step(&mut self, now: f64, world: &mut World<'_>) {
        self.is_stepping = false;
        let Self { machine, running, held, num_in_flight, .. } = self;
        let begin = Instant::now();
        machine.end_step(|id, is_last| {
            let Some(Running { request, item, .. }) = running.get(&id) else { return };
            let outcome = &mut world.outcomes[*request];
            outcome.see_token(now);
            outcome.num_tokens += 1;
            if is_last {
                if let Some(count) = item.and_then(|item| held.get_mut(&item)) {
                    *count -= 1;
                }
                *num_in_flight -= 1;
                running.remove(&id);
            }
        });
        self.totals.planning += begin.elapsed();
        self.totals.num_preempted = self.machine.scheduler().num_preempted();
        self.held.retain(|_, count| *count > 0);
    }

    pub fn end_load(&mut self, now: f64, world: &World<'_>) {
        let Some((load, item)) = self.loading.take() else { return };
        self.keep(load.adapter, item, now, world.hardware);
        load.waiters.into_iter().for_each(|request| self.admit(request, item));
    }
}

fn refuse(request: usize, refusal: Refusal, world: &mut World<'_>) {
    world.outcomes[request].refused = Some(refusal);
}

/// Tokens that no other request has, behind those that all of the adapter have.
pub fn prompt(request: usize, adapter: Option<usize>, arrival: &Arrival) -> Vec<u32> {
    let shared = adapter.map_or(1, |adapter| adapter as u64 + 2) << 32;
    let own = ((request as u64) << 32) | (1 << 63);
    let token = |of: u64, position: usize| (crate::hash(of | position as u64) >> 32) as u32;
    let of = |position| if position < arrival.shared_tokens { shared } else { own };
    (0..arrival.prompt_tokens).map(|position| token(of(position), position)).collect()
}
