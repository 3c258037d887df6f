//! Checkpoints become GGUF files that say the same: weights in Hugging Face's order, tokens, configuration; or are refused.

mod tiny_checkpoint;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use lorry::model::base_weights::GgufWeights;
use lorry::model::checkpoint::quantized;
use lorry::model::gguf::GgufFile;
use lorry::model::memory::{Memory, Mix};
use lorry::model::spec::Module;
use lorry::model::{BaseWeights, VocabularyMatrix};
use lorry::prompt::chat::{ChatTemplate, Ending};
use lorry::tokenizer::{Specials, Tokenizer};
use safetensors::tensor::Dtype;
use serde_json::json;
use tiny_checkpoint::{
    Checkpoint, HIDDEN, INTERMEDIATE, KV, LAYERS, MATRICES, Tensor, VOCAB, element, matrix_shape, tensor,
};

/// The largest difference of the file's weights to the checkpoint's, both in Hugging Face's order.
fn largest_difference(path: &Path) -> f32 {
    let base = GgufWeights::open(path).unwrap();
    let mut largest = 0.0_f32;
    for layer in 0..LAYERS {
        for (module, name) in Module::PLAIN.into_iter().zip(MATRICES) {
            let [rows, columns] = matrix_shape(name);
            let mut row = vec![0.0; columns];
            for index in 0..rows {
                base.dequantize_row(layer, module, index, &mut row).unwrap();
                let expected = |at| element(&format!("model.layers.{layer}.{name}.weight"), index * columns + at);
                largest = row.iter().enumerate().fold(largest, |l, (at, value)| l.max((value - expected(at)).abs()));
            }
        }
    }
    let mut row = vec![0.0; HIDDEN];
    for token in [0, 7, VOCAB - 1] {
        base.dequantize_token(VocabularyMatrix::Embedding, token, &mut row);
        let expected = |at| element("model.embed_tokens.weight", token * HIDDEN + at);
        largest = row.iter().enumerate().fold(largest, |l, (at, value)| l.max((value - expected(at)).abs()));
    }
    largest
}

#[test]
fn weights_keep_their_order_and_lose_what_the_type_loses() {
    for model_type in ["llama", "mistral", "qwen2"] {
        let checkpoint = Checkpoint::new(model_type);
        for (quantization, bound) in [("none", 0.0), ("q8_0", 0.003), ("q5_1", 0.02), ("q4k", 0.04)] {
            let difference = largest_difference(&checkpoint.convert(quantization).unwrap());
            assert!(difference <= bound, "{model_type} in {quantization}: {difference}");
            assert!(difference > 0.0 || bound == 0.0, "{model_type} was not quantized to {quantization}");
        }
    }
}

/// The rows of the tiny model do not divide into the blocks of Q4_K and Q6_K.
#[test]
fn the_memory_of_a_checkpoint_is_known_before_it_is_quantized() {
    let checkpoint = Checkpoint::new("llama");
    let file = GgufFile::open(&checkpoint.convert("q4k").unwrap()).unwrap();
    assert_eq!(Memory::of_mix(&file.spec().unwrap(), Mix::Q4K), Memory::of_file(&file).unwrap());
}

#[test]
fn biases_are_those_of_their_rows() {
    let checkpoint = Checkpoint::new("qwen2");
    let base = GgufWeights::open(&checkpoint.convert("q8_0").unwrap()).unwrap();
    let bias = base.bias(1, Module::KProj).unwrap().unwrap();
    assert!((0..KV).all(|row| bias[row] == element("model.layers.1.self_attn.k_proj.bias", row)));
    assert_eq!(base.bias(1, Module::OProj).unwrap(), None);
}

