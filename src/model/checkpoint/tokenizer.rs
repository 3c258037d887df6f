//! `tokenizer.json` and what stands beside it, as GGUF's metadata says the same.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::quantized::gguf_file::Value as Gguf;
use serde::Deserialize;
use serde_json::Value;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::{NormalizedString, Normalizer, NormalizerWrapper};

use super::config::Config;
use super::fields;
use super::post_processor::Surroundings;
use super::templates::{self, Templates};
use super::{CheckpointError, generation, read_json, read_text};
use crate::tokenizer::{LSTRIP, METASPACE, MORE_ENDS, NORMALIZER, PIECE_MERGES, PRE_TOKENIZER, RSTRIP};

pub const FILE: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";

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

/// As much as a tokenizer with any type of model has.
#[derive(Deserialize)]
struct AnyTokenizer {
    model: AnyModel,
}

#[derive(Deserialize)]
struct AnyModel {
    #[serde(rename = "type")]
    kind: String,
}

/// An added token in `tokenizer_config.json`, where its id is the key.
#[derive(Deserialize)]
struct TokenAddedAnew {
    content: String,
    #[serde(default)]
    special: bool,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    normalized: Option<bool>,
}

/// The part of `tokenizer_config.json` that matters.
#[derive(Default, Deserialize)]
struct TokenizerConfig {
    #[serde(default)]
    added_tokens_decoder: BTreeMap<u32, TokenAddedAnew>,
    bos_token: Option<TokenText>,
    eos_token: Option<TokenText>,
    add_bos_token: Option<bool>,
    add_eos_token: Option<bool>,
    add_prefix_space: Option<bool>,
    chat_template: Option<Templates>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum TokenText {
    Text(String),
    Token { content: String },
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
    let mut file = read_tokenizer(folder)?;
    let mut beside = read_json::<TokenizerConfig>(folder, CONFIG)?.unwrap_or_default();
    refuse_unknown_model(&file.model)?;
    add_anew(&mut file, std::mem::take(&mut beside.added_tokens_decoder));
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
        // That of a sequence of steps is not looked at.
        let said = file.pre_tokenizer.as_ref().and_then(|step| step.get("add_prefix_space")?.as_bool());
        if let (Some(asked), Some(said)) = (beside.add_prefix_space, said)
            && asked != said
        {
            return Err(CheckpointError::file(CONFIG, format!("add_prefix_space: {asked}, and {FILE} says {said}")));
        }
        set("model", Gguf::String("gpt2".to_owned()));
        // The steps themselves, not the name of one of the few sequences of steps that have a name.
        let json = |step: &Option<Value>| Gguf::String(step.as_ref().unwrap_or(&Value::Null).to_string());
        pairs.push((PRE_TOKENIZER.to_owned(), json(&file.pre_tokenizer)));
        pairs.push((NORMALIZER.to_owned(), json(&file.normalizer)));
        pairs.push((crate::tokenizer::IGNORE_MERGES.to_owned(), Gguf::Bool(file.model.ignore_merges)));
    }
    let mut set = |key: &str, value: Gguf| pairs.push((format!("tokenizer.ggml.{key}"), value));

    let id_of = |field: &str, text: &Option<TokenText>| match text {
        Some(TokenText::Text(text) | TokenText::Token { content: text }) => match vocabulary.id(text) {
            Some(id) => Ok(Some(id)),
            None => Err(CheckpointError::file(CONFIG, format!("{field}: {text:?} is no token of {FILE}"))),
        },
        None => Ok(None),
    };
    let around = Surroundings::of(file.post_processor.as_ref())?;
    let first = around.before.first().map(|text| vocabulary.id(text));
    let bos = id_of("bos_token", &beside.bos_token)?.or(config.bos_token_id).or(first.flatten());
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
    let (named_by, mut ends) = match generation::ends(folder)? {
        Some(ends) => (generation::FILE, ends),
        None => (fields::FILE, config.eos_token_ids.clone()),
    };
    if let Some(id) = ends.iter().find(|id| **id as usize >= config.vocab_size) {
        let reason = format!("eos_token_id: {id}, and the model's vocabulary has {} tokens", config.vocab_size);
        return Err(CheckpointError::file(named_by, reason));
    }
    // The tokenizer's own comes first: templates write it.
    ends.splice(0..0, id_of("eos_token", &beside.eos_token)?);
    let mut seen = Vec::new();
    ends.retain(|id| {
        !seen.contains(id) && {
            seen.push(*id);
            true
        }
    });
    // GGUF names three.
    let more_ends = ends.split_off(ends.len().min(3));
    for (key, id) in ["eos_token_id", "eot_token_id", "eom_token_id"].into_iter().zip(ends) {
        set(key, Gguf::U32(id));
    }
    set("add_bos_token", Gguf::Bool(adds_bos));
    if let Some(bos) = bos {
        set("bos_token_id", Gguf::U32(bos));
    }
    set("tokens", array(vocabulary.tokens, Gguf::String));
    set("token_type", array(vocabulary.kinds, Gguf::I32));

