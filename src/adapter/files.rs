//! The files of an adapter's folder, read whole and within limits before anything looks into them.
//!
//! Everything is read through one handle of the folder, so that a rename in between cannot mix two adapters, and a link
//! that leads out of the folder is refused. Pickles are never opened: opening one can run code.

use std::io::{self, ErrorKind, Read};
use std::path::Path;
use std::thread;
use std::time::{Duration, SystemTime};

use cap_std::ambient_authority;
use cap_std::fs::{Dir, Metadata};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tracing::info;

use super::error::AdapterError;
use super::manifest::AdapterManifest;
use super::weights_header::{self, PREFIX_BYTES};
use super::{manifest, peft_config};
use crate::hexadecimal::hexadecimal;

pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
pub const FILES: [&str; 3] = [peft_config::FILE, WEIGHTS_FILE, manifest::FILE];
/// The name that MLX gives to an adapter's weights.
const MLX_WEIGHTS_FILE: &str = "adapters.safetensors";
/// What trainers leave beside an adapter of a tokenizer and a template, which are the base's here.
const OF_BASE: [&str; 9] = [
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
];
const MAX_WEIGHTS_BYTES: u64 = 4 << 30;

/// Two writes within this time may leave the same modification time.
const TIMESTAMP_GRAIN: Duration = Duration::from_millis(20);
/// Readings of files that change meanwhile, before giving up until they change again.
const MAX_READINGS: usize = 4;

/// What an adapter is made of: the bytes of its files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterFiles {
    /// `adapter_config.json`
    pub config: Vec<u8>,
    /// `adapter.toml`, where there is one.
    pub manifest: Option<Vec<u8>>,
    /// `adapter_model.safetensors`
    pub weights: Vec<u8>,
}

impl AdapterFiles {
    /// # Errors
    /// When a file is missing, no regular file or above its limit, or cannot be read.
    pub fn read(dir: &Path) -> Result<Self, AdapterError> {
        let folder = Dir::open_ambient_dir(dir, ambient_authority()).map_err(AdapterError::Folder)?;
        Self::read_from(&folder, MAX_WEIGHTS_BYTES)
    }

    fn read_from(folder: &Dir, max_weights_bytes: u64) -> Result<Self, AdapterError> {
        let config =
            read_file(folder, peft_config::FILE, peft_config::MAX_FILE_BYTES)?.ok_or_else(|| missing_config(folder))?;
        let manifest = read_file(folder, manifest::FILE, manifest::MAX_FILE_BYTES)?;
        let weights = read_file(folder, WEIGHTS_FILE, max_weights_bytes)?.ok_or_else(|| missing_weights(folder))?;
        Ok(Self { config, manifest, weights })
    }

    /// Reads files that others may be writing: again when they changed meanwhile. Returns what they were read as.
    pub fn read_settled(folder: &Dir, max_weights_bytes: u64) -> (Fingerprint, Result<Self, AdapterError>) {
        let mut before = Fingerprint::of(folder);
        for _ in 0..MAX_READINGS {
            if before.is_fresh() {
                thread::sleep(TIMESTAMP_GRAIN);
                before = Fingerprint::of(folder);
            }
            let files = Self::read_from(folder, max_weights_bytes);
            let after = Fingerprint::of(folder);
            if before == after {
                return (before, files);
            }
            before = after;
        }
        (before, Err(AdapterError::Unsettled))
    }

    /// SHA-256 over all files, hexadecimal.
    pub fn generation(&self) -> String {
        let mut files = vec![self.config.as_slice(), self.weights.as_slice()];
        files.extend(self.manifest.as_deref());
        generation(&files)
    }

    /// Compares the weights with the SHA-256 that the manifest promises, hexadecimal.
    ///
    /// # Errors
    /// When they are not those.
    pub fn check_digest(&self, expected: &str) -> Result<(), AdapterError> {
        let found = hexadecimal(Sha256::new_with_prefix(&self.weights));
        if found.eq_ignore_ascii_case(expected) {
            return Ok(());
        }
        let reason = format!("{WEIGHTS_FILE} has {found}: copy it again");
        Err(AdapterError::Manifest { key: "sha256", reason })
    }

    pub fn write(&self, folder: &Dir) -> io::Result<()> {
        folder.write(peft_config::FILE, &self.config)?;
        folder.write(WEIGHTS_FILE, &self.weights)?;
        self.manifest.as_ref().map_or(Ok(()), |manifest| folder.write(manifest::FILE, manifest))
    }
}

/// What is known of an adapter without reading its weights.
#[derive(Debug)]
pub struct Glance {
    pub manifest: AdapterManifest,
    /// About what it will take in memory.
    pub resident_bytes: u64,
}

