//! The decoder against an independent one in f64, over random models of every weight type and architecture.

#[path = "tiny/reference.rs"]
mod reference;
mod shapes;
mod tiny;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value;
use emulator::Emulator;
use kernels::attention::{BlockId, KvType};
use kernels::cuda::Cuda;
use kernels::device::{Device, DeviceError, Logits};
use kernels::host::Host;
use kernels::{Cpu, Isa};
use lorry::adapter::compose::compose;
use lorry::model::base_weights::GgufWeights;
use lorry::model::gguf::GgufFile;
use lorry::model::spec::{Architecture, Module};
use lorry::model::{AdapterGroup, FIRST_VIRTUAL_TOKEN, ForwardBatch, SequenceRows, unquantized};
use lorry::tokenizer::{Specials, Tokenizer};
use reference::Reference;
use shapes::Shapes;
use tiny::peft::{Kind, PeftAdapter, with_virtual_tokens};
use tiny::{Lora, Place, TinyModel, logits_alone, place, random_tokens, weight_name};

const QUANTIZED: [GgmlDType; 10] = [
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
    GgmlDType::Q8_0,
    GgmlDType::Q2K,
    GgmlDType::Q3K,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
];
const EXACT: [GgmlDType; 3] = [GgmlDType::F16, GgmlDType::BF16, GgmlDType::F32];
const ARCHITECTURES: [Architecture; 2] = [Architecture::Llama, Architecture::Qwen2];

/// Activations of quantized layers are rounded to int8, which costs about 0.009; K and V are f16, about 0.0002.
const MAX_QUANTIZED_DISTANCE: f64 = 0.02;
const MAX_EXACT_DISTANCE: f64 = 5e-4;

/// Mean absolute difference over all positions, in standard deviations of what is expected.
fn distance(logits: &[Vec<f32>], expected: &[Vec<f64>]) -> f64 {
    let expected: Vec<f64> = expected.concat();
    let mean = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / expected.len() as f64;
    let center = mean(&mut expected.iter().copied());
    let variance = mean(&mut expected.iter().map(|y| (y - center).powi(2)));
    let difference = mean(&mut logits.iter().flatten().zip(&expected).map(|(&x, y)| (f64::from(x) - y).abs()));
    difference / variance.sqrt()
}

/// Compares on every instruction set, with or without an adapter.
fn check(model: &TinyModel, lora: Option<&Lora>) {
    let tokens = random_tokens(&model.spec, 40, 1);
    let mut reference = Reference::new(model);
    if let Some(lora) = lora {
        reference.merge(lora);
    }
    let expected = reference.logits(&tokens);
    let adapter = lora.map(|lora| lora.adapter("lora"));
    let max_distance = if EXACT.contains(&model.dtype) { MAX_EXACT_DISTANCE } else { MAX_QUANTIZED_DISTANCE };
    for place in Place::all(2) {
        let mut decoder = model.load(place);
        let distance = distance(&logits_alone(&mut *decoder, &tokens, adapter.as_ref()), &expected);
        let (architecture, dtype) = (model.spec.architecture, model.dtype);
        assert!(distance < max_distance, "{architecture:?} {dtype:?} on {place:?}: {distance}");
    }
}

#[test]
fn every_quantized_type_gives_the_logits_of_its_dequantized_weights() {
    for architecture in ARCHITECTURES {
        for dtype in QUANTIZED {
            check(&TinyModel::new(architecture, dtype, 2), None);
        }
    }
}

#[test]
fn unquantized_types_give_the_exact_logits_up_to_the_rounding_of_keys_and_values() {
    for architecture in ARCHITECTURES {
        for dtype in EXACT {
            check(&TinyModel::new(architecture, dtype, 3), None);
        }
    }
}

#[test]
fn an_adapter_on_every_site_gives_the_logits_of_the_merged_weights() {
    for architecture in ARCHITECTURES {
        for (dtype, rank, with_bias) in [
            (GgmlDType::F32, 5, false),
            (GgmlDType::F32, 16, true),
            (GgmlDType::Q4K, 8, false),
            (GgmlDType::Q8_0, 3, true),
        ] {
            let model = TinyModel::new(architecture, dtype, 4);
            check(&model, Some(&Lora::random(&model.spec, rank, with_bias, 5)));
        }
    }
}

