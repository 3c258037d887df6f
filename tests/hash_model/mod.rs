//! A model whose logits are a pure function of its adapter and the tokens it finds in the KV store.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, mpsc as channel};

use kernels::attention::{BLOCK_SIZE, BlockId};
use kernels::device::{Caller, DeviceError, HostLogits, Logits};
use lorry::model::spec::{Architecture, Features, ModelSpec};
use lorry::model::{ForwardBatch, Model};

const VOCAB_SIZE: usize = 64;
/// Tokens that make the fake model misbehave.
pub const BROKEN: u32 = 61;
pub const PANIC: u32 = 62;
pub const NAN: u32 = 63;

/// Keeps one number per KV position, a hash of adapter and tokens up to there, and makes the logits from it: a wrong
/// block, position, adapter or order of rows changes everything that follows.
pub struct HashModel {
    spec: ModelSpec,
    num_blocks: usize,
    states: HashMap<(BlockId, usize), u64>,
    /// Steps wait while a test holds it.
    gate: Arc<Mutex<()>>,
}

impl HashModel {
    pub fn new(gate: Arc<Mutex<()>>, num_blocks: usize) -> Self {
        let spec = ModelSpec {
            architecture: Architecture::Llama,
            hidden_size: 32,
            intermediate_size: 32,
            num_layers: 1,
            num_heads: 1,
            num_kv_heads: 1,
            head_dim: 32,
            vocab_size: VOCAB_SIZE,
            rope_theta: 1e4,
            norm_eps: 1e-5,
            context_length: 1024,
            features: Features::PLAIN,
        };
        Self { spec, num_blocks, states: HashMap::new(), gate }
    }
}

fn mix(state: u64, value: u64) -> u64 {
    let mixed = (state ^ value.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed ^ (mixed >> 29)
}

impl Model for HashModel {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn num_kv_blocks(&self) -> usize {
        self.num_blocks
    }

    fn forward(&mut self, batch: &ForwardBatch<'_>, caller: &mut dyn Caller) -> Result<(), DeviceError> {
        caller.meanwhile();
        drop(self.gate.lock());
        for copy in batch.copies {
            for offset in 0..BLOCK_SIZE {
                match self.states.get(&(copy.from, offset)).copied() {
                    Some(state) => self.states.insert((copy.to, offset), state),
                    None => self.states.remove(&(copy.to, offset)),
                };
            }
        }
        let mut row_states = vec![0; batch.tokens.len()];
        for sequence in batch.sequences {
            let slot = |position: usize| (sequence.block_table[position / BLOCK_SIZE], position % BLOCK_SIZE);
            for (position, row) in (sequence.first_position..).zip(sequence.rows.clone()) {
                match batch.tokens[row] {
                    BROKEN => return Err(DeviceError::BaseLayer("a broken layer".to_owned())),
                    PANIC => panic!("a bad token"),
                    _ => {}
                }
                let group = batch.groups.iter().find(|group| group.rows.contains(&row));
                let adapter = group.map_or(0, |group| group.adapter.generation.bytes().map(u64::from).sum());
                let before = if position == 0 { 1 } else { self.states[&slot(position - 1)] };
                row_states[row] = mix(mix(before, adapter), u64::from(batch.tokens[row]));
                self.states.insert(slot(position), row_states[row]);
            }
        }
        for (index, &row) in batch.logits_rows.iter().enumerate() {
            let mut logits: Vec<f32> =
                (0..VOCAB_SIZE as u64).map(|id| (mix(row_states[row], id) >> 40) as f32 / (1 << 21) as f32).collect();
            logits[BROKEN as usize..].fill(-1e9);
            logits[NAN as usize] = if batch.tokens[row] == NAN { f32::NAN } else { -1e9 };
            caller.on_logits(index, &mut HostLogits(&mut logits))?;
        }
        Ok(())
    }
}

/// Does a step when a test says so, after what is done meanwhile; one of them fails before.
pub struct Stepwise {
    pub inner: HashModel,
    pub go_on: channel::Receiver<()>,
    pub steps_left: usize,
}

impl Model for Stepwise {
    fn spec(&self) -> &ModelSpec {
        &self.inner.spec
    }

    fn num_kv_blocks(&self) -> usize {
        self.inner.num_blocks
    }

    fn forward(&mut self, batch: &ForwardBatch<'_>, caller: &mut dyn Caller) -> Result<(), DeviceError> {
        self.steps_left =
            self.steps_left.checked_sub(1).ok_or_else(|| DeviceError::BaseLayer("a worn layer".to_owned()))?;
        caller.meanwhile();
        self.go_on.recv().expect("the test goes on");
        self.inner.forward(batch, &mut |index: usize, logits: &mut dyn Logits| caller.on_logits(index, logits))
    }
}
