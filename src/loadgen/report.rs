//! What came of an attack: percentiles, failures, and how much of the load was served as it was to be.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use super::MAX_DURATION;
use super::arrivals::Spread;
use super::client::{Failure, Reply};
use crate::columns::columns;

/// Of the values in a histogram.
const SIGNIFICANT_DIGITS: u8 = 3;
/// Of what is offered at a rate, so much is served within the objective for the rate to be sustained.
const SUSTAINED_SHARE: f64 = 0.95;
/// What the machine's own clock and scheduler may cost.
const MAX_LAG_MS: f64 = 20.0;

/// The service-level objective of one reply, in ms; what is absent holds always.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, clap::Args)]
pub struct Objective {
    /// Objective: most ms from the planned arrival to the first token.
    #[arg(long = "slo-ttft-ms", value_name = "MS", value_parser = super::positive)]
    pub ttft_ms: Option<f64>,
    /// Objective: most ms for each token after the first, over one reply.
    #[arg(long = "slo-tpot-ms", value_name = "MS", value_parser = super::positive)]
    pub tpot_ms: Option<f64>,
    /// Objective: most ms from the planned arrival to the end of the reply.
    #[arg(long = "slo-e2e-ms", value_name = "MS", value_parser = super::positive)]
    pub e2e_ms: Option<f64>,
}

/// What became of one request.
#[derive(Debug)]
pub struct Outcome {
    /// When it was to arrive.
    pub at: Duration,
    /// From then until it was sent.
    pub lag: Duration,
    pub result: Result<Reply, Missed>,
}

#[derive(Debug, thiserror::Error)]
pub enum Missed {
    #[error("not sent, because as many as --max-in-flight allows were under way")]
    Dropped,
    #[error(transparent)]
    Failed(Failure),
}

impl Missed {
    pub fn kind(&self) -> String {
        match self {
            Self::Dropped => "dropped".to_owned(),
            Self::Failed(failure) => failure.kind(),
        }
    }
}

/// Times of a reply, in ms.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Times {
    /// To the first token; to the end where there was none.
    pub ttft: f64,
    /// Per token after the first; none where there was no second.
    pub tpot: Option<f64>,
    pub e2e: f64,
}

impl Times {
    pub fn of(reply: &Reply) -> Self {
        let first = reply.texts.first().copied().unwrap_or(reply.end);
        let last = reply.texts.last().copied().unwrap_or(reply.end);
        let num_gaps = reply.num_tokens.saturating_sub(1);
        let tpot = (num_gaps > 0).then(|| millis(last.saturating_sub(first)) / num_gaps as f64);
        Self { ttft: millis(first), tpot, e2e: millis(reply.end) }
    }

    fn meets(&self, objective: &Objective) -> bool {
        let within = |time: Option<f64>, limit: Option<f64>| time.zip(limit).is_none_or(|(time, limit)| time <= limit);
        within(Some(self.ttft), objective.ttft_ms)
            && within(self.tpot, objective.tpot_ms)
            && within(Some(self.e2e), objective.e2e_ms)
    }
}

pub fn millis(time: Duration) -> f64 {
    time.as_micros() as f64 / 1e3
}

/// Where the load came from.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Load {
    Rate { rate: f64, arrivals: Spread, seed: u64 },
    Trace { trace: String, speed: f64 },
}