#[test]
fn layers_have_biases_where_the_configuration_says_so_and_nowhere_else() {
    let with = |model_type: &str, fields: &serde_json::Value, module: &str| {
        let mut checkpoint = Checkpoint::new(model_type);
        checkpoint.config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let name = format!("model.layers.1.{module}.bias");
        checkpoint.tensors.insert(name.clone(), tensor(&name, &matrix_shape(module)[..1]));
        (checkpoint.convert("q8_0").map(|path| GgufWeights::open(&path).unwrap()), name)
    };
    for (model_type, fields, module, read) in [
        ("llama", json!({"attention_bias": true}), "self_attn.k_proj", Module::KProj),
        ("llama", json!({"attention_bias": true}), "self_attn.o_proj", Module::OProj),
        ("llama", json!({"mlp_bias": true}), "mlp.up_proj", Module::UpProj),
        ("smollm3", json!({"attention_bias": true}), "self_attn.v_proj", Module::VProj),
    ] {
        let (base, name) = with(model_type, &fields, module);
        let bias = base.unwrap().bias(1, read).unwrap().unwrap();
        assert!((0..bias.len()).all(|row| bias[row] == element(&name, row)), "{model_type}, {fields}: {module}");
    }
    for (model_type, fields, module) in [
        ("llama", json!({}), "self_attn.k_proj"),
        ("llama", json!({"attention_bias": null}), "self_attn.o_proj"),
        ("llama", json!({"attention_bias": true}), "mlp.down_proj"),
        ("llama", json!({"attention_bias": false, "mlp_bias": true}), "self_attn.q_proj"),
        ("mistral", json!({"attention_bias": true}), "self_attn.q_proj"),
        ("qwen2", json!({}), "self_attn.o_proj"),
        ("smollm3", json!({}), "self_attn.v_proj"),
    ] {
        let (base, name) = with(model_type, &fields, module);
        let refusal = base.map(|_| ()).unwrap_err();
        assert!(refusal.contains(&name), "{model_type}, {fields}: {refusal}");
    }
    let mut checkpoint = Checkpoint::new("llama");
    checkpoint.config["attention_bias"] = json!("yes");
    assert!(checkpoint.refusal().contains("attention_bias"));
}

#[test]
fn a_head_beside_a_tied_embedding_must_be_the_embedding() {
    let embedding = Checkpoint::new("llama").tensors["model.embed_tokens.weight"].clone();
    let with_head = |model_type: &str, ties: Option<bool>, head: &Tensor| {
        let mut checkpoint = Checkpoint::new(model_type);
        let fields = checkpoint.config.as_object_mut().unwrap();
        fields.remove("tie_word_embeddings");
        fields.extend(ties.map(|ties| ("tie_word_embeddings".to_owned(), json!(ties))));
        checkpoint.tensors.insert("lm_head.weight".to_owned(), head.clone());
        let path = checkpoint.convert("q8_0")?;
        Ok::<_, String>(GgufFile::open(&path).unwrap().has_tensor("output.weight"))
    };
    let other = tensor("lm_head.weight", &[VOCAB, HIDDEN]);
    for (model_type, ties, head, expected) in [
        ("llama", Some(true), &embedding, Ok(false)),
        ("llama", Some(false), &embedding, Ok(true)),
        ("llama", Some(false), &other, Ok(true)),
        // Where nothing is said, the tensors say it.
        ("llama", None, &other, Ok(true)),
        ("smollm3", None, &other, Ok(true)),
        ("llama", Some(true), &other, Err(())),
        ("smollm3", Some(true), &other, Err(())),
    ] {
        let found = with_head(model_type, ties, head);
        let case = format!("{model_type}, {ties:?}: {found:?}");
        assert!(found.as_ref().err().is_none_or(|refusal| refusal.contains("lm_head.weight")), "{case}");
        assert_eq!(found.map_err(|_| ()), expected, "{case}");
    }
}

#[test]
fn weights_that_are_no_numbers_are_refused_by_the_name_of_their_tensor() {
    // One element of this kind among zeros.
    let with = |name: &str, dtype: Dtype, bytes: &[u8]| {
        let mut checkpoint = Checkpoint::new("llama");
        let shape = checkpoint.tensors[name].shape.clone();
        let mut all = vec![0; shape.iter().product::<usize>() * bytes.len()];
        let at = 17 * bytes.len();
        all[at..at + bytes.len()].copy_from_slice(bytes);
        checkpoint.tensors.insert(name.to_owned(), Tensor { dtype, shape, bytes: all });
        checkpoint.convert("none")
    };
    let names = ["model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"];
    for name in names {
        for (dtype, bytes) in [
            (Dtype::F32, &f32::NAN.to_le_bytes()[..]),
            (Dtype::F32, &f32::NEG_INFINITY.to_le_bytes()[..]),
            (Dtype::BF16, &0x7fc0_u16.to_le_bytes()[..]),
            (Dtype::BF16, &0xff80_u16.to_le_bytes()[..]),
            (Dtype::F16, &0xfc01_u16.to_le_bytes()[..]),
            (Dtype::F16, &0x7c00_u16.to_le_bytes()[..]),
        ] {
            let refusal = with(name, dtype, bytes).unwrap_err();
            assert!(refusal.contains(name) && refusal.contains("no number"), "{dtype:?} {bytes:?}: {refusal}");
        }
        // The largest.
        with(name, Dtype::F16, &0x7bff_u16.to_le_bytes()).unwrap();
        with(name, Dtype::BF16, &0xff7f_u16.to_le_bytes()).unwrap();
    }
}

