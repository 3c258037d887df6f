//! The adapters of a folder: which are loaded, which were refused and why.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::canonical::Adapter;
use super::loader::{self, WEIGHTS_FILE};
use super::{manifest, peft_config};
use crate::model::spec::ModelSpec;

const MAX_NAME_LEN: usize = 64;

#[derive(Debug, thiserror::Error)]
#[error("the adapter folder {root} cannot be read: {source}")]
pub struct RegistryError {
    root: PathBuf,
    source: io::Error,
}

/// Every adapter is in exactly one of the two lists.
#[derive(Debug, Default)]
pub struct AdapterRegistry {
    loaded: BTreeMap<String, Arc<Adapter>>,
    refused: Vec<(String, String)>,
}

impl AdapterRegistry {
    /// Loads every direct sub-folder of `root` that holds an adapter; without a root there are none.
    ///
    /// An adapter that is refused is logged and stops no other.
    ///
    /// # Errors
    /// When the root itself cannot be read.
    pub fn load_all(root: Option<&Path>, spec: &ModelSpec) -> Result<Self, RegistryError> {
        let mut registry = Self::default();
        let Some(root) = root else { return Ok(registry) };
        let (root, folders) =
            adapter_folders(root).map_err(|source| RegistryError { root: root.to_path_buf(), source })?;
        for (name, dir) in folders {
            match load_contained(&root, &dir, &name, spec) {
                Ok(adapter) => {
                    let coverage = &adapter.coverage;
                    tracing::info!(
                        "adapter {name}: {} of {} sites, rank {}, {:.1} MB, generation {:.8}",
                        coverage.num_sites,
                        coverage.num_expected_sites,
                        coverage.max_rank,
                        coverage.resident_bytes as f64 / 1e6,
                        adapter.generation
                    );
                    registry.loaded.insert(name, Arc::new(adapter));
                }
                Err(cause) => {
                    tracing::error!("adapter {name} refused: {cause}");
                    registry.refused.push((name, cause));
                }
            }
        }
        Ok(registry)
    }

    pub fn get(&self, name: &str) -> Option<Arc<Adapter>> {
        self.loaded.get(name).cloned()
    }

    /// The loaded adapters in order of their names.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Adapter>> {
        self.loaded.values()
    }

    /// Name and cause of each refusal, in order of the names.
    pub fn refused(&self) -> &[(String, String)] {
        &self.refused
    }
}

/// The root resolved, and its sub-folders that hold an adapter or what is left of one, in order of their names.
fn adapter_folders(root: &Path) -> io::Result<(PathBuf, BTreeMap<String, PathBuf>)> {
    let root = root.canonicalize()?;
    let mut folders = BTreeMap::new();
    for entry in fs::read_dir(&root)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with('.') && looks_like_adapter(&entry.path()) {
            folders.insert(name, entry.path());
        }
    }
    Ok((root, folders))
}

fn looks_like_adapter(dir: &Path) -> bool {
    let Ok(entries) = fs::read_dir(dir) else { return false };
    entries.flatten().any(|entry| {
        let file_name = entry.file_name();
        file_name == peft_config::FILE || file_name.to_string_lossy().starts_with("adapter_model.")
    })
}

fn load_contained(root: &Path, dir: &Path, name: &str, spec: &ModelSpec) -> Result<Adapter, String> {
    if !is_valid_name(name) {
        return Err(format!(
            "the folder's name must be 1 to {MAX_NAME_LEN} letters, digits, dots, dashes and underscores, \
             beginning with a letter or digit: rename it"
        ));
    }
    let files = [peft_config::FILE, WEIGHTS_FILE, manifest::FILE];
    for path in std::iter::once(dir.to_path_buf()).chain(files.map(|file| dir.join(file))) {
        // A link that leads nowhere is reported by the loader as a missing file.
        if path.canonicalize().is_ok_and(|resolved| !resolved.starts_with(root)) {
            let file_name = path.file_name().unwrap_or_default().to_string_lossy();
            return Err(format!("{file_name} is a link that leads outside the adapter folder: copy it into place"));
        }
    }
    loader::load(dir, name, spec).map_err(|e| e.to_string())
}

fn is_valid_name(name: &str) -> bool {
    name.len() <= MAX_NAME_LEN
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_what_a_client_can_write_in_a_model_id() {
        for good in ["a", "conala", "A1.b_c-d", &"x".repeat(64)] {
            assert!(is_valid_name(good), "{good}");
        }
        for bad in ["", "-a", "_a", "a b", "a/b", "a:b", "é", &"x".repeat(65)] {
            assert!(!is_valid_name(bad), "{bad}");
        }
    }
}
