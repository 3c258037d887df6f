//! Adapters of every method from their files: what fits is loaded wholly, what does not is refused with its cause.

mod shapes;
mod tiny;

use half::f16;
use lorry::adapter::canonical::{Adapter, HeadDelta, Method, Prelude};
use lorry::adapter::files::AdapterFiles;
use lorry::adapter::loader;
use lorry::model::spec::{Architecture, Features, ModelSpec, Module};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};
use shapes::Shapes;
use tiny::peft::{Kind, PREFIX, PeftAdapter};

fn spec() -> ModelSpec {
    ModelSpec {
        architecture: Architecture::Llama,
        hidden_size: 32,
        intermediate_size: 64,
        num_layers: 2,
        num_heads: 2,
        num_kv_heads: 1,
        head_dim: 16,
        vocab_size: 40,
        rope_theta: 1e4,
        norm_eps: 1e-5,
        context_length: 64,
        features: Features::PLAIN,
    }
}

fn good(kind: Kind) -> PeftAdapter {
    PeftAdapter::random(kind, &spec(), 1)
}

fn load(files: &AdapterFiles) -> Result<Adapter, String> {
    loader::load("draft", files, &Shapes(spec())).map_err(|e| e.to_string())
}

#[test]
fn every_method_reports_its_name_and_what_it_changes() {
    for (kind, method, name, num_sites, max_rank, num_virtual_tokens) in [
        (Kind::LoraEverywhere, Method::Lora, "lora", 16, 3, 0),
        (Kind::RsLoraBias, Method::RsLora, "rslora", 4, 9, 0),
        (Kind::LoraSavedHead, Method::Lora, "lora", 3, 2, 0),
        (Kind::Dora, Method::Dora, "dora", 6, 4, 0),
        // Of the four sites that are named, training has left nothing of one.
        (Kind::AdaLora, Method::AdaLora, "adalora", 3, 4, 0),
        (Kind::Vera, Method::Vera, "vera", 6, 12, 0),
        (Kind::Miss, Method::Miss, "miss", 4, 6, 0),
        (Kind::Ia3, Method::Ia3, "ia3", 6, 0, 0),
        (Kind::Ia3Wide, Method::Ia3, "ia3", 12, 0, 0),
        (Kind::PromptTuning, Method::PromptTuning, "prompt-tuning", 0, 0, 5),
        (Kind::PTuning, Method::PTuning, "p-tuning", 0, 0, 5),
        (Kind::PrefixTuning, Method::PrefixTuning, "prefix-tuning", 0, 0, 5),
    ] {
        let adapter = load(&good(kind).files()).unwrap();
        assert_eq!((adapter.method, adapter.method.to_string().as_str()), (method, name));
        assert_eq!(serde_json::to_value(method).unwrap(), name);
        let coverage = &adapter.coverage;
        assert_eq!((coverage.num_sites, coverage.num_expected_sites), (num_sites, num_sites), "{kind:?}");
        assert_eq!((coverage.max_rank, coverage.num_virtual_tokens), (max_rank, num_virtual_tokens), "{kind:?}");
        // At least two bytes for each number in the file, and no more than its f32 with some padding; of what the layers of a VeRA
        // share, each has its own, and half of a MiSS is not in the file.
        let num_values: usize = good(kind).tensors.values().map(|(_, values)| values.len()).sum();
        let num_copies = if matches!(kind, Kind::Vera | Kind::Miss) { num_sites } else { 1 };
        let bytes = 2 * num_values..8 * num_values * num_copies;
        assert!(bytes.contains(&coverage.resident_bytes), "{kind:?}: {coverage:?}");
    }
}

