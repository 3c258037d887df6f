//! Text to token ids and back, built from a GGUF file's own metadata.

mod byte_level;
pub mod detokenize;
mod keys;
mod sentence_piece;
pub mod sentinels;
mod vocabulary;

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use regex::Regex;

use crate::model::gguf::{GgufError, GgufFile};
use byte_level::ByteLevelBpe;
use sentence_piece::SentencePiece;
use sentinels::FimTokens;
#[cfg(test)]
use vocabulary::Spaces;
pub use vocabulary::{
    IGNORE_MERGES, LSTRIP, METASPACE, MORE_ENDS, NORMALIZER, PIECE_MERGES, PRE_TOKENIZER, RSTRIP, parse_byte,
};
use vocabulary::{Strips, TokenBytes, TokenKind, TokenizerMetadata, TokenizerModel};

#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error(transparent)]
    Gguf(#[from] GgufError),
    #[error("tokenizer.ggml.model {0:?} is not supported (supported: gpt2, llama)")]
    UnsupportedModel(String),
    #[error("tokenizer.ggml.pre {0:?} is not supported: its pre-tokenizer is not known here; use another conversion")]
    UnsupportedPreTokenizer(String),
    #[error("{key} has {len} entries for {num_tokens} tokens: the GGUF file is damaged")]
    Length { key: &'static str, len: usize, num_tokens: usize },
    #[error("{key} is {id}, but the vocabulary has {num_tokens} tokens")]
    IdOutOfRange { key: String, id: usize, num_tokens: usize },
    #[error("the tokenizer cannot be built from tokenizer.ggml.tokens and tokenizer.ggml.merges: {0}")]
    Build(String),
    #[error("the text cannot be tokenized: {0}")]
    Encode(String),
}

/// What the text of a control token (`<|fim_middle|>`, `<|im_end|>`) becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Specials {
    /// The token itself: for prompts a template or a trusted client wrote.
    Parse,
    /// Ordinary text: for a user's files, which may contain anything.
    AsText,
}

/// Where a text stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Beginning,
    /// Behind an added token.
    BehindToken,
    /// Behind other text.
    Within,
}

/// Encodes and decodes; shared by all threads.
#[derive(Debug)]
pub struct Tokenizer {
    encoder: Encoder,
    /// Matched when parsing: control and user-defined tokens.
    added: AddedTokens,
    /// Matched in any text.
    user_defined: AddedTokens,
    control_ids: HashMap<String, u32>,
    strips: Strips,
    kinds: Vec<TokenKind>,
    bytes: TokenBytes,
    bos: Option<u32>,
    eos: Option<u32>,
    fim: Option<FimTokens>,
    stop_tokens: Arc<[u32]>,
}

#[derive(Debug)]
enum Encoder {
    ByteLevel(Box<ByteLevelBpe>),
    SentencePiece(SentencePiece),
}

impl Tokenizer {
    pub fn from_gguf(gguf: &GgufFile) -> Result<Self, TokenizerError> {
        keys::refuse_unknown(gguf)?;
        Self::new(TokenizerMetadata::read(gguf)?)
    }

    fn new(mut metadata: TokenizerMetadata) -> Result<Self, TokenizerError> {
        let of_kind = |wanted: &[TokenKind]| {
            let ids = metadata.iter().filter(|(_, text, kind)| wanted.contains(kind) && !text.is_empty());
            ids.map(|(id, text, _)| (text.to_string(), id)).collect::<HashMap<_, _>>()
        };
        let control_ids = of_kind(&[TokenKind::Control]);
        let added = AddedTokens::new(of_kind(&[TokenKind::Control, TokenKind::UserDefined]))?;
        let user_defined = AddedTokens::new(of_kind(&[TokenKind::UserDefined]))?;

        let special_id = |text: &str| control_ids.get(text).copied();
        let fim = metadata.fim.take();
        let mut stop_tokens = sentinels::end_of_generation(special_id);
        stop_tokens.extend(metadata.eos.iter().chain(&metadata.other_ends));
        stop_tokens.extend(fim.iter().flat_map(FimTokens::all));
        stop_tokens.sort_unstable();
        stop_tokens.dedup();

        let adds_bos_by_default = match metadata.model {
            TokenizerModel::ByteLevelBpe => metadata.pre.adds_bos(),
            TokenizerModel::SentencePiece => true,
        };
        let bytes = TokenBytes::new(&metadata);
        let encoder = match metadata.model {
            TokenizerModel::ByteLevelBpe => Encoder::ByteLevel(Box::new(ByteLevelBpe::new(&mut metadata)?)),
            TokenizerModel::SentencePiece => Encoder::SentencePiece(SentencePiece::new(&metadata)),
        };
        Ok(Self {
            encoder,
            added,
            user_defined,
            control_ids,
            strips: metadata.strips,
            bytes,
            bos: metadata.bos.filter(|_| metadata.add_bos.unwrap_or(adds_bos_by_default)),
            eos: metadata.eos,
            fim,
            stop_tokens: stop_tokens.into(),
            kinds: metadata.kinds,
        })
    }

