//! Checkpoints that another program has quantized: their values are kept, or refused by name.

mod tiny;
mod tiny_checkpoint;

use std::path::Path;
use std::sync::Arc;

use half::f16;
use kernels::Isa;
use kernels::attention::{BLOCK_SIZE, BlockId};
use lorry::adapter::canonical::Adapter;
use lorry::config::ModelConfig;
use lorry::model::base_file::BaseFile;
use lorry::model::base_weights::GgufWeights;
use lorry::model::file::ModelFile;
use lorry::model::gguf::GgufFile;
use lorry::model::spec::Module;
use lorry::model::{AdapterGroup, BaseWeights, SequenceRows};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::tensor::Dtype;
use serde_json::{Value, json};
use tiny::{Loaded, Lora, Place, logits_alone, logits_of_rows, place, random_tokens};
use tiny_checkpoint::packing::{Form, GPTQ, pair, quantize};
use tiny_checkpoint::{Checkpoint, HEAD_DIM, HIDDEN, INTERMEDIATE, LAYERS, MATRICES, Tensor, matrix_shape, tensor};

/// The weights of all layers, `[out, in]` each, in Hugging Face's order.
fn weights(path: &Path) -> Vec<f32> {
    let base = GgufWeights::open(path).unwrap();
    let mut all = Vec::new();
    for layer in 0..LAYERS {
        for (module, name) in Module::PLAIN.into_iter().zip(MATRICES) {
            let [rows, columns] = matrix_shape(name);
            for row in 0..rows {
                let start = all.len();
                all.resize(start + columns, 0.0);
                base.dequantize_row(layer, module, row, &mut all[start..]).unwrap();
            }
        }
    }
    all
}

fn type_of(path: &Path, tensor: &str) -> String {
    format!("{:?}", GgufFile::open(path).unwrap().weight_type(tensor).unwrap())
}

/// Whatever the rest of the checkpoint becomes.
#[test]
fn integers_keep_every_value_in_the_smallest_type_that_has_them() {
    let gptq = |bits, group_size, is_symmetric, is_v2| Form::Gptq {
        bits,
        group_size,
        is_symmetric,
        is_v2,
        has_act_order: false,
    };
    for (form, dtype, name) in [
        (GPTQ, "Q4_0", "Q4_0"),
        (gptq(4, Some(64), true, true), "Q4_0", "Q4_0"),
        (gptq(4, None, false, false), "Q5_0", "Q5_0"),
        (gptq(4, Some(32), false, true), "Q5_0", "Q5_0"),
        (gptq(3, Some(32), false, false), "Q4_0", "Q4_0"),
        (gptq(2, Some(64), false, true), "Q4_0", "Q4_0"),
        (gptq(8, Some(32), true, false), "Q8_0", "Q8_0"),
        (Form::Awq { group_size: 32 }, "Q5_0", "Q5_0"),
        (Form::Awq { group_size: 64 }, "Q5_0", "Q5_0"),
        (Form::Mlx { bits: 4, group_size: 32 }, "Q4_1", "Q4_1"),
        (Form::Mlx { bits: 3, group_size: 32 }, "Q4_1", "Q4_1"),
        (Form::Mlx { bits: 2, group_size: 32 }, "Q4_1", "Q4_1"),
    ] {
        for model_type in ["llama", "qwen2"] {
            let (quantized, floats) = pair(model_type, form);
            let expected = weights(&floats.convert("none").unwrap());
            for quantization in ["q4k", "none"] {
                let path = quantized.convert(quantization).unwrap();
                assert_eq!(type_of(&path, "blk.1.ffn_up.weight"), format!("Blocks({dtype})"), "{form:?}");
                assert!(weights(&path) == expected, "{form:?} of {model_type} in {quantization}");
                let file = ModelFile::read(&path, &GgufFile::open(&path).unwrap()).unwrap();
                assert_eq!(file.quantization, name);
            }
        }
    }
}

