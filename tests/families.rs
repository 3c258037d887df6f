//! Every decoder family against transformers and PEFT: tiny models, the same weights on both sides.
//!
//! `families/reference.py` says what is compared; it has written the logits.

#[path = "families/keys.rs"]
mod keys;
#[path = "families/model.rs"]
mod model;
mod tiny;

use std::path::Path;
use std::sync::Arc;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use half::f16;
use kernels::Isa;
use kernels::attention::{BLOCK_SIZE, BlockId, KvType};
use keys::{KEYS, changes_nothing};
use lorry::adapter::canonical::Adapter;
use lorry::adapter::{import, loader};
use lorry::model::base_weights::GgufWeights;
use lorry::model::checkpoint::quantized;
use lorry::model::gguf::GgufFile;
use lorry::model::memory::Memory;
use lorry::model::{AdapterGroup, BaseWeights, SequenceRows};
use model::{Model, PeftCase, REFERENCE, write_checkpoint};
use safetensors::SafeTensors;
use serde_json::{Value as Json, json};
use tiny::peft::{PeftAdapter, with_virtual_tokens};
use tiny::{Loaded, Place, logits_alone, logits_of_rows, place};

/// The other form of the same: what `config.json` says of it, instead of a file's metadata.
#[test]
fn every_checkpoint_has_the_logits_of_transformers() {
    for family in &REFERENCE.families {
        let plain = ("as it is", &family.config, &[][..], &family.logits);
        let variants = family.variants.iter().map(|v| (v.name.as_str(), &v.config, &v.without[..], &v.logits));
        for (name, config, without, expected) in [plain].into_iter().chain(variants) {
            let (folder, home) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            write_checkpoint(folder.path(), family, config, without);
            for (quantization, bound) in [("none", MAX_EXACT_DISTANCE), ("q8_0", MAX_QUANTIZED_DISTANCE)] {
                let path = quantized(folder.path(), quantization.parse().unwrap(), home.path());
                let path = path.unwrap_or_else(|e| panic!("{}, {name}: {e}", family.name));
                let mut decoder = Place::Host(Isa::detect(), 2).load(&path, usize::MAX).unwrap();
                let distance = distance(&kept_logits(&mut *decoder, None), expected);
                println!("{}, {name}, {quantization}: {distance:.6}", family.name);
                assert!(distance < bound, "{}, {name}, in {quantization}: {distance}", family.name);
            }
        }
    }
}

/// `config.json` as transformers before 5 wrote it, and as most checkpoints have it: what turns heads beside the other fields, and
/// windows by their period.
fn in_older_layout(config: &Json) -> Json {
    let mut older = config.clone();
    let fields = older.as_object_mut().unwrap();
    let mut rope = fields.remove("rope_parameters").unwrap();
    if let Some(with_window) = rope.get("sliding_attention") {
        fields.insert("rope_local_base_freq".to_owned(), with_window["rope_theta"].clone());
        rope = rope["full_attention"].clone();
        fields.remove("layer_types");
        let period = fields.remove("_sliding_window_pattern").unwrap();
        fields.insert("sliding_window_pattern".to_owned(), period);
    }
    let rope = rope.as_object_mut().unwrap();
    for name in ["rope_theta", "partial_rotary_factor"] {
        fields.extend(rope.remove_entry(name));
    }
    if let Some(count) = fields.remove("num_local_experts") {
        fields.insert("num_experts".to_owned(), count);
    }
    let kind = rope.remove("rope_type").unwrap();
    if kind == "longrope" {
        fields.extend(rope.remove_entry("original_max_position_embeddings"));
    }
    if kind != "default" {
        rope.insert("type".to_owned(), kind);
        fields.insert("rope_scaling".to_owned(), Json::Object(rope.clone()));
    }
    older
}

#[test]
fn the_older_layout_of_a_configuration_says_the_same() {
    for family in &REFERENCE.families {
        let variants = family.variants.iter().map(|variant| (&variant.config, &variant.without[..]));
        for (config, without) in [(&family.config, &[][..])].into_iter().chain(variants) {
            let logits = |config: &Json| {
                let (folder, home) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
                write_checkpoint(folder.path(), family, config, without);
                let path = quantized(folder.path(), "none".parse().unwrap(), home.path());
                let path = path.unwrap_or_else(|e| panic!("{}, {config}: {e}", family.name));
                kept_logits(&mut *Place::Host(Isa::detect(), 2).load(&path, usize::MAX).unwrap(), None)
            };
            let older = in_older_layout(config);
            assert!(logits(&older) == logits(config), "{}: {older}", family.name);
        }
    }
}

