//! What a decoder is to a device: its dimensions, and the arithmetic between its matrix products, as data.

use crate::attention::{KvStore, KvType};
use crate::canonical::{LAYERS_PER_BLOCK, expert_layer};

/// Dimensions of a decoder, named as in Hugging Face configs, and what its layers have in common.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DecoderShape {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    pub vocab_size: usize,
    /// Longest sequence in tokens.
    pub context_length: usize,
    pub norm_eps: f32,
    pub activation: Activation,
    /// What every feed-forward consists of, where it is not one; `intermediate_size` is that of each.
    pub experts: Option<Experts>,
    /// Whether norms center their input and have a bias (LayerNorm).
    pub centers_norms: bool,
    /// Whether every query and key head has a norm of its own, before it is turned.
    pub norms_heads: bool,
    /// Whether a norm stands between attention or feed-forward and the hidden state it is added to.
    pub norms_residuals: bool,
    /// What the embedding of a token is multiplied by.
    pub embedding_scale: f32,
    /// What a virtual embedding of an adapter is multiplied by.
    pub prompt_scale: f32,
    /// What the result of attention or feed-forward is multiplied by before it is added.
    pub residual_scale: f32,
    /// What the products of queries and keys are multiplied by.
    pub attention_scale: f32,
    /// `cap · tanh(score / cap)` of the scaled products.
    pub attention_soft_cap: Option<f32>,
    /// The same of the logits.
    pub logit_soft_cap: Option<f32>,
}

/// What stands between the projections of a feed-forward.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Activation {
    /// `silu(gate) ∘ up`
    #[default]
    GatedSilu,
    /// `gelu(gate) ∘ up`, GELU by its approximation with tanh.
    GatedGelu,
    /// `gelu(up)`, without a gate.
    Gelu,
}

impl Activation {
    pub fn is_gated(self) -> bool {
        self != Self::Gelu
    }
}

/// Feed-forwards side by side, of which each row takes the few that a router chooses for it (Shazeer et al. 2017).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Experts {
    pub count: usize,
    /// How many of them a row takes; from 1 to `count`.
    pub used: usize,
    /// Whether the shares of those that a row takes are made to add up to 1; else each keeps its share among all.
    pub normalizes_shares: bool,
}

/// What attention is in each layer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AttentionPlan {
    pub rotaries: Vec<Rotary>,
    /// `[num_layers]`
    pub layers: Vec<LayerAttention>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerAttention {
    /// Index into [`AttentionPlan::rotaries`].
    pub rotary: usize,
    /// How many positions a row sees, its own among them; `None` is all.
    pub window: Option<usize>,
}

/// How heads turn with their position: dimension `i` with dimension `i + frequencies.len()` ("neox" order); what is
/// beyond stays as it is.
#[derive(Debug, Clone, PartialEq)]
pub struct Rotary {
    /// In radians a position; none where heads do not turn.
    pub frequencies: Vec<f64>,
    /// What cosines and sines are multiplied by.
    pub magnitude: f64,
}

impl Rotary {
    /// `theta^(-2i/dims)`
    pub fn plain(dims: usize, theta: f32) -> Self {
        let half = dims / 2;
        let frequencies = (0..half).map(|dim| f64::from(theta).powf(-(dim as f64) / half as f64)).collect();
        Self { frequencies, magnitude: 1.0 }
    }

    /// Heads that do not turn.
    pub fn none() -> Self {
        Self { frequencies: Vec::new(), magnitude: 1.0 }
    }
}

impl DecoderShape {
    /// Bytes of one block of [`crate::attention::BLOCK_SIZE`] positions in a KV store.
    pub fn kv_block_bytes(&self, kv_type: KvType) -> usize {
        KvStore::block_bytes(kv_type, self.num_layers, self.num_kv_heads, self.head_dim)
    }

    /// Linear layers of a decoder block, each of whose experts has its own.
    pub fn layers_per_block(&self) -> usize {
        self.experts.map_or(LAYERS_PER_BLOCK, |experts| expert_layer(experts.count, 0))
    }

    /// Rows at experts, of so many rows; each goes to one feed-forward where there are no experts.
    pub fn num_slots(&self, num_rows: usize) -> usize {
        num_rows * self.experts.map_or(1, |experts| experts.used)
    }

    /// Floats of a row of queries, and of keys or values.
    pub fn q_width(&self) -> usize {
        self.num_heads * self.head_dim
    }

    pub fn kv_width(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// Whether what all keys have in common takes the same off all scores of a query, which changes no weight of a softmax.
    pub fn keys_may_be_centered(&self) -> bool {
        !self.norms_heads && self.attention_soft_cap.is_none()
    }

    /// What the scores of attention are multiplied by where a family does not say otherwise.
    pub fn default_attention_scale(head_dim: usize) -> f32 {
        1.0 / (head_dim as f32).sqrt()
    }
}
