//! The families of checkpoints: what GGUF calls them, their modules, and what their configuration says beyond the common.

use serde_json::{Value, json};

use super::CheckpointError;
use super::config::Metadata;
use super::fields::{Fields, refuse};

pub struct Family {
    /// As `config.json` names it.
    model_type: &'static str,
    /// As GGUF's `general.architecture` does.
    pub gguf: &'static str,
    /// Whether GGUF has the two halves of every query and key head interleaved.
    pub interleaves_heads: bool,
    /// Whether norms multiply by 1 and their weight; GGUF has the sum.
    pub adds_one_to_norms: bool,
    /// Whether norms subtract the mean.
    pub centers_norms: bool,
    /// Whether feed-forwards are of experts, each a module of the checkpoint, which GGUF has in one tensor.
    pub has_experts: bool,
    /// What `hidden_act` may be: names of one function, its own first.
    pub activations: &'static [&'static str],
    /// What heads turn by where the configuration does not say it: that of the class in transformers.
    pub rope_theta: f32,
    /// Which linear layers have a bias.
    biases: Biases,
    /// Modules that are named otherwise than in [`MODULES`].
    modules: &'static [(&'static str, &'static str)],
    /// Carries the fields over that only this family has.
    pub carry_over: fn(&Fields, &mut Metadata) -> Result<(), CheckpointError>,
}

const PLAIN: Family = Family {
    model_type: "",
    gguf: "",
    interleaves_heads: false,
    adds_one_to_norms: false,
    centers_norms: false,
    has_experts: false,
    activations: &["silu"],
    rope_theta: 10_000.0,
    biases: Biases::None,
    modules: &[],
    carry_over: full_attention,
};

/// What says that linear layers have a bias.
enum Biases {
    None,
    OfAllModels(&'static [&'static str]),
    /// Fields, what they are where they are not there, and the layers that each is about.
    Fields(&'static [(&'static str, bool, &'static [&'static str])]),
}

const ATTENTION: &[&str] = &["q_proj", "k_proj", "v_proj", "o_proj"];
const OF_ATTENTION: Biases = Biases::Fields(&[("attention_bias", false, ATTENTION)]);
const OF_ATTENTION_AND_MLP: Biases = Biases::Fields(&[
    ("attention_bias", false, ATTENTION),
    ("mlp_bias", false, &["gate_proj", "up_proj", "down_proj"]),
]);

/// The tanh approximation; Gemma's first checkpoints call it by the name of the exact function.
const GEMMA: Family =
    Family { adds_one_to_norms: true, activations: &["gelu_pytorch_tanh", "gelu"], biases: OF_ATTENTION, ..PLAIN };