#[test]
fn integers_that_no_type_has_become_q8_0_or_stay_floats() {
    let act_order = Form::Gptq { bits: 4, group_size: Some(32), is_symmetric: true, is_v2: false, has_act_order: true };
    for form in [act_order, Form::Mlx { bits: 6, group_size: 32 }, Form::Mlx { bits: 8, group_size: 32 }] {
        let (quantized, floats) = pair("llama", form);
        let expected = weights(&floats.convert("none").unwrap());
        assert!(weights(&quantized.convert("none").unwrap()) == expected, "{form:?}");
        let path = quantized.convert("q4k").unwrap();
        assert_eq!(type_of(&path, "blk.1.ffn_up.weight"), "Blocks(Q8_0)", "{form:?}");
        let found = weights(&path);
        assert!(found != expected);
        for (found, expected) in found.chunks(32).zip(expected.chunks(32)) {
            let most = expected.iter().fold(0.0_f32, |most, weight| most.max(weight.abs()));
            // Half a step, and the rounding of the scale to f16.
            let is_near = |(a, b): (&f32, &f32)| (a - b).abs() <= most * (0.5 / 127.0 + 1.0 / 2048.0);
            assert!(found.iter().zip(expected).all(is_near), "{form:?}");
        }
    }
}

const FORMS: [Form; 3] = [GPTQ, Form::Awq { group_size: 32 }, Form::Mlx { bits: 4, group_size: 32 }];

fn load(path: &Path) -> Box<dyn Loaded> {
    Place::Host(Isa::detect(), 2).load(path, usize::MAX).unwrap()
}

/// The largest difference, in standard deviations of what is expected.
fn difference(found: &[Vec<f32>], expected: &[Vec<f32>]) -> f32 {
    let values = expected.concat();
    let mean = values.iter().sum::<f32>() / values.len() as f32;
    let deviation = (values.iter().map(|value| (value - mean).powi(2)).sum::<f32>() / values.len() as f32).sqrt();
    let differences = found.concat().into_iter().zip(values).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, f32::max) / deviation
}

/// Packed matrices read activations rounded to eight bits, floats do not: the bound of a Q8_0 file.
#[test]
fn logits_are_those_of_the_same_weights_in_floats() {
    for (form, model_type) in FORMS.into_iter().zip(["llama", "qwen2", "llama"]) {
        let (quantized, floats) = pair(model_type, form);
        let (quantized, floats) = (quantized.convert("none").unwrap(), floats.convert("none").unwrap());
        let spec = GgufWeights::open(&floats).unwrap().spec().clone();
        let (tokens, adapter) = (random_tokens(&spec, 40, 1), Lora::random(&spec, 8, true, 2).adapter("a"));
        let (mut quantized, mut floats) = (load(&quantized), load(&floats));
        let mut seen = Vec::new();
        for adapter in [None, Some(&adapter)] {
            let expected = logits_alone(&mut *floats, &tokens, adapter);
            let difference = difference(&logits_alone(&mut *quantized, &tokens, adapter), &expected);
            assert!(difference < 0.03, "{form:?}, with adapter {}: {difference}", adapter.is_some());
            seen.push(expected);
        }
        assert!(self::difference(&seen[1], &seen[0]) > 0.3, "the adapter does nothing");
    }
}

#[test]
fn an_adapter_computes_the_same_bits_alone_and_beside_the_base() {
    for form in FORMS {
        let (quantized, _) = pair("qwen2", form);
        let path = quantized.convert("q4k").unwrap();
        let spec = GgufWeights::open(&path).unwrap().spec().clone();
        let mut decoder = load(&path);
        let adapter = Lora::random(&spec, 8, true, 2).adapter("a");
        let sequences = [(random_tokens(&spec, 19, 3), None), (random_tokens(&spec, 23, 4), Some(adapter))];
        let alone = sequences.iter().map(|(tokens, adapter)| logits_alone(&mut *decoder, tokens, adapter.as_ref()));
        let alone: Vec<Vec<f32>> = alone.flatten().collect();
        assert!(together(&mut *decoder, &sequences) == alone, "{form:?}");
    }
}

