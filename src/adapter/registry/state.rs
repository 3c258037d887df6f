//! What the registry knows, and what is to be done next. No file is touched here; everything happens under one lock,
//! shortly.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use super::entry::{Entry, Hindrance};
use super::error::AcquireError;
use super::events::{AdapterChange, Events};
use super::status::{AdapterStatus, AdapterUsage, Phase, SelfTest, Tier, Usage};
use super::worker::Worker;
use crate::adapter::canonical::{Adapter, Coverage};
use crate::adapter::files::Fingerprint;
use crate::adapter::residency::{ItemId, Reservation, Residency, Urgency};
use crate::metrics::{COMPOSITION, Metrics};

/// Files are looked at when nothing has changed for this long …
const QUIET: Duration = Duration::from_millis(100);
/// … or so long after the first change.
const MAX_DELAY: Duration = Duration::from_secs(1);
/// How often it is looked whether a lease has come back: dropping one tells nobody.
const LEASE_POLL: Duration = Duration::from_millis(10);

pub type Lease = Result<Arc<Adapter>, AcquireError>;
/// Work that changes the folder, done by the thread that reads it.
pub type Change = Box<dyn FnOnce(&mut Worker) + Send>;

/// Name, generation and the bits of the scale of each member.
pub type CompositionKey = Vec<(String, String, u32)>;
pub type Members = Vec<(Arc<Adapter>, f32)>;

#[derive(Debug, Clone)]
pub enum Target {
    Adapter(String),
    Composition(CompositionKey, Members),
}

impl Target {
    pub fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Adapter(name), Self::Adapter(other)) => name == other,
            (Self::Composition(key, _), Self::Composition(other, _)) => key == other,
            _ => false,
        }
    }

    /// Bytes of what is in memory while it is made: a composition's members.
    pub(super) fn bytes_beside(&self) -> u64 {
        match self {
            Self::Adapter(_) => 0,
            Self::Composition(_, members) => {
                let by_generation: BTreeMap<_, _> =
                    members.iter().map(|(member, _)| (&member.generation, resident_bytes(member))).collect();
                by_generation.into_values().sum()
            }
        }
    }

    fn out_of_memory(&self) -> AcquireError {
        AcquireError::OutOfMemory(match self {
            Self::Adapter(name) => name.clone(),
            Self::Composition(key, _) => key.iter().map(|(name, ..)| name.as_str()).collect::<Vec<_>>().join(" + "),
        })
    }
}

/// Something to load, once for everybody who waits for it.
#[derive(Debug)]
pub(super) struct Load {
    pub target: Target,
    pub item: ItemId,
    pub urgency: Urgency,
    /// It is loaded whether or not anybody waits.
    pub is_due: bool,
    order: u64,
    /// When it was first asked for or due.
    since: Duration,
    waiters: Vec<Waiter>,
}

/// A request that waits for a load.
#[derive(Debug)]
struct Waiter {
    since: Duration,
    lease: oneshot::Sender<Lease>,
}

impl Waiter {
    fn has_gone(&self) -> bool {
        self.lease.is_closed()
    }

    fn end(self, lease: Lease) {
        // Who no longer waits has dropped the other end.
        let _ = self.lease.send(lease);
    }
}

impl Load {
    /// The adapter that requests wait for here.
    fn waited_for(&self) -> Option<&str> {
        match &self.target {
            Target::Adapter(name) if !self.waiters.iter().all(Waiter::has_gone) => Some(name),
            _ => None,
        }
    }

    /// Whether it was asked for by requests alone, which have all gone.
    fn is_abandoned(&self) -> bool {
        !self.is_due && !self.waiters.is_empty() && self.waiters.iter().all(Waiter::has_gone)
    }

    pub fn end(self, lease: &Lease) {
        self.waiters.into_iter().for_each(|waiter| waiter.end(lease.clone()));
    }
}

pub enum Task {
    Stop,
    Scan,
    Change(Change),
    Load(Target),
    /// Nothing to do before so much time has passed or somebody calls.
    Wait(Duration),
}

pub enum Acquired {
    Now(Lease),
    Later(oneshot::Receiver<Lease>),
}

