//! One file per family of PEFT methods: each turns its tensors into the canonical form.

mod dora;
pub mod ia3;
pub mod lora;
pub mod prelude;

use super::canonical::SiteDelta;
use super::sites::Site;
use crate::model::spec::{ModelSpec, Module};

/// `[num_layers][Module as usize]`
type Layers = Vec<[Option<SiteDelta>; Module::ALL.len()]>;

fn no_deltas(spec: &ModelSpec) -> Layers {
    (0..spec.num_layers).map(|_| Default::default()).collect()
}

fn all_sites(spec: &ModelSpec) -> impl Iterator<Item = Site> + use<> {
    let modules: Vec<Module> = spec.modules().collect();
    (0..spec.num_layers).flat_map(move |layer| modules.clone().into_iter().map(move |module| (layer, module)))
}
