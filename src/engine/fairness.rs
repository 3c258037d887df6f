//! Whose turn it is: rows are shared among keys by their weights, and those of one key among its flows, each the requests
//! of one priority for one adapter. What each has been served is counted in tokens divided by its weight, and who has
//! been served least goes first (Sheng et al. 2024, "Fairness in Serving Large Language Models", arXiv:2401.00588).

use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::num::NonZeroU32;
use std::sync::Arc;

use crate::adapter::canonical::Adapter;

/// Tokens above its share that one may be ahead of the least served before the prompts of others go first: a few steps' worth.
const MAX_LEAD: f64 = 16.0;

/// Tokens above its share that one may be ahead of another beside which it runs more than its share: about a request's worth, so that those
/// who ask for as much as each other do not make way for each other in turn.
const MAX_FLOOD: f64 = 128.0;

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

/// What one is still owed that comes back, or had all that it wanted.
#[derive(Debug, Clone, Copy)]
pub enum Credit {
    /// So many tokens: it may have been away no longer than clients take between two requests.
    Tokens(f64),
    /// What the one of least weight here has by one token, so that it can be told whose turn is next. Were more owed in streams, those
    /// of others would stand still for it.
    OneTurn,
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
    fn begin(&self, floor: f64, credit: Credit, least_weight: f64) -> f64 {
        let credit = match credit {
            Credit::Tokens(num_tokens) => num_tokens / self.weight,
            Credit::OneTurn => 1.0 / least_weight,
        };
        self.served.max(floor - credit)
    }
}

/// Those of one level that have sequences, beside one of them.
#[derive(Debug, Clone, Copy)]
struct Peers {
    /// What the least served has had.
    floor: f64,
    least_weight: f64,
}

#[derive(Debug)]
struct Level<Name> {
    all: HashMap<Name, Served>,
    credit: Credit,
}

impl<Name: Hash + Eq + Clone> Level<Name> {
    fn new(credit: Credit) -> Self {
        Self { all: HashMap::new(), credit }
    }

    fn peers(&self, is_peer: impl Fn(&Name) -> bool) -> Option<Peers> {
        let active = self.all.iter().filter(|(name, served)| served.num_sequences > 0 && is_peer(name));
        let active = active.map(|(_, served)| Peers { floor: served.served, least_weight: served.weight });
        active.reduce(|a, b| Peers { floor: a.floor.min(b.floor), least_weight: a.least_weight.min(b.least_weight) })
    }

    fn enter(&mut self, name: &Name, weight: f64, is_peer: impl Fn(&Name) -> bool) {
        let peers = self.peers(is_peer);
        let served = self.all.entry(name.clone()).or_insert(Served {
            weight,
            served: peers.map_or(0.0, |peers| peers.floor),
            promised: 0.0,
            num_sequences: 0,
            num_running: 0,
        });
        if let Some(Peers { floor, least_weight }) = peers.filter(|_| served.num_sequences == 0) {
            served.served = served.begin(floor, self.credit, least_weight.min(weight));
        }
        served.num_sequences += 1;
    }

    /// Of those with sequences, whoever has no claim to more than `claim` of its peers' is owed no more.
    fn settle(&mut self, wants: impl Fn(&Name) -> bool, claim: impl Fn(&Name) -> Option<Claim>) {
        for (name, served) in self.all.iter_mut().filter(|(_, served)| served.num_sequences > 0) {
            if !wants(name)
                && let Some(claim) = claim(name)
            {
                served.served = served.begin(claim.floor(), self.credit, claim.least_weight);
            }
        }
    }

    /// Forgets who is away and does not matter, and all who are away if they are many.
    fn forget(&mut self, is_peer: impl Fn(&Name) -> bool) {
        let (peers, are_many, credit) = (self.peers(&is_peer), self.all.len() > MAX_REMEMBERED, self.credit);
        // Whether it would begin otherwise if it were forgotten: it has been away for a short while, or has had more than others.
        let matters = |served: &Served| {
            peers.is_some_and(|Peers { floor, least_weight }| {
                served.begin(floor, credit, least_weight.min(served.weight)) == served.served
            })
        };
        let is_left = |served: &Served| served.num_sequences > 0 || !are_many && matters(served);
        self.all.retain(|name, served| is_left(served) || !is_peer(name));
    }

