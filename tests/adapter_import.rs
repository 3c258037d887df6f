//! Adapters in llama.cpp's form, as its `convert_lora_to_gguf.py` writes them, become those that PEFT had.

mod tiny;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use lorry::adapter::import;
use lorry::model::base_weights::GgufWeights;
use lorry::model::spec::{Architecture, Module};
use safetensors::SafeTensors;
use tiny::TinyModel;
use tiny::peft::{Kind, PREFIX, PeftAdapter};

struct Case {
    model: TinyModel,
    base: GgufWeights,
    peft: PeftAdapter,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, Tensor>,
    dir: tempfile::TempDir,
}

impl Case {
    fn new(architecture: Architecture) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let model = TinyModel::new(architecture, GgmlDType::F16, 1);
        let path = dir.path().join("base.gguf");
        model.write(&path);
        let peft = PeftAdapter::random(Kind::LoraEverywhere, &model.spec, 2);
        let text = |text: &str| Value::String(text.to_owned());
        let architecture = model.metadata["general.architecture"].clone();
        let metadata = [
            ("general.type", text("adapter")),
            ("adapter.type", text("lora")),
            ("general.architecture", architecture),
            ("adapter.lora.alpha", Value::F32(6.0)),
        ];
        let metadata = metadata.map(|(key, value)| (key.to_owned(), value)).into();
        let base = GgufWeights::open(&path).unwrap();
        let mut case = Self { base, peft, metadata, tensors: BTreeMap::new(), model, dir };
        case.tensors = case.converted();
        case
    }

    /// The tensors under the names, and in the order of rows, that the base's file has.
    fn converted(&self) -> BTreeMap<String, Tensor> {
        let spec = &self.model.spec;
        let tensor = |key: &str| {
            let (shape, values) = &self.peft.tensors[&format!("{PREFIX}{key}")];
            Tensor::from_slice(values, shape.as_slice(), &Device::Cpu).unwrap()
        };
        let mut tensors = BTreeMap::new();
        let mut add =
            |name: &str, part: &str, tensor: Tensor| tensors.insert(format!("{name}.weight.lora_{part}"), tensor);
        for layer in 0..spec.num_layers {
            for module in Module::PLAIN {
                let path = format!("model.layers.{layer}.{}.{}", module.parent(), module.name());
                let name = tiny::weight_name(layer, module);
                let name = name.trim_end_matches(".weight");
                let heads = match module {
                    Module::QProj => Some(spec.num_heads),
                    Module::KProj => Some(spec.num_kv_heads),
                    _ => None,
                };
                let mut b = tensor(&format!("{path}.lora_B.weight"));
                if let (Some(heads), Architecture::Llama) = (heads, spec.architecture) {
                    let (rows, rank) = b.dims2().unwrap();
                    let halves = b.reshape((heads, 2, rows / heads / 2, rank)).unwrap();
                    b = halves.transpose(1, 2).unwrap().reshape((rows, rank)).unwrap();
                }
                add(name, "a", tensor(&format!("{path}.lora_A.weight")));
                add(name, "b", b);
            }
        }
        add("output", "a", tensor("lm_head.lora_A.weight"));
        add("output", "b", tensor("lm_head.lora_B.weight"));
        add("token_embd", "a", tensor("model.embed_tokens.lora_embedding_A").t().unwrap().contiguous().unwrap());
        add("token_embd", "b", tensor("model.embed_tokens.lora_embedding_B"));
        tensors
    }

    fn file(&self) -> std::path::PathBuf {
        let path = self.dir.path().join("sql.gguf");
        let tensors: Vec<(&str, QTensor)> = self
            .tensors
            .iter()
            .map(|(name, tensor)| (name.as_str(), QTensor::quantize(tensor, GgmlDType::F32).unwrap()))
            .collect();
        let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
        let metadata: Vec<_> = self.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
        gguf_file::write(&mut File::create(&path).unwrap(), &metadata, &tensors).unwrap();
        path
    }

    fn install(&self, name: &str) -> Result<(), String> {
        let root = self.dir.path().join("adapters");
        std::fs::create_dir_all(&root).unwrap();
        import::install(&self.file(), name, &root, &self.base).map(drop).map_err(|e| e.to_string())
    }

    fn installed(&self, name: &str) -> (serde_json::Value, BTreeMap<String, Vec<f32>>) {
        let folder = self.dir.path().join("adapters").join(name);
        let config = serde_json::from_slice(&read(&folder.join("adapter_config.json"))).unwrap();
        let bytes = read(&folder.join("adapter_model.safetensors"));
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let values = |bytes: &[u8]| bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        (config, tensors.iter().map(|(key, view)| (key.to_owned(), values(view.data()))).collect())
    }
}

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

