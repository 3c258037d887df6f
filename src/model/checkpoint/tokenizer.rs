//! `tokenizer.json` and what stands beside it, as GGUF's metadata says the same.

use std::collections::HashMap;
use std::path::Path;

use candle_core::quantized::gguf_file::Value as Gguf;
use serde::Deserialize;
use serde_json::Value;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::{NormalizedString, Normalizer, NormalizerWrapper};

use super::config::Config;
use super::fields::ids;
use super::post_processor::Surroundings;
use super::{CheckpointError, read_json, read_text};
use crate::prompt::chat;
use crate::tokenizer::{LSTRIP, METASPACE, NORMALIZER, PRE_TOKENIZER, RSTRIP};

pub const FILE: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";
const GENERATION_CONFIG: &str = "generation_config.json";
const CHAT_TEMPLATE: &str = "chat_template.jinja";

#[derive(Deserialize)]
struct TokenizerFile {
    normalizer: Option<Value>,
    pre_tokenizer: Option<Value>,
    post_processor: Option<Value>,
    model: BpeModel,
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
}

#[derive(Deserialize)]
struct BpeModel {
    #[serde(rename = "type")]
    kind: Option<String>,
    vocab: HashMap<String, u32>,
    merges: Vec<Merge>,
    dropout: Option<f32>,
    unk_token: Option<String>,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
}

/// Two forms that the library has written.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Line(String),
}

impl Merge {
    fn line(self) -> String {
        match self {
            Self::Pair(left, right) => format!("{left} {right}"),
            Self::Line(line) => line,
        }
    }
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
    special: bool,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    /// Whether it is found in the text behind the normalizer.
    #[serde(default)]
    normalized: bool,
}

