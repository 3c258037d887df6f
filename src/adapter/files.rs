//! The files of an adapter's folder, read whole and within limits before anything looks into them.
//!
//! Pickles are never opened: opening one can run code.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::Path;

use sha2::{Digest, Sha256};

use super::error::AdapterError;
use super::{manifest, peft_config};

pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
const MAX_WEIGHTS_BYTES: u64 = 4 << 30;

/// What an adapter is made of: the bytes of its files.
#[derive(Debug)]
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
        let config = read_file(dir, peft_config::FILE, peft_config::MAX_FILE_BYTES)?.ok_or_else(|| {
            let hint = "an adapter is a folder as PEFT's save_pretrained writes it".to_string();
            AdapterError::Missing { file: peft_config::FILE, hint }
        })?;
        let manifest = read_file(dir, manifest::FILE, manifest::MAX_FILE_BYTES)?;
        let weights = read_file(dir, WEIGHTS_FILE, MAX_WEIGHTS_BYTES)?
            .ok_or_else(|| AdapterError::Missing { file: WEIGHTS_FILE, hint: missing_weights_hint(dir) })?;
        Ok(Self { config, manifest, weights })
    }

    /// SHA-256 over all files, hexadecimal.
    pub fn generation(&self) -> String {
        let mut files = vec![self.config.as_slice(), self.weights.as_slice()];
        files.extend(self.manifest.as_deref());
        generation(&files)
    }
}

/// Reads a file of at most `limit` bytes whole; `None` if there is none.
fn read_file(dir: &Path, file: &'static str, limit: u64) -> Result<Option<Vec<u8>>, AdapterError> {
    let unreadable = |source| AdapterError::Unreadable { file, source };
    let path = dir.join(file);
    // Before opening: opening a pipe would wait for a writer.
    let metadata = match fs::metadata(&path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        found => found.map_err(unreadable)?,
    };
    if !metadata.is_file() {
        return Err(AdapterError::NotAFile { file });
    }
    if metadata.len() > limit {
        return Err(AdapterError::TooLarge { file, limit });
    }
    let mut bytes = Vec::with_capacity(usize::try_from(metadata.len()).unwrap_or_default());
    // One byte more than allowed: the file may have grown since.
    File::open(&path).and_then(|opened| opened.take(limit + 1).read_to_end(&mut bytes)).map_err(unreadable)?;
    if bytes.len() as u64 > limit {
        return Err(AdapterError::TooLarge { file, limit });
    }
    Ok(Some(bytes))
}

fn missing_weights_hint(dir: &Path) -> String {
    let pickle = ["adapter_model.bin", "adapter_model.pt"].into_iter().find(|file| dir.join(file).exists());
    match pickle {
        Some(file) => format!("{file} is a pickle, which can run code when opened: convert it to safetensors"),
        None => "the adapter's weights are read from there only".to_string(),
    }
}

/// SHA-256 over the files, each preceded by its length so that bytes cannot move from one into the next.
fn generation(files: &[&[u8]]) -> String {
    let mut hasher = Sha256::new();
    for bytes in files {
        hasher.update((bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    }
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generation_depends_on_where_one_file_ends() {
        assert_eq!(generation(&[b"ab", b"c"]).len(), 64);
        assert_ne!(generation(&[b"ab", b"c"]), generation(&[b"a", b"bc"]));
        assert_ne!(generation(&[b"ab", b"c"]), generation(&[b"ab", b"c", b""]));
    }

    #[test]
    fn a_file_above_its_limit_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(manifest::FILE), [b'#'; 11]).unwrap();
        assert!(read_file(dir.path(), manifest::FILE, 11).unwrap().is_some());
        assert!(matches!(read_file(dir.path(), manifest::FILE, 10), Err(AdapterError::TooLarge { .. })));
        assert!(read_file(dir.path(), WEIGHTS_FILE, 10).unwrap().is_none());
    }

    #[test]
    fn a_folder_in_place_of_a_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join(WEIGHTS_FILE)).unwrap();
        assert!(matches!(read_file(dir.path(), WEIGHTS_FILE, 10), Err(AdapterError::NotAFile { .. })));
    }
}
