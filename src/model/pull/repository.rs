//! A checkpoint from the hub: the files of one commit, in a folder of their own.

use std::fs;
use std::path::{Path, PathBuf};

use super::{PullError, SourceError, Transport, file_name, lock, remove_leftovers};
use crate::model::catalogue::{Download, HubFile};
use tracing::info;

/// Stands beside the files when all of them are there, and names the commit.
const COMPLETE: &str = ".complete";
const FILES: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
];

/// The folder of `repo` (`owner/repo`) below `home`/models, downloaded on first use.
pub fn pull(repo: &str, home: &Path, transport: &impl Transport) -> Result<PathBuf, PullError> {
    let target = home.join("models").join(repo);
    if is_complete(&target) {
        return Ok(target);
    }
    let io_error = |source| PullError::Io { path: target.clone(), source };
    fs::create_dir_all(&target).map_err(io_error)?;
    let _lock = lock(&target).map_err(io_error)?;
    if is_complete(&target) {
        return Ok(target);
    }
    remove_leftovers(&target, PART).map_err(io_error)?;
    let no_source = |cause: SourceError| PullError::NoSource {
        target: target.clone(),
        causes: vec![format!("hub, {repo}: {cause}")],
    };
    fetch_all(repo, &target, transport).map_err(no_source)?;
    info!("{} is complete", target.display());
    Ok(target)
}

/// Whether all files of a checkpoint are there.
pub fn is_complete(target: &Path) -> bool {
    target.join(COMPLETE).exists()
}

const PART: &str = ".part-";

fn fetch_all(repo: &str, target: &Path, transport: &impl Transport) -> Result<(), SourceError> {
    let (commit, files) = transport.list_hub_files(repo)?;
    let files: Vec<String> = files.into_iter().filter(|file| is_of_checkpoint(file)).collect();
    if !files.iter().any(|file| file == "config.json") {
        return Err(SourceError::Hub("the repository has no config.json: name a GGUF file in it".to_owned()));
    }
    for file in files {
        let hub = HubFile { repo: repo.to_owned(), file: file.clone(), revision: Some(commit.clone()) };
        let dir = tempfile::Builder::new().prefix(PART).tempdir_in(target)?;
        let download = Download { file: file.clone().into(), digest: None, hub: None, wheels: Vec::new() };
        let fetched = transport.fetch_hub_file(&hub, dir.path(), &super::progress_bar(&download))?;
        fs::rename(fs::canonicalize(fetched)?, target.join(file_name(Path::new(&file))))?;
    }
    fs::write(target.join(COMPLETE), commit)?;
    Ok(())
}

/// Weights in a sub-folder are another form of the same.
fn is_of_checkpoint(file: &str) -> bool {
    let is_weights = file.starts_with("model") && file.ends_with(".safetensors") && !file.contains('/');
    FILES.contains(&file) || is_weights
}
