//! What a GGUF file says of its tokenizer (`tokenizer.ggml.*`), and the bytes each token stands for.

use std::collections::{HashMap, HashSet};

use candle_core::quantized::gguf_file::Value;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};

use super::sentinels::{FimOrder, FimTokens};
use super::{TokenizerError, byte_level, sentinels};
use crate::model::gguf::{GgufError, GgufFile};

const TOKENS: &str = "tokenizer.ggml.tokens";
const TOKEN_TYPES: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";

/// How text is cut before merging, as `tokenizer.json` says it: lorry's own keys, of bases that it has quantized itself.
pub const PRE_TOKENIZER: &str = "lorry.tokenizer.pre_tokenizer";
pub const NORMALIZER: &str = "lorry.tokenizer.normalizer";
pub const IGNORE_MERGES: &str = "lorry.tokenizer.ignore_merges";
/// SentencePiece's step `Metaspace`, which can say more of spaces than GGUF's `add_space_prefix`.
pub const METASPACE: &str = "lorry.tokenizer.metaspace";
/// SentencePiece's merges, best first, where tokens' scores may not say them.
pub const PIECE_MERGES: &str = "lorry.tokenizer.piece_merges";
/// Ids of the tokens that end a completion, beyond the three that GGUF names.
pub const MORE_ENDS: &str = "lorry.tokenizer.more_ends";
/// Ids of the tokens that take in the whitespace before them, and behind them.
pub const LSTRIP: &str = "lorry.tokenizer.lstrip";
pub const RSTRIP: &str = "lorry.tokenizer.rstrip";

/// Control tokens of Phi-3 that leave the whitespace behind them alone.
const PHI3_WITHOUT_RSTRIP: [&str; 3] = ["<unk>", "<s>", "<|endoftext|>"];

/// GGUF's token types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenKind {
    Normal,
    Unknown,
    /// Steers the model; text never becomes one unless it is parsed for specials.
    Control,
    /// Always matched as a whole, but ordinary text otherwise.
    UserDefined,
    /// Fills up the vocabulary; never trained.
    Unused,
    /// One byte, written `<0x0A>`.
    Byte,
}

