//! Tokens known by their text: GGUF names only `eos`, and code models end a completion on many others.

/// The fill-in-the-middle tokens of one family of code models, for the order prefix, suffix, middle (PSM).
#[derive(Debug)]
pub struct FimSentinels {
    pub prefix: &'static str,
    pub suffix: &'static str,
    pub middle: &'static str,
    /// Other tokens of the family that a completion must not run past.
    pub boundaries: &'static [&'static str],
}

/// Ids of the fill-in-the-middle tokens of one vocabulary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FimTokens {
    pub prefix: u32,
    pub suffix: u32,
    pub middle: u32,
    /// Other tokens that a completion must not run past, such as those between files.
    pub boundaries: Vec<u32>,
}

impl FimTokens {
    /// Of the first family whose three sentinels are all special tokens of the vocabulary.
    pub fn by_text(special_id: impl Fn(&str) -> Option<u32>) -> Option<Self> {
        let family = fim_family(&special_id)?;
        Some(Self {
            prefix: special_id(family.prefix)?,
            suffix: special_id(family.suffix)?,
            middle: special_id(family.middle)?,
            boundaries: family.boundaries.iter().filter_map(|text| special_id(text)).collect(),
        })
    }

    pub fn all(&self) -> impl Iterator<Item = u32> {
        [self.prefix, self.suffix, self.middle].into_iter().chain(self.boundaries.iter().copied())
    }
}

impl FimSentinels {
    fn texts(&self) -> impl Iterator<Item = &'static str> {
        [self.prefix, self.suffix, self.middle].into_iter().chain(self.boundaries.iter().copied())
    }
}

pub const FIM_FAMILIES: [FimSentinels; 5] = [
    // Qwen2.5-Coder, CodeGemma, Granite 4
    FimSentinels {
        prefix: "<|fim_prefix|>",
        suffix: "<|fim_suffix|>",
        middle: "<|fim_middle|>",
        boundaries: &["<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|file_separator|>"],
    },
    // StarCoder, StarCoder2, StableCode, CodeQwen1.5, Granite Code
    FimSentinels {
        prefix: "<fim_prefix>",
        suffix: "<fim_suffix>",
        middle: "<fim_middle>",
        boundaries: &["<fim_pad>", "<repo_name>", "<reponame>", "<file_sep>", "<filename>"],
    },
    // SantaCoder
    FimSentinels { prefix: "<fim-prefix>", suffix: "<fim-suffix>", middle: "<fim-middle>", boundaries: &["<fim-pad>"] },
    // DeepSeek-Coder: the hole stands where the suffix begins
    FimSentinels {
        prefix: "<｜fim▁begin｜>", suffix: "<｜fim▁hole｜>", middle: "<｜fim▁end｜>", boundaries: &[]
    },
    // GLM-4
    FimSentinels { prefix: "<|code_prefix|>", suffix: "<|code_suffix|>", middle: "<|code_middle|>", boundaries: &[] },
];

const END_OF_GENERATION: [&str; 12] = [
    "<|endoftext|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<end_of_turn>",
    "<eos>",
    "<EOT>",
    "<|EOT|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
];

/// Whether a token of this text steers the model. Some converters mark such tokens as user-defined; they are control
/// tokens.
pub fn is_structural(text: &str) -> bool {
    END_OF_GENERATION.contains(&text) || FIM_FAMILIES.iter().any(|family| family.texts().any(|t| t == text))
}

fn fim_family(special_id: impl Fn(&str) -> Option<u32>) -> Option<&'static FimSentinels> {
    FIM_FAMILIES.iter().find(|f| [f.prefix, f.suffix, f.middle].iter().all(|text| special_id(text).is_some()))
}

/// Ids of every special token that ends a completion, as far as the vocabulary has them. Fill-in-the-middle tokens, whose
/// boundaries count only where the sentinels exist (SmolLM2 has StarCoder's `<file_sep>` without them), come on top.
pub fn end_of_generation(special_id: impl Fn(&str) -> Option<u32>) -> Vec<u32> {
    END_OF_GENERATION.into_iter().filter_map(special_id).collect()
}
