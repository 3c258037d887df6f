//! Read-only memory maps of model files.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use memmap2::{Mmap, MmapMut};

use crate::quantized::WeightType;

/// A file mapped for reading. Pages are read when they are touched.
#[derive(Debug)]
pub struct MappedFile {
    map: Mmap,
    /// Memory of no file does not come back once it is released.
    is_file: bool,
}

impl MappedFile {
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        // SAFETY: the map is private and read-only. Rust cannot rule out that another process shortens the file while it
        // is mapped; model files are written elsewhere and renamed into place, so nobody writes to this inode.
        Ok(Self { map: unsafe { Mmap::map(&file)? }, is_file: true })
    }

    /// Memory of no file, filled once.
    pub fn of_memory(len: usize, fill: impl FnOnce(&mut [u8])) -> io::Result<Self> {
        let mut memory = MmapMut::map_anon(len)?;
        fill(&mut memory);
        Ok(Self { map: memory.make_read_only()?, is_file: false })
    }

    /// Gives the pages read so far back to the system; they are read again when they are touched again. Keeps a file that
    /// is copied elsewhere piece by piece from counting twice.
    pub fn release_pages(&mut self) {
        #[cfg(unix)]
        if self.is_file {
            // SAFETY: `&mut self`: nobody borrows the bytes. The map is read-only and backed by the file, so what is
            // dropped comes back unchanged.
            let released = unsafe { self.map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
            // Advice only: without it the load takes more memory for a while, and nothing else changes.
            drop(released);
        }
    }

    pub fn bytes(&self) -> &[u8] {
        &self.map
    }
}

/// The rows of a matrix in a mapped file: found once, so that reading a row takes neither a look-up nor memory.
#[derive(Debug, Clone)]
pub struct MappedRows {
    pub file: Arc<MappedFile>,
    pub weight_type: WeightType,
    /// Of the matrix, in bytes of the file.
    pub place: Range<usize>,
    pub num_rows: usize,
}

impl MappedRows {
    /// Bytes of the whole matrix.
    pub fn bytes(&self) -> &[u8] {
        &self.file.bytes()[self.place.clone()]
    }

    /// Row `index` as f32; `row` is `[columns]`.
    ///
    /// # Panics
    /// When the matrix has fewer rows.
    pub fn dequantize_row(&self, index: usize, row: &mut [f32]) {
        let row_bytes = self.place.len() / self.num_rows.max(1);
        self.weight_type.dequantize_row(&self.bytes()[index * row_bytes..][..row_bytes], row);
    }
}
