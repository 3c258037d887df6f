//! Memory for weights: large mappings, in huge pages where the system has them.
//!
//! A step with one row reads all weights once and does little else. In pages of 4 KiB, the processor looks up an address every 64
//! lines, in a virtual machine through the tables of two systems, and its prefetchers stop at the end of each page.

use std::cell::RefCell;
use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use memmap2::MmapMut;

/// What is asked of the system at once. What of it nobody takes is never touched, and takes no memory.
const CHUNK_BYTES: usize = 64 << 20;
const HUGE_PAGE: usize = 2 << 20;
/// Where every part of a chunk begins: at a line of the cache.
const LINE: usize = 64;

/// Hands out memory that is given back to the system when all that is of one chunk has been dropped.
#[derive(Debug, Default)]
pub(crate) struct Arena {
    /// Of the newest chunk.
    rest: RefCell<Option<Memory>>,
}

impl Arena {
    /// Zeros, aligned to 64 bytes.
    ///
    /// # Errors
    /// When the system has no memory left.
    pub fn take(&self, len: usize) -> io::Result<Memory> {
        let mut rest = self.rest.borrow_mut();
        if let Some(memory) = rest.as_mut().and_then(|rest| rest.split_front(len)) {
            return Ok(memory);
        }
        let rest = rest.insert(Memory::of_new_chunk(len.next_multiple_of(LINE).max(CHUNK_BYTES))?);
        Ok(rest.split_front(len).expect("a chunk has the bytes that were asked for"))
    }
}

/// A part of a chunk that nobody else has.
#[derive(Debug)]
pub(crate) struct Memory {
    start: NonNull<u8>,
    len: usize,
    /// Keeps it mapped.
    chunk: Arc<MmapMut>,
}

impl Memory {
    /// All of a chunk from its first huge page on.
    fn of_new_chunk(len: usize) -> io::Result<Self> {
        let mut chunk = MmapMut::map_anon(len + HUGE_PAGE)?;
        #[cfg(target_os = "linux")]
        // Advice only: without huge pages everything is as it would be, and slower.
        drop(chunk.advise(memmap2::Advice::HugePage));
        let skipped = chunk.as_ptr().align_offset(HUGE_PAGE);
        let start = NonNull::from(&mut chunk[skipped..][..len]).cast();
        Ok(Self { start, len, chunk: Arc::new(chunk) })
    }

    /// Its first `len` bytes, if it has as many; it keeps what begins at the next line.
    fn split_front(&mut self, len: usize) -> Option<Self> {
        let taken = len.next_multiple_of(LINE);
        let left = self.len.checked_sub(taken)?;
        let front = Self { start: self.start, len, chunk: Arc::clone(&self.chunk) };
        // SAFETY: `self` has `taken` bytes or more, all of one chunk.
        self.start = unsafe { self.start.add(taken) };
        self.len = left;
        Some(front)
    }
}

// SAFETY: it owns its bytes as a `Vec` does, and unmapping is not bound to a thread.
unsafe impl Send for Memory {}
// SAFETY: as above; shared, they are only read.
unsafe impl Sync for Memory {}

impl Deref for Memory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the chunk is mapped for as long as `self` is, and no part of it is handed out twice.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Memory {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed for writing.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_zeros_that_do_not_overlap_and_outlive_the_arena() {
        let arena = Arena::default();
        let lens = [1, 64, 100, CHUNK_BYTES - 256, 7, CHUNK_BYTES + 5, 0, 3];
        let mut parts: Vec<_> = lens.iter().map(|len| arena.take(*len).unwrap()).collect();
        drop(arena);
        for (part, len) in parts.iter_mut().zip(lens) {
            assert_eq!((part.len(), part.as_ptr().align_offset(LINE)), (len, 0));
            assert!(part.first().is_none_or(|first| *first == 0) && part.last().is_none_or(|last| *last == 0));
            part.fill(1);
        }
        let mut ranges: Vec<_> = parts.iter().map(|part| part.as_ptr_range()).collect();
        ranges.sort_by_key(|range| range.start);
        assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start));
    }
}