const GEMMA_NORMS: &[(&str, &str)] = &[
    ("post_attention_layernorm", "post_attention_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
];

const FAMILIES: [Family; 12] = [
    Family { model_type: "llama", gguf: "llama", interleaves_heads: true, biases: OF_ATTENTION_AND_MLP, ..PLAIN },
    Family { model_type: "mistral", gguf: "llama", interleaves_heads: true, carry_over: mistral, ..PLAIN },
    Family {
        model_type: "qwen2",
        gguf: "qwen2",
        biases: Biases::OfAllModels(&["q_proj", "k_proj", "v_proj"]),
        carry_over: unused_window,
        ..PLAIN
    },
    Family { model_type: "qwen3", gguf: "qwen3", biases: OF_ATTENTION, carry_over: unused_window, ..PLAIN },
    Family {
        model_type: "qwen3_moe",
        gguf: "qwen3moe",
        has_experts: true,
        biases: OF_ATTENTION,
        modules: &[("mlp.gate", ROUTER)],
        carry_over: qwen3_moe,
        ..PLAIN
    },
    Family {
        model_type: "granite",
        gguf: "granite",
        interleaves_heads: true,
        biases: OF_ATTENTION_AND_MLP,
        carry_over: granite,
        ..PLAIN
    },
    Family {
        model_type: "smollm3",
        gguf: "smollm3",
        interleaves_heads: true,
        rope_theta: 2_000_000.0,
        biases: OF_ATTENTION_AND_MLP,
        carry_over: smollm3,
        ..PLAIN
    },
    Family {
        model_type: "phi3",
        gguf: "phi3",
        modules: &[("self_attn.qkv_proj", "attn_qkv"), ("mlp.gate_up_proj", "ffn_up")],
        carry_over: phi3,
        ..PLAIN
    },
    Family {
        model_type: "starcoder2",
        gguf: "starcoder2",
        centers_norms: true,
        activations: &["gelu_pytorch_tanh"],
        biases: Biases::Fields(&[("use_bias", true, &["q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"])]),
        modules: &[("mlp.c_fc", "ffn_up"), ("mlp.c_proj", "ffn_down")],
        carry_over: starcoder2,
        ..PLAIN
    },
    Family { model_type: "gemma", gguf: "gemma", ..GEMMA },
    Family { model_type: "gemma2", gguf: "gemma2", modules: GEMMA_NORMS, carry_over: gemma2, ..GEMMA },
    Family {
        model_type: "gemma3_text",
        gguf: "gemma3",
        rope_theta: 1_000_000.0,
        modules: GEMMA_NORMS,
        carry_over: gemma3,
        ..GEMMA
    },
];

/// GGUF's name of what chooses experts.
pub const ROUTER: &str = "ffn_gate_inp";

/// Modules of a layer, and GGUF's names for them.
const MODULES: [(&str, &str); 11] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

impl Family {
    pub fn named(model_type: &str) -> Result<&'static Self, CheckpointError> {
        let known = || FAMILIES.map(|family| family.model_type).join(", ");
        let found = FAMILIES.iter().find(|family| family.model_type == model_type);
        found.ok_or_else(|| refuse("model_type", format!("{model_type:?} is not read (read are {})", known())))
    }

    /// GGUF's name of a module: of a layer's as of the decoder's own. All experts of a layer have one.
    pub fn gguf_module(&self, module: &str) -> Option<String> {
        match module {
            "model.embed_tokens" => return Some("token_embd".to_owned()),
            "model.norm" => return Some("output_norm".to_owned()),
            "lm_head" => return Some("output".to_owned()),
            _ => {}
        }
        let (layer, module) = module.strip_prefix("model.layers.")?.split_once('.')?;
        let layer: usize = layer.parse().ok()?;
        if let Some((_, part)) = expert_of(module).filter(|_| self.has_experts) {
            return Some(format!("blk.{layer}.ffn_{}_exps", part.strip_suffix("_proj")?));
        }
        let (_, name) = self.modules.iter().chain(&MODULES).find(|(of, _)| *of == module)?;
        Some(format!("blk.{layer}.{name}"))
    }

    /// The linear layers that have a bias, by the last part of their names.
    pub fn biased(&self, fields: &Fields) -> Result<Vec<&'static str>, CheckpointError> {
        let by_field = match self.biases {
            Biases::None => return Ok(Vec::new()),
            Biases::OfAllModels(layers) => return Ok(layers.to_vec()),
            Biases::Fields(by_field) => by_field,
        };
        let mut biased = Vec::new();
        for (field, is_usual, layers) in by_field {
            if fields.flag(field)?.unwrap_or(*is_usual) {
                biased.extend_from_slice(layers);
            }
        }
        Ok(biased)
    }

    /// Whether GGUF has the rows of this module in another order.
    pub fn interleaves(&self, module: &str) -> bool {
        self.interleaves_heads && (module.ends_with(".self_attn.q_proj") || module.ends_with(".self_attn.k_proj"))
    }

    /// Whether GGUF has this weight with 1 added.
    pub fn adds_one(&self, name: &str) -> bool {
        self.adds_one_to_norms && name.ends_with("norm.weight")
    }
}