#[test]
fn every_part_goes_to_its_place() {
    let everywhere = load(&good(Kind::LoraEverywhere).files()).unwrap();
    assert!(matches!(&everywhere.weights.head, Some(HeadDelta::Delta(delta)) if delta.low_rank.is_some()));
    let embedding = everywhere.weights.embedding.as_ref().unwrap();
    let (_, a) = &good(Kind::LoraEverywhere).tensors[&format!("{PREFIX}model.embed_tokens.lora_embedding_A")];
    assert_eq!(embedding.a[7 * 3 + 2], f16::from_f32(a[2 * 40 + 7]));

    assert!(matches!(load(&good(Kind::LoraSavedHead).files()).unwrap().weights.head, Some(HeadDelta::Replaced(_))));

    let ia3 = load(&good(Kind::Ia3).files()).unwrap();
    let site = |module| ia3.site(1, module).unwrap();
    assert!(site(Module::KProj).output_scale.is_some() && site(Module::KProj).input_scale.is_none());
    assert!(site(Module::DownProj).input_scale.is_some() && site(Module::DownProj).output_scale.is_none());

    let prefix = load(&good(Kind::PrefixTuning).files()).unwrap();
    let (_, values) = &good(Kind::PrefixTuning).tensors["prompt_embeddings"];
    let Some(Prelude::KeyValues { keys, values: v, .. }) = &prefix.weights.prelude else {
        panic!("{:?}", prefix.weights.prelude)
    };
    // Token 3, layer 1, in rows of 2 layers with K and V of 16.
    assert_eq!(keys[1][3 * 16..4 * 16], values[3 * 64 + 32..][..16]);
    assert_eq!(v[1][3 * 16..4 * 16], values[3 * 64 + 48..][..16]);
}

/// As the files of PEFT, but for what some programs do to them.
#[test]
fn an_adapter_is_the_same_whichever_program_saved_it() {
    type Change = fn(&str) -> String;
    let ways: [(&str, Change); 5] = [
        ("without the prefix", |key| key.trim_start_matches(PREFIX).to_owned()),
        ("with the prefix twice", |key| format!("{PREFIX}{key}")),
        // The adapter's name stands before the last part of a module's tensor, and after a parameter's.
        ("as a running model has it", |key| match key.rsplit_once('.') {
            Some((module, part @ ("weight" | "bias"))) => format!("module.{module}.default.{part}"),
            _ => format!("module.{key}.default"),
        }),
        ("compiled", |key| key.replace(PREFIX, "base_model.model._orig_mod.")),
        ("checkpointed", |key| key.replace(".layers.0.", ".layers.0._checkpoint_wrapped_module.")),
    ];
    for kind in [Kind::LoraEverywhere, Kind::RsLoraBias, Kind::Dora, Kind::AdaLora, Kind::Vera, Kind::Miss, Kind::Ia3] {
        let expected = load(&good(kind).files()).unwrap();
        for (way, rename) in ways {
            let mut draft = good(kind);
            draft.tensors = draft.tensors.into_iter().map(|(key, tensor)| (rename(&key), tensor)).collect();
            let found = load(&draft.files()).unwrap_or_else(|e| panic!("{kind:?} saved {way}: {e}"));
            assert_eq!(found.coverage, expected.coverage, "{kind:?} saved {way}");
            assert_eq!(format!("{:?}", found.weights), format!("{:?}", expected.weights), "{kind:?} saved {way}");
        }
    }
}

#[test]
fn a_head_that_is_saved_whole_is_not_adapted_besides() {
    let expected = load(&good(Kind::LoraSavedHead).files()).unwrap();
    for targets in [json!(["k_proj", "lm_head"]), json!(".*k_proj|lm_head")] {
        let mut draft = good(Kind::LoraSavedHead);
        draft.config["target_modules"] = targets;
        let found = load(&draft.files()).unwrap();
        assert!(matches!(found.weights.head, Some(HeadDelta::Replaced(_))));
        assert_eq!(format!("{:?}", found.weights), format!("{:?}", expected.weights));
    }
}

/// PEFT's default where the embedding or the head is a target.
#[test]
fn the_base_s_own_embedding_and_head_are_left_out() {
    let expected = load(&good(Kind::LoraEverywhere).files()).unwrap();
    for name in ["model.embed_tokens.base_layer", "lm_head.base_layer", "model.embed_tokens", "lm_head.original_module"]
    {
        let mut draft = good(Kind::LoraEverywhere);
        // Quantization has moved every weight of the base a little.
        let row = |token: usize| (token..token + 32).map(|at| at as f32 * 1.1);
        draft.tensors.insert(format!("{PREFIX}{name}.weight"), (vec![40, 32], (0..40).flat_map(row).collect()));
        let found = load(&draft.files()).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(format!("{:?}", found.weights), format!("{:?}", expected.weights), "{name}");
        // A single row that was trained is enough for it to be another.
        draft.tensors.get_mut(&format!("{PREFIX}{name}.weight")).unwrap().1[7 * 32..8 * 32].fill(0.0);
        assert!(load(&draft.files()).unwrap_err().to_string().contains("not the base's own"), "{name}");
    }
}