impl Glance {
    /// Reads `adapter.toml` and the header of the weights.
    ///
    /// # Errors
    /// What can be seen to be wrong there.
    pub fn at(folder: &Dir, max_weights_bytes: u64) -> Result<Self, AdapterError> {
        open_file(folder, peft_config::FILE, peft_config::MAX_FILE_BYTES)?.ok_or_else(|| missing_config(folder))?;
        let manifest = read_file(folder, manifest::FILE, manifest::MAX_FILE_BYTES)?;
        let manifest = manifest.as_deref().map(AdapterManifest::parse).transpose()?.unwrap_or_default();
        let (mut weights, len) =
            open_file(folder, WEIGHTS_FILE, max_weights_bytes)?.ok_or_else(|| missing_weights(folder))?;
        let mut read = |limit: usize| {
            let mut bytes = Vec::with_capacity(limit);
            let read = weights.by_ref().take(limit as u64).read_to_end(&mut bytes);
            read.map(|_| bytes).map_err(|source| AdapterError::Unreadable { file: WEIGHTS_FILE, source })
        };
        let header_len = weights_header::length(&read(PREFIX_BYTES)?, len)?;
        let metadata = weights_header::parse(&read(header_len)?, len)?;
        Ok(Self { manifest, resident_bytes: weights_header::resident_bytes(&metadata) })
    }
}

/// By which a change of the files is noticed without reading them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint([Option<Stamp>; FILES.len()]);

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    device: u64,
    inode: u64,
    len: u64,
    modified: SystemTime,
}

impl Fingerprint {
    pub fn of(folder: &Dir) -> Self {
        Self(FILES.map(|file| folder.metadata(file).ok().map(|metadata| Stamp::of(&metadata))))
    }

    /// Whether the folder holds an adapter or what is left of one.
    pub fn is_adapter(&self, folder: &Dir) -> bool {
        let [config, weights, _] = &self.0;
        // A link that leads nowhere has no stamp.
        config.is_some()
            || weights.is_some()
            || FILES[..2].iter().any(|file| folder.symlink_metadata(file).is_ok())
            || foreign_file(folder).is_some()
    }

    /// Whether a file was written so recently that a further write might not show.
    fn is_fresh(&self) -> bool {
        let now = SystemTime::now();
        let age = |stamp: &Stamp| now.duration_since(stamp.modified).ok();
        self.0.iter().flatten().filter_map(age).any(|age| age < TIMESTAMP_GRAIN)
    }
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        #[cfg(unix)]
        let (device, inode) = {
            use cap_std::fs::MetadataExt as _;
            (metadata.dev(), metadata.ino())
        };
        #[cfg(not(unix))]
        let (device, inode) = (0, 0);
        let modified = metadata.modified().map_or(SystemTime::UNIX_EPOCH, cap_std::time::SystemTime::into_std);
        Self { device, inode, len: metadata.len(), modified }
    }
}

/// Opens a file of at most `limit` bytes and says how long it is; `None` if there is none.
fn open_file(folder: &Dir, file: &'static str, limit: u64) -> Result<Option<(cap_std::fs::File, u64)>, AdapterError> {
    // Before opening: opening a pipe would wait for a writer.
    let metadata = match folder.metadata(file) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) if leads_outside(&e) => return Err(AdapterError::LeadsOutside { file }),
        found => found.map_err(|source| AdapterError::Unreadable { file, source })?,
    };
    if !metadata.is_file() {
        return Err(AdapterError::NotAFile { file });
    }
    if metadata.len() > limit {
        return Err(AdapterError::TooLarge { file, limit });
    }
    let opened = folder.open(file).map_err(|source| AdapterError::Unreadable { file, source })?;
    Ok(Some((opened, metadata.len())))
}

/// Reads a file of at most `limit` bytes whole; `None` if there is none.
fn read_file(folder: &Dir, file: &'static str, limit: u64) -> Result<Option<Vec<u8>>, AdapterError> {
    let Some((opened, len)) = open_file(folder, file, limit)? else { return Ok(None) };
    let mut bytes = Vec::with_capacity(usize::try_from(len).unwrap_or_default());
    // One byte more than allowed: the file may have grown since.
    opened
        .take(limit.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(|source| AdapterError::Unreadable { file, source })?;
    if bytes.len() as u64 > limit {
        return Err(AdapterError::TooLarge { file, limit });
    }
    Ok(Some(bytes))
}

/// A handle refuses what leads out of its folder with an error of its own, without a number of the system.
pub fn leads_outside(error: &io::Error) -> bool {
    error.kind() == ErrorKind::PermissionDenied && error.raw_os_error().is_none()
}

fn missing_config(folder: &Dir) -> AdapterError {
    let hint = "an adapter is a folder as PEFT's save_pretrained writes it".to_string();
    AdapterError::Missing { file: peft_config::FILE, hint: foreign_file(folder).unwrap_or(hint) }
}

fn missing_weights(folder: &Dir) -> AdapterError {
    let hint = "the adapter's weights are read from there only".to_string();
    AdapterError::Missing { file: WEIGHTS_FILE, hint: foreign_file(folder).unwrap_or(hint) }
}

/// Says which files of an adapter have no part in it, where there are any.
pub fn report_left_out(name: &str, folder: &Dir) {
    let left_out = left_out(folder);
    if !left_out.is_empty() {
        info!("adapter {name}: {} not read: tokenizer and chat template are those of the base", left_out.join(", "));
    }
}

fn left_out(folder: &Dir) -> Vec<&'static str> {
    OF_BASE.into_iter().filter(|file| folder.symlink_metadata(file).is_ok()).collect()
}

