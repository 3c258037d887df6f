//! One description for every decoder this server runs.

use kernels::shape::{Activation, AttentionPlan, DecoderShape, LayerAttention, Rotary};

use super::family::Family;
use super::rope::RopeScaling;

/// How a decoder is built. Names as in Hugging Face configs.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    pub architecture: Architecture,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    pub vocab_size: usize,
    pub rope_theta: f32,
    pub norm_eps: f32,
    /// Longest sequence the model was trained for, in tokens.
    pub context_length: usize,
    pub features: Features,
}

/// What sets a decoder apart from the plain one: root-mean-square norms before attention and feed-forward, gated SiLU, whole
/// heads turned by one frequency table, all positions seen.
#[derive(Debug, Clone, PartialEq)]
pub struct Features {
    /// Whether the file has the two halves of every query and key head interleaved.
    pub has_interleaved_heads: bool,
    /// Whether the file has q, k and v in one matrix, and gate and up.
    pub fuses_qkv: bool,
    pub fuses_gate_up: bool,
    pub activation: Activation,
    /// As in [`DecoderShape`], as all below.
    pub centers_norms: bool,
    pub norms_heads: bool,
    pub norms_residuals: bool,
    pub embedding_scale: f32,
    pub prompt_scale: f32,
    pub residual_scale: f32,
    /// What the logits are multiplied by.
    pub logit_scale: f32,
    /// `None` is `1 / sqrt(head_dim)`.
    pub attention_scale: Option<f32>,
    pub attention_soft_cap: Option<f32>,
    pub logit_soft_cap: Option<f32>,
    /// Dimensions of a head that turn; `None` is all.
    pub rotary_dims: Option<usize>,
    pub rope_scaling: RopeScaling,
    /// Every so many layers the heads of one do not turn.
    pub unturned_every: Option<usize>,
    pub window: Option<Window>,
}

/// A sliding window.
#[derive(Debug, Clone, PartialEq)]
pub struct Window {
    /// How many positions a row sees, its own among them.
    pub size: usize,
    /// `[num_layers]`: which layers have it.
    pub layers: Vec<bool>,
    /// What these layers turn by, without any scaling; `None`: as the others do.
    pub rope_theta: Option<f32>,
}

impl Features {
    pub const PLAIN: Self = Self {
        has_interleaved_heads: false,
        fuses_qkv: false,
        fuses_gate_up: false,
        activation: Activation::GatedSilu,
        centers_norms: false,
        norms_heads: false,
        norms_residuals: false,
        embedding_scale: 1.0,
        prompt_scale: 1.0,
        residual_scale: 1.0,
        logit_scale: 1.0,
        attention_scale: None,
        attention_soft_cap: None,
        logit_soft_cap: None,
        rotary_dims: None,
        rope_scaling: RopeScaling::NONE,
        unturned_every: None,
        window: None,
    };
}

/// Decoder families by the names that GGUF's `general.architecture` has for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    Llama,
    Qwen2,
    Qwen3,
    SmolLm3,
    Granite,
    Phi3,
    StarCoder2,
    Gemma,
    Gemma2,
    Gemma3,
}

impl Architecture {
    /// As in `general.architecture`.
    pub fn name(self) -> &'static str {
        Family::of(self).name
    }

    /// Those of every model of the family.
    pub fn features(self) -> Features {
        Family::of(self).features.clone()
    }
}

/// Where the file has the rows of a module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileRows {
    /// GGUF's name of the module's matrix, without layer and `.weight`.
    pub part: &'static str,
    /// Of the matrix.
    pub num_rows: usize,
    /// The module's first among them.
    pub first_row: usize,
}

/// The linear layers of one decoder block, which an adapter may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Module {
    QProj,
    KProj,
    VProj,
    OProj,
    GateProj,
    UpProj,
    DownProj,
}

impl Module {
    pub const ALL: [Module; 7] = [
        Module::QProj,
        Module::KProj,
        Module::VProj,
        Module::OProj,
        Module::GateProj,
        Module::UpProj,
        Module::DownProj,
    ];

    /// Name in Hugging Face module paths, e.g. `q_proj`.
    pub fn name(self) -> &'static str {
        match self {
            Module::QProj => "q_proj",
            Module::KProj => "k_proj",
            Module::VProj => "v_proj",
            Module::OProj => "o_proj",
            Module::GateProj => "gate_proj",
            Module::UpProj => "up_proj",
            Module::DownProj => "down_proj",
        }
    }

    /// GGUF's name of its matrix, without layer and `.weight`.
    pub fn gguf_name(self) -> &'static str {
        match self {
            Module::QProj => "attn_q",
            Module::KProj => "attn_k",
            Module::VProj => "attn_v",
            Module::OProj => "attn_output",
            Module::GateProj => "ffn_gate",
            Module::UpProj => "ffn_up",
            Module::DownProj => "ffn_down",
        }
    }

    /// Parent of the module inside a layer: `self_attn` or `mlp`.
    pub fn parent(self) -> &'static str {
        match self {
            Module::QProj | Module::KProj | Module::VProj | Module::OProj => "self_attn",
            Module::GateProj | Module::UpProj | Module::DownProj => "mlp",
        }
    }
}