/// Logits `[row][vocab]` of all sequences in one batch.
fn together(decoder: &mut dyn Loaded, sequences: &[(Vec<u32>, Option<Arc<Adapter>>)]) -> Vec<Vec<f32>> {
    let (mut tokens, mut groups, mut rows_of, mut tables) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut num_blocks = 0;
    for (of_sequence, adapter) in sequences {
        let rows = tokens.len()..tokens.len() + of_sequence.len();
        tokens.extend_from_slice(of_sequence);
        groups.extend(adapter.iter().map(|adapter| AdapterGroup { rows: rows.clone(), adapter: adapter.clone() }));
        rows_of.push(rows);
        let blocks = of_sequence.len().div_ceil(BLOCK_SIZE) as u32;
        tables.push((num_blocks..num_blocks + blocks).map(BlockId).collect::<Vec<_>>());
        num_blocks += blocks;
    }
    decoder.reserve(num_blocks as usize);
    let _leases: Vec<_> = sequences.iter().flat_map(|(_, adapter)| adapter).map(|a| place(decoder, a)).collect();
    let of_rows = rows_of.into_iter().zip(&tables);
    let sequences: Vec<_> =
        of_rows.map(|(rows, block_table)| SequenceRows { rows, first_position: 0, block_table }).collect();
    logits_of_rows(decoder, &tokens, &sequences, &groups)
}

const UP: &str = "model.layers.1.mlp.up_proj";
const STATE: &str = "weight.quant_state.bitsandbytes__fp4";

/// [`UP`].
fn matrix(path: &Path) -> Vec<f32> {
    let (base, mut matrix) = (GgufWeights::open(path).unwrap(), vec![0.0; INTERMEDIATE * HIDDEN]);
    for (index, row) in matrix.chunks_mut(HIDDEN).enumerate() {
        base.dequantize_row(1, Module::UpProj, index, row).unwrap();
    }
    matrix
}

/// One row of [`UP`].
fn row(path: &Path) -> Vec<f32> {
    matrix(path)[5 * HIDDEN..6 * HIDDEN].to_vec()
}

/// MLX says it under two names; single modules have bits and groups of their own, or stay floats.
#[test]
fn modules_of_mlx_have_the_bits_that_are_said_of_them() {
    let mut checkpoint = Checkpoint::new("llama");
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let mixed = quantize(&mut checkpoint, UP, Form::Mlx { bits: 2, group_size: 64 }, &mut rng);
    quantize(&mut checkpoint, "model.layers.0.mlp.up_proj", Form::Mlx { bits: 4, group_size: 32 }, &mut rng);
    let config = json!({"bits": 4, "group_size": 32, UP: {"bits": 2, "group_size": 64}, "lm_head": false});
    checkpoint.config["quantization"] = config.clone();
    checkpoint.config["quantization_config"] = config;
    assert_eq!(row(&checkpoint.convert("q4k").unwrap()), mixed[5 * HIDDEN..6 * HIDDEN]);

    let mut checkpoint = Checkpoint::new("llama");
    checkpoint.config["quantization"] = json!({"bits": 4, "group_size": 32});
    checkpoint.config["quantization_config"] = json!({"bits": 2, "group_size": 32});
    assert!(checkpoint.refusal().contains("quantization"));
}

