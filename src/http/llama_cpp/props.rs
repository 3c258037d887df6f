//! `GET /props`: what clients of llama.cpp ask before they speak.

use axum::Json;
use axum::extract::State;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;

use super::reply::settings;
use crate::generation::GenerationOptions;
use crate::http::AppState;

#[derive(Debug, JsonSchema, Serialize)]
pub struct Props {
    default_generation_settings: DefaultSettings,
    /// Sequences that run at once.
    total_slots: usize,
    model_alias: String,
    /// Empty where the model cannot chat.
    chat_template: String,
    chat_template_caps: ChatTemplateCaps,
    bos_token: String,
    eos_token: String,
    modalities: Modalities,
    build_info: &'static str,
}

#[derive(Debug, JsonSchema, Serialize)]
struct DefaultSettings {
    n_ctx: usize,
    params: Value,
}

#[derive(Debug, JsonSchema, Serialize)]
struct ChatTemplateCaps {
    supports_tools: bool,
    supports_tool_calls: bool,
    supports_system_role: bool,
}

#[derive(Debug, JsonSchema, Serialize)]
struct Modalities {
    vision: bool,
    audio: bool,
}

pub async fn props(State(state): State<AppState>) -> Json<Props> {
    let (base, tokenizer) = (state.generation.base(), state.generation.tokenizer());
    let template = base.chat_template.as_ref().ok();
    let calls_tools = state.generation.call_format().is_some();
    let text = |id: Option<u32>| id.map_or_else(String::new, |id| tokenizer.token_text(id).into());
    Json(Props {
        default_generation_settings: DefaultSettings {
            n_ctx: state.generation.context_length(),
            params: settings(&GenerationOptions::default(), -1),
        },
        total_slots: state.config.engine.max_sequences,
        model_alias: base.id.clone(),
        chat_template: template.map_or_else(String::new, |template| template.source().to_owned()),
        chat_template_caps: ChatTemplateCaps {
            supports_tools: calls_tools,
            supports_tool_calls: calls_tools,
            supports_system_role: template.is_some(),
        },
        bos_token: text(tokenizer.bos()),
        eos_token: text(tokenizer.eos()),
        modalities: Modalities { vision: false, audio: false },
        build_info: concat!("lorry-", env!("CARGO_PKG_VERSION")),
    })
}
