//! From a folder on disk to an [`Adapter`]: file safety here, the arithmetic of each method in `methods`.
//!
//! Nothing in the files is trusted: sizes are checked before memory is taken, and pickles are never opened.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::Metadata;
use sha2::{Digest, Sha256};

use super::canonical::Adapter;
use super::error::AdapterError;
use super::manifest::{self, AdapterManifest};
use super::methods::lora;
use super::peft_config::{self, LoraConfig};
use crate::model::spec::ModelSpec;

pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
const MAX_WEIGHTS_BYTES: u64 = 4 << 30;
const MAX_HEADER_BYTES: usize = 16 << 20;
const HEADER_LENGTH_BYTES: usize = 8;

/// Loads the adapter in `dir` under `name` and checks that it fits the base in every part.
///
/// # Errors
/// When a file is missing, damaged or too large, or the adapter asks for what this server or this base cannot do.
pub fn load(dir: &Path, name: &str, spec: &ModelSpec) -> Result<Adapter, AdapterError> {
    let config_text = read_file(dir, peft_config::FILE, peft_config::MAX_FILE_BYTES)?.ok_or_else(|| {
        let hint = "an adapter is a folder as PEFT's save_pretrained writes it".to_string();
        AdapterError::Missing { file: peft_config::FILE, hint }
    })?;
    let config = LoraConfig::parse(&config_text)?;
    let manifest_text = read_file(dir, manifest::FILE, manifest::MAX_FILE_BYTES)?;
    let manifest = manifest_text.as_deref().map(AdapterManifest::parse).transpose()?.unwrap_or_default();
    let weights = read_file(dir, WEIGHTS_FILE, MAX_WEIGHTS_BYTES)?
        .ok_or_else(|| AdapterError::Missing { file: WEIGHTS_FILE, hint: missing_weights_hint(dir) })?;

    let tensors = parse_weights(&weights)?;
    let (layers, coverage) = lora::deltas(&config, &tensors, spec)?;
    let mut files = vec![config_text.as_slice(), weights.as_slice()];
    files.extend(manifest_text.as_deref());
    Ok(Adapter { name: name.to_string(), generation: generation(&files), layers, coverage, manifest })
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

fn parse_weights(bytes: &[u8]) -> Result<SafeTensors<'_>, AdapterError> {
    let file = WEIGHTS_FILE;
    let bad_header = |reason: String| AdapterError::Header { file, reason };
    if bytes.is_empty() {
        return Err(AdapterError::Empty { file });
    }
    if bytes.starts_with(b"version https://git-lfs") {
        return Err(AdapterError::LfsPointer { file });
    }
    let Some((length, rest)) = bytes.split_first_chunk::<HEADER_LENGTH_BYTES>() else {
        return Err(bad_header(format!("the file has {} bytes only", bytes.len())));
    };
    let length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
    if length > MAX_HEADER_BYTES {
        return Err(bad_header(format!("its length of {length} bytes is above the {MAX_HEADER_BYTES} allowed")));
    }
    let Some((header, data)) = rest.split_at_checked(length) else {
        return Err(bad_header(format!("its length of {length} bytes reaches beyond the end of the file")));
    };
    let metadata: Metadata = serde_json::from_slice(header).map_err(|e| bad_header(e.to_string()))?;
    if metadata.data_len() > data.len() {
        return Err(AdapterError::Truncated { file, expected: metadata.data_len(), found: data.len() });
    }
    SafeTensors::deserialize(bytes).map_err(|e| bad_header(e.to_string()))
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
    use proptest::prelude::*;
    use safetensors::tensor::{Dtype, TensorView, serialize};

    fn weights() -> Vec<u8> {
        let data = [0u8; 12];
        let view = |shape| TensorView::new(Dtype::F16, shape, &data).unwrap();
        serialize([("a", view(vec![2, 3])), ("b", view(vec![6]))], None).unwrap()
    }

    fn refusal(bytes: &[u8]) -> String {
        parse_weights(bytes).unwrap_err().to_string()
    }

    #[test]
    fn damaged_weights_are_refused_with_their_cause() {
        let good = weights();
        assert_eq!(parse_weights(&good).unwrap().len(), 2);
        assert!(refusal(b"").contains("empty"));
        assert!(refusal(&good[..5]).contains("header"));
        assert!(refusal(&good[..20]).contains("header"));
        assert!(refusal(&good[..good.len() - 1]).contains("truncated"));
        assert!(refusal(&[good.as_slice(), &[0]].concat()).contains("header"));
        assert!(refusal(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n").contains("LFS"));
        assert!(refusal(&[&(1u64 << 60).to_le_bytes(), &good[8..]].concat()).contains("header"));
    }

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

    proptest! {
        #[test]
        fn damaged_weights_never_panic(at in any::<prop::sample::Index>(), byte: u8, cut in any::<prop::sample::Index>()) {
            let mut bytes = weights();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            if let Ok(tensors) = parse_weights(&bytes) {
                prop_assert!(tensors.iter().all(|(_, view)| view.data().len() <= bytes.len()));
            }
            let _ = parse_weights(&bytes[..cut.index(bytes.len())]);
        }
    }
}
