//! Digests as the world writes them.

use sha2::{Digest, Sha256};

/// In lower case.
pub fn hexadecimal(sha256: Sha256) -> String {
    sha256.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
