//! A checkpoint of two small layers that a test changes before it is converted.

// Every test file compiles this one for itself and uses its own share.
#![allow(dead_code)]

pub mod packing;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use half::bf16;
use lorry::model::checkpoint::{Quantization, quantized};
use lorry::model::gguf::GgufFile;
use lorry::tokenizer::Tokenizer;
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::{Value, json};

pub const HIDDEN: usize = 64;
pub const INTERMEDIATE: usize = 96;
pub const LAYERS: usize = 2;
pub const KV: usize = 32;
pub const HEAD_DIM: usize = 16;
pub const VOCAB: usize = 300;

#[derive(Clone)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// A folder that a test changes before it is converted.
pub struct Checkpoint {
    pub folder: tempfile::TempDir,
    pub home: tempfile::TempDir,
    pub config: Value,
    pub tensors: BTreeMap<String, Tensor>,
}

/// Every element of every tensor is another number, exact in bf16.
pub fn element(name: &str, at: usize) -> f32 {
    let seed = name.bytes().fold(at as u32 + 1, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    bf16::from_f32(((seed >> 9) & 0xff) as f32 / 256.0 - 0.5).to_f32()
}

pub fn tensor(name: &str, shape: &[usize]) -> Tensor {
    let bytes = (0..shape.iter().product()).flat_map(|at| bf16::from_f32(element(name, at)).to_le_bytes()).collect();
    Tensor { dtype: Dtype::BF16, shape: shape.to_vec(), bytes }
}

pub fn matrix_shape(module: &str) -> [usize; 2] {
    match module {
        "self_attn.k_proj" | "self_attn.v_proj" => [KV, HIDDEN],
        "mlp.gate_proj" | "mlp.up_proj" => [INTERMEDIATE, HIDDEN],
        "mlp.down_proj" => [HIDDEN, INTERMEDIATE],
        _ => [HIDDEN, HIDDEN],
    }
}

pub const MATRICES: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

/// A byte-level tokenizer of a family that no GGUF name stands for.
pub fn tokenizer_json() -> Value {
    let mut bytes: Vec<u32> = (0x21..=0x7e).chain(0xa1..=0xac).chain(0xae..=0xff).collect();
    bytes.extend(0x100..0x100 + 256 - bytes.len() as u32);
    let mut vocab: BTreeMap<String, usize> =
        bytes.into_iter().filter_map(char::from_u32).map(String::from).zip(0..).collect();
    vocab.extend([("th".to_owned(), 256), ("the".to_owned(), 257), ("12".to_owned(), 258)]);
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [
            {"id": 259, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
             "special": true},
            {"id": 260, "content": "<think>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
             "special": false}
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\p{N}{1,2}"}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}
        ]},
        "post_processor": null, "decoder": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "", "end_of_word_suffix": "",
                  "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocab,
                  "merges": [["t", "h"], ["th", "e"], ["1", "2"]]}
    })
}

/// A SentencePiece tokenizer as Llama's, Gemma's and Phi-3's files have it, without a step for spaces.
pub fn pieces_json() -> Value {
    let specials = ["<unk>", "<s>", "</s>"].map(str::to_owned).into_iter();
    let bytes = (0..256).map(|byte| format!("<0x{byte:02X}>"));
    // Every one is a character or made of two before it, by a merge.
    let pieces = ["▁", "a", "x", "▁a", "▁▁", "▁▁▁▁", "ax", "▁ax", "x▁", "x▁a"];
    let merges = ["▁ ▁", "▁▁ ▁▁", "a x", "▁ ax", "▁ a", "x ▁", "x ▁a"];
    let vocab: BTreeMap<String, usize> = specials.chain(bytes).chain(pieces.map(str::to_owned)).zip(0..).collect();
    let added = |id: usize, content: &str, special: bool| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": special})
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [added(0, "<unk>", true), added(1, "<s>", true), added(2, "</s>", true),
                         added(269, "<|user|>", true), added(270, "<|end|>", true), added(271, "<mark>", false)],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab, "merges": merges}
    })
}

impl Checkpoint {
    pub fn new(model_type: &str) -> Self {
        let mut tensors = BTreeMap::new();
        let mut add = |name: String, shape: &[usize]| {
            let tensor = tensor(&name, shape);
            tensors.insert(name, tensor);
        };
        add("model.embed_tokens.weight".to_owned(), &[VOCAB, HIDDEN]);
        add("model.norm.weight".to_owned(), &[HIDDEN]);
        for layer in 0..LAYERS {
            for module in MATRICES {
                add(format!("model.layers.{layer}.{module}.weight"), &matrix_shape(module));
            }
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                add(format!("model.layers.{layer}.{norm}.weight"), &[HIDDEN]);
            }
            if model_type == "qwen2" {
                for module in ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"] {
                    add(format!("model.layers.{layer}.{module}.bias"), &matrix_shape(module)[..1]);
                }
            }
        }
        let config = json!({
            "architectures": ["AnyForCausalLM"], "model_type": model_type, "hidden_act": "silu", "hidden_size": HIDDEN,
            "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 50000.0,
            "vocab_size": VOCAB, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "eos_token_id": 259
        });
        let (folder, home) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(folder.path().join("tokenizer.json"), tokenizer_json().to_string()).unwrap();
        Self { folder, home, config, tensors }
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    pub fn write(&self, file: &str, text: impl AsRef<[u8]>) {
        fs::write(self.path().join(file), text).unwrap();
    }

    /// What this tokenizer becomes, and the same as the library reads it.
    pub fn tokenizers(&self, tokenizer: &Value) -> (Arc<Tokenizer>, tokenizers::Tokenizer) {
        self.write("tokenizer.json", tokenizer.to_string());
        let gguf = GgufFile::open(&self.convert("q8_0").unwrap()).unwrap();
        let theirs = tokenizers::Tokenizer::from_file(self.path().join("tokenizer.json")).unwrap();
        (Arc::new(Tokenizer::from_gguf(&gguf).unwrap()), theirs)
    }

    pub fn write_shard(&self, file: &str, wanted: impl Fn(&str) -> bool) {
        let views = self.tensors.iter().filter(|(name, _)| wanted(name));
        let views = views.map(|(name, t)| (name, TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap()));
        self.write(file, serialize(views, None).unwrap());
    }

    pub fn convert(&self, quantization: &str) -> Result<std::path::PathBuf, String> {
        self.write("config.json", self.config.to_string());
        if !self.path().join("model.safetensors.index.json").exists() {
            self.write_shard("model.safetensors", |_| true);
        }
        let quantization: Quantization = quantization.parse().unwrap();
        quantized(self.path(), quantization, self.home.path()).map_err(|e| e.to_string())
    }

    /// The message of a conversion that must fail and leave no file.
    pub fn refusal(&self) -> String {
        let refusal = self.convert("q8_0").expect_err("it was converted");
        let left: Vec<_> = fs::read_dir(self.home.path().join("models/quantized")).unwrap().collect();
        assert!(left.iter().all(|entry| entry.as_ref().unwrap().path().extension().unwrap() == "lock"), "{left:?}");
        refusal
    }
}
