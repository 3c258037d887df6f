//! What is asked for, and when: made up from a seed, or read from lines of JSON.

use std::io::BufRead;
use std::num::NonZeroU32;
use std::sync::Arc;

use lorry::engine::fairness::{Account, Priority};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;

/// A request of a trace. It generates all of its tokens.
#[derive(Debug, Clone)]
pub struct Arrival {
    /// Seconds from the beginning; never before the one before it.
    pub at: f64,
    pub prompt_tokens: usize,
    /// Of these, the first that all prompts for the adapter begin with.
    pub shared_tokens: usize,
    pub max_tokens: usize,
    /// `None` is the base.
    pub adapter: Option<Arc<str>>,
    pub account: Account,
}

/// One line of a trace's file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    at: f64,
    prompt_tokens: usize,
    #[serde(default)]
    shared_tokens: usize,
    max_tokens: usize,
    #[serde(default)]
    adapter: Option<String>,
    #[serde(default)]
    key: String,
    #[serde(default = "one")]
    weight: NonZeroU32,
    #[serde(default)]
    priority: Option<String>,
}

fn one() -> NonZeroU32 {
    NonZeroU32::MIN
}

/// A key of the traffic that is made up.
#[derive(Debug, Clone)]
pub struct Key {
    name: Arc<str>,
    weight: NonZeroU32,
    share: f64,
}

impl std::str::FromStr for Key {
    type Err = String;

    /// `NAME:WEIGHT:SHARE`
    fn from_str(text: &str) -> Result<Self, String> {
        let refusal = || format!("{text:?} is no NAME:WEIGHT:SHARE, such as team:3:0.5");
        let [name, weight, share] = text.split(':').collect::<Vec<_>>()[..] else { return Err(refusal()) };
        let weight = weight.parse().map_err(|_| refusal())?;
        let share = share.parse().ok().filter(|share: &f64| share.is_finite() && *share > 0.0).ok_or_else(refusal)?;
        Ok(Self { name: name.into(), weight, share })
    }
}

/// Traffic that is made up: Poisson arrivals, adapters by Zipf's law.
#[derive(Debug, Clone, clap::Args)]
pub struct Traffic {
    /// Requests a second
    #[arg(long, default_value_t = 1000.0)]
    pub rate: f64,
    /// Seconds in which requests come
    #[arg(long, default_value_t = 60.0)]
    pub seconds: f64,
    /// Adapters that are asked for; 0 is the base alone
    #[arg(long, default_value_t = 10_000)]
    pub adapters: usize,
    /// Exponent of Zipf's law: the adapter of place k is asked for as 1/k^S; 0 is all alike
    #[arg(long, default_value_t = 1.0, value_name = "S")]
    pub zipf: f64,
    /// Mean length of a completion's prompt, in tokens, of an exponential distribution; those of chats and batches are four
    /// times as long
    #[arg(long, default_value_t = 200)]
    pub prompt_tokens: usize,
    /// Mean length of a completion's output, as of the prompt
    #[arg(long, default_value_t = 32)]
    pub max_tokens: usize,
    /// Tokens that all prompts for an adapter begin with, beside their own
    #[arg(long, default_value_t = 0)]
    pub shared_tokens: usize,
    /// Share of chats
    #[arg(long, default_value_t = 0.0)]
    pub chats: f64,
    /// Share of batches; what is left are completions
    #[arg(long, default_value_t = 0.0)]
    pub batches: f64,
    /// Keys that ask, each with its weight and its share of the requests, with commas between them; one without a name when absent
    #[arg(long, value_name = "NAME:WEIGHT:SHARE", value_delimiter = ',')]
    pub keys: Vec<Key>,
    /// Of all that is drawn
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// The longest of an exponential distribution, in means.
const MAX_MEANS: f64 = 8.0;
/// Chats and batches against completions.
const LONGER: f64 = 4.0;

impl Traffic {
    /// # Errors
    /// Names the option that is out of its range.
    pub fn check(&self) -> Result<(), String> {
        let ranges = [
            ("rate", self.rate, 1e-3, 1e6),
            ("seconds", self.seconds, 1e-3, 1e6),
            ("zipf", self.zipf, 0.0, 10.0),
            ("prompt-tokens", self.prompt_tokens as f64, 1.0, 1e6),
            ("max-tokens", self.max_tokens as f64, 1.0, 1e6),
            ("shared-tokens", self.shared_tokens as f64, 0.0, 1e6),
            ("adapters", self.adapters as f64, 0.0, 1e7),
            ("chats", self.chats, 0.0, 1.0),
            ("batches", self.batches, 0.0, 1.0 - self.chats),
            ("rate times --seconds", self.rate * self.seconds, 0.0, 1e7),
        ];
        let is_wrong = |(_, value, min, max): &&(&str, f64, f64, f64)| !(*min..=*max).contains(value);
        match ranges.iter().find(is_wrong) {
            None => Ok(()),
            Some((option, value, min, max)) => Err(format!("--{option} must be from {min} to {max}, not {value}")),
        }
    }

