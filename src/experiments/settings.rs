//! `[experiments]` of the configuration, checked as far as that is possible without knowing the models.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::model::ModelNames;
use super::promotion::{FEWEST_PAIRS, MOST_PAIRS, PromotionRule};
use crate::generation::model_name::ModelName;
use crate::icl;

/// Where the database lies below the folder for models, unless the configuration says otherwise.
const DEFAULT_PATH: &str = "state/experiments.db";

const MAX_NAME_LEN: usize = 64;

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExperimentsConfig {
    path: PathBuf,
    pub max_mib: u32,
    pub max_queued: usize,
    pub keep_text: bool,
    pub run: Vec<ExperimentConfig>,
}

/// One model alias whose traffic is split.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExperimentConfig {
    pub name: String,
    /// What clients send as `model`.
    pub alias: String,
    pub arms: Vec<ArmConfig>,
    /// When the canary arm is rolled back; there must be one exactly if an arm is the canary.
    pub bounds: Option<Bounds>,
    /// Room for prompts, the latest of which are kept for training; 0 keeps none.
    #[serde(default)]
    pub keep_prompts_mib: u32,
    /// What a candidate must show to be promoted in the canary's arm, which gets no traffic but through that.
    pub promotion: Option<PromotionRule>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ArmConfig {
    pub name: String,
    /// Any name that a request could send, except an alias.
    pub model: String,
    /// Share of the traffic, against the weights of the other arms.
    #[serde(default)]
    pub weight: f64,
    /// Runs with every request of the alias, and is not returned.
    #[serde(default)]
    pub shadow: bool,
    #[serde(default)]
    pub canary: bool,
}

/// What a canary must keep to; what is absent is not asked of it.
#[derive(Debug, Clone, PartialEq, JsonSchema, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bounds {
    pub max_error_rate: Option<f64>,
    /// Of what was shown to a user.
    pub min_acceptance: Option<f64>,
    /// Against the p95 of the other serving arms together.
    pub max_ttft_p95_ratio: Option<f64>,
    /// Fewer samples than this prove nothing.
    pub min_samples: usize,
}

impl ExperimentsConfig {
    /// The database file; `home` is the folder for models.
    pub fn path(&self, home: &Path) -> PathBuf {
        if self.path.as_os_str().is_empty() { home.join(DEFAULT_PATH) } else { self.path.clone() }
    }

    /// # Errors
    /// The first key that makes no sense; `base_id` is the id of the base, and `model_aliases` what of `server` goes by that
    /// name.
    pub fn validate(&self, base_id: &str, model_aliases: &BTreeMap<String, String>) -> Result<(), String> {
        if self.max_mib == 0 {
            return Err("experiments.max_mib must be at least 1".to_owned());
        }
        let names = ModelNames::new(base_id, model_aliases, |_| false);
        for (index, experiment) in self.run.iter().enumerate() {
            let at = format!("experiments.run[{index}]");
            experiment.validate(&at, &names)?;
            let alias = &experiment.alias;
            let is_base = ModelName::parse(Some(alias), base_id, |_| false) == ModelName::Base;
            if is_base || alias.contains('+') {
                return Err(format!("{at}.alias {alias:?} is a name of the base or has a `+`: choose another"));
            }
            let keep_prompts_mib = experiment.keep_prompts_mib;
            if keep_prompts_mib > 0 && !self.keep_text {
                return Err(format!("{at}.keep_prompts_mib is of no use without outputs: set experiments.keep_text"));
            }
            if keep_prompts_mib > self.max_mib {
                return Err(format!(
                    "{at}.keep_prompts_mib must be at most experiments.max_mib, {}, not {keep_prompts_mib}",
                    self.max_mib
                ));
            }
            experiment.validate_promotion(&at, &names, model_aliases)?;
            let before = &self.run[..index];
            if before.iter().any(|other| other.name == experiment.name || other.alias == experiment.alias) {
                return Err(format!("{at}: its name or alias is taken by another experiment"));
            }
            let is_alias = |model: &str| {
                // The alias would answer for it, with its examples or without.
                let model = icl::Selection::split_model_name(model).map_or(model, |(model, _)| model);
                self.run.iter().any(|experiment| experiment.alias == model)
            };
            if let Some(arm) = experiment.arms.iter().find(|arm| is_alias(&arm.model)) {
                return Err(format!("{at}: the model {:?} of the arm {:?} is itself an alias", arm.model, arm.name));
            }
        }
        Ok(())
    }
}

impl ExperimentConfig {
    pub(super) fn max_prompt_bytes(&self) -> u64 {
        u64::from(self.keep_prompts_mib) << 20
    }

