//! Whose turn it is: rows are shared among keys by their weights, and those of one key among its flows, each the requests
//! of one priority for one adapter. What each has been served is counted in tokens divided by its weight, and who has
//! been served least goes first (Sheng et al. 2024, "Fairness in Serving Large Language Models", arXiv:2401.00588).

use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::num::NonZeroU32;
use std::sync::Arc;

use crate::adapter::canonical::Adapter;

/// Tokens above its share that one may be ahead of the least served before others go first: a few steps' worth, so that
/// streams do not stutter.
const MAX_LEAD: f64 = 16.0;

/// Tokens below its share up to which one that comes back, or had all that it wanted, is still owed them: it may have been away no
/// longer than clients take between two requests.
const MAX_CREDIT: f64 = 256.0;

/// Most accounts that are kept for the sake of those who are away.
const MAX_REMEMBERED: usize = 1024;

/// How much of a key's rows its requests get beside others of it that want more than there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum Priority {
    /// Somebody is typing.
    #[default]
    Completion,
    /// Somebody is reading.
    Chat,
    /// Nobody is waiting.
    Batch,
}

impl Priority {
    pub const ALL: [Self; 3] = [Self::Completion, Self::Chat, Self::Batch];

    pub fn name(self) -> &'static str {
        match self {
            Self::Completion => "completion",
            Self::Chat => "chat",
            Self::Batch => "batch",
        }
    }

    fn weight(self) -> f64 {
        match self {
            Self::Completion => 16.0,
            Self::Chat => 4.0,
            Self::Batch => 1.0,
        }
    }
}

/// Whom a request is served for, and how urgently.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Account {
    /// The key's name; empty for callers without one.
    pub key: Arc<str>,
    pub weight: NonZeroU32,
    pub priority: Priority,
}

impl Default for Account {
    fn default() -> Self {
        Self { key: Arc::from(""), weight: NonZeroU32::MIN, priority: Priority::default() }
    }
}

/// The requests of one key that share alike.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Flow {
    pub account: Account,
    /// The adapter's; `None` is the base.
    pub generation: Option<Arc<str>>,
}

impl Flow {
    pub fn new(account: Account, adapter: Option<&Adapter>) -> Self {
        Self { account, generation: adapter.map(|adapter| Arc::from(adapter.generation.as_str())) }
    }
}

/// What those of one name have had, and hold.
#[derive(Debug)]
struct Served {
    weight: f64,
    /// Tokens computed, divided by the weight.
    served: f64,
    /// Tokens of admitted sequences that are not computed yet, divided by the weight.
    promised: f64,
    num_sequences: usize,
    num_running: usize,
}

impl Served {
    fn expected(&self) -> f64 {
        self.served + self.promised
    }

    /// Where it begins again while the least served of the others has had `floor`.
    fn begin(&self, floor: f64) -> f64 {
        self.served.max(floor - MAX_CREDIT / self.weight)
    }

    /// Whether it would begin otherwise if it were forgotten: it has been away for a short while, or has had more than
    /// others.
    fn matters(&self, floor: Option<f64>) -> bool {
        floor.is_some_and(|floor| self.begin(floor) == self.served)
    }
}

#[derive(Debug)]
struct Level<Name>(HashMap<Name, Served>);

impl<Name: Hash + Eq + Clone> Level<Name> {
    /// Of those with sequences and `is_peer`, what the least served has had.
    fn floor(&self, is_peer: impl Fn(&Name) -> bool) -> Option<f64> {
        let active = self.0.iter().filter(|(name, served)| served.num_sequences > 0 && is_peer(name));
        active.map(|(_, served)| served.served).reduce(f64::min)
    }

    fn enter(&mut self, name: &Name, weight: f64, is_peer: impl Fn(&Name) -> bool) {
        let floor = self.floor(is_peer);
        let served = self.0.entry(name.clone()).or_insert(Served {
            weight,
            served: floor.unwrap_or(0.0),
            promised: 0.0,
            num_sequences: 0,
            num_running: 0,
        });
        if let Some(floor) = floor.filter(|_| served.num_sequences == 0) {
            served.served = served.begin(floor);
        }
        served.num_sequences += 1;
    }