impl TokenKind {
    fn from_gguf(number: i64) -> Option<Self> {
        Some(match number {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return None,
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenizerModel {
    /// GGUF's `gpt2`.
    ByteLevelBpe,
    /// GGUF's `llama`.
    SentencePiece,
}

/// How byte-level BPE cuts text before merging.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PreTokenizer {
    /// SentencePiece does not.
    None,
    /// As GGUF names it.
    Named(String),
    /// The steps of a `tokenizer.json`, as JSON.
    Steps { pre_tokenizer: String, normalizer: String, ignore_merges: bool },
}

impl PreTokenizer {
    fn read(gguf: &GgufFile) -> Result<Self, TokenizerError> {
        if gguf.metadata(PRE_TOKENIZER).is_none() {
            return Ok(Self::Named(gguf.str("tokenizer.ggml.pre")?.to_string()));
        }
        Ok(Self::Steps {
            pre_tokenizer: gguf.str(PRE_TOKENIZER)?.to_string(),
            normalizer: gguf.str(NORMALIZER)?.to_string(),
            ignore_merges: optional_bool(gguf, IGNORE_MERGES)?.unwrap_or_default(),
        })
    }

    /// Llama 3 and Mistral put a beginning-of-sequence token first even where the file does not say so.
    pub fn adds_bos(&self) -> bool {
        matches!(self, Self::Named(name) if matches!(name.as_str(), "llama-bpe" | "llama3" | "llama-v3" | "tekken"))
    }
}

/// What becomes of the spaces of a text in SentencePiece.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spaces {
    /// Whether one is put before the text, and before what stands between added tokens.
    pub prepend: PrependScheme,
    /// Whether that is done where the text begins with a space, too.
    pub doubles: bool,
    /// Whether no token goes on behind a space.
    pub splits: bool,
}

impl Spaces {
    /// As GGUF's `add_space_prefix` says.
    pub fn prefixed(is_prefixed: bool) -> Self {
        let prepend = if is_prefixed { PrependScheme::Always } else { PrependScheme::Never };
        Self { prepend, doubles: true, splits: false }
    }

    fn read(gguf: &GgufFile) -> Result<Self, TokenizerError> {
        if gguf.metadata(METASPACE).is_none() {
            return Ok(Self::prefixed(optional_bool(gguf, "tokenizer.ggml.add_space_prefix")?.unwrap_or(true)));
        }
        let step: Metaspace = serde_json::from_str(gguf.str(METASPACE)?)
            .map_err(|e| TokenizerError::Build(format!("{METASPACE}: {e}")))?;
        Ok(Self { prepend: step.prepend_scheme, doubles: false, splits: step.get_split() })
    }
}

/// Ids of the added tokens that take in the whitespace beside them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Strips {
    pub left: HashSet<u32>,
    pub right: HashSet<u32>,
}

/// The metadata, checked: every list is as long as `tokens`, every id lies within it.
#[derive(Debug)]
pub struct TokenizerMetadata {
    pub model: TokenizerModel,
    pub pre: PreTokenizer,
    pub tokens: Vec<String>,
    pub kinds: Vec<TokenKind>,
    /// SentencePiece only.
    pub scores: Vec<f32>,
    /// Best first; empty for SentencePiece's where scores say them.
    pub merges: Vec<(String, String)>,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    /// End of turn, end of message and others, where the file names them.
    pub other_ends: Vec<u32>,
    /// Those that the file names, or that are known by text once this is checked.
    pub fim: Option<FimTokens>,
    pub add_bos: Option<bool>,
    /// SentencePiece only.
    pub spaces: Spaces,
    pub strips: Strips,
}

impl TokenizerMetadata {
    pub fn read(gguf: &GgufFile) -> Result<Self, TokenizerError> {
        let (model, pre) = match gguf.str("tokenizer.ggml.model")? {
            "gpt2" => (TokenizerModel::ByteLevelBpe, PreTokenizer::read(gguf)?),
            "llama" => (TokenizerModel::SentencePiece, PreTokenizer::None),
            other => return Err(TokenizerError::UnsupportedModel(other.to_string())),
        };
        let tokens = strings(gguf, TOKENS)?;
        let kinds = list(gguf, TOKEN_TYPES, "a list of token types (1 to 6)", |v| TokenKind::from_gguf(integer(v)?))?;
        let (scores, merges) = match model {
            TokenizerModel::SentencePiece => {
                let scores = list(gguf, SCORES, "a list of 32-bit floats", |v| v.to_f32().ok())?;
                (scores, if gguf.metadata(PIECE_MERGES).is_some() { pairs(gguf, PIECE_MERGES)? } else { vec![] })
            }
            TokenizerModel::ByteLevelBpe => (vec![], pairs(gguf, MERGES)?),
        };
        let id = |name: &str| optional_id(gguf, &format!("tokenizer.ggml.{name}_token_id"), tokens.len());
        // Older files name the same without `fim_`.
        let either = |name: &str, old: &str| Ok::<_, TokenizerError>(id(name)?.or(id(old)?));
        let sentinels = (either("fim_pre", "prefix")?, either("fim_suf", "suffix")?, either("fim_mid", "middle")?);
        let boundaries = [id("fim_pad")?, id("fim_rep")?, id("fim_sep")?].into_iter().flatten().collect();
        let has_strips = gguf.metadata(RSTRIP).is_some();
        let mut metadata = Self {
            model,
            fim: match sentinels {
                (Some(prefix), Some(suffix), middle) => {
                    Some(FimTokens { prefix, suffix, middle, order: FimOrder::PrefixFirst, boundaries })
                }
                _ => None,
            },
            pre,
            bos: id("bos")?,
            eos: id("eos")?,
            other_ends: [id("eot")?, id("eom")?].into_iter().flatten().chain(ids(gguf, MORE_ENDS)?).collect(),
            add_bos: optional_bool(gguf, "tokenizer.ggml.add_bos_token")?,
            spaces: Spaces::read(gguf)?,
            strips: Strips { left: ids(gguf, LSTRIP)?, right: ids(gguf, RSTRIP)? },
            tokens,
            kinds,
            scores,
            merges,
        }
        .checked()?;
        let is_phi3 = gguf.str("general.architecture").is_ok_and(|name| name == "phi3");
        if is_phi3 && model == TokenizerModel::SentencePiece && !has_strips {
            metadata.strips.right = metadata.stripping_in_phi3();
        }
        Ok(metadata)
    }

