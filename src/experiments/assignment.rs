//! Which arm a user gets: decided by hashing alone, so that it is the same on every server and after every restart.

use sha2::{Digest, Sha256};

use super::settings::ArmConfig;

/// The arm of `arms` for `key`, among those that serve and that `is_out` does not name; `None` if no arm is left.
///
/// Weighted rendezvous hashing: each arm draws an exponential variable from the hash of (experiment, arm, key) at the rate
/// of its weight, and the smallest wins, which happens in proportion to the weights (D. G. Thaler, C. V. Ravishankar,
/// IEEE/ACM Transactions on Networking 6, 1998; weights as in C. Schindelhauer, G. Schomaker, SPAA 2005). When one arm's
/// weight changes, or an arm goes, keys move from or to that arm only.
pub fn choose<'a>(
    experiment: &str,
    arms: &'a [ArmConfig],
    key: &str,
    is_out: impl Fn(&ArmConfig) -> bool,
) -> Option<&'a ArmConfig> {
    let draw = |arm: &ArmConfig| -unit(experiment, &arm.name, key).ln() / arm.weight;
    let serving = arms.iter().filter(|arm| !arm.shadow && arm.weight > 0.0 && !is_out(arm));
    serving.map(|arm| (draw(arm), arm)).min_by(|(a, _), (b, _)| a.total_cmp(b)).map(|(_, arm)| arm)
}

/// Uniform in (0, 1).
fn unit(experiment: &str, arm: &str, key: &str) -> f64 {
    // Names hold no NUL, so that no two triples are the same bytes.
    let mut hash = Sha256::new();
    for part in [experiment, "\0", arm, "\0", key] {
        hash.update(part);
    }
    let bytes = hash.finalize();
    let bits = bytes.iter().take(8).fold(0, |bits: u64, &byte| bits << 8 | u64::from(byte));
    ((bits >> 11) as f64 + 0.5) / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn arms(weights: &[f64]) -> Vec<ArmConfig> {
        let arm = |(index, &weight): (usize, &f64)| ArmConfig {
            name: format!("arm{index}"),
            model: format!("model{index}"),
            weight,
            shadow: false,
            canary: false,
        };
        weights.iter().enumerate().map(arm).collect()
    }

    fn chosen<'a>(arms: &'a [ArmConfig], key: &str) -> &'a str {
        &choose("experiment", arms, key, |_| false).unwrap().name
    }

    #[test]
    fn the_choice_is_the_same_in_every_version() {
        let arms = arms(&[1.0, 1.0, 2.0]);
        let choices: Vec<&str> =
            ["ann", "bob", "eve", "ömer", "dan", ""].iter().map(|key| chosen(&arms, key)).collect();
        // Computed apart, from the same formula in Python.
        assert_eq!(choices, ["arm2", "arm2", "arm2", "arm0", "arm1", "arm2"]);
    }

    #[test]
    fn shadows_arms_without_weight_and_arms_that_are_out_get_nothing() {
        let mut arms = arms(&[1.0, 1.0, 0.0]);
        arms[0].shadow = true;
        for user in 0..100 {
            assert_eq!(chosen(&arms, &user.to_string()), "arm1");
        }
        assert_eq!(choose("experiment", &arms, "ann", |arm| arm.name == "arm1"), None);
    }

    #[test]
    fn another_experiment_splits_the_same_users_anew() {
        let arms = arms(&[1.0, 1.0]);
        let differs = |user: &u32| {
            let arm = |experiment| choose(experiment, &arms, &user.to_string(), |_| false);
            arm("one") != arm("two")
        };
        let moved = (0..1000).filter(differs).count();
        assert!((400..600).contains(&moved), "{moved} of 1000");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn arms_get_traffic_in_proportion_to_their_weights(
            weights in prop::collection::vec(0.05f64..1.0, 2..5), salt: u32,
        ) {
            let arms = arms(&weights);
            let total: f64 = weights.iter().sum();
            let users = 4000;
            let mut counts = vec![0u32; arms.len()];
            for user in 0..users {
                let name = chosen(&arms, &format!("{salt}-{user}"));
                counts[arms.iter().position(|arm| arm.name == name).unwrap()] += 1;
            }
            for (count, weight) in counts.iter().zip(&weights) {
                let share = weight / total;
                // Six standard deviations: one case in 10^9 by chance.
                let slack = 6.0 * (share * (1.0 - share) / f64::from(users)).sqrt();
                let got = f64::from(*count) / f64::from(users);
                prop_assert!((got - share).abs() <= slack, "{counts:?} for {weights:?}");
            }
        }

        #[test]
        fn a_key_stays_unless_its_own_arm_loses_or_another_gains(
            weights in prop::collection::vec(0.05f64..1.0, 2..5), keys in prop::collection::vec(".{0,12}", 50),
        ) {
            let before = arms(&weights);
            let (mut less, mut reordered) = (before.clone(), before.clone());
            less[0].weight /= 2.0;
            reordered.reverse();
            for key in &keys {
                let arm = chosen(&before, key);
                prop_assert_eq!(chosen(&before, key), arm);
                prop_assert_eq!(chosen(&reordered, key), arm);
                if arm != "arm0" {
                    prop_assert_eq!(chosen(&less, key), arm);
                    let left = choose("experiment", &before, key, |arm| arm.name == "arm0");
                    prop_assert_eq!(left.unwrap().name.as_str(), arm);
                }
            }
        }
    }
}
