//! The promises of the design on the CPU, with every instruction set it has.

mod events;
mod promised;
mod shapes;
mod tiny;

use kernels::Isa;
use tiny::Place;

/// Where a row runs alone, and where it then runs among others.
fn places() -> Vec<(Place, Vec<Place>)> {
    let threads = |isa| [1, 2, 3].map(|num_threads| Place::Host(isa, num_threads)).to_vec();
    Isa::available().map(|isa| (Place::Host(isa, 1), threads(isa))).collect()
}

/// Every how many adapters are used where not all are.
const ADAPTER_STEP: usize = 1;

/// Where the engine runs.
fn engine_place() -> Place {
    Place::Host(Isa::detect(), 2)
}