    /// Token ids of `text`, without a beginning-of-sequence token: see [`Self::bos`]. As with the models' own tokenizers,
    /// Qwen2's composes the text first (NFC), and a byte the vocabulary lacks is left out (0x04 in SmolLM2's).
    pub fn encode(&self, text: &str, specials: Specials) -> Result<Vec<u32>, TokenizerError> {
        let added = match specials {
            Specials::Parse => &self.added,
            Specials::AsText => &self.user_defined,
        };
        self.encode_between(text, added, Place::Beginning)
    }

    /// Token ids of text, without special tokens, that goes on from other text: SentencePiece puts no space before it.
    pub fn encode_continuation(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.encode_between(text, &self.user_defined, Place::Within)
    }

    fn encode_between(&self, text: &str, added: &AddedTokens, mut place: Place) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        for (plain, token) in self.parts(text, added) {
            self.encode_plain(plain, place, &mut ids)?;
            ids.extend(token);
            place = Place::BehindToken;
        }
        Ok(ids)
    }

    /// The text between added tokens, each with the token behind it; whitespace that a token takes in is in neither.
    fn parts<'a>(&self, text: &'a str, added: &AddedTokens) -> Vec<(&'a str, Option<u32>)> {
        let mut parts = Vec::new();
        let mut plain_start = 0;
        for (mut start, mut end, id) in added.matches(text) {
            if self.strips.left.contains(&id) {
                start = text[..start].trim_end().len();
            }
            if self.strips.right.contains(&id) {
                end = text.len() - text[end..].trim_start().len();
            }
            // A token of whitespace may lie in what one before it takes in: it is there even so, as in the reference.
            parts.push((text.get(plain_start..start).unwrap_or_default(), Some(id)));
            plain_start = end;
        }
        parts.push((&text[plain_start..], None));
        parts
    }

    /// Token ids of a rendered template, special tokens parsed. `mark` is taken out of the text between them, which is
    /// encoded as [`Specials::AsText`]: it has kept what contents spell from being parsed.
    pub fn encode_marked(&self, text: &str, mark: char) -> Result<Vec<u32>, TokenizerError> {
        if !text.contains(mark) {
            return self.encode(text, Specials::Parse);
        }
        let mut ids = Vec::with_capacity(text.len() / 3);
        let mut place = Place::Beginning;
        for (plain, token) in self.parts(text, &self.added) {
            ids.extend(self.encode_between(&plain.replace(mark, ""), &self.user_defined, place)?);
            ids.extend(token);
            place = Place::BehindToken;
        }
        Ok(ids)
    }

    /// Where parsing `text` finds control tokens.
    pub fn control_tokens<'a>(&'a self, text: &'a str) -> impl Iterator<Item = Range<usize>> + 'a {
        let is_control =
            move |(start, end, _): &(usize, usize, u32)| self.control_ids.contains_key(&text[*start..*end]);
        self.added.matches(text).filter(is_control).map(|(start, end, _)| start..end)
    }

    /// Whether `text` ends in the beginning of a control token.
    pub fn ends_within_control_token(&self, text: &str) -> bool {
        let beginnings = |token: &str| token.char_indices().skip(1).map(|(end, _)| end).collect::<Vec<_>>();
        self.control_ids.keys().any(|token| beginnings(token).into_iter().any(|end| text.ends_with(&token[..end])))
    }

    fn encode_plain(&self, text: &str, place: Place, ids: &mut Vec<u32>) -> Result<(), TokenizerError> {
        if text.is_empty() {
            return Ok(());
        }
        match &self.encoder {
            Encoder::ByteLevel(bpe) => bpe.encode(text, ids),
            Encoder::SentencePiece(pieces) => {
                pieces.encode(text, place, ids);
                Ok(())
            }
        }
    }

    /// Number of tokens of `text`.
    pub fn count(&self, text: &str, specials: Specials) -> Result<usize, TokenizerError> {
        Ok(self.encode(text, specials)?.len())
    }

    /// The token every raw prompt starts with, if the model wants one. Chat templates write it themselves.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Every token that ends a completion: end of text, of turn, of file, and fill-in-the-middle sentinels.
    pub fn stop_tokens(&self) -> Arc<[u32]> {
        Arc::clone(&self.stop_tokens)
    }

    /// The fill-in-the-middle tokens: those that the file names, else those of a family that is known by text.
    pub fn fim(&self) -> Option<&FimTokens> {
        self.fim.as_ref()
    }

    /// The bytes of the longest token, at least 1: so many at most does a token of a text stand for.
    pub fn max_token_bytes(&self) -> usize {
        self.bytes.longest()
    }

    /// Whether a token is not text: control, unknown and unused tokens, and ids outside the vocabulary.
    pub fn is_special(&self, id: u32) -> bool {
        !matches!(self.kinds.get(id as usize), Some(TokenKind::Normal | TokenKind::UserDefined | TokenKind::Byte))
    }

    /// Id of a token by its text in the vocabulary, where byte-level models write a space as `Ġ`.
    pub fn id_of(&self, text: &str) -> Option<u32> {
        self.special_id(text).or_else(|| match &self.encoder {
            Encoder::ByteLevel(bpe) => bpe.id_of(text),
            Encoder::SentencePiece(pieces) => pieces.id_of(text),
        })
    }

    /// Id of a control token by its text.
    pub fn special_id(&self, text: &str) -> Option<u32> {
        self.control_ids.get(text).copied()
    }

    /// The bytes a token stands for, which need not be UTF-8 by themselves; a special token's are its text.
    /// Empty for an id outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id)
    }

    /// What a token stands for as text by itself, where parts of characters are U+FFFD.
    pub fn token_text(&self, id: u32) -> Cow<'_, str> {
        String::from_utf8_lossy(self.token_bytes(id))
    }

    pub fn vocab_size(&self) -> usize {
        self.bytes.len()
    }
}

