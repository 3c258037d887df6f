//! Tokens known by their text: GGUF names only `eos`, and code models end a completion on many others.

/// Which of the two comes first around a gap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FimOrder {
    PrefixFirst,
    SuffixFirst,
}

impl FimOrder {
    /// What belongs to the prefix and to the suffix as it comes in a prompt; and the other way round.
    pub fn arrange<T>(self, one: T, other: T) -> (T, T) {
        match self {
            Self::PrefixFirst => (one, other),
            Self::SuffixFirst => (other, one),
        }
    }
}

/// The fill-in-the-middle tokens of one family of code models.
#[derive(Debug, Clone, Copy)]
pub struct FimSentinels {
    pub prefix: &'static str,
    pub suffix: &'static str,
    /// Behind both of them; `None` where the output goes on from what is last.
    pub middle: Option<&'static str>,
    pub order: FimOrder,
    /// Other tokens of the family that a completion must not run past.
    pub boundaries: &'static [&'static str],
}

/// Ids of the fill-in-the-middle tokens of one vocabulary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FimTokens {
    pub prefix: u32,
    pub suffix: u32,
    /// As in [`FimSentinels::middle`].
    pub middle: Option<u32>,
    pub order: FimOrder,
    /// Other tokens that a completion must not run past, such as those between files.
    pub boundaries: Vec<u32>,
}

impl FimTokens {
    /// Of the first family whose sentinels are all in the vocabulary.
    pub fn by_text(id: impl Fn(&str) -> Option<u32>) -> Option<Self> {
        let is_known = |family: &&FimSentinels| family.layout().all(|text| id(text).is_some());
        let family = FIM_FAMILIES.iter().find(is_known)?;
        Some(Self {
            prefix: id(family.prefix)?,
            suffix: id(family.suffix)?,
            middle: family.middle.and_then(&id),
            order: family.order,
            boundaries: family.boundaries.iter().filter_map(|text| id(text)).collect(),
        })
    }

    /// With what a file that names ids leaves to the family, which is told by the text of the prefix's sentinel; `None`
    /// where the file does not name all that the family has.
    pub fn completed(mut self, prefix_text: &str, id: impl Fn(&str) -> Option<u32>) -> Option<Self> {
        let Some(family) = FIM_FAMILIES.iter().find(|family| family.prefix == prefix_text) else {
            return self.middle.is_some().then_some(self);
        };
        self.order = family.order;
        self.boundaries.extend(family.boundaries.iter().filter_map(|text| id(text)));
        if family.middle.is_none() {
            self.boundaries.extend(self.middle.take());
        }
        self.boundaries.sort_unstable();
        self.boundaries.dedup();
        (self.middle.is_some() == family.middle.is_some()).then_some(self)
    }

    /// How many of a prompt's tokens are sentinels.
    pub fn num_sentinels(&self) -> usize {
        2 + usize::from(self.middle.is_some())
    }

    pub fn all(&self) -> impl Iterator<Item = u32> {
        [self.prefix, self.suffix].into_iter().chain(self.middle).chain(self.boundaries.iter().copied())
    }
}

impl FimSentinels {
    /// Those that a prompt has.
    pub fn layout(&self) -> impl Iterator<Item = &'static str> {
        [self.prefix, self.suffix].into_iter().chain(self.middle)
    }

    fn texts(&self) -> impl Iterator<Item = &'static str> {
        self.layout().chain(self.boundaries.iter().copied())
    }

    /// A family in the usual order.
    pub const fn new(
        prefix: &'static str,
        suffix: &'static str,
        middle: &'static str,
        boundaries: &'static [&'static str],
    ) -> Self {
        Self { prefix, suffix, middle: Some(middle), order: FimOrder::PrefixFirst, boundaries }
    }
}

/// As the models' own cards and tokenizers have them.
pub const FIM_FAMILIES: [FimSentinels; 8] = [
    // Qwen2.5-Coder and Qwen3-Coder, CodeGemma, Granite 4
    FimSentinels::new(
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
        &["<|fim_pad|>", "<|repo_name|>", "<|reponame|>", "<|file_sep|>", "<|file_separator|>", "<|filename|>"],
    ),
    // StarCoder, StarCoder2, StableCode, CodeQwen1.5, Granite Code and 3
    FimSentinels::new(
        "<fim_prefix>",
        "<fim_suffix>",
        "<fim_middle>",
        &["<fim_pad>", "<repo_name>", "<reponame>", "<file_sep>", "<filename>"],
    ),
    // SantaCoder
    FimSentinels::new("<fim-prefix>", "<fim-suffix>", "<fim-middle>", &["<fim-pad>"]),
    // DeepSeek-Coder: the hole stands where the suffix begins
    FimSentinels::new("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", &[]),
    // GLM-4
    FimSentinels::new("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>", &[]),
    // CodeLlama, as transformers' CodeLlamaTokenizer lays it out: pieces of SentencePiece that begin a word
    FimSentinels::new("▁<PRE>", "▁<SUF>", "▁<MID>", &["▁<EOT>"]),
    // Codestral, as mistral-common's `encode_fim`: nothing stands between the prefix and the output
    FimSentinels {
        prefix: "[PREFIX]",
        suffix: "[SUFFIX]",
        middle: None,
        order: FimOrder::SuffixFirst,
        boundaries: &["[MIDDLE]"],
    },
    // Seed-Coder
    FimSentinels {
        prefix: "<[fim-prefix]>",
        suffix: "<[fim-suffix]>",
        middle: Some("<[fim-middle]>"),
        order: FimOrder::SuffixFirst,
        boundaries: &["<[end▁of▁sentence]>"],
    },
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

/// What templates put at the beginning of a text, of a turn, and around the name of a role.
const BEGINNINGS: [&str; 24] = [
    "<bos>",
    "<|begin_of_text|>",
    "<|startoftext|>",
    "<｜begin▁of▁sentence｜>",
    "<BOS_TOKEN>",
    "<|im_start|>",
    "<|im_sep|>",
    "<start_of_turn>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|start_of_role|>",
    "<|end_of_role|>",
    "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|observation|>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "[INST]",
    "[/INST]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
];

/// HTML's tag of struck-through text, which Gemma's vocabulary has beside its other tags: an end only where the file says
/// so.
const STRUCK_THROUGH: &str = "</s>";

/// Whether a token of this text steers the model. Some converters mark such tokens as ordinary or user-defined ones; they
/// are control tokens.
pub fn is_structural(text: &str) -> bool {
    let is_end = END_OF_GENERATION.contains(&text) && text != STRUCK_THROUGH;
    is_end || BEGINNINGS.contains(&text) || FIM_FAMILIES.iter().any(|family| family.texts().any(|t| t == text))
}

/// Ids of every special token that ends a completion, as far as the vocabulary has them. Fill-in-the-middle tokens, whose
/// boundaries count only where the sentinels exist (SmolLM2 has StarCoder's `<file_sep>` without them), come on top.
pub fn end_of_generation(special_id: impl Fn(&str) -> Option<u32>) -> Vec<u32> {
    END_OF_GENERATION.into_iter().filter_map(special_id).collect()
}