/// The number of the expert that a module of a layer belongs to, and its name within that.
fn expert_of(module: &str) -> Option<(usize, &str)> {
    let (number, part) = module.rsplit_once("mlp.experts.")?.1.split_once('.')?;
    Some((number.parse().ok()?, part)).filter(|(_, part)| ["gate_proj", "up_proj", "down_proj"].contains(part))
}

/// The number of the expert that a module belongs to, if it is one's.
pub fn expert_number(module: &str) -> Option<usize> {
    expert_of(module).map(|(number, _)| number)
}

/// No layer has a window.
fn full_attention(fields: &Fields, _: &mut Metadata) -> Result<(), CheckpointError> {
    layers_are(fields, "full_attention")
}

fn layers_are(fields: &Fields, kind: &str) -> Result<(), CheckpointError> {
    let are_all = |kinds: &Value| kinds.as_array().is_some_and(|kinds| kinds.iter().all(|found| found == kind));
    match fields.take("layer_types") {
        Some(kinds) if !are_all(kinds) => Err(refuse("layer_types", format!("{kinds} is not served"))),
        _ => Ok(()),
    }
}

/// Every layer has the window, where there is one.
fn one_window(fields: &Fields, metadata: &mut Metadata) -> Result<(), CheckpointError> {
    match fields.optional_count("sliding_window")? {
        Some(window) => {
            layers_are(fields, "sliding_attention")?;
            metadata.count("attention.sliding_window", window)
        }
        None => layers_are(fields, "full_attention"),
    }
}

/// A window that is not there is that of the class, and one that is `null` is none.
fn mistral(fields: &Fields, metadata: &mut Metadata) -> Result<(), CheckpointError> {
    const WINDOW: usize = 4096;
    if fields.has("sliding_window") {
        return one_window(fields, metadata);
    }
    layers_are(fields, "sliding_attention")?;
    metadata.count("attention.sliding_window", WINDOW)
}

/// Only with `use_sliding_window` does the window say anything.
fn unused_window(fields: &Fields, metadata: &mut Metadata) -> Result<(), CheckpointError> {
    fields.must_be("use_sliding_window", &[json!(false)])?;
    fields.take("sliding_window");
    full_attention(fields, metadata)
}

/// Every layer has experts.
fn qwen3_moe(fields: &Fields, metadata: &mut Metadata) -> Result<(), CheckpointError> {
    fields.must_be("decoder_sparse_step", &[json!(1)])?;
    fields.must_be("mlp_only_layers", &[json!([])])?;
    // Qwen3-Coder's say what other models of experts have, and that it has norms of heads.
    fields.must_be("shared_expert_intermediate_size", &[json!(0)])?;
    fields.must_be("use_qk_norm", &[json!(true)])?;
    // Files of GGUF are of models that do, unless they say otherwise; configurations the other way round.
    if !fields.flag("norm_topk_prob")?.unwrap_or(false) {
        metadata.flag("expert_weights_norm", false);
    }
    unused_window(fields, metadata)
}

fn granite(fields: &Fields, metadata: &mut Metadata) -> Result<(), CheckpointError> {
    for (field, key) in [
        ("embedding_multiplier", "embedding_scale"),
        ("residual_multiplier", "residual_scale"),
        ("attention_multiplier", "attention.scale"),
        ("logits_scaling", "logit_scale"),
    ] {
        metadata.number(key, fields.number(field)?);
    }
    full_attention(fields, metadata)
}

/// Every fourth layer goes without rotary positions; GGUF says so by the architecture alone.
fn smollm3(fields: &Fields, metadata: &mut Metadata) -> Result<(), CheckpointError> {
    fields.must_be("no_rope_layer_interval", &[json!(4)])?;
    let every_fourth =
        |layers: &Vec<Value>| (1..).zip(layers).all(|(number, turns)| *turns == json!(u32::from(number % 4 != 0)));
    match fields.take("no_rope_layers") {
        Some(layers) if !layers.as_array().is_some_and(every_fourth) => {
            return Err(refuse("no_rope_layers", format!("{layers} is not served: every fourth layer goes without")));
        }
        _ => {}
    }
    unused_window(fields, metadata)
}