/// Logits at the kept positions; with virtual tokens before the prompt, of as many of its last tokens.
fn kept_logits(decoder: &mut dyn Loaded, adapter: Option<&Arc<Adapter>>) -> Vec<f32> {
    let tokens = with_virtual_tokens(REFERENCE.tokens.clone(), adapter);
    let logits = logits_alone(decoder, &tokens, adapter);
    let before = tokens.len() - REFERENCE.tokens.len();
    REFERENCE.positions.iter().flat_map(|position| logits[before + position].clone()).collect()
}

/// Mean absolute difference in standard deviations of what is expected.
fn distance(logits: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(logits.len(), expected.len());
    let len = expected.len() as f64;
    let mean = expected.iter().map(|y| f64::from(*y)).sum::<f64>() / len;
    let variance = expected.iter().map(|y| (f64::from(*y) - mean).powi(2)).sum::<f64>() / len;
    let difference = logits.iter().zip(expected).map(|(x, y)| f64::from(x - y).abs()).sum::<f64>() / len;
    difference / variance.sqrt()
}

/// K and V are f16, which costs about 0.0002; activations of quantized layers are int8, about 0.015, and twice that where a row
/// chooses its experts by them.
const MAX_EXACT_DISTANCE: f64 = 1e-3;
const MAX_QUANTIZED_DISTANCE: f64 = 0.04;
/// On a card, where a row of which two experts score nearly the same may choose the other one: attention rounds otherwise there. In
/// F32 no row does.
const MAX_ROUTED_DISTANCE: f64 = 0.08;
/// What a change must make at least for a test of it to mean something.
const MIN_CHANGE: f64 = 0.02;

/// A card.
const CARD: Place = Place::EmulatedGpu(KvType::F16);

fn hosts() -> impl Iterator<Item = Place> {
    Isa::available().map(|isa| Place::Host(isa, 2))
}

#[test]
fn every_family_has_the_logits_of_transformers() {
    for family in &REFERENCE.families {
        let (model, expected) = (Model::of(family), &family.logits);
        for (dtype, bound) in [(GgmlDType::F32, MAX_EXACT_DISTANCE), (GgmlDType::Q8_0, MAX_QUANTIZED_DISTANCE)] {
            // Attention on a card rounds its weights to f16.
            let on_card = (dtype == GgmlDType::Q8_0).then_some(CARD);
            for place in hosts().chain(on_card) {
                let mut decoder = model.load(dtype, place).unwrap();
                let distance = distance(&kept_logits(&mut *decoder, None), expected);
                println!("{} {dtype:?} {place:?}: {distance:.6}", family.name);
                assert!(distance < bound, "{} {dtype:?} on {place:?}: {distance}", family.name);
            }
        }
    }
}

#[test]
fn what_a_file_says_changes_the_logits_as_it_does_those_of_transformers() {
    for family in &REFERENCE.families {
        let before = &family.logits;
        for variant in &family.variants {
            let expected = &variant.logits;
            let change = distance(before, expected);
            let mut decoder =
                Model::of(family).with(variant).load(GgmlDType::F32, Place::Host(Isa::detect(), 2)).unwrap();
            let found = distance(&kept_logits(&mut *decoder, None), expected);
            println!("{}, {}: {found:.6}, change {change:.3}", family.name, variant.name);
            assert!(found < MAX_EXACT_DISTANCE, "{}, {}: {found}", family.name, variant.name);
            let mut decoder = Model::of(family).with(variant).load(GgmlDType::Q8_0, CARD).unwrap();
            let on_card = distance(&kept_logits(&mut *decoder, None), expected);
            println!("{}, {}, on a card: {on_card:.6}", family.name, variant.name);
            assert!(on_card < MAX_QUANTIZED_DISTANCE, "{}, {} on a card: {on_card}", family.name, variant.name);
            assert!(change > MIN_CHANGE, "{}, {}: changes too little", family.name, variant.name);
        }
    }
}