    /// The arm that a candidate is measured against: the only one, beside the canary, that serves.
    pub fn incumbent(&self) -> Option<&ArmConfig> {
        self.arms.iter().find(|arm| arm.weight > 0.0 && !arm.canary)
    }

    fn validate_promotion(
        &self,
        at: &str,
        names: &ModelNames,
        model_aliases: &BTreeMap<String, String>,
    ) -> Result<(), String> {
        let Some(rule) = &self.promotion else { return Ok(()) };
        let (at_arms, at) = (format!("{at}.arms"), format!("{at}.promotion"));
        let (Some(arm), Some(bounds)) = (self.arms.iter().find(|arm| arm.canary), &self.bounds) else {
            return Err(format!("{at} needs an arm with `canary = true`, and `bounds`"));
        };
        let adapter = names.adapter(&arm.model);
        if adapter.is_none() || arm.model.contains('+') || arm.weight == 0.0 {
            return Err(format!("{at}: the canary {:?} must be an adapter alone, with a weight", arm.name));
        }
        if model_aliases.contains_key(&arm.model) {
            // What it stands for would be served, and the candidate be installed under its own name.
            return Err(format!(
                "{at}: the model {:?} of the canary {:?} is in server.model_aliases: name the adapter itself",
                arm.model, arm.name
            ));
        }
        if self.arms.iter().filter(|arm| arm.weight > 0.0 && !arm.canary).count() != 1 {
            return Err(format!("{at_arms}: with `promotion`, one arm alone may have a weight beside the canary's"));
        }
        if let Some(incumbent) = self.incumbent().filter(|incumbent| names.adapter(&incumbent.model) == adapter) {
            return Err(format!(
                "{at_arms}: {:?} serves the adapter of the canary {:?}, and would change with it: give it another name",
                incumbent.name, arm.name
            ));
        }
        if self.keep_prompts_mib == 0 {
            return Err(format!("{at} needs prompts to check on: set keep_prompts_mib"));
        }
        if !(FEWEST_PAIRS..=MOST_PAIRS).contains(&rule.min_pairs) {
            return Err(format!(
                "{at}.min_pairs must be from {FEWEST_PAIRS} to {MOST_PAIRS}: with fewer nothing can be shown, and a check \
                 takes no more"
            ));
        }
        let (least, most) = (bounds.min_samples, super::canary::WINDOW);
        if !(least..=most).contains(&rule.min_shown) {
            return Err(format!("{at}.min_shown must be from bounds.min_samples, {least}, to {most}"));
        }
        if !(rule.test > 0.0 && rule.test < 0.5) {
            return Err(format!("{at}.test must be above 0 and less than 0.5"));
        }
        Ok(())
    }

    fn validate(&self, at: &str, names: &ModelNames) -> Result<(), String> {
        if !is_name(&self.name) || self.alias.is_empty() {
            return Err(format!("{at} needs an alias, and a name of {NAME_RULE}"));
        }
        for (index, arm) in self.arms.iter().enumerate() {
            if !is_name(&arm.name) || arm.model.is_empty() {
                return Err(format!("{at}.arms[{index}] needs a model, and a name of {NAME_RULE}"));
            }
            icl::Selection::split_model_name(&arm.model)
                .map_err(|error| format!("{at}.arms[{index}].model: {error}"))?;
            // However it is spelt: what is recorded of an arm, and of comparisons with it, is found by its model.
            let model = names.full_name(&arm.model);
            let is_taken = |other: &ArmConfig| other.name == arm.name || names.full_name(&other.model) == model;
            if self.arms[..index].iter().any(is_taken) {
                return Err(format!("{at}.arms[{index}]: its name or model is taken by another arm"));
            }
            if !arm.weight.is_finite() || arm.weight < 0.0 {
                return Err(format!("{at}.arms[{index}].weight must be 0 or more, not {}", arm.weight));
            }
            if arm.shadow && (arm.canary || arm.weight > 0.0) {
                return Err(format!("{at}.arms[{index}] is a shadow: it can have no weight and be no canary"));
            }
        }
        if !self.arms.iter().any(|arm| arm.weight > 0.0 && !arm.canary) {
            return Err(format!("{at}.arms needs an arm with a weight above 0 that is no canary"));
        }
        match (self.arms.iter().filter(|arm| arm.canary).count(), &self.bounds) {
            (0, None) => Ok(()),
            (1, Some(bounds)) => bounds.validate(at),
            _ => Err(format!("{at}: `bounds` and one arm with `canary = true` belong together")),
        }
    }
}

