//! The families of checkpoints: what GGUF calls them, their modules, and what their configuration says beyond the common.

use serde_json::json;

use super::CheckpointError;
use super::config::{Fields, Metadata, refuse};

pub struct Family {
    /// As `config.json` names it.
    model_type: &'static str,
    /// As GGUF's `general.architecture` does.
    pub gguf: &'static str,
    /// Whether GGUF has the two halves of every query and key head interleaved.
    pub interleaves_heads: bool,
    /// Carries the fields over that only this family has.
    pub carry_over: fn(&Fields, &mut Metadata) -> Result<(), CheckpointError>,
}

const FAMILIES: [Family; 6] = [
    Family { model_type: "llama", gguf: "llama", interleaves_heads: true, carry_over: nothing },
    Family { model_type: "mistral", gguf: "llama", interleaves_heads: true, carry_over: mistral },
    Family { model_type: "qwen2", gguf: "qwen2", interleaves_heads: false, carry_over: qwen },
    Family { model_type: "qwen3", gguf: "qwen3", interleaves_heads: false, carry_over: qwen },
    Family { model_type: "granite", gguf: "granite", interleaves_heads: true, carry_over: granite },
    Family { model_type: "smollm3", gguf: "smollm3", interleaves_heads: true, carry_over: smollm3 },
];

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

    /// GGUF's name of a module: of a layer's as of the decoder's own.
    pub fn gguf_module(&self, module: &str) -> Option<String> {
        match module {
            "model.embed_tokens" => return Some("token_embd".to_owned()),
            "model.norm" => return Some("output_norm".to_owned()),
            "lm_head" => return Some("output".to_owned()),
            _ => {}
        }
        let (layer, module) = module.strip_prefix("model.layers.")?.split_once('.')?;
        let layer: usize = layer.parse().ok()?;
        let (_, name) = MODULES.iter().find(|(of, _)| *of == module)?;
        Some(format!("blk.{layer}.{name}"))
    }

    /// Whether GGUF has the rows of this module in another order.
    pub fn interleaves(&self, module: &str) -> bool {
        self.interleaves_heads && (module.ends_with(".self_attn.q_proj") || module.ends_with(".self_attn.k_proj"))
    }
}

fn nothing(_: &Fields, _: &mut Metadata) -> Result<(), CheckpointError> {
    Ok(())
}

fn mistral(fields: &Fields, metadata: &mut Metadata) -> Result<(), CheckpointError> {
    match fields.optional_count("sliding_window")? {
        Some(window) => metadata.count("attention.sliding_window", window),
        None => Ok(()),
    }
}

fn qwen(fields: &Fields, _: &mut Metadata) -> Result<(), CheckpointError> {
    // Only with `use_sliding_window` does the window say anything.
    fields.must_be("use_sliding_window", &[json!(false)])?;
    fields.take("sliding_window");
    Ok(())
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
    Ok(())
}

/// Every fourth layer goes without rotary positions; GGUF says so by the architecture alone.
fn smollm3(fields: &Fields, _: &mut Metadata) -> Result<(), CheckpointError> {
    fields.must_be("no_rope_layer_interval", &[json!(4)])?;
    fields.must_be("use_sliding_window", &[json!(false)])?;
    let every_fourth = |layers: &Vec<serde_json::Value>| {
        (1..).zip(layers).all(|(number, rotates)| *rotates == json!(u32::from(number % 4 != 0)))
    };
    match fields.take("no_rope_layers") {
        Some(layers) if !layers.as_array().is_some_and(every_fourth) => {
            Err(refuse("no_rope_layers", format!("{layers} is not served: every fourth layer goes without")))
        }
        _ => Ok(()),
    }
}
