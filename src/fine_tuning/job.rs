//! A job: what is trained, on what, and how far it has come.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a client asks for, checked but for its files.
#[derive(Debug, Clone, PartialEq)]
pub struct NewJob {
    pub training_file: String,
    pub validation_file: Option<String>,
    pub suffix: Option<String>,
    pub seed: u32,
    pub method: Method,
    pub hyperparameters: Hyperparameters,
    pub metadata: Option<BTreeMap<String, String>>,
}

/// How the adapter is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Method {
    /// LoRA under OpenAI's name.
    Supervised,
    Lora {
        rank: u32,
    },
    Ia3,
    Prompt {
        num_virtual_tokens: u32,
    },
    Prefix {
        num_virtual_tokens: u32,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, JsonSchema, Serialize, Deserialize)]
pub struct Hyperparameters {
    pub n_epochs: u32,
    pub batch_size: u32,
    /// Of the rate that the method is trained with.
    pub learning_rate_multiplier: f64,
}

impl Default for Hyperparameters {
    /// What `auto` stands for.
    fn default() -> Self {
        Self { n_epochs: 5, batch_size: 8, learning_rate_multiplier: 1.0 }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, JsonSchema, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    Queued,
    Running,
    Succeeded,
    Failed,
    Cancelled,
}

impl Status {
    pub const ALL: [Self; 5] = [Self::Queued, Self::Running, Self::Succeeded, Self::Failed, Self::Cancelled];

    pub fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }
}

/// As it is kept. Times are Unix seconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// Sorts by the time of its making.
    pub id: String,
    pub created_at: u64,
    pub finished_at: Option<u64>,
    pub status: Status,
    /// The base's id.
    pub model: String,
    /// The name that the adapter gets.
    pub adapter: String,
    /// What the trainer left, whether or not it could be installed; `None` until then, and in records of before it was kept.
    #[serde(default)]
    pub generation: Option<String>,
    pub training_file: String,
    pub validation_file: Option<String>,
    /// No validation has more examples than this; `None` in records of before it was kept.
    #[serde(default)]
    pub max_validation: Option<usize>,
    pub seed: u32,
    pub method: Method,
    pub hyperparameters: Hyperparameters,
    pub metadata: Option<BTreeMap<String, String>>,
    pub trained_tokens: Option<u64>,
    /// Why it failed.
    pub error: Option<String>,
    /// The weights that are kept: those with the lowest loss on the validation examples so far.
    pub checkpoint: Option<Checkpoint>,
}

impl Job {
    /// Whether it made this content, under whatever name it is served: there may be something else under the job's. Where the
    /// record does not say what was made, it goes by the name.
    pub fn has_made(&self, adapter: &str, generation: &str) -> bool {
        match &self.generation {
            Some(made) => made == generation,
            None => self.status == Status::Succeeded && self.adapter == adapter,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Checkpoint {
    pub created_at: u64,
    pub step: u64,
    /// Nats a token, of the step's batch; `None` where the trainer did not say.
    pub train_loss: Option<f64>,
    /// Nats a token, over all validation examples.
    pub valid_loss: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, JsonSchema, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    Info,
    Warn,
    Error,
}

/// What happened to a job. Its place among the job's events is its name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Unix seconds.
    pub created_at: u64,
    pub level: Level,
    pub message: String,
    /// Of a step or a validation.
    pub metrics: Option<Metrics>,
}

#[derive(Debug, Clone, Copy, PartialEq, JsonSchema, Serialize, Deserialize)]
pub struct Metrics {
    pub step: u64,
    pub total_steps: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train_loss: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub valid_loss: Option<f64>,
}

/// A line that the trainer prints: a JSON object. Other lines are for people.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Progress {
    /// Training goes from `step` to `steps`.
    Begin {
        step: u64,
        steps: u64,
        examples: u64,
        validation_examples: u64,
        /// Examples that are too long.
        left_out: u64,
    },
    Step {
        step: u64,
        loss: f64,
        /// Trained on so far, prompts among them.
        tokens: u64,
    },
    Validation {
        step: u64,
        loss: f64,
    },
    /// The training is done; the adapter is yet to be written.
    End {
        step: u64,
        reason: EndReason,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndReason {
    LastStep,
    /// Further steps had brought nothing better.
    EarlyStopping,
}
