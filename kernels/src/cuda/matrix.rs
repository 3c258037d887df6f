//! Quantized weights in device memory, in the order the tensor cores take them in: `kernels/cuda/matrix.cuh`, which says how
//! a record lies.

use half::f16;

use super::args::SUPER;
use super::driver::{DeviceMemory, Driver, DriverError};
use crate::Cpu;
use crate::quantized::{Block32, BlockFormat, Layout, PackError, ROWS_PER_TILE, row_bytes_of};
use crate::threads::DisjointMut;

/// Blocks of 32 inputs in a record.
const PAIR: usize = 2;
/// Bytes of the low four bits of a record's weights.
const LOW_BYTES: usize = ROWS_PER_TILE * PAIR * 32 / 2;

/// A packed matrix as kernels take it; `records` is 0 where there is none.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Matrix {
    pub records: u64,
    pub out_features: i32,
    pub in_features: i32,
    pub num_super: i32,
    pub layout: i32,
    pub offset: i32,
    pub unused: i32,
}

const _: () = assert!(size_of::<Matrix>() == 32);

/// Why a matrix is not on the device.
#[derive(Debug, thiserror::Error)]
pub enum UploadError {
    #[error(transparent)]
    Pack(#[from] PackError),
    #[error(transparent)]
    Driver(#[from] DriverError),
}

/// A weight matrix `[out_features, in_features]` in device memory.
#[derive(Debug)]
pub struct CudaMatrix<M> {
    records: M,
    matrix: Matrix,
}

impl<M: DeviceMemory> CudaMatrix<M> {
    /// Packs a matrix as it lies in the file, row-major, and copies it to the device; `row_order` as in [`pack`].
    ///
    /// # Errors
    /// When the bytes are no such matrix, or the device has no room.
    pub fn upload<D: Driver<Memory = M>>(
        driver: &D,
        cpu: &Cpu,
        format: BlockFormat,
        (out_features, in_features): (usize, usize),
        bytes: &[u8],
        row_order: Option<&[usize]>,
    ) -> Result<Self, UploadError> {
        let packed = pack(cpu, format, (out_features, in_features), bytes, row_order)?;
        let records = driver.upload(&packed)?;
        let matrix = Matrix {
            records: records.address(),
            out_features: out_features as i32,
            in_features: in_features as i32,
            num_super: in_features.div_ceil(SUPER) as i32,
            layout: layout_id(Layout::of(format)),
            offset: format.offset(),
            unused: 0,
        };
        Ok(Self { records, matrix })
    }

    /// For kernels, as long as `self` lives.
    pub fn matrix(&self) -> Matrix {
        self.matrix
    }

    pub fn out_features(&self) -> usize {
        self.matrix.out_features as usize
    }

    pub fn in_features(&self) -> usize {
        self.matrix.in_features as usize
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        self.records.len()
    }
}

/// `Form::ID` of `matrix.cuh`.
fn layout_id(layout: Layout) -> i32 {
    (layout.bits * 4 + (layout.groups - 1) * 2) as i32 + i32::from(layout.has_min)
}

/// Bytes of a row of tiles of `in_features` inputs, padded to whole superblocks.
fn tile_bytes(layout: Layout, in_features: usize) -> usize {
    in_features.div_ceil(SUPER) * (SUPER / 32) * layout.record_bytes()
}

/// The records of a matrix as it lies in the file, row-major `[out_features, in_features]`. Outputs are padded to whole tiles
/// and inputs to whole superblocks, with zeros.
///
/// `row_order[i]` says which row of the file becomes row `i`; `None` keeps the order.
///
/// # Errors
/// When the bytes are no such matrix.
///
/// # Panics
/// When `row_order` is shorter than the matrix or names a row it does not have.
pub fn pack(
    cpu: &Cpu,
    format: BlockFormat,
    (out_features, in_features): (usize, usize),
    bytes: &[u8],
    row_order: Option<&[usize]>,
) -> Result<Vec<u8>, PackError> {
    let row_bytes = row_bytes_of(format, (out_features, in_features), bytes)?;
    let layout = Layout::of(format);
    let (num_tiles, tile_bytes) = (out_features.div_ceil(ROWS_PER_TILE), tile_bytes(layout, in_features));
    let mut records = vec![0; num_tiles * tile_bytes];
    let target = DisjointMut::new(&mut records);
    cpu.pool().run(num_tiles, &|tile| {
        // SAFETY: each task takes its own tile.
        let tile_records = unsafe { target.slice(tile * tile_bytes, tile_bytes) };
        let mut row = vec![Block32::default(); in_features / 32];
        for r in 0..ROWS_PER_TILE.min(out_features - tile * ROWS_PER_TILE) {
            let out_row = tile * ROWS_PER_TILE + r;
            let source = row_order.map_or(out_row, |order| order[out_row]);
            format.decode_row(&bytes[source * row_bytes..][..row_bytes], &mut row);
            for (pair, record) in row.chunks(PAIR).zip(tile_records.chunks_exact_mut(PAIR * layout.record_bytes())) {
                for (b, block) in pair.iter().enumerate() {
                    write_row(layout, record, r, b, block);
                }
            }
        }
    });
    Ok(records)
}

/// Sets row `r` of block `b` of a record that was zero there.
fn write_row(layout: Layout, record: &mut [u8], r: usize, b: usize, block: &Block32) {
    for (k, &q) in block.q.iter().enumerate() {
        // The lane, its register and the byte in it.
        let (lane, j, i) = (r % 8 * 4 + k / 4 % 4, k / 16 * 2 + r / 8, k % 4);
        if layout.bits == 8 {
            record[b * LOW_BYTES + lane * 16 + j * 4 + i] = q;
            continue;
        }
        record[lane * 16 + j * 4 + i] |= (q & 15) << (b * 4);
        match layout.bits {
            5 => record[LOW_BYTES + lane * 4 + i] |= (q >> 4) << (b * 4 + j),
            6 => record[LOW_BYTES + lane * 8 + b * 4 + i] |= (q >> 4) << (2 * j),
            _ => {}
        }
    }
    let mut put = |at: usize, value: f32| {
        record[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
    };
    for g in 0..layout.groups {
        let at = PAIR * layout.weight_bytes() + 2 * ((r * PAIR + b) * layout.groups + g);
        put(at, block.scale[g]);
        if layout.has_min {
            put(at + PAIR * layout.scales_bytes(), block.min[g]);
        }
    }
}