/// Times are in ms, from the planned arrival; what is per second, is over `elapsed_s`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    #[serde(flatten)]
    pub load: Load,
    /// In which requests arrived.
    pub duration_s: f64,
    /// Until the last reply had ended.
    pub elapsed_s: f64,
    pub num_requests: u64,
    pub num_succeeded: u64,
    /// Not sent, because `--max-in-flight` were under way.
    pub num_dropped: u64,
    /// Requests that had been sent before, with the same prompt.
    pub num_repeated: u64,
    pub max_in_flight: usize,
    /// By status, or `connection`, `stream`, `timeout`.
    pub errors: BTreeMap<String, Errors>,
    pub ttft_ms: Option<Percentiles>,
    /// A reply's mean time per token after the first.
    pub tpot_ms: Option<Percentiles>,
    /// From one event with text to the next.
    pub itl_ms: Option<Percentiles>,
    pub e2e_ms: Option<Percentiles>,
    pub request_s: f64,
    pub prompt_tok_s: f64,
    pub output_tok_s: f64,
    pub objective: Objective,
    /// Replies that were whole and met the objective.
    pub goodput_request_s: f64,
    /// Of all requests, those that were dropped or failed among them; 1 where none arrived.
    pub good_share: f64,
    /// How late this program sent a request at most; where it is much, the machine was too busy to measure.
    pub max_lag_ms: f64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Errors {
    pub count: u64,
    /// The first one's message.
    pub first: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Percentiles {
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub max: f64,
}

/// Of many times.
#[derive(Debug)]
struct Timings(Histogram<u64>);

impl Default for Timings {
    fn default() -> Self {
        let histogram = Histogram::new_with_max(MAX_DURATION.as_micros() as u64, SIGNIFICANT_DIGITS);
        Self(histogram.expect("these bounds are allowed"))
    }
}

impl Timings {
    fn add(&mut self, millis: f64) {
        // In microseconds.
        self.0.saturating_record((millis * 1e3).round() as u64);
    }

    fn percentiles(&self) -> Option<Percentiles> {
        let at = |quantile| self.0.value_at_quantile(quantile) as f64 / 1e3;
        (!self.0.is_empty()).then(|| Percentiles { p50: at(0.5), p90: at(0.9), p99: at(0.99), max: at(1.0) })
    }
}

/// What a report is made of, outcome by outcome.
#[derive(Debug, Default)]
pub struct Tally {
    objective: Objective,
    ttft: Timings,
    tpot: Timings,
    itl: Timings,
    e2e: Timings,
    num_requests: u64,
    num_succeeded: u64,
    num_dropped: u64,
    num_good: u64,
    prompt_tokens: u64,
    output_tokens: u64,
    errors: BTreeMap<String, Errors>,
    max_lag: Duration,
}

/// What no outcome tells.
#[derive(Debug)]
pub struct Frame {
    pub load: Load,
    pub duration: Duration,
    pub elapsed: Duration,
    pub num_repeated: u64,
    pub max_in_flight: usize,
}

impl Tally {
    pub fn new(objective: Objective) -> Self {
        Self { objective, ..Self::default() }
    }

    pub fn add(&mut self, outcome: &Outcome) {
        self.num_requests += 1;
        self.max_lag = self.max_lag.max(outcome.lag);
        match &outcome.result {
            Ok(reply) => self.add_reply(reply),
            Err(Missed::Dropped) => self.num_dropped += 1,
            Err(Missed::Failed(failure)) => {
                let new = || Errors { count: 0, first: failure.to_string() };
                self.errors.entry(failure.kind()).or_insert_with(new).count += 1;
            }
        }
    }

    fn add_reply(&mut self, reply: &Reply) {
        let times = Times::of(reply);
        self.num_succeeded += 1;
        self.num_good += u64::from(times.meets(&self.objective));
        self.prompt_tokens += reply.prompt_tokens;
        self.output_tokens += reply.num_tokens;
        self.ttft.add(times.ttft);
        self.e2e.add(times.e2e);
        times.tpot.into_iter().for_each(|tpot| self.tpot.add(tpot));
        let gaps = reply.texts.windows(2).map(|pair| millis(pair[1] - pair[0]));
        gaps.for_each(|gap| self.itl.add(gap));
    }

    pub fn report(self, frame: Frame) -> Report {
        let elapsed_s = frame.elapsed.as_secs_f64();
        let per_second = |count: u64| if elapsed_s > 0.0 { count as f64 / elapsed_s } else { 0.0 };
        Report {
            load: frame.load,
            duration_s: frame.duration.as_secs_f64(),
            elapsed_s,
            num_requests: self.num_requests,
            num_succeeded: self.num_succeeded,
            num_dropped: self.num_dropped,
            num_repeated: frame.num_repeated,
            max_in_flight: frame.max_in_flight,
            errors: self.errors,
            ttft_ms: self.ttft.percentiles(),
            tpot_ms: self.tpot.percentiles(),
            itl_ms: self.itl.percentiles(),
            e2e_ms: self.e2e.percentiles(),
            request_s: per_second(self.num_succeeded),
            prompt_tok_s: per_second(self.prompt_tokens),
            output_tok_s: per_second(self.output_tokens),
            objective: self.objective,
            goodput_request_s: per_second(self.num_good),
            good_share: if self.num_requests > 0 { self.num_good as f64 / self.num_requests as f64 } else { 1.0 },
            max_lag_ms: millis(self.max_lag),
        }
    }
}

/// Up to where the server keeps up.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Knee {
    /// The highest rate that was sustained, with all below it; none where the lowest was not.
    pub knee_request_s: Option<f64>,
    /// Whether a higher rate was tried, and not sustained.
    pub is_reached: bool,
    pub sustained_share: f64,
}