    pub fn arrivals(&self) -> Vec<Arrival> {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        let adapters: Vec<Arc<str>> = (0..self.adapters).map(|index| format!("a{index}").into()).collect();
        let by_adapter = cumulative((1..=self.adapters).map(|place| (place as f64).powf(-self.zipf)));
        let by_key = cumulative(self.keys.iter().map(|key| key.share));
        let mut arrivals = Vec::new();
        let mut at = 0.0;
        loop {
            at += exponential(&mut rng) / self.rate;
            if at >= self.seconds {
                return arrivals;
            }
            let kind: f64 = rng.random();
            let priority = match kind {
                kind if kind < self.chats => Priority::Chat,
                kind if kind < self.chats + self.batches => Priority::Batch,
                _ => Priority::Completion,
            };
            let longer = if priority == Priority::Completion { 1.0 } else { LONGER };
            let mut length = |mean: usize| {
                let means = exponential(&mut rng).min(MAX_MEANS);
                ((mean as f64 * longer * means) as usize).max(1)
            };
            let (own_tokens, max_tokens) = (length(self.prompt_tokens), length(self.max_tokens));
            let adapter = draw(&mut rng, &by_adapter).map(|index| adapters[index].clone());
            let account = match draw(&mut rng, &by_key).map(|index| &self.keys[index]) {
                None => Account { priority, ..Account::default() },
                Some(key) => Account { key: key.name.clone(), weight: key.weight, priority },
            };
            let (prompt_tokens, shared_tokens) = (self.shared_tokens + own_tokens, self.shared_tokens);
            arrivals.push(Arrival { at, prompt_tokens, shared_tokens, max_tokens, adapter, account });
        }
    }
}

/// Reads a trace, one JSON object a line.
///
/// # Errors
/// Names the line, and what is wrong with it.
pub fn read(lines: impl BufRead) -> Result<Vec<Arrival>, String> {
    let mut arrivals: Vec<Arrival> = Vec::new();
    for (index, line) in lines.lines().enumerate() {
        let refusal = |cause: String| format!("line {} of the trace: {cause}", index + 1);
        let line: Line = serde_json::from_str(&line.map_err(|error| refusal(error.to_string()))?)
            .map_err(|error| refusal(error.to_string()))?;
        let priority = match line.priority.as_deref() {
            None => Priority::default(),
            Some(name) => Priority::ALL
                .into_iter()
                .find(|priority| priority.name() == name)
                .ok_or_else(|| refusal(format!("`priority` {name:?} is none of completion, chat, batch")))?,
        };
        let before = arrivals.last().map_or(0.0, |before| before.at);
        if !(line.at.is_finite() && line.at >= before) {
            return Err(refusal(format!("`at` is {} and must be a time no earlier than {before}", line.at)));
        }
        if line.prompt_tokens == 0 || line.max_tokens == 0 || line.shared_tokens > line.prompt_tokens {
            let cause =
                "`prompt_tokens` and `max_tokens` must be at least 1, `shared_tokens` no more than the prompt's";
            return Err(refusal(cause.to_owned()));
        }
        arrivals.push(Arrival {
            at: line.at,
            prompt_tokens: line.prompt_tokens,
            shared_tokens: line.shared_tokens,
            max_tokens: line.max_tokens,
            adapter: line.adapter.map(Arc::from),
            account: Account { key: line.key.into(), weight: line.weight, priority },
        });
    }
    Ok(arrivals)
}

/// With mean 1.
fn exponential(rng: &mut ChaCha8Rng) -> f64 {
    -(1.0 - rng.random::<f64>()).ln()
}

fn cumulative(weights: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut sum = 0.0;
    weights
        .map(|weight| {
            sum += weight;
            sum
        })
        .collect()
}

/// An index by these weights, added up; `None` where there are none.
fn draw(rng: &mut ChaCha8Rng, cumulative: &[f64]) -> Option<usize> {
    let at = rng.random::<f64>() * cumulative.last()?;
    Some(cumulative.partition_point(|sum| *sum <= at).min(cumulative.len() - 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        traffic: Traffic,
    }

    fn traffic(options: &[&str]) -> Traffic {
        Cli::parse_from([&["simulate"], options].concat()).traffic
    }

    #[test]
    fn traffic_has_the_rate_the_lengths_and_the_shares_that_it_is_asked_for() {
        let traffic = traffic(&["--rate", "500", "--seconds", "40", "--adapters", "10", "--keys", "a:1:3,b:2:1"]);
        let arrivals = traffic.arrivals();
        let num = arrivals.len() as f64;
        assert!((num / 20_000.0 - 1.0).abs() < 0.05, "{num}");
        let mean = arrivals.iter().map(|arrival| arrival.prompt_tokens).sum::<usize>() as f64 / num;
        assert!((mean / 200.0 - 1.0).abs() < 0.05, "{mean}");
        let of = |name: &str| arrivals.iter().filter(|arrival| arrival.adapter.as_deref() == Some(name)).count() as f64;
        assert!((of("a0") / of("a4") / 5.0 - 1.0).abs() < 0.2, "{} {}", of("a0"), of("a4"));
        let of_a = arrivals.iter().filter(|arrival| &*arrival.account.key == "a").count() as f64;
        assert!((of_a / num - 0.75).abs() < 0.02, "{of_a}");
        assert!(arrivals.is_sorted_by(|a, b| a.at <= b.at));
    }

    #[test]
    fn a_line_that_cannot_be_is_named() {
        let good = r#"{"at": 1, "prompt_tokens": 3, "max_tokens": 2, "adapter": "x", "priority": "batch"}"#;
        let arrivals = read(good.as_bytes()).unwrap();
        assert_eq!((arrivals[0].adapter.as_deref(), arrivals[0].account.priority), (Some("x"), Priority::Batch));
        for bad in [
            "",
            r#"{"at": 0, "prompt_tokens": 3, "max_tokens": 2}"#,
            r#"{"at": 1, "prompt_tokens": 0, "max_tokens": 2}"#,
            r#"{"at": 1, "prompt_tokens": 3, "max_tokens": 2, "adaptr": "x"}"#,
            r#"{"at": 1, "prompt_tokens": 3, "max_tokens": 2, "priority": "soon"}"#,
        ] {
            let refusal = read(format!("{good}\n{bad}\n").as_bytes()).unwrap_err();
            assert!(refusal.starts_with("line 2 of the trace: "), "{refusal}");
        }
    }
}