/// Compares adapters of PEFT files, applied together at their strengths, with the reference in every place.
fn check_peft(model: &TinyModel, members: &[(&PeftAdapter, f32)]) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    model.write(&path);
    let base = GgufWeights::open(&path).unwrap();
    let mut reference = Reference::new(model);
    members.iter().for_each(|(adapter, strength)| reference.apply(adapter, f64::from(*strength)));
    let loaded: Vec<_> = members.iter().map(|(adapter, strength)| (adapter.load("member", &base), *strength)).collect();
    let adapter = match &loaded[..] {
        [(adapter, 1.0)] => adapter.clone(),
        members => Arc::new(compose(members).unwrap()),
    };
    let tokens = random_tokens(&model.spec, 40, 1);
    let expected = reference.logits(&tokens);
    let max_distance = if EXACT.contains(&model.dtype) { MAX_EXACT_DISTANCE } else { MAX_QUANTIZED_DISTANCE };
    let tokens = with_virtual_tokens(tokens, Some(&adapter));
    let without = Reference::new(model).logits(&random_tokens(&model.spec, 40, 1));
    for place in Place::all(2) {
        let mut decoder = model.load(place);
        let logits = logits_alone(&mut *decoder, &tokens, Some(&adapter));
        let logits = &logits[adapter.num_virtual_tokens()..];
        let (architecture, dtype, method) = (model.spec.architecture, model.dtype, adapter.method);
        let distance_to = |expected: &[Vec<f64>]| distance(logits, expected);
        let found = distance_to(&expected);
        assert!(found < max_distance, "{method} on {architecture:?} {dtype:?}, {place:?}: {found}");
        assert!(distance_to(&without) > 0.1, "{method} changes too little for a test");
    }
}

#[test]
fn an_adapter_of_every_method_gives_the_logits_of_its_formula() {
    for architecture in ARCHITECTURES {
        for dtype in [GgmlDType::F32, GgmlDType::Q8_0] {
            let model = TinyModel::new(architecture, dtype, 10);
            for kind in Kind::ALL {
                check_peft(&model, &[(&PeftAdapter::random(kind, &model.spec, 11), 1.0)]);
            }
        }
    }
}

#[test]
fn a_composition_gives_the_logits_of_the_sum_of_its_members() {
    for architecture in ARCHITECTURES {
        let model = TinyModel::new(architecture, GgmlDType::F32, 12);
        let adapter = |kind, seed| PeftAdapter::random(kind, &model.spec, seed);
        let (everywhere, biased) = (adapter(Kind::LoraEverywhere, 13), adapter(Kind::RsLoraBias, 14));
        let second = adapter(Kind::LoraEverywhere, 15);
        check_peft(&model, &[(&everywhere, 0.5)]);
        check_peft(&model, &[(&everywhere, 0.75), (&biased, 1.0), (&second, -0.5)]);
    }
}

#[test]
fn a_token_that_is_in_no_vocabulary_and_no_prelude_is_an_error() {
    let model = TinyModel::new(Architecture::Llama, GgmlDType::Q8_0, 16);
    let mut decoder = model.load(Place::Host(Isa::detect(), 1));
    let prompt = PeftAdapter::random(Kind::PromptTuning, &model.spec, 1).load("prompt", &Shapes(model.spec.clone()));
    decoder.reserve(1);
    let _lease = place(&mut *decoder, &prompt);
    for (token, adapter) in [
        (model.spec.vocab_size as u32, None),
        (FIRST_VIRTUAL_TOKEN, None),
        (FIRST_VIRTUAL_TOKEN + prompt.num_virtual_tokens() as u32, Some(&prompt)),
    ] {
        let groups: Vec<_> = adapter.map(|a| AdapterGroup { rows: 0..1, adapter: a.clone() }).into_iter().collect();
        let batch = ForwardBatch {
            copies: &[],
            tokens: &[token],
            sequences: &[SequenceRows { rows: 0..1, first_position: 0, block_table: &[BlockId(0)] }],
            groups: &groups,
            logits_rows: &[],
        };
        let error = decoder.forward(&batch, &mut |_: usize, _: &mut dyn Logits| Ok(())).unwrap_err();
        assert!(error.to_string().contains(&token.to_string()), "{error}");
    }
}

