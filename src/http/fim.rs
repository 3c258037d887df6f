//! `POST /v1/fim/completions`, Mistral's: a gap between `prompt` and `suffix`, filled by a reply in the form of chat.

use axum::Extension;
use axum::extract::State;
use axum::response::Response;

use super::AppState;
use super::auth::Caller;
use super::chat::ChatShape;
use super::completions::CompletionShape;
use super::error::ApiError;
use super::fields::Fields;
use super::reply::{ReplyShape, answer};
use super::sampling::default_to_no_limit;
use super::types::{ChatChoice, ChatChunkChoice};
use crate::engine::request::FinishReason;
use crate::generation::{Completed, Generation, GenerationOptions, GenerationRequest, TextDelta};

pub async fn completions(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    fields: Fields,
) -> Result<Response, ApiError> {
    answer::<FimShape>(&state, &caller, &fields).await
}

/// A completion's request and a chat's reply.
struct FimShape(ChatShape);

impl ReplyShape for FimShape {
    const ID_PREFIX: &'static str = "fimcmpl";
    const OBJECT: &'static str = ChatShape::OBJECT;
    const CHUNK_OBJECT: &'static str = ChatShape::CHUNK_OBJECT;
    type Choice = ChatChoice;
    type ChunkChoice = ChatChunkChoice;

    fn parse(fields: &Fields) -> Result<GenerationRequest, ApiError> {
        fields.string("prompt")?;
        let mut request = fields.without(&[]);
        if fields.get("suffix").is_none() {
            request.insert("suffix".to_owned(), "".into());
        }
        default_to_no_limit(&mut request);
        CompletionShape::parse(&request.into())
    }

    fn new(generation: &Generation, options: &GenerationOptions) -> Self {
        Self(ChatShape::new(generation, options))
    }

    fn choice(&mut self, index: usize, completed: Completed) -> ChatChoice {
        self.0.choice(index, completed)
    }

    fn delta(&mut self, index: usize, delta: TextDelta) -> Option<ChatChunkChoice> {
        self.0.delta(index, delta)
    }

    /// Clients read `content` of every chunk, and it must be a string.
    fn finish(&mut self, index: usize, reason: FinishReason, score: Option<f32>) -> ChatChunkChoice {
        let mut choice = self.0.finish(index, reason, score);
        choice.delta.content.get_or_insert_default();
        choice
    }
}
