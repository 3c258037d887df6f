//! From the bytes of an adapter's files to an [`Adapter`]; the arithmetic of each method is in `methods`.
//!
//! Nothing in the files is trusted: sizes are checked before memory is taken.

use safetensors::SafeTensors;
use safetensors::tensor::Metadata;

use super::canonical::Adapter;
use super::error::AdapterError;
use super::files::{AdapterFiles, WEIGHTS_FILE};
use super::manifest::AdapterManifest;
use super::methods::lora;
use super::peft_config::LoraConfig;
use crate::model::BaseWeights;

const MAX_HEADER_BYTES: usize = 16 << 20;
const HEADER_LENGTH_BYTES: usize = 8;

/// Turns the files into the adapter called `name` and checks that it fits the base in every part.
///
/// # Errors
/// When a file is damaged, or the adapter asks for what this server or this base cannot do.
pub fn load(name: &str, files: &AdapterFiles, base: &dyn BaseWeights) -> Result<Adapter, AdapterError> {
    let config = LoraConfig::parse(&files.config)?;
    let manifest = files.manifest.as_deref().map(AdapterManifest::parse).transpose()?.unwrap_or_default();
    let tensors = parse_weights(&files.weights)?;
    let (layers, coverage) = lora::deltas(&config, &tensors, base.spec())?;
    Ok(Adapter {
        name: name.to_string(),
        generation: files.generation(),
        layers,
        embedding: None,
        head: None,
        prelude: None,
        coverage,
        manifest,
    })
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
