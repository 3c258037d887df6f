//! Digests as the world writes them.

use sha2::{Digest, Sha256};

/// In lower case.
pub fn hexadecimal(sha256: Sha256) -> String {
    hexadecimal_of(&sha256.finalize())
}

/// Of a digest that is there already, in lower case.
pub fn hexadecimal_of(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}
