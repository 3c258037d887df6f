//! A step of the decoder that has been seen before takes no memory from the system, whatever adapters run in it.

mod shapes;
mod tiny;

use std::alloc::System;
use std::sync::Arc;
use std::time::Duration;

use candle_core::quantized::GgmlDType;
use kernels::Isa;
use kernels::attention::{BLOCK_SIZE, BlockId};
use kernels::device::Logits;
use lorry::adapter::canonical::Adapter;
use lorry::model::spec::Architecture;
use lorry::model::{AdapterGroup, ForwardBatch, SequenceRows};
use shapes::Shapes;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use tiny::peft::{Kind, PeftAdapter, with_virtual_tokens};
use tiny::{Place, TinyModel, random_tokens};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

// One test: another one beside it would be counted too.
#[test]
fn a_step_allocates_nothing_after_the_first_of_its_size() {
    let model = TinyModel::new(Architecture::Qwen2, GgmlDType::Q4K, 1);
    let base = Shapes(model.spec.clone());
    let load = |kind| Some(PeftAdapter::random(kind, &model.spec, 2).load("adapter", &base));
    let adapters: Vec<Option<Arc<Adapter>>> = std::iter::once(None).chain(Kind::ALL.map(load)).collect();

    // A prompt for the base and for each adapter, one sequence after another.
    let mut tokens = Vec::new();
    let mut groups = Vec::new();
    let tables: Vec<[BlockId; 1]> = (0..adapters.len()).map(|i| [BlockId(i as u32)]).collect();
    let mut sequences = Vec::new();
    for (adapter, block_table) in adapters.iter().zip(&tables) {
        let first = tokens.len();
        tokens.extend(with_virtual_tokens(random_tokens(&model.spec, 6, 3), adapter.as_ref()));
        let rows = first..tokens.len();
        assert!(rows.len() <= BLOCK_SIZE);
        groups.extend(adapter.clone().map(|adapter| AdapterGroup { rows: rows.clone(), adapter }));
        sequences.push(SequenceRows { rows, first_position: 0, block_table });
    }
    let logits_rows: Vec<usize> =
        sequences.iter().flat_map(|sequence| sequence.rows.end - 4..sequence.rows.end).collect();
    let batch = ForwardBatch {
        copies: &[],
        tokens: &tokens,
        sequences: &sequences,
        groups: &groups,
        logits_rows: &logits_rows,
    };

    for isa in Isa::available() {
        let mut decoder = model.load(Place::Host(isa, 2));
        decoder.reserve(adapters.len());
        let mut step = || {
            let mut total = 0.0;
            let mut add = |_, logits: &mut dyn Logits| {
                total += logits.all()?[0];
                Ok(())
            };
            decoder.forward(&batch, &mut add).unwrap();
            total
        };
        // A worker takes memory when it starts and when it unpacks for the first time, which is not before the system
        // lets it run and a task is left for it.
        for _ in 0..20 {
            std::thread::sleep(Duration::from_millis(5));
            step();
        }
        let region = Region::new(ALLOCATOR);
        let total = step() + step();
        let stats = region.change();
        assert!(total.is_finite());
        assert_eq!((stats.allocations, stats.reallocations), (0, 0), "in 2 steps on {isa}");
    }
}
