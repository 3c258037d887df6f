//! `config.json` of a checkpoint, as GGUF's metadata says the same.
//!
//! Names and meanings are those that llama.cpp's `convert_hf_to_gguf.py` gives, so that a file made here is read like any
//! other. What a field says is carried over, or it is known to change nothing, or the checkpoint is refused.

use std::path::Path;

use candle_core::quantized::gguf_file::Value as Gguf;
use serde_json::{Map, Value, json};

use super::family::Family;
use super::fields::{FILE, Fields, refuse};
use super::matrix::BLOCK_LEN;
use super::prequantized::Method;
use super::rope::{self, RopeFactors};
use super::{CheckpointError, language_model, read_json};

/// Fields that say nothing about what a decoder computes.
pub const WITHOUT_EFFECT: &[&str] = &[
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_model_name_or_path",
    "_name_or_path",
    "architectures",
    "attention_bias",
    "attention_dropout",
    "attn_implementation",
    "auto_map",
    "cache_implementation",
    "decoder_start_token_id",
    "dtype",
    "embd_pdrop",
    "embedding_dropout",
    "finetuned_from",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "gradient_checkpointing",
    "hidden_dropout",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_llama_config",
    "keys_to_ignore_at_inference",
    "label2id",
    "max_sequence_length",
    "max_window_layers",
    "mlp_bias",
    "model_name",
    "original_max_position_embeddings",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "resid_pdrop",
    "residual_dropout",
    "return_dict",
    "router_aux_loss_coef",
    "sep_token_id",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
];

/// What the configuration says, in GGUF's terms.
pub struct Config {
    /// Whether it is that of the language model within a checkpoint that also sees.
    pub is_of_part: bool,
    pub family: &'static Family,
    pub metadata: Vec<(String, Gguf)>,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    pub hidden_size: usize,
    /// Of the feed-forward, or of each of its experts.
    pub intermediate_size: usize,
    /// Where there are any.
    pub num_experts: Option<usize>,
    pub vocab_size: usize,
    /// `None` where the checkpoint's tensors say it: it is tied if there is no head.
    pub ties_embedding: Option<bool>,
    /// The linear layers that have a bias, by the last part of their names.
    biased: Vec<&'static str>,
    /// How the matrices were quantized by another program.
    pub method: Option<Method>,
    pub rope_factors: RopeFactors,
    pub bos_token_id: Option<u32>,
    pub eos_token_ids: Vec<u32>,
}

impl Config {
    pub fn read(folder: &Path) -> Result<Self, CheckpointError> {
        let values = read_json::<Map<String, Value>>(folder, FILE)?.ok_or_else(|| {
            CheckpointError::file(FILE, "is not there: a checkpoint is a folder as save_pretrained writes it")
        })?;
        Self::parse(values)
    }

