//! The recipe that the trainer gets: a file as those of lab/recipes, with the methods that ship there.

use std::path::Path;

use serde::Serialize;

use super::job::{Job, Method};
use super::supervisor::Base;

pub const FILE: &str = "recipe.toml";
/// Beside the recipe.
pub const TRAINING_FILE: &str = "training.jsonl";
pub const VALIDATION_FILE: &str = "validation.jsonl";

/// Longer examples, prompt and answer together, are left out.
const MAX_TOKENS: u32 = 1024;
/// Validations, of which each epoch has one: one higher loss on a few examples may be chance, two are seldom.
const EARLY_STOPPING_PATIENCE: u32 = 2;
pub const DEFAULT_RANK: u32 = 16;
pub const DEFAULT_VIRTUAL_TOKENS: u32 = 20;
/// Of every family that is served: no base has all of these names, and PEFT passes over those it has not.
const LINEARS: [&str; 11] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "c_fc",
    "down_proj",
    "c_proj",
];
const IA3_LINEARS: [&str; 10] =
    ["q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "c_fc", "down_proj", "c_proj"];
/// What virtual tokens begin as, repeated or cut to as many as there are: from random ones, a base falls behind itself, and a
/// few hundred examples do not bring it back.
const FIRST_TEXT: &str =
    "Below are requests, each followed by its answer. Answer the next one in the same way as those before.\n";
const FEEDFORWARD: [&str; 6] = ["gate_proj", "up_proj", "gate_up_proj", "c_fc", "down_proj", "c_proj"];

#[derive(Debug, Serialize)]
struct Recipe<'a> {
    name: &'a str,
    base: &'a str,
    gguf: &'a Path,
    task: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    validation: Option<&'static str>,
    /// Whether a text begins with the base's BOS token.
    bos: bool,
    /// What prefix tuning begins with the keys and values of.
    #[serde(skip_serializing_if = "Option::is_none")]
    prefix_text: Option<&'static str>,
    peft: Peft,
    training: Training,
}