#[test]
fn the_configuration_is_carried_over_in_both_its_layouts() {
    let mut checkpoint = Checkpoint::new("llama");
    let old = GgufWeights::open(&checkpoint.convert("q8_0").unwrap()).unwrap().spec().clone();
    assert_eq!((old.hidden_size, old.intermediate_size, old.num_layers), (HIDDEN, INTERMEDIATE, LAYERS));
    assert_eq!((old.num_heads, old.num_kv_heads, old.head_dim, old.vocab_size), (4, 2, 16, VOCAB));
    assert_eq!((old.rope_theta, old.norm_eps, old.context_length), (50_000.0, 1e-5, 512));

    let fields = checkpoint.config.as_object_mut().unwrap();
    fields.remove("rope_theta");
    fields.insert("rope_parameters".to_owned(), json!({"rope_theta": 50000.0, "rope_type": "default"}));
    let new = GgufWeights::open(&checkpoint.convert("q8_0").unwrap()).unwrap().spec().clone();
    assert_eq!(new, old);
}

#[test]
fn text_becomes_the_tokens_that_the_checkpoint_s_tokenizer_gives() {
    let checkpoint = Checkpoint::new("qwen2");
    checkpoint.write("tokenizer_config.json", json!({"eos_token": {"content": "<|end|>"}}).to_string());
    checkpoint.write("chat_template.jinja", "{{ messages[0].content }}{{ eos_token }}");
    let gguf = GgufFile::open(&checkpoint.convert("q8_0").unwrap()).unwrap();
    let ours = Tokenizer::from_gguf(&gguf).unwrap();
    let theirs = tokenizers::Tokenizer::from_file(checkpoint.path().join("tokenizer.json")).unwrap();
    for text in ["the 12 or 123", "e\u{301}te\u{301} <think> of <|end|>", " \t\n", "日本 1234512", ""] {
        let expected = theirs.encode(text, false).unwrap();
        assert_eq!(ours.encode(text, Specials::Parse).unwrap(), expected.get_ids(), "{text:?}");
    }
    assert_eq!(ours.eos(), Some(259));
    assert!(ours.is_special(259) && !ours.is_special(260) && ours.is_special(299));
    let template = ChatTemplate::from_gguf(&gguf, &ours).unwrap();
    assert_eq!(
        template.render(&[json!({"role": "user", "content": "hi"})], Ending::LastMessage, None).unwrap(),
        "hi<|end|>"
    );
}

#[test]
fn shards_are_read_by_their_index() {
    let checkpoint = Checkpoint::new("llama");
    let (first, second) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    let in_first = |name: &str| name.contains("layers.0");
    checkpoint.write_shard(first, in_first);
    checkpoint.write_shard(second, |name| !in_first(name));
    let place = |name: &String| (name.clone(), if in_first(name) { first } else { second });
    let map: BTreeMap<_, _> = checkpoint.tensors.keys().map(place).collect();
    checkpoint.write("model.safetensors.index.json", json!({"weight_map": map}).to_string());
    assert_eq!(largest_difference(&checkpoint.convert("none").unwrap()), 0.0);

    fs::remove_file(checkpoint.path().join(second)).unwrap();
    fs::remove_dir_all(checkpoint.home.path().join("models")).unwrap();
    assert!(checkpoint.refusal().contains(second));
    checkpoint.write("model.safetensors.index.json", json!({"weight_map": {"a": "../secret.safetensors"}}).to_string());
    assert!(checkpoint.refusal().contains("../secret.safetensors"));
}

#[test]
fn a_checkpoint_is_converted_once_and_again_when_it_changes() {
    let mut checkpoint = Checkpoint::new("llama");
    let modified = |path: &Path| path.metadata().unwrap().modified().unwrap();
    let path = checkpoint.convert("q8_0").unwrap();
    let first = modified(&path);
    assert_eq!(quantized(checkpoint.path(), "q8_0".parse().unwrap(), checkpoint.home.path()).unwrap(), path);
    assert_eq!(modified(&path), first);
    checkpoint.config["rope_theta"] = json!(70000.0);
    assert_eq!(checkpoint.convert("q8_0").unwrap(), path);
    assert_eq!(GgufWeights::open(&path).unwrap().spec().rope_theta, 70_000.0);
    assert_ne!(checkpoint.convert("q4k").unwrap(), path);
}

