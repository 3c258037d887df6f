//! What is served, as Ollama lists models: `GET /api/tags`, `GET /api/ps`, `POST /api/show`.

use std::borrow::Cow;
use std::time::{Duration, SystemTime};

use axum::extract::State;
use axum::{Extension, Json};
use chrono::{DateTime, SecondsFormat, Utc};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::request::read_model;
use crate::adapter::registry::{AdapterStatus, Tier};
use crate::generation::Base;
use crate::hexadecimal::hexadecimal;
use crate::http::AppState;
use crate::http::auth::Caller;
use crate::http::error::ApiError;
use crate::http::fields::Fields;
use crate::icl;
use crate::prompt::chat::ChatTemplate;

/// The tag that Ollama's clients put behind a name without one.
const DEFAULT_TAG: &str = "latest";
/// How the name of the device begins that is none of a card.
const CPU: &str = "CPU";
/// Ollama has a time at which a model leaves memory; what is in memory here has none.
const NEVER: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

#[derive(Debug, JsonSchema, Serialize)]
#[schemars(rename = "OllamaModels")]
pub struct Models {
    models: Vec<ModelCard>,
}

#[derive(Debug, JsonSchema, Serialize)]
#[schemars(rename = "OllamaModelCard")]
struct ModelCard {
    name: String,
    model: String,
    /// RFC 3339.
    modified_at: String,
    /// Bytes: of the base its file, of an adapter what it takes in memory, 0 before it was read.
    size: u64,
    /// Of the name and generation: it changes with an adapter's weights.
    digest: String,
    details: Details,
    #[serde(flatten)]
    residency: Option<ResidencyCard>,
}

#[derive(Debug, JsonSchema, Serialize)]
#[schemars(rename = "OllamaResidencyCard")]
struct ResidencyCard {
    expires_at: String,
    /// Bytes in the memory of the card.
    size_vram: u64,
    context_length: usize,
}

#[derive(Debug, JsonSchema, Serialize)]
#[schemars(rename = "OllamaDetails")]
struct Details {
    /// The base of an adapter.
    parent_model: String,
    format: &'static str,
    family: String,
    families: [String; 1],
    parameter_size: String,
    quantization_level: &'static str,
}

/// What `name` is called here: without the default tag. The name of the base without its own tag is the base, there
/// being no other of that name.
pub fn served_name<'a>(state: &'a AppState, name: &'a str) -> Cow<'a, str> {
    let untagged = name.strip_suffix(DEFAULT_TAG).and_then(|name| name.strip_suffix(':')).unwrap_or(name);
    let base = state.generation.base_id();
    match base.rsplit_once(':') {
        Some((family, tag)) if family == untagged && !tag.contains('/') => base.into(),
        _ => untagged.into(),
    }
}

pub async fn tags(State(state): State<AppState>, Extension(caller): Extension<Caller>) -> Json<Models> {
    let servable = state.generation.servable_adapters(&caller.access);
    let models = std::iter::once(None).chain(servable.map(Some)).map(|adapter| card(&state, adapter.as_ref()));
    let aliases = state.generation.visible_aliases(&caller.access);
    let aliases = aliases.map(|(alias, adapter)| alias_card(&state, alias, adapter.as_ref()));
    let experiments = state.experiments.aliases().map(|alias| alias_card(&state, alias, None));
    Json(Models { models: models.chain(aliases).chain(experiments).collect() })
}

pub async fn resident(State(state): State<AppState>, Extension(caller): Extension<Caller>) -> Json<Models> {
    let adapters = state.generation.visible_adapters(&caller.access).into_iter();
    let resident = adapters.filter(|adapter| adapter.tier == Tier::Host);
    let models = std::iter::once(None).chain(resident.map(Some)).map(|adapter| {
        let card = card(&state, adapter.as_ref());
        let size_vram = if state.generation.device().starts_with(CPU) { 0 } else { card.size };
        let context_length = state.generation.context_length();
        let expires_at = timestamp(SystemTime::now() + NEVER);
        ModelCard { residency: Some(ResidencyCard { expires_at, size_vram, context_length }), ..card }
    });
    Json(Models { models: models.collect() })
}