#[test]
fn an_imported_adapter_has_the_tensors_and_the_scale_that_peft_had() {
    for architecture in [Architecture::Llama, Architecture::Qwen2] {
        let case = Case::new(architecture);
        case.install("sql").unwrap();
        let (config, tensors) = case.installed("sql");
        let expected: BTreeMap<_, _> =
            case.peft.tensors.iter().map(|(key, (_, values))| (key.clone(), values.clone())).collect();
        assert_eq!(tensors, expected, "{architecture:?}");
        // Rank 3 and alpha 6, as the adapter was made.
        assert_eq!((&config["r"], &config["lora_alpha"]), (&3.into(), &6.0.into()));
        assert!(case.install("sql").unwrap_err().contains("already"));
    }
}

#[test]
fn an_alpha_of_zero_leaves_the_product_as_it_is_whatever_the_ranks() {
    let mut case = Case::new(Architecture::Llama);
    case.metadata.insert("adapter.lora.alpha".into(), Value::F32(0.0));
    case.tensors.retain(|name, _| name.starts_with("blk.0.attn_v") || name.starts_with("blk.1.ffn_up"));
    for part in ["a", "b"] {
        let wide = case.tensors[&format!("blk.1.ffn_up.weight.lora_{part}")].clone();
        let twice = Tensor::cat(&[&wide, &wide], usize::from(part == "b")).unwrap();
        case.tensors.insert(format!("blk.1.ffn_up.weight.lora_{part}"), twice);
    }
    case.install("sql").unwrap();
    let (config, _) = case.installed("sql");
    for (pattern, alpha) in config["alpha_pattern"].as_object().unwrap() {
        assert_eq!(config["rank_pattern"][pattern], *alpha, "{pattern}");
    }
    assert_eq!(config["rank_pattern"].as_object().unwrap().len(), 2);
}

#[test]
fn a_file_that_is_no_adapter_of_this_base_is_refused_with_its_cause_and_leaves_nothing() {
    type Change = fn(&mut Case);
    let cases: [(&str, &str, Change); 9] = [
        ("sql", "general.type", |case| {
            drop(case.metadata.insert("general.type".into(), Value::String("model".into())))
        }),
        ("sql", "general.architecture", |case| {
            drop(case.metadata.insert("general.architecture".into(), Value::String("gemma2".into())));
        }),
        ("sql", "adapter.lora.alpha", |case| drop(case.metadata.remove("adapter.lora.alpha"))),
        ("sql", "invocation_tokens", |case| {
            let tokens = Value::Array(vec![Value::U32(3)]);
            case.metadata.insert("adapter.alora.invocation_tokens".into(), tokens);
        }),
        ("sql", "blk.1.attn_q.weight.lora_b", |case| drop(case.tensors.remove("blk.1.attn_q.weight.lora_b"))),
        ("sql", "blk.0.attn_norm.weight", |case| {
            let norm = Tensor::ones(256, candle_core::DType::F32, &Device::Cpu).unwrap();
            case.tensors.insert("blk.0.attn_norm.weight".into(), norm);
        }),
        ("sql", "blk.0.ffn_down.weight.lora_a", |case| {
            let narrow = Tensor::ones((3, 64), candle_core::DType::F32, &Device::Cpu).unwrap();
            case.tensors.insert("blk.0.ffn_down.weight.lora_a".into(), narrow);
        }),
        ("sql", "no pair", |case| case.tensors.clear()),
        ("no name", "name", |_| ()),
    ];
    for (name, cause, change) in cases {
        let mut case = Case::new(Architecture::Llama);
        change(&mut case);
        let refusal = case.install(name).expect_err(cause);
        assert!(refusal.contains(cause), "{cause}: {refusal}");
        assert!(!case.dir.path().join("adapters").join(name).exists(), "{cause}");
    }
}