#[test]
fn a_magnitude_equal_to_the_norm_changes_nothing_but_the_low_rank_pair() {
    let mut draft = good(Kind::Dora);
    // Rows of the base have length 1, and a B of zeros leaves them so.
    for (key, (_, values)) in &mut draft.tensors {
        if key.ends_with("lora_B.weight") {
            values.fill(0.0);
        } else if key.ends_with("lora_magnitude_vector") {
            values.fill(0.5);
        }
    }
    let adapter = load(&draft.files()).unwrap();
    for scale in adapter.site(0, Module::DownProj).unwrap().output_scale.as_ref().unwrap() {
        assert!((scale - 0.5).abs() < 1e-6, "{scale}");
    }
}

/// Beside weights of a usual size and a scale that makes up for it, which are the same adapter.
#[test]
fn weights_of_any_size_are_kept_as_well_as_those_of_a_usual_one() {
    for kind in [Kind::LoraEverywhere, Kind::Dora] {
        let usual = good(kind);
        let expected = load(&usual.files()).unwrap();
        // Powers of two, so that nothing is rounded: 2e-8 and 4e7 for weights around 0.1.
        for power in [-22, 28] {
            let factor = 2f32.powi(power);
            let mut draft = usual.clone();
            let alpha = draft.config["lora_alpha"].as_f64().unwrap();
            draft.config["lora_alpha"] = json!(alpha / f64::from(factor));
            for (key, (_, values)) in &mut draft.tensors {
                if key.ends_with("lora_B.weight") || key.ends_with("lora_embedding_B") {
                    values.iter_mut().for_each(|value| *value *= factor);
                }
            }
            let found = load(&draft.files()).unwrap();
            let sites = [&found, &expected].map(|adapter| adapter.site(1, Module::QProj).unwrap());
            let [scale, usual_scale] = sites.map(|site| site.low_rank.as_ref().unwrap().scales()[0]);
            // B has been made as large as f16 takes well, and not all that much larger.
            assert!((1.0 / 64.0..64.0).contains(&(usual_scale / scale)), "{kind:?}: {scale}, {usual_scale}");
            let [output_scale, usual] = sites.map(|site| site.output_scale.iter().flatten());
            for (found, expected) in output_scale.zip(usual) {
                assert!((found - expected).abs() < 1e-5, "{kind:?}: {found}, {expected}");
            }
            if let (Some(found), Some(expected)) = (&found.weights.embedding, &expected.weights.embedding) {
                assert!(found.b.iter().zip(&expected.b).all(|(found, b)| (found - b).abs() <= 1e-6), "{power}");
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_with_its_cause() {
    type Change = Box<dyn Fn(&mut PeftAdapter)>;
    fn set(name: &'static str, value: Value) -> Change {
        Box::new(move |draft| draft.config[name] = value.clone())
    }
    fn without(part: &'static str) -> Change {
        Box::new(move |draft| draft.tensors.retain(|key, _| !key.ends_with(part)))
    }
    fn with(key: &'static str, shape: &'static [usize], value: f32) -> Change {
        Box::new(move |draft| {
            let values = vec![value; shape.iter().product()];
            draft.tensors.insert(key.to_owned(), (shape.to_vec(), values));
        })
    }
    const EMBEDDING_A: &str = "base_model.model.model.embed_tokens.lora_embedding_A";
    const HEAD: &str = "base_model.model.lm_head.weight";
    const TWICE: [&str; 2] = ["x.lora_A.one.weight", "y.lora_A.other.weight"];
    const MAGNITUDE: &str = "base_model.model.model.layers.1.self_attn.q_proj.lora_magnitude_vector";
    const IA3_DOWN: &str = "base_model.model.model.layers.1.mlp.down_proj.ia3_l";
    let cases: Vec<(Kind, &str, Change)> = vec![
        (Kind::LoraEverywhere, "lora_embedding_B is missing", without("lora_embedding_B")),
        (
            Kind::LoraEverywhere,
            "embed_tokens is missing",
            without("lora_embedding_A").also(without("lora_embedding_B")),
        ),
        (Kind::LoraEverywhere, "embed_tokens, which", set("exclude_modules", json!(["embed_tokens"]))),
        (Kind::LoraEverywhere, "rank", with(EMBEDDING_A, &[2, 40], 0.5)),
        (Kind::LoraEverywhere, "shape", with(EMBEDDING_A, &[3, 41], 0.5)),
        (Kind::LoraEverywhere, "NaN", with(EMBEDDING_A, &[3, 40], f32::NAN)),
        (
            Kind::LoraEverywhere,
            "not the base's own",
            with("base_model.model.model.embed_tokens.base_layer.weight", &[40, 32], 0.5),
        ),
        (
            Kind::LoraEverywhere,
            "vocabulary",
            with("base_model.model.model.embed_tokens.base_layer.weight", &[41, 32], 0.5),
        ),
        (Kind::LoraEverywhere, "modules_to_save", with(HEAD, &[40, 32], 0.5)),
        (Kind::LoraEverywhere, "modules_to_save", with(HEAD, &[40, 32], f32::NAN)),
        (Kind::LoraEverywhere, "ZeRO-3", with(EMBEDDING_A, &[0], 0.5)),
        (Kind::LoraEverywhere, "two adapters", with(TWICE[0], &[3, 32], 0.5).also(with(TWICE[1], &[3, 32], 0.5))),
        (Kind::LoraEverywhere, "belongs where", with("model.layers.0.mlp.up_proj.lora_A.weight", &[3, 32], 0.5)),
        (Kind::LoraEverywhere, "rank_pattern", set("rank_pattern", json!({r"(?=x|.)((.*)*)*\2y": 4}))),
        (Kind::LoraEverywhere, "modules_to_save", set("modules_to_save", json!(["lm_head"]))),
        (Kind::LoraEverywhere, "use_dora", set("use_dora", json!(true))),
        (Kind::LoraEverywhere, "lora_bias", set("lora_bias", json!(true))),
        (Kind::LoraSavedHead, "lm_head is incomplete", without("lm_head.weight")),
        (Kind::LoraSavedHead, "shape", with(HEAD, &[41, 32], 0.5)),
        (Kind::LoraSavedHead, "inf", with(HEAD, &[40, 32], f32::INFINITY)),
        (Kind::LoraSavedHead, "modules_to_save", set("modules_to_save", json!(["lm_head", "embed_tokens"]))),
        (Kind::Dora, "lora_magnitude_vector", without("1.self_attn.q_proj.lora_magnitude_vector")),
        (Kind::Dora, "use_dora", set("use_dora", json!(false))),
        (Kind::Dora, "use_dora", set("lora_bias", json!(true))),
        (Kind::Dora, "shape", with(MAGNITUDE, &[31], 1.0)),
        (Kind::Dora, "NaN", with(MAGNITUDE, &[32], f32::NAN)),
        (Kind::RsLoraBias, "16-bit", with("base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias", &[32], 1e5)),
        (Kind::AdaLora, "lora_E (peft_type ADALORA)", without("0.self_attn.v_proj.lora_E")),
        (
            Kind::AdaLora,
            "v_proj is missing",
            without("1.self_attn.v_proj.lora_A")
                .also(without("1.self_attn.v_proj.lora_B"))
                .also(without("1.self_attn.v_proj.lora_E")),
        ),
        (Kind::AdaLora, "v_proj, which", set("target_modules", json!(["q_proj"]))),
        (Kind::AdaLora, "rank", set("rank_pattern", json!({}))),
        (Kind::AdaLora, "rank_pattern", set("rank_pattern", json!({"model.layers.1.self_attn.v_proj.lora_E": [true]}))),
        (Kind::AdaLora, "init_r", set("init_r", json!(5))),
        (Kind::AdaLora, "shape", with("base_model.model.model.layers.0.self_attn.v_proj.lora_E", &[4], 1.0)),
        (Kind::AdaLora, "NaN", with("base_model.model.model.layers.0.self_attn.v_proj.lora_E", &[4, 1], f32::NAN)),
        (Kind::AdaLora, "32-bit", with("base_model.model.model.layers.0.self_attn.v_proj.lora_E", &[4, 1], 3e38)),
        (Kind::AdaLora, "lm_head", set("target_modules", json!(["q_proj", "v_proj", "lm_head"]))),
        (Kind::AdaLora, "init_r", set("peft_type", json!("LORA")).also(set("rank_pattern", json!(null)))),
        (Kind::RsLoraBias, "peft_type", set("peft_type", json!("ADALORA"))),
        (
            Kind::RsLoraBias,
            "peft_type",
            set("peft_type", json!("ADALORA"))
                .also(set("lora_bias", json!(false)))
                .also(set("use_rslora", json!(false))),
        ),
        (Kind::LoraEverywhere, "peft_type", set("peft_type", json!("VERA"))),
        (Kind::LoraEverywhere, "peft_type", set("peft_type", json!("MISS"))),
        (Kind::Miss, "up_proj is missing", without("1.mlp.up_proj.miss_block")),
        (Kind::Miss, "rank", set("r", json!(8))),
        (Kind::Miss, "shape", set("init_weights", json!("mini"))),
        (Kind::Miss, "mini_r", set("init_weights", json!("mini")).also(set("mini_r", json!(7)))),
        (Kind::Miss, "init_weights", set("init_weights", json!("bat"))),
        (Kind::Miss, "NaN", with("base_model.model.model.layers.1.mlp.up_proj.miss_block", &[6, 64], f32::NAN)),
        (Kind::Miss, "lm_head", set("target_modules", json!(["q_proj", "up_proj", "lm_head"]))),
        (Kind::Vera, "vera_A is missing (peft_type VERA)", without("vera_A")),
        (Kind::Vera, "vera_lambda_d (peft_type VERA)", without("1.self_attn.q_proj.vera_lambda_d")),
        (
            Kind::Vera,
            "down_proj is missing",
            without("1.mlp.down_proj.vera_lambda_b").also(without("1.mlp.down_proj.vera_lambda_d")),
        ),
        (Kind::Vera, "rank", set("r", json!(8))),
        (Kind::Vera, "save_projection", set("save_projection", json!(false))),
        (Kind::Vera, "shape", with("base_model.vera_A", &[12, 32], 1.0)),
        (Kind::Vera, "shape", with("base_model.vera_B", &[31, 12], 1.0)),
        (Kind::Vera, "shape", with("base_model.model.model.layers.1.mlp.down_proj.vera_lambda_b", &[31], 1.0)),
        (
            Kind::Vera,
            "32-bit",
            with("base_model.model.model.layers.1.mlp.down_proj.vera_lambda_b", &[32], 3e38).also(with(
                "base_model.vera_B",
                &[32, 12],
                9.0,
            )),
        ),
        (Kind::Vera, "NaN", with("base_model.vera_B", &[32, 12], f32::NAN)),
        (Kind::Vera, "embed_tokens", set("target_modules", json!(["q_proj", "v_proj", "down_proj", "embed_tokens"]))),
        (Kind::Ia3, "down_proj is missing", without("1.mlp.down_proj.ia3_l")),
        (Kind::Ia3, "v_proj, which", set("target_modules", json!(["k_proj", "down_proj"]))),
        (Kind::Ia3, "shape", set("feedforward_modules", json!([]))),
        (Kind::Ia3, "shape", with(IA3_DOWN, &[64, 1], 1.0)),
        (Kind::Ia3, "NaN", with(IA3_DOWN, &[1, 64], f32::NAN)),
        (Kind::Ia3, "lm_head", set("target_modules", json!(["k_proj", "v_proj", "down_proj", "lm_head"]))),
        (Kind::Ia3, "no site", set("target_modules", json!(["c_attn"]))),
        (Kind::Ia3, "surprise", with("base_model.model.surprise.ia3_l", &[1], 1.0)),
        (Kind::Ia3, "lora_A", with("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", &[1, 32], 1.0)),
        (Kind::PromptTuning, "shape", set("num_virtual_tokens", json!(6))),
        (Kind::PromptTuning, "num_virtual_tokens", set("num_virtual_tokens", json!(100_000))),
        (Kind::PromptTuning, "shape", with("prompt_embeddings", &[5, 33], 0.5)),
        (Kind::PromptTuning, "NaN", with("prompt_embeddings", &[5, 32], f32::NAN)),
        (Kind::PromptTuning, "no tensor", without("prompt_embeddings")),
        (Kind::PromptTuning, "prompt_embeddings", without("prompt_embeddings").also(with("x", &[1], 1.0))),
        (Kind::PromptTuning, "token_dim", set("token_dim", json!(64))),
        (Kind::PTuning, "num_layers", set("num_layers", json!(3))),
        (Kind::PTuning, "surprise", with("surprise", &[1], 1.0)),
        (Kind::PrefixTuning, "num_attention_heads", set("num_attention_heads", json!(2))),
        (Kind::PrefixTuning, "shape", with("prompt_embeddings", &[5, 32], 0.5)),
        (Kind::PrefixTuning, "16-bit", with("prompt_embeddings", &[5, 64], 7e4)),
    ];
    for (kind, word, change) in cases {
        let mut draft = good(kind);
        change(&mut draft);
        let refusal = load(&draft.files()).map(|_| ()).expect_err(word);
        let is_named = refusal.contains(word) || word == "prompt_embeddings" && refusal.contains("\"x\"");
        assert!(is_named, "{kind:?} {word}: {refusal}");
    }
}

/// One change after another.
trait Also {
    fn also(self, next: Self) -> Self;
}

impl Also for Box<dyn Fn(&mut PeftAdapter)> {
    fn also(self, next: Self) -> Self {
        Box::new(move |draft| {
            self(draft);
            next(draft);
        })
    }
}

/// Bytes that are overwritten, or a place where the file is cut.
#[derive(Debug, Clone)]
enum Damage {
    Overwrite(prop::sample::Index, Vec<u8>),
    Cut(prop::sample::Index),
    Swap(prop::sample::Index, prop::sample::Index),
}

impl Damage {
    fn apply(&self, bytes: &mut Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        match self {
            Self::Overwrite(at, with) => {
                let at = at.index(bytes.len());
                bytes[at..].iter_mut().zip(with).for_each(|(to, from)| *to = *from);
            }
            Self::Cut(at) => bytes.truncate(at.index(bytes.len())),
            Self::Swap(a, b) => {
                let (a, b) = (a.index(bytes.len()), b.index(bytes.len()));
                bytes.swap(a, b);
            }
        }
    }
}

#[test]
fn ten_thousand_damaged_adapters_are_refused_or_are_whole() {
    let originals = Kind::ALL.map(|kind| (good(kind).files(), load(&good(kind).files()).unwrap().coverage));
    let index = || any::<prop::sample::Index>();
    // Half of the damage to weights strikes the header, where the structure is.
    let text = prop::collection::vec(prop::sample::select(br#"0123456789-"{}[]:,.eLnulltruefas_\"#.as_slice()), 1..6);
    let damage = prop_oneof![
        4 => (index(), text).prop_map(|(at, text)| Damage::Overwrite(at, text)),
        2 => (index(), prop::collection::vec(any::<u8>(), 1..10)).prop_map(|(at, bytes)| Damage::Overwrite(at, bytes)),
        1 => index().prop_map(Damage::Cut),
        1 => (index(), index()).prop_map(|(a, b)| Damage::Swap(a, b)),
    ];
    let strategy = (0..Kind::ALL.len(), 0..3_usize, prop::collection::vec(damage, 1..3));
    let mut runner = TestRunner::new(Config { cases: 10_000, failure_persistence: None, ..Config::default() });
    let run = runner.run(&strategy, |(kind, file, damages)| {
        let (original, coverage) = &originals[kind];
        let (mut config, mut weights) = (original.config.clone(), original.weights.clone());
        let header = 8 + u64::from_le_bytes(*weights.first_chunk().unwrap()) as usize;
        for damage in damages {
            match file {
                0 => damage.apply(&mut config),
                1 => damage.apply(&mut weights),
                _ => {
                    let mut head: Vec<u8> = weights.drain(..header.min(weights.len())).collect();
                    damage.apply(&mut head);
                    weights.splice(..0, head);
                }
            }
        }
        let files = AdapterFiles { config, manifest: None, weights };
        if let Ok(adapter) = loader::load("damaged", &files, &Shapes(spec())) {
            // What is accepted is an adapter of what the files say, no larger than they are.
            let size = files.weights.len() + files.config.len();
            prop_assert!(adapter.coverage.resident_bytes <= 4 * size, "{:?}", adapter.coverage);
            prop_assert!(adapter.coverage.num_sites <= 16 && adapter.num_virtual_tokens() <= 5);
            // All tensors are still there, so nothing of it has been left out.
            prop_assert_eq!(adapter.coverage.num_sites, coverage.num_sites);
        }
        Ok(())
    });
    run.unwrap();
}
