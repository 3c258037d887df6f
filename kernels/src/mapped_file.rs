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

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}
