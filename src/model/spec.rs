//! One description for every decoder this server runs.

use std::borrow::Cow;

use kernels::canonical::{ROUTER, expert_layer};
use kernels::shape::{Activation, AttentionPlan, DecoderShape, Experts, LayerAttention, Rotary};

use super::family::Family;
use super::rope::RopeScaling;

/// How a decoder is built. Names as in Hugging Face configs.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    pub architecture: Architecture,
    pub hidden_size: usize,
    /// Of the feed-forward, or of each of its experts.
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
    pub experts: Option<Experts>,
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
        experts: None,
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
    Qwen3Moe,
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
    /// GGUF's name of the module's tensor, without layer and `.weight`.
    pub part: &'static str,
    /// How many matrices the tensor stacks, where it is none itself.
    pub num_matrices: Option<usize>,
    /// Of the matrix, or of each.
    pub num_rows: usize,
    /// The module's first among the rows of all.
    pub first_row: usize,
}

impl FileRows {
    /// The module's first among the rows of its matrix.
    pub fn first_row_of_matrix(&self) -> usize {
        self.first_row % self.num_rows
    }

    /// The shape of the tensor, whose rows have this width.
    pub fn shape(&self, width: usize) -> Vec<usize> {
        self.num_matrices.into_iter().chain([self.num_rows, width]).collect()
    }
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
    /// What chooses a row's experts.
    Router,
    /// One of the three layers of the expert of this number.
    Expert(usize, Projection),
}

/// The linear layers of an expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Projection {
    Gate,
    Up,
    Down,
}

impl Projection {
    pub const ALL: [Self; 3] = [Self::Gate, Self::Up, Self::Down];
}

/// Parameters of transformers that hold a projection of every expert of a block, or two: `[experts, out, in]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FusedExperts {
    GateUp,
    Down,
}

impl FusedExperts {
    pub const ALL: [Self; 2] = [Self::GateUp, Self::Down];

    /// Name in Hugging Face's paths.
    pub fn name(self) -> &'static str {
        match self {
            Self::GateUp => "gate_up_proj",
            Self::Down => "down_proj",
        }
    }

    /// What an expert's rows belong to, in their order.
    pub fn projections(self) -> &'static [Projection] {
        match self {
            Self::GateUp => &[Projection::Gate, Projection::Up],
            Self::Down => &[Projection::Down],
        }
    }
}

impl Module {
    /// Those of attention.
    pub const ATTENTION: [Module; 4] = [Module::QProj, Module::KProj, Module::VProj, Module::OProj];

    /// Those of a block without experts.
    pub const PLAIN: [Module; 7] = [
        Module::QProj,
        Module::KProj,
        Module::VProj,
        Module::OProj,
        Module::GateProj,
        Module::UpProj,
        Module::DownProj,
    ];

    /// Its number within its block, as the kernels count. No two modules of a block share one.
    pub fn index(self) -> usize {
        match self {
            Module::QProj => 0,
            Module::KProj => 1,
            Module::VProj => 2,
            Module::OProj => 3,
            Module::GateProj => 4,
            Module::UpProj => 5,
            Module::DownProj => 6,
            Module::Router => ROUTER,
            Module::Expert(expert, projection) => expert_layer(expert, projection as usize),
        }
    }