#[test]
fn what_would_change_the_model_is_refused_by_name() {
    for (field, value) in [
        ("model_type", json!("gpt_neox")),
        ("hidden_act", json!("gelu")),
        ("rope_scaling", json!({"rope_type": "dynamic", "factor": 2.0})),
        (
            "rope_scaling",
            json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "mscale": 0.7}),
        ),
        ("num_attention_heads", json!(0)),
        ("hidden_size", json!("64")),
        ("hidden_size", json!(80)),
        ("intermediate_size", json!(80)),
        ("layer_types", json!(["full_attention", "sliding_attention"])),
        ("is_causal", json!(false)),
        ("a_field_of_the_future", json!(0.5)),
    ] {
        let mut checkpoint = Checkpoint::new("llama");
        checkpoint.config[field] = value.clone();
        let refusal = checkpoint.refusal();
        assert!(refusal.contains("config.json") && refusal.contains(field), "{field} = {value}: {refusal}");
    }
}

/// The parts of Mistral's, as transformers named them before version 4.52 and as it does since.
fn that_also_sees(is_new: bool) -> Checkpoint {
    let mut checkpoint = Checkpoint::new("mistral");
    let tensors = std::mem::take(&mut checkpoint.tensors);
    let rename = |name: String| match is_new {
        true => name.replacen("model.", "model.language_model.", 1),
        false => format!("language_model.{name}"),
    };
    checkpoint.tensors = tensors.into_iter().map(|(name, tensor)| (rename(name), tensor)).collect();
    for part in ["vision_tower.patch_conv.weight", "multi_modal_projector.norm.weight"] {
        let name = if is_new { format!("model.{part}") } else { part.to_owned() };
        checkpoint.tensors.insert(name, tensor(part, &[3, 5]));
    }
    checkpoint.config = json!({
        "model_type": "mistral3", "text_config": checkpoint.config, "vision_config": {"hidden_size": 8},
        "image_token_index": 10, "spatial_merge_size": 2, "eos_token_id": 259
    });
    checkpoint
}

#[test]
fn of_a_checkpoint_that_also_sees_the_language_model_is_taken() {
    for is_new in [false, true] {
        let checkpoint = that_also_sees(is_new);
        assert_eq!(largest_difference(&checkpoint.convert("none").unwrap()), 0.0, "{is_new}");
    }
    for (within, field, value) in [
        ("", "tie_word_embeddings", json!(false)),
        ("", "a_field_of_the_future", json!(1)),
        ("text_config", "model_type", json!("llama")),
        ("text_config", "a_field_of_the_future", json!(1)),
    ] {
        let mut checkpoint = that_also_sees(true);
        let fields = if within.is_empty() { &mut checkpoint.config } else { &mut checkpoint.config[within] };
        fields[field] = value;
        let refusal = checkpoint.refusal();
        assert!(refusal.contains(field), "{within} {field}: {refusal}");
    }
}

#[test]
fn a_tensor_without_a_place_or_of_a_wrong_type_is_refused_by_name() {
    for (name, tensor) in [
        ("model.layers.0.self_attn.rope_extra.weight", tensor("x", &[HIDDEN])),
        ("model.vision_tower.weight", tensor("x", &[HIDDEN, HIDDEN])),
        ("stray", tensor("x", &[HIDDEN])),
        ("model.layers.0.mlp.up_proj.weight", Tensor { dtype: Dtype::U8, shape: vec![2, 2], bytes: vec![0; 4] }),
        ("model.layers.0.mlp.up_proj.scales", tensor("x", &[HIDDEN])),
    ] {
        let mut checkpoint = Checkpoint::new("llama");
        checkpoint.tensors.insert(name.to_owned(), tensor);
        let refusal = checkpoint.refusal();
        assert!(refusal.contains(name), "{name}: {refusal}");
    }
}

#[test]
fn files_that_are_missing_or_broken_are_refused_by_name() {
    let refusal = |change: &dyn Fn(&Path)| {
        let checkpoint = Checkpoint::new("llama");
        checkpoint.convert("q8_0").unwrap();
        fs::remove_dir_all(checkpoint.home.path().join("models")).unwrap();
        change(checkpoint.path());
        quantized(checkpoint.path(), "q8_0".parse().unwrap(), checkpoint.home.path()).unwrap_err().to_string()
    };
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        let absent = refusal(&|folder| fs::remove_file(folder.join(file)).unwrap());
        assert!(absent.contains(file), "{absent}");
        let broken = refusal(&|folder| fs::write(folder.join(file), "{]").unwrap());
        assert!(broken.contains(file), "{broken}");
    }
    let cut = refusal(&|folder| {
        let file = folder.join("model.safetensors");
        let bytes = fs::read(&file).unwrap();
        fs::write(file, &bytes[..bytes.len() - 1]).unwrap();
    });
    assert!(cut.contains("model.safetensors") && cut.contains("not a whole"), "{cut}");
    let pickles = refusal(&|folder| {
        fs::rename(folder.join("model.safetensors"), folder.join("pytorch_model.bin")).unwrap();
    });
    assert!(pickles.contains("pickle"), "{pickles}");
}
