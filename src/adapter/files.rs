//! The files of an adapter's folder, read whole and within limits before anything looks into them.
//!
//! Everything is read through one handle of the folder, so that a rename in between cannot mix two adapters, and a link
//! that leads out of the folder is refused. Pickles are never opened: opening one can run code.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, SystemTime};

use cap_std::ambient_authority;
use cap_std::fs::{Dir, Metadata};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tracing::info;

use super::error::AdapterError;
use super::manifest::AdapterManifest;
use super::root;
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
/// Readings of files that change meanwhile, before giving up for now.
const MAX_READINGS: usize = 4;
/// How far below a folder it is looked for adapters in it: `checkpoint-500/sql`, and one more …
const MAX_NESTING: usize = 3;
/// … and at how many entries.
const MAX_NESTED_ENTRIES: usize = 1000;
/// So many of what was found are named.
const MAX_NAMED: usize = 3;

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

    /// Reads files that others may be writing: again when they changed meanwhile. Returns what they were read as, where that
    /// can be said.
    pub fn read_settled(folder: &Dir, max_weights_bytes: u64) -> (Option<Fingerprint>, Result<Self, AdapterError>) {
        match Self::settled(folder, max_weights_bytes) {
            Ok((fingerprint, files)) => (Some(fingerprint), files),
            Err(e) => (None, Err(e)),
        }
    }

    fn settled(
        folder: &Dir,
        max_weights_bytes: u64,
    ) -> Result<(Fingerprint, Result<Self, AdapterError>), AdapterError> {
        let mut before = Fingerprint::of(folder)?;
        for _ in 0..MAX_READINGS {
            if before.is_fresh() {
                thread::sleep(TIMESTAMP_GRAIN);
                before = Fingerprint::of(folder)?;
            }
            let files = Self::read_from(folder, max_weights_bytes);
            let after = Fingerprint::of(folder)?;
            if before == after {
                return Ok((before, files));
            }
            before = after;
        }
        Ok((before, Err(AdapterError::Unsettled)))
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

    /// Writes the files into an empty folder. They are on the disk then: whoever renames the folder into place may rely on it.
    pub fn write(&self, folder: &Dir) -> io::Result<()> {
        let manifest = self.manifest.as_ref().map(|manifest| (manifest::FILE, manifest));
        for (name, bytes) in
            [(peft_config::FILE, &self.config), (WEIGHTS_FILE, &self.weights)].into_iter().chain(manifest)
        {
            let mut file = folder.create(name)?;
            file.write_all(bytes)?;
            file.sync_all()?;
        }
        root::sync(folder)
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
            let read = Read::by_ref(&mut weights).take(limit as u64).read_to_end(&mut bytes);
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
    // Another one after the disk was mounted again, or the files were copied to another.
    #[serde(skip)]
    device: u64,
    #[serde(skip)]
    inode: u64,
    len: u64,
    modified: SystemTime,
}

impl Fingerprint {
    /// # Errors
    /// When it cannot be said what is there, which is not the same as nothing.
    pub fn of(folder: &Dir) -> Result<Self, AdapterError> {
        let [config, weights, manifest] = FILES.map(|file| match folder.metadata(file) {
            Ok(metadata) => Ok(Some(Stamp::of(&metadata))),
            // A link that leads nowhere, or outside, is none of the files.
            Err(e) if e.kind() == ErrorKind::NotFound || leads_outside(&e) => Ok(None),
            Err(source) => Err(AdapterError::Unreadable { file, source }),
        });
        Ok(Self([config?, weights?, manifest?]))
    }

    /// As it is kept in a file, where disks and numbers of files may be others when it is read again.
    pub fn is_recorded_as(&self, record: &Self) -> bool {
        let kept = |stamp: &Stamp| (stamp.len, stamp.modified);
        self.0.each_ref().map(|stamp| stamp.as_ref().map(kept))
            == record.0.each_ref().map(|stamp| stamp.as_ref().map(kept))
    }

    pub fn has_files(&self) -> bool {
        self.0.iter().any(Option::is_some)
    }

    /// Whether the folder holds an adapter, or what is left of one, or one in a form that is not read.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn is_adapter(&self, folder: &Dir) -> Result<bool, AdapterError> {
        let [config, weights, _] = &self.0;
        // A link that leads nowhere has no stamp.
        let is_linked = || FILES[..2].iter().any(|file| folder.symlink_metadata(file).is_ok());
        Ok(config.is_some()
            || weights.is_some()
            || is_linked()
            || foreign_file(folder).map_err(AdapterError::Folder)?.is_some())
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
    let hint = || "an adapter is a folder as PEFT's save_pretrained writes it".to_string();
    let foreign = || foreign_file(folder).ok().flatten();
    AdapterError::Missing { file: peft_config::FILE, hint: foreign().or_else(|| nested(folder)).unwrap_or_else(hint) }
}

fn missing_weights(folder: &Dir) -> AdapterError {
    let hint = || "the adapter's weights are read from there only".to_string();
    let foreign = foreign_file(folder).ok().flatten();
    AdapterError::Missing { file: WEIGHTS_FILE, hint: foreign.unwrap_or_else(hint) }
}

/// Says which files of an adapter have no part in it, where there are any.
pub fn report_left_out(name: &str, folder: &Dir) {
    let left_out = left_out(folder);
    if !left_out.is_empty() {
        info!("adapter {name}: {} not read: tokenizer and chat template are those of the base", left_out.join(", "));
    }
    if let Some(nested) = nested(folder) {
        info!("adapter {name}: {nested}");
    }
}

/// Says which folders in this one hold adapters, and what to do with them; `None` if none does.
pub fn nested(folder: &Dir) -> Option<String> {
    let found = nested_adapters(folder);
    let named = found.iter().take(MAX_NAMED).map(String::as_str).collect::<Vec<_>>().join(", ");
    let more = match found.len().saturating_sub(MAX_NAMED) {
        0 => String::new(),
        num_more => format!(" and {num_more} more"),
    };
    let advice = "what lies deeper than one folder below that of the adapters is not served: move the one that is wanted, or a \
                  link to it, up there, or install it by its path";
    (!found.is_empty()).then(|| format!("{named}{more} in it hold adapters, but {advice}"))
}

/// The folders in this one that hold an adapter, nearest first: PEFT saves several adapters so, and trainers checkpoints.
fn nested_adapters(folder: &Dir) -> Vec<String> {
    let mut found = Vec::new();
    let mut num_entries = 0;
    let mut to_look_into = VecDeque::from([(PathBuf::from("."), 0)]);
    while let Some((path, depth)) = to_look_into.pop_front() {
        // What cannot be read holds nothing that could be served.
        let Ok(entries) = folder.read_dir(&path) else { continue };
        let entries: Vec<_> = entries.flatten().take(MAX_NESTED_ENTRIES - num_entries).collect();
        num_entries += entries.len();
        let folders = entries.iter().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        let mut names: Vec<OsString> = folders.map(|entry| entry.file_name()).collect();
        names.retain(|name| !root::is_hidden(name));
        names.sort_unstable();
        for name in names {
            let inside = if depth == 0 { PathBuf::from(name) } else { path.join(name) };
            if folder.symlink_metadata(inside.join(peft_config::FILE)).is_ok() {
                found.push(root::as_text(inside.as_os_str()));
            } else if depth + 1 < MAX_NESTING {
                to_look_into.push_back((inside, depth + 1));
            }
        }
    }
    found
}

fn left_out(folder: &Dir) -> Vec<&'static str> {
    OF_BASE.into_iter().filter(|file| folder.symlink_metadata(file).is_ok()).collect()
}