impl Knee {
    /// `None` where reports are not of several rates.
    pub fn of(reports: &[Report]) -> Option<Self> {
        if reports.len() < 2 {
            return None;
        }
        let rate = |report: &Report| match report.load {
            Load::Rate { rate, .. } => Some((rate, report.good_share >= SUSTAINED_SHARE)),
            Load::Trace { .. } => None,
        };
        let mut rates: Vec<(f64, bool)> = reports.iter().map(rate).collect::<Option<_>>()?;
        rates.sort_by(|a, b| a.0.total_cmp(&b.0));
        let num_sustained = rates.iter().take_while(|(_, is_sustained)| *is_sustained).count();
        Some(Self {
            knee_request_s: rates[..num_sustained].last().map(|&(rate, _)| rate),
            is_reached: num_sustained < rates.len(),
            sustained_share: SUSTAINED_SHARE,
        })
    }
}

/// A table, what went wrong, and the knee.
pub fn summary(reports: &[Report]) -> String {
    let knee = Knee::of(reports).map(|knee| {
        let share = knee.sustained_share * 100.0;
        match knee {
            Knee { knee_request_s: None, .. } => {
                format!("knee: below all rates; less than {share} % were good at the lowest")
            }
            Knee { knee_request_s: Some(rate), is_reached: true, .. } => {
                format!("knee: {rate}/s, the last with {share} % good")
            }
            Knee { knee_request_s: Some(rate), .. } => {
                format!("knee: {rate}/s or more; {share} % were good at every rate")
            }
        }
    });
    let remarks = reports.iter().flat_map(remarks).chain(knee);
    remarks.fold(table(reports), |text, remark| text + &remark + "\n")
}

/// What the table does not say.
fn remarks(report: &Report) -> Vec<String> {
    let name = name(&report.load);
    let mut remarks: Vec<_> = report
        .errors
        .iter()
        .map(|(kind, errors)| format!("{name}: {} × {kind}: {}", errors.count, errors.first))
        .collect();
    if report.num_dropped > 0 {
        remarks
            .push(format!("{name}: {} not sent, as many as --max-in-flight allows were under way", report.num_dropped));
    }
    if report.num_repeated > 0 {
        remarks.push(format!(
            "{name}: {} had been sent before, and may be cached: the file is too short",
            report.num_repeated
        ));
    }
    if report.max_lag_ms > MAX_LAG_MS {
        let late = report.max_lag_ms.round();
        remarks.push(format!(
            "{name}: requests were sent up to {late} ms late, this machine was too busy; their times hold it"
        ));
    }
    remarks
}

fn table(reports: &[Report]) -> String {
    let titles = [
        "load", "sent", "ok", "failed", "dropped", "TTFT p50", "p90", "p99", "TPOT p50", "p90", "p99", "e2e p50",
        "p90", "p99", "tok/s", "goodput", "good %",
    ];
    let rows: Vec<Vec<String>> = reports.iter().map(row).collect();
    columns(&titles, &rows, 1)
}

fn name(load: &Load) -> String {
    match load {
        Load::Rate { rate, .. } => format!("{rate}/s"),
        Load::Trace { speed, .. } => format!("trace x{speed}"),
    }
}

