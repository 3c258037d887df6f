//! What a comparison looks like on the wire.

use std::time::Duration;

use schemars::JsonSchema;
use serde::Serialize;

use super::super::error::{ApiError, ErrorBody};
use super::super::types::{AdapterName, IclReply, Usage, finish_reason};
use crate::adapter::canonical::Member;
use crate::compare::{Arm, ArmResult};
use crate::engine::request::FinishReason;

#[derive(Debug, JsonSchema, Serialize)]
pub struct CompareReply<'a> {
    pub id: &'a str,
    pub object: &'static str,
    /// Unix seconds.
    pub created: u64,
    pub seed: i64,
    /// In the order of the request.
    pub arms: Vec<ArmReply<'a>>,
}

#[derive(Debug, JsonSchema, Serialize)]
pub struct ArmReply<'a> {
    pub name: &'a str,
    #[serde(flatten)]
    pub outcome: Option<Outcome>,
}

#[derive(Debug, JsonSchema, Serialize)]
#[serde(untagged)]
pub enum Outcome {
    Finished(Box<Finished>),
    Failed(Failure),
}

/// What an arm was promised.
#[derive(Debug, Clone, JsonSchema, Serialize)]
pub struct ArmHead {
    model: String,
    adapter: Option<AdapterName>,
    adapters: Vec<Member>,
    icl: Option<IclReply>,
    seed: i64,
}

#[derive(Debug, JsonSchema, Serialize)]
pub struct Finished {
    #[serde(flatten)]
    head: ArmHead,
    text: String,
    #[serde(serialize_with = "finish_reason")]
    #[schemars(with = "Option<String>", extend("enum" = ["stop", "length", null]))]
    finish_reason: Option<FinishReason>,
    usage: Usage,
    /// `null` without an output token.
    ttft_ms: Option<f64>,
    /// `null` with less than two output tokens.
    tpot_ms: Option<f64>,
    total_ms: f64,
    logprob: f64,
    /// `null` where the first arm has no output.
    agreement: Option<f64>,
}

#[derive(Debug, JsonSchema, Serialize)]
pub struct Failure {
    error: Box<ErrorBody>,
}

/// An event of a stream.
#[derive(Debug, JsonSchema, Serialize)]
#[schemars(rename = "CompareChunk")]
pub struct Chunk<'a> {
    pub id: &'a str,
    /// Its place in the request.
    pub arm: usize,
    pub name: &'a str,
    #[serde(flatten)]
    pub event: ChunkEvent,
}

#[derive(Debug, JsonSchema, Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum ChunkEvent {
    Start(ArmHead),
    Delta { text: String },
    Finish(Finished),
    Error(Failure),
}

/// The last event before `[DONE]`.
#[derive(Debug, JsonSchema, Serialize)]
#[schemars(rename = "CompareEnd")]
pub struct End<'a> {
    pub id: &'a str,
    pub event: &'static str,
}

impl ArmHead {
    pub fn of(arm: &Arm) -> Self {
        Self {
            model: arm.model.id.clone(),
            adapter: AdapterName::of(&arm.model),
            adapters: arm.model.applied.clone(),
            icl: arm.icl.as_ref().map(IclReply::of),
            seed: arm.seed,
        }
    }
}

impl Finished {
    pub fn of(mut head: ArmHead, result: ArmResult) -> Self {
        IclReply::saved(&mut head.icl, result.usage);
        Self {
            head,
            text: result.text,
            finish_reason: Some(result.reason),
            usage: Usage::of(result.usage),
            ttft_ms: result.timing.first_token.map(milliseconds),
            tpot_ms: result.timing.per_output_token.map(milliseconds),
            total_ms: milliseconds(result.timing.total),
            logprob: result.logprob,
            agreement: result.agreement,
        }
    }
}

impl Failure {
    pub fn of(error: ApiError) -> Self {
        Self { error: error.into_envelope().error }
    }
}

/// To the microsecond.
fn milliseconds(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1e3
}
