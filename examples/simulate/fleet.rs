//! Replicas behind a router, and the clock of all of them.

use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, HashMap};
use std::sync::Arc;

use clap::ValueEnum;

use crate::replica::{Happening, Hardware, Outcome, Replica, Totals, World, adapter};
use crate::trace::Arrival;

/// Who of the replicas gets a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Router {
    /// The adapter's own, unless that has twice the mean of requests under way; then the adapter's next. Requests for the base
    /// go where least is under way. As deploy/haproxy
    Hash,
    /// Where least is under way, whatever the adapter
    LeastBusy,
}

/// `hash-balance-factor` of deploy/haproxy.
pub const BALANCE_FACTOR: f64 = 2.0;

#[derive(Debug, Clone, Copy, PartialEq)]
struct Event {
    at: f64,
    /// Of two at one time, the one that was planned first.
    order: u64,
    replica: usize,
    happening: Happening,
}

impl Eq for Event {}

impl Ord for Event {
    fn cmp(&self, other: &Self) -> Ordering {
        self.at.total_cmp(&other.at).then(self.order.cmp(&other.order))
    }
}

impl PartialOrd for Event {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// What came of a trace.
pub struct Run {
    /// Of each arrival.
    pub outcomes: Vec<Outcome>,
    /// Over all replicas; `None` where one cannot look into them.
    pub totals: Option<Totals>,
    pub num_replicas: usize,
    /// When the last request ended.
    pub seconds: f64,
    /// Whether every replica has got back all that requests held.
    pub is_clean: bool,
}

/// Serves a trace to its end.
pub fn run(arrivals: &[Arrival], hardware: &Hardware, num_replicas: usize, router: Router) -> Run {
    let mut indices: HashMap<Arc<str>, usize> = HashMap::new();
    let mut adapters = Vec::new();
    let mut index_of = |name: &Arc<str>| {
        *indices.entry(name.clone()).or_insert_with(|| {
            adapters.push(adapter(name));
            adapters.len() - 1
        })
    };
    let adapter_of: Vec<_> = arrivals.iter().map(|arrival| arrival.adapter.as_ref().map(&mut index_of)).collect();
    let mut outcomes = vec![Outcome::default(); arrivals.len()];
    let mut world = World { hardware, arrivals, adapter_of: &adapter_of, adapters: &adapters, outcomes: &mut outcomes };
    let mut replicas: Vec<_> = (0..num_replicas).map(|_| Replica::new(hardware)).collect();
    // The first by their names, as a server does it.
    let mut by_name: Vec<usize> = (0..adapters.len()).collect();
    by_name.sort_by_key(|adapter| &adapters[*adapter].name);
    replicas.iter_mut().for_each(|replica| replica.fill(&by_name, hardware));
    let mut events = BinaryHeap::new();
    let (mut order, mut next, mut seconds) = (0, 0, 0.0);
    loop {
        let arrives = arrivals.get(next).map(|arrival| arrival.at);
        let (now, index) = match (arrives, events.peek()) {
            (None, None) => break,
            (Some(at), event) if event.is_none_or(|Reverse(event): &Reverse<Event>| at <= event.at) => {
                let index = route(router, adapter_of[next], &replicas);
                replicas[index].arrive(at, next, &mut world);
                next += 1;
                (at, index)
            }
            _ => {
                let Some(Reverse(Event { at, replica, happening, .. })) = events.pop() else { break };
                match happening {
                    Happening::Step => replicas[replica].end_step(at, &mut world),
                    Happening::Load => replicas[replica].end_load(at, &world),
                }
                (at, replica)
            }
        };
        seconds = now;
        for (at, happening) in replicas[index].begin(now, &mut world) {
            events.push(Reverse(Event { at, order, replica: index, happening }));
            order += 1;
        }
    }
    let mut totals = Totals::default();
    replicas.iter().for_each(|replica| totals.add(&replica.totals));
    let is_clean = replicas.iter().all(Replica::is_clean);
    Run { outcomes, totals: Some(totals), num_replicas, seconds, is_clean }
}

fn route(router: Router, adapter: Option<usize>, replicas: &[Replica]) -> usize {
    let num_in_flight = |index: &usize| replicas[*index].num_in_flight();
    let all = 0..replicas.len();
    match (router, adapter) {
        (Router::Hash, Some(adapter)) => {
            let under_way: usize = replicas.iter().map(Replica::num_in_flight).sum();
            // With the request itself, as HAProxy counts.
            let most = (BALANCE_FACTOR * (under_way + 1) as f64 / replicas.len() as f64).ceil() as usize;
            let place = |index: &usize| crate::hash(((adapter as u64) << 32) | *index as u64);
            let free = all.clone().filter(|index| num_in_flight(index) < most).max_by_key(place);
            free.or_else(|| all.max_by_key(place)).unwrap_or(0)
        }
        _ => all.min_by_key(|index| (num_in_flight(index), *index)).unwrap_or(0),
    }
}