#[test]
fn the_description_of_the_decoder_is_read_from_the_metadata() {
    for architecture in ARCHITECTURES {
        let model = TinyModel::new(architecture, GgmlDType::Q8_0, 6);
        assert_eq!(model.load(Place::Host(Isa::detect(), 1)).spec(), &model.spec);
    }
}

/// Why a file is refused.
fn refusal(path: &Path) -> String {
    Place::Host(Isa::detect(), 1).load(path, usize::MAX).map(|_| ()).expect_err("a damaged file is refused").to_string()
}

#[test]
fn a_file_that_does_not_describe_a_decoder_is_refused_by_name() {
    type Change = Box<dyn Fn(&mut TinyModel)>;
    fn set(key: &'static str, value: Value) -> Change {
        Box::new(move |model| drop(model.metadata.insert(key.into(), value.clone())))
    }
    fn without(key: &'static str) -> Change {
        Box::new(move |model| drop(model.metadata.remove(key).expect("the key is there")))
    }
    fn with(name: &'static str, like: &'static str) -> Change {
        Box::new(move |model| drop(model.weights.insert(name.into(), model.weights[like].clone())))
    }
    fn drop_weight(name: &'static str) -> Change {
        Box::new(move |model| drop(model.weights.remove(name).expect("the tensor is there")))
    }
    let cases: Vec<(&[&str], Change)> = vec![
        (&["general.architecture"], without("general.architecture")),
        (&["general.architecture", "string"], set("general.architecture", Value::U32(1))),
        (&["mamba", "llama", "qwen2"], set("general.architecture", Value::String("mamba".into()))),
        (&["qwen2.embedding_length"], without("qwen2.embedding_length")),
        (&["qwen2.block_count", "whole number"], set("qwen2.block_count", Value::F32(2.0))),
        (&["qwen2.block_count", "whole number"], set("qwen2.block_count", Value::I32(-2))),
        (&["blk.2.attn_norm.weight"], set("qwen2.block_count", Value::U32(3))),
        (&["3 heads", "2 key-value"], set("qwen2.attention.head_count", Value::U32(3))),
        (&["qwen2.attention.head_count = 0"], set("qwen2.attention.head_count", Value::U32(0))),
        (&["31 rotary"], set("qwen2.rope.dimension_count", Value::U32(31))),
        (&["qwen2.rope.scaling.original_context_length"], set("qwen2.rope.scaling.type", Value::String("yarn".into()))),
        (&["qwen2.rope.scaling.type", "ntk"], set("qwen2.rope.scaling.type", Value::String("ntk".into()))),
        (&["rope_freqs.weight", "[256]", "[32]"], with("rope_freqs.weight", "output_norm.weight")),
        (&["blk.1.attn_q_norm.weight"], with("blk.1.attn_q_norm.weight", "output_norm.weight")),
        (&["321 tokens", "320 rows"], set("tokenizer.ggml.tokens", Value::Array(vec![Value::U8(0); 321]))),
        (&["token_embd.weight"], drop_weight("token_embd.weight")),
        (&["token_embd.weight", "[256]"], with("token_embd.weight", "output_norm.weight")),
        (&["output_norm.weight"], drop_weight("output_norm.weight")),
        (&["blk.1.ffn_down.weight"], drop_weight("blk.1.ffn_down.weight")),
        (&["blk.1.ffn_down.weight", "[512, 256]", "[256, 512]"], with("blk.1.ffn_down.weight", "blk.1.ffn_up.weight")),
        (&["blk.0.attn_k.bias", "[256]", "[128]"], with("blk.0.attn_k.bias", "blk.0.attn_q.bias")),
        (&["output.weight", "[256, 256]", "[320, 256]"], with("output.weight", "blk.0.attn_q.weight")),
    ];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("changed.gguf");
    for (words, change) in cases {
        let mut model = TinyModel::new(Architecture::Qwen2, GgmlDType::Q4_0, 7);
        change(&mut model);
        model.write(&path);
        let refusal = refusal(&path);
        assert!(words.iter().all(|word| refusal.contains(word)), "{words:?}: {refusal}");
    }
}

