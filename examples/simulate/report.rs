//! What a run was like: latency, and who got how much.

use std::collections::{BTreeMap, HashMap};
use std::fmt::{self, Display};

use lorry::engine::fairness::Priority;
use serde::Serialize;

use crate::fleet::Run;
use crate::replica::{Outcome, Refusal};
use crate::trace::Arrival;

/// Of the adapters, the share that is said to be much asked for.
const MOST_ASKED: f64 = 0.01;

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    pub replicas: usize,
    pub seconds: f64,
    pub requests: usize,
    pub refused_overloaded: usize,
    pub refused_out_of_memory: usize,
    pub refused_too_long: usize,
    pub output_tok_s: f64,
    /// Of the prompts' tokens, those that were found computed.
    pub cached: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inside: Option<Inside>,
    pub groups: Vec<Group>,
}

/// What only a simulation knows of replicas.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Inside {
    /// Of their time, what they computed in.
    pub busy: f64,
    pub rows_per_step: f64,
    /// Of the requests for adapters, those that waited for a load.
    pub cold: f64,
    pub loads: usize,
    pub evictions: usize,
    pub preemptions: usize,
}

/// Requests that have something in common. Times in seconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Group {
    pub name: String,
    /// Those that were served.
    pub requests: usize,
    pub refused: usize,
    /// Of prompts and outputs.
    pub tok_s: f64,
    pub ttft: Percentiles,
    pub tpot: Percentiles,
    /// Of each, the longest time between two tokens.
    pub gap: Percentiles,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Percentiles {
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
}

impl Report {
    pub fn new(arrivals: &[Arrival], run: &Run) -> Self {
        let Run { outcomes, totals, num_replicas, seconds, .. } = run;
        let all: Vec<_> = arrivals.iter().zip(outcomes).collect();
        let refused = |why: Refusal| outcomes.iter().filter(|outcome| outcome.refused == Some(why)).count();
        let (mut num_adapted, mut num_cold, mut num_prompt_tokens, mut num_cached) = (0, 0, 0, 0);
        for (arrival, outcome) in all.iter().filter(|(_, outcome)| outcome.refused.is_none()) {
            num_adapted += usize::from(arrival.adapter.is_some());
            num_cold += usize::from(outcome.is_cold);
            num_prompt_tokens += arrival.prompt_tokens;
            num_cached += outcome.num_cached_tokens;
        }
        let share = |part: usize, whole: usize| part as f64 / whole.max(1) as f64;
        Self {
            replicas: *num_replicas,
            seconds: *seconds,
            requests: arrivals.len(),
            refused_overloaded: refused(Refusal::Overloaded),
            refused_out_of_memory: refused(Refusal::OutOfMemory),
            refused_too_long: refused(Refusal::TooLong),
            output_tok_s: outcomes.iter().map(|outcome| outcome.num_tokens).sum::<usize>() as f64 / seconds,
            cached: share(num_cached, num_prompt_tokens),
            inside: totals.map(|totals| Inside {
                busy: totals.busy_seconds / (seconds * *num_replicas as f64),
                rows_per_step: totals.num_rows / totals.num_steps.max(1) as f64,
                cold: share(num_cold, num_adapted),
                loads: totals.num_loads,
                evictions: totals.num_evictions,
                preemptions: totals.num_preempted,
            }),
            groups: groups(&all, *seconds),
        }
    }
}

/// All, then by priority, by key, and by how much an adapter is asked for, each where there are several.
fn groups(all: &[(&Arrival, &Outcome)], seconds: f64) -> Vec<Group> {
    let mut asked: HashMap<&str, usize> = HashMap::new();
    for adapter in all.iter().filter_map(|(arrival, _)| arrival.adapter.as_deref()) {
        *asked.entry(adapter).or_default() += 1;
    }
    let mut counts: Vec<usize> = asked.values().copied().collect();
    counts.sort_unstable_by(|a, b| b.cmp(a));
    let least = counts.get((counts.len() as f64 * MOST_ASKED) as usize).copied().unwrap_or(0);
    let mut members: BTreeMap<(u8, String), Vec<(&Arrival, &Outcome)>> = BTreeMap::new();
    for &(arrival, outcome) in all {
        let priority = arrival.account.priority;
        let place = Priority::ALL.iter().position(|other| *other == priority).unwrap_or(0) as u8;
        let key = format!("key {:?}, weight {}", arrival.account.key, arrival.account.weight);
        let adapters = match arrival.adapter.as_deref().map(|adapter| asked[adapter]) {
            None => "the base",
            Some(count) if count > least => "adapters, the most asked for",
            Some(_) => "adapters, the others",
        };
        for (kind, name) in [(0, "all"), (1 + place, priority.name()), (4, &key), (5, adapters)] {
            members.entry((kind, name.to_owned())).or_default().push((arrival, outcome));
        }
    }
    let kinds: Vec<u8> = members.keys().map(|(kind, _)| if (1..4).contains(kind) { 1 } else { *kind }).collect();
    let is_alone = |kind: u8| {
        let kind = if (1..4).contains(&kind) { 1 } else { kind };
        kind > 0 && kinds.iter().filter(|other| **other == kind).count() == 1
    };
    let several = members.into_iter().filter(|((kind, _), _)| !is_alone(*kind));
    several.map(|((_, name), members)| Group::new(name, &members, seconds)).collect()
}