    /// Name in Hugging Face module paths, e.g. `q_proj`.
    pub fn name(self) -> &'static str {
        match self {
            Module::QProj => "q_proj",
            Module::KProj => "k_proj",
            Module::VProj => "v_proj",
            Module::OProj => "o_proj",
            Module::GateProj | Module::Expert(_, Projection::Gate) => "gate_proj",
            Module::UpProj | Module::Expert(_, Projection::Up) => "up_proj",
            Module::DownProj | Module::Expert(_, Projection::Down) => "down_proj",
            Module::Router => "gate",
        }
    }

    /// GGUF's name of its tensor, without layer and `.weight`.
    pub fn gguf_name(self) -> &'static str {
        match self {
            Module::QProj => "attn_q",
            Module::KProj => "attn_k",
            Module::VProj => "attn_v",
            Module::OProj => "attn_output",
            Module::GateProj => "ffn_gate",
            Module::UpProj => "ffn_up",
            Module::DownProj => "ffn_down",
            Module::Router => "ffn_gate_inp",
            Module::Expert(_, Projection::Gate) => "ffn_gate_exps",
            Module::Expert(_, Projection::Up) => "ffn_up_exps",
            Module::Expert(_, Projection::Down) => "ffn_down_exps",
        }
    }

    /// Hugging Face's path of its parent inside a layer, e.g. `self_attn`.
    pub fn parent(self) -> Cow<'static, str> {
        match self {
            Module::QProj | Module::KProj | Module::VProj | Module::OProj => "self_attn".into(),
            Module::GateProj | Module::UpProj | Module::DownProj | Module::Router => "mlp".into(),
            Module::Expert(expert, _) => format!("mlp.experts.{expert}").into(),
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
            experts: features.experts,
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
        let plain = &Module::PLAIN[Module::ATTENTION.len()..];
        let plain = plain.iter().filter(|module| self.features.activation.is_gated() || **module != Module::GateProj);
        let modules: Vec<Module> = match self.features.experts {
            None => plain.copied().collect(),
            Some(Experts { count, .. }) => {
                let expert = |expert| Projection::ALL.map(|projection| Module::Expert(expert, projection));
                [Module::Router].into_iter().chain((0..count).flat_map(expert)).collect()
            }
        };
        Module::ATTENTION.into_iter().chain(modules)
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
            num_matrices: None,
            num_rows: all.iter().map(|module| rows(*module)).sum(),
            first_row: before.iter().map(|module| rows(*module)).sum(),
        };
        let (qkv, gate_up) = (&Module::ATTENTION[..3], [Module::GateProj, Module::UpProj]);
        match module {
            Module::QProj | Module::KProj | Module::VProj if self.features.fuses_qkv => {
                within("attn_qkv", &qkv[..module.index()], qkv)
            }
            Module::GateProj if self.features.fuses_gate_up => within("ffn_up", &[], &gate_up),
            Module::UpProj if self.features.fuses_gate_up => within("ffn_up", &gate_up[..1], &gate_up),
            Module::Expert(expert, _) => FileRows {
                part: module.gguf_name(),
                num_matrices: self.features.experts.map(|experts| experts.count),
                num_rows: rows(module),
                first_row: expert * rows(module),
            },
            _ => within(module.gguf_name(), &[], &[module]),
        }
    }

    /// Weights of all linear layers and of the head.
    pub fn num_linear_weights(&self) -> usize {
        self.num_weights_of(self.modules())
    }

    /// Weights that a row is multiplied by: of the experts, as many as it has.
    pub fn num_weights_of_row(&self) -> usize {
        let num_experts = self.features.experts.map_or(0, |experts| experts.used);
        self.num_weights_of(
            self.modules().filter(|module| !matches!(module, Module::Expert(expert, _) if *expert >= num_experts)),
        )
    }

    /// With those modules in each block, and the head.
    fn num_weights_of(&self, modules: impl Iterator<Item = Module>) -> usize {
        let of_module = |module| {
            let (inputs, outputs) = self.module_shape(module);
            inputs * outputs
        };
        self.num_layers * modules.map(of_module).sum::<usize>() + self.vocab_size * self.hidden_size
    }

    /// `(in, out)` features of an expert's part of a fused parameter.
    pub fn fused_shape(&self, fused: FusedExperts) -> (usize, usize) {
        let shapes = fused.projections().iter().map(|projection| self.module_shape(Module::Expert(0, *projection)));
        shapes.reduce(|(inputs, outputs), (_, more)| (inputs, outputs + more)).unwrap_or_default()
    }

    /// `(in, out)` features of a module.
    pub fn module_shape(&self, module: Module) -> (usize, usize) {
        let (h, m) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim);
        match module {
            Module::QProj => (h, q),
            Module::KProj | Module::VProj => (h, kv),
            Module::OProj => (q, h),
            Module::GateProj | Module::UpProj | Module::Expert(_, Projection::Gate | Projection::Up) => (h, m),
            Module::DownProj | Module::Expert(_, Projection::Down) => (m, h),
            Module::Router => (h, self.features.experts.map_or(0, |experts| experts.count)),
        }
    }
}
