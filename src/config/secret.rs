//! A key that must not show in a log and is compared in constant time.

use std::fmt;

use serde::Deserialize;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether `given` is the secret; an empty one is nobody's.
    pub fn matches(&self, given: &str) -> bool {
        // The digests have one length: not even that of the secret can be timed.
        let is_equal = Sha256::digest(&self.0).ct_eq(&Sha256::digest(given));
        !self.is_empty() && bool::from(is_equal)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_empty() { "not set" } else { "hidden" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_matches_itself_alone_and_an_empty_one_nothing() {
        let secret = Secret("s3cret".to_owned());
        assert!(secret.matches("s3cret"));
        for other in ["", "s3cre", "s3crett", "S3cret"] {
            assert!(!secret.matches(other), "{other}");
        }
        assert!(!Secret::default().matches(""));
    }

    #[test]
    fn a_secret_does_not_show_in_a_log() {
        assert_eq!(format!("{:?}", Secret("s3cret".to_owned())), "hidden");
    }
}
