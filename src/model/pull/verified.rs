//! Which files are known to be what they should be, so that a start does not hash half a gigabyte again.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;
use std::time::UNIX_EPOCH;

use sha2::{Digest as _, Sha256};
use tracing::warn;

use super::SourceError;
use crate::hexadecimal::hexadecimal;
use crate::model::catalogue::Digest;

/// Whether `target` is there and unchanged since it was verified. A file without an expected digest needs no more
/// than to be there, since only whole files are ever renamed to it.
pub(super) fn is_known_good(target: &Path, expected: Option<&Digest>) -> bool {
    let Some(expected) = expected else { return target.is_file() };
    let marker = marker(target, expected).ok();
    marker.is_some() && marker == fs::read_to_string(target.with_added_extension("sha256")).ok()
}

/// Hashes `target`. A file that is not the expected one is deleted.
pub(super) fn is_good(target: &Path, expected: Option<&Digest>) -> io::Result<bool> {
    let Some(expected) = expected else { return Ok(target.is_file()) };
    let file = match File::open(target) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(e),
    };
    match check(&digest_of(&file)?, expected) {
        Ok(()) => {
            remember(target, Some(expected));
            Ok(true)
        }
        Err(mismatch) => {
            warn!("{}: {mismatch}", target.display());
            fs::remove_file(target)?;
            Ok(false)
        }
    }
}

/// Writes the marker of a verified file. Without it the next start hashes the file again, so failing is harmless.
pub(super) fn remember(target: &Path, expected: Option<&Digest>) {
    let Some(expected) = expected else { return };
    let path = target.with_added_extension("sha256");
    if let Err(e) = marker(target, expected).and_then(|marker| fs::write(&path, marker)) {
        warn!("{}: {e}; the model will be hashed again at the next start", path.display());
    }
}

pub(super) fn check(got: &Digest, expected: &Digest) -> Result<(), SourceError> {
    if got.size_bytes != expected.size_bytes {
        return Err(SourceError::Size { got: got.size_bytes, expected: expected.size_bytes });
    }
    if got.sha256 != expected.sha256 {
        return Err(SourceError::Sha256 { got: got.sha256.clone(), expected: expected.sha256.clone() });
    }
    Ok(())
}

/// The hub's client keeps a large file under the SHA-256 that the hub says of it. A file that is another is deleted.
pub(super) fn check_by_name(path: &Path) -> Result<(), SourceError> {
    let kept = fs::canonicalize(path)?;
    let expected = kept.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    // Small files have names of other hashes.
    if expected.len() != 64 || !expected.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Ok(());
    }
    let Digest { sha256: got, .. } = digest_of(&File::open(&kept)?)?;
    if got == expected {
        return Ok(());
    }
    fs::remove_file(&kept)?;
    Err(SourceError::Sha256 { got, expected })
}

pub(super) fn digest_of(mut file: &File) -> io::Result<Digest> {
    let mut sha256 = Sha256::new();
    let mut size_bytes = 0;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(Digest { size_bytes, sha256: hexadecimal(sha256) }),
            len => {
                sha256.update(&buffer[..len]);
                size_bytes += len as u64;
            }
        }
    }
}

/// `<sha256> <size> <mtime in nanoseconds>`: what the marker of an unchanged, verified file says.
fn marker(target: &Path, expected: &Digest) -> io::Result<String> {
    let metadata = fs::metadata(target)?;
    let mtime = metadata.modified()?.duration_since(UNIX_EPOCH).map_err(io::Error::other)?.as_nanos();
    Ok(format!("{} {} {mtime}\n", expected.sha256, metadata.len()))
}
