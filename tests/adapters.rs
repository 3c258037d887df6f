//! Adapters from files: what fits is loaded wholly, what does not is refused with its cause.

mod fixtures;
mod shapes;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use fixtures::{copy_adapters, fixtures};
use lorry::adapter::canonical::Adapter;
use lorry::adapter::error::AdapterError;
use lorry::adapter::files::AdapterFiles;
use lorry::adapter::loader;
use lorry::adapter::registry::{AdapterRegistry, RegistryError};
use lorry::config::{Config, Overrides};
use lorry::metrics::Metrics;
use lorry::model::BaseWeights;
use lorry::model::spec::Module;
use safetensors::tensor::{Dtype, TensorView, serialize};
use shapes::Shapes;
use tempfile::TempDir;

fn load(dir: &Path, base: &dyn BaseWeights) -> Result<Adapter, AdapterError> {
    loader::load("draft", &AdapterFiles::read(dir)?, base)
}

fn open(root: Option<&Path>, base: Shapes) -> Result<AdapterRegistry, RegistryError> {
    let config = Config::load(None, &Overrides::default()).expect("the defaults are valid");
    AdapterRegistry::open(root, Arc::new(base), config.adapters.limits(), Arc::new(Metrics::new("base")))
}

/// Name and cause of each refusal, in order of the names.
fn refused(registry: &AdapterRegistry) -> Vec<(String, String)> {
    registry.list().into_iter().filter_map(|status| Some((status.name, status.error?))).collect()
}

fn smollm2() -> Shapes {
    Shapes::new(49_152, 576, 1536, 30, (9, 3))
}

fn qwen_coder_half_b() -> Shapes {
    Shapes::new(151_936, 896, 4864, 24, (14, 2))
}

/// A folder of the fixtures to open.
fn copied(fixtures: &Path, name: &str) -> TempDir {
    let root = tempfile::tempdir().unwrap();
    copy_adapters(&fixtures.join(name), root.path());
    root
}

/// An adapter of the tiny base, changed by a test before it is written.
struct Draft {
    config: serde_json::Value,
    tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    dtype: Dtype,
}

impl Draft {
    /// Rank 2, alpha 4, on q_proj and v_proj of both layers.
    fn good() -> Self {
        let config = serde_json::json!({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]
        });
        let mut draft = Self { config, tensors: BTreeMap::new(), dtype: Dtype::F32 };
        for layer in 0..2 {
            for (module, out) in [("q_proj", 8), ("v_proj", 4)] {
                draft.set(&key(layer, module, "lora_A.weight"), &[2, 8], 0.5);
                draft.set(&key(layer, module, "lora_B.weight"), &[out, 2], 0.25);
            }
        }
        draft
    }

    fn set(&mut self, key: &str, shape: &[usize], value: f32) {
        self.tensors.insert(key.to_string(), (shape.to_vec(), vec![value; shape.iter().product()]));
    }

    fn write(&self, dir: &Path) {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join("adapter_config.json"), self.config.to_string()).unwrap();
        let encode = |value: &f32| match self.dtype {
            Dtype::F16 => half::f16::from_f32(*value).to_le_bytes().to_vec(),
            Dtype::BF16 => half::bf16::from_f32(*value).to_le_bytes().to_vec(),
            Dtype::F32 => value.to_le_bytes().to_vec(),
            _ => (*value as i32).to_le_bytes().to_vec(),
        };
        let bytes: Vec<Vec<u8>> = self.tensors.values().map(|(_, v)| v.iter().flat_map(encode).collect()).collect();
        let views = self
            .tensors
            .iter()
            .zip(&bytes)
            .map(|((key, (shape, _)), bytes)| (key, TensorView::new(self.dtype, shape.clone(), bytes).unwrap()));
        fs::write(dir.join("adapter_model.safetensors"), serialize(views, None).unwrap()).unwrap();
    }

    fn load(&self) -> Result<Adapter, String> {
        let dir = tempfile::tempdir().unwrap();
        self.write(dir.path());
        let loaded = load(dir.path(), &Shapes::tiny()).map_err(|e| e.to_string());
        if let Err(refusal) = &loaded {
            assert!(!refusal.contains(&*dir.path().to_string_lossy()), "a refusal shows no path: {refusal}");
        }
        loaded
    }
}