/// In blocks of 32 × 32 that each have a scale of their own, and its weights.
fn fp8() -> (Checkpoint, Vec<f32>) {
    let mut checkpoint = Checkpoint::new("llama");
    checkpoint.config["quantization_config"] = json!({"quant_method": "fp8", "weight_block_size": [32, 32]});
    let (values, scales) = ([(0x38, 1.0), (0x3c, 1.5), (0x40, 2.0), (0xb8, -1.0)], [0.25_f32, 0.5, 1.0, 2.0, 3.0, 4.0]);
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let elements: Vec<(u8, f32)> = (0..INTERMEDIATE * HIDDEN).map(|_| values[rng.random_range(0..4)]).collect();
    let bytes = elements.iter().map(|(byte, _)| *byte).collect();
    let weight = Tensor { dtype: Dtype::F8_E4M3, shape: vec![INTERMEDIATE, HIDDEN], bytes };
    let bytes = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
    let scale = Tensor { dtype: Dtype::F32, shape: vec![INTERMEDIATE / 32, HIDDEN / 32], bytes };
    checkpoint.tensors.insert(format!("{UP}.weight"), weight);
    checkpoint.tensors.insert(format!("{UP}.weight_scale_inv"), scale);
    let block = |at: usize| at / HIDDEN / 32 * (HIDDEN / 32) + at % HIDDEN / 32;
    let weights = elements.iter().enumerate().map(|(at, (_, value))| value * scales[block(at)]).collect();
    (checkpoint, weights)
}

/// As bitsandbytes writes it, and its weights: every value of `map`, and a scale for each 64, quantized itself or not.
fn bitsandbytes(kind: &str, map: [f32; 16], is_nested: bool) -> (Checkpoint, Vec<f32>) {
    let mut checkpoint = Checkpoint::new("llama");
    checkpoint.config["quantization_config"] = json!({"quant_method": "bitsandbytes", "load_in_4bit": true});
    let (count, mut rng) = (INTERMEDIATE * HIDDEN, ChaCha8Rng::seed_from_u64(7));
    let codes: Vec<u8> = (0..count).map(|_| rng.random_range(0..16)).collect();
    let scale_codes: Vec<u8> = (0..count / 64).map(|_| rng.random()).collect();
    let (nested_map, nested_scales, offset) = ((0..256).map(|at| at as f32 / 255.0), [0.5, 2.0, 1.0], 0.25);
    let nested_map: Vec<f32> = nested_map.collect();
    let scale = |(at, code): (usize, &u8)| nested_map[usize::from(*code)] * nested_scales[at / 32] + offset;
    let scales: Vec<f32> = scale_codes.iter().enumerate().map(scale).collect();

    let floats = |values: &[f32]| Tensor {
        dtype: Dtype::F32,
        shape: vec![values.len()],
        bytes: values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    };
    let bytes = |shape: Vec<usize>, bytes: Vec<u8>| Tensor { dtype: Dtype::U8, shape, bytes };
    let mut state = json!({"quant_type": kind, "blocksize": 64, "shape": [INTERMEDIATE, HIDDEN], "dtype": "bfloat16"});
    let packed = codes.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect();
    let mut parts =
        vec![("weight".to_owned(), bytes(vec![count / 2, 1], packed)), ("weight.quant_map".to_owned(), floats(&map))];
    if is_nested {
        for (field, value) in [("nested_blocksize", json!(32)), ("nested_offset", json!(offset))] {
            state[field] = value;
        }
        parts.extend([
            ("weight.absmax".to_owned(), bytes(vec![scale_codes.len()], scale_codes)),
            ("weight.nested_absmax".to_owned(), floats(&nested_scales)),
            ("weight.nested_quant_map".to_owned(), floats(&nested_map)),
        ]);
    } else {
        parts.push(("weight.absmax".to_owned(), floats(&scales)));
    }
    let state = state.to_string();
    parts.push((format!("weight.quant_state.bitsandbytes__{kind}"), bytes(vec![state.len()], state.into_bytes())));
    checkpoint.tensors.extend(parts.into_iter().map(|(part, tensor)| (format!("{UP}.{part}"), tensor)));
    let weights = codes.iter().enumerate().map(|(at, code)| map[usize::from(*code)] * scales[at / 64]);
    (checkpoint, weights.collect())
}

/// The sixteen values, lowest code first; of NF4 the true ones but for their digits.
const NF4: [f32; 16] =
    [-1.0, -0.696, -0.525, -0.395, -0.284, -0.185, -0.091, 0.0, 0.08, 0.161, 0.246, 0.338, 0.441, 0.563, 0.723, 1.0];