/// Weights in a form that is not read, and what to do with them; `None` if the folder holds none.
fn foreign_file(folder: &Dir) -> io::Result<Option<String>> {
    let entries = folder.entries()?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let mut names: Vec<String> = entries.collect::<io::Result<_>>()?;
    names.sort_unstable();
    Ok(names.into_iter().find_map(|name| {
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
    }))
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
        let mut seen = vec![Some(Fingerprint::of(&folder).unwrap())];
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
    fn a_folder_is_an_adapter_by_its_own_files_and_may_hold_others() {
        for (paths, is_adapter, is_nested) in [
            (&["README.md", "sub/notes.txt", ".hidden/adapter_config.json"][..], false, false),
            (&["a/b/c/d/adapter_config.json"][..], false, false),
            (&["checkpoint-500/adapter_config.json"][..], false, true),
            (&["checkpoint-500/sql/adapter_config.json"][..], false, true),
            (&["adapter_model.safetensors"][..], true, false),
            (&["adapter.gguf", "checkpoint-500/adapter_config.json"][..], true, true),
        ] {
            let (_dir, folder) = folder();
            for path in paths {
                folder.create_dir_all(Path::new(path).parent().unwrap()).unwrap();
                folder.write(path, b"{}").unwrap();
            }
            let fingerprint = Fingerprint::of(&folder).unwrap();
            assert_eq!(fingerprint.is_adapter(&folder).unwrap(), is_adapter, "{paths:?}");
            assert_eq!(nested(&folder).is_some(), is_nested, "{paths:?}");
        }
    }

    #[test]
    fn adapters_in_the_folders_of_a_folder_are_named_with_what_to_do() {
        let (_dir, folder) = folder();
        for inside in ["z/sql", "checkpoint-2", "checkpoint-1", "deep/er/still", "x/style"] {
            folder.create_dir_all(inside).unwrap();
            folder.write(format!("{inside}/adapter_config.json"), b"{}").unwrap();
        }
        let refusal = AdapterFiles::read_settled(&folder, 10).1.unwrap_err().to_string();
        let named =
            "adapter_config.json is missing: checkpoint-1, checkpoint-2, x/style and 2 more in it hold adapters";
        assert!(refusal.starts_with(named) && refusal.contains("move"), "{refusal}");
    }

    // Elsewhere every name is text.
    #[cfg(target_os = "linux")]
    #[test]
    fn adapters_in_folders_whose_names_are_no_text_are_named_too() {
        use std::os::unix::ffi::OsStrExt;
        let (_dir, folder) = folder();
        for inside in [&b"caf\xe9"[..], b"z\xff/sql"] {
            let inside = Path::new(std::ffi::OsStr::from_bytes(inside));
            folder.create_dir_all(inside).unwrap();
            folder.write(inside.join(peft_config::FILE), b"{}").unwrap();
        }
        assert!(nested(&folder).unwrap().starts_with(r"caf\xe9, z\xff/sql in it"), "{:?}", nested(&folder));
    }

    #[cfg(unix)]
    #[test]
    fn what_cannot_be_looked_at_is_not_taken_for_missing() {
        let (dir, folder) = folder();
        assert!(!Fingerprint::of(&folder).unwrap().has_files());
        for file in FILES {
            // The system's own error, also for who may read everything: a link that leads to itself.
            std::os::unix::fs::symlink(file, dir.path().join(file)).unwrap();
            let error = Fingerprint::of(&folder).unwrap_err();
            assert!(error.may_pass() && error.to_string().contains(file), "{error}");
            let (fingerprint, files) = AdapterFiles::read_settled(&folder, 10);
            assert!(fingerprint.is_none() && files.unwrap_err().may_pass());
            folder.remove_file(file).unwrap();
        }
    }

    #[test]
    fn a_record_holds_on_another_disk_and_not_for_other_files() {
        let (_dir, folder) = folder();
        folder.write(WEIGHTS_FILE, b"1").unwrap();
        let fingerprint = Fingerprint::of(&folder).unwrap();
        let record: Fingerprint = serde_json::from_slice(&serde_json::to_vec(&fingerprint).unwrap()).unwrap();
        assert!(fingerprint != record && fingerprint.is_recorded_as(&record));
        folder.write(WEIGHTS_FILE, b"12").unwrap();
        assert!(!Fingerprint::of(&folder).unwrap().is_recorded_as(&record));
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
