//! Embeddings on the emulated device have the bits of the CPU's.

mod arrays;

use emulator::{Emulator, Memory};
use half::f16;
use kernels::cuda::args::AdapterTable;
use kernels::cuda::driver::DeviceMemory;
use kernels::cuda::embed::{EmbedArgs, embed};
use kernels::quantized::{BlockFormat, WeightType};
use proptest::prelude::*;

use arrays::Numbers;

const FIRST_VIRTUAL_TOKEN: u32 = 1 << 31;

const TYPES: [WeightType; 16] = [
    WeightType::Blocks(BlockFormat::Q4_0),
    WeightType::Blocks(BlockFormat::Q4_1),
    WeightType::Blocks(BlockFormat::Q5_0),
    WeightType::Blocks(BlockFormat::Q5_1),
    WeightType::Blocks(BlockFormat::Q8_0),
    WeightType::Blocks(BlockFormat::Q2_K),
    WeightType::Blocks(BlockFormat::Q3_K),
    WeightType::Blocks(BlockFormat::Q4_K),
    WeightType::Blocks(BlockFormat::Q5_K),
    WeightType::Blocks(BlockFormat::Q6_K),
    WeightType::Blocks(BlockFormat::IQ4_NL),
    WeightType::Blocks(BlockFormat::IQ4_XS),
    WeightType::Blocks(BlockFormat::MXFP4),
    WeightType::F16,
    WeightType::BF16,
    WeightType::F32,
];

/// A table `[vocab, hidden_size]` in bytes of a file.
struct Table {
    weight_type: WeightType,
    hidden_size: usize,
    row_bytes: usize,
    bytes: Vec<u8>,
}

impl Table {
    fn new(weight_type: WeightType, hidden_size: usize, vocab: usize, numbers: &mut Numbers) -> Self {
        let row_bytes = weight_type.row_bytes(hidden_size).unwrap();
        let bytes = (0..vocab * row_bytes).map(|_| numbers.below(256) as u8).collect();
        Self { weight_type, hidden_size, row_bytes, bytes }
    }

    /// The embedding of `token` on the CPU.
    fn row(&self, token: usize) -> Vec<f32> {
        let mut row = vec![0.0; self.hidden_size];
        self.weight_type.dequantize_row(&self.bytes[token * self.row_bytes..][..self.row_bytes], &mut row);
        row
    }

    /// Hidden states of `tokens`, whose adapters' tables are at `adapters`.
    fn embed(&self, device: &Emulator, tokens: &[u32], adapters: Option<&[u64]>) -> Vec<f32> {
        self.embed_scaled(device, tokens, adapters, [1.0, 1.0])
    }

    fn embed_scaled(
        &self,
        device: &Emulator,
        tokens: &[u32],
        adapters: Option<&[u64]>,
        [scale, virtual_scale]: [f32; 2],
    ) -> Vec<f32> {
        let table = arrays::bytes(device, &self.bytes);
        let words = arrays::bytes(device, &tokens.iter().flat_map(|t| t.to_le_bytes()).collect::<Vec<_>>());
        let rows: Memory = arrays::addresses(device, adapters.unwrap_or(&[]));
        let hidden = arrays::floats(device, &vec![f32::NAN; tokens.len() * self.hidden_size]);
        let args = EmbedArgs {
            tokens: words.address(),
            table: table.address(),
            hidden: hidden.address(),
            adapters: if adapters.is_some() { rows.address() } else { 0 },
            row_bytes: self.row_bytes as i64,
            row_type: self.weight_type.into(),
            hidden_size: self.hidden_size as i32,
            scale,
            virtual_scale,
        };
        embed(device, tokens.len(), args).unwrap();
        arrays::read_floats(device, &hidden)
    }
}

/// Bits, and one for all that is no number.
fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| if x.is_nan() { u32::MAX } else { x.to_bits() }).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..Default::default() })]

    #[test]
    fn rows_of_every_type_have_the_bits_of_the_cpus(
        weight_type in prop::sample::select(TYPES.to_vec()), num_blocks in 1..5_usize, seed: u64,
    ) {
        let width = num_blocks * 256;
        let table = Table::new(weight_type, width, 6, &mut Numbers::new(seed));
        let tokens = [5, 0, 3, 3];
        let hidden = table.embed(&arrays::device(), &tokens, None);
        for (token, hidden) in tokens.iter().zip(hidden.chunks_exact(width)) {
            prop_assert_eq!(bits(hidden), bits(&table.row(*token as usize)));
        }
    }
}