/// The part of `tokenizer_config.json` that matters.
#[derive(Default, Deserialize)]
struct TokenizerConfig {
    bos_token: Option<TokenText>,
    eos_token: Option<TokenText>,
    add_bos_token: Option<bool>,
    add_eos_token: Option<bool>,
    chat_template: Option<Templates>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum TokenText {
    Text(String),
    Token { content: String },
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

#[derive(Default, Deserialize)]
struct GenerationConfig {
    eos_token_id: Option<Value>,
}

/// GGUF's token types.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// `tokenizer.ggml.*` and the chat template, for a vocabulary of `config.vocab_size` tokens.
pub fn metadata(folder: &Path, config: &Config) -> Result<Vec<(String, Gguf)>, CheckpointError> {
    let file = read_json::<TokenizerFile>(folder, FILE)?.ok_or_else(|| {
        CheckpointError::file(
            FILE,
            "is not there: it can be made by AutoTokenizer.from_pretrained(…).save_pretrained(…)",
        )
    })?;
    let beside = read_json::<TokenizerConfig>(folder, CONFIG)?.unwrap_or_default();
    let generation = read_json::<GenerationConfig>(folder, GENERATION_CONFIG)?.unwrap_or_default();
    refuse_unknown_model(&file.model)?;
    refuse_unknown_flags(&file)?;

    let is_sentence_piece = file.model.byte_fallback;
    let vocabulary = Vocabulary::new(&file, config.vocab_size)?;
    let mut pairs: Vec<(String, Gguf)> = Vec::new();
    let mut set = |key: &str, value: Gguf| pairs.push((format!("tokenizer.ggml.{key}"), value));
    if is_sentence_piece {
        set("model", Gguf::String("llama".to_owned()));
        let (prepend, metaspace) = spaces(&file)?;
        set("add_space_prefix", Gguf::Bool(prepend != PrependScheme::Never));
        pairs.extend(metaspace.map(|step| (METASPACE.to_owned(), Gguf::String(step.to_string()))));
        let mut set = |key: &str, value: Gguf| pairs.push((format!("tokenizer.ggml.{key}"), value));
        set("scores", array(vocabulary.scores(&file.model.merges)?, Gguf::F32));
    } else {
        let mut all_steps = steps(file.pre_tokenizer.as_ref(), "pretokenizers");
        all_steps.extend(steps(file.normalizer.as_ref(), "normalizers"));
        if !all_steps.into_iter().any(|step| step.get("type") == Some(&"ByteLevel".into())) {
            let reason = "pre_tokenizer: without a step ByteLevel, a BPE model is served with byte_fallback only";
            return Err(CheckpointError::file(FILE, reason));
        }
        set("model", Gguf::String("gpt2".to_owned()));
        // The steps themselves, not the name of one of the few sequences of steps that have a name.
        let json = |step: &Option<Value>| Gguf::String(step.as_ref().unwrap_or(&Value::Null).to_string());
        pairs.push((PRE_TOKENIZER.to_owned(), json(&file.pre_tokenizer)));
        pairs.push((NORMALIZER.to_owned(), json(&file.normalizer)));
        pairs.push((crate::tokenizer::IGNORE_MERGES.to_owned(), Gguf::Bool(file.model.ignore_merges)));
    }
    let mut set = |key: &str, value: Gguf| pairs.push((format!("tokenizer.ggml.{key}"), value));

    let id_of = |text: &Option<TokenText>| match text {
        Some(TokenText::Text(text) | TokenText::Token { content: text }) => vocabulary.id(text),
        None => None,
    };
    let around = Surroundings::of(file.post_processor.as_ref())?;
    let first = around.before.first().map(|text| vocabulary.id(text));
    let bos = id_of(&beside.bos_token).or(config.bos_token_id).or(first.flatten());
    match (beside.add_eos_token, around.behind.first()) {
        (Some(true), _) => {
            let reason = "add_eos_token: true is not served: nothing would follow the end that it puts behind a prompt";
            return Err(CheckpointError::file(CONFIG, reason));
        }
        (None, Some(text)) => {
            return Err(CheckpointError::file(
                FILE,
                format!("post_processor: {text:?} behind every text is not served"),
            ));
        }
        _ => {}
    }
    let adds_bos = match (beside.add_bos_token, &around.before[..]) {
        (Some(adds), _) => adds,
        (None, []) => false,
        (None, [_]) if first == Some(bos) => true,
        (None, before) => {
            return Err(CheckpointError::file(
                FILE,
                format!("post_processor: {before:?} before every text is not served"),
            ));
        }
    };
    let named_ends = generation.eos_token_id.as_ref().map(|value| {
        ids(value).ok_or_else(|| CheckpointError::file(GENERATION_CONFIG, "eos_token_id: is no token id"))
    });
    let mut ends = named_ends.transpose()?.unwrap_or_else(|| config.eos_token_ids.clone());
    // The tokenizer's own comes first: templates write it.
    ends.splice(0..0, id_of(&beside.eos_token));
    let mut seen = Vec::new();
    ends.retain(|id| {
        !seen.contains(id) && {
            seen.push(*id);
            true
        }
    });
    if ends.len() > 3 {
        return Err(CheckpointError::file(
            GENERATION_CONFIG,
            format!("eos_token_id: {} tokens, three are read", ends.len()),
        ));
    }
    for (key, id) in ["eos_token_id", "eot_token_id", "eom_token_id"].into_iter().zip(ends) {
        set(key, Gguf::U32(id));
    }
    set("add_bos_token", Gguf::Bool(adds_bos));
    if let Some(bos) = bos {
        set("bos_token_id", Gguf::U32(bos));
    }
    let merges = file.model.merges.into_iter().map(Merge::line);
    if !is_sentence_piece {
        set("merges", array(merges, Gguf::String));
    }
    set("tokens", array(vocabulary.tokens, Gguf::String));
    set("token_type", array(vocabulary.kinds, Gguf::I32));

    // Without any, a reader that knows the architecture might take it to be meant.
    for (key, strips) in [(LSTRIP, (|token| token.lstrip) as fn(&AddedToken) -> bool), (RSTRIP, |token| token.rstrip)] {
        let ids = file.added_tokens.iter().filter(|token| strips(token)).map(|token| token.id);
        pairs.push((key.to_owned(), array(ids, Gguf::U32)));
    }
    pairs.extend(chat_templates(folder, beside.chat_template)?);
    Ok(pairs)
}

fn array<T>(values: impl IntoIterator<Item = T>, wrap: impl Fn(T) -> Gguf) -> Gguf {
    Gguf::Array(values.into_iter().map(wrap).collect())
}

fn refuse_unknown_model(model: &BpeModel) -> Result<(), CheckpointError> {
    let refuse = |what: String| Err(CheckpointError::file(FILE, format!("model.{what} is not served")));
    match model.kind.as_deref() {
        None | Some("BPE") => {}
        Some(kind) => return refuse(format!("type {kind:?}")),
    }
    let affixes = [
        ("continuing_subword_prefix", &model.continuing_subword_prefix),
        ("end_of_word_suffix", &model.end_of_word_suffix),
    ];
    if let Some(dropout) = model.dropout.filter(|dropout| *dropout != 0.0) {
        return refuse(format!("dropout {dropout}"));
    }
    if model.byte_fallback && model.ignore_merges {
        return refuse("ignore_merges with byte_fallback".to_owned());
    }
    match affixes.into_iter().find_map(|(name, text)| text.as_ref().filter(|t| !t.is_empty()).map(|t| (name, t))) {
        Some((name, text)) => refuse(format!("{name} {text:?}")),
        None => Ok(()),
    }
}

/// Refuses what decides where an added token is found and is not carried over.
fn refuse_unknown_flags(file: &TokenizerFile) -> Result<(), CheckpointError> {
    let refuse = |token: &AddedToken, what: &str| {
        Err(CheckpointError::file(FILE, format!("added_tokens: {what} of {:?} is not served", token.content)))
    };
    if let Some(token) = file.added_tokens.iter().find(|token| token.single_word) {
        return refuse(token, "single_word");
    }
    // SentencePiece's writes spaces as "▁" and puts one before the text. By the letter, an older Llama's `</s>` would be
    // found behind a space only, which nobody has meant.
    let Some(normalizer) = file.normalizer.as_ref().filter(|_| !file.model.byte_fallback) else { return Ok(()) };
    let unusable = |e: &dyn std::fmt::Display| CheckpointError::file(FILE, format!("normalizer: {e}"));
    let normalizer: NormalizerWrapper = serde_json::from_value(normalizer.clone()).map_err(|e| unusable(&e))?;
    for token in file.added_tokens.iter().filter(|token| token.normalized) {
        let mut text = NormalizedString::from(token.content.as_str());
        normalizer.normalize(&mut text).map_err(|e| unusable(&e))?;
        if text.get() != token.content {
            return refuse(token, "normalized");
        }
    }
    Ok(())
}

struct Vocabulary {
    tokens: Vec<String>,
    kinds: Vec<i32>,
    ids: HashMap<String, u32>,
}

impl Vocabulary {
    /// Every id of the embedding has a token: those that the tokenizer never makes are unused.
    fn new(file: &TokenizerFile, size: usize) -> Result<Self, CheckpointError> {
        let mut tokens: Vec<String> = (0..size).map(|id| format!("[PAD{id}]")).collect();
        let mut kinds = vec![UNUSED; size];
        let mut ids = file.model.vocab.clone();
        let mut place = |id: u32, text: &str, kind: i32| {
            let at = id as usize;
            if at >= size {
                let reason = format!("token {text:?} has the id {id}, the model's vocabulary has {size} tokens");
                return Err(CheckpointError::file(FILE, reason));
            }
            (tokens[at], kinds[at]) = (text.to_owned(), kind);
            Ok(())
        };
        for (text, id) in &file.model.vocab {
            let is_byte = file.model.byte_fallback && crate::tokenizer::parse_byte(text).is_some();
            let kind = if is_byte { BYTE } else { NORMAL };
            place(*id, text, if file.model.unk_token.as_ref() == Some(text) { UNKNOWN } else { kind })?;
        }
        for token in &file.added_tokens {
            let is_unknown = file.model.unk_token.as_ref() == Some(&token.content);
            let kind = if is_unknown {
                UNKNOWN
            } else if token.special {
                CONTROL
            } else {
                USER_DEFINED
            };
            place(token.id, &token.content, kind)?;
            ids.insert(token.content.clone(), token.id);
        }
        Ok(Self { tokens, kinds, ids })
    }

    fn id(&self, text: &str) -> Option<u32> {
        self.ids.get(text).copied()
    }

    /// SentencePiece joins the pair whose whole has the best score; the file has the order of the pairs.
    fn scores(&self, merges: &[Merge]) -> Result<Vec<f32>, CheckpointError> {
        let mut scores = vec![0.0; self.tokens.len()];
        for (rank, merge) in (1_usize..).zip(merges) {
            let whole = match merge {
                Merge::Pair(left, right) => format!("{left}{right}"),
                Merge::Line(line) => line.replacen(' ', "", 1),
            };
            let Some(id) = self.id(&whole) else {
                return Err(CheckpointError::file(FILE, format!("model.merges gives {whole:?}, which is no token")));
            };
            let score = &mut scores[id as usize];
            if *score == 0.0 {
                *score = -(rank as f32);
            }
        }
        Ok(scores)
    }
}

/// What SentencePiece puts before a text: by Llama's normalizer, or by the pre-tokenizer of newer files, which is given too.
fn spaces(file: &TokenizerFile) -> Result<(PrependScheme, Option<&Value>), CheckpointError> {
    let refuse =
        |step: &Value| CheckpointError::file(FILE, format!("the step {step} is not served with byte_fallback"));
    let mut prepend = PrependScheme::Never;
    let mut metaspace = None;
    let mut all_steps = steps(file.normalizer.as_ref(), "normalizers");
    all_steps.extend(steps(file.pre_tokenizer.as_ref(), "pretokenizers"));
    for step in all_steps {
        match step.get("type").and_then(Value::as_str) {
            Some("Prepend") if step.get("prepend") == Some(&"▁".into()) => prepend = PrependScheme::Always,
            // Beside the other it would be a third way.
            Some("Metaspace") if prepend == PrependScheme::Never && metaspace.is_none() => {
                let parsed: Metaspace = serde_json::from_value(step.clone())
                    .map_err(|e| CheckpointError::file(FILE, format!("the step {step}: {e}")))?;
                if parsed.get_replacement() != '▁' {
                    return Err(refuse(step));
                }
                prepend = parsed.prepend_scheme;
                metaspace = Some(step);
            }
            // " " into "▁", which is how SentencePiece writes it; Gemma cuts at spaces, of which none is left then.
            Some("Replace")
                if step.get("content") == Some(&"▁".into()) && step.pointer("/pattern/String") == Some(&" ".into()) =>
                {}
            Some("Split") if step.pointer("/pattern/String") == Some(&" ".into()) => {}
            _ => return Err(refuse(step)),
        }
    }
    Ok((prepend, metaspace))
}

/// The steps of a part of `tokenizer.json`: those of a sequence are in its field `list`.
pub fn steps<'a>(part: Option<&'a Value>, list: &str) -> Vec<&'a Value> {
    let Some(step) = part else { return Vec::new() };
    match step.get(list).and_then(Value::as_array) {
        Some(sequence) => sequence.iter().flat_map(|step| steps(Some(step), list)).collect(),
        None => vec![step],
    }
}

/// A file of its own goes before what the configuration has under no name, or as the default.
fn chat_templates(folder: &Path, named: Option<Templates>) -> Result<Vec<(String, Gguf)>, CheckpointError> {
    let mut pairs: Vec<(String, Gguf)> = Vec::new();
    let mut set = |key: String, template: String| pairs.push((key, Gguf::String(template)));
    let of_file = read_text(folder, CHAT_TEMPLATE)?;
    let has_file = of_file.is_some();
    of_file.into_iter().for_each(|template| set(chat::KEY.to_owned(), template));
    match named {
        Some(Templates::One(template)) if !has_file => set(chat::KEY.to_owned(), template),
        None | Some(Templates::One(_)) => {}
        Some(Templates::Named(list)) => {
            for NamedTemplate { name, template } in list {
                match name.as_str() {
                    "default" if has_file => {}
                    "default" => set(chat::KEY.to_owned(), template),
                    name => set(format!("{}{name}", chat::NAMED), template),
                }
            }
        }
    }
    Ok(pairs)
}
