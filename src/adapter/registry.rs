//! The adapters of a folder: which there are, which are in memory, and the generation each request gets.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;

use super::canonical::{Adapter, Coverage};
use super::error::AdapterError;
use super::files::{AdapterFiles, WEIGHTS_FILE};
use super::manifest::AdapterManifest;
use super::{loader, manifest, peft_config};
use crate::model::BaseWeights;

const MAX_NAME_LEN: usize = 64;

#[derive(Debug, thiserror::Error)]
#[error("the adapter folder {root} cannot be read: {source}")]
pub struct RegistryError {
    root: PathBuf,
    source: io::Error,
}

/// Why a request cannot have its adapter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AcquireError {
    #[error("there is no adapter {0:?}")]
    Unknown(String),
    /// The files are there and cannot be served.
    #[error("the adapter {name:?} was refused: {cause}")]
    Refused { name: String, cause: String },
    /// The adapters named together cannot be combined.
    #[error("{0}")]
    Composition(String),
    /// No memory became free in time.
    #[error("no memory is free for the adapter {0:?}: raise adapters.host_budget_mib, or try again later")]
    OutOfMemory(String),
}

/// Why an adapter could not be installed, replaced or removed. Nothing has changed then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    #[error("{0}")]
    InvalidName(String),
    #[error("there is no adapter {0:?}")]
    Unknown(String),
    /// The generation is not the one the caller expected to change.
    #[error("the generation is {found}, not {expected}")]
    Conflict { expected: String, found: String },
    /// What was to be installed cannot be served.
    #[error("refused: {0}")]
    Refused(String),
    /// Where it was to come from.
    #[error("{0}")]
    Source(String),
    /// The folder of adapters cannot be changed.
    #[error("the folder of adapters cannot be changed: {0}")]
    Folder(String),
}

/// Where the files of an adapter to install come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A folder under the root of the adapters, relative to it or absolute.
    Folder(PathBuf),
    /// A repository on the hub.
    Hub { repo: String, revision: Option<String> },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Its files are known; loaded at the first request.
    Registered,
    Loading,
    Ready,
    /// Refused: `error` says why.
    Failed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    Disk,
    Host,
}

/// What is known of one adapter at this moment.
#[derive(Debug, Clone)]
pub struct AdapterStatus {
    /// Stays the same for as long as the server runs, in order of arrival.
    pub id: usize,
    pub name: String,
    pub phase: Phase,
    pub tier: Tier,
    /// Content hash; `None` until the files have been read once.
    pub generation: Option<String>,
    /// Earlier generations that it can be rolled back to, the latest first.
    pub previous_generations: Vec<String>,
    pub coverage: Option<Coverage>,
    /// Requests that hold it now, in any generation.
    pub in_flight: usize,
    pub error: Option<String>,
    pub manifest: Arc<AdapterManifest>,
}

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
    pub fn open(root: Option<&Path>, base: &dyn BaseWeights) -> Result<Self, RegistryError> {
        let mut registry = Self::default();
        let Some(root) = root else { return Ok(registry) };
        let (root, folders) =
            adapter_folders(root).map_err(|source| RegistryError { root: root.to_path_buf(), source })?;
        for (name, dir) in folders {
            match load_contained(&root, &dir, &name, base) {
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

    /// Every adapter, in order of the names.
    pub fn list(&self) -> Vec<AdapterStatus> {
        let names = self.loaded.keys().chain(self.refused.iter().map(|(name, _)| name));
        names.filter_map(|name| self.status(name)).collect()
    }

    pub fn status(&self, name: &str) -> Option<AdapterStatus> {
        let adapter = self.loaded.get(name);
        let error = self.refused.iter().find(|(refused, _)| refused == name).map(|(_, cause)| cause.clone());
        if adapter.is_none() && error.is_none() {
            return None;
        }
        Some(AdapterStatus {
            id: 0,
            name: name.to_owned(),
            phase: if error.is_some() { Phase::Failed } else { Phase::Ready },
            tier: if adapter.is_some() { Tier::Host } else { Tier::Disk },
            generation: adapter.map(|adapter| adapter.generation.clone()),
            previous_generations: Vec::new(),
            coverage: adapter.map(|adapter| adapter.coverage.clone()),
            in_flight: adapter.map_or(0, |adapter| Arc::strong_count(adapter) - 1),
            error,
            manifest: adapter.map(|adapter| Arc::new(adapter.manifest.clone())).unwrap_or_default(),
        })
    }

    /// The current generation of an adapter, loaded if it is not in memory. Held for as long as the result lives.
    pub async fn acquire(&self, name: &str) -> Result<Arc<Adapter>, AcquireError> {
        match (self.loaded.get(name), self.status(name).and_then(|status| status.error)) {
            (Some(adapter), _) => Ok(adapter.clone()),
            (None, Some(cause)) => Err(AcquireError::Refused { name: name.to_owned(), cause }),
            (None, None) => Err(AcquireError::Unknown(name.to_owned())),
        }
    }

    /// Several adapters as one, each at its own strength; `None` when every strength is 0, which is the base.
    pub async fn compose(&self, members: &[(String, f32)]) -> Result<Option<Arc<Adapter>>, AcquireError> {
        match members {
            [] => Ok(None),
            [(name, 1.0)] => self.acquire(name).await.map(Some),
            _ => Err(AcquireError::Composition("not yet".to_owned())),
        }
    }

    /// Loads an adapter before anybody asks for it.
    pub async fn load(&self, name: &str) -> Result<AdapterStatus, AcquireError> {
        self.acquire(name).await?;
        self.status(name).ok_or_else(|| AcquireError::Unknown(name.to_owned()))
    }

    /// Copies an adapter into the root under `name`, atomically, and loads it. `expected` is the generation that it may
    /// replace (`Some("")`: none), `None` replaces any. The same content again changes nothing.
    pub async fn install(
        &self,
        name: &str,
        source: Source,
        expected: Option<&str>,
    ) -> Result<AdapterStatus, ChangeError> {
        let _ = (name, source, expected);
        Err(ChangeError::Folder("not yet".to_owned()))
    }

    /// Takes an adapter out of the root. Requests that hold it go on; its files stay among the previous generations.
    pub async fn remove(&self, name: &str, expected: Option<&str>) -> Result<(), ChangeError> {
        let _ = (name, expected);
        Err(ChangeError::Folder("not yet".to_owned()))
    }

    /// Installs a previous generation again: `to`, or the latest.
    pub async fn roll_back(&self, name: &str, to: Option<&str>) -> Result<AdapterStatus, ChangeError> {
        let _ = (name, to);
        Err(ChangeError::Folder("not yet".to_owned()))
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

fn load_contained(root: &Path, dir: &Path, name: &str, base: &dyn BaseWeights) -> Result<Adapter, String> {
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
    let load = || loader::load(name, &AdapterFiles::read(dir)?, base);
    load().map_err(|e: AdapterError| e.to_string())
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
