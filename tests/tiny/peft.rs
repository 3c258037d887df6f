//! Random adapters of every PEFT method, as the files that PEFT writes.

use std::collections::BTreeMap;
use std::sync::Arc;

use lorry::adapter::canonical::Adapter;
use lorry::adapter::files::AdapterFiles;
use lorry::adapter::loader;
use lorry::model::spec::{ModelSpec, Module};
use lorry::model::{BaseWeights, FIRST_VIRTUAL_TOKEN};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::{Value, json};

use super::random;

pub const PREFIX: &str = "base_model.model.";
const NUM_VIRTUAL_TOKENS: usize = 5;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Every linear layer, the embedding and the head.
    LoraEverywhere,
    /// rsLoRA with trained biases.
    RsLoraBias,
    /// LoRA beside a head of its own.
    LoraSavedHead,
    Dora,
    /// AdaLoRA of which training has left less of one site, and nothing of another.
    AdaLora,
    Vera,
    Miss,
    Ia3,
    /// (IA)³ that scales the inputs of gate and up too, each in its own way.
    Ia3Wide,
    PromptTuning,
    PTuning,
    PrefixTuning,
}

impl Kind {
    pub const ALL: [Self; 12] = [
        Self::LoraEverywhere,
        Self::RsLoraBias,
        Self::LoraSavedHead,
        Self::Dora,
        Self::AdaLora,
        Self::Vera,
        Self::Miss,
        Self::Ia3,
        Self::Ia3Wide,
        Self::PromptTuning,
        Self::PTuning,
        Self::PrefixTuning,
    ];
}

