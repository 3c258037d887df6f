//! The promises of the design on the CUDA kernels, which the CPU runs, or a card (`make test-gpu`), with every type of keys and
//! values they have.

mod events;
mod promised;
mod shapes;
mod tiny;

use kernels::attention::KvType;
use tiny::{Place, gpu};

/// Where a row runs alone, and where it then runs among others.
fn places() -> Vec<(Place, Vec<Place>)> {
    [KvType::Q8_0, KvType::F16].map(gpu).map(|place| (place, vec![place])).to_vec()
}

/// Every how many adapters are used where not all are.
const ADAPTER_STEP: usize = 4;

/// Where the engine runs.
fn engine_place() -> Place {
    gpu(KvType::F16)
}