fn key(layer: usize, module: &str, part: &str) -> String {
    format!("base_model.model.model.layers.{layer}.self_attn.{module}.{part}")
}

#[test]
fn a_good_adapter_loads_in_every_float_type_and_reports_its_coverage() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        let adapter = Draft { dtype, ..Draft::good() }.load().unwrap();
        let coverage = &adapter.coverage;
        assert_eq!((coverage.num_sites, coverage.num_expected_sites, coverage.max_rank), (4, 4, 2));
        assert!(coverage.resident_bytes > 0);
        assert!(adapter.site(1, Module::VProj).is_some_and(|site| site.low_rank.is_some() && site.bias.is_none()));
        assert!(adapter.site(1, Module::KProj).is_none());
    }
    assert!(Draft { dtype: Dtype::I32, ..Draft::good() }.load().unwrap_err().contains("I32"));
}

#[test]
fn a_trained_bias_is_scaled_like_the_delta() {
    let mut draft = Draft::good();
    draft.config["lora_bias"] = true.into();
    for layer in 0..2 {
        draft.set(&key(layer, "q_proj", "lora_B.bias"), &[8], 0.25);
        draft.set(&key(layer, "v_proj", "lora_B.bias"), &[4], 0.25);
    }
    let adapter = draft.load().unwrap();
    // scale 4 / 2
    assert_eq!(adapter.site(0, Module::QProj).unwrap().bias.as_deref(), Some([0.5; 8].as_slice()));
    assert_eq!(adapter.site(0, Module::VProj).unwrap().bias.as_deref(), Some([0.5; 4].as_slice()));

    draft.tensors.remove(&key(1, "v_proj", "lora_B.bias"));
    assert!(draft.load().unwrap_err().contains("lora_B.bias"));
    draft.config["lora_bias"] = false.into();
    assert!(draft.load().unwrap_err().contains("lora_bias"));
}

#[test]
fn an_adapter_that_does_not_fit_is_refused_with_its_cause() {
    let q = |part| key(0, "q_proj", part);
    type Change = Box<dyn Fn(&mut Draft)>;
    let cases: Vec<(&str, Change)> = vec![
        ("lora_B", Box::new(move |d| drop(d.tensors.remove(&q("lora_B.weight"))))),
        ("lora_A", Box::new(move |d| drop(d.tensors.remove(&q("lora_A.weight"))))),
        ("NaN", Box::new(move |d| d.set(&q("lora_A.weight"), &[2, 8], f32::NAN))),
        ("inf", Box::new(move |d| d.set(&q("lora_B.weight"), &[8, 2], f32::NEG_INFINITY))),
        (
            "lora_B.weight",
            Box::new(move |d| {
                d.config["lora_alpha"] = 1e37.into();
                d.set(&q("lora_B.weight"), &[8, 2], 7e4);
            }),
        ),
        ("rank", Box::new(move |d| d.set(&q("lora_A.weight"), &[3, 8], 0.5))),
        ("rank", Box::new(|d| d.config["r"] = 4.into())),
        ("shape", Box::new(move |d| d.set(&q("lora_A.weight"), &[2, 9], 0.5))),
        ("shape", Box::new(move |d| d.set(&q("lora_B.weight"), &[16], 0.5))),
        ("shape", Box::new(move |d| d.set(&q("lora_B.weight"), &[2, 8], 0.5))),
        ("surprise", Box::new(|d| d.set("base_model.model.surprise.weight", &[1], 0.5))),
        (
            "layers.00.",
            Box::new(|d| d.set("base_model.model.model.layers.00.self_attn.q_proj.lora_A.weight", &[2, 8], 0.5)),
        ),
        ("layers.2.", Box::new(|d| d.set(&key(2, "q_proj", "lora_A.weight"), &[2, 8], 0.5))),
        ("no tensor", Box::new(|d| d.tensors.clear())),
        ("3 of the 4 sites", Box::new(|d| d.tensors.retain(|key, _| !key.contains("layers.1.self_attn.v_proj")))),
        ("v_proj", Box::new(|d| d.config["target_modules"] = serde_json::json!(["q_proj"]))),
        ("site", Box::new(|d| d.config["target_modules"] = serde_json::json!(["c_attn"]))),
        ("site", Box::new(|d| d.config["layers_to_transform"] = 1.into())),
        ("embed_tokens", Box::new(|d| d.config["target_modules"] = serde_json::json!(["q_proj", "embed_tokens"]))),
        ("lora_magnitude_vector", Box::new(|d| d.config["use_dora"] = true.into())),
        ("lora_alpha", Box::new(|d| d.config["lora_alpha"] = 1e300.into())),
    ];
    for (word, change) in cases {
        let mut draft = Draft::good();
        change(&mut draft);
        let refusal = draft.load().expect_err(word);
        assert!(refusal.contains(word), "{word}: {refusal}");
    }
}