/// Tokens that are found in the text before anything else, the longest first.
#[derive(Debug)]
struct AddedTokens {
    /// `None` when there are none: an empty pattern would match everywhere.
    pattern: Option<Regex>,
    ids: HashMap<String, u32>,
}

impl AddedTokens {
    fn new(ids: HashMap<String, u32>) -> Result<Self, TokenizerError> {
        let mut texts: Vec<&str> = ids.keys().map(String::as_str).collect();
        texts.sort_unstable_by_key(|text| (std::cmp::Reverse(text.len()), *text));
        let alternatives: Vec<String> = texts.into_iter().map(regex::escape).collect();
        let pattern = (!alternatives.is_empty())
            .then(|| Regex::new(&alternatives.join("|")).map_err(|e| TokenizerError::Build(e.to_string())))
            .transpose()?;
        Ok(Self { pattern, ids })
    }

    /// Byte ranges and ids of the tokens in `text`, in order.
    fn matches<'a>(&'a self, text: &'a str) -> impl Iterator<Item = (usize, usize, u32)> + 'a {
        self.pattern
            .iter()
            .flat_map(move |pattern| pattern.find_iter(text))
            .filter_map(|found| Some((found.start(), found.end(), *self.ids.get(found.as_str())?)))
    }
}

#[cfg(test)]
impl Tokenizer {
    /// A byte-level tokenizer of 256 single bytes, `th`, `the`, and the given control tokens, the last of them `eos`.
    pub(crate) fn tiny(control: &[&str]) -> Self {
        Self::tiny_with(control, &[])
    }

    /// [`Self::tiny`], with user-defined tokens after the control tokens.
    pub(crate) fn tiny_with(control: &[&str], user_defined: &[&str]) -> Self {
        Self::tiny_naming(control, user_defined, None)
    }

    /// [`Self::tiny_with`], of a file that names its fill-in-the-middle tokens.
    pub(crate) fn tiny_naming(control: &[&str], user_defined: &[&str], fim: Option<FimTokens>) -> Self {
        let mut tokens: Vec<String> = (0..=255).map(|byte| byte_level::byte_char(byte).to_string()).collect();
        tokens.extend(["th".to_string(), "the".to_string()]);
        let mut kinds = vec![TokenKind::Normal; tokens.len()];
        tokens.extend(control.iter().chain(user_defined).map(|text| text.to_string()));
        kinds.extend(control.iter().map(|_| TokenKind::Control));
        kinds.extend(user_defined.iter().map(|_| TokenKind::UserDefined));
        let eos = control.len().checked_sub(1).map(|last| 258 + last as u32);
        let merges = [("t", "h"), ("th", "e")].map(|(left, right)| (left.to_string(), right.to_string())).to_vec();
        let metadata = TokenizerMetadata {
            model: TokenizerModel::ByteLevelBpe,
            pre: vocabulary::PreTokenizer::Named("gpt-2".to_string()),
            tokens,
            kinds,
            scores: vec![],
            merges,
            bos: None,
            eos,
            other_ends: vec![],
            fim,
            add_bos: None,
            spaces: Spaces::prefixed(false),
            strips: Strips::default(),
        };
        metadata.checked().and_then(Self::new).expect("the tiny vocabulary is consistent")
    }

    /// A SentencePiece tokenizer of 256 single bytes and the given pieces, all of them ordinary ones.
    pub(crate) fn tiny_pieces(pieces: &[&str]) -> Self {
        let mut tokens: Vec<String> = (0..=255).map(|byte| format!("<0x{byte:02X}>")).collect();
        let mut kinds = vec![TokenKind::Byte; tokens.len()];
        tokens.extend(pieces.iter().map(|text| text.to_string()));
        kinds.extend(pieces.iter().map(|_| TokenKind::Normal));
        let metadata = TokenizerMetadata {
            model: TokenizerModel::SentencePiece,
            pre: vocabulary::PreTokenizer::None,
            scores: vec![0.0; tokens.len()],
            tokens,
            kinds,
            merges: vec![],
            bos: None,
            eos: None,
            other_ends: vec![],
            fim: None,
            add_bos: None,
            spaces: Spaces::prefixed(true),
            strips: Strips::default(),
        };
        metadata.checked().and_then(Self::new).expect("the tiny vocabulary is consistent")
    }
}

#[cfg(test)]
mod tests;
