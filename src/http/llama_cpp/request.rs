//! llama.cpp's requests in OpenAI's fields, which are then read like any other's.

use serde_json::{Map, Value};

use crate::generation::GenerationRequest;
use crate::http::completions::CompletionShape;
use crate::http::error::ApiError;
use crate::http::fields::Fields;
use crate::http::gap::{ItemFields, context_files, set_context};
use crate::http::reply::ReplyShape;
use crate::http::sampling::{MAX_CHOICES, default_to_no_limit};
use crate::http::sent_as::SentAs;
use crate::http::unsupported::{Route, refuse_unsupported};

const INFILL: [&str; 5] = ["prompt", "input_prefix", "input_suffix", "suffix", "input_extra"];
const SUFFIX_NAMES: [&str; 2] = ["input_suffix", "suffix"];
const EXTRA: ItemFields = ItemFields { name: "filename", text: "text", unnamed: "tmp" };

pub fn read_completion(fields: &Fields) -> Result<(GenerationRequest, SentAs), ApiError> {
    let (converted, sent_as) = converted(fields, &[])?;
    let request = CompletionShape::parse(&converted.into()).map_err(|error| sent_as.word(error))?;
    Ok((request, sent_as))
}

/// `prompt` is the line up to the cursor: it ends the prefix.
pub fn read_infill(fields: &Fields) -> Result<(GenerationRequest, SentAs), ApiError> {
    let text = |name| Ok::<_, ApiError>(fields.string(name)?.unwrap_or_default());
    let prefix = [text("input_prefix")?, text("prompt")?].concat();
    let suffix = fields.one_of(&SUFFIX_NAMES, |name| fields.string(name))?.unwrap_or_default();
    let extra = fields.array("input_extra")?.map_or(&[] as &[Value], Vec::as_slice);
    let extra = context_files("input_extra", extra, &EXTRA)?;
    let (mut converted, mut sent_as) = converted(fields, &INFILL)?;
    converted.insert("prompt".to_owned(), prefix.into());
    sent_as.set(&mut converted, "suffix", "input_suffix", suffix.into())?;
    let mut request = CompletionShape::parse(&converted.into()).map_err(|error| sent_as.word(error))?;
    set_context(&mut request, &extra);
    Ok((request, sent_as))
}

/// Whether the reply lists the ids of its tokens.
pub fn wants_tokens(fields: &Fields) -> Result<bool, ApiError> {
    Ok(fields.boolean("return_tokens")?.unwrap_or(false))
}

/// All fields but `own`, in OpenAI's words.
fn converted(fields: &Fields, own: &[&str]) -> Result<(Map<String, Value>, SentAs), ApiError> {
    refuse_unsupported(fields, Route::LlamaCpp)?;
    let (mut converted, mut sent_as) = (fields.without(own), SentAs::default());
    converted.remove("n_cmpl");
    if let Some(num_choices) = fields.count("n_cmpl", 1..=MAX_CHOICES)? {
        sent_as.set(&mut converted, "n", "n_cmpl", num_choices.into())?;
    }
    default_to_no_limit(&mut converted);
    // Records of the tokens have their ids.
    if wants_tokens(fields)? {
        converted.insert("logprobs".to_owned(), 0.into());
    }
    Ok((converted, sent_as))
}