fn row(report: &Report) -> Vec<String> {
    let num_failed: u64 = report.errors.values().map(|errors| errors.count).sum();
    let counts = [report.num_requests - report.num_dropped, report.num_succeeded, num_failed, report.num_dropped];
    let percentiles = |percentiles: Option<Percentiles>, digits: usize| {
        let values = percentiles.map(|Percentiles { p50, p90, p99, .. }| [p50, p90, p99]);
        values.map_or_else(|| [(); 3].map(|()| "-".to_owned()), |values| values.map(|ms| format!("{ms:.digits$}")))
    };
    std::iter::once(name(&report.load))
        .chain(counts.map(|count| count.to_string()))
        .chain(percentiles(report.ttft_ms, 0))
        .chain(percentiles(report.tpot_ms, 1))
        .chain(percentiles(report.e2e_ms, 0))
        .chain([
            format!("{:.1}", report.output_tok_s),
            format!("{:.2}/s", report.goodput_request_s),
            format!("{:.1}", report.good_share * 100.0),
        ])
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(texts: &[u64], end: u64, num_tokens: u64) -> Reply {
        let texts = texts.iter().copied().map(Duration::from_millis).collect();
        Reply { texts, end: Duration::from_millis(end), num_tokens, prompt_tokens: 10 }
    }

    fn report(rate: f64, objective: Objective, results: Vec<Result<Reply, Missed>>) -> Report {
        let mut tally = Tally::new(objective);
        for result in results {
            tally.add(&Outcome { at: Duration::ZERO, lag: Duration::from_millis(1), result });
        }
        let load = Load::Rate { rate, arrivals: Spread::Constant, seed: 0 };
        let (duration, elapsed) = (Duration::from_secs(4), Duration::from_secs(5));
        tally.report(Frame { load, duration, elapsed, num_repeated: 0, max_in_flight: 1 })
    }

    fn refused() -> Result<Reply, Missed> {
        let status = axum::http::StatusCode::SERVICE_UNAVAILABLE;
        Err(Missed::Failed(Failure::Status { status, message: "full".to_owned() }))
    }

    #[test]
    fn a_token_after_the_first_takes_the_mean_of_the_reply_however_events_hold_them() {
        let one_by_one = Times::of(&reply(&[100, 150, 200, 250], 260, 4));
        assert_eq!(one_by_one, Times { ttft: 100.0, tpot: Some(50.0), e2e: 260.0 });
        let two_at_once = Times::of(&reply(&[100, 200, 250], 260, 4));
        assert_eq!(two_at_once.tpot, Some(50.0));
        assert_eq!(Times::of(&reply(&[100], 100, 1)).tpot, None);
        assert_eq!(Times::of(&reply(&[], 70, 0)), Times { ttft: 70.0, tpot: None, e2e: 70.0 });
    }

    #[test]
    fn what_fails_is_dropped_or_misses_an_objective_is_not_good() {
        let objective = Objective { ttft_ms: Some(100.0), tpot_ms: Some(50.0), e2e_ms: Some(200.0) };
        let good = || Ok(reply(&[100, 150], 160, 2));
        let (late, slow, long) = (Ok(reply(&[101, 102], 103, 2)), Ok(reply(&[10, 61], 70, 2)), Ok(reply(&[1], 201, 1)));
        let report =
            report(1.0, objective, vec![good(), late, slow, long, refused(), Err(Missed::Dropped), good(), refused()]);
        let Report { num_requests, num_succeeded, num_dropped, good_share, goodput_request_s, .. } = report;
        assert_eq!((num_requests, num_succeeded, num_dropped), (8, 5, 1));
        assert_eq!(report.errors, [("503".to_owned(), Errors { count: 2, first: "full".to_owned() })].into());
        assert_eq!((good_share, goodput_request_s), (2.0 / 8.0, 2.0 / 5.0));
        assert_eq!((report.output_tok_s, report.prompt_tok_s), (9.0 / 5.0, 10.0));
    }

    #[test]
    fn percentiles_are_those_of_the_values_to_three_digits() {
        let results = (1..=1000).map(|ms| Ok(reply(&[ms], ms, 1))).collect();
        let Percentiles { p50, p90, p99, max } = report(1.0, Objective::default(), results).ttft_ms.unwrap();
        for (value, expected) in [(p50, 500.0), (p90, 900.0), (p99, 990.0), (max, 1000.0)] {
            assert!((value / expected - 1.0_f64).abs() < 1e-3, "{value} is not {expected}");
        }
    }

    #[test]
    fn the_knee_is_the_last_rate_before_the_first_that_is_not_sustained() {
        let of = |rates: &[(f64, usize)]| {
            let reports = rates.iter().map(|&(rate, num_good)| {
                let results = (0..100).map(|index| if index < num_good { Ok(reply(&[1], 1, 1)) } else { refused() });
                report(rate, Objective::default(), results.collect())
            });
            let knee = Knee::of(&reports.collect::<Vec<_>>()).expect("there are several rates");
            (knee.knee_request_s, knee.is_reached)
        };
        assert_eq!(of(&[(1.0, 100), (2.0, 95), (4.0, 94), (8.0, 100)]), (Some(2.0), true));
        assert_eq!(of(&[(8.0, 10), (2.0, 100), (4.0, 96)]), (Some(4.0), true));
        assert_eq!(of(&[(1.0, 94), (2.0, 100)]), (None, true));
        assert_eq!(of(&[(1.0, 100), (2.0, 99)]), (Some(2.0), false));
    }

    #[test]
    fn a_rate_too_low_for_anything_to_arrive_is_no_knee() {
        let idle = report(0.01, Objective::default(), Vec::new());
        let served = report(1.0, Objective::default(), vec![Ok(reply(&[1], 1, 1))]);
        assert_eq!(Knee::of(&[idle, served]).and_then(|knee| knee.knee_request_s), Some(1.0));
    }
}
