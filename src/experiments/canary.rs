//! Whether a canary keeps to its bounds: counted over its last requests, in memory, so that a full disk blinds nobody.

use std::collections::VecDeque;

use super::settings::Bounds;
use super::statistics::percentile;
use super::store::PastRequest;
use super::vote::{Outcome, VoteKind};

/// Requests that are looked back at.
pub const WINDOW: usize = 1000;

/// Kept across restarts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CanaryStatus {
    /// Unix milliseconds from which requests count.
    pub since_ms: i64,
    pub rolled_back: Option<RollBack>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RollBack {
    /// Unix milliseconds.
    pub at_ms: i64,
    pub cause: String,
}

impl CanaryStatus {
    pub fn begin(now_ms: i64) -> Self {
        Self { since_ms: now_ms, rolled_back: None }
    }
}

#[derive(Debug)]
pub struct Monitor {
    bounds: Bounds,
    /// Of one generation.
    canary: VecDeque<PastRequest>,
    /// Times to first token of the other arms, in milliseconds.
    others: VecDeque<f64>,
    generation: Option<String>,
    replaced: Option<String>,
}

impl Monitor {
    pub fn new(bounds: Bounds) -> Self {
        Self { bounds, canary: VecDeque::new(), others: VecDeque::new(), generation: None, replaced: None }
    }

    pub fn observe_canary(&mut self, request: PastRequest) {
        // What failed before it had its weights says nothing of a swap.
        if request.generation.is_some() && request.generation != self.generation {
            // Requests that began before a swap may end after it.
            if self.replaced.is_some() && request.generation == self.replaced {
                return;
            }
            self.replaced = std::mem::replace(&mut self.generation, request.generation.clone());
            if self.replaced.is_some() {
                self.canary.clear();
            }
        }
        push(&mut self.canary, request);
    }

    pub fn observe_other(&mut self, ttft_ms: Option<f64>) {
        if let Some(ttft_ms) = ttft_ms {
            push(&mut self.others, ttft_ms);
        }
    }

    pub fn observe_vote(&mut self, id: &str, kind: VoteKind) {
        if kind == VoteKind::Winner {
            return;
        }
        if let Some(request) = self.canary.iter_mut().rfind(|request| request.id == id) {
            request.shown = true;
            if kind != VoteKind::View {
                request.accepted = kind == VoteKind::Accepted;
            }
        }
    }

    /// The first bound that does not hold, in words.
    pub fn broken_bound(&self) -> Option<String> {
        self.too_many_errors().or_else(|| self.too_few_accepted()).or_else(|| self.too_slow())
    }

    fn too_many_errors(&self) -> Option<String> {
        let bound = self.bounds.max_error_rate?;
        let ended = self.canary.iter().filter(|request| request.outcome != Outcome::Cancelled).count();
        let failed = self.canary.iter().filter(|request| request.outcome == Outcome::Failed).count();
        let rate = self.rate(failed, ended)?;
        (rate > bound).then(|| format!("{failed} of {ended} requests failed, more than max_error_rate = {bound}"))
    }

    fn too_few_accepted(&self) -> Option<String> {
        let bound = self.bounds.min_acceptance?;
        let shown = self.canary.iter().filter(|request| request.shown).count();
        let accepted = self.canary.iter().filter(|request| request.accepted).count();
        let rate = self.rate(accepted, shown)?;
        (rate < bound).then(|| format!("{accepted} of {shown} were accepted, fewer than min_acceptance = {bound}"))
    }

    fn too_slow(&self) -> Option<String> {
        let bound = self.bounds.max_ttft_p95_ratio?;
        let mut canary: Vec<f64> = self.canary.iter().filter_map(|request| request.ttft_ms).collect();
        let mut others: Vec<f64> = self.others.iter().copied().collect();
        if canary.len().min(others.len()) < self.bounds.min_samples {
            return None;
        }
        let (canary, others) = (percentile(&mut canary, 95.0)?, percentile(&mut others, 95.0)?);
        (canary > bound * others).then(|| {
            format!("its p95 TTFT is {canary:.0} ms against {others:.0} ms, more than max_ttft_p95_ratio = {bound}")
        })
    }

    fn rate(&self, part: usize, all: usize) -> Option<f64> {
        (all >= self.bounds.min_samples).then(|| part as f64 / all as f64)
    }
}

