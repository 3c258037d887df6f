//! A checkpoint from the hub: the files of one commit, in a folder of their own.

use std::fs;
use std::path::{Path, PathBuf};

use super::{BEGUN, PullError, SourceError, Transport, fetch_begun, lock, remove_folder, remove_leftovers};
use crate::model::catalogue::{Download, HubFile};
use crate::model::checkpoint::templates;
use tracing::info;

/// Stands beside the files when all of them are there, and names the commit.
const COMPLETE: &str = ".complete";
/// Stands beside them before, and names the commit of those that are there.
const COMMIT: &str = ".commit";
const FILES: [&str; 5] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
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
    let begun = target.join(format!("{PART}{BEGUN}"));
    remove_leftovers(&target, PART, &begun).map_err(io_error)?;
    let no_source = |cause: SourceError| PullError::NoSource {
        target: target.clone(),
        causes: vec![format!("hub, {repo}: {cause}")],
    };
    fetch_all(repo, &target, &begun, transport).map_err(no_source)?;
    info!("{} is complete", target.display());
    Ok(target)
}

/// Whether all files of a checkpoint are there.
pub fn is_complete(target: &Path) -> bool {
    target.join(COMPLETE).exists()
}

const PART: &str = ".part-";

fn fetch_all(repo: &str, target: &Path, begun: &Path, transport: &impl Transport) -> Result<(), SourceError> {
    let (commit, files) = transport.list_hub_files(repo)?;
    let files: Vec<String> = files.into_iter().filter(|file| is_of_checkpoint(file)).collect();
    if !files.iter().any(|file| file == "config.json") {
        return Err(SourceError::Hub("the repository has no config.json: name a GGUF file in it".to_owned()));
    }
    if fs::read_to_string(target.join(COMMIT)).ok().as_ref() != Some(&commit) {
        // Those of another commit would stay where this one has none.
        remove_files(target)?;
        remove_folder(begun)?;
        fs::write(target.join(COMMIT), &commit)?;
    }
    for file in files {
        let place = target.join(&file);
        if place.exists() {
            continue;
        }
        fs::create_dir_all(place.parent().unwrap_or(target))?;
        let hub = HubFile { repo: repo.to_owned(), file: file.clone(), revision: Some(commit.clone()) };
        let download = Download { file: file.into(), digest: None, hub: None, wheels: Vec::new() };
        fs::rename(fetch_begun(&hub, begun, &super::progress_bar(&download), transport)?, place)?;
    }
    remove_folder(begun)?;
    fs::rename(target.join(COMMIT), target.join(COMPLETE))?;
    Ok(())
}

fn remove_files(target: &Path) -> Result<(), SourceError> {
    for entry in fs::read_dir(target)? {
        let entry = entry?;
        if is_of_checkpoint(&entry.file_name().to_string_lossy()) {
            fs::remove_file(entry.path())?;
        }
    }
    remove_folder(&target.join(templates::FOLDER))?;
    Ok(())
}

/// Weights in a sub-folder are another form of the same.
fn is_of_checkpoint(file: &str) -> bool {
    let is_weights = file.starts_with("model") && file.ends_with(".safetensors") && !file.contains('/');
    FILES.contains(&file) || is_weights || templates::is_one(file)
}