#[test]
fn a_model_takes_the_memory_that_its_file_says() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    for family in &REFERENCE.families {
        for dtype in [GgmlDType::Q8_0, GgmlDType::Q4_1] {
            Model::of(family).write(&path, dtype);
            let said = Memory::of_file(&GgufFile::open(&path).unwrap()).unwrap();
            let decoder = Place::Host(Isa::detect(), 1).load(&path, usize::MAX).unwrap();
            assert_eq!(said.weight_bytes, decoder.weight_bytes(), "{} in {dtype:?}", family.name);
        }
    }
}

/// An adapter of a family as PEFT saves it.
fn peft_adapter(case: &PeftCase) -> PeftAdapter {
    let tensors = case.tensors.iter().map(|(name, drawn)| {
        let values = drawn.values(name);
        assert!(values.iter().all(|value| f16::from_f32(*value).to_f32() == *value), "{name} is not exact in f16");
        (name.clone(), (drawn.shape.clone(), values))
    });
    PeftAdapter { config: case.config.clone(), tensors: tensors.collect() }
}

fn load_adapter(case: &PeftCase, path: &Path) -> Arc<Adapter> {
    peft_adapter(case).load(&case.kind, &GgufWeights::open(path).unwrap())
}

#[test]
fn an_adapter_that_does_not_fit_fused_layers_is_refused_by_the_name_of_its_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    let phi3 = REFERENCE.families.iter().find(|family| family.name == "phi3").unwrap();
    Model::of(phi3).write(&path, GgmlDType::Q8_0);
    let base = GgufWeights::open(&path).unwrap();
    let lora = peft_adapter(phi3.adapters.iter().find(|case| case.kind == "lora").unwrap());
    let refusal = |adapter: PeftAdapter| loader::load("phi3", &adapter.files(), &base).unwrap_err().to_string();
    let layer = "base_model.model.model.layers.1.self_attn";

    let mut short = lora.clone();
    let (shape, values) = short.tensors.get_mut(&format!("{layer}.qkv_proj.lora_B.weight")).unwrap();
    shape[0] -= 1;
    values.truncate(shape[0] * shape[1]);
    assert!(refusal(short).contains("layers.1.self_attn.qkv_proj.lora_B.weight"));

    let mut twice = lora.clone();
    let tensor = twice.tensors[&format!("{layer}.qkv_proj.lora_A.weight")].clone();
    twice.tensors.insert(format!("{layer}.q_proj.lora_A.weight"), tensor);
    assert!(refusal(twice).contains("q_proj.lora_A.weight"));

    let mut of_llama = lora.clone();
    of_llama.config["target_modules"] = serde_json::json!(["q_proj", "v_proj"]);
    assert!(refusal(of_llama).contains("site"));
}

/// As llama.cpp's `convert_lora_to_gguf.py` writes it: one pair for the layer that q, k and v share.
#[test]
fn an_adapter_of_fused_layers_is_imported_from_llama_cpp_s_form() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    let phi3 = REFERENCE.families.iter().find(|family| family.name == "phi3").unwrap();
    Model::of(phi3).write(&path, GgmlDType::F32);
    let base = GgufWeights::open(&path).unwrap();
    let spec = base.spec();
    let pair = |seed: usize, shape: [usize; 2]| {
        let values: Vec<f32> = (0..shape[0] * shape[1]).map(|i| ((i * 7 + seed) % 64) as f32 / 64.0).collect();
        Tensor::from_vec(values, &shape, &Device::Cpu).unwrap()
    };
    let qkv = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim;
    let layers = [("attn_qkv", "self_attn.qkv_proj", qkv), ("ffn_up", "mlp.gate_up_proj", 2 * spec.intermediate_size)];
    let tensors: Vec<(String, Tensor)> = layers
        .iter()
        .flat_map(|(part, _, outputs)| {
            [("a", pair(1, [2, spec.hidden_size])), ("b", pair(2, [*outputs, 2]))]
                .map(|(half, tensor)| (format!("blk.1.{part}.weight.lora_{half}"), tensor))
        })
        .collect();
    let text = |text: &str| Value::String(text.to_owned());
    let metadata = [
        ("general.type", text("adapter")),
        ("adapter.type", text("lora")),
        ("general.architecture", text("phi3")),
        ("adapter.lora.alpha", Value::F32(4.0)),
    ];
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let quantized: Vec<_> =
        tensors.iter().map(|(name, tensor)| (name, QTensor::quantize(tensor, GgmlDType::F32).unwrap())).collect();
    let quantized: Vec<_> = quantized.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let file = dir.path().join("sql.gguf");
    gguf_file::write(&mut std::fs::File::create(&file).unwrap(), &metadata, &quantized).unwrap();

    let files = import::import(&file, &base).unwrap();
    let weights = SafeTensors::deserialize(&files.weights).unwrap();
    for (part, path, _) in layers {
        for half in ["a", "b"] {
            let key = format!("base_model.model.model.layers.1.{path}.lora_{}.weight", half.to_uppercase());
            let found = weights.tensor(&key).unwrap();
            let name = format!("blk.1.{part}.weight.lora_{half}");
            let (_, expected) = tensors.iter().find(|(other, _)| *other == name).unwrap();
            let expected: Vec<f32> = expected.flatten_all().unwrap().to_vec1().unwrap();
            let values: Vec<f32> = found.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
            assert_eq!(values, expected, "{key}");
        }
    }
    let adapter = loader::load("phi3", &files, &base).unwrap();
    assert_eq!((adapter.coverage.num_sites, adapter.coverage.max_rank), (5, 2));
}

