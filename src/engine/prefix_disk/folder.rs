//! A folder of KV blocks, one file each: bounded, the least recently used out first, and trusted only as far as their
//! checksums say.
//!
//! ```text
//! <folder>/lock                             held by the server that uses the folder
//! <folder>/<identity>/<chain hash>.kv       32 bytes of SHA-256 over identity, chain hash and block; the block
//! ```
//!
//! The identity says what computed the blocks. Those of others, of an earlier build or another base, are never read; they
//! count, and go when their time comes. The times of the files are when they were last used.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use sha2::{Digest, Sha256};
use tracing::{info, warn};

use crate::engine::prefix_cache::ChainHash;
use crate::hexadecimal::hexadecimal_of;

const LOCK: &str = "lock";
const EXTENSION: &str = "kv";
/// Of a file that is being written.
const UNFINISHED: &str = "part";
const CHECKSUM_BYTES: usize = 32;

/// Why a folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("engine.prefix_cache_dir {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("engine.prefix_cache_dir {0} is used by another server: give each a folder of its own")]
    Taken(PathBuf),
    #[error(
        "engine.prefix_cache_dir_mib allows {max_bytes} bytes, and one block of this model takes {block_bytes}: raise it"
    )]
    TooSmall { max_bytes: u64, block_bytes: u64 },
}

#[derive(Debug)]
pub struct Folder {
    /// Of this identity.
    path: PathBuf,
    identity: String,
    block_bytes: usize,
    max_bytes: u64,
    /// From the least recently used.
    by_age: BTreeMap<u64, Stored>,
    /// Of this identity: the key in `by_age`.
    ages: HashMap<ChainHash, u64>,
    next_age: u64,
    bytes: u64,
    /// Held for as long as the folder is in use.
    _lock: File,
}

#[derive(Debug)]
struct Stored {
    path: PathBuf,
    bytes: u64,
    /// Where it is of this identity.
    chain: Option<ChainHash>,
}