/// llama.cpp knows it by the model's name; the ids are those that its rule gives.
#[test]
fn markers_of_phi_3_take_in_the_whitespace_behind_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("changed.gguf");
    for (architecture, rstrip, expected) in [
        ("phi3", None, vec![260, 262, 100, 261, 1, 262, 13]),
        ("phi3", Some(vec![]), vec![260, 262, 13, 262, 100, 261, 262, 13, 1, 262, 13]),
        ("llama", None, vec![260, 262, 13, 262, 100, 261, 262, 13, 1, 262, 13]),
        ("llama", Some(vec![Value::U32(261)]), vec![260, 262, 13, 262, 100, 261, 1, 262, 13]),
    ] {
        let mut model = TinyModel::new(Architecture::Llama, GgmlDType::Q4_0, 7);
        model.metadata.insert("general.architecture".into(), Value::String(architecture.into()));
        model.metadata.extend(rstrip.map(|ids| ("lorry.tokenizer.rstrip".into(), Value::Array(ids))));
        for (id, text, kind) in [(260, "<|user|>", 3), (261, "<|end|>", 3), (262, "▁", 1)] {
            set_item(&mut model, "tokenizer.ggml.tokens", id, Value::String(text.into()));
            set_item(&mut model, "tokenizer.ggml.token_type", id, Value::I32(kind));
        }
        model.write(&path);
        let tokenizer = Tokenizer::from_gguf(&GgufFile::open(&path).unwrap()).unwrap();
        let ids = tokenizer.encode("<|user|>\n a<|end|>\n<s>\n", Specials::Parse).unwrap();
        assert_eq!(ids, expected, "{architecture}");
    }
}

fn set_item(model: &mut TinyModel, key: &str, index: usize, value: Value) {
    let Some(Value::Array(items)) = model.metadata.get_mut(key) else { panic!("{key} is a list") };
    items[index] = value;
}

#[test]
fn a_key_of_the_tokenizer_that_is_not_known_is_refused_with_its_value() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("changed.gguf");
    let read = |key: &str, value: Value| {
        let mut model = TinyModel::new(Architecture::Llama, GgmlDType::Q4_0, 7);
        model.metadata.insert(format!("tokenizer.ggml.{key}"), value);
        model.write(&path);
        Tokenizer::from_gguf(&GgufFile::open(&path).unwrap()).map_err(|e| e.to_string())
    };
    for (key, value, shown) in [
        ("add_eos_token", Value::Bool(true), "true"),
        ("remove_extra_whitespaces", Value::Bool(true), "true"),
        ("precompiled_charsmap", Value::Array(vec![Value::U8(1); 5]), "array of 5"),
    ] {
        let refusal = read(key, value).map(|_| ()).unwrap_err();
        assert!(refusal.contains(&format!("tokenizer.ggml.{key}")) && refusal.contains(shown), "{refusal}");
    }
    for (key, value) in [("add_eos_token", Value::Bool(false)), ("mask_token_id", Value::U32(4))] {
        read(key, value).unwrap();
    }
}

#[test]
fn a_file_cut_anywhere_is_refused_with_the_file_or_the_tensor_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cut.gguf");
    let model = TinyModel::new(Architecture::Llama, GgmlDType::Q4_0, 8);
    model.write(&path);
    let whole = fs::read(&path).unwrap();
    let (step, last) = (whole.len() / 60, whole.len() - 1);
    for len in (0..64).chain((64..last).step_by(step)).chain([last]) {
        fs::write(&path, &whole[..len]).unwrap();
        let refusal = refusal(&path);
        let names_the_tensor = refusal.contains("truncated") && refusal.contains(".weight");
        assert!(names_the_tensor || refusal.contains("cut.gguf"), "{len} of {} bytes: {refusal}", whole.len());
    }
}