const FP4: [f32; 16] =
    [0.0, 0.0052, 0.667, 1.0, 0.333, 0.5, 0.167, 0.25, 0.0, -0.0052, -0.667, -1.0, -0.333, -0.5, -0.167, -0.25];

#[test]
fn fp8_and_bitsandbytes_are_dequantized() {
    let (checkpoint, expected) = fp8();
    assert!(matrix(&checkpoint.convert("none").unwrap()) == expected);
    for (kind, map, is_nested) in [("nf4", NF4, false), ("nf4", NF4, true), ("fp4", FP4, false), ("fp4", FP4, true)] {
        let (checkpoint, expected) = bitsandbytes(kind, map, is_nested);
        assert!(matrix(&checkpoint.convert("none").unwrap()) == expected, "{kind}, nested: {is_nested}");
    }
}

#[test]
fn a_bias_of_zeros_that_the_packing_added_is_left_out() {
    const ADDED: [&str; 2] = ["model.layers.0.self_attn.o_proj.bias", "model.layers.1.self_attn.o_proj.bias"];
    let (mut checkpoint, _) = pair("qwen2", GPTQ);
    let bias = |value: f32| Tensor {
        dtype: Dtype::F16,
        shape: vec![HIDDEN],
        bytes: (0..HIDDEN).flat_map(|_| f16::from_f32(value).to_le_bytes()).collect(),
    };
    checkpoint.tensors.extend(ADDED.map(|name| (name.to_owned(), bias(0.0))));
    checkpoint.tensors.insert("model.layers.1.self_attn.q_proj.bias".to_owned(), bias(0.25));
    let base = GgufWeights::open(&checkpoint.convert("q4k").unwrap()).unwrap();
    assert_eq!([0, 1].map(|layer| base.bias(layer, Module::OProj).unwrap()), [None, None]);
    assert_eq!(base.bias(1, Module::QProj).unwrap(), Some(vec![0.25; HIDDEN]));
    // That layer has none in transformers.
    checkpoint.tensors.insert(ADDED[1].to_owned(), bias(0.25));
    let refusal = checkpoint.convert("q4k").unwrap_err();
    assert!(refusal.contains(ADDED[1]), "{refusal}");
}

#[test]
fn experts_keep_every_value_in_one_tensor() {
    let (mut checkpoint, mut rng) = (Checkpoint::new("qwen3_moe"), ChaCha8Rng::seed_from_u64(3));
    let (num_experts, form) = (3, FORMS[1]);
    let fields = json!({
        "num_experts": num_experts, "num_experts_per_tok": 2, "moe_intermediate_size": INTERMEDIATE,
        "norm_topk_prob": true, "decoder_sparse_step": 1, "quantization_config": form.config()
    });
    checkpoint.config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    let mut expected = Vec::new();
    for layer in 0..LAYERS {
        let of_layer = format!("model.layers.{layer}");
        for norm in ["q_norm", "k_norm"] {
            let name = format!("{of_layer}.self_attn.{norm}.weight");
            checkpoint.tensors.insert(name.clone(), tensor(&name, &[HEAD_DIM]));
        }
        let router = format!("{of_layer}.mlp.gate.weight");
        checkpoint.tensors.insert(router.clone(), tensor(&router, &[num_experts, HIDDEN]));
        for part in ["gate_proj", "up_proj", "down_proj"] {
            checkpoint.tensors.remove(&format!("{of_layer}.mlp.{part}.weight"));
            for expert in 0..num_experts {
                let module = format!("{of_layer}.mlp.experts.{expert}.{part}");
                let shape = matrix_shape(&format!("mlp.{part}"));
                checkpoint.tensors.insert(format!("{module}.weight"), tensor("", &shape));
                let values = quantize(&mut checkpoint, &module, form, &mut rng);
                let zeros = Tensor { dtype: Dtype::F16, shape: vec![shape[0]], bytes: vec![0; 2 * shape[0]] };
                checkpoint.tensors.insert(format!("{module}.bias"), zeros);
                if layer == 1 && part == "up_proj" {
                    expected.extend(values);
                }
            }
        }
    }
    let file = GgufFile::open(&checkpoint.convert("q4k").unwrap()).unwrap();
    let stack = file.tensor("blk.1.ffn_up_exps.weight").unwrap();
    let mut found = vec![0.0; expected.len()];
    stack.weight_type.dequantize_row(stack.bytes, &mut found);
    assert_eq!(format!("{:?}", stack.weight_type), "Blocks(Q5_0)");
    assert!(found == expected);
}

