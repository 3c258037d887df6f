//! What the registry says about itself and about one adapter.

use std::path::PathBuf;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::Serialize;

use crate::adapter::canonical::{Coverage, Method};
use crate::adapter::files::AdapterFiles;
use crate::adapter::manifest::AdapterManifest;

/// Where the files of an adapter to install come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A folder under the root of the adapters, relative to it or absolute.
    Folder(PathBuf),
    /// A repository on the hub.
    Hub { repo: String, revision: Option<String> },
    /// What was read already.
    Files(AdapterFiles),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, JsonSchema, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Its folder is known; loaded at the first request.
    Registered,
    Loading,
    Ready,
    /// Refused: `error` says why.
    Failed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, JsonSchema, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    Disk,
    Host,
}

impl Tier {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Host => "host",
        }
    }
}

/// What an adapter does to the logits of a fixed prompt, against the base.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct SelfTest {
    pub max_logit_change: f32,
    pub mean_logit_change: f32,
}

impl SelfTest {
    /// Whether the adapter changes nothing.
    pub fn is_inert(&self) -> bool {
        self.max_logit_change == 0.0
    }
}

/// What is known of one adapter at this moment.
#[derive(Debug, Clone)]
pub struct AdapterStatus {
    /// Stays the same for as long as the server runs, in order of arrival.
    pub id: usize,
    pub name: String,
    pub phase: Phase,
    pub tier: Tier,
    /// Content hash of what is served; `None` until the files have been read once.
    pub generation: Option<String>,
    /// Of the files that are there now, which a change has to expect; `None` until they have been read.
    pub files_generation: Option<String>,
    /// `generation` is still served, and its files are others by now.
    pub is_stale: bool,
    /// Earlier generations that it can be rolled back to, the latest first.
    pub previous_generations: Vec<String>,
    /// `None`, as the coverage, until the files have been loaded once.
    pub method: Option<Method>,
    pub coverage: Option<Coverage>,
    /// Sequences that hold it now, in any generation, alone or in a composition.
    pub in_flight: usize,
    /// Why it is refused; or, in another phase than `Failed`, why its files could not be read and are tried again.
    pub error: Option<String>,
    pub manifest: Arc<AdapterManifest>,
    /// `None` until this generation has been measured.
    pub self_test: Option<SelfTest>,
    /// Measured, and found to change nothing.
    pub is_inert: bool,
}

impl AdapterStatus {
    /// Why it cannot be asked for; `None` if it can.
    pub fn refusal(&self) -> Option<&str> {
        self.error.as_deref().filter(|_| self.phase == Phase::Failed)
    }
}

/// What all adapters together take at this moment; all but `registered` is 0 again when nothing is loaded and held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub registered: usize,
    /// Adapters and compositions in memory.
    pub resident: usize,
    /// With what is being loaded, and what was replaced and is still held.
    pub resident_bytes: u64,
    pub leases: usize,
}

/// What one adapter takes at this moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterUsage {
    pub name: String,
    pub tier: Tier,
    /// In memory, or on the disk what it would take there.
    pub bytes: u64,
    pub is_pinned: bool,
    /// The greatest of its sites; 0 where it has none, or has never been loaded.
    pub max_rank: usize,
    /// Requests wait for it to be loaded.
    pub is_waited_for: bool,
}