#[test]
fn an_adapter_changes_every_family_as_peft_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    for family in &REFERENCE.families {
        let before = &family.logits;
        for case in &family.adapters {
            let expected = &case.logits;
            let host = Place::Host(Isa::detect(), 2);
            let has_experts = family.name == "qwen3moe";
            let on_card = if has_experts { MAX_ROUTED_DISTANCE } else { MAX_QUANTIZED_DISTANCE };
            let mut runs = vec![
                (GgmlDType::F32, host, MAX_EXACT_DISTANCE),
                (GgmlDType::Q8_0, host, MAX_QUANTIZED_DISTANCE),
                (GgmlDType::Q8_0, CARD, on_card),
            ];
            runs.extend(has_experts.then_some((GgmlDType::F32, CARD, MAX_EXACT_DISTANCE)));
            for (dtype, place, bound) in runs {
                Model::of(family).write(&path, dtype);
                let adapter = load_adapter(case, &path);
                let mut decoder = place.load(&path, usize::MAX).unwrap();
                let found = distance(&kept_logits(&mut *decoder, Some(&adapter)), expected);
                println!(
                    "{} {} {dtype:?} {place:?}: {found:.6}, change {:.3}",
                    family.name,
                    case.kind,
                    distance(before, expected)
                );
                assert!(found < bound, "{} on {} {dtype:?} {place:?}: {found}", case.kind, family.name);
            }
            assert!(distance(before, expected) > MIN_CHANGE, "{} on {} changes too little", case.kind, family.name);
        }
    }
}

/// Logits `[sequence][position][vocab]` of two sequences that go side by side: the first `chunk` rows at a time, the second, with
/// an adapter, row by row.
fn logits_together(
    decoder: &mut dyn Loaded,
    tokens: [&[u32]; 2],
    adapter: &Arc<Adapter>,
    chunk: usize,
) -> [Vec<Vec<f32>>; 2] {
    let num_blocks = tokens[0].len().max(tokens[1].len()).div_ceil(BLOCK_SIZE);
    let table = |sequence: usize| (0..num_blocks).map(|b| BlockId((2 * b + sequence) as u32)).collect::<Vec<_>>();
    let tables = [table(0), table(1)];
    decoder.reserve(2 * num_blocks);
    let _lease = place(decoder, adapter);
    let mut all = [Vec::new(), Vec::new()];
    while (0..2).any(|i| all[i].len() < tokens[i].len()) {
        let (mut rows, mut sequences, mut groups) = (Vec::new(), Vec::new(), Vec::new());
        let mut owners = Vec::new();
        for i in 0..2 {
            let first_position = all[i].len();
            let count = [chunk, 1][i].min(tokens[i].len() - first_position);
            if count == 0 {
                continue;
            }
            let range = rows.len()..rows.len() + count;
            rows.extend_from_slice(&tokens[i][first_position..][..count]);
            owners.extend(range.clone().map(|_| i));
            if i == 1 {
                groups.push(AdapterGroup { rows: range.clone(), adapter: adapter.clone() });
            }
            sequences.push(SequenceRows { rows: range, first_position, block_table: &tables[i] });
        }
        let of_rows = logits_of_rows(decoder, &rows, &sequences, &groups);
        owners.into_iter().zip(of_rows).for_each(|(owner, logits): (usize, _)| all[owner].push(logits));
    }
    all
}

