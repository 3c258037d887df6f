//! The promises of the design on the CUDA kernels, which the CPU runs, or a card (`make test-gpu`).

mod events;
mod promised;
mod shapes;
mod tiny;

use tiny::{Place, gpu};

/// Where a row runs alone, and where it then runs among others.
fn places() -> Vec<(Place, Vec<Place>)> {
    vec![(gpu(), vec![gpu()])]
}

/// Every how many adapters are used where not all are.
const ADAPTER_STEP: usize = 4;

/// Where the engine runs.
fn engine_place() -> Place {
    gpu()
}
