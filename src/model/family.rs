//! The decoder families that GGUF files are of: what sets each apart from the plain decoder, and what its keys mean.

use std::sync::LazyLock;

use kernels::shape::Activation;

use super::spec::{Architecture, Features};

/// What `general.architecture` says without any other key.
pub struct Family {
    pub architecture: Architecture,
    /// As in `general.architecture`.
    pub name: &'static str,
    /// The features of every model of the family; sizes and numbers come from the file.
    pub features: Features,
    pub embedding_scale: EmbeddingScale,
    /// Which layers `attention.sliding_window` is about; `None` where the key has no meaning.
    pub windows: Option<Windows>,
    /// Whether `embedding_scale`, `residual_scale` and `logit_scale` (which divides) are read, and
    /// `rope.scaling.finetuned = false` means that no head turns.
    pub has_multipliers: bool,
    /// What `attn_logit_softcapping` and `final_logit_softcapping` are where the file does not say it; `None` where they are not
    /// read.
    pub soft_caps: Option<SoftCaps>,
    /// Whether feed-forwards are of experts, whose number and use the `expert_` keys say.
    pub has_experts: bool,
    /// Models of so many layers scale attention by `hidden_size / num_heads`, which no key says.
    pub layers_scaled_by_hidden_size: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EmbeddingScale {
    One,
    /// `sqrt(hidden_size)`, of tokens and not of virtual embeddings.
    RootOfHiddenSize,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SoftCaps {
    pub attention: Option<f32>,
    pub logits: Option<f32>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Windows {
    /// What `attention.sliding_window` is where the file does not say it.
    pub size: Option<usize>,
    /// Every so many layers one sees all; `None`: none does.
    pub full_every: Option<usize>,
    /// What layers with a window turn by, where it is not what the others do; `rope.freq_base_swa` overrides it.
    pub rope_theta: Option<f32>,
}

const PLAIN: Family = Family {
    architecture: Architecture::Llama,
    name: "",
    features: Features::PLAIN,
    embedding_scale: EmbeddingScale::One,
    windows: None,
    has_multipliers: false,
    soft_caps: None,
    has_experts: false,
    layers_scaled_by_hidden_size: None,
};

/// Rows of queries and keys interleaved, as llama.cpp's converter leaves those of Llama and its kin.
fn interleaved() -> Features {
    Features { has_interleaved_heads: true, ..Features::PLAIN }
}

fn gemma() -> Features {
    Features { activation: Activation::GatedGelu, ..Features::PLAIN }
}

const ALL_LAYERS: Windows = Windows { size: None, full_every: None, rope_theta: None };

static FAMILIES: LazyLock<[Family; 11]> = LazyLock::new(|| {
    [
        // Llama 2 and 3, CodeLlama, Mistral, Codestral, DeepSeek-Coder, SmolLM2
        Family { name: "llama", features: interleaved(), windows: Some(ALL_LAYERS), ..PLAIN },
        Family { architecture: Architecture::Qwen2, name: "qwen2", ..PLAIN },
        Family {
            architecture: Architecture::Qwen3,
            name: "qwen3",
            features: Features { norms_heads: true, ..Features::PLAIN },
            ..PLAIN
        },
        // Qwen3-Coder
        Family {
            architecture: Architecture::Qwen3Moe,
            name: "qwen3moe",
            features: Features { norms_heads: true, ..Features::PLAIN },
            has_experts: true,
            ..PLAIN
        },
        Family {
            architecture: Architecture::SmolLm3,
            name: "smollm3",
            features: Features { unturned_every: Some(4), ..interleaved() },
            ..PLAIN
        },
        Family {
            architecture: Architecture::Granite,
            name: "granite",
            features: interleaved(),
            has_multipliers: true,
            ..PLAIN
        },
        Family { architecture: Architecture::Phi3, name: "phi3", windows: Some(ALL_LAYERS), ..PLAIN },
        Family {
            architecture: Architecture::StarCoder2,
            name: "starcoder2",
            features: Features { activation: Activation::Gelu, centers_norms: true, ..Features::PLAIN },
            windows: Some(ALL_LAYERS),
            ..PLAIN
        },
        // Gemma 1, CodeGemma
        Family {
            architecture: Architecture::Gemma,
            name: "gemma",
            features: gemma(),
            embedding_scale: EmbeddingScale::RootOfHiddenSize,
            ..PLAIN
        },
        Family {
            architecture: Architecture::Gemma2,
            name: "gemma2",
            features: Features { norms_residuals: true, ..gemma() },
            embedding_scale: EmbeddingScale::RootOfHiddenSize,
            // As llama.cpp has them: its first files did not say them.
            windows: Some(Windows { size: Some(4096), full_every: Some(2), rope_theta: None }),
            soft_caps: Some(SoftCaps { attention: Some(50.0), logits: Some(30.0) }),
            layers_scaled_by_hidden_size: Some(46),
            ..PLAIN
        },
        Family {
            architecture: Architecture::Gemma3,
            name: "gemma3",
            features: Features { norms_residuals: true, norms_heads: true, ..gemma() },
            embedding_scale: EmbeddingScale::RootOfHiddenSize,
            windows: Some(Windows { size: None, full_every: Some(6), rope_theta: Some(10_000.0) }),
            soft_caps: Some(SoftCaps { attention: None, logits: None }),
            layers_scaled_by_hidden_size: Some(62),
            ..PLAIN
        },
    ]
});

impl Family {
    /// Of a `general.architecture`.
    pub fn named(name: &str) -> Option<&'static Self> {
        FAMILIES.iter().find(|family| family.name == name)
    }

    pub fn of(architecture: Architecture) -> &'static Self {
        let found = FAMILIES.iter().find(|family| family.architecture == architecture);
        found.expect("every architecture is a family")
    }

    pub fn names() -> String {
        FAMILIES.iter().map(|family| family.name).collect::<Vec<_>>().join(", ")
    }
}
