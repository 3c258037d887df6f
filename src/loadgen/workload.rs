//! What is asked: requests that a file holds, or made-up prompts of a length.

use axum::body::Bytes;
use axum::http::{HeaderMap, HeaderValue, Uri, header};
use rand::SeedableRng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};

use super::LoadgenError;
use crate::terminal::ServerArgs;

pub const COMPLETIONS: &str = "/v1/completions";

/// About a token each, to most tokenizers.
const WORDS: [&str; 32] = [
    "def", "class", "return", "import", "self", "for", "in", "range", "len", "list", "dict", "print", "value", "index",
    "key", "data", "result", "node", "tree", "graph", "sort", "merge", "parse", "read", "write", "file", "line",
    "token", "count", "total", "sum", "max",
];

/// Of a made-up prompt; far beyond any context.
pub const MAX_PROMPT_TOKENS: usize = 10_000_000;

/// What is posted, and where to.
#[derive(Debug, Clone, PartialEq)]
pub struct Target {
    pub uri: Uri,
    pub body: Bytes,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Ask {
    /// To be sent as it is.
    Given(Target),
    /// A completion of so many tokens, of a prompt of about so many, that no other request has.
    Sized { model: Option<String>, prompt_tokens: usize, max_tokens: usize },
}

/// The server that is asked.
#[derive(Debug)]
pub struct Destination {
    url: String,
    completions: Uri,
    /// Of every request.
    pub headers: HeaderMap,
    models: Vec<String>,
}

impl Destination {
    /// `models` are asked in turn where a request names none; without any, the server chooses.
    ///
    /// # Errors
    /// An address or a key that HTTP cannot carry.
    pub fn new(server: &ServerArgs, models: &[String]) -> Result<Self, LoadgenError> {
        let url = server.url.trim_end_matches('/').to_owned();
        let completions = parse_url(&format!("{url}{COMPLETIONS}")).map_err(LoadgenError::Url)?;
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(key) = &server.api_key {
            let mut value = HeaderValue::from_str(&format!("Bearer {key}")).map_err(|_| LoadgenError::Key)?;
            value.set_sensitive(true);
            headers.insert(header::AUTHORIZATION, value);
        }
        Ok(Self { url, completions, headers, models: models.to_vec() })
    }

    /// Made-up completions, one for each model.
    pub fn sized(&self, prompt_tokens: usize, max_tokens: usize) -> Vec<Ask> {
        let asks = (0..self.models.len().max(1)).map(|index| self.model(index));
        asks.map(|model| Ask::Sized { model, prompt_tokens, max_tokens }).collect()
    }

    /// Of the request at `index`, if it names none.
    pub fn model(&self, index: usize) -> Option<String> {
        self.models.get(index % self.models.len().max(1)).cloned()
    }

    /// # Errors
    /// A path that is none, or a body that asks for what cannot be timed.
    pub fn target(&self, path: &str, body: Map<String, Value>) -> Result<Target, String> {
        if !path.starts_with('/') {
            return Err(format!("`path` must begin with a slash, as {COMPLETIONS} does; it is `{path}`"));
        }
        let uri = parse_url(&format!("{}{path}", self.url)).map_err(|cause| format!("`path`: {cause}"))?;
        Ok(Target { uri, body: streamed(body)? })
    }

    /// What request number `number` sends; a made-up prompt follows from it and the seed.
    pub fn make(&self, ask: &Ask, seed: u64, number: u64) -> Target {
        match ask {
            Ask::Given(target) => target.clone(),
            Ask::Sized { model, prompt_tokens, max_tokens } => {
                // Greedy and not ended early, so that replies are as long as was asked for.
                let mut body = json!({"prompt": prompt(seed, number, *prompt_tokens), "max_tokens": max_tokens,
                    "temperature": 0, "ignore_eos": true, "stream": true, "stream_options": stream_options()});
                if let Some(model) = model {
                    body["model"] = model.as_str().into();
                }
                Target { uri: self.completions.clone(), body: body.to_string().into() }
            }
        }
    }
}

/// No two begin alike, so that no cached prefix helps.
fn prompt(seed: u64, number: u64, num_tokens: usize) -> String {
    let mut prompt = format!("{seed} {number}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ number.rotate_left(32));
    for word in (0..num_tokens).filter_map(|_| WORDS.choose(&mut rng)) {
        prompt.push(' ');
        prompt.push_str(word);
    }
    prompt
}

/// The body, told to stream and to say at the end how many tokens it took.
fn streamed(mut body: Map<String, Value>) -> Result<Bytes, String> {
    let stream = body.entry("stream").or_insert(Value::Bool(true));
    if *stream != Value::Bool(true) {
        return Err("`stream` in the body must be true or absent: times to a token are read from a stream".to_owned());
    }
    body.entry("stream_options").or_insert_with(stream_options);
    Ok(Value::Object(body).to_string().into())
}

fn stream_options() -> Value {
    json!({"include_usage": true})
}

fn parse_url(url: &str) -> Result<Uri, String> {
    let uri: Uri = url.parse().map_err(|cause| format!("`{url}` is not a URL: {cause}"))?;
    match (uri.scheme_str(), uri.authority()) {
        (Some("http" | "https"), Some(_)) => Ok(uri),
        _ => Err(format!("`{url}` must be http://HOST:PORT or https://HOST:PORT")),
    }
}