#[test]
fn what_is_no_gguf_file_is_refused_with_its_path() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notes.txt");
    assert!(refusal(&path).contains("notes.txt"), "a missing file");
    for content in ["", "x", "These are notes, and not the weights of a model."] {
        fs::write(&path, content).unwrap();
        let refusal = refusal(&path);
        assert!(refusal.contains("notes.txt"), "{content:?}: {refusal}");
    }
    assert!(refusal(dir.path()).contains(&*dir.path().to_string_lossy()), "a folder");
}

/// Gives a tensor of a file another type, by GGML's number.
fn change_type(path: &Path, name: &str, number: u32) {
    let mut bytes = fs::read(path).unwrap();
    let name = [&(name.len() as u64).to_le_bytes(), name.as_bytes()].concat();
    let at = bytes.windows(name.len()).position(|window| window == name).unwrap() + name.len();
    let num_dimensions = u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i])) as usize;
    bytes[at + 4 + 8 * num_dimensions..][..4].copy_from_slice(&number.to_le_bytes());
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_type_that_is_not_read_is_refused_by_its_name_and_that_of_the_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("types.gguf");
    let model = TinyModel::new(Architecture::Llama, GgmlDType::Q4_0, 8);
    for (number, name) in [(16, "IQ2_XXS"), (19, "IQ1_S"), (35, "TQ2_0"), (9, "Q8_1"), (77, "77, which is unknown")] {
        model.write(&path);
        change_type(&path, "blk.1.ffn_up.weight", number);
        let refusal = refusal(&path);
        assert!(refusal.contains("blk.1.ffn_up.weight") && refusal.contains(name), "{refusal}");
    }
}

#[test]
fn types_with_tables_run_as_their_dequantized_weights_do() {
    let dir = tempfile::tempdir().unwrap();
    let (path, name) = (dir.path().join("tables.gguf"), "blk.1.ffn_up.weight");
    let tokens = random_tokens(&TinyModel::new(Architecture::Qwen2, GgmlDType::F32, 8).spec, 20, 1);
    let model = TinyModel::new(Architecture::Qwen2, GgmlDType::Q4_0, 8);
    model.write(&path);
    // A block has as many bytes in both.
    change_type(&path, name, 20);
    let mut expected = TinyModel::new(Architecture::Qwen2, GgmlDType::F32, 8);
    for (name, weight) in &mut expected.weights {
        let file = GgufFile::open(&path).unwrap();
        let raw = file.tensor(name).unwrap();
        let width = *weight.dims().last().unwrap();
        let row_bytes = raw.weight_type.row_bytes(width).unwrap();
        let rows = raw.bytes.chunks_exact(row_bytes).flat_map(|bytes| {
            let mut row = vec![0.0; width];
            raw.weight_type.dequantize_row(bytes, &mut row);
            row
        });
        *weight = candle_core::Tensor::from_vec(rows.collect(), weight.shape(), &candle_core::Device::Cpu).unwrap();
    }
    let expected = Reference::new(&expected).logits(&tokens);
    let original = Reference::new(&model).logits(&tokens);
    for isa in Isa::available() {
        let mut decoder = Place::Host(isa, 2).load(&path, usize::MAX).unwrap();
        let logits = logits_alone(&mut *decoder, &tokens, None);
        assert!(distance(&logits, &expected) < MAX_QUANTIZED_DISTANCE, "{isa}: {}", distance(&logits, &expected));
        assert!(distance(&logits, &original) > 5.0 * MAX_QUANTIZED_DISTANCE, "{isa}: the type changes nothing");
    }
}