/// What the two files of an adapter hold; tests may change it.
#[derive(Debug, Clone)]
pub struct PeftAdapter {
    pub config: Value,
    /// Shape and elements, which f16 represents.
    pub tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl PeftAdapter {
    pub fn random(kind: Kind, spec: &ModelSpec, seed: u64) -> Self {
        use Module::{DownProj, GateProj, KProj, OProj, QProj, UpProj, VProj};
        let mut draft = Draft { spec, rng: ChaCha8Rng::seed_from_u64(seed), tensors: BTreeMap::new() };
        let (hidden, vocab) = (spec.hidden_size, spec.vocab_size);
        let lora = |rank: usize, targets: &[&str], more: Value| {
            let mut config = json!({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank});
            config["target_modules"] = json!(targets);
            for (name, value) in more.as_object().unwrap() {
                config[name] = value.clone();
            }
            config
        };
        let names = |modules: &[Module]| modules.iter().map(|module| module.name()).collect::<Vec<_>>();
        let prompt = |name: &str| json!({"peft_type": name, "num_virtual_tokens": NUM_VIRTUAL_TOKENS});
        let config = match kind {
            Kind::LoraEverywhere => {
                draft.pairs(&Module::PLAIN, 3);
                draft.add("model.embed_tokens.lora_embedding_A", &[3, vocab], 0.0, 0.5);
                draft.add("model.embed_tokens.lora_embedding_B", &[hidden, 3], 0.0, 0.5);
                draft.add("lm_head.lora_A.weight", &[3, hidden], 0.0, (hidden as f32).powf(-0.5));
                draft.add("lm_head.lora_B.weight", &[vocab, 3], 0.0, 0.5);
                lora(3, &[names(&Module::PLAIN), vec!["embed_tokens", "lm_head"]].concat(), json!({}))
            }
            Kind::RsLoraBias => {
                draft.pairs(&[QProj, OProj], 9);
                draft.each(&[QProj, OProj], "lora_B.bias", |_, outputs| (vec![outputs], 0.0, 0.1));
                lora(9, &names(&[QProj, OProj]), json!({"use_rslora": true, "lora_alpha": 6, "lora_bias": true}))
            }
            Kind::LoraSavedHead => {
                draft.pairs(&[KProj], 2);
                draft.add("lm_head.weight", &[vocab, hidden], 0.0, 0.1);
                lora(2, &names(&[KProj]), json!({"modules_to_save": ["lm_head"]}))
            }
            Kind::Dora => {
                draft.pairs(&[QProj, VProj, DownProj], 4);
                let magnitude = |_, outputs| (vec![outputs], 1.2, 0.2);
                draft.each(&[QProj, VProj, DownProj], "lora_magnitude_vector", magnitude);
                lora(4, &names(&[QProj, VProj, DownProj]), json!({"use_dora": true}))
            }
            Kind::AdaLora => {
                for name in ["lora_A", "lora_B", "lora_E"] {
                    draft.of_rank(&[QProj, VProj], name, 4);
                }
                let config = json!({"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "lora_alpha": 8, "total_step": 9,
                    "target_modules": names(&[QProj, VProj])});
                let shrunk = [(0, QProj, [true, false, true, true]), (1, VProj, [false; 4])];
                shrunk.into_iter().fold(config, |mut config, (layer, module, mask)| {
                    let rank = mask.into_iter().filter(|is_kept| *is_kept).count();
                    for name in ["lora_A", "lora_B", "lora_E"] {
                        draft.of_rank_at(layer, module, name, rank);
                    }
                    let path = format!("model.layers.{layer}.{}.{}.lora_E", module.parent(), module.name());
                    config["rank_pattern"][path] = json!(mask);
                    config
                })
            }
            Kind::Vera => {
                let targets = [QProj, VProj, DownProj];
                let shapes = targets.map(|module| spec.module_shape(module));
                let most = |of: fn(&(usize, usize)) -> usize| shapes.iter().map(of).max().unwrap_or_default();
                let (inputs, outputs) = (most(|shape| shape.0), most(|shape| shape.1));
                draft.add_key("base_model.vera_A", &[12, inputs], 0.0, (inputs as f32).powf(-0.5));
                draft.add_key("base_model.vera_B", &[outputs, 12], 0.0, 0.3);
                draft.each(&targets, "vera_lambda_d", |_, _| (vec![12], 0.5, 0.5));
                draft.each(&targets, "vera_lambda_b", |_, outputs| (vec![outputs], 0.0, 0.5));
                json!({"peft_type": "VERA", "r": 12, "save_projection": true, "target_modules": names(&targets)})
            }
            Kind::Miss => {
                draft.each(&[QProj, UpProj], "miss_block", |_, outputs| (vec![6, outputs], 0.0, 0.05));
                json!({"peft_type": "MISS", "r": 6, "target_modules": names(&[QProj, UpProj])})
            }
            Kind::Ia3 => {
                draft.each(&[KProj, VProj], "ia3_l", |_, outputs| (vec![outputs, 1], 1.0, 0.2));
                draft.each(&[DownProj], "ia3_l", |inputs, _| (vec![1, inputs], 1.0, 0.2));
                json!({"peft_type": "IA3", "target_modules": names(&[KProj, VProj, DownProj]),
                    "feedforward_modules": ["down_proj"]})
            }
            Kind::Ia3Wide => {
                let feedforward = [GateProj, UpProj, DownProj];
                draft.each(&[QProj, KProj, VProj], "ia3_l", |_, outputs| (vec![outputs, 1], 1.0, 0.2));
                draft.each(&feedforward, "ia3_l", |inputs, _| (vec![1, inputs], 1.0, 0.2));
                json!({"peft_type": "IA3", "target_modules": r".*\.(q|k|v|gate|up|down)_proj",
                    "feedforward_modules": names(&feedforward)})
            }
            Kind::PromptTuning | Kind::PTuning => {
                draft.add_key("prompt_embeddings", &[NUM_VIRTUAL_TOKENS, hidden], 0.0, 1.0);
                prompt(if kind == Kind::PTuning { "P_TUNING" } else { "PROMPT_TUNING" })
            }
            Kind::PrefixTuning => {
                let width = spec.num_kv_heads * spec.head_dim;
                draft.add_key("prompt_embeddings", &[NUM_VIRTUAL_TOKENS, 2 * spec.num_layers * width], 0.0, 1.0);
                prompt("PREFIX_TUNING")
            }
        };
        Self { config, tensors: draft.tensors }
    }

    pub fn files(&self) -> AdapterFiles {
        let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let tensors: BTreeMap<_, _> =
            self.tensors.iter().map(|(key, (shape, values))| (key, (shape.clone(), bytes(values)))).collect();
        let views = tensors
            .iter()
            .map(|(key, (shape, bytes))| (key, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
        let weights = serialize(views, None).unwrap();
        AdapterFiles { config: self.config.to_string().into_bytes(), manifest: None, weights }
    }

    /// Through the loader, as any adapter.
    pub fn load(&self, name: &str, base: &dyn BaseWeights) -> Arc<Adapter> {
        Arc::new(loader::load(name, &self.files(), base).unwrap())
    }
}

struct Draft<'a> {
    spec: &'a ModelSpec,
    rng: ChaCha8Rng,
    tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl Draft<'_> {
    fn add_key(&mut self, key: &str, shape: &[usize], mean: f32, deviation: f32) {
        let values = random(&mut self.rng, shape.iter().product(), mean, deviation);
        self.tensors.insert(key.to_owned(), (shape.to_vec(), values));
    }

    fn add(&mut self, path: &str, shape: &[usize], mean: f32, deviation: f32) {
        self.add_key(&format!("{PREFIX}{path}"), shape, mean, deviation);
    }

    /// One tensor of AdaLoRA for each of these modules.
    fn of_rank(&mut self, modules: &[Module], name: &str, rank: usize) {
        for layer in 0..self.spec.num_layers {
            for module in modules {
                self.of_rank_at(layer, *module, name, rank);
            }
        }
    }

    fn of_rank_at(&mut self, layer: usize, module: Module, name: &str, rank: usize) {
        let (inputs, outputs) = self.spec.module_shape(module);
        let (shape, mean, deviation) = match name {
            "lora_A" => ([rank, inputs], 0.0, (inputs as f32).powf(-0.5)),
            "lora_B" => ([outputs, rank], 0.0, 0.3),
            _ => ([rank, 1], 0.5, 0.5),
        };
        self.add(
            &format!("model.layers.{layer}.{}.{}.{name}", module.parent(), module.name()),
            &shape,
            mean,
            deviation,
        );
    }

    /// One tensor for each of these modules, `of(in, out)` saying its shape, mean and deviation.
    fn each(&mut self, modules: &[Module], name: &str, of: impl Fn(usize, usize) -> (Vec<usize>, f32, f32)) {
        for layer in 0..self.spec.num_layers {
            for module in modules {
                let (inputs, outputs) = self.spec.module_shape(*module);
                let (shape, mean, deviation) = of(inputs, outputs);
                let path = format!("model.layers.{layer}.{}.{}.{name}", module.parent(), module.name());
                self.add(&path, &shape, mean, deviation);
            }
        }
    }

    fn pairs(&mut self, modules: &[Module], rank: usize) {
        self.each(modules, "lora_A.weight", |inputs, _| (vec![rank, inputs], 0.0, (inputs as f32).powf(-0.5)));
        self.each(modules, "lora_B.weight", |_, outputs| (vec![outputs, rank], 0.0, 0.15));
    }
}

/// The tokens of a sequence that runs with an adapter: its virtual ones first.
pub fn with_virtual_tokens(tokens: Vec<u32>, adapter: Option<&Arc<Adapter>>) -> Vec<u32> {
    let num_virtual = adapter.map_or(0, |adapter| adapter.num_virtual_tokens() as u32);
    (0..num_virtual).map(|i| FIRST_VIRTUAL_TOKEN + i).chain(tokens).collect()
}