#[test]
fn a_row_of_every_family_has_the_same_bits_alone_and_beside_an_adapter() {
    let bits = |logits: &[Vec<f32>]| logits.iter().flatten().map(|logit| logit.to_bits()).collect::<Vec<_>>();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    for family in &REFERENCE.families {
        Model::of(family).write(&path, GgmlDType::Q8_0);
        let adapter = load_adapter(&family.adapters[0], &path);
        let tokens = [&REFERENCE.tokens[..], &REFERENCE.tokens[11..]];
        let hosts = Isa::available().map(|isa| [1, 2, 3].map(|threads| Place::Host(isa, threads)));
        for places in hosts.chain([[CARD; 3]]) {
            let load = |place: Place| place.load(&path, usize::MAX).unwrap();
            let alone = |tokens, adapter| logits_alone(&mut *load(places[0]), tokens, adapter);
            let expected = [alone(tokens[0], None), alone(tokens[1], Some(&adapter))];
            for (place, chunk) in places.into_iter().zip([1, 7, 16]) {
                let together = logits_together(&mut *load(place), tokens, &adapter, chunk);
                for (i, together) in together.iter().enumerate() {
                    assert!(bits(together) == bits(&expected[i]), "{} on {place:?}, sequence {i}", family.name);
                }
            }
        }
    }
}

#[test]
fn a_key_that_is_not_served_is_refused_with_its_name_and_value() {
    let family = |name: &str| Model::of(REFERENCE.families.iter().find(|family| family.name == name).unwrap());
    let text = |text: &str| Value::String(text.into());
    let cases = [
        ("llama", "expert_count", Value::U32(8), "8"),
        ("llama", "rope.scaling.type", text("ntk"), "ntk"),
        ("llama", "logit_scale", Value::F32(0.25), "0.25"),
        ("llama", "embedding_scale", Value::F32(2.0), "2.0"),
        ("llama", "attn_logit_softcapping", Value::F32(50.0), "50.0"),
        ("llama", "rope.scaling.yarn_log_multiplier", Value::F32(0.1), "0.1"),
        ("llama", "attention.value_length", Value::U32(64), "64"),
        ("llama", "attention.causal_mask_of_tomorrow", Value::Bool(true), "true"),
        ("llama", "feed_forward_length", Value::Array([96, 160, 160].map(Value::U32).to_vec()), "array of 3"),
        ("llama", "attention.causal", Value::Bool(false), "false"),
        ("llama", "context_length", Value::U32(0), "0"),
        ("llama", "block_count", Value::U32(0), "0"),
        ("llama", "block_count", Value::U64(1 << 60), "1152921504606846976"),
        ("gemma2", "block_count", Value::U32(4_000_000), "4000000"),
        ("llama", "context_length", Value::U32(u32::MAX), "4294967295"),
        // With heads of 64 dimensions, the rows that the tensors have, but for a carry.
        ("qwen3", "attention.head_count", Value::U64((1 << 58) + 4), "288230376151711748"),
        ("llama", "rope.freq_base", Value::F32(f32::NAN), "NaN"),
        ("qwen2", "attention.layer_norm_rms_epsilon", Value::F32(f32::INFINITY), "inf"),
        ("granite", "logit_scale", Value::F64(f64::MAX), "e308"),
        ("qwen2", "attention.causal", Value::Bool(false), "false"),
        ("qwen2", "attention.causal", Value::U32(1), "true or false"),
        ("qwen2", "attention.sliding_window", Value::U32(16), "16"),
        ("qwen3", "rope.scale_linear", Value::F32(-4.0), "-4.0"),
        ("qwen3moe", "expert_count", Value::U32(u32::MAX), "4294967295"),
        ("qwen3moe", "expert_used_count", Value::U32(9), "9"),
        ("qwen3moe", "expert_used_count", Value::U32(0), "0"),
        ("qwen3moe", "expert_weights_norm", text("softmax"), "true or false"),
        ("qwen3moe", "expert_gating_func", Value::U32(2), "2"),
        ("qwen3moe", "expert_weights_scale", Value::F32(2.5), "2.5"),
        ("qwen3moe", "expert_shared_count", Value::U32(1), "1"),
        ("qwen3moe", "expert_shared_feed_forward_length", Value::U32(96), "96"),
        ("qwen3moe", "leading_dense_block_count", Value::U32(1), "1"),
        ("qwen3moe", "attention.sliding_window", Value::U32(16), "16"),
        ("gemma2", "attention.sliding_window_pattern", Value::Array(vec![Value::Bool(true); 2]), "2"),
        ("gemma3", "attention.sliding_window_pattern", text("alternating"), "alternating"),
        ("starcoder2", "use_parallel_residual", Value::Bool(true), "true"),
    ];
    for (name, key, value, shown) in cases {
        let mut model = family(name);
        model.set(key, value);
        let refusal = model.load(GgmlDType::Q8_0, Place::Host(Isa::detect(), 1)).map(|_| ()).unwrap_err();
        assert!(refusal.contains(&format!("{name}.{key}")) && refusal.contains(shown), "{refusal}");
    }
}