/// Phi-4-mini's say of attention and positions that they are the usual ones.
fn phi3(fields: &Fields, metadata: &mut Metadata) -> Result<(), CheckpointError> {
    fields.must_be("full_attn_mod", &[json!(1)])?;
    fields.must_be("interpolate_factor", &[json!(1)])?;
    one_window(fields, metadata)
}

fn starcoder2(fields: &Fields, metadata: &mut Metadata) -> Result<(), CheckpointError> {
    fields.must_be("mlp_type", &[json!("default")])?;
    fields.must_be("norm_type", &[json!("layer_norm")])?;
    // StarCoder2-7B's still have those of StarCoder, which say nothing to a model of this type.
    for field in [
        "activation_function",
        "attention_softmax_in_fp32",
        "layer_norm_epsilon",
        "scale_attention_softmax_in_fp32",
        "scale_attn_weights",
    ] {
        fields.take(field);
    }
    one_window(fields, metadata)
}

/// Attention is scaled by `query_pre_attn_scalar`^(-1/2); windows are those of the architecture, which GGUF knows by it, unless
/// `layer_types` says otherwise.
fn gemma_attention(fields: &Fields, metadata: &mut Metadata, full_every: usize) -> Result<(), CheckpointError> {
    metadata.number("attention.scale", fields.number("query_pre_attn_scalar")?.powf(-0.5));
    let window = fields.count("sliding_window")?;
    metadata.count("attention.sliding_window", window)?;
    // Gemma 2 says it twice.
    fields.must_be("sliding_window_size", &[json!(window)])?;
    let layers = fields.count("num_hidden_layers")?;
    let patterns =
        [fields.optional_count("sliding_window_pattern")?, fields.optional_count("_sliding_window_pattern")?];
    let every = patterns.into_iter().flatten().next().unwrap_or(full_every);
    let has_window = match fields.take("layer_types") {
        None => (1..=layers).map(|number| !number.is_multiple_of(every)).collect::<Vec<_>>(),
        Some(kinds) => {
            let has_window = |kind: &Value| match kind.as_str()? {
                "sliding_attention" => Some(true),
                "full_attention" => Some(false),
                _ => None,
            };
            let flags = kinds.as_array().and_then(|kinds| kinds.iter().map(has_window).collect());
            flags.ok_or_else(|| refuse("layer_types", format!("{kinds} is not served")))?
        }
    };
    metadata.flags("attention.sliding_window_pattern", &has_window);
    fields.must_be("use_bidirectional_attention", &[json!(false)])
}

fn gemma2(fields: &Fields, metadata: &mut Metadata) -> Result<(), CheckpointError> {
    soft_caps(fields, metadata)?;
    gemma_attention(fields, metadata, 2)
}

fn gemma3(fields: &Fields, metadata: &mut Metadata) -> Result<(), CheckpointError> {
    soft_caps(fields, metadata)?;
    gemma_attention(fields, metadata, 6)?;
    if let Some(theta) = fields.optional_number("rope_local_base_freq")? {
        metadata.number("rope.freq_base_swa", theta);
    }
    Ok(())
}

/// A cap that is not there is the architecture's, and one that is `null` is none.
fn soft_caps(fields: &Fields, metadata: &mut Metadata) -> Result<(), CheckpointError> {
    for name in ["attn_logit_softcapping", "final_logit_softcapping"] {
        match fields.optional_number(name)? {
            Some(cap) => metadata.number(name, cap),
            None if fields.is_null(name) => metadata.number(name, 0.0),
            None => {}
        }
    }
    Ok(())
}