impl Group {
    fn new(name: String, members: &[(&Arrival, &Outcome)], seconds: f64) -> Self {
        let served: Vec<_> = members.iter().filter(|(_, outcome)| outcome.refused.is_none()).collect();
        let ttft = served.iter().map(|(arrival, outcome)| outcome.first_token - arrival.at).collect();
        let long = || served.iter().map(|(_, outcome)| outcome).filter(|outcome| outcome.num_tokens > 1);
        let tpot = long().map(|outcome| (outcome.end - outcome.first_token) / (outcome.num_tokens - 1) as f64);
        let num_tokens: usize =
            served.iter().map(|(arrival, outcome)| arrival.prompt_tokens + outcome.num_tokens).sum();
        Self {
            name,
            requests: served.len(),
            refused: members.len() - served.len(),
            tok_s: num_tokens as f64 / seconds,
            ttft: Percentiles::of(ttft),
            tpot: Percentiles::of(tpot.collect()),
            gap: Percentiles::of(long().map(|outcome| outcome.longest_gap).collect()),
        }
    }
}

impl Percentiles {
    fn of(mut times: Vec<f64>) -> Self {
        times.sort_unstable_by(f64::total_cmp);
        let at = |share: f64| times.get((times.len() as f64 * share) as usize).copied().unwrap_or(0.0);
        Self { p50: at(0.5), p90: at(0.9), p99: at(0.99) }
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { replicas, seconds, requests, output_tok_s, .. } = self;
        let percent = |share: f64| format!("{:.1} %", 100.0 * share);
        writeln!(f, "{requests} requests to {replicas} replicas, the last one's end after {seconds:.1} s")?;
        writeln!(
            f,
            "refused: {} with the queue full, {} for want of memory for adapters, {} too long",
            self.refused_overloaded, self.refused_out_of_memory, self.refused_too_long
        )?;
        writeln!(f, "{output_tok_s:.0} tok/s of output; {} of the prompts' tokens were cached", percent(self.cached))?;
        if let Some(Inside { busy, rows_per_step, cold, loads, evictions, preemptions }) = &self.inside {
            let (busy, cold) = (percent(*busy), percent(*cold));
            writeln!(f, "replicas busy {busy}, {rows_per_step:.1} rows a step, {preemptions} preempted")?;
            writeln!(f, "{cold} waited for their adapter: {loads} loads, {evictions} made room")?;
        }
        writeln!(f)?;
        let (ttft, tpot, gap) = ("TTFT p50, p90, p99, s", "TPOT p50, p90, p99, ms", "longest gap, ms");
        writeln!(f, "{:<32} {:>9} {:>8} {:>9}  {ttft:>24}  {tpot:>24}  {gap:>24}", "", "requests", "refused", "tok/s")?;
        for Group { name, requests, refused, tok_s, ttft, tpot, gap } in &self.groups {
            let times = |Percentiles { p50, p90, p99 }: &Percentiles, unit: f64, digits: usize| {
                format!("{:>8.digits$}{:>8.digits$}{:>8.digits$}", p50 * unit, p90 * unit, p99 * unit)
            };
            let (ttft, tpot, gap) = (times(ttft, 1.0, 2), times(tpot, 1e3, 0), times(gap, 1e3, 0));
            writeln!(f, "{name:<32} {requests:>9} {refused:>8} {tok_s:>9.0}  {ttft}  {tpot}  {gap}")?;
        }
        Ok(())
    }
}
