//! From the bytes of an adapter's files to an [`Adapter`]; the arithmetic of each method is in `methods`.
//!
//! Nothing in the files is trusted: sizes are checked before memory is taken.

use safetensors::SafeTensors;
use tracing::info;

use super::canonical::{Adapter, Coverage};
use super::error::AdapterError;
use super::files::AdapterFiles;
use super::manifest::AdapterManifest;
use super::methods::{adalora, ia3, lora, miss, prelude, vera};
use super::peft_config::PeftConfig;
use super::tensors::Tensors;
use super::weights_header::{self, PREFIX_BYTES};
use crate::model::BaseWeights;

/// Turns the files into the adapter called `name` and checks that it fits the base in every part.
///
/// # Errors
/// When a file is damaged, or the adapter asks for what this server or this base cannot do.
pub fn load(name: &str, files: &AdapterFiles, base: &dyn BaseWeights) -> Result<Adapter, AdapterError> {
    let manifest = files.manifest.as_deref().map(AdapterManifest::parse).transpose()?.unwrap_or_default();
    if let Some(expected) = &manifest.sha256 {
        files.check_digest(expected)?;
    }
    let config = PeftConfig::parse(&files.config)?;
    let weights = parse_weights(&files.weights)?;
    let mut tensors = Tensors::of(&weights, matches!(config, PeftConfig::AdaLora(_)))?;
    tensors.take_apart(base.spec())?;
    let replaces_head = matches!(&config, PeftConfig::Lora(config) if config.replaces_head);
    for key in tensors.leave_out_base(base, replaces_head)? {
        info!("adapter {name}: {key} is the base's own matrix and is left out");
    }
    let mut adapter = match &config {
        PeftConfig::Lora(config) => lora::load(config, tensors, base)?,
        PeftConfig::AdaLora(config) => adalora::load(config, tensors, base.spec())?,
        PeftConfig::Vera(config) => vera::load(config, tensors, base.spec())?,
        PeftConfig::Miss(config) => miss::load(config, tensors, base.spec())?,
        PeftConfig::Ia3(config) => ia3::load(config, tensors, base.spec())?,
        PeftConfig::Prelude(config) => prelude::load(config, tensors, base.spec())?,
    };
    adapter.name = name.to_string();
    adapter.generation = files.generation();
    adapter.manifest = manifest;
    adapter.coverage = Coverage::of(&adapter);
    Ok(adapter)
}

fn parse_weights(bytes: &[u8]) -> Result<SafeTensors<'_>, AdapterError> {
    let file_len = bytes.len() as u64;
    let header_len = weights_header::length(bytes, file_len)?;
    weights_header::parse(&bytes[PREFIX_BYTES..][..header_len], file_len)?;
    SafeTensors::deserialize(bytes).map_err(AdapterError::header)
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
