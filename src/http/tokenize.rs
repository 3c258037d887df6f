//! `/tokenize` in llama.cpp's form and in vLLM's, `/detokenize`, and `/apply-template`: what a prompt is to the model.

use axum::extract::State;
use axum::{Extension, Json};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;
use tokio::task::spawn_blocking;

use super::AppState;
use super::auth::Caller;
use super::chat::ChatShape;
use super::error::ApiError;
use super::fields::{Fields, wrong_type};
use super::models::check_name;
use super::reply::ReplyShape;
use super::trials::choose_arm;
use crate::generation::GenerationRequest;
use crate::tokenizer::detokenize::Detokenizer;
use crate::tokenizer::{Specials, Tokenizer, TokenizerError};

/// What only this route reads of a chat.
const OWN: [&str; 3] = ["add_special_tokens", "return_token_strs", "with_pieces"];

#[derive(Debug, JsonSchema, Serialize)]
pub struct Tokens {
    tokens: TokenList,
    count: usize,
    max_model_len: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_strs: Option<Vec<String>>,
}

#[derive(Debug, JsonSchema, Serialize)]
#[serde(untagged)]
enum TokenList {
    Ids(Vec<u32>),
    Pieces(Vec<TokenPiece>),
}

#[derive(Debug, JsonSchema, Serialize)]
struct TokenPiece {
    id: u32,
    piece: Piece,
}

/// A token may be part of a character.
#[derive(Debug, JsonSchema, Serialize)]
#[serde(untagged)]
enum Piece {
    Text(String),
    Bytes(Vec<u8>),
}

/// The same text under llama.cpp's name and vLLM's.
#[derive(Debug, JsonSchema, Serialize)]
pub struct Detokenized {
    content: String,
    prompt: String,
}

#[derive(Debug, JsonSchema, Serialize)]
pub struct RenderedPrompt {
    prompt: String,
}

/// `POST /tokenize`: `content` is text, in which special tokens are parsed unless `parse_special` is false; `prompt` and
/// `messages` are tokens as a completion or a chat has them.
pub async fn tokenize(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    fields: Fields,
) -> Result<Json<Tokens>, ApiError> {
    let given: Vec<&str> =
        ["content", "prompt", "messages"].into_iter().filter(|name| fields.get(name).is_some()).collect();
    check_name(&state, &caller, &fields)?;
    let ids = match given[..] {
        ["messages"] => {
            if fields.boolean("add_special_tokens")?.unwrap_or(false) {
                let message = "`add_special_tokens` must be false for `messages`: the chat template writes them";
                return Err(ApiError::invalid("add_special_tokens", message));
            }
            chat_tokens(&state, &caller, &fields).await?
        }
        ["content"] => {
            let is_parsed = fields.boolean("parse_special")?.unwrap_or(true);
            let specials = if is_parsed { Specials::Parse } else { Specials::AsText };
            let adds_bos = fields.boolean("add_special")?.unwrap_or(false);
            text_tokens(&state, &fields, "content", specials, adds_bos).await?
        }
        ["prompt"] => {
            let adds_bos = fields.boolean("add_special_tokens")?.unwrap_or(true);
            text_tokens(&state, &fields, "prompt", Specials::Parse, adds_bos).await?
        }
        _ => return Err(ApiError::invalid("content", "one of `content`, `prompt` and `messages` is required")),
    };
    let tokenizer = state.generation.tokenizer();
    let text = |id: &u32| tokenizer.token_text(*id).into_owned();
    let token_strs =
        fields.boolean("return_token_strs")?.unwrap_or(false).then(|| ids.iter().map(text).collect::<Vec<_>>());
    let (count, max_model_len) = (ids.len(), state.generation.context_length());
    let tokens = if fields.boolean("with_pieces")?.unwrap_or(false) {
        TokenList::Pieces(ids.into_iter().map(|id| TokenPiece { id, piece: Piece::of(tokenizer, id) }).collect())
    } else {
        TokenList::Ids(ids)
    };
    Ok(Json(Tokens { tokens, count, max_model_len, token_strs }))
}

/// `POST /detokenize`
pub async fn detokenize(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    fields: Fields,
) -> Result<Json<Detokenized>, ApiError> {
    check_name(&state, &caller, &fields)?;
    let items = fields.array("tokens")?.ok_or_else(|| ApiError::invalid("tokens", "`tokens` is required"))?;
    let vocab_size = state.generation.tokenizer().vocab_size();
    let id = |(index, item): (usize, &Value)| {
        let id = item.as_u64().and_then(|id| u32::try_from(id).ok()).filter(|id| (*id as usize) < vocab_size);
        id.ok_or_else(|| {
            let at = format!("tokens[{index}]");
            let message = format!("`{at}` is `{item}`, not the id of one of the {vocab_size} tokens");
            ApiError::invalid(&at, message)
        })
    };
    let ids = items.iter().enumerate().map(id).collect::<Result<Vec<_>, _>>()?;
    let content = text_of(&state, &ids);
    Ok(Json(Detokenized { prompt: content.clone(), content }))
}

/// `POST /apply-template`: the prompt that the messages of a chat become.
pub async fn apply_template(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    fields: Fields,
) -> Result<Json<RenderedPrompt>, ApiError> {
    let tokens = chat_tokens(&state, &caller, &fields).await?;
    Ok(Json(RenderedPrompt { prompt: text_of(&state, &tokens) }))
}

/// A chat that is only to be looked at: an experiment's arm is chosen as for the chat itself, and nothing of it is recorded.
pub fn unrecorded_chat(state: &AppState, caller: &Caller, fields: &Fields) -> Result<GenerationRequest, ApiError> {
    let mut request = ChatShape::parse(fields)?;
    choose_arm(state, caller, fields.string("user")?, &mut request)?;
    Ok(request)
}

async fn chat_tokens(state: &AppState, caller: &Caller, fields: &Fields) -> Result<Vec<u32>, ApiError> {
    let request = unrecorded_chat(state, caller, &fields.without(&OWN).into())?;
    Ok(state.generation.prompt_tokens(request, &caller.access).await?)
}

async fn text_tokens(
    state: &AppState,
    fields: &Fields,
    name: &'static str,
    specials: Specials,
    adds_bos: bool,
) -> Result<Vec<u32>, ApiError> {
    let Some(text) = fields.string(name)?.map(str::to_owned) else {
        return Err(wrong_type(name, "a string", &Value::Null));
    };
    let tokenizer = state.generation.tokenizer().clone();
    let encode = move || {
        let mut ids: Vec<u32> = tokenizer.bos().filter(|_| adds_bos).into_iter().collect();
        ids.extend(tokenizer.encode(&text, specials)?);
        Ok(ids)
    };
    let encoded = spawn_blocking(encode).await.map_err(|panic| {
        tracing::error!("a text could not be encoded: {panic}");
        ApiError::internal()
    })?;
    encoded.map_err(|error: TokenizerError| ApiError::invalid(name, error.to_string()))
}

/// With special tokens as they are written.
pub fn text_of(state: &AppState, ids: &[u32]) -> String {
    let mut detokenizer = Detokenizer::with_special_tokens(state.generation.tokenizer().clone());
    let mut text: String = ids.iter().map(|id| detokenizer.push(*id)).collect();
    text.push_str(&detokenizer.finish());
    text
}

impl Piece {
    fn of(tokenizer: &Tokenizer, id: u32) -> Self {
        let bytes = tokenizer.token_bytes(id).to_vec();
        String::from_utf8(bytes).map_or_else(|error| Self::Bytes(error.into_bytes()), Self::Text)
    }
}
