//! The promises of the design on the CPU, with every instruction set and every type of keys and values it has.

mod events;
mod promised;
mod shapes;
mod tiny;

use kernels::Isa;
use tiny::Place;

/// Where a row runs alone, and where it then runs among others.
fn places() -> Vec<(Place, Vec<Place>)> {
    let of = |place: fn(Isa, usize) -> Place| {
        Isa::available().map(move |isa| (place(isa, 1), [1, 2, 3].map(|num_threads| place(isa, num_threads)).to_vec()))
    };
    of(Place::HostQ8).chain(of(Place::Host)).collect()
}

/// Every how many adapters are used where not all are.
const ADAPTER_STEP: usize = 1;

/// Where the engine runs.
fn engine_place() -> Place {
    Place::Host(Isa::detect(), 2)
}