    /// Of those with sequences, whoever has no claim to more than `claim` of its peers' is owed no more.
    fn settle(&mut self, wants: impl Fn(&Name) -> bool, claim: impl Fn(&Name) -> Option<Claim>) {
        for (name, served) in self.0.iter_mut().filter(|(_, served)| served.num_sequences > 0) {
            if !wants(name)
                && let Some(claim) = claim(name)
            {
                served.served = served.begin(claim.floor());
            }
        }
    }

    /// Forgets who is away and does not matter, and all who are away if they are many.
    fn forget(&mut self, is_peer: impl Fn(&Name) -> bool) {
        let (floor, are_many) = (self.floor(&is_peer), self.0.len() > MAX_REMEMBERED);
        let is_left = |served: &Served| served.num_sequences > 0 || !are_many && served.matters(floor);
        self.0.retain(|name, served| is_left(served) || !is_peer(name));
    }

    fn update(&mut self, name: &Name, change: impl FnOnce(&mut Served)) {
        if let Some(served) = self.0.get_mut(name) {
            change(served);
        }
    }
}

/// What those of one level with sequences have had.
#[derive(Debug, Clone, Copy)]
struct Claim {
    /// The least served of those that wanted more than they got.
    least_wanting: Option<f64>,
    most: f64,
}

impl Claim {
    fn of(served: f64, wants: bool) -> Self {
        Self { least_wanting: wants.then_some(served), most: served }
    }

    fn with(self, other: Self) -> Self {
        let both = self.least_wanting.zip(other.least_wanting).map(|(own, other)| own.min(other));
        Self { least_wanting: both.or(self.least_wanting).or(other.least_wanting), most: self.most.max(other.most) }
    }

    /// Up to which nobody owes anything to those that want no more: where all have what they want, nobody owes anybody.
    fn floor(self) -> f64 {
        self.least_wanting.unwrap_or(self.most)
    }
}

/// How one stands in the order of who is next; less goes first.
#[derive(Debug, Clone, Copy)]
pub struct Standing {
    of_key: f64,
    of_flow: f64,
}

impl Ord for Standing {
    fn cmp(&self, other: &Self) -> Ordering {
        self.of_key.total_cmp(&other.of_key).then(self.of_flow.total_cmp(&other.of_flow))
    }
}

impl PartialOrd for Standing {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Standing {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Standing {}

/// How far above its share a flow runs; who has most makes room first.
#[derive(Debug, Clone, Copy)]
pub struct Excess {
    /// Of its key, beside another key's flow; its own, beside one of the same key.
    of_peer: f64,
    /// Of all flows of a key that runs too much, the one that does most of it: what it runs, divided by its weight. Nothing
    /// where that is a single sequence, which goes last.
    within_key: f64,
}

impl Excess {
    pub fn total_cmp(&self, other: &Self) -> Ordering {
        self.of_peer.total_cmp(&other.of_peer).then(self.within_key.total_cmp(&other.within_key))
    }
}

/// What the least served have had, at one time.
#[derive(Debug)]
pub struct Floors {
    of_keys: Option<f64>,
    /// Of each key's.
    of_flows: HashMap<Arc<str>, f64>,
}

#[derive(Debug)]
pub struct Fairness {
    keys: Level<Arc<str>>,
    flows: Level<Flow>,
}

impl Default for Fairness {
    fn default() -> Self {
        Self { keys: Level(HashMap::new()), flows: Level(HashMap::new()) }
    }
}

impl Fairness {
    /// A sequence of `flow` has come.
    pub fn enter(&mut self, flow: &Flow) {
        let Account { key, weight, priority } = &flow.account;
        self.keys.enter(key, weight.get().into(), |_| true);
        self.flows.enter(flow, priority.weight(), |peer| peer.account.key == *key);
    }