pub struct State {
    pub(super) entries: BTreeMap<String, Entry>,
    pub(super) resident: HashMap<ItemId, Arc<Adapter>>,
    pub(super) compositions: HashMap<CompositionKey, ItemId>,
    /// Replaced or removed, and held by requests. Freed here and not where the last of them ends: that may be the engine.
    pub(super) retired: Vec<(ItemId, Arc<Adapter>, Vec<String>)>,
    pub(super) residency: Residency,
    /// To begin, or begun.
    pub(super) loads: Vec<Load>,
    changes: VecDeque<(u64, Change)>,
    /// First and last sign of a change in the folder since the last scan.
    pub(super) changed: Option<(Duration, Duration)>,
    pub(super) rescan_at: Duration,
    max_wait: Duration,
    num_items: u64,
    num_orders: u64,
    pub(super) num_ids: usize,
    /// To be dropped by the worker, outside the lock: freeing an adapter takes milliseconds.
    pub(super) trash: Vec<Arc<Adapter>>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) events: Events,
    is_stopping: bool,
}

impl State {
    pub fn new(residency: Residency, max_wait: Duration, metrics: Arc<Metrics>) -> Self {
        Self {
            entries: BTreeMap::new(),
            resident: HashMap::new(),
            compositions: HashMap::new(),
            retired: Vec::new(),
            residency,
            loads: Vec::new(),
            changes: VecDeque::new(),
            changed: None,
            rescan_at: Duration::MAX,
            max_wait,
            num_items: 0,
            num_orders: 0,
            num_ids: 0,
            trash: Vec::new(),
            metrics,
            events: Events::new(),
            is_stopping: false,
        }
    }

    /// Whoever still waits gets an error.
    pub fn stop(&mut self) {
        self.is_stopping = true;
        self.loads.clear();
        self.changes.clear();
    }
}

/// Asking.
impl State {
    pub fn names(&self) -> impl Iterator<Item = &String> {
        self.entries.keys()
    }

    /// Whether files of this fingerprint are what is known of `name`, and are not due to be tried again.
    pub fn is_known(&self, name: &str, fingerprint: Option<&Fingerprint>, now: Duration) -> bool {
        self.entries.get(name).is_some_and(|entry| {
            let is_due = entry.hindrance.as_ref().is_some_and(|hindrance| hindrance.retry_at <= now);
            entry.fingerprint.as_ref() == fingerprint && !is_due
        })
    }

    /// Whether anything is known of the files of `name`.
    pub fn has_seen(&self, name: &str) -> bool {
        self.entries.get(name).is_some_and(|entry| entry.fingerprint.is_some())
    }

    /// Why files are not served that are there under `name`.
    pub fn error(&self, name: &str) -> Option<&str> {
        let entry = self.entries.get(name)?;
        entry.failure.as_deref().or(entry.hindrance.as_ref().map(|hindrance| hindrance.cause.as_str()))
    }

    /// The generation of the files with this fingerprint, if they have been read.
    pub fn known_generation(&self, name: &str, fingerprint: &Fingerprint) -> Option<String> {
        let entry = self.entries.get(name)?;
        entry.generation.clone().filter(|_| entry.fingerprint.as_ref() == Some(fingerprint))
    }

    /// What is in memory of an adapter.
    pub(super) fn current(&self, entry: &Entry) -> Option<&Arc<Adapter>> {
        self.resident.get(&entry.item?)
    }

    pub fn resident(&self) -> Vec<Arc<Adapter>> {
        self.entries.values().filter_map(|entry| self.current(entry).cloned()).collect()
    }