#[test]
fn keys_and_values_in_q8_0_change_a_little() {
    for architecture in ARCHITECTURES {
        let model = TinyModel::new(architecture, GgmlDType::Q8_0, 4);
        let tokens = random_tokens(&model.spec, 100, 1);
        let hosts = Isa::available().map(|isa| [Place::Host(isa, 2), Place::HostQ8(isa, 2)]);
        for places in hosts.chain([KvType::ALL.map(Place::EmulatedGpu)]) {
            let [exact, rounded] = places.map(|place| logits_alone(&mut *model.load(place), &tokens, None));
            let rounded: Vec<Vec<f64>> =
                rounded.iter().map(|row| row.iter().map(|x| f64::from(*x)).collect()).collect();
            let distance = distance(&exact, &rounded);
            assert!((1e-6..MAX_QUANTIZED_DISTANCE).contains(&distance), "{places:?}, {architecture:?}: {distance}");
        }
    }
}

#[test]
fn keys_and_values_in_q8_0_are_refused_by_name_where_they_cannot_be() {
    let mut spec = TinyModel::new(Architecture::Llama, GgmlDType::Q8_0, 4).spec;
    let said = |prepared: Result<(), DeviceError>, why: &str| {
        let refusal = prepared.expect_err("it is refused").to_string();
        assert!(refusal.contains("engine.kv_cache_type = \"q8_0\"") && refusal.contains(why), "{refusal}");
    };
    let mut card = Cuda::new(Emulator::new(1 << 20), 0, KvType::Q8_0);
    card.prepare(&spec.shape(), &spec.attention_plan()).unwrap();
    let mut host = Host::new(Cpu::new(Isa::detect(), 1), unquantized::load, KvType::Q8_0);
    host.prepare(&spec.shape(), &spec.attention_plan()).unwrap();
    spec.head_dim = 80;
    said(host.prepare(&spec.shape(), &spec.attention_plan()), "multiple of 32 dimensions, and these have 80");
    said(card.prepare(&spec.shape(), &spec.attention_plan()), "a head_dim of 80");
}

#[test]
fn a_model_split_over_files_is_that_model_and_a_part_alone_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let model = TinyModel::new(Architecture::Qwen2, GgmlDType::Q4_0, 8);
    let parts = model.write_parts(dir.path(), 3);
    let tokens = random_tokens(&model.spec, 20, 1);
    let host = Place::Host(Isa::detect(), 1);
    let whole = logits_alone(&mut *model.load(host), &tokens, None);
    assert_eq!(logits_alone(&mut *host.load(&parts[0], usize::MAX).unwrap(), &tokens, None), whole);
    assert!(refusal(&parts[1]).contains("part 2 of 3"), "{}", refusal(&parts[1]));
    assert!(refusal(&parts[1]).contains("-00001-of-00003.gguf"));
    fs::rename(&parts[1], dir.path().join("elsewhere.gguf")).unwrap();
    assert!(refusal(&parts[0]).contains("tiny-00002-of-00003.gguf"), "{}", refusal(&parts[0]));
    fs::copy(&parts[2], &parts[1]).unwrap();
    assert!(refusal(&parts[0]).contains("it is not part 2 of 3"), "{}", refusal(&parts[0]));
    let renamed = dir.path().join("renamed.gguf");
    fs::rename(&parts[0], &renamed).unwrap();
    assert!(refusal(&renamed).contains("does not end in -00001-of-00003.gguf"), "{}", refusal(&renamed));
}

#[test]
fn a_wrong_weight_would_be_noticed() {
    let tokens = [5, 6, 7, 8, 9];
    let model = TinyModel::new(Architecture::Llama, GgmlDType::Q8_0, 9);
    let expected = Reference::new(&model).logits(&tokens);
    for module in Module::PLAIN {
        let mut other = TinyModel::new(Architecture::Llama, GgmlDType::Q8_0, 9);
        let weight = &model.weights[&weight_name(1, module)];
        let reversed: Vec<u32> = (0..weight.dims()[0] as u32).rev().collect();
        let order = candle_core::Tensor::new(reversed, &candle_core::Device::Cpu).unwrap();
        other.weights.insert(weight_name(1, module), weight.index_select(&order, 0).unwrap());
        let mut decoder = other.load(Place::Host(Isa::detect(), 1));
        let distance = distance(&logits_alone(&mut *decoder, &tokens, None), &expected);
        assert!(distance > MAX_QUANTIZED_DISTANCE, "{module:?}: {distance}");
    }
}