    /// A sequence of `flow` has ended.
    pub fn leave(&mut self, flow: &Flow) {
        let key = &flow.account.key;
        self.update(flow, |served| served.num_sequences -= 1);
        self.flows.forget(|peer| peer.account.key == *key);
        self.keys.forget(|_| true);
        self.flows.0.retain(|peer, _| self.keys.0.contains_key(&peer.account.key));
    }

    /// A sequence with so many tokens to compute begins to run.
    pub fn admit(&mut self, flow: &Flow, num_tokens: usize) {
        self.update(flow, |served| {
            served.num_running += 1;
            served.promised += num_tokens as f64 / served.weight;
        });
    }

    /// A sequence runs no longer; `num_tokens` of what it was admitted for are not computed.
    pub fn stop(&mut self, flow: &Flow, num_tokens: usize) {
        self.update(flow, |served| {
            served.num_running -= 1;
            served.promised -= num_tokens as f64 / served.weight;
        });
    }

    /// Tokens are computed, `num_promised` of them such that a sequence was admitted for.
    pub fn serve(&mut self, flow: &Flow, num_tokens: usize, num_promised: usize) {
        self.update(flow, |served| {
            served.served += num_tokens as f64 / served.weight;
            served.promised -= num_promised as f64 / served.weight;
        });
    }

    /// A step is planned in which those of `wanting` get less than they want, and all others with sequences here all that they
    /// want: who wants no more has no claim to what others are served beside it.
    pub fn settle<'a>(&mut self, wanting: impl Iterator<Item = &'a Flow>) {
        // One alone is owed nothing, and its steps need not look.
        if self.flows.0.len() < 2 {
            return;
        }
        let wanting: HashSet<&Flow> = wanting.collect();
        let wanting_keys: HashSet<&Arc<str>> = wanting.iter().map(|flow| &flow.account.key).collect();
        let active = self.keys.0.iter().filter(|(_, served)| served.num_sequences > 0);
        let of_keys = active.map(|(key, served)| Claim::of(served.served, wanting_keys.contains(key)));
        let of_keys = of_keys.reduce(Claim::with);
        self.keys.settle(|key| wanting_keys.contains(key), |_| of_keys);
        let mut of_flows: HashMap<Arc<str>, Claim> = HashMap::new();
        for (flow, served) in self.flows.0.iter().filter(|(_, served)| served.num_sequences > 0) {
            let claim = Claim::of(served.served, wanting.contains(flow));
            of_flows.entry(Arc::clone(&flow.account.key)).and_modify(|all| *all = all.with(claim)).or_insert(claim);
        }
        self.flows.settle(|flow| wanting.contains(flow), |flow| of_flows.get(&flow.account.key).copied());
    }

    /// By what has been computed.
    pub fn standing(&self, flow: &Flow) -> Standing {
        self.of(flow, |served| served.served)
    }

    /// By what will have been, once all that runs is.
    pub fn expected_standing(&self, flow: &Flow) -> Standing {
        self.of(flow, Served::expected)
    }

    /// What the least served with sequences here have had.
    pub fn floors(&self) -> Floors {
        let active = self.flows.0.iter().filter(|(_, served)| served.num_sequences > 0);
        self.floors_of(active.map(|(flow, _)| flow))
    }

    /// What the least served of these, which have sequences here, have had.
    pub fn floors_of<'a>(&self, flows: impl Iterator<Item = &'a Flow>) -> Floors {
        let mut floors = Floors { of_keys: None, of_flows: HashMap::new() };
        for flow in flows {
            let Standing { of_key, of_flow } = self.standing(flow);
            floors.of_keys = Some(floors.of_keys.map_or(of_key, |floor| floor.min(of_key)));
            let floor = floors.of_flows.entry(Arc::clone(&flow.account.key)).or_insert(of_flow);
            *floor = floor.min(of_flow);
        }
        floors
    }