#[test]
fn rank_patterns_are_checked_against_the_tensors() {
    let mut draft = Draft::good();
    draft.config["rank_pattern"] = serde_json::json!({"layers.1.self_attn.v_proj": 3});
    assert!(draft.load().unwrap_err().contains("rank"));
    draft.set(&key(1, "v_proj", "lora_A.weight"), &[3, 8], 0.5);
    draft.set(&key(1, "v_proj", "lora_B.weight"), &[4, 3], 0.5);
    assert_eq!(draft.load().unwrap().coverage.max_rank, 3);
}

#[test]
fn any_changed_byte_of_any_file_is_another_generation() {
    let mut draft = Draft::good();
    let first = draft.load().unwrap().generation;
    assert_eq!(first, draft.load().unwrap().generation);
    draft.config["lora_dropout"] = 0.1.into();
    let second = draft.load().unwrap().generation;
    draft.set(&key(0, "q_proj", "lora_A.weight"), &[2, 8], 0.75);
    let third = draft.load().unwrap().generation;
    let dir = tempfile::tempdir().unwrap();
    draft.write(dir.path());
    fs::write(dir.path().join("adapter.toml"), "stop = ['x']").unwrap();
    let with_manifest = load(dir.path(), &Shapes::tiny()).unwrap();
    assert_eq!(with_manifest.manifest.stop, ["x"]);
    let generations = std::collections::BTreeSet::from([first, second, third, with_manifest.generation]);
    assert_eq!(generations.len(), 4);
}

#[test]
fn one_bad_adapter_stops_no_other() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    for name in ["b", "a", ".hidden", "bad name"] {
        Draft::good().write(&root.join(name));
    }
    fs::create_dir(root.join("notes")).unwrap();
    fs::write(root.join("README.md"), "text").unwrap();
    fs::create_dir(root.join("pickled")).unwrap();
    fs::write(root.join("pickled/adapter_model.bin"), "x").unwrap();
    Draft::good().write(&root.join("manifest"));
    fs::write(root.join("manifest/adapter.toml"), "promt = ''").unwrap();

    let registry = open(Some(root), Shapes::tiny()).unwrap();
    let loaded: Vec<String> = registry.resident().iter().map(|adapter| adapter.name.clone()).collect();
    assert_eq!(loaded, ["a", "b"]);
    let refused = refused(&registry);
    assert_eq!(refused.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["bad name", "manifest", "pickled"]);
    assert!(refused[1].1.contains("promt"));
}

#[test]
fn a_pickle_is_refused_and_safetensors_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    Draft::good().write(dir.path());
    fs::rename(dir.path().join("adapter_model.safetensors"), dir.path().join("adapter_model.bin")).unwrap();
    let refusal = load(dir.path(), &Shapes::tiny()).unwrap_err().to_string();
    assert!(refusal.contains("pickle") && refusal.contains("adapter_model.safetensors"), "{refusal}");
}

