//! When requests arrive at a rate.

use std::time::Duration;

use clap::ValueEnum;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

/// How arrivals at a rate are spread over time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Spread {
    /// Independent of each other, as those of many users are.
    Poisson,
    /// Evenly.
    Constant,
}

/// Offsets from the start, in order, before `end`; `rate` is in requests per second, above 0. The same seed gives the same.
pub fn arrivals(spread: Spread, rate: f64, end: Duration, seed: u64) -> impl Iterator<Item = Duration> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut num_before = 0_u64;
    let mut seconds = 0.0;
    let offsets = std::iter::from_fn(move || {
        match spread {
            // 1 - u is never 0, so that the logarithm is finite.
            Spread::Poisson => seconds -= (1.0 - rng.random::<f64>()).ln() / rate,
            // Not by adding up, which would add up the rounding.
            Spread::Constant => seconds = num_before as f64 / rate,
        }
        num_before += 1;
        Duration::try_from_secs_f64(seconds).ok()
    });
    offsets.take_while(move |&offset| offset < end)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn arrivals_come_in_order_before_the_end_and_the_same_for_the_same_seed(
            rate in 0.1_f64..200.0, seconds in 0.0_f64..60.0, seed: u64, is_poisson: bool,
        ) {
            let spread = if is_poisson { Spread::Poisson } else { Spread::Constant };
            let end = Duration::from_secs_f64(seconds);
            let offsets: Vec<_> = arrivals(spread, rate, end, seed).collect();
            prop_assert!(offsets.is_sorted());
            prop_assert!(offsets.last().is_none_or(|&last| last < end));
            prop_assert_eq!(arrivals(spread, rate, end, seed).collect::<Vec<_>>(), offsets);
        }

        #[test]
        fn constant_arrivals_are_evenly_spaced_from_the_start(rate in 0.1_f64..200.0, seconds in 0.1_f64..60.0) {
            let end = Duration::from_secs_f64(seconds);
            let offsets: Vec<_> = arrivals(Spread::Constant, rate, end, 0).collect();
            for (index, offset) in offsets.iter().enumerate() {
                prop_assert!((offset.as_secs_f64() - index as f64 / rate).abs() < 1e-6);
            }
            prop_assert!((offsets.len() as f64 - rate * end.as_secs_f64()).abs() <= 1.0);
        }

        /// Of a Poisson process, mean and variance of the number of arrivals are both rate × time, and a gap's chance to be
        /// longer than the mean is 1/e. Bounds are six standard deviations.
        #[test]
        fn poisson_arrivals_have_the_rate_and_the_gaps_of_a_poisson_process(rate in 0.5_f64..100.0, seed: u64) {
            let num_expected = 10_000.0;
            let end = Duration::from_secs_f64(num_expected / rate);
            let offsets: Vec<_> = arrivals(Spread::Poisson, rate, end, seed).collect();
            prop_assert!((offsets.len() as f64 - num_expected).abs() < 6.0 * num_expected.sqrt());
            let num_long = offsets.windows(2).filter(|pair| (pair[1] - pair[0]).as_secs_f64() > 1.0 / rate).count();
            let share = num_long as f64 / offsets.len() as f64;
            let expected = (-1.0_f64).exp();
            prop_assert!((share - expected).abs() < 6.0 * (expected * (1.0 - expected) / num_expected).sqrt());
        }

        #[test]
        fn another_seed_gives_other_poisson_arrivals(seed in 0..u64::MAX) {
            let first = |seed| arrivals(Spread::Poisson, 1.0, Duration::MAX, seed).next();
            prop_assert_ne!(first(seed), first(seed + 1));
        }
    }
}