#[test]
fn a_norm_or_a_bias_that_is_no_number_is_refused_by_the_name_of_its_tensor() {
    for (name, tensor, value) in [
        ("llama", "output_norm.weight", f32::NAN),
        ("llama", "blk.1.attn_norm.weight", f32::INFINITY),
        ("qwen2", "blk.0.attn_k.bias", f32::NEG_INFINITY),
    ] {
        let mut model = Model::of(REFERENCE.families.iter().find(|family| family.name == name).unwrap());
        let drawn = model.tensors.get_mut(tensor).unwrap();
        let mut values = drawn.values(tensor);
        values[3] = value;
        drawn.values = Some(values);
        let refusal = model.load(GgmlDType::Q8_0, Place::Host(Isa::detect(), 1)).map(|_| ()).unwrap_err();
        assert!(refusal.contains(tensor) && refusal.contains(&value.to_string()), "{refusal}");
    }
}

#[test]
fn whatever_a_key_says_changes_the_logits_or_is_refused_by_its_name() {
    let values =
        [Value::Bool(true), Value::Bool(false), Value::U32(0), Value::U32(1), Value::F32(0.0), Value::F32(0.5)];
    let host = Place::Host(Isa::detect(), 1);
    for family in &REFERENCE.families {
        let before = kept_logits(&mut *Model::of(family).load(GgmlDType::Q8_0, host).unwrap(), None);
        for key in KEYS {
            for value in &values {
                let mut model = Model::of(family);
                model.set(key, value.clone());
                let case = format!("{}.{key} = {value:?}", family.architecture);
                match model.load(GgmlDType::Q8_0, host) {
                    Err(refusal) => {
                        let (_, name) = key.rsplit_once('.').unwrap_or(("", key));
                        let is_of_size = [
                            "head_count",
                            "head_count_kv",
                            "key_length",
                            "dimension_count",
                            "block_count",
                            "expert_count",
                        ];
                        assert!(refusal.contains(name) || is_of_size.contains(&name), "{case}: {refusal}");
                    }
                    Ok(mut decoder) => {
                        let is_same = kept_logits(&mut *decoder, None) == before;
                        assert!(!is_same || changes_nothing(&family.name, key, value), "{case}: nothing changes");
                    }
                }
            }
        }
    }
}

#[test]
fn gemma2_without_its_keys_has_what_the_architecture_has() {
    let gemma2 = REFERENCE.families.iter().find(|family| family.name == "gemma2").unwrap();
    let features = |change: &dyn Fn(&mut Model)| {
        let mut model = Model::of(gemma2);
        change(&mut model);
        model.load(GgmlDType::Q8_0, Place::Host(Isa::detect(), 1)).unwrap().spec().features.clone()
    };
    let keys = ["attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window"];
    let usual = features(&|model| keys.iter().for_each(|key| model.unset(key)));
    assert_eq!((usual.attention_soft_cap, usual.logit_soft_cap), (Some(50.0), Some(30.0)));
    assert_eq!(usual.window.map(|window| (window.size, window.layers[..2].to_vec())), Some((4096, vec![true, false])));
    let zeros = [Value::F32(0.0), Value::F32(0.0), Value::U32(0)];
    let off = features(&|model| keys.iter().zip(&zeros).for_each(|(key, zero)| model.set(key, zero.clone())));
    assert_eq!((off.attention_soft_cap, off.logit_soft_cap, off.window), (None, None, None));
}