    pub fn status(&self, name: &str) -> Option<AdapterStatus> {
        let entry = self.entries.get(name)?;
        let current = self.current(entry);
        let target = Target::Adapter(name.to_owned());
        let is_loading = self.loads.iter().any(|load| load.target.is(&target));
        let held = |adapter: &Arc<Adapter>| Arc::strong_count(adapter) - 1;
        let retired = self.retired.iter().filter(|(_, _, names)| names.iter().any(|retired| retired == name));
        let composed = self.compositions.iter().filter(|(key, _)| key.iter().any(|(member, ..)| member == name));
        let in_flight = current.map_or(0, held)
            + retired.map(|(_, adapter, _)| held(adapter)).sum::<usize>()
            + composed.filter_map(|(_, item)| self.resident.get(item)).map(held).sum::<usize>();
        let generation = current.map(|adapter| &adapter.generation).or(entry.generation.as_ref());
        let self_test = entry.self_test.filter(|_| entry.tested_generation.as_ref() == generation);
        Some(AdapterStatus {
            id: entry.id,
            name: name.to_owned(),
            phase: match current {
                _ if entry.failure.is_some() => Phase::Failed,
                Some(_) => Phase::Ready,
                None if is_loading => Phase::Loading,
                None => Phase::Registered,
            },
            tier: self.tier(entry),
            generation: generation.cloned(),
            files_generation: entry.generation.clone(),
            is_stale: entry.is_stale && current.is_some(),
            previous_generations: entry.previous_generations.clone(),
            method: current.map(|adapter| adapter.method).or(entry.method),
            coverage: self.coverage(entry).cloned(),
            in_flight,
            error: self.error(name).map(str::to_owned),
            manifest: entry.manifest.clone(),
            self_test,
            is_inert: self_test.is_some_and(|test| test.is_inert()),
        })
    }

    pub fn usage(&self) -> Usage {
        let retired = self.retired.iter().map(|(_, adapter, _)| adapter);
        Usage {
            registered: self.entries.len(),
            resident: self.resident.len(),
            resident_bytes: self.residency.used(),
            leases: self.resident.values().chain(retired).map(|adapter| Arc::strong_count(adapter) - 1).sum(),
        }
    }

    /// Of each adapter, in order of the names.
    pub fn usage_by_adapter(&self) -> Vec<AdapterUsage> {
        let waited_for: HashSet<_> = self.loads.iter().filter_map(Load::waited_for).collect();
        let usage = |(name, entry): (&String, &Entry)| AdapterUsage {
            name: name.clone(),
            tier: self.tier(entry),
            bytes: self.coverage(entry).map_or(entry.resident_bytes, |coverage| coverage.resident_bytes as u64),
            is_pinned: entry.manifest.pin,
            max_rank: self.coverage(entry).map_or(0, |coverage| coverage.max_rank),
            is_waited_for: waited_for.contains(name.as_str()),
        };
        self.entries.iter().map(usage).collect()
    }

    /// Of what is in memory, else of what was last.
    fn coverage<'a>(&'a self, entry: &'a Entry) -> Option<&'a Coverage> {
        self.current(entry).map(|adapter| &adapter.coverage).or(entry.coverage.as_ref())
    }

    fn tier(&self, entry: &Entry) -> Tier {
        if self.current(entry).is_some() { Tier::Host } else { Tier::Disk }
    }

    pub fn acquire(&mut self, name: &str, urgency: Urgency, now: Duration) -> Acquired {
        let Some(entry) = self.entries.get(name) else {
            return Acquired::Now(Err(AcquireError::Unknown(name.to_owned())));
        };
        if let Some(cause) = &entry.failure {
            return Acquired::Now(Err(AcquireError::Refused { name: name.to_owned(), cause: cause.clone() }));
        }
        if let (Some(item), Some(adapter)) = (entry.item, self.current(entry).cloned()) {
            self.residency.touch(item, now);
            return Acquired::Now(Ok(adapter));
        }
        if let Some(Hindrance { cause, .. }) = entry.hindrance.as_ref().filter(|hindrance| now < hindrance.retry_at) {
            return Acquired::Now(Err(AcquireError::Unreadable { name: name.to_owned(), cause: cause.clone() }));
        }
        Acquired::Later(self.wait_for(Target::Adapter(name.to_owned()), urgency, now))
    }

    /// A composition of the current generations, if it is in memory.
    pub fn known_composition(&mut self, members: &[&(String, f32)], now: Duration) -> Option<Arc<Adapter>> {
        let part = |(name, scale): &&(String, f32)| {
            let entry = self.entries.get(name)?;
            let current = self.current(entry).map(|adapter| &adapter.generation);
            Some((name.clone(), current.or(entry.generation.as_ref())?.clone(), scale.to_bits()))
        };
        let key: CompositionKey = members.iter().map(part).collect::<Option<_>>()?;
        self.composition(&key, now)
    }