impl Folder {
    /// Makes the folder where it is missing.
    ///
    /// # Errors
    /// When it cannot be written or another server has it, or `max_bytes` is less than a block.
    pub fn open(root: &Path, identity: &str, block_bytes: usize, max_bytes: u64) -> Result<Self, OpenError> {
        let file_bytes = (CHECKSUM_BYTES + block_bytes) as u64;
        if file_bytes > max_bytes {
            return Err(OpenError::TooSmall { max_bytes, block_bytes: file_bytes });
        }
        let path = root.join(identity);
        let failed = |source| OpenError::Io { path: root.to_path_buf(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(&path).map_err(failed)?;
        let mut options = OpenOptions::new();
        let lock =
            options.write(true).create(true).truncate(false).mode(0o600).open(root.join(LOCK)).map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(OpenError::Taken(root.to_path_buf())),
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        // A full disk is better known now.
        (&lock).write_all(identity.as_bytes()).and_then(|()| lock.sync_all()).map_err(failed)?;
        let mut folder = Self {
            path,
            identity: identity.to_owned(),
            block_bytes,
            max_bytes,
            by_age: BTreeMap::new(),
            ages: HashMap::new(),
            next_age: 0,
            bytes: 0,
            _lock: lock,
        };
        folder.scan(root).map_err(failed)?;
        Ok(folder)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    /// Of all files.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// All that can be read.
    pub fn chains(&self) -> impl Iterator<Item = ChainHash> {
        self.ages.keys().copied()
    }

    /// Keeps a block. What has to go for it is added to `evicted`.
    ///
    /// # Errors
    /// When it cannot be written; it is not there then.
    pub fn write(&mut self, chain: ChainHash, block: &[u8], evicted: &mut Vec<ChainHash>) -> io::Result<()> {
        if self.ages.contains_key(&chain) {
            self.touch(&chain);
            return Ok(());
        }
        let bytes = (CHECKSUM_BYTES + block.len()) as u64;
        self.make_room(bytes, evicted);
        let path = self.path_of(&chain);
        let unfinished = path.with_extension(UNFINISHED);
        let written = write_file(&unfinished, &[&self.checksum(&chain, block), block]);
        if let Err(error) = written.and_then(|()| fs::rename(&unfinished, &path)) {
            // There may be nothing to remove.
            let _ = fs::remove_file(&unfinished);
            return Err(error);
        }
        self.add(Stored { path, bytes, chain: Some(chain) });
        Ok(())
    }

    /// A block as it was written. What is not that is deleted.
    pub fn read(&mut self, chain: &ChainHash) -> Option<Vec<u8>> {
        let age = *self.ages.get(chain)?;
        let path = self.path_of(chain);
        let reason = match read_file(&path, CHECKSUM_BYTES + self.block_bytes) {
            Ok(Some(file)) => {
                let (checksum, block) = file.split_at(CHECKSUM_BYTES);
                if checksum == self.checksum(chain, block) {
                    return Some(block.to_vec());
                }
                "its checksum is wrong".to_owned()
            }
            Ok(None) => "it is not as long as a block".to_owned(),
            Err(error) => error.to_string(),
        };
        warn!("{}: {reason}; it is deleted, and the block computed again", path.display());
        self.remove(age);
        None
    }

    /// A block has been of use.
    pub fn touch(&mut self, chain: &ChainHash) {
        let Some(stored) = self.ages.get(chain).and_then(|age| self.by_age.remove(age)) else { return };
        self.bytes -= stored.bytes;
        // If it fails, the file goes earlier after the next start.
        let _ = File::open(&stored.path).and_then(|file| file.set_modified(SystemTime::now()));
        self.add(stored);
    }

    fn add(&mut self, stored: Stored) {
        let age = self.next_age;
        self.next_age += 1;
        self.bytes += stored.bytes;
        if let Some(chain) = stored.chain {
            self.ages.insert(chain, age);
        }
        self.by_age.insert(age, stored);
    }

    /// Deletes a file, and says which block it was of.
    fn remove(&mut self, age: u64) -> Option<ChainHash> {
        let Stored { path, bytes, chain } = self.by_age.remove(&age)?;
        self.bytes -= bytes;
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => warn!("{}: {error}", path.display()),
            _ => {}
        }
        if let Some(chain) = &chain {
            self.ages.remove(chain);
        }
        chain
    }

    fn make_room(&mut self, bytes: u64, evicted: &mut Vec<ChainHash>) {
        while self.bytes + bytes > self.max_bytes
            && let Some((&oldest, _)) = self.by_age.first_key_value()
        {
            evicted.extend(self.remove(oldest));
        }
    }

    /// Finds what earlier servers have left.
    fn scan(&mut self, root: &Path) -> io::Result<()> {
        let mut found = Vec::new();
        for folder in fs::read_dir(root)? {
            let folder = folder?.path();
            let files = match fs::read_dir(&folder) {
                Ok(files) => files,
                Err(error) if folder == self.path => return Err(error),
                // It is no folder, or another's.
                Err(_) => continue,
            };
            for file in files {
                let path = file?.path();
                let Some(chain) = path.file_stem().and_then(parse_chain) else { continue };
                if path.extension() == Some(OsStr::new(UNFINISHED)) {
                    fs::remove_file(&path)?;
                }
                let (true, Ok(metadata)) = (path.extension() == Some(OsStr::new(EXTENSION)), path.metadata()) else {
                    continue;
                };
                let chain = (folder == self.path).then_some(chain);
                found.push((metadata.modified()?, Stored { path, bytes: metadata.len(), chain }));
            }
        }
        found.sort_by_key(|(modified, _)| *modified);
        found.into_iter().for_each(|(_, stored)| self.add(stored));
        // There may be more than is allowed now.
        self.make_room(0, &mut Vec::new());
        info!(
            "prefix cache on disk: {} blocks in {}; {} MiB with those of other bases and builds",
            self.ages.len(),
            self.path.display(),
            self.bytes >> 20
        );
        Ok(())
    }

    fn path_of(&self, chain: &ChainHash) -> PathBuf {
        self.path.join(hexadecimal_of(chain.as_bytes())).with_extension(EXTENSION)
    }

    fn checksum(&self, chain: &ChainHash, block: &[u8]) -> [u8; CHECKSUM_BYTES] {
        let hasher = Sha256::new_with_prefix(self.identity.as_bytes());
        hasher.chain_update(chain.as_bytes()).chain_update(block).finalize().into()
    }
}

/// One that only its owner reads: a block tells of the prompt it is of.
fn write_file(path: &Path, parts: &[&[u8]]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    parts.iter().try_for_each(|part| file.write_all(part))?;
    // The system's own time for it is that of its last tick: many files would have the same, and no order.
    file.set_modified(SystemTime::now())
}

/// `None` for one of another length.
fn read_file(path: &Path, len: usize) -> io::Result<Option<Vec<u8>>> {
    let file = File::open(path)?;
    let mut bytes = Vec::with_capacity(len + 1);
    file.take(len as u64 + 1).read_to_end(&mut bytes)?;
    Ok((bytes.len() == len).then_some(bytes))
}

/// What a file of a block is called.
fn parse_chain(name: &OsStr) -> Option<ChainHash> {
    let digits = name.to_str()?.as_bytes();
    let mut bytes = [0; ChainHash::LEN];
    if digits.len() != 2 * bytes.len() || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = u8::from_str_radix(str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(ChainHash::from_bytes(bytes))
}
