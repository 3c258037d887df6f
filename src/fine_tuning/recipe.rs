//! The recipe that the trainer gets: a file as those of lab/recipes, with the methods that ship there.

use std::path::Path;

use serde::Serialize;

use super::job::{Job, Method};

pub const FILE: &str = "recipe.toml";
/// Beside the recipe.
pub const TRAINING_FILE: &str = "training.jsonl";
pub const VALIDATION_FILE: &str = "validation.jsonl";

/// Longer examples, prompt and answer together, are left out.
const MAX_TOKENS: u32 = 1024;
pub const DEFAULT_RANK: u32 = 16;
pub const DEFAULT_VIRTUAL_TOKENS: u32 = 20;
const LINEARS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
const IA3_LINEARS: [&str; 6] = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"];
const FEEDFORWARD: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

#[derive(Debug, Serialize)]
struct Recipe<'a> {
    name: &'a str,
    base: &'a str,
    gguf: &'a Path,
    task: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    validation: Option<&'static str>,
    peft: Peft,
    training: Training,
}

/// Under PEFT's own names.
#[derive(Debug, Serialize)]
#[serde(tag = "peft_type")]
enum Peft {
    #[serde(rename = "LORA")]
    Lora { r: u32, lora_alpha: u32, lora_dropout: f64, target_modules: [&'static str; 7] },
    #[serde(rename = "IA3")]
    Ia3 { target_modules: [&'static str; 6], feedforward_modules: [&'static str; 3] },
    #[serde(rename = "PROMPT_TUNING")]
    Prompt { num_virtual_tokens: u32 },
    #[serde(rename = "PREFIX_TUNING")]
    Prefix { num_virtual_tokens: u32, prefix_projection: bool },
}

#[derive(Debug, Serialize)]
struct Training {
    learning_rate: f64,
    epochs: u32,
    batch_size: u32,
    max_tokens: u32,
    seed: u32,
}

/// In TOML, the same for the same job: the trainer goes on only with the recipe it began with. `gguf` is the base's
/// file.
pub fn recipe(job: &Job, gguf: &Path) -> Result<String, toml::ser::Error> {
    // Those of lab/recipes.
    let (peft, learning_rate) = match job.method {
        Method::Supervised => (lora(DEFAULT_RANK), 3e-4),
        Method::Lora { rank } => (lora(rank), 3e-4),
        Method::Ia3 => (Peft::Ia3 { target_modules: IA3_LINEARS, feedforward_modules: FEEDFORWARD }, 1e-2),
        Method::Prompt { num_virtual_tokens } => (Peft::Prompt { num_virtual_tokens }, 1e-2),
        Method::Prefix { num_virtual_tokens } => (Peft::Prefix { num_virtual_tokens, prefix_projection: false }, 1e-2),
    };
    let hyperparameters = job.hyperparameters;
    toml::to_string(&Recipe {
        name: &job.adapter,
        base: &job.model,
        gguf,
        task: TRAINING_FILE,
        validation: job.validation_file.as_ref().map(|_| VALIDATION_FILE),
        peft,
        training: Training {
            learning_rate: learning_rate * hyperparameters.learning_rate_multiplier,
            epochs: hyperparameters.n_epochs,
            batch_size: hyperparameters.batch_size,
            max_tokens: MAX_TOKENS,
            seed: job.seed,
        },
    })
}

fn lora(rank: u32) -> Peft {
    Peft::Lora { r: rank, lora_alpha: 2 * rank, lora_dropout: 0.05, target_modules: LINEARS }
}