    fn composition(&mut self, key: &CompositionKey, now: Duration) -> Option<Arc<Adapter>> {
        let item = *self.compositions.get(key)?;
        self.residency.touch(item, now);
        self.resident.get(&item).cloned()
    }

    pub fn compose(&mut self, members: Members, now: Duration) -> Acquired {
        let part =
            |(member, scale): &(Arc<Adapter>, f32)| (member.name.clone(), member.generation.clone(), scale.to_bits());
        let key: CompositionKey = members.iter().map(part).collect();
        match self.composition(&key, now) {
            Some(adapter) => Acquired::Now(Ok(adapter)),
            None => Acquired::Later(self.wait_for(Target::Composition(key, members), Urgency::Request, now)),
        }
    }

    /// The next adapter in memory that was not measured yet; each generation once.
    pub fn next_untested(&mut self) -> Option<Arc<Adapter>> {
        let resident = &self.resident;
        self.entries.values_mut().find_map(|entry| {
            let adapter = resident.get(&entry.item?)?;
            if entry.tested_generation.as_ref() == Some(&adapter.generation) {
                return None;
            }
            entry.tested_generation = Some(adapter.generation.clone());
            entry.self_test = None;
            Some(adapter.clone())
        })
    }

    /// Whether that generation of the adapter was to be measured.
    pub fn report_self_test(&mut self, name: &str, generation: &str, self_test: SelfTest) -> bool {
        let entry = self.entries.get_mut(name).filter(|entry| entry.tested_generation.as_deref() == Some(generation));
        entry.map(|entry| entry.self_test = Some(self_test)).is_some()
    }
}

/// Planning.
impl State {
    fn next_order(&mut self) -> u64 {
        self.num_orders += 1;
        self.num_orders
    }

    /// The load of `target`, begun or still to begin, at least as urgent as this.
    pub(super) fn load_of(&mut self, target: Target, urgency: Urgency, now: Duration) -> &mut Load {
        let index = self.loads.iter().position(|load| load.target.is(&target)).unwrap_or_else(|| {
            self.num_items += 1;
            let (item, order) = (ItemId(self.num_items), self.next_order());
            self.loads.push(Load { target, item, urgency, is_due: false, order, since: now, waiters: Vec::new() });
            self.loads.len() - 1
        });
        let load = &mut self.loads[index];
        load.urgency = load.urgency.max(urgency);
        load
    }

    fn wait_for(&mut self, target: Target, urgency: Urgency, now: Duration) -> oneshot::Receiver<Lease> {
        let (sender, lease) = oneshot::channel();
        self.load_of(target, urgency, now).waiters.push(Waiter { since: now, lease: sender });
        lease
    }

    pub fn push_change(&mut self, change: Change) {
        let order = self.next_order();
        self.changes.push_back((order, change));
    }

    /// Something in the folder changed.
    pub fn notice(&mut self, now: Duration) {
        let first = self.changed.map_or(now, |(first, _)| first);
        self.changed = Some((first, now));
    }

    fn scan_at(&self) -> Duration {
        let noticed = self.changed.map(|(first, last)| (last + QUIET).min(first + MAX_DELAY));
        noticed.map_or(self.rescan_at, |at| at.min(self.rescan_at))
    }

    /// What the worker is to do now: what people wait for in the order in which they came, then the rest.
    pub fn next_task(&mut self, now: Duration) -> Task {
        self.sweep();
        if self.is_stopping {
            return Task::Stop;
        }
        if self.scan_at() <= now {
            (self.changed, self.rescan_at) = (None, Duration::MAX);
            return Task::Scan;
        }
        let change = self.changes.front().map_or(u64::MAX, |(order, _)| *order);
        self.loads.sort_by_key(|load| (std::cmp::Reverse(load.urgency), load.order));
        let mut index = 0;
        while index < self.loads.len() {
            let load = &self.loads[index];
            if change != u64::MAX && (load.urgency < Urgency::Request || load.order > change) {
                break;
            }
            if load.is_abandoned() {
                self.loads.remove(index);
                continue;
            }
            match self.begin(index, now) {
                Reservation::Granted { .. } => return Task::Load(self.loads[index].target.clone()),
                Reservation::Wait => index += usize::from(self.waits_on(index, now)),
                Reservation::TooLarge => self.refuse_size(index),
            }
        }
        if let Some((_, change)) = self.changes.pop_front() {
            return Task::Change(change);
        }
        let to_scan = self.scan_at().saturating_sub(now);
        let is_watching_leases = !self.loads.is_empty() || !self.retired.is_empty();
        Task::Wait(if is_watching_leases { to_scan.min(LEASE_POLL) } else { to_scan })
    }