#[test]
fn a_router_is_named_as_a_module_or_by_its_weight() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    let moe = REFERENCE.families.iter().find(|family| family.name == "qwen3moe").unwrap();
    Model::of(moe).write(&path, GgmlDType::Q8_0);
    let base = GgufWeights::open(&path).unwrap();
    let by_weight = peft_adapter(&moe.adapters[0]);
    let mut as_module = by_weight.clone();
    as_module.config["target_modules"].as_array_mut().unwrap().push(json!("gate"));
    as_module.config["target_parameters"].as_array_mut().unwrap().retain(|name| name != "mlp.gate.weight");
    assert_eq!(as_module.config["target_parameters"].as_array().unwrap().len(), 2);
    let logits = |adapter: &PeftAdapter| {
        let mut decoder = Place::Host(Isa::detect(), 2).load(&path, usize::MAX).unwrap();
        kept_logits(&mut *decoder, Some(&adapter.load("moe", &base)))
    };
    assert!(logits(&as_module) == logits(&by_weight));
}

#[test]
fn an_adapter_that_does_not_fit_the_experts_is_refused_by_the_name_of_its_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    let moe = REFERENCE.families.iter().find(|family| family.name == "qwen3moe").unwrap();
    Model::of(moe).write(&path, GgmlDType::Q8_0);
    let base = GgufWeights::open(&path).unwrap();
    let of_kind = |kind: &str| peft_adapter(moe.adapters.iter().find(|case| case.kind == kind).unwrap());
    let refusal = |adapter: &PeftAdapter| loader::load("moe", &adapter.files(), &base).unwrap_err().to_string();
    let experts = "base_model.model.model.layers.1.mlp.experts";

    // Ranks of all experts but one.
    let mut fewer = of_kind("lora");
    let (shape, values) = fewer.tensors.get_mut(&format!("{experts}.lora_A.weight")).unwrap();
    shape[0] -= 4;
    values.truncate(shape[0] * shape[1]);
    assert!(refusal(&fewer).contains("layers.1.mlp.experts.lora_A.weight"));

    let mut turned = of_kind("lora");
    let (shape, _) = turned.tensors.get_mut(&format!("{experts}.base_layer.lora_B.weight")).unwrap();
    shape.reverse();
    let words = refusal(&turned);
    assert!(words.contains("experts.base_layer.lora_A.weight") && words.contains("neither parameter"), "{words}");

    let mut half = of_kind("lora");
    half.tensors.remove(&format!("{experts}.base_layer.lora_B.weight"));
    let words = refusal(&half);
    assert!(words.contains("layers.1.mlp.experts.base_layer") && words.contains("lora_B.weight is missing"), "{words}");

    let mut both = of_kind("experts");
    both.tensors.extend(of_kind("lora").tensors.into_iter().filter(|(name, _)| name.starts_with(experts)));
    let words = refusal(&both);
    assert!(words.contains("mlp.experts") && words.contains("belongs where"), "{words}");

    let mut unnamed = of_kind("lora");
    unnamed.config["target_parameters"] = json!(["mlp.experts.gate_up_proj", "mlp.gate.weight"]);
    assert!(refusal(&unnamed).contains("down_proj, which adapter_config.json does not name"));

    let mut beyond = of_kind("experts");
    let tensor = beyond.tensors[&format!("{experts}.7.up_proj.lora_A.weight")].clone();
    beyond.tensors.insert(format!("{experts}.8.up_proj.lora_A.weight"), tensor);
    assert!(refusal(&beyond).contains("experts.8.up_proj.lora_A.weight"));
}

#[test]
fn a_checkpoint_whose_experts_are_not_those_that_are_served_is_refused_by_the_name_of_its_field() {
    let moe = REFERENCE.families.iter().find(|family| family.name == "qwen3moe").unwrap();
    let refusal = |field: &str, value: Json| {
        let (folder, home) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut config = moe.config.clone();
        config[field] = value;
        write_checkpoint(folder.path(), moe, &config, &[]);
        quantized(folder.path(), "q8_0".parse().unwrap(), home.path()).unwrap_err().to_string()
    };
    for (field, value, shown) in [
        ("decoder_sparse_step", json!(2), "2"),
        ("mlp_only_layers", json!([0]), "[0]"),
        ("shared_expert_intermediate_size", json!(96), "96"),
        ("moe_router_bias", json!(true), "true"),
    ] {
        let refusal = refusal(field, value);
        assert!(refusal.contains(field) && refusal.contains(shown), "{refusal}");
    }
    let refusal = refusal("num_local_experts", json!(9));
    assert!(refusal.contains("mlp.experts.0") && refusal.contains("9 experts"), "{refusal}");
}