pub async fn show(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    fields: Fields,
) -> Result<Json<Value>, ApiError> {
    let name = read_model(&fields)?.filter(|name| !name.is_empty());
    let name = name.ok_or_else(|| ApiError::invalid("model", "`model` is required"))?;
    let name = served_name(&state, name);
    let adapter = if state.experiments.is_alias(&name) {
        None
    } else {
        let (model, _) = icl::Selection::split_model_name(&name)?;
        state.generation.find_model(model, &caller.access)?
    };
    let (base, card) = (state.generation.base(), card(&state, adapter.as_ref()));
    let template = template(base);
    let modelfile = match &adapter {
        None => format!("FROM {}\nTEMPLATE \"\"\"{template}\"\"\"\n", base.id),
        Some(adapter) => format!("FROM {}\nADAPTER {}\nTEMPLATE \"\"\"{template}\"\"\"\n", base.id, adapter.name),
    };
    Ok(Json(json!({
        "modelfile": modelfile,
        "template": template,
        "parameters": "",
        "license": "",
        "details": card.details,
        "model_info": model_info(&state),
        "capabilities": capabilities(base),
        "modified_at": card.modified_at,
    })))
}

fn capabilities(base: &Base) -> Vec<&'static str> {
    let insert = base.fill_in_middle.as_ref().map(|_| "insert");
    let tools = base.chat_template.as_ref().ok().and_then(ChatTemplate::call_format).map(|_| "tools");
    std::iter::once("completion").chain(insert).chain(tools).collect()
}

/// In Ollama's own language, for clients that look for what it can do in it: the base's template is applied as the GGUF
/// has it.
fn template(base: &Base) -> String {
    let text = |id| base.tokenizer.token_text(id);
    match base.tokenizer.fim() {
        None => "{{ .Prompt }}".to_owned(),
        Some(fim) => {
            let prefix = format!("{}{{{{ .Prompt }}}}", text(fim.prefix));
            let suffix = format!("{}{{{{ .Suffix }}}}", text(fim.suffix));
            let (first, second) = fim.order.arrange(prefix, suffix);
            let middle = fim.middle.map(text).unwrap_or_default();
            format!("{{{{- if .Suffix }}}}{first}{second}{middle}{{{{ else }}}}{{{{ .Prompt }}}}{{{{ end }}}}")
        }
    }
}

fn model_info(state: &AppState) -> Map<String, Value> {
    let file = &state.generation.base().file;
    let architecture = file.architecture.as_str();
    let context_length = state.generation.context_length();
    Map::from_iter([
        ("general.architecture".to_owned(), architecture.into()),
        ("general.basename".to_owned(), state.generation.base_id().into()),
        ("general.parameter_count".to_owned(), file.num_parameters.into()),
        // That of the server, which may be less than the model was trained for.
        (format!("{architecture}.context_length"), context_length.into()),
        (format!("{architecture}.embedding_length"), file.hidden_size.into()),
    ])
}

/// Of a name that stands for a model, or an experiment, of which a client sees no more than that it can be asked.
fn alias_card(state: &AppState, alias: &str, adapter: Option<&AdapterStatus>) -> ModelCard {
    let digest = hexadecimal(Sha256::new_with_prefix(alias));
    ModelCard { name: alias.to_owned(), model: alias.to_owned(), digest, ..card(state, adapter) }
}

fn card(state: &AppState, adapter: Option<&AdapterStatus>) -> ModelCard {
    let Base { id, file, .. } = state.generation.base();
    let name = adapter.map_or(id.clone(), |adapter| state.generation.model_id(&adapter.name));
    let generation = adapter.and_then(|adapter| adapter.generation.as_deref()).unwrap_or_default();
    let size = match adapter {
        None => file.size_bytes,
        Some(adapter) => adapter.coverage.as_ref().map_or(0, |coverage| coverage.resident_bytes as u64),
    };
    ModelCard {
        model: name.clone(),
        modified_at: timestamp(file.modified),
        size,
        digest: hexadecimal(Sha256::new_with_prefix(&name).chain_update(generation)),
        details: Details {
            parent_model: adapter.map_or(String::new(), |_| id.clone()),
            format: if adapter.is_some() { "safetensors" } else { "gguf" },
            family: file.architecture.clone(),
            families: [file.architecture.clone()],
            parameter_size: file.parameter_size(),
            quantization_level: file.quantization,
        },
        name,
        residency: None,
    }
}

fn timestamp(time: SystemTime) -> String {
    DateTime::<Utc>::from(time).to_rfc3339_opts(SecondsFormat::Secs, true)
}