    /// Whether others whose floors these are should be served before it.
    pub fn is_ahead(&self, flow: &Flow, floors: &Floors) -> bool {
        let key = &flow.account.key;
        let is_ahead = |served: Option<&Served>, floor: Option<f64>| {
            served.zip(floor).is_some_and(|(served, floor)| (served.served - floor) * served.weight >= MAX_LEAD)
        };
        is_ahead(self.keys.0.get(key), floors.of_keys)
            || is_ahead(self.flows.0.get(flow), floors.of_flows.get(key).copied())
    }

    /// By how much more than `flow` with one sequence more `other` runs than its share; `None` where it does not.
    pub fn excess(&self, other: &Flow, flow: &Flow) -> Option<Excess> {
        let excess = |other: Option<&Served>, own: Option<&Served>| {
            let (other, own) = other.zip(own)?;
            let excess = other.num_running as f64 / other.weight - (own.num_running + 1) as f64 / own.weight;
            (excess > 0.0 && other.num_running > 1).then_some(excess)
        };
        let of_peer = match other.account.key == flow.account.key {
            true => excess(self.flows.0.get(other), self.flows.0.get(flow)),
            false => excess(self.keys.0.get(&other.account.key), self.keys.0.get(&flow.account.key)),
        }?;
        let within_key = self.flows.0.get(other).filter(|served| served.num_running > 1);
        Some(Excess { of_peer, within_key: within_key.map_or(0.0, |served| served.num_running as f64 / served.weight) })
    }

    fn of(&self, flow: &Flow, read: impl Fn(&Served) -> f64) -> Standing {
        let read = |served: Option<&Served>| served.map_or(0.0, &read);
        Standing { of_key: read(self.keys.0.get(&flow.account.key)), of_flow: read(self.flows.0.get(flow)) }
    }

    fn update(&mut self, flow: &Flow, change: impl Fn(&mut Served)) {
        self.keys.update(&flow.account.key, &change);
        self.flows.update(flow, &change);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(key: &str, generation: u32) -> Flow {
        let account = Account { key: Arc::from(key), ..Account::default() };
        Flow { account, generation: Some(Arc::from(generation.to_string())) }
    }

    fn serve(fairness: &mut Fairness, flow: &Flow, num_tokens: usize) {
        fairness.enter(flow);
        fairness.admit(flow, num_tokens);
        fairness.serve(flow, num_tokens, num_tokens);
        fairness.stop(flow, 0);
        fairness.leave(flow);
    }

    #[test]
    fn who_had_more_is_remembered_while_there_are_others_and_no_longer() {
        let mut fairness = Fairness::default();
        let (here, greedy) = (flow("a", 0), flow("b", 0));
        fairness.enter(&here);
        serve(&mut fairness, &greedy, 1000);
        fairness.enter(&greedy);
        let floors = fairness.floors();
        assert!(fairness.is_ahead(&greedy, &floors) && !fairness.is_ahead(&here, &floors));
        assert!(fairness.standing(&here) < fairness.standing(&greedy));
        fairness.leave(&greedy);
        fairness.leave(&here);
        assert!(fairness.keys.0.is_empty() && fairness.flows.0.is_empty());
    }

    #[test]
    fn who_was_away_for_long_begins_with_little_owed() {
        let mut fairness = Fairness::default();
        let (here, away) = (flow("a", 0), flow("b", 0));
        fairness.enter(&here);
        serve(&mut fairness, &away, 10);
        fairness.admit(&here, 0);
        fairness.serve(&here, 10_000, 0);
        fairness.enter(&away);
        let [here, away] = [&here, &away].map(|flow| fairness.standing(flow).of_key);
        assert_eq!(here - away, MAX_CREDIT);
    }

    #[test]
    fn any_number_of_adapters_takes_bounded_memory() {
        let mut fairness = Fairness::default();
        fairness.enter(&flow("a", 0));
        (1..5000).for_each(|generation| serve(&mut fairness, &flow("a", generation), 10));
        assert!(fairness.flows.0.len() <= MAX_REMEMBERED + 1, "{}", fairness.flows.0.len());
    }
}
