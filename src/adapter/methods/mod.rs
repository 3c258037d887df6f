//! One file per family of PEFT methods: each turns its tensors into the canonical form.

mod dora;
mod experts;
pub mod ia3;
pub mod lora;
pub mod prelude;

use super::sites::Site;
use crate::model::spec::{ModelSpec, Module};

fn all_sites(spec: &ModelSpec) -> impl Iterator<Item = Site> + use<> {
    let modules: Vec<Module> = spec.modules().collect();
    (0..spec.num_layers).flat_map(move |layer| modules.clone().into_iter().map(move |module| (layer, module)))
}