fn push<T>(window: &mut VecDeque<T>, item: T) {
    if window.len() == WINDOW {
        window.pop_front();
    }
    window.push_back(item);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn monitor(bounds: &str) -> Monitor {
        Monitor::new(toml::from_str(&format!("min_samples = 4\n{bounds}")).unwrap())
    }

    fn request(id: usize, outcome: Outcome, ttft_ms: f64) -> PastRequest {
        let generation = Some("v1".to_owned());
        PastRequest { id: id.to_string(), generation, outcome, ttft_ms: Some(ttft_ms), shown: false, accepted: false }
    }

    #[test]
    fn errors_count_against_requests_that_ended() {
        let mut monitor = monitor("max_error_rate = 0.3");
        for id in 0..3 {
            monitor.observe_canary(request(id, Outcome::Failed, 1.0));
            monitor.observe_canary(request(id, Outcome::Cancelled, 1.0));
        }
        assert_eq!(monitor.broken_bound(), None, "three samples prove nothing");
        monitor.observe_canary(request(9, Outcome::Completed, 1.0));
        let cause = monitor.broken_bound().unwrap();
        assert!(cause.contains("3 of 4") && cause.contains("max_error_rate = 0.3"), "{cause}");
        for id in 10..16 {
            monitor.observe_canary(request(id, Outcome::Completed, 1.0));
        }
        assert_eq!(monitor.broken_bound(), None, "3 of 10 is not more than 0.3");
    }

    #[test]
    fn acceptance_counts_what_was_shown_by_the_latest_vote() {
        let mut monitor = monitor("min_acceptance = 0.5");
        for id in 0..8 {
            monitor.observe_canary(request(id, Outcome::Completed, 1.0));
        }
        for id in ["0", "1", "2", "3"] {
            monitor.observe_vote(id, VoteKind::Accepted);
            monitor.observe_vote(id, VoteKind::View);
        }
        monitor.observe_vote("0", VoteKind::Rejected);
        monitor.observe_vote("1", VoteKind::Edited);
        monitor.observe_vote("unknown", VoteKind::Rejected);
        monitor.observe_vote("5", VoteKind::Winner);
        assert_eq!(monitor.broken_bound(), None);
        monitor.observe_vote("4", VoteKind::View);
        assert!(monitor.broken_bound().unwrap().contains("2 of 5"));
    }

    #[test]
    fn a_slow_canary_is_measured_against_the_other_arms() {
        let mut monitor = monitor("max_ttft_p95_ratio = 2.0");
        for id in 0..4 {
            monitor.observe_canary(request(id, Outcome::Completed, 201.0));
            assert_eq!(monitor.broken_bound(), None, "nothing to compare with yet");
        }
        (0..4).for_each(|_| monitor.observe_other(Some(100.0)));
        assert!(monitor.broken_bound().unwrap().contains("201 ms against 100 ms"));
        monitor.observe_other(Some(101.0));
        assert_eq!(monitor.broken_bound(), None);
    }

    #[test]
    fn a_new_generation_begins_anew_and_stragglers_of_the_old_one_do_not_count() {
        let mut monitor = monitor("max_error_rate = 0.3");
        let of = |generation: &str| PastRequest {
            generation: Some(generation.to_owned()),
            ..request(0, Outcome::Failed, 1.0)
        };
        (0..3).for_each(|_| monitor.observe_canary(of("v1")));
        monitor.observe_canary(of("v2"));
        monitor.observe_canary(of("v1"));
        assert_eq!((monitor.canary.len(), monitor.broken_bound()), (1, None));
    }

    #[test]
    fn a_run_without_weights_ends_no_generation_and_counts_with_the_one_that_is_watched() {
        let mut monitor = monitor("max_error_rate = 0.5");
        let unknown = |id| PastRequest { generation: None, ..request(id, Outcome::Failed, 1.0) };
        // Also before the first that had any.
        monitor.observe_canary(unknown(0));
        (1..4).for_each(|id| monitor.observe_canary(request(id, Outcome::Completed, 1.0)));
        monitor.observe_canary(unknown(4));
        (5..7).for_each(|id| monitor.observe_canary(request(id, Outcome::Completed, 1.0)));
        assert_eq!((monitor.canary.len(), monitor.broken_bound()), (7, None));
        (7..11).for_each(|id| monitor.observe_canary(unknown(id)));
        assert!(monitor.broken_bound().unwrap().contains("6 of 11"));
    }

    #[test]
    fn only_the_last_requests_count() {
        let mut monitor = monitor("max_error_rate = 0.3");
        (0..WINDOW).for_each(|id| monitor.observe_canary(request(id, Outcome::Failed, 1.0)));
        (0..WINDOW).for_each(|id| monitor.observe_canary(request(id, Outcome::Completed, 1.0)));
        assert_eq!((monitor.canary.len(), monitor.broken_bound()), (WINDOW, None));
    }
}
