//! Files that are there whole or not at all, also after a crash.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

/// Whoever reads the file, or starts after a crash, finds the old content or the new, whole.
pub fn write_atomically(dir: &Path, file_name: &str, content: &[u8]) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let mut file = tempfile::Builder::new().prefix(".").suffix(".part").tempfile_in(dir)?;
    file.write_all(content)?;
    file.as_file().sync_all()?;
    file.persist(dir.join(file_name))?;
    sync_folder(dir)
}

/// A renamed or deleted file is so for good when its folder is on the disk.
pub fn sync_folder(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}
