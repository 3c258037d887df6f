//! Whether a canary keeps to its bounds: counted over its last requests, in memory, so that a full disk blinds nobody.

use std::collections::VecDeque;

use super::settings::Bounds;
use super::statistics::{percentile, wilson};
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

/// What users made of a canary, against the other arms.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// In words, as is the other.
    Kept(String),
    Worse(String),
}

#[derive(Debug)]
pub struct Monitor {
    bounds: Bounds,
    /// Of one generation.
    canary: VecDeque<PastRequest>,
    /// Of the other arms that serve, together.
    others: VecDeque<PastRequest>,
    generation: Option<String>,
    replaced: Option<String>,
}

impl Monitor {
    pub fn new(bounds: Bounds) -> Self {
        Self { bounds, canary: VecDeque::new(), others: VecDeque::new(), generation: None, replaced: None }
    }

    /// What the canary served last.
    pub fn generation(&self) -> Option<&str> {
        self.generation.as_deref()
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

    pub fn observe_other(&mut self, request: PastRequest) {
        push(&mut self.others, request);
    }

    pub fn observe_vote(&mut self, id: &str, kind: VoteKind) {
        if kind == VoteKind::Winner {
            return;
        }
        if let Some(request) = self.canary.iter_mut().chain(&mut self.others).rfind(|request| request.id == id) {
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

    /// Once `min_shown` of its requests, and enough of the others, were shown to users; the canary is worse if the 95 %
    /// interval of its acceptance lies below that of the others.
    pub fn verdict(&self, min_shown: usize) -> Option<Verdict> {
        let (accepted, shown) = accepted_of_shown(&self.canary);
        let (accepted_of_others, shown_of_others) = accepted_of_shown(&self.others);
        if shown < min_shown || shown_of_others < self.bounds.min_samples {
            return None;
        }
        let rate = |accepted: usize, shown: usize| wilson(accepted as u64, shown as u64);
        let is_worse = rate(accepted, shown).high < rate(accepted_of_others, shown_of_others).low;
        let of = format!("{accepted} of {shown} were accepted, against {accepted_of_others} of {shown_of_others}");
        Some(match is_worse {
            true => Verdict::Worse(format!("{of}: the intervals lie apart")),
            false => Verdict::Kept(of),
        })
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
        let (accepted, shown) = accepted_of_shown(&self.canary);
        let rate = self.rate(accepted, shown)?;
        (rate < bound).then(|| format!("{accepted} of {shown} were accepted, fewer than min_acceptance = {bound}"))
    }

    fn too_slow(&self) -> Option<String> {
        let bound = self.bounds.max_ttft_p95_ratio?;
        let ttft_ms = |requests: &VecDeque<PastRequest>| -> Vec<f64> {
            requests.iter().filter_map(|request| request.ttft_ms).collect()
        };
        let (mut canary, mut others) = (ttft_ms(&self.canary), ttft_ms(&self.others));
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

fn accepted_of_shown(requests: &VecDeque<PastRequest>) -> (usize, usize) {
    let count = |is_so: fn(&PastRequest) -> bool| requests.iter().filter(|request| is_so(request)).count();
    (count(|request| request.accepted), count(|request| request.shown))
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
        (0..4).for_each(|id| monitor.observe_other(request(id, Outcome::Completed, 100.0)));
        assert!(monitor.broken_bound().unwrap().contains("201 ms against 100 ms"));
        monitor.observe_other(request(4, Outcome::Completed, 101.0));
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

    /// Of so many requests each, all shown, so many accepted.
    fn judged(canary: (usize, usize), others: (usize, usize)) -> Monitor {
        let mut monitor = monitor("");
        for id in 0..canary.1 {
            monitor.observe_canary(request(id, Outcome::Completed, 1.0));
        }
        for id in 0..others.1 {
            monitor.observe_other(request(1000 + id, Outcome::Completed, 1.0));
        }
        for (first, (accepted, shown)) in [(0, canary), (1000, others)] {
            for id in 0..shown {
                let kind = if id < accepted { VoteKind::Accepted } else { VoteKind::View };
                monitor.observe_vote(&(first + id).to_string(), kind);
            }
        }
        monitor
    }

    #[test]
    fn users_judge_a_canary_once_enough_was_shown_of_it_and_of_the_others() {
        for (canary, others) in [((29, 29), (20, 40)), ((20, 30), (3, 3))] {
            assert_eq!(judged(canary, others).verdict(30), None, "{canary:?} {others:?}");
        }
        for (canary, others) in [((15, 30), (20, 40)), ((10, 30), (20, 40)), ((30, 30), (0, 40))] {
            let verdict = judged(canary, others).verdict(30);
            assert!(matches!(verdict, Some(Verdict::Kept(_))), "{canary:?} {others:?}: {verdict:?}");
        }
        let Some(Verdict::Worse(cause)) = judged((3, 30), (30, 40)).verdict(30) else { panic!("it is not worse") };
        assert!(cause.contains("3 of 30 were accepted, against 30 of 40"), "{cause}");
    }

    #[test]
    fn only_the_last_requests_count() {
        let mut monitor = monitor("max_error_rate = 0.3");
        (0..WINDOW).for_each(|id| monitor.observe_canary(request(id, Outcome::Failed, 1.0)));
        (0..WINDOW).for_each(|id| monitor.observe_canary(request(id, Outcome::Completed, 1.0)));
        assert_eq!((monitor.canary.len(), monitor.broken_bound()), (WINDOW, None));
    }
}
