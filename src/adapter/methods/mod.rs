//! One file per family of PEFT methods: each turns its tensors into the canonical form.

pub mod adalora;
mod dora;
mod experts;
pub mod ia3;
pub mod lora;
pub mod miss;
pub mod prelude;
pub mod vera;

use super::error::AdapterError;
use super::sites::{EMBEDDING_PATH, HEAD_PATH, Site, Targets};
use crate::model::spec::{ModelSpec, Module};

fn all_sites(spec: &ModelSpec) -> impl Iterator<Item = Site> + use<> {
    let modules: Vec<Module> = spec.modules().collect();
    (0..spec.num_layers).flat_map(move |layer| modules.clone().into_iter().map(move |module| (layer, module)))
}

/// Refuses what names the embedding or the head, where a method is applied to neither.
fn refuse_ends(expected: &Targets, method: &str) -> Result<(), AdapterError> {
    for (is_named, path) in [(expected.embedding, EMBEDDING_PATH), (expected.head, HEAD_PATH)] {
        if is_named {
            let reason = format!("{path} is named: {method} is applied to the layers of decoder blocks only");
            return Err(AdapterError::field("target_modules", reason));
        }
    }
    Ok(())
}
