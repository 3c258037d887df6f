//! The files of an adapter from a repository on the hub.

use std::fs;
use std::path::Path;

use hf_hub::{Repo, RepoType};
use indicatif::ProgressBar;

use super::files::{AdapterFiles, WEIGHTS_FILE};
use super::{manifest, peft_config};
use crate::model::pull::hub;

/// Downloads the files of one commit: `revision`, or the newest. `dir` takes what is on the way. Blocks.
///
/// # Errors
/// What the hub's client says, or which file is missing; for people.
pub fn fetch(repo: &str, revision: Option<&str>, dir: &Path, max_weights_bytes: u64) -> Result<AdapterFiles, String> {
    let repo = Repo::with_revision(repo.to_owned(), RepoType::Model, revision.unwrap_or("main").to_owned());
    let info = hub::info(&repo)?;
    // A branch may move between two files.
    let commit = Repo::with_revision(repo.url(), RepoType::Model, info.sha);
    let get = |file: &str, limit: u64| {
        if !info.siblings.iter().any(|sibling| sibling.rfilename == file) {
            return Ok(None);
        }
        let bytes = hub::fetch(&commit, file, limit, dir, &ProgressBar::hidden()).map_err(|e| e.to_string());
        bytes.and_then(|path| fs::read(path).map_err(|e| e.to_string())).map(Some)
    };
    let required = |file: &str, limit: u64| get(file, limit)?.ok_or_else(|| format!("the repository has no {file}"));
    Ok(AdapterFiles {
        config: required(peft_config::FILE, peft_config::MAX_FILE_BYTES)?,
        weights: required(WEIGHTS_FILE, max_weights_bytes)?,
        manifest: get(manifest::FILE, manifest::MAX_FILE_BYTES)?,
    })
}