/// Under PEFT's own names.
#[derive(Debug, Serialize)]
#[serde(tag = "peft_type")]
enum Peft {
    #[serde(rename = "LORA")]
    Lora { r: u32, lora_alpha: u32, lora_dropout: f64, target_modules: [&'static str; LINEARS.len()] },
    #[serde(rename = "IA3")]
    Ia3 { target_modules: [&'static str; IA3_LINEARS.len()], feedforward_modules: [&'static str; FEEDFORWARD.len()] },
    #[serde(rename = "PROMPT_TUNING")]
    Prompt { num_virtual_tokens: u32, prompt_tuning_init: &'static str, prompt_tuning_init_text: &'static str },
    #[serde(rename = "PREFIX_TUNING")]
    Prefix { num_virtual_tokens: u32, prefix_projection: bool },
}

#[derive(Debug, Serialize)]
struct Training {
    learning_rate: f64,
    epochs: u32,
    batch_size: u32,
    early_stopping_patience: u32,
    max_tokens: u32,
    /// As many as there are: what is left out there would be left out in silence.
    #[serde(skip_serializing_if = "Option::is_none")]
    validation_examples: Option<usize>,
    seed: u32,
}

/// In TOML, the same for the same job and base: the trainer goes on only with the recipe it began with.
pub fn recipe(job: &Job, base: &Base) -> Result<String, toml::ser::Error> {
    // Those of lab/recipes.
    let (peft, learning_rate) = match job.method {
        Method::Supervised => (lora(DEFAULT_RANK), 3e-4),
        Method::Lora { rank } => (lora(rank), 3e-4),
        Method::Ia3 => (Peft::Ia3 { target_modules: IA3_LINEARS, feedforward_modules: FEEDFORWARD }, 1e-2),
        Method::Prompt { num_virtual_tokens } => (prompt(num_virtual_tokens), 1e-2),
        Method::Prefix { num_virtual_tokens } => (Peft::Prefix { num_virtual_tokens, prefix_projection: false }, 1e-2),
    };
    let hyperparameters = job.hyperparameters;
    toml::to_string(&Recipe {
        name: &job.adapter,
        base: &job.model,
        gguf: &base.path,
        task: TRAINING_FILE,
        validation: job.validation_file.as_ref().map(|_| VALIDATION_FILE),
        bos: base.begins_with_bos,
        prefix_text: matches!(job.method, Method::Prefix { .. }).then_some(FIRST_TEXT),
        peft,
        training: Training {
            learning_rate: learning_rate * hyperparameters.learning_rate_multiplier,
            epochs: hyperparameters.n_epochs,
            batch_size: hyperparameters.batch_size,
            early_stopping_patience: EARLY_STOPPING_PATIENCE,
            max_tokens: MAX_TOKENS,
            validation_examples: job.max_validation,
            seed: job.seed,
        },
    })
}

fn lora(rank: u32) -> Peft {
    Peft::Lora { r: rank, lora_alpha: 2 * rank, lora_dropout: 0.05, target_modules: LINEARS }
}

fn prompt(num_virtual_tokens: u32) -> Peft {
    Peft::Prompt { num_virtual_tokens, prompt_tuning_init: "TEXT", prompt_tuning_init_text: FIRST_TEXT }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fine_tuning::job::{Hyperparameters, Status};

    fn table(method: Method, max_validation: Option<usize>) -> toml::Table {
        let job = Job {
            id: "ftjob-1".to_owned(),
            created_at: 1,
            finished_at: None,
            status: Status::Queued,
            model: "m".to_owned(),
            adapter: "ft-1".to_owned(),
            generation: None,
            training_file: "file-1".to_owned(),
            validation_file: None,
            max_validation,
            seed: 1,
            method,
            hyperparameters: Hyperparameters::default(),
            metadata: None,
            trained_tokens: None,
            error: None,
            checkpoint: None,
        };
        let base = Base { id: "m".to_owned(), path: "m.gguf".into(), begins_with_bos: true };
        recipe(&job, &base).unwrap().parse().unwrap()
    }

    #[test]
    fn the_linear_layers_of_every_family_are_trained() {
        let phi = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"];
        let starcoder = ["q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"];
        let lora = table(Method::Supervised, None);
        let named = lora["peft"]["target_modules"].as_array().unwrap();
        for module in phi.iter().chain(&starcoder) {
            assert!(named.iter().any(|name| name.as_str() == Some(module)), "{module}");
        }
        let ia3 = table(Method::Ia3, None);
        let of = |field: &str| -> Vec<&str> {
            ia3["peft"][field].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect()
        };
        let (targets, feedforward) = (of("target_modules"), of("feedforward_modules"));
        for module in ["qkv_proj", "k_proj", "v_proj", "down_proj", "c_proj"] {
            assert!(targets.contains(&module), "{module}");
        }
        assert!(
            feedforward.contains(&"c_proj") && feedforward.contains(&"down_proj") && !feedforward.contains(&"v_proj")
        );
        // As PEFT wants it.
        assert!(feedforward.iter().all(|module| targets.contains(module)), "{feedforward:?}");
    }

    #[test]
    fn what_a_method_alone_has_is_in_its_recipe() {
        let of = |method| table(method, None);
        let integer = |table: &toml::Table, key: &str| table["peft"].get(key).and_then(toml::Value::as_integer);
        let lora = of(Method::Lora { rank: 4 });
        assert_eq!((integer(&lora, "r"), integer(&lora, "lora_alpha")), (Some(4), Some(8)));
        for (method, kind) in [
            (Method::Prompt { num_virtual_tokens: 7 }, "PROMPT_TUNING"),
            (Method::Prefix { num_virtual_tokens: 7 }, "PREFIX_TUNING"),
        ] {
            let recipe = of(method);
            assert_eq!(
                (recipe["peft"]["peft_type"].as_str(), integer(&recipe, "num_virtual_tokens")),
                (Some(kind), Some(7))
            );
            let text = recipe.get("prefix_text").or(recipe["peft"].get("prompt_tuning_init_text"));
            assert_eq!(text.and_then(toml::Value::as_str), Some(FIRST_TEXT));
        }
        assert!(
            !of(Method::Ia3).contains_key("prefix_text") && integer(&of(Method::Ia3), "num_virtual_tokens").is_none()
        );
    }

    #[test]
    fn what_the_base_begins_with_and_how_much_is_validated_is_said() {
        let counted = table(Method::Supervised, Some(300));
        assert_eq!(counted["training"]["validation_examples"].as_integer(), Some(300));
        assert_eq!(counted["bos"].as_bool(), Some(true));
        // A record of before.
        assert!(table(Method::Supervised, None)["training"].get("validation_examples").is_none());
    }
}