    /// GGUF does not say it, and Phi-3 was trained with it.
    fn stripping_in_phi3(&self) -> HashSet<u32> {
        let is_added = |kind: TokenKind| matches!(kind, TokenKind::Control | TokenKind::UserDefined);
        let strips = |text: &str, kind: TokenKind| is_added(kind) && !PHI3_WITHOUT_RSTRIP.contains(&text);
        self.iter().filter(|(_, text, kind)| strips(text, *kind)).map(|(id, ..)| id).collect()
    }

    /// Refuses lists that disagree in length, and gives tokens that steer the model, by text or by name, their right kind,
    /// and those that are text the text that they stand for.
    pub fn checked(mut self) -> Result<Self, TokenizerError> {
        let num_tokens = self.tokens.len();
        let lengths = [(TOKEN_TYPES, self.kinds.len()), (SCORES, self.scores.len())];
        let wanted = if self.model == TokenizerModel::SentencePiece { 2 } else { 1 };
        if let Some(&(key, len)) = lengths.iter().take(wanted).find(|(_, len)| *len != num_tokens) {
            return Err(TokenizerError::Length { key, len, num_tokens });
        }
        let named: Vec<u32> = self.bos.iter().chain(&self.eos).chain(&self.other_ends).copied().collect();
        let steers = |id: u32, text: &str| {
            // Some files name a comma or a line feed, which text must be able to become all the same.
            sentinels::is_structural(text) || named.contains(&id) && text.chars().nth(1).is_some()
        };
        let mut raised: HashSet<u32> = self
            .iter()
            .filter(|(_, _, kind)| matches!(kind, TokenKind::Normal | TokenKind::UserDefined | TokenKind::Unused))
            .filter(|(id, text, _)| steers(*id, text))
            .map(|(id, ..)| id)
            .collect();
        // What text is merged to is text.
        let is_merged = |text: &str| {
            // Pieces are spelled as they are, also those that steer.
            if self.model == TokenizerModel::SentencePiece {
                return false;
            }
            let parts = |(left, right): &(String, String)| text.strip_prefix(left.as_str()) == Some(right.as_str());
            self.merges.iter().any(parts)
        };
        raised.retain(|id| !is_merged(&self.tokens[*id as usize]));
        self.fim = self.find_fim();
        raised.extend(self.fim.iter().flat_map(FimTokens::all));
        for id in raised {
            if let Some(kind) = self.kinds.get_mut(id as usize) {
                *kind = TokenKind::Control;
            }
        }
        if self.model == TokenizerModel::SentencePiece {
            // Added tokens are found in the text itself, whose spaces are spaces.
            let added = self.tokens.iter_mut().zip(&self.kinds).filter(|(_, kind)| **kind == TokenKind::UserDefined);
            added.for_each(|(text, _)| *text = text.replace('▁', " "));
        }
        Ok(self)
    }

    fn find_fim(&self) -> Option<FimTokens> {
        let structural = self.iter().filter(|(_, text, _)| sentinels::is_structural(text));
        let ids: HashMap<&str, u32> = structural.map(|(id, text, _)| (text, id)).collect();
        let id = |text: &str| ids.get(text).copied();
        let named = self.fim.clone().and_then(|named| {
            let prefix_text = self.tokens.get(named.prefix as usize)?;
            named.completed(prefix_text, id)
        });
        named.or_else(|| FimTokens::by_text(id))
    }

    /// Id, text and kind of every token.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &str, TokenKind)> {
        (0u32..).zip(&self.tokens).zip(&self.kinds).map(|((id, text), kind)| (id, text.as_str(), *kind))
    }
}

