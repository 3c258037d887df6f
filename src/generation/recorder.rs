//! The clock of one sequence: what it reports to the metrics, also when nobody waits for its end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::report::{RequestReport, SequenceReport};
use crate::metrics::{AdapterSeries, Metrics, RequestSeries};

/// How long a sequence took, from when HTTP had read its request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timing {
    /// To the first token (TTFT); `None` without any.
    pub first_token: Option<Duration>,
    /// For each token after the first (TPOT), on average; `None` with less than two.
    pub per_output_token: Option<Duration>,
    /// To the end.
    pub total: Duration,
}

/// Whether a reply has failed. What else of it was under way then was cancelled by no client.
#[derive(Debug, Clone, Default)]
pub struct ReplyFailure(Arc<AtomicBool>);

/// Counts the sequence when dropped; one that nothing has finished by then was cancelled by its client, unless its reply has
/// failed.
///
/// Each time is observed for the server and for the adapter, whose series go when it goes.
#[derive(Debug)]
pub struct Recorder {
    metrics: Arc<Metrics>,
    adapter: Arc<AdapterSeries>,
    accepted: Instant,
    submitted: Instant,
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Instant,
    num_prompt_tokens: usize,
    num_cached_tokens: usize,
    num_output_tokens: u32,
    finish_reason: Option<&'static str>,
    reply: ReplyFailure,
    report: Option<Arc<RequestReport>>,
    is_first_choice: bool,
}

impl Recorder {
    /// `adapter` is its label in the metrics; `accepted` is when HTTP had read the request.
    pub fn new(metrics: Arc<Metrics>, adapter: &str, accepted: Instant) -> Self {
        let adapter = metrics.of_adapter(adapter);
        adapter.requests().waiting.inc();
        Self {
            metrics,
            adapter,
            accepted,
            submitted: Instant::now(),
            started: None,
            first_token: None,
            last_token: accepted,
            num_prompt_tokens: 0,
            num_cached_tokens: 0,
            num_output_tokens: 0,
            finish_reason: None,
            reply: ReplyFailure::default(),
            report: None,
            is_first_choice: true,
        }
    }

    /// It is part of a reply with others.
    pub fn part_of(&mut self, reply: &ReplyFailure) {
        self.reply = reply.clone();
    }

    /// What came of the sequence is said in `report`, too; its prompt only of the first of several choices.
    pub fn report_to(&mut self, report: &Arc<RequestReport>, is_first_choice: bool) {
        (self.report, self.is_first_choice) = (Some(report.clone()), is_first_choice);
    }

    /// The engine has begun, after `queue`. The counts are in tokens.
    pub fn start(&mut self, queue: Duration, num_prompt_tokens: usize, num_cached_tokens: usize) {
        self.started = Some(self.submitted + queue);
        (self.num_prompt_tokens, self.num_cached_tokens) = (num_prompt_tokens, num_cached_tokens);
        let RequestSeries { running, waiting, prompt_tokens_total, cached_tokens_total, .. } = self.adapter.requests();
        waiting.dec();
        running.inc();
        prompt_tokens_total.inc_by(num_prompt_tokens as u64);
        cached_tokens_total.inc_by(num_cached_tokens as u64);
        self.metrics.vllm.request_queue_time.observe(queue.as_secs_f64());
        self.adapter.requests().queue.observe(queue.as_secs_f64());
    }

    pub fn token(&mut self) {
        let now = Instant::now();
        if self.first_token.is_none() {
            self.first_token = Some(now);
            let seconds = (now - self.accepted).as_secs_f64();
            self.metrics.vllm.time_to_first_token.observe(seconds);
            self.adapter.requests().time_to_first_token.observe(seconds);
        } else {
            self.metrics.vllm.inter_token_latency.observe((now - self.last_token).as_secs_f64());
        }
        self.adapter.requests().output_tokens_total.inc();
        self.last_token = now;
        self.num_output_tokens += 1;
    }

    /// Of the first token.
    pub fn since_first_token(&self) -> Option<Duration> {
        self.first_token.map(|first_token| first_token.elapsed())
    }

    /// `finish_reason` is one of `stop`, `length`, `error`.
    pub fn finish(&mut self, finish_reason: &'static str) {
        self.finish_reason = Some(finish_reason);
        if finish_reason == "error" {
            self.reply.0.store(true, Ordering::Relaxed);
        }
    }