    fn update(&mut self, name: &Name, change: impl FnOnce(&mut Served)) {
        if let Some(served) = self.all.get_mut(name) {
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
    least_weight: f64,
}

impl Claim {
    fn of(served: &Served, wants: bool) -> Self {
        Self { least_wanting: wants.then_some(served.served), most: served.served, least_weight: served.weight }
    }

    fn with(self, other: Self) -> Self {
        let both = self.least_wanting.zip(other.least_wanting).map(|(own, other)| own.min(other));
        Self {
            least_wanting: both.or(self.least_wanting).or(other.least_wanting),
            most: self.most.max(other.most),
            least_weight: self.least_weight.min(other.least_weight),
        }
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

/// One of the rows that compete for a step.
#[derive(Debug, Clone, Copy)]
pub struct Turn {
    /// Among those that do.
    pub index: usize,
    /// As it is when the rows of its flow before it are computed.
    standing: Standing,
    /// Whether it leaves its flow and its key no better served than any other will be that has all of its rows.
    pub is_within_share: bool,
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

impl Fairness {
    pub fn new(credit: Credit) -> Self {
        Self { keys: Level::new(credit), flows: Level::new(credit) }
    }

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
        self.flows.all.retain(|peer, _| self.keys.all.contains_key(&peer.account.key));
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
        if self.flows.all.len() < 2 {
            return;
        }
        let wanting: HashSet<&Flow> = wanting.collect();
        let wanting_keys: HashSet<&Arc<str>> = wanting.iter().map(|flow| &flow.account.key).collect();
        let active = self.keys.all.iter().filter(|(_, served)| served.num_sequences > 0);
        let of_keys = active.map(|(key, served)| Claim::of(served, wanting_keys.contains(key)));
        let of_keys = of_keys.reduce(Claim::with);
        self.keys.settle(|key| wanting_keys.contains(key), |_| of_keys);
        let mut of_flows: HashMap<Arc<str>, Claim> = HashMap::new();
        for (flow, served) in self.flows.all.iter().filter(|(_, served)| served.num_sequences > 0) {
            let claim = Claim::of(served, wanting.contains(flow));
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

    /// Of rows of these flows, which have sequences here, who is next. Those of one flow have their turns as they are given.
    pub fn turns(&self, flows: &[&Flow]) -> Vec<Turn> {
        let weight = |served: Option<&Served>| served.map_or(1.0, |served| served.weight);
        // Served what they have been, and a row more for each that is in front.
        let mut of_flows: HashMap<&Flow, f64> = HashMap::new();
        let turns = flows.iter().enumerate().map(|(index, &flow)| {
            let Standing { of_key, of_flow } = self.standing(flow);
            let end = of_flows.entry(flow).or_insert(of_flow);
            let of_flow = *end;
            *end += 1.0 / weight(self.flows.all.get(flow));
            Turn { index, standing: Standing { of_key, of_flow }, is_within_share: true }
        });
        let mut turns: Vec<Turn> = turns.collect();
        turns.sort_by(|a, b| a.standing.of_flow.total_cmp(&b.standing.of_flow));
        let mut of_keys: HashMap<&Arc<str>, f64> = HashMap::new();
        for turn in &mut turns {
            let key = &flows[turn.index].account.key;
            let end = of_keys.entry(key).or_insert(turn.standing.of_key);
            turn.standing.of_key = *end;
            *end += 1.0 / weight(self.keys.all.get(key));
        }
        let first_key_to_end = of_keys.values().copied().fold(f64::INFINITY, f64::min);
        let mut first_flows_to_end: HashMap<&Arc<str>, f64> = HashMap::new();
        for (flow, &end) in &of_flows {
            let first = first_flows_to_end.entry(&flow.account.key).or_insert(end);
            *first = first.min(end);
        }
        for Turn { index, standing, is_within_share } in &mut turns {
            let first_flow_to_end = first_flows_to_end.get(&flows[*index].account.key);
            *is_within_share = standing.of_key < first_key_to_end
                && first_flow_to_end.is_none_or(|first_to_end| standing.of_flow < *first_to_end);
        }
        turns.sort_by_key(|turn| turn.standing);
        turns
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
        is_ahead(self.keys.all.get(key), floors.of_keys)
            || is_ahead(self.flows.all.get(flow), floors.of_flows.get(key).copied())
    }

    /// Those of `flows` that have had far more than one of `others` and run more than their share beside it: they would fill its steps.
    pub fn floods_among<'a>(
        &self,
        flows: impl Iterator<Item = &'a Flow>,
        others: impl Iterator<Item = &'a Flow>,
    ) -> HashSet<&'a Flow> {
        let others: HashSet<&Flow> = others.collect();
        let mut flows: HashSet<&Flow> = flows.collect();
        flows.retain(|flow| others.iter().any(|other| self.floods(flow, other)));
        flows
    }

    fn floods(&self, flow: &Flow, other: &Flow) -> bool {
        let is_far_ahead = |(own, other): (&Served, &Served)| (own.served - other.served) * own.weight >= MAX_FLOOD;
        self.excess(flow, other).is_some() && self.rivals(flow, other).is_some_and(is_far_ahead)
    }

    /// By how much more than `flow` with one sequence more `other` runs than its share; `None` where it does not.
    pub fn excess(&self, other: &Flow, flow: &Flow) -> Option<Excess> {
        let (rival, own) = self.rivals(other, flow)?;
        let of_peer = rival.num_running as f64 / rival.weight - (own.num_running + 1) as f64 / own.weight;
        if of_peer <= 0.0 || rival.num_running <= 1 {
            return None;
        }
        let within_key = self.flows.all.get(other).filter(|served| served.num_running > 1);
        Some(Excess { of_peer, within_key: within_key.map_or(0.0, |served| served.num_running as f64 / served.weight) })
    }

    /// Those that share what two flows want: their keys, or the flows themselves where they are of one key.
    fn rivals(&self, one: &Flow, other: &Flow) -> Option<(&Served, &Served)> {
        let (key, other_key) = (&one.account.key, &other.account.key);
        if key == other_key {
            self.flows.all.get(one).zip(self.flows.all.get(other))
        } else {
            self.keys.all.get(key).zip(self.keys.all.get(other_key))
        }
    }

    fn of(&self, flow: &Flow, read: impl Fn(&Served) -> f64) -> Standing {
        let read = |served: Option<&Served>| served.map_or(0.0, &read);
        Standing { of_key: read(self.keys.all.get(&flow.account.key)), of_flow: read(self.flows.all.get(flow)) }
    }

    fn update(&mut self, flow: &Flow, change: impl Fn(&mut Served)) {
        self.keys.update(&flow.account.key, &change);
        self.flows.update(flow, &change);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX_CREDIT: f64 = 100.0;

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
        let mut fairness = Fairness::new(Credit::Tokens(MAX_CREDIT));
        let (here, greedy) = (flow("a", 0), flow("b", 0));
        fairness.enter(&here);
        serve(&mut fairness, &greedy, 1000);
        fairness.enter(&greedy);
        let floors = fairness.floors_of([&here, &greedy].into_iter());
        assert!(fairness.is_ahead(&greedy, &floors) && !fairness.is_ahead(&here, &floors));
        assert!(fairness.standing(&here) < fairness.standing(&greedy));
        fairness.leave(&greedy);
        fairness.leave(&here);
        assert!(fairness.keys.all.is_empty() && fairness.flows.all.is_empty());
    }

    #[test]
    fn who_was_away_for_long_begins_with_little_owed() {
        let mut fairness = Fairness::new(Credit::Tokens(MAX_CREDIT));
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
        let mut fairness = Fairness::new(Credit::Tokens(MAX_CREDIT));
        fairness.enter(&flow("a", 0));
        (1..5000).for_each(|generation| serve(&mut fairness, &flow("a", generation), 10));
        assert!(fairness.flows.all.len() <= MAX_REMEMBERED + 1, "{}", fairness.flows.all.len());
    }
}