#[cfg(unix)]
#[test]
fn a_link_that_leads_outside_is_refused() {
    use std::os::unix::fs::symlink;
    let outside = tempfile::tempdir().unwrap();
    let root = tempfile::tempdir().unwrap();
    Draft::good().write(outside.path());
    Draft::good().write(&root.path().join("file"));
    symlink(outside.path(), root.path().join("folder")).unwrap();
    fs::remove_file(root.path().join("file/adapter_config.json")).unwrap();
    symlink(outside.path().join("adapter_config.json"), root.path().join("file/adapter_config.json")).unwrap();
    Draft::good().write(&root.path().join("inside"));
    symlink(root.path().join("inside"), root.path().join("alias")).unwrap();

    let registry = open(Some(root.path()), Shapes::tiny()).unwrap();
    assert_eq!(registry.resident().iter().map(|a| a.name.clone()).collect::<Vec<_>>(), ["alias", "inside"]);
    let refused = refused(&registry);
    assert!(refused.len() == 2 && refused.iter().all(|(_, cause)| cause.contains("outside")), "{refused:?}");
}

#[test]
fn a_root_that_is_not_there_is_an_error_and_no_root_is_none() {
    assert!(open(None, Shapes::tiny()).unwrap().list().is_empty());
    let error = open(Some(Path::new("no/such/folder")), Shapes::tiny()).unwrap_err();
    assert!(error.to_string().contains("no/such/folder"));
}

#[test]
fn every_bad_adapter_of_the_fixtures_is_refused_with_the_expected_word() {
    let Some(fixtures) = fixtures() else { return };
    let root = copied(&fixtures, "bad_adapters");
    let num_adapters = fs::read_dir(&root).unwrap().count();
    let registry = open(Some(root.path()), smollm2()).unwrap();
    let refused = refused(&registry);
    assert_eq!(refused.len(), num_adapters, "{:?}", registry.resident());
    for (name, cause) in refused {
        let expected = fs::read_to_string(root.path().join(&name).join("EXPECT.txt")).unwrap();
        println!("{name}: {cause}");
        assert!(cause.contains(expected.trim()), "{name}: {cause:?} does not mention {expected:?}");
    }
}

#[test]
fn every_adapter_of_the_fixtures_loads_with_full_coverage() {
    let Some(fixtures) = fixtures() else { return };
    for (name, base) in [("smollm2-135m", smollm2()), ("qwen2.5-coder-0.5b", qwen_coder_half_b())] {
        let layers = base.spec().num_layers;
        for (kind, num_sites, max_rank, num_virtual_tokens) in [
            ("lora_qv", 2 * layers, 4, 0),
            ("lora_all", 7 * layers, 8, 0),
            ("rslora", 4 * layers, 8, 0),
            ("lora_patterns", 5 * layers, 8, 0),
            ("lora_layers", 12, 8, 0),
            ("lora_bias", 2 * layers, 4, 0),
            ("lora_embed", layers + 1, 2, 0),
            ("dora", 3 * layers, 4, 0),
            ("ia3", 3 * layers, 0, 0),
            ("ia3_wide", 6 * layers, 0, 0),
            ("prompt", 0, 0, 20),
            ("prefix", 0, 0, 10),
        ] {
            let coverage = load(&fixtures.join(name).join("adapters").join(kind), &base).unwrap().coverage;
            let found = (coverage.num_sites, coverage.max_rank, coverage.num_virtual_tokens);
            assert_eq!(found, (num_sites, max_rank, num_virtual_tokens), "{name} {kind}");
        }
    }
    let root = copied(&fixtures, "real");
    let real = open(Some(root.path()), qwen_coder_half_b()).unwrap();
    let coverage = real.status("conala").and_then(|status| status.coverage);
    assert_eq!(coverage.map(|coverage| coverage.num_sites), Some(168), "{:?}", refused(&real));
}