    fn parse(values: Map<String, Value>) -> Result<Self, CheckpointError> {
        let part = language_model::within(&values)?;
        let is_of_part = part.is_some();
        let fields = Fields::new(part.unwrap_or(values));
        let model_type = fields.text("model_type")?.ok_or_else(|| refuse("model_type", "is missing"))?;
        let family = Family::named(&model_type)?;
        let mut metadata = Metadata { architecture: family.gguf, pairs: Vec::new() };
        metadata.general("architecture", Gguf::String(family.gguf.to_owned()));

        let num_layers = fields.count("num_hidden_layers")?;
        let width = |name| match fields.count(name)? {
            width if width.is_multiple_of(BLOCK_LEN) => Ok(width),
            width => Err(refuse(name, format!("{width} is not served: it is no multiple of {BLOCK_LEN}"))),
        };
        let hidden_size = width("hidden_size")?;
        let num_heads = fields.count("num_attention_heads")?;
        let num_kv_heads = fields.optional_count("num_key_value_heads")?.unwrap_or(num_heads);
        let head_dim = fields.optional_count("head_dim")?.unwrap_or(hidden_size / num_heads);
        metadata.count("block_count", num_layers)?;
        metadata.count("context_length", fields.count("max_position_embeddings")?)?;
        metadata.count("embedding_length", hidden_size)?;
        let mut intermediate_size = width("intermediate_size")?;
        metadata.count("feed_forward_length", intermediate_size)?;
        let mut num_experts = None;
        if family.has_experts {
            // transformers 5 calls them local.
            let count = fields.optional_count("num_local_experts")?;
            let count = count.map_or_else(|| fields.count("num_experts"), Ok)?;
            metadata.count("expert_count", count)?;
            metadata.count("expert_used_count", fields.count("num_experts_per_tok")?)?;
            intermediate_size = width("moe_intermediate_size")?;
            metadata.count("expert_feed_forward_length", intermediate_size)?;
            num_experts = Some(count);
        }
        metadata.count("attention.head_count", num_heads)?;
        metadata.count("attention.head_count_kv", num_kv_heads)?;
        metadata.count("attention.key_length", head_dim)?;
        metadata.count("attention.value_length", head_dim)?;
        if family.centers_norms {
            metadata.number("attention.layer_norm_epsilon", fields.number("norm_epsilon")?);
            fields.take("rms_norm_eps");
        } else {
            metadata.number("attention.layer_norm_rms_epsilon", fields.number("rms_norm_eps")?);
        }
        let activations: Vec<Value> = family.activations.iter().map(|name| Value::from(*name)).collect();
        // Gemma has both, and means the second.
        fields.must_be("hidden_act", &activations)?;
        fields.must_be("hidden_activation", &activations[..1])?;
        fields.must_be("is_causal", &[json!(true)])?;
        (family.carry_over)(&fields, &mut metadata)?;
        let rope_factors = rope::carry_over(&fields, family, &mut metadata, head_dim)?;

        let vocab_size = fields.count("vocab_size")?;
        metadata.count("vocab_size", vocab_size)?;
        let method = Method::of(&fields)?;
        let config = Self {
            is_of_part,
            family,
            metadata: metadata.pairs,
            num_heads,
            num_kv_heads,
            head_dim,
            hidden_size,
            intermediate_size,
            num_experts,
            vocab_size,
            ties_embedding: fields.flag("tie_word_embeddings")?,
            biased: family.biased(&fields)?,
            method,
            rope_factors,
            bos_token_id: fields.ids("bos_token_id")?.first().copied(),
            eos_token_ids: fields.ids("eos_token_id")?,
        };
        fields.refuse_the_rest(WITHOUT_EFFECT)?;
        Ok(config)
    }

    /// Whether a module has a bias.
    pub fn has_bias(&self, module: &str) -> bool {
        let last = module.rsplit('.').next().unwrap_or_default();
        self.biased.contains(&last) || self.family.centers_norms && last.contains("norm")
    }

    /// `(out, in)` of a matrix.
    pub fn matrix_shape(&self, module: &str) -> Option<(usize, usize)> {
        let (q, kv) = (self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim);
        let (hidden, intermediate) = (self.hidden_size, self.intermediate_size);
        Some(match module.rsplit('.').next()? {
            "embed_tokens" | "lm_head" => (self.vocab_size, hidden),
            "q_proj" => (q, hidden),
            "k_proj" | "v_proj" => (kv, hidden),
            "o_proj" => (hidden, q),
            "gate_proj" | "up_proj" => (intermediate, hidden),
            "down_proj" | "c_proj" => (hidden, intermediate),
            "c_fc" => (intermediate, hidden),
            "gate" => (self.num_experts?, hidden),
            "qkv_proj" => (q + 2 * kv, hidden),
            "gate_up_proj" => (2 * intermediate, hidden),
            _ => return None,
        })
    }
}

/// Metadata of GGUF under the name of an architecture.
pub struct Metadata {
    architecture: &'static str,
    pairs: Vec<(String, Gguf)>,
}

impl Metadata {
    fn general(&mut self, key: &str, value: Gguf) {
        self.pairs.push((format!("general.{key}"), value));
    }

    fn set(&mut self, key: &str, value: Gguf) {
        self.pairs.push((format!("{}.{key}", self.architecture), value));
    }

    pub fn count(&mut self, key: &str, value: usize) -> Result<(), CheckpointError> {
        let value = u32::try_from(value).map_err(|_| refuse(key, format!("{value} is no size")))?;
        self.set(key, Gguf::U32(value));
        Ok(())
    }

    pub fn number(&mut self, key: &str, value: f32) {
        self.set(key, Gguf::F32(value));
    }

    pub fn text(&mut self, key: &str, value: &str) {
        self.set(key, Gguf::String(value.to_owned()));
    }