/// The bytes every token stands for, in one allocation.
#[derive(Debug)]
pub struct TokenBytes {
    bytes: Vec<u8>,
    /// `[vocab_size + 1]`; token `i` is `bytes[starts[i]..starts[i + 1]]`.
    starts: Vec<usize>,
}

impl TokenBytes {
    pub fn new(metadata: &TokenizerMetadata) -> Self {
        let mut table = Self { bytes: Vec::new(), starts: Vec::with_capacity(metadata.tokens.len() + 1) };
        table.starts.push(0);
        for (_, text, kind) in metadata.iter() {
            match (kind, metadata.model) {
                (TokenKind::Normal, TokenizerModel::ByteLevelBpe) => byte_level::append_bytes(text, &mut table.bytes),
                (TokenKind::Normal, TokenizerModel::SentencePiece) => {
                    table.bytes.extend_from_slice(text.replace('▁', " ").as_bytes());
                }
                (TokenKind::Byte, _) if parse_byte(text).is_some() => table.bytes.extend(parse_byte(text)),
                _ => table.bytes.extend_from_slice(text.as_bytes()),
            }
            table.starts.push(table.bytes.len());
        }
        table
    }

    /// Empty for an id outside the vocabulary.
    pub fn get(&self, id: u32) -> &[u8] {
        let index = id as usize;
        match (self.starts.get(index), self.starts.get(index + 1)) {
            (Some(&start), Some(&end)) => &self.bytes[start..end],
            _ => &[],
        }
    }

    pub fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// At least 1.
    pub fn longest(&self) -> usize {
        self.starts.windows(2).map(|ends| ends[1] - ends[0]).max().unwrap_or(0).max(1)
    }
}

/// `<0x0A>` → 10
pub fn parse_byte(text: &str) -> Option<u8> {
    u8::from_str_radix(text.strip_prefix("<0x")?.strip_suffix('>')?, 16).ok()
}

fn wrong_type(key: &str, expected: &'static str) -> TokenizerError {
    TokenizerError::Gguf(GgufError::WrongType { key: key.to_string(), expected })
}

fn list<T>(
    gguf: &GgufFile,
    key: &str,
    expected: &'static str,
    parse: impl Fn(&Value) -> Option<T>,
) -> Result<Vec<T>, TokenizerError> {
    gguf.array(key)?.iter().map(parse).collect::<Option<_>>().ok_or_else(|| wrong_type(key, expected))
}

fn strings(gguf: &GgufFile, key: &str) -> Result<Vec<String>, TokenizerError> {
    list(gguf, key, "a list of strings", |v| v.to_string().ok().cloned())
}

fn pairs(gguf: &GgufFile, key: &str) -> Result<Vec<(String, String)>, TokenizerError> {
    list(gguf, key, "a list of pairs separated by a space", |v| {
        let (left, right) = v.to_string().ok()?.split_once(' ')?;
        Some((left.to_string(), right.to_string()))
    })
}

fn integer(value: &Value) -> Option<i64> {
    match value {
        Value::I32(n) => Some(i64::from(*n)),
        Value::U32(n) => Some(i64::from(*n)),
        _ => None,
    }
}

fn optional_id(gguf: &GgufFile, key: &str, num_tokens: usize) -> Result<Option<u32>, TokenizerError> {
    if gguf.metadata(key).is_none() {
        return Ok(None);
    }
    let id = gguf.usize(key)?;
    match u32::try_from(id) {
        Ok(small) if id < num_tokens => Ok(Some(small)),
        _ => Err(TokenizerError::IdOutOfRange { key: key.to_string(), id, num_tokens }),
    }
}

/// A list of token ids; empty if the file has none.
fn ids(gguf: &GgufFile, key: &str) -> Result<HashSet<u32>, TokenizerError> {
    if gguf.metadata(key).is_none() {
        return Ok(HashSet::new());
    }
    let ids = list(gguf, key, "a list of token ids", |v| v.to_u32().ok())?;
    Ok(ids.into_iter().collect())
}

fn optional_bool(gguf: &GgufFile, key: &str) -> Result<Option<bool>, TokenizerError> {
    gguf.metadata(key).map(|value| value.to_bool().map_err(|_| wrong_type(key, "true or false"))).transpose()
}