impl ModelSpec {
    /// What a device needs to know.
    pub fn shape(&self) -> DecoderShape {
        let features = &self.features;
        DecoderShape {
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_layers: self.num_layers,
            num_heads: self.num_heads,
            num_kv_heads: self.num_kv_heads,
            head_dim: self.head_dim,
            vocab_size: self.vocab_size,
            context_length: self.context_length,
            norm_eps: self.norm_eps,
            activation: features.activation,
            centers_norms: features.centers_norms,
            norms_heads: features.norms_heads,
            norms_residuals: features.norms_residuals,
            embedding_scale: features.embedding_scale,
            prompt_scale: features.prompt_scale,
            residual_scale: features.residual_scale,
            attention_scale: features.attention_scale.unwrap_or(DecoderShape::default_attention_scale(self.head_dim)),
            attention_soft_cap: features.attention_soft_cap,
            logit_soft_cap: features.logit_soft_cap,
        }
    }

    /// What attention is in each layer.
    pub fn attention_plan(&self) -> AttentionPlan {
        let Features { rotary_dims, rope_scaling, unturned_every, window, .. } = &self.features;
        let dims = rotary_dims.unwrap_or(self.head_dim);
        let mut rotaries: Vec<Rotary> = Vec::new();
        let layer = |layer: usize| {
            let window = window.as_ref().filter(|window| window.layers.get(layer) == Some(&true));
            let is_unturned = unturned_every.is_some_and(|every| (layer + 1).is_multiple_of(every));
            let rotary = match window.and_then(|window| window.rope_theta) {
                _ if is_unturned => Rotary::none(),
                Some(theta) => Rotary::plain(dims, theta),
                None => rope_scaling.rotary(dims, self.rope_theta, self.context_length),
            };
            let found = rotaries.iter().position(|known| *known == rotary);
            let rotary = found.unwrap_or_else(|| {
                rotaries.push(rotary);
                rotaries.len() - 1
            });
            // One that holds the longest sequence hides nothing.
            let window = window.map(|window| window.size).filter(|size| *size < self.context_length);
            LayerAttention { rotary, window }
        };
        let layers = (0..self.num_layers).map(layer).collect();
        AttentionPlan { rotaries, layers }
    }

    /// The linear layers that each block has.
    pub fn modules(&self) -> impl Iterator<Item = Module> + use<> {
        let is_gated = self.features.activation.is_gated();
        Module::ALL.into_iter().filter(move |module| is_gated || *module != Module::GateProj)
    }

    /// Hugging Face's path of the layer that holds a module: q, k and v share one where they are fused, as gate and up do, and a
    /// feed-forward without a gate has other names.
    pub fn module_path(&self, layer: usize, module: Module) -> String {
        let is_gated = self.features.activation.is_gated();
        let name = match module {
            Module::QProj | Module::KProj | Module::VProj if self.features.fuses_qkv => "qkv_proj",
            Module::GateProj | Module::UpProj if self.features.fuses_gate_up => "gate_up_proj",
            Module::UpProj if !is_gated => "c_fc",
            Module::DownProj if !is_gated => "c_proj",
            other => other.name(),
        };
        format!("model.layers.{layer}.{}.{name}", module.parent())
    }

    /// Where the file has a module's rows.
    pub fn file_rows(&self, module: Module) -> FileRows {
        let rows = |module| self.module_shape(module).1;
        let within = |part, before: &[Module], all: &[Module]| FileRows {
            part,
            num_rows: all.iter().map(|module| rows(*module)).sum(),
            first_row: before.iter().map(|module| rows(*module)).sum(),
        };
        let (qkv, gate_up) = (&Module::ALL[..3], [Module::GateProj, Module::UpProj]);
        match module {
            Module::QProj | Module::KProj | Module::VProj if self.features.fuses_qkv => {
                within("attn_qkv", &qkv[..module as usize], qkv)
            }
            Module::GateProj if self.features.fuses_gate_up => within("ffn_up", &[], &gate_up),
            Module::UpProj if self.features.fuses_gate_up => within("ffn_up", &gate_up[..1], &gate_up),
            _ => FileRows { part: module.gguf_name(), num_rows: rows(module), first_row: 0 },
        }
    }

    /// Weights of all linear layers and of the head.
    pub fn num_linear_weights(&self) -> usize {
        let of_module = |module| {
            let (inputs, outputs) = self.module_shape(module);
            inputs * outputs
        };
        self.num_layers * self.modules().map(of_module).sum::<usize>() + self.vocab_size * self.hidden_size
    }

    /// `(in, out)` features of a module.
    pub fn module_shape(&self, module: Module) -> (usize, usize) {
        let (h, m) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim);
        match module {
            Module::QProj => (h, q),
            Module::KProj | Module::VProj => (h, kv),
            Module::OProj => (q, h),
            Module::GateProj | Module::UpProj => (h, m),
            Module::DownProj => (m, h),
        }
    }
}
