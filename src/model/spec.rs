//! One description for every decoder this server runs.

use kernels::device::DecoderShape;

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
    pub rms_norm_eps: f32,
    /// Longest sequence the model was trained for, in tokens.
    pub context_length: usize,
}

/// Decoder families, named as GGUF's `general.architecture` names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    Llama,
    Qwen2,
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
        DecoderShape {
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_layers: self.num_layers,
            num_heads: self.num_heads,
            num_kv_heads: self.num_kv_heads,
            head_dim: self.head_dim,
            vocab_size: self.vocab_size,
            rope_theta: self.rope_theta,
            rms_norm_eps: self.rms_norm_eps,
            context_length: self.context_length,
        }
    }

    /// Weights of all linear layers and of the head.
    pub fn num_linear_weights(&self) -> usize {
        let of_module = |module| {
            let (inputs, outputs) = self.module_shape(module);
            inputs * outputs
        };
        self.num_layers * Module::ALL.into_iter().map(of_module).sum::<usize>() + self.vocab_size * self.hidden_size
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
