//! The few statistics that reports and canaries need.

use schemars::JsonSchema;
use serde::Serialize;

/// Quantile of the standard normal distribution for a two-sided 95 % interval.
const Z: f64 = 1.959_963_984_540_054;

/// A proportion with its 95 % interval; `rate` is `None` where nothing was observed.
#[derive(Debug, Clone, Copy, PartialEq, JsonSchema, Serialize)]
pub struct Rate {
    pub rate: Option<f64>,
    pub low: f64,
    pub high: f64,
}

/// Wilson's score interval without continuity correction: E. B. Wilson, "Probable Inference, the Law of Succession, and
/// Statistical Inference", JASA 22 (1927). It stays within 0 to 1 and holds for few samples, as the normal one does not.
pub fn wilson(successes: u64, trials: u64) -> Rate {
    if trials == 0 {
        return Rate { rate: None, low: 0.0, high: 1.0 };
    }
    let n = trials as f64;
    let p = successes.min(trials) as f64 / n;
    let z2 = Z * Z;
    let center = (p + z2 / (2.0 * n)) / (1.0 + z2 / n);
    let half = Z / (1.0 + z2 / n) * (p * (1.0 - p) / n + z2 / (4.0 * n * n)).sqrt();
    // Rounding must not leave the point outside its own interval.
    Rate { rate: Some(p), low: (center - half).clamp(0.0, p), high: (center + half).clamp(p, 1.0) }
}

/// Two-sided p-value of the exact sign test: how often a fair coin is at least as uneven as `wins` to `losses`. On the
/// pairs in which two arms disagree this is McNemar's exact test: Q. McNemar, Psychometrika 12 (1947). Ties say nothing.
pub fn sign_test(wins: u64, losses: u64) -> f64 {
    let n = wins + losses;
    // P(X = i) for i = 0, 1, … as logarithms, so that 2^-n may be too small for an f64.
    let mut log_probability = -(n as f64) * std::f64::consts::LN_2;
    let mut tail = log_probability.exp();
    for i in 0..wins.min(losses) {
        log_probability += ((n - i) as f64).ln() - ((i + 1) as f64).ln();
        tail += log_probability.exp();
    }
    (2.0 * tail).min(1.0)
}

/// Nearest-rank percentile: the smallest value that at least `percent` % of all do not exceed.
pub fn percentile(values: &mut [f64], percent: f64) -> Option<f64> {
    if values.is_empty() {
        return None;
    }
    let rank = (percent / 100.0 * values.len() as f64).ceil() as usize;
    let index = rank.clamp(1, values.len()) - 1;
    Some(*values.select_nth_unstable_by(index, f64::total_cmp).1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() < 5e-5
    }

    #[test]
    fn wilson_gives_the_published_intervals() {
        // R. G. Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in Medicine 17 (1998),
        // table I, method 3.
        for (successes, trials, low, high) in
            [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]
        {
            let rate = wilson(successes, trials);
            assert!(close(rate.low, low) && close(rate.high, high), "{successes} of {trials}: {rate:?}");
        }
        assert_eq!(wilson(0, 0), Rate { rate: None, low: 0.0, high: 1.0 });
    }

    #[test]
    fn the_sign_test_gives_the_binomial_tails() {
        // Sums of binomial coefficients over 2^n, by hand.
        for (wins, losses, p) in [
            (5, 5, 1.0),
            (0, 0, 1.0),
            (0, 1, 1.0),
            (0, 5, 2.0 / 32.0),
            (1, 9, 22.0 / 1024.0),
            (8, 2, 112.0 / 1024.0),
            (3, 12, 2.0 * 576.0 / 32768.0),
        ] {
            assert!((sign_test(wins, losses) - p).abs() < 1e-12, "{wins} to {losses}: {}", sign_test(wins, losses));
        }
        let many = sign_test(1000, 1200);
        assert!((1e-5..1e-4).contains(&many), "{many}");
    }

    #[test]
    fn percentiles_are_values_that_were_seen() {
        let mut values = [15.0, 20.0, 35.0, 40.0, 50.0];
        let at = |values: &mut [f64]| [5.0, 30.0, 40.0, 50.0, 95.0, 100.0].map(|percent| percentile(values, percent));
        assert_eq!(at(&mut values), [15.0, 20.0, 20.0, 35.0, 50.0, 50.0].map(Some));
        assert_eq!(percentile(&mut [], 50.0), None);
    }

    proptest! {
        #[test]
        fn an_interval_holds_its_rate_and_shrinks_with_samples(trials in 1u64..100_000, share in 0.0..=1.0f64) {
            let successes = (trials as f64 * share) as u64;
            let (few, many) = (wilson(successes, trials), wilson(successes * 10, trials * 10));
            let rate = few.rate.unwrap();
            prop_assert!(0.0 <= few.low && few.low <= rate && rate <= few.high && few.high <= 1.0);
            prop_assert!(many.high - many.low < few.high - few.low);
        }

        #[test]
        fn the_sign_test_is_symmetric_and_a_probability(wins in 0u64..3000, losses in 0u64..3000) {
            let p = sign_test(wins, losses);
            prop_assert!((0.0..=1.0).contains(&p));
            prop_assert_eq!(p, sign_test(losses, wins));
        }
    }
}