/// Weights in a form that is not read, and what to do with them; `None` if the folder holds none.
fn foreign_file(folder: &Dir) -> Option<String> {
    let entries = folder.entries().ok()?.filter_map(Result::ok);
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort_unstable();
    names.into_iter().find_map(|name| {
        if name.ends_with(".gguf") {
            return Some(format!(
                "{name} is an adapter of llama.cpp and Ollama: turn it into one by `lorry adapters import`"
            ));
        }
        if name == MLX_WEIGHTS_FILE {
            return Some(format!("{name} is MLX's form of an adapter, which is not read: save it with PEFT"));
        }
        let is_pickle = name.starts_with("adapter_model.") && name != WEIGHTS_FILE;
        is_pickle.then(|| format!("{name} is a pickle, which can run code when opened: convert it to safetensors"))
    })
}

/// SHA-256 over the files, each preceded by its length so that bytes cannot move from one into the next.
fn generation(files: &[&[u8]]) -> String {
    let mut hasher = Sha256::new();
    for bytes in files {
        hasher.update((bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    }
    hexadecimal(hasher)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    fn folder() -> (TempDir, Dir) {
        let dir = tempfile::tempdir().unwrap();
        let folder = Dir::open_ambient_dir(dir.path(), ambient_authority()).unwrap();
        (dir, folder)
    }

    #[test]
    fn a_generation_depends_on_where_one_file_ends() {
        assert_eq!(generation(&[b"ab", b"c"]).len(), 64);
        assert_ne!(generation(&[b"ab", b"c"]), generation(&[b"a", b"bc"]));
        assert_ne!(generation(&[b"ab", b"c"]), generation(&[b"ab", b"c", b""]));
    }

    #[test]
    fn a_file_above_its_limit_is_not_read() {
        let (_dir, folder) = folder();
        folder.write(manifest::FILE, [b'#'; 11]).unwrap();
        assert!(read_file(&folder, manifest::FILE, 11).unwrap().is_some());
        assert!(matches!(read_file(&folder, manifest::FILE, 10), Err(AdapterError::TooLarge { .. })));
        assert!(read_file(&folder, WEIGHTS_FILE, 10).unwrap().is_none());
    }

    #[test]
    fn a_folder_in_place_of_a_file_is_refused() {
        let (_dir, folder) = folder();
        folder.create_dir(WEIGHTS_FILE).unwrap();
        assert!(matches!(read_file(&folder, WEIGHTS_FILE, 10), Err(AdapterError::NotAFile { .. })));
    }

    #[test]
    fn what_trainers_leave_of_a_tokenizer_is_left_out_by_name() {
        let (_dir, folder) = folder();
        FILES.iter().chain(&["README.md"]).for_each(|file| folder.write(file, b"1").unwrap());
        assert!(left_out(&folder).is_empty());
        ["tokenizer.json", "chat_template.jinja"].iter().for_each(|file| folder.write(file, b"1").unwrap());
        assert_eq!(left_out(&folder), ["chat_template.jinja", "tokenizer.json"]);
    }

    #[test]
    fn every_write_changes_the_fingerprint() {
        let (_dir, folder) = folder();
        let mut seen = vec![Fingerprint::of(&folder)];
        for file in FILES {
            folder.write(file, b"1").unwrap();
            seen.push(AdapterFiles::read_settled(&folder, 10).0);
            // The same length, at once.
            folder.write(file, b"2").unwrap();
            seen.push(AdapterFiles::read_settled(&folder, 10).0);
        }
        for (i, one) in seen.iter().enumerate() {
            assert!(seen[..i].iter().all(|other| other != one), "{i}");
        }
    }

    #[test]
    fn weights_are_compared_with_the_digest_of_the_manifest() {
        let files = AdapterFiles { config: Vec::new(), manifest: None, weights: b"abc".to_vec() };
        let right = "BA7816BF8F01CFEA414140DE5DAE2223B00361A396177A9CB410FF61F20015AD";
        assert!(files.check_digest(right).is_ok());
        let refusal = files.check_digest(&right.replace('B', "C")).unwrap_err().to_string();
        assert!(refusal.contains("sha256") && refusal.contains(&right.to_lowercase()), "{refusal}");
    }
}
