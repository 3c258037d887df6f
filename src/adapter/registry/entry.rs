//! What is known of one adapter that the folder holds.

use std::sync::Arc;
use std::time::Duration;

use super::status::SelfTest;
use crate::adapter::canonical::{Coverage, Method};
use crate::adapter::files::Fingerprint;
use crate::adapter::manifest::AdapterManifest;
use crate::adapter::residency::ItemId;

/// Until files that could not be read are tried again, twice as long after each time …
const RETRY: Duration = Duration::from_secs(1);
/// … up to this.
const MAX_RETRY: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
pub(super) struct Entry {
    pub id: usize,
    /// Of the files as last noticed; `None` if they cannot even be looked at.
    pub fingerprint: Option<Fingerprint>,
    /// When that was first noticed.
    pub noticed_at: Duration,
    /// Of these files; `None` until they have been read.
    pub generation: Option<String>,
    /// The last one that was known.
    pub last_generation: Option<String>,
    pub manifest: Arc<AdapterManifest>,
    pub method: Option<Method>,
    pub coverage: Option<Coverage>,
    /// Estimated until it has been loaded once.
    pub resident_bytes: u64,
    pub previous_generations: Vec<String>,
    /// What was last loaded; in `State::resident` unless it was evicted.
    pub item: Option<ItemId>,
    /// What is resident was loaded from files that have changed since.
    pub is_stale: bool,
    /// Why files of this fingerprint are not served. Not tried again until they change.
    pub failure: Option<String>,
    /// Why they are not known to be served or refused.
    pub hindrance: Option<Hindrance>,
    /// The generation that was handed out to be measured, and what came of it.
    pub tested_generation: Option<String>,
    pub self_test: Option<SelfTest>,
    pub is_missing: bool,
}

/// What keeps the files of an adapter from being read, for now.
#[derive(Debug)]
pub(super) struct Hindrance {
    pub cause: String,
    num_tries: u32,
    /// Requests and scans try again from then on.
    pub retry_at: Duration,
}

impl Entry {
    /// Nothing is known yet of files that were not there before, but that what is in memory is not of them.
    pub fn notice(&mut self, fingerprint: Option<Fingerprint>, now: Duration) {
        if self.fingerprint != fingerprint {
            (self.fingerprint, self.noticed_at) = (fingerprint, now);
            (self.generation, self.failure, self.hindrance) = (None, None, None);
            self.is_stale = self.item.is_some();
        }
    }

    /// Has the files tried again at `retry_at`, or after a while that grows. Whether that is for a new cause.
    pub fn hinder(&mut self, cause: &str, retry_at: Option<Duration>, now: Duration) -> bool {
        let before = self.hindrance.take();
        let is_new = before.as_ref().is_none_or(|before| before.cause != cause);
        let num_tries = before.map_or(0, |before| before.num_tries + 1);
        let wait = RETRY.saturating_mul(1 << num_tries.min(16)).min(MAX_RETRY);
        let retry_at = retry_at.unwrap_or(now + wait);
        self.hindrance = Some(Hindrance { cause: cause.to_owned(), num_tries, retry_at });
        is_new
    }
}
