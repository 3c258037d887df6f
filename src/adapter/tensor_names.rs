//! Where a tensor of an adapter's file belongs, whichever program wrote its name.
//!
//! PEFT's `save_pretrained` writes `base_model.model.{path}.lora_A.weight`. Others save what the running model holds: with the
//! name that the adapter had there (`lora_A.default.weight`), within the modules that a launcher put around it
//! (`module.`, `_fsdp_wrapped_module.`), with PEFT's prefix twice or not at all.

/// What `torch.compile`, FSDP and activation checkpointing put into a path.
const WRAPPERS: [&str; 3] = ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"];
/// Parts of an adapter that are modules and have weights of their own, below the adapter's name.
const MATRICES: [&str; 2] = ["lora_A", "lora_B"];
/// Parts that are the weights, or whose weights PEFT saves under the part's own name.
const VECTORS: [&str; 10] = [
    "lora_E",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "ia3_l",
    "miss_block",
    "vera_A",
    "vera_B",
    "vera_lambda_b",
    "vera_lambda_d",
];
/// The part for text of a model that sees images too. GGUF files are of that part alone.
pub const TEXT_MODEL: &str = "language_model";
/// What stands around a layer that is trained whole.
const SAVED: &str = "modules_to_save";

/// The name of a tensor in a file.
#[derive(Debug, PartialEq, Eq)]
pub struct TensorName<'a> {
    /// Module path and part, as PEFT saves them but without its prefix: `model.layers.3.self_attn.q_proj.lora_A.weight`.
    pub canonical: String,
    /// The name that the adapter had in training, where the file says it.
    pub adapter: Option<&'a str>,
}

impl<'a> TensorName<'a> {
    pub fn parse(key: &'a str) -> Self {
        let mut parts: Vec<&str> =
            key.split('.').filter(|part| !WRAPPERS.contains(part) && *part != TEXT_MODEL).collect();
        let mut start = usize::from(parts.first() == Some(&"module"));
        while parts[start..].starts_with(&["base_model", "model"]) {
            start += 2;
        }
        parts.drain(..start);
        let adapter = take_adapter_name(&mut parts);
        Self { canonical: parts.join("."), adapter }
    }
}

/// Takes the adapter's name out of the part behind the module path, and what PEFT does not save there.
fn take_adapter_name<'a>(parts: &mut Vec<&'a str>) -> Option<&'a str> {
    let at = parts.iter().position(|part| MATRICES.contains(part) || VECTORS.contains(part) || *part == SAVED)?;
    let (part, rest) = (parts[at], parts[at + 1..].to_vec());
    match rest[..] {
        [name, tensor] if part == SAVED => {
            parts.splice(at.., [tensor]);
            Some(name)
        }
        [tensor] if part == SAVED => {
            parts.splice(at.., [tensor]);
            None
        }
        [name, _] if MATRICES.contains(&part) => {
            parts.remove(at + 1);
            Some(name)
        }
        // AdaLoRA's are the weights.
        [name] if MATRICES.contains(&part) && !["weight", "bias"].contains(&name) => {
            parts.truncate(at + 1);
            Some(name)
        }
        ["weight"] if VECTORS.contains(&part) => {
            parts.truncate(at + 1);
            None
        }
        [name] | [name, "weight"] if VECTORS.contains(&part) => {
            parts.truncate(at + 1);
            Some(name)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_has_one_place_whoever_wrote_its_name() {
        let q = "model.layers.3.self_attn.q_proj";
        for (written, expected, adapter) in [
            ("base_model.model.{q}.lora_A.weight", "{q}.lora_A.weight", None),
            ("{q}.lora_A.weight", "{q}.lora_A.weight", None),
            ("base_model.model.base_model.model.{q}.lora_B.bias", "{q}.lora_B.bias", None),
            ("module.base_model.model.{q}.lora_B.default.weight", "{q}.lora_B.weight", Some("default")),
            (
                "base_model.model.model.layers.3._checkpoint_wrapped_module.self_attn.q_proj.lora_B.sql.weight",
                "{q}.lora_B.weight",
                Some("sql"),
            ),
            ("_fsdp_wrapped_module.base_model.model.{q}.lora_A.weight", "{q}.lora_A.weight", None),
            ("_orig_mod.base_model.model.{q}.ia3_l.default", "{q}.ia3_l", Some("default")),
            ("base_model.model.{q}.lora_magnitude_vector.default.weight", "{q}.lora_magnitude_vector", Some("default")),
            ("base_model.model.{q}.lora_magnitude_vector.weight", "{q}.lora_magnitude_vector", None),
            ("base_model.model.{q}.lora_magnitude_vector", "{q}.lora_magnitude_vector", None),
            ("base_model.model.model.embed_tokens.lora_embedding_A", "model.embed_tokens.lora_embedding_A", None),
            ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head.weight", Some("default")),
            ("base_model.model.lm_head.modules_to_save.weight", "lm_head.weight", None),
            ("base_model.model.lm_head.weight", "lm_head.weight", None),
            (
                "base_model.model.model.language_model.layers.3.self_attn.q_proj.lora_A.weight",
                "{q}.lora_A.weight",
                None,
            ),
            (
                "base_model.model.language_model.model.layers.3.self_attn.q_proj.lora_A.weight",
                "{q}.lora_A.weight",
                None,
            ),
            ("prompt_embeddings", "prompt_embeddings", None),
            ("base_model.model.{q}.lora_A", "{q}.lora_A", None),
            ("base_model.model.{q}.lora_B.default", "{q}.lora_B", Some("default")),
            ("base_model.model.{q}.lora_E.default", "{q}.lora_E", Some("default")),
            ("base_model.model.{q}.vera_lambda_d", "{q}.vera_lambda_d", None),
            ("base_model.model.{q}.miss_block.default", "{q}.miss_block", Some("default")),
            ("base_model.vera_A.default", "base_model.vera_A", Some("default")),
            // What is none of these stays, and finds no place.
            ("base_model.model.{q}.lora_A.a.b.weight", "{q}.lora_A.a.b.weight", None),
            ("", "", None),
        ] {
            let (written, canonical) = (written.replace("{q}", q), expected.replace("{q}", q));
            assert_eq!(TensorName::parse(&written), TensorName { canonical, adapter }, "{written}");
        }
    }
}