    // Scores are of tokens, and the same token may be made of some pairs early, late, or not at all.
    let merges = if is_sentence_piece { PIECE_MERGES } else { "tokenizer.ggml.merges" };
    pairs.push((merges.to_owned(), array(file.model.merges.into_iter().map(Merge::line), Gguf::String)));
    if !more_ends.is_empty() {
        pairs.push((MORE_ENDS.to_owned(), array(more_ends, Gguf::U32)));
    }

    // Without any, a reader that knows the architecture might take it to be meant.
    for (key, strips) in [(LSTRIP, (|token| token.lstrip) as fn(&AddedToken) -> bool), (RSTRIP, |token| token.rstrip)] {
        let ids = file.added_tokens.iter().filter(|token| strips(token)).map(|token| token.id);
        pairs.push((key.to_owned(), array(ids, Gguf::U32)));
    }
    pairs.extend(templates::metadata(folder, beside.chat_template)?);
    Ok(pairs)
}

fn array<T>(values: impl IntoIterator<Item = T>, wrap: impl Fn(T) -> Gguf) -> Gguf {
    Gguf::Array(values.into_iter().map(wrap).collect())
}

fn read_tokenizer(folder: &Path) -> Result<TokenizerFile, CheckpointError> {
    let text = read_text(folder, FILE)?.ok_or_else(|| {
        CheckpointError::file(
            FILE,
            "is not there: it can be made by AutoTokenizer.from_pretrained(…).save_pretrained(…)",
        )
    })?;
    serde_json::from_str(&text).map_err(|e| match serde_json::from_str::<AnyTokenizer>(&text) {
        // Models of other types have other fields.
        Ok(AnyTokenizer { model: AnyModel { kind } }) if kind != "BPE" => refuse_type(&kind),
        _ => CheckpointError::file(FILE, e),
    })
}

fn refuse_type(kind: &str) -> CheckpointError {
    CheckpointError::file(FILE, format!("model.type {kind:?} is not served: BPE is"))
}

/// What `tokenizer_config.json` says of a token counts: transformers adds it once more.
fn add_anew(file: &mut TokenizerFile, tokens: BTreeMap<u32, TokenAddedAnew>) {
    for (id, anew) in tokens {
        let TokenAddedAnew { content, special, single_word, lstrip, rstrip, normalized } = anew;
        let normalized = normalized.unwrap_or(!special);
        let known = file.added_tokens.iter_mut().find(|token| token.content == content);
        match known {
            // One that was special stays so.
            Some(token) => {
                let (id, special) = (token.id, special || token.special);
                *token = AddedToken { id, content, special, single_word, lstrip, rstrip, normalized };
            }
            None => {
                let id = file.model.vocab.get(&content).copied().unwrap_or(id);
                let token = AddedToken { id, content, special, single_word, lstrip, rstrip, normalized };
                file.added_tokens.push(token);
            }
        }
    }
}

fn refuse_unknown_model(model: &BpeModel) -> Result<(), CheckpointError> {
    let refuse = |what: String| Err(CheckpointError::file(FILE, format!("model.{what} is not served")));
    match model.kind.as_deref() {
        None | Some("BPE") => {}
        Some(kind) => return Err(refuse_type(kind)),
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
            if kinds[at] != UNUSED && tokens[at] != text {
                let reason = format!("tokens {:?} and {text:?} have the id {id}", tokens[at]);
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
            if let Some(other) = ids.insert(token.content.clone(), token.id).filter(|other| *other != token.id) {
                let reason = format!("token {:?} has the ids {other} and {}", token.content, token.id);
                return Err(CheckpointError::file(FILE, reason));
            }
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
            // A line of a merge has a space between the two.
            let Some(id) = self.id(&whole).filter(|_| !whole.contains(' ')) else {
                let reason = format!("model.merges gives {whole:?}, which is no token without a space");
                return Err(CheckpointError::file(FILE, reason));
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
