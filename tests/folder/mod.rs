//! A folder of adapters for a base of which only the shapes matter, and the registry over it.

// Each test that includes this uses its part.
#![allow(dead_code)]

#[path = "../shapes/mod.rs"]
mod shapes;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lorry::adapter::registry::{AdapterRegistry, AdapterStatus, ChangeError, Phase, RegistryOptions, Source};
use lorry::metrics::Metrics;
use safetensors::tensor::{Dtype, TensorView, serialize};
pub use shapes::Shapes;
use tempfile::TempDir;

pub const MAX_WAIT: Duration = Duration::from_millis(300);

/// A root with adapters of the tiny base, and the registry over it.
pub struct Fixture {
    pub dir: TempDir,
    pub metrics: Arc<Metrics>,
    pub options: RegistryOptions,
}

impl Fixture {
    pub fn new(names: &[&str]) -> Self {
        let options = RegistryOptions {
            host_budget_bytes: 1 << 30,
            max_adapter_bytes: 1 << 20,
            min_residency: Duration::ZERO,
            max_wait: MAX_WAIT,
            rescan: Duration::from_secs(3600),
            keep_generations: 2,
        };
        let fixture = Self { dir: tempfile::tempdir().unwrap(), metrics: Arc::new(Metrics::new("base")), options };
        names.iter().for_each(|name| fixture.write(name, 1.0));
        fixture
    }

    /// With memory for so many adapters.
    pub fn with_room_for(mut self, num_adapters: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        write(&dir.path().join("a"), 1.0, "");
        let registry = self.registry_of(dir.path(), Shapes::tiny());
        let bytes = registry.status("a").unwrap().coverage.unwrap().resident_bytes as u64;
        self.options.host_budget_bytes = num_adapters * bytes + bytes / 2;
        self.metrics = Arc::new(Metrics::new("base"));
        self
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Whole or not at all, as a careful operator does it. Another value is another generation.
    pub fn write(&self, name: &str, value: f32) {
        let staging = tempfile::tempdir_in(self.dir.path()).unwrap();
        write(&staging.path().join("new"), value, "");
        if self.path(name).exists() {
            fs::rename(self.path(name), staging.path().join("old")).unwrap();
        }
        fs::rename(staging.path().join("new"), self.path(name)).unwrap();
    }

    pub fn registry(&self) -> AdapterRegistry {
        self.registry_of(self.dir.path(), Shapes::tiny())
    }

    pub fn registry_of(&self, root: &Path, base: Shapes) -> AdapterRegistry {
        AdapterRegistry::open(Some(root), Arc::new(base), self.options.clone(), self.metrics.clone()).unwrap()
    }

    pub fn num_evictions(&self) -> u64 {
        self.metrics.sum_over_adapters(|adapter| &adapter.evictions_total)
    }

    pub fn num_loads(&self) -> u64 {
        self.metrics.sum_over_adapters(|adapter| &adapter.loads_total)
    }
}

/// Rank 2 on q_proj and v_proj of both layers, every weight the same.
pub fn write(dir: &Path, value: f32, manifest: &str) {
    fs::create_dir_all(dir).unwrap();
    let config = r#"{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "v_proj"]}"#;
    fs::write(dir.join("adapter_config.json"), config).unwrap();
    if !manifest.is_empty() {
        fs::write(dir.join("adapter.toml"), manifest).unwrap();
    }
    fs::write(dir.join("adapter_model.safetensors"), weights(value)).unwrap();
}

pub fn weights(value: f32) -> Vec<u8> {
    let bytes = value.to_le_bytes().repeat(16);
    let mut views = Vec::new();
    for layer in 0..2 {
        for (module, out) in [("q_proj", 8), ("v_proj", 4)] {
            let key = |part: &str| format!("base_model.model.model.layers.{layer}.self_attn.{module}.{part}.weight");
            let view = |shape: Vec<usize>| {
                let len = shape.iter().product::<usize>() * 4;
                TensorView::new(Dtype::F32, shape, &bytes[..len]).unwrap()
            };
            views.extend([(key("lora_A"), view(vec![2, 8])), (key("lora_B"), view(vec![out, 2]))]);
        }
    }
    serialize(views, None).unwrap()
}

pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn status(registry: &AdapterRegistry, name: &str) -> AdapterStatus {
    registry.status(name).unwrap_or_else(|| panic!("{name} is not there"))
}

pub fn generation(registry: &AdapterRegistry, name: &str) -> Option<String> {
    registry.status(name)?.generation
}

pub fn phases(registry: &AdapterRegistry) -> Vec<Phase> {
    registry.list().into_iter().map(|status| status.phase).collect()
}

pub async fn install(
    registry: &AdapterRegistry,
    name: &str,
    folder: &str,
    expected: Option<&str>,
) -> Result<String, ChangeError> {
    let status = registry.install(name, Source::Folder(folder.into()), expected).await?;
    Ok(status.files_generation.expect("it was read"))
}