    /// Takes the memory for a load, as far as that is known before.
    fn begin(&mut self, index: usize, now: Duration) -> Reservation {
        let Load { item, urgency, ref target, .. } = self.loads[index];
        let bytes = self.bytes_of(target);
        if !self.residency.can_hold(bytes + target.bytes_beside()) {
            return Reservation::TooLarge;
        }
        self.reserve(item, bytes, urgency, now)
    }

    /// What a target takes in memory, as far as that is known before it is loaded.
    pub(super) fn bytes_of(&self, target: &Target) -> u64 {
        match target {
            Target::Adapter(name) => self.entries.get(name).map_or(0, |entry| entry.resident_bytes),
            Target::Composition(_, members) => members.iter().map(|(member, _)| resident_bytes(member)).sum(),
        }
    }

    /// A load that gets no memory now: whether it goes on waiting.
    fn waits_on(&mut self, index: usize, now: Duration) -> bool {
        let max_wait = self.max_wait;
        let load = &mut self.loads[index];
        load.waiters.retain(|waiter| !waiter.has_gone());
        let is_over = |since: Duration| now >= since + max_wait;
        let error = load.target.out_of_memory();
        for waiter in load.waiters.extract_if(.., |waiter| is_over(waiter.since)) {
            waiter.end(Err(error.clone()));
        }
        let is_served_meanwhile = match &load.target {
            Target::Adapter(name) => self.entries.get(name).is_some_and(|entry| entry.is_stale),
            Target::Composition(..) => false,
        };
        if !load.waiters.is_empty() || is_served_meanwhile && !is_over(load.since) {
            return true;
        }
        let load = self.loads.remove(index);
        self.end_without_memory(load);
        false
    }

    pub(super) fn end_without_memory(&mut self, load: Load) {
        if let Target::Adapter(name) = &load.target {
            self.retire_stale(name);
            if self.entries.get(name).is_some_and(|entry| entry.manifest.pin) {
                tracing::warn!(
                    "adapter {name} is pinned and there is no memory for it: raise adapters.host_budget_mib"
                );
            }
        }
        let error = load.target.out_of_memory();
        load.end(&Err(error));
    }

    pub(super) fn reserve(&mut self, item: ItemId, bytes: u64, urgency: Urgency, now: Duration) -> Reservation {
        let resident = &self.resident;
        let is_held = |item| resident.get(&item).is_some_and(|adapter| Arc::strong_count(adapter) > 1);
        let reservation = self.residency.reserve(item, bytes, urgency, now, is_held);
        if let Reservation::Granted { evicted } = &reservation {
            for adapter in evicted.iter().filter_map(|item| self.resident.remove(item)) {
                self.metrics.of_adapter(label_of(&adapter)).evictions_total.inc();
                if adapter.members.is_empty() {
                    self.events.tell(&adapter.name, Some(&adapter.generation), AdapterChange::Evicted);
                }
                self.trash.push(adapter);
            }
            let resident = &self.resident;
            self.compositions.retain(|_, item| resident.contains_key(item));
        }
        reservation
    }

    /// Frees what was retired and is no longer held.
    pub(super) fn sweep(&mut self) {
        let (held, free) =
            std::mem::take(&mut self.retired).into_iter().partition(|(_, adapter, _)| Arc::strong_count(adapter) > 1);
        self.retired = held;
        for (item, adapter, _) in free {
            self.residency.remove(item);
            self.trash.push(adapter);
        }
    }

    pub fn take_trash(&mut self) -> Vec<Arc<Adapter>> {
        std::mem::take(&mut self.trash)
    }
}

pub(super) fn resident_bytes(adapter: &Adapter) -> u64 {
    adapter.coverage.resident_bytes as u64
}

/// In the metrics, where compositions have no names.
fn label_of(adapter: &Adapter) -> &str {
    if adapter.members.is_empty() { &adapter.name } else { COMPOSITION }
}