    pub fn flag(&mut self, key: &str, value: bool) {
        self.set(key, Gguf::Bool(value));
    }

    pub fn flags(&mut self, key: &str, values: &[bool]) {
        self.set(key, Gguf::Array(values.iter().copied().map(Gguf::Bool).collect()));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A small configuration of a family, with what each has of its own.
    fn small(model_type: &str, more: &Value) -> Result<Config, CheckpointError> {
        let mut values = json!({
            "model_type": model_type, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
            "num_attention_heads": 4, "max_position_embeddings": 512, "vocab_size": 300
        });
        let own = match model_type {
            "starcoder2" => json!({"norm_epsilon": 1e-5}),
            "gemma2" | "gemma3_text" => {
                json!({"rms_norm_eps": 1e-6, "query_pre_attn_scalar": 256, "sliding_window": 4096})
            }
            "qwen3_moe" => json!({
                "rms_norm_eps": 1e-6, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32
            }),
            _ => json!({"rms_norm_eps": 1e-6}),
        };
        let values = values.as_object_mut().unwrap();
        for fields in [&own, more] {
            values.extend(fields.as_object().unwrap().clone());
        }
        Config::parse(values.clone())
    }

    /// As public checkpoints have them: Gemma 2 and 3, SmolLM2, Phi-4-mini, StarCoder2-7B, Qwen3-Coder, LLaMA, and what
    /// unsloth, GPTQModel and AutoRound write.
    #[test]
    fn fields_that_publishers_left_in_their_configurations_are_known() {
        let gptq = json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": false, "sym": true});
        let with = |more: Value| {
            let mut config = gptq.clone();
            config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            json!({"quantization_config": config})
        };
        for (model_type, more) in [
            ("gemma2", json!({"cache_implementation": "hybrid", "sliding_window_size": 4096})),
            ("gemma3_text", json!({"cache_implementation": "hybrid", "model_name": "unsloth/gemma-3-1b-it"})),
            ("llama", json!({"is_llama_config": true, "rope_interleaved": false})),
            ("llama", json!({"max_sequence_length": 2048, "_attn_implementation_autoset": true})),
            ("phi3", json!({"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": false})),
            (
                "starcoder2",
                json!({
                    "activation_function": "gelu", "attention_softmax_in_fp32": true, "layer_norm_epsilon": 1e-5,
                    "scale_attention_softmax_in_fp32": true, "scale_attn_weights": true
                }),
            ),
            ("qwen3_moe", json!({"qkv_bias": false, "shared_expert_intermediate_size": 0, "use_qk_norm": true})),
            ("qwen2", with(json!({"pack_dtype": "int32", "pack_impl": "cpu", "hyb_act": false, "lm_head": false}))),
            (
                "qwen2",
                with(json!({
                    "data_type": "int", "enable_quanted_input": true, "enable_minmax_tuning": true, "seqlen": 2048,
                    "scale_dtype": "torch.float16", "lr": 0.001, "minmax_lr": 0.001, "gradient_accumulate_steps": 1,
                    "amp": true, "quant_block_list": null, "enable_norm_bias_tuning": false, "provider": "auto-round"
                })),
            ),
        ] {
            if let Err(e) = small(model_type, &more) {
                panic!("{model_type} with {more}: {e}");
            }
        }
    }

    /// As Gemma 3 4B's says it, which leaves the rest to its class.
    #[test]
    fn what_gemma3_leaves_out_of_a_checkpoint_that_also_sees_is_known() {
        let values = json!({
            "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "boi_token_index": 255_999,
            "eoi_token_index": 256_000, "image_token_index": 262_144, "mm_tokens_per_image": 256,
            "eos_token_id": [1, 106], "initializer_range": 0.02, "torch_dtype": "bfloat16",
            "text_config": {
                "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024
            },
            "vision_config": {"hidden_size": 1152, "image_size": 896, "model_type": "siglip_vision_model"}
        });
        let config = Config::parse(values.as_object().unwrap().clone()).unwrap();
        assert!(config.is_of_part);
        assert_eq!((config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size), (8, 4, 256, 262_208));
        assert_eq!(config.eos_token_ids, [1, 106]);
        let number = |key: &str| {
            let (_, value) = config.metadata.iter().find(|(name, _)| name == key).unwrap();
            value.to_f32().unwrap()
        };
        assert_eq!((number("gemma3.rope.freq_base"), number("gemma3.rope.freq_base_swa")), (1e6, 1e4));
        assert_eq!((number("gemma3.rope.scaling.factor"), number("gemma3.attention.scale")), (8.0, 1.0 / 16.0));
    }

    /// A number of a small configuration under a key below the architecture's name.
    fn number(model_type: &str, more: &Value, key: &str) -> Option<f64> {
        let config = small(model_type, more).unwrap_or_else(|e| panic!("{model_type} with {more}: {e}"));
        let key = format!("{}.{key}", config.family.gguf);
        let (_, value) = config.metadata.iter().find(|(name, _)| *name == key)?;
        Some(value.to_f32().map(f64::from).or_else(|_| value.to_u32().map(f64::from)).unwrap())
    }

    #[test]
    fn what_a_configuration_leaves_out_is_what_its_class_has() {
        for (model_type, theta) in
            [("llama", 1e4), ("qwen2", 1e4), ("phi3", 1e4), ("smollm3", 2e6), ("gemma2", 1e4), ("gemma3_text", 1e6)]
        {
            assert_eq!(number(model_type, &json!({}), "rope.freq_base"), Some(theta), "{model_type}");
            for said in [json!({"rope_theta": 500.0}), json!({"rope_parameters": {"rope_theta": 500.0}})] {
                assert_eq!(number(model_type, &said, "rope.freq_base"), Some(500.0), "{model_type} with {said}");
            }
        }
        let nested = json!({"rope_parameters": {"full_attention": null, "sliding_attention": {"rope_theta": 300.0}}});
        assert_eq!(number("gemma3_text", &nested, "rope.freq_base"), Some(1e6));
        assert_eq!(number("gemma3_text", &nested, "rope.freq_base_swa"), Some(300.0));
        const WINDOW: &str = "attention.sliding_window";
        for (model_type, more, expected) in [
            ("mistral", json!({}), Some(4096.0)),
            ("mistral", json!({"sliding_window": null}), None),
            ("mistral", json!({"sliding_window": 64}), Some(64.0)),
            ("llama", json!({}), None),
            ("phi3", json!({}), None),
            ("starcoder2", json!({}), None),
            ("qwen2", json!({"sliding_window": 64, "max_window_layers": 2}), None),
        ] {
            assert_eq!(number(model_type, &more, WINDOW), expected, "{model_type} with {more}");
        }
    }

    /// The values are those of transformers' `modeling_rope_utils.py`; heads have 16 dimensions and the context 512 positions.
    #[test]
    fn scaled_rotary_embeddings_keep_their_numbers() {
        const ORIGINAL: &str = "rope.scaling.original_context_length";
        const MAGNITUDE: &str = "rope.scaling.attn_factor";
        let long = |more: Value| {
            let mut scaling = json!({"rope_type": "longrope", "short_factor": vec![1.5; 4], "long_factor": vec![3; 4]});
            scaling.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            json!({"partial_rotary_factor": 0.5, "rope_scaling": scaling})
        };
        let beside = |mut config: Value| {
            config["original_max_position_embeddings"] = json!(64);
            config
        };
        for (config, magnitude) in [
            // sqrt(1 + ln(512 / 64) / ln(64)) and sqrt(1 + ln(4) / ln(64))
            (beside(long(json!({}))), 1.224_744_9),
            (long(json!({"original_max_position_embeddings": 64})), 1.224_744_9),
            (long(json!({"original_max_position_embeddings": 64, "factor": 4})), 1.154_700_5),
            (beside(long(json!({"original_max_position_embeddings": 64, "factor": 4.0}))), 1.154_700_5),
            (beside(long(json!({"factor": 0.5}))), 1.0),
            (beside(long(json!({"factor": 4.0, "attention_factor": 1.25}))), 1.25),
        ] {
            let found = number("phi3", &config, MAGNITUDE).unwrap();
            assert!((found - magnitude).abs() < 1e-6, "{config}: {found}");
            assert_eq!(number("phi3", &config, ORIGINAL), Some(64.0), "{config}");
            assert_eq!(number("phi3", &config, "rope.dimension_count"), Some(8.0), "{config}");
            let factors = small("phi3", &config).unwrap().rope_factors;
            let expected =
                [("rope_factors_short.weight", vec![1.5_f32; 4]), ("rope_factors_long.weight", vec![3.0_f32; 4])];
            assert_eq!(factors, expected, "{config}");
        }
        let yarn = json!({"rope_scaling": {"type": "yarn", "factor": 4.0}});
        assert_eq!(number("qwen2", &yarn, ORIGINAL), Some(512.0));
        assert_eq!(number("qwen2", &beside(yarn), ORIGINAL), Some(64.0));
        let llama3 =
            json!({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}});
        let factors = small("llama", &beside(llama3)).unwrap().rope_factors;
        let [(name, factors)] = &factors[..] else { panic!("{factors:?}") };
        // Of wavelengths 2π·10000^(i/8): 6.3, 19.9, 62.8 and longer ones, in an original context of 64.
        let expected = [1.0, 1.293_976, 7.667_385, 8.0, 8.0, 8.0, 8.0, 8.0];
        assert_eq!((*name, factors.len()), ("rope_freqs.weight", 8));
        assert!(factors.iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 1e-3), "{factors:?}");
    }

    #[test]
    fn rotary_embeddings_that_say_two_things_or_what_is_not_served_are_refused_by_name() {
        let two = |kind: &str| {
            json!({
                "original_max_position_embeddings": 32,
                "rope_scaling": {
                    "rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "short_factor": vec![1.0; 8], "long_factor": vec![1.0; 8]
                }
            })
        };
        let kind = |kind: Value| json!({"rope_scaling": {"rope_type": kind, "factor": 2.0}});
        for (config, field) in [
            (two("yarn"), "original_max_position_embeddings"),
            (two("llama3"), "original_max_position_embeddings"),
            (two("longrope"), "original_max_position_embeddings"),
            (kind(json!(7)), "rope_scaling.rope_type"),
            (kind(json!("dynamic")), "dynamic"),
            (kind(json!("mrope")), "mrope"),
            (kind(json!("proportional")), "proportional"),
            (json!({"rope_scaling": {"factor": 2.0}}), "rope_scaling.factor"),
            (kind(json!("llama3")), "original_max_position_embeddings"),
            (
                json!({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}),
                "original_max_position_embeddings",
            ),
            (
                json!({"rope_parameters": {"full_attention": {}, "chunked_attention": {"rope_theta": 3.0}}}),
                "rope_parameters.chunked_attention",
            ),
        ] {
            let refusal = small("llama", &config).err().map(|e| e.to_string());
            assert!(refusal.as_ref().is_some_and(|text| text.contains(field)), "{config}: {refusal:?}");
        }
    }

    #[test]
    fn the_same_fields_are_refused_by_name_where_they_say_something_else() {
        for (model_type, field, value) in [
            ("gemma2", "sliding_window_size", json!(2048)),
            ("llama", "rope_interleaved", json!(true)),
            ("llama", "scale_attn_weights", json!(true)),
            ("phi3", "full_attn_mod", json!(2)),
            ("phi3", "interpolate_factor", json!(4)),
            ("phi3", "lm_head_bias", json!(true)),
            ("qwen3_moe", "shared_expert_intermediate_size", json!(512)),
            ("qwen3_moe", "use_qk_norm", json!(false)),
            ("smollm3", "no_rope_layers", json!([1, 1, 1, 1])),
            ("smollm3", "no_rope_layers", json!([1, 0, 1, 0])),
            ("smollm3", "no_rope_layer_interval", json!(2)),
            ("qwen2", "use_sliding_window", json!(true)),
            ("qwen3", "layer_types", json!(["full_attention", "sliding_attention"])),
            ("mistral", "layer_types", json!(["full_attention"])),
            ("gemma3_text", "layer_types", json!(["chunked_attention"])),
            ("gemma3_text", "use_bidirectional_attention", json!(true)),
            ("gemma2", "num_hidden_layers", json!(4_294_967_295_u32)),
            ("llama", "num_attention_heads", json!(1_u64 << 60)),
            ("llama", "max_position_embeddings", json!(-1)),
        ] {
            let refusal = small(model_type, &json!({field: value.clone()})).err().map(|e| e.to_string());
            assert!(refusal.as_ref().is_some_and(|text| text.contains(field)), "{field} = {value}: {refusal:?}");
        }
    }
}