    fn finish_reason(&self) -> &'static str {
        let has_failed = self.reply.0.load(Ordering::Relaxed);
        self.finish_reason.unwrap_or(if has_failed { "error" } else { "cancelled" })
    }

    pub fn timing(&self) -> Timing {
        Timing {
            first_token: self.first_token.map(|first_token| first_token - self.accepted),
            per_output_token: self.per_output_token(),
            total: self.accepted.elapsed(),
        }
    }

    fn phase(&self) -> &'static str {
        match self.first_token {
            Some(_) => "decode",
            None if self.started.is_some() => "prefill",
            None => "queue",
        }
    }

    fn as_report(&self) -> SequenceReport {
        let of_prompt = |num_tokens: usize| if self.is_first_choice { num_tokens } else { 0 };
        SequenceReport {
            finish_reason: self.finish_reason(),
            phase: self.phase(),
            num_prompt_tokens: of_prompt(self.num_prompt_tokens),
            num_cached_tokens: of_prompt(self.num_cached_tokens),
            num_output_tokens: self.num_output_tokens as usize,
            accepted: self.accepted,
            submitted: self.submitted,
            started: self.started,
            first_token: self.first_token,
            ended: Instant::now(),
        }
    }

    fn per_output_token(&self) -> Option<Duration> {
        let num_gaps = self.num_output_tokens.checked_sub(1).filter(|num_gaps| *num_gaps > 0)?;
        Some((self.last_token - self.first_token?) / num_gaps)
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        let (metrics, requests, finish_reason) = (&self.metrics, self.adapter.requests(), self.finish_reason());
        if self.started.is_some() {
            requests.running.dec()
        } else {
            requests.waiting.dec()
        }
        metrics.vllm.request_ended(finish_reason).inc();
        requests.ended_total.with_label_values(&[finish_reason]).inc();
        if finish_reason == "cancelled" {
            metrics.cancelled_total.with_label_values(&[self.phase()]).inc();
        }
        metrics.vllm.e2e_request_latency.observe(self.accepted.elapsed().as_secs_f64());
        if let Some(started) = self.started {
            metrics.vllm.request_prompt_tokens.observe(self.num_prompt_tokens as f64);
            metrics.vllm.request_generation_tokens.observe(f64::from(self.num_output_tokens));
            if let Some(first_token) = self.first_token {
                let seconds = |from: Instant, to: Instant| to.saturating_duration_since(from).as_secs_f64();
                metrics.vllm.request_prefill_time.observe(seconds(started, first_token));
                metrics.vllm.request_decode_time.observe(seconds(first_token, self.last_token));
                metrics.vllm.request_inference_time.observe(seconds(started, self.last_token));
            }
        }
        if let Some(per_output_token) = self.per_output_token() {
            metrics.vllm.time_per_output_token.observe(per_output_token.as_secs_f64());
            requests.time_per_output_token.observe(per_output_token.as_secs_f64());
        }
        if let Some(report) = &self.report {
            report.add(self.as_report());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(metrics: &Metrics, finish_reason: &str) -> u64 {
        metrics.of_adapter("base").requests().ended_total.with_label_values(&[finish_reason]).get()
    }

    #[test]
    fn a_sequence_dropped_before_its_end_counts_as_cancelled() {
        let metrics = Arc::new(Metrics::new("base"));
        drop(Recorder::new(metrics.clone(), "base", Instant::now()));
        assert_eq!((ended(&metrics, "cancelled"), ended(&metrics, "stop")), (1, 0));
    }

    #[test]
    fn what_ends_with_a_reply_that_has_failed_was_cancelled_by_nobody() {
        for (first, expected) in [(Some("error"), [2, 0, 0]), (Some("stop"), [0, 1, 1]), (None, [0, 2, 0])] {
            let metrics = Arc::new(Metrics::new("base"));
            let reply = ReplyFailure::default();
            let mut choices = [(); 2].map(|()| Recorder::new(metrics.clone(), "base", Instant::now()));
            choices.iter_mut().for_each(|choice| choice.part_of(&reply));
            first.into_iter().for_each(|reason| choices[0].finish(reason));
            drop(choices);
            assert_eq!(["error", "cancelled", "stop"].map(|reason| ended(&metrics, reason)), expected);
            assert_eq!(metrics.cancelled_total.with_label_values(&["queue"]).get(), expected[1]);
        }
    }

    #[test]
    fn three_tokens_are_one_first_token_and_two_gaps() {
        let metrics = Arc::new(Metrics::new("base"));
        let mut recorder = Recorder::new(metrics.clone(), "base", Instant::now());
        (0..3).for_each(|_| recorder.token());
        recorder.finish("stop");
        drop(recorder);
        let (vllm, base) = (&metrics.vllm, metrics.of_adapter("base"));
        assert_eq!(vllm.inter_token_latency.get_sample_count(), 2);
        for once in [&vllm.time_to_first_token, &base.requests().time_to_first_token] {
            assert_eq!(once.get_sample_count(), 1);
        }
        for once in [&vllm.time_per_output_token, &base.requests().time_per_output_token] {
            assert_eq!(once.get_sample_count(), 1);
        }
        assert_eq!((ended(&metrics, "cancelled"), ended(&metrics, "stop")), (0, 1));
    }

    #[test]
    fn each_choice_is_reported_and_their_prompt_once() {
        let metrics = Arc::new(Metrics::new("base"));
        let report = Arc::new(RequestReport::default());
        for is_first_choice in [true, false] {
            let mut recorder = Recorder::new(metrics.clone(), "base", Instant::now());
            recorder.report_to(&report, is_first_choice);
            recorder.start(Duration::from_secs(1), 3, 1);
            recorder.token();
            recorder.finish("length");
        }
        let tokens = |sequence: &SequenceReport| {
            [sequence.num_prompt_tokens, sequence.num_cached_tokens, sequence.num_output_tokens]
        };
        let sequences = report.sequences();
        assert_eq!(sequences.iter().map(tokens).collect::<Vec<_>>(), [[3, 1, 1], [0, 0, 1]]);
        for SequenceReport { finish_reason, submitted, started, first_token, .. } in sequences {
            assert_eq!((finish_reason, started), ("length", Some(submitted + Duration::from_secs(1))));
            assert!(first_token.is_some());
        }
    }

    #[test]
    fn who_leaves_is_counted_in_the_phase_that_the_request_was_in() {
        let metrics = Arc::new(Metrics::new("base"));
        let recorder = || Recorder::new(metrics.clone(), "base", Instant::now());
        for phase in ["queue", "prefill", "decode"] {
            let mut recorder = recorder();
            if phase != "queue" {
                recorder.start(Duration::ZERO, 3, 1);
            }
            if phase == "decode" {
                recorder.token();
            }
        }
        let mut finished = recorder();
        finished.finish("stop");
        drop(finished);
        for phase in ["queue", "prefill", "decode"] {
            assert_eq!(metrics.cancelled_total.with_label_values(&[phase]).get(), 1, "{phase}");
        }
        let base = metrics.of_adapter("base");
        assert_eq!((base.requests().running.get(), base.requests().waiting.get()), (0, 0));
    }
}
