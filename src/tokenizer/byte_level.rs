//! Byte-level BPE (GGUF's `gpt2`): pieces by regular expression, bytes as printable characters, then merges.

use std::sync::LazyLock;

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::{NFC, NormalizerWrapper};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{Model, SplitDelimiterBehavior, Tokenizer};

use super::TokenizerError;
use super::vocabulary::{NORMALIZER, PRE_TOKENIZER, PreTokenizer, TokenKind, TokenizerMetadata};

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const SEED_CODER: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const DIGIT: &str = r"\p{N}";

/// What happens to text before merging.
struct Steps {
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    /// A piece that is a token as a whole is taken before any merge.
    ignore_merges: bool,
}

impl Steps {
    fn of(pre: &PreTokenizer) -> Result<Self, TokenizerError> {
        match pre {
            PreTokenizer::None => Ok(Self { normalizer: None, pre_tokenizer: None, ignore_merges: false }),
            PreTokenizer::Named(name) => Self::named(name),
            PreTokenizer::Steps { pre_tokenizer, normalizer, ignore_merges } => Ok(Self {
                normalizer: serde_json::from_str(normalizer).map_err(in_key(NORMALIZER))?,
                pre_tokenizer: serde_json::from_str(pre_tokenizer).map_err(in_key(PRE_TOKENIZER))?,
                ignore_merges: *ignore_merges,
            }),
        }
    }

    /// GGUF gives only a name; the rest is from the models' own `tokenizer.json`.
    fn named(name: &str) -> Result<Self, TokenizerError> {
        let splits: &[&str] = match name {
            "gpt-2" | "phi-2" | "mpt" | "olmo" => &[GPT2],
            "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" => &[DIGIT, GPT2],
            "qwen2" | "deepseek-r1-qwen" | "megrez" => &[QWEN2],
            "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "dbrx" | "smaug-bpe" => &[LLAMA3],
            "seed-coder" => &[SEED_CODER],
            "gpt-4o" => &[GPT4O],
            "tekken" => &[TEKKEN],
            "deepseek-coder" => &["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u{800}-\u{9fa5}\u{ac00}-\u{d7ff}]+", DIGIT],
            "default" => &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
            _ => return Err(TokenizerError::UnsupportedPreTokenizer(name.to_owned())),
        };
        let mut steps = Vec::with_capacity(splits.len() + 1);
        for split in splits {
            let split = Split::new(SplitPattern::Regex(split.to_string()), SplitDelimiterBehavior::Isolated, false);
            steps.push(PreTokenizerWrapper::Split(split.map_err(|e| TokenizerError::Build(e.to_string()))?));
        }
        steps.push(PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, false, false)));
        Ok(Self {
            normalizer: (name == "qwen2").then(|| NFC.into()),
            pre_tokenizer: Some(Sequence::new(steps).into()),
            ignore_merges: matches!(name, "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "tekken"),
        })
    }
}

fn in_key(key: &'static str) -> impl FnOnce(serde_json::Error) -> TokenizerError {
    move |e| TokenizerError::Build(format!("{key}: {e}"))
}

#[derive(Debug)]
pub struct ByteLevelBpe {
    tokenizer: Tokenizer,
}

impl ByteLevelBpe {
    /// Takes `merges` out of the metadata.
    pub fn new(metadata: &mut TokenizerMetadata) -> Result<Self, TokenizerError> {
        let steps = Steps::of(&metadata.pre)?;
        // Control tokens stay outside: no text may merge into one.
        let vocab: Vocab = metadata
            .iter()
            .filter(|(_, _, kind)| *kind != TokenKind::Control)
            .map(|(id, text, _)| (text.to_string(), id))
            .collect();
        let merges = std::mem::take(&mut metadata.merges);
        let bpe = BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(steps.ignore_merges).build();
        let mut tokenizer = Tokenizer::new(bpe.map_err(|e| TokenizerError::Build(e.to_string()))?);
        tokenizer.with_pre_tokenizer(steps.pre_tokenizer);
        tokenizer.with_normalizer(steps.normalizer).map_err(|e| TokenizerError::Build(e.to_string()))?;
        Ok(Self { tokenizer })
    }

    pub fn encode(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), TokenizerError> {
        let encoding = self.tokenizer.encode_fast(text, false).map_err(|e| TokenizerError::Encode(e.to_string()))?;
        ids.extend_from_slice(encoding.get_ids());
        Ok(())
    }

    pub fn id_of(&self, text: &str) -> Option<u32> {
        self.tokenizer.get_model().token_to_id(text)
    }
}

/// The character that stands for each byte: printable Latin-1 stands for itself, the rest follows from U+0100 on.
static BYTE_CHARS: LazyLock<[char; 256]> = LazyLock::new(|| {
    let mut next = 0x100;
    std::array::from_fn(|byte| match byte {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => char::from(byte as u8),
        _ => {
            next += 1;
            char::from_u32(next - 1).unwrap_or(char::REPLACEMENT_CHARACTER)
        }
    })
});

/// The inverse of [`BYTE_CHARS`], by code point; every character of the alphabet lies below U+0144.
static CHAR_BYTES: LazyLock<[Option<u8>; 0x144]> = LazyLock::new(|| {
    let mut bytes = [None; 0x144];
    for (byte, c) in (0u8..=255).zip(BYTE_CHARS.iter()) {
        bytes[*c as usize] = Some(byte);
    }
    bytes
});

/// Appends the bytes a token of this text stands for. Characters outside the alphabet stand for themselves.
pub fn append_bytes(text: &str, bytes: &mut Vec<u8>) {
    for c in text.chars() {
        match CHAR_BYTES.get(c as usize).copied().flatten() {
            Some(byte) => bytes.push(byte),
            None => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
}

#[cfg(test)]
pub fn byte_char(byte: u8) -> char {
    BYTE_CHARS[byte as usize]
}

#[cfg(test)]
mod tests {
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _};

    use super::*;

    /// What the tokenizers of Phi-4-mini and of Mistral give.
    #[test]
    fn words_and_numbers_are_cut_as_the_name_says() {
        let pieces = |name: &str, text: &str| {
            let mut cut = PreTokenizedString::from(text);
            Steps::named(name).unwrap().pre_tokenizer.unwrap().pre_tokenize(&mut cut).unwrap();
            let pieces = cut.get_splits(OffsetReferential::Original, OffsetType::Byte).into_iter();
            pieces.map(|(text, ..)| text.replace('Ġ', " ").replace('Ċ', "\n").replace('ĉ', "\t")).collect::<Vec<_>>()
        };
        let words = "getHTTPResponse_codeX I'LL don't 12345";
        let of_gpt4o = ["get", "HTTPResponse", "_code", "X", " I'LL", " don't", " ", "123", "45"];
        assert_eq!(pieces("gpt-4o", words), of_gpt4o);
        let of_tekken = ["get", "HTTPResponse", "_code", "X", " I", "'LL", " don", "'t", " ", "1", "2", "3", "4", "5"];
        assert_eq!(pieces("tekken", words), of_tekken);
        for name in ["gpt-4o", "tekken"] {
            let found = pieces(name, "  if x:\n\n\treturn //\n/a  \n");
            assert_eq!(found, [" ", " if", " x", ":\n\n", "\treturn", " //\n/", "a", "  \n"], "{name}");
        }
    }
}
