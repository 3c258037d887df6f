//! What is recorded: how a request went, and what its user thought of it.

use schemars::JsonSchema;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::store::Unavailable;
use super::writer::now_ms;

/// One finished run of one arm: of a request to an alias, or of a comparison.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// The id of the reply, which votes name; the arms of a comparison, and a request and its shadows, share it.
    pub id: String,
    /// When it began, in Unix milliseconds; it is recorded at its end.
    pub started_ms: i64,
    /// `None` for an arm of a comparison.
    pub experiment: Option<String>,
    pub arm: String,
    /// As in the reply, with `+icl:<store>@<k>` behind it where examples were used.
    pub model: String,
    /// Of the adapter.
    pub generation: Option<String>,
    /// Its output was not returned.
    pub shadow: bool,
    pub outcome: Outcome,
    /// From [`prompt_hash`]: finds the requests of several arms that saw the same prompt.
    pub prompt_hash: Option<i64>,
    pub ttft_ms: Option<f64>,
    /// Per output token after the first.
    pub tpot_ms: Option<f64>,
    pub prompt_tokens: u32,
    pub completion_tokens: u32,
    /// The output; dropped unless `experiments.keep_text` is set.
    pub text: Option<String>,
    /// Of a reply that is the one answer to one prompt, where the experiment keeps prompts.
    pub asked: Option<Asked>,
}

/// What an output is the answer to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// What `prompt_hash` is of.
    pub prompt: String,
    /// From [`user_hash`]; `None` where nothing says who asked.
    pub user_hash: Option<i64>,
}

impl Record {
    /// Of a run that begins now: an arm of a comparison, until more is said.
    pub fn begin(id: &str, arm: &str) -> Self {
        Self {
            id: id.to_owned(),
            started_ms: now_ms(),
            experiment: None,
            arm: arm.to_owned(),
            model: String::new(),
            generation: None,
            shadow: false,
            outcome: Outcome::Cancelled,
            prompt_hash: None,
            ttft_ms: None,
            tpot_ms: None,
            prompt_tokens: 0,
            completion_tokens: 0,
            text: None,
            asked: None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Completed,
    /// Refused or broken off by the server.
    Failed,
    /// The client went away: nobody's fault.
    Cancelled,
}

/// Of a prompt as the client sent it, before any arm renders it.
pub fn prompt_hash(prompt: &str) -> i64 {
    short_hash(prompt)
}

/// Tells users apart without saying who they are to whoever does not know their names.
pub fn user_hash(user: &str) -> i64 {
    short_hash(user)
}

fn short_hash(text: &str) -> i64 {
    Sha256::digest(text).iter().take(8).fold(0, |hash, &byte| hash << 8 | i64::from(byte))
}

/// What a user thinks of a completion or comparison. A later vote of the same user on the same id replaces an earlier one
/// of the same sort: winner; accepted, rejected or edited; viewed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vote {
    pub id: String,
    /// Empty where clients do not say.
    pub user: String,
    pub kind: VoteKind,
    /// The winner; `None` is a tie.
    pub arm: Option<String>,
    /// What the user made of the output.
    pub text: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, JsonSchema, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum VoteKind {
    Winner,
    Accepted,
    Rejected,
    Edited,
    View,
}

impl VoteKind {
    pub const ALL: [Self; 5] = [Self::Winner, Self::Accepted, Self::Rejected, Self::Edited, Self::View];

    pub fn name(self) -> &'static str {
        match self {
            Self::Winner => "winner",
            Self::Accepted => "accepted",
            Self::Rejected => "rejected",
            Self::Edited => "edited",
            Self::View => "view",
        }
    }

    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// One user has one vote of each sort.
    pub(super) fn sort(self) -> &'static str {
        match self {
            Self::Winner => "winner",
            Self::Accepted | Self::Rejected | Self::Edited => "judgement",
            Self::View => "view",
        }
    }
}

/// A vote as it was stored.
#[derive(Debug, Clone, PartialEq, JsonSchema, Serialize)]
pub struct StoredVote {
    pub kind: VoteKind,
    pub arm: Option<String>,
    pub text: Option<String>,
    pub user: Option<String>,
    /// Unix seconds.
    pub created: i64,
}

/// Why a vote was not recorded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VoteError {
    #[error("the comparison has no arm {arm:?}; it has {}", .arms.join(", "))]
    UnknownArm { arm: String, arms: Vec<String> },
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_hash_stays_the_same_and_tells_prompts_apart() {
        // The first eight bytes of SHA-256, FIPS 180-4's example "abc": ba7816bf 8f01cfea.
        assert_eq!(prompt_hash("abc"), 0xba78_16bf_8f01_cfea_u64.cast_signed());
        assert_ne!(prompt_hash("abc"), prompt_hash("abd"));
    }

    #[test]
    fn every_kind_is_read_back_from_its_name() {
        for kind in VoteKind::ALL {
            assert_eq!(VoteKind::parse(kind.name()), Some(kind));
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.name());
        }
        assert_eq!(VoteKind::parse("liked"), None);
    }
}