#[test]
fn each_row_gets_what_its_own_adapter_adds_or_has_in_its_place() {
    let device = arrays::device();
    let mut numbers = Numbers::new(7);
    let (vocab, width, rank, num_virtual) = (9, 96, 5, 3);
    let format = BlockFormat::Q8_0;
    let mut table = Table::new(WeightType::Blocks(format), width, vocab, &mut numbers);
    // Scales that are numbers.
    for block in table.bytes.chunks_exact_mut(format.block_bytes()) {
        block[..2].copy_from_slice(&f16::from_f32(0.03).to_le_bytes());
    }
    let a: Vec<f16> = numbers.any(vocab * rank).into_iter().map(f16::from_f32).collect();
    let b = numbers.any(rank * width);
    let rows = numbers.any(num_virtual * width);
    let a_memory = arrays::halves(&device, &a.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
    let (b_memory, rows_memory) = (arrays::floats(&device, &b), arrays::floats(&device, &rows));
    let delta = AdapterTable {
        embedding_a: a_memory.address(),
        embedding_b: b_memory.address(),
        embedding_rank: rank as i32,
        ..Default::default()
    };
    let prelude =
        AdapterTable { prelude_rows: rows_memory.address(), num_virtual: num_virtual as i32, ..Default::default() };
    // Its rows do not matter: it has keys and values.
    let key_values = AdapterTable { prelude_keys: 16, prelude_values: 16, num_virtual: 3, ..Default::default() };
    let memory = [delta, prelude, key_values].map(|table| arrays::adapter(&device, &table, &[]));
    let [delta, prelude, key_values] = memory.each_ref().map(DeviceMemory::address);

    let tokens = [4, 4, FIRST_VIRTUAL_TOKEN + 2, 8, FIRST_VIRTUAL_TOKEN + 1, 0];
    let adapters = [0, delta, prelude, prelude, key_values, delta];
    let hidden = table.embed(&device, &tokens, Some(&adapters));

    for (i, hidden) in hidden.chunks_exact(width).enumerate() {
        let mut expected = vec![0.0; width];
        match tokens[i].checked_sub(FIRST_VIRTUAL_TOKEN) {
            Some(position) if adapters[i] == prelude => {
                expected.copy_from_slice(&rows[position as usize * width..][..width]);
            }
            Some(_) => {}
            None => expected = table.row(tokens[i] as usize),
        }
        if adapters[i] == delta {
            for (a, b) in a[tokens[i] as usize * rank..][..rank].iter().zip(b.chunks_exact(width)) {
                expected.iter_mut().zip(b).for_each(|(e, b)| *e += a.to_f32() * b);
            }
        }
        assert_eq!(bits(hidden), bits(&expected), "row {i}");
    }
}

#[test]
fn embeddings_and_positions_of_preludes_are_multiplied_each_by_their_own() {
    let (device, mut numbers) = (arrays::device(), Numbers::new(3));
    let table = Table::new(WeightType::F32, 64, 4, &mut numbers);
    let rows = numbers.any(2 * 64);
    let rows_memory = arrays::floats(&device, &rows);
    let prelude = AdapterTable { prelude_rows: rows_memory.address(), num_virtual: 2, ..Default::default() };
    let prelude = arrays::adapter(&device, &prelude, &[]);
    let adapters = [prelude.address(); 2];
    let hidden = table.embed_scaled(&device, &[FIRST_VIRTUAL_TOKEN + 1, 3], Some(&adapters), [8.0, 0.5]);
    let scaled = |row: &[f32], factor: f32| row.iter().map(|x| x * factor).collect::<Vec<_>>();
    assert_eq!(bits(&hidden), bits(&[scaled(&rows[64..], 0.5), scaled(&table.row(3), 8.0)].concat()));
}
