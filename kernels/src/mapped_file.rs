//! Read-only memory maps of model files.

use std::fs::File;
use std::io;
use std::path::Path;

use memmap2::Mmap;

/// A file mapped for reading. Pages are read when they are touched.
#[derive(Debug)]
pub struct MappedFile(Mmap);

impl MappedFile {
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        // SAFETY: the map is private and read-only. Rust cannot rule out that another process shortens the file while it
        // is mapped; model files are written elsewhere and renamed into place, so nobody writes to this inode.
        Ok(Self(unsafe { Mmap::map(&file)? }))
    }

    /// Gives the pages read so far back to the system; they are read again when they are touched again. Keeps a file that
    /// is copied elsewhere piece by piece from counting twice.
    pub fn release_pages(&mut self) {
        #[cfg(unix)]
        {
            // SAFETY: `&mut self`: nobody borrows the bytes. The map is read-only and backed by the file, so what is
            // dropped comes back unchanged.
            let released = unsafe { self.0.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
            // Advice only: without it the load takes more memory for a while, and nothing else changes.
            drop(released);
        }
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}