impl Bounds {
    fn validate(&self, at: &str) -> Result<(), String> {
        let rates = [("max_error_rate", self.max_error_rate), ("min_acceptance", self.min_acceptance)];
        for (key, rate) in rates {
            if rate.is_some_and(|rate| !(0.0..=1.0).contains(&rate)) {
                return Err(format!("{at}.bounds.{key} must be from 0 to 1"));
            }
        }
        if self.max_ttft_p95_ratio.is_some_and(|ratio| !(ratio.is_finite() && ratio > 0.0)) {
            return Err(format!("{at}.bounds.max_ttft_p95_ratio must be above 0"));
        }
        if self.min_samples == 0 || self.min_samples > super::canary::WINDOW {
            return Err(format!("{at}.bounds.min_samples must be from 1 to {}", super::canary::WINDOW));
        }
        Ok(())
    }
}

const NAME_RULE: &str = "1 to 64 letters, digits, dots, dashes and underscores";

fn is_name(name: &str) -> bool {
    (1..=MAX_NAME_LEN).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "path = ''\nmax_mib = 1\nmax_queued = 1\nkeep_text = true\n";

    fn check(run: &str) -> Result<(), String> {
        let config: ExperimentsConfig = toml::from_str(&format!("{HEAD}{run}")).unwrap();
        config.validate("base", &BTreeMap::new())
    }

    fn run(name: &str, alias: &str, arms: &str, rest: &str) -> String {
        format!("[[run]]\nname = '{name}'\nalias = '{alias}'\narms = [{arms}]\n{rest}\n")
    }

    const ARMS: &str = "{name = 'a', model = 'base', weight = 1}, {name = 'b', model = 'x', weight = 1, canary = true}";

    #[test]
    fn shadows_canaries_and_several_experiments_are_accepted() {
        let shadow = "{name = 'a', model = 'base', weight = 0.5}, {name = 'b', model = 'x', shadow = true}";
        check(&(run("one", "coder", ARMS, "bounds = {min_samples = 20}") + &run("two", "chat", shadow, ""))).unwrap();
        check("run = []").unwrap();
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_its_place() {
        let bounds = "bounds = {min_samples = 20}";
        let two = |arms: &str| run("one", "coder", &format!("{{name = 'a', model = 'm', weight = 1}}, {arms}"), "");
        for (config, word) in [
            (run("one", "coder", "", ""), "arms"),
            (run("o e", "coder", ARMS, bounds), "name"),
            (run("one", "", ARMS, bounds), "alias"),
            (run("one", "base", ARMS, bounds), "alias"),
            (run("one", "x", ARMS, bounds), "itself an alias"),
            (two("{name = 'b', model = 'coder+icl:python@3', weight = 1}"), "itself an alias"),
            (run("one", "coder", ARMS, ""), "bounds"),
            (run("one", "coder", ARMS, "bounds = {min_samples = 0}"), "min_samples"),
            (run("one", "coder", ARMS, "bounds = {min_samples = 9, max_error_rate = 2}"), "max_error_rate"),
            (run("one", "c", ARMS, bounds) + &run("two", "c", ARMS, bounds), "run[1]"),
            (two("{name = 'a', model = 'n', weight = 1}"), "arms[1]"),
            (two("{name = 'b', model = 'm', weight = 1}"), "arms[1]: its name or model"),
            (two("{name = 'b', model = 'base-m', weight = 1}"), "arms[1]: its name or model"),
            (two("{name = 'b', model = 'BASE-m', shadow = true}"), "arms[1]: its name or model"),
            (two("{name = 'b', model = 'x', weight = 1}, {name = 'c', model = 'base-x', weight = 1}"), "arms[2]"),
            (
                two(
                    "{name = 'b', model = 'm+icl:s@1', weight = 1}, {name = 'c', model = 'base-m+icl:s@1', weight = 1}",
                ),
                "arms[2]",
            ),
            (two("{name = 'b', model = 'n+icl:x', weight = 1}"), "arms[1].model"),
            (run("one", "c+icl:x@1", ARMS, bounds), "alias"),
            (run("one", "BASE", ARMS, bounds), "alias"),
            (two("{name = 'b', model = 'n', weight = -1}"), "arms[1].weight"),
            (two("{name = 'b', model = 'n', weight = 1, shadow = true}"), "arms[1]"),
            (run("one", "coder", ARMS, &format!("{bounds}\nkeep_prompts_mib = 2")), "run[0].keep_prompts_mib"),
        ] {
            let error = check(&config).unwrap_err();
            assert!(error.contains(word), "{config}: {error}");
        }
    }

    #[test]
    fn arms_are_told_apart_by_what_serves_them() {
        let arms = |second: &str| {
            format!("{{name = 'a', model = 'm', weight = 1}}, {{name = 'b', model = '{second}', weight = 1}}")
        };
        let aliases = BTreeMap::from([("best".to_owned(), "m".to_owned()), ("claude".to_owned(), "base".to_owned())]);
        let check = |second: &str| -> Result<(), String> {
            let config: ExperimentsConfig =
                toml::from_str(&format!("{HEAD}{}", run("one", "coder", &arms(second), ""))).unwrap();
            config.validate("base", &aliases)
        };
        for other in ["base", "claude", "x", "m+icl:s@1", "best+icl:s@2", "Base-M"] {
            check(other).unwrap();
        }
        for same in ["best", "base-m", "Base-m"] {
            assert!(check(same).unwrap_err().contains("run[0].arms[1]: its name or model is taken"), "{same}");
        }
    }

    #[test]
    fn prompts_are_kept_only_beside_outputs() {
        let run = run("one", "coder", ARMS, "bounds = {min_samples = 20}\nkeep_prompts_mib = 1");
        check(&run).unwrap();
        let without_text = format!("{HEAD}{run}").replace("keep_text = true", "keep_text = false");
        let config: ExperimentsConfig = toml::from_str(&without_text).unwrap();
        assert!(config.validate("base", &BTreeMap::new()).unwrap_err().contains("experiments.keep_text"));
    }

    #[test]
    fn a_promotion_needs_a_canary_an_incumbent_and_something_to_check_on() {
        const BOUNDS: &str = "bounds = {min_samples = 20}";
        const RULE: &str = "keep_prompts_mib = 1\npromotion = {min_pairs = 20, min_shown = 50}";
        let check =
            |arms: &str, bounds: &str, rule: &str| check(&run("one", "coder", arms, &format!("{bounds}\n{rule}")));
        check(ARMS, BOUNDS, RULE).unwrap();
        let of_base = ARMS.replace("'x'", "'BASE'");
        let of_base = of_base.replace("'base'", "'y'");
        let of_same = ARMS.replace("'base'", "'base-x'");
        let of_same_with_examples = ARMS.replace("'base'", "'x+icl:s@1'");
        let with_examples = ARMS.replace("'x'", "'x+icl:s@1'");
        let third = format!("{ARMS}, {{name = 'c', model = 'y', weight = 1}}");
        for (arms, bounds, rule, word) in [
            ("{name = 'a', model = 'm', weight = 1}", "", RULE, "run[0].promotion needs an arm"),
            (of_base.as_str(), BOUNDS, RULE, "must be an adapter"),
            (with_examples.as_str(), BOUNDS, RULE, "must be an adapter"),
            (third.as_str(), BOUNDS, RULE, "run[0].arms"),
            (ARMS, BOUNDS, "promotion = {min_pairs = 20, min_shown = 50}", "keep_prompts_mib"),
            (of_same.as_str(), BOUNDS, RULE, "run[0].arms[1]: its name or model is taken"),
            (of_same_with_examples.as_str(), BOUNDS, RULE, "run[0].arms: \"a\" serves the adapter of the canary \"b\""),
            (ARMS, BOUNDS, &RULE.replace("= 20", "= 5"), "min_pairs must be from 6 to 500"),
            (ARMS, BOUNDS, &RULE.replace("= 20", "= 501"), "min_pairs must be from 6 to 500"),
            (ARMS, BOUNDS, &RULE.replace("= 50", "= 19"), "min_shown must be from bounds.min_samples, 20, to 1000"),
            (ARMS, BOUNDS, &RULE.replace("= 50", "= 50, test = 0.5"), "promotion.test"),
        ] {
            let error = check(arms, bounds, rule).unwrap_err();
            assert!(error.contains(word), "{word}: {error}");
        }

        let of_alias = |alias: &str, model: &str| {
            let run = run("one", "coder", ARMS, &format!("{BOUNDS}\n{RULE}")).replace("'base'", "'y+icl:s@1'");
            let config: ExperimentsConfig = toml::from_str(&format!("{HEAD}{run}")).unwrap();
            config.validate("base", &BTreeMap::from([(alias.to_owned(), model.to_owned())]))
        };
        assert!(of_alias("x", "z").unwrap_err().contains("server.model_aliases"));
        assert!(of_alias("y", "x").unwrap_err().contains("run[0].arms: \"a\" serves the adapter"));
        of_alias("y", "z").unwrap();
    }

    #[test]
    fn an_empty_path_is_below_the_folder_for_models() {
        let config = |path: &str| -> ExperimentsConfig {
            toml::from_str(&format!("{}run = []", HEAD.replace("''", &format!("'{path}'")))).unwrap()
        };
        assert_eq!(config("").path(Path::new("/home")), Path::new("/home/state/experiments.db"));
        assert_eq!(config("/x/y.db").path(Path::new("/home")), Path::new("/x/y.db"));
    }
}