#[test]
fn what_a_configuration_says_of_another_packing_is_refused_by_name() {
    let changes: &[(Form, &str, Value)] = &[
        (GPTQ, "bits", json!(5)),
        (GPTQ, "bits", json!("4")),
        (GPTQ, "bits", Value::Null),
        (GPTQ, "group_size", json!(0)),
        (GPTQ, "group_size", json!(-2)),
        (GPTQ, "checkpoint_format", json!("marlin")),
        (GPTQ, "is_marlin_format", json!(true)),
        (GPTQ, "pack_dtype", json!("int8")),
        (GPTQ, "rotation", json!("hadamard")),
        (GPTQ, "quant_method", json!("compressed-tensors")),
        (GPTQ, "quant_method", json!("exl2")),
        (GPTQ, "quant_method", json!("hqq")),
        (GPTQ, "quant_method", json!("mxfp4")),
        (GPTQ, "quant_method", json!(3)),
        (FORMS[1], "bits", json!(8)),
        (FORMS[1], "version", json!("gemv")),
        (FORMS[1], "zero_point", json!(false)),
        (FORMS[1], "backend", json!("llm-awq")),
        (FORMS[2], "mode", json!("mxfp4")),
        (FORMS[2], "bits", json!(5)),
        (FORMS[2], "group_size", json!(16)),
        (FORMS[2], UP, json!({"bits": 4, "group_size": 64, "mode": "nvfp4"})),
        (FORMS[2], UP, json!("float16")),
    ];
    for (form, field, value) in changes {
        let (mut checkpoint, _) = pair("llama", *form);
        checkpoint.config["quantization_config"][*field] = value.clone();
        let refusal = checkpoint.refusal();
        let is_named = refusal.contains("config.json") && refusal.contains(field);
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        assert!(is_named, "{field} = {value}: {refusal}");
    }
    let (mut checkpoint, _) = fp8();
    for sizes in [json!([128]), json!([0, 128]), json!("128")] {
        checkpoint.config["quantization_config"]["weight_block_size"] = sizes;
        assert!(checkpoint.refusal().contains("weight_block_size"));
    }
}

