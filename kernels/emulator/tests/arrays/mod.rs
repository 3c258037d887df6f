//! Arrays in emulated device memory, and adapters made of them.
#![allow(dead_code, reason = "each test file takes what it needs")]

use emulator::{Emulator, Memory};
use half::f16;
use kernels::cuda::args::{AdapterTable, Site};
use kernels::cuda::driver::{DeviceMemory, Driver};

/// More than any test takes.
const DEVICE_BYTES: usize = 1 << 30;

pub fn device() -> Emulator {
    Emulator::new(DEVICE_BYTES)
}

pub fn bytes(device: &Emulator, bytes: &[u8]) -> Memory {
    device.upload(bytes).unwrap()
}

pub fn floats(device: &Emulator, values: &[f32]) -> Memory {
    device.upload_floats(values).unwrap()
}

pub fn halves(device: &Emulator, bits: &[u16]) -> Memory {
    bytes(device, &bits.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>())
}

pub fn addresses(device: &Emulator, addresses: &[u64]) -> Memory {
    bytes(device, &addresses.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>())
}

pub fn read_floats(device: &Emulator, memory: &Memory) -> Vec<f32> {
    let mut bytes = vec![0; memory.len()];
    device.read(memory, 0, &mut bytes).unwrap();
    bytes.as_chunks().0.iter().map(|v| f32::from_le_bytes(*v)).collect()
}

/// A table and its sites, as the kernels read them.
pub fn adapter(device: &Emulator, table: &AdapterTable, sites: &[Site]) -> Memory {
    let mut words: Vec<u8> = Vec::new();
    for address in
        [table.embedding_a, table.embedding_b, table.prelude_rows, table.prelude_keys, table.prelude_values, table.head]
    {
        words.extend(address.to_le_bytes());
    }
    [table.embedding_rank, table.num_virtual].iter().for_each(|n| words.extend(n.to_le_bytes()));
    for site in sites {
        for address in [site.a, site.b, site.scales, site.input_scale, site.output_scale, site.bias] {
            words.extend(address.to_le_bytes());
        }
        [site.rank, site.a_stride, site.b_stride, 0].iter().for_each(|n| words.extend(n.to_le_bytes()));
    }
    bytes(device, &words)
}

/// A generator of numbers that are the same in every run.
pub struct Numbers(u64);

impl Numbers {
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    pub fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % n
    }

    /// Eighths from -1 to 1: products of thousands of them are exact in f32.
    pub fn eighths(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.below(17) as f32 / 8.0 - 1.0).collect()
    }

    /// From -1 to 1, with bits that sums round.
    pub fn any(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.below(1 << 24) as f32 / (1 << 23) as f32 - 1.0).collect()
    }
}

pub fn f16_bits(values: &[f32]) -> Vec<u16> {
    values.iter().map(|v| f16::from_f32(*v).to_bits()).collect()
}

pub fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}