/// None is taken for something else, whatever the configuration says.
#[test]
fn tensors_that_are_not_what_the_configuration_says_are_refused_by_name() {
    type Change = fn(&mut Checkpoint);
    fn of(form: Form) -> Checkpoint {
        pair("llama", form).0
    }
    fn part(checkpoint: &mut Checkpoint, part: &str) -> Tensor {
        checkpoint.tensors.remove(&format!("{UP}.{part}")).unwrap()
    }
    let changes: [(Checkpoint, &str, Change); 20] = [
        (of(GPTQ), ".scales", |c| drop(part(c, "scales"))),
        (of(GPTQ), ".qzeros", |c| drop(part(c, "qzeros"))),
        (of(GPTQ), "quantization_config", |c| c.config["quantization_config"] = Value::Null),
        (of(GPTQ), ".q", |c| c.config["quantization_config"]["bits"] = json!(8)),
        (of(GPTQ), ".q", |c| c.config["quantization_config"]["group_size"] = json!(64)),
        (of(GPTQ), ".g_idx", |c| c.config["quantization_config"] = FORMS[1].config()),
        (of(FORMS[1]), ".qweight", |c| c.config["quantization_config"] = GPTQ.config()),
        (of(GPTQ), ".g_idx", |c| {
            let groups = part(c, "g_idx");
            let bytes = (0..HIDDEN).flat_map(|_| 7_u32.to_le_bytes()).collect();
            c.tensors.insert(format!("{UP}.g_idx"), Tensor { bytes, ..groups });
        }),
        (of(GPTQ), "g_idx", |c| {
            c.config["quantization_config"]["desc_act"] = json!(true);
            part(c, "g_idx");
        }),
        (of(GPTQ), UP, |c| {
            let whole = Checkpoint::new("llama").tensors.remove(&format!("{UP}.weight")).unwrap();
            c.tensors.insert(format!("{UP}.weight"), whole);
        }),
        (of(FORMS[2]), ".weight", |c| c.config["quantization_config"]["bits"] = json!(8)),
        (of(FORMS[2]), ".scales", |c| c.config["quantization_config"][UP] = json!({"bits": 4, "group_size": 64})),
        // 96 inputs.
        (of(FORMS[2]), "no groups of 64", |c| {
            c.config["quantization_config"]["model.layers.0.mlp.down_proj"] = json!({"bits": 4, "group_size": 64});
        }),
        (of(FORMS[2]), UP, |c| drop(part(c, "biases"))),
        // The weights themselves, without their scale.
        (fp8().0, ".weight_scale", |c| {
            let scale = part(c, "weight_scale_inv");
            c.tensors.insert(format!("{UP}.weight_scale"), scale);
        }),
        (fp8().0, ".weight_scale_inv", |c| {
            let whole = Checkpoint::new("llama").tensors.remove(&format!("{UP}.weight")).unwrap();
            c.tensors.insert(format!("{UP}.weight"), whole);
        }),
        (bitsandbytes("nf4", NF4, false).0, "weight.absmax", |c| {
            let absmax = part(c, "weight.absmax");
            let (shape, bytes) = (vec![1], absmax.bytes[..4].to_vec());
            c.tensors.insert(format!("{UP}.weight.absmax"), Tensor { shape, bytes, ..absmax });
        }),
        (bitsandbytes("nf4", NF4, true).0, "weight.nested_absmax", |c| drop(part(c, "weight.nested_absmax"))),
        (bitsandbytes("fp4", FP4, false).0, "quant_state", |c| drop(part(c, STATE))),
        (bitsandbytes("fp4", FP4, false).0, STATE, |c| {
            let state = json!({"blocksize": 64, "shape": [HIDDEN, INTERMEDIATE]}).to_string();
            let state = Tensor { dtype: Dtype::U8, shape: vec![state.len()], bytes: state.into_bytes() };
            c.tensors.insert(format!("{UP}.{STATE}"), state);
        }),
    ];
    for (i, (mut checkpoint, named, change)) in changes.into_iter().enumerate() {
        change(&mut checkpoint);
        let refusal = checkpoint.refusal();
        assert!(refusal.contains(named), "{i}, {named}: {refusal}");
    }
    let (mut checkpoint, _) = fp8();
    part(&mut checkpoint, "weight_scale_inv");
    assert!(checkpoint.refusal().contains("weight_scale_inv"));
}

#[test]
fn uqff_and_single_files_are_refused_by_name() {
    let checkpoint = Checkpoint::new("llama");
    checkpoint.write("residual.safetensors", "");
    checkpoint.write("q4k-0.uqff", "");
    checkpoint.write("config.json", checkpoint.config.to_string());
    for (path, named) in [("", "UQFF"), ("q4k-0.uqff", "UQFF"), ("residual.safetensors", "name its folder")] {
        let path = checkpoint.path().join(path).display().to_string();
        let model = ModelConfig { id: path.trim_end_matches('/').to_owned(), quantize: "q4k".parse().unwrap() };
        let refusal = BaseFile::of(&model, checkpoint.home.path()).unwrap_err().to_string();
        assert!(refusal.contains(named), "{path}: {refusal}");
    }
}
