//! Prompts that a client has put into the fill-in-the-middle layout of another model: editors choose it by the name they
//! know, or have only one.

use crate::tokenizer::sentinels::{FIM_FAMILIES, FimSentinels};

/// The text around a gap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextAround {
    pub prefix: String,
    pub suffix: String,
}

/// A layout as clients type it.
struct Layout {
    sentinels: FimSentinels,
    /// What stands between the sentinels and the text.
    padding: &'static str,
}

/// Beside those of [`FIM_FAMILIES`].
const OTHERS: [Layout; 2] = [
    // CodeLlama's pieces begin with a space, which is not typed as a part of them.
    Layout::new("<PRE>", "<SUF>", "<MID>", " "),
    Layout::new("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>", ""),
];

/// Text that stands for the first token of a sequence.
const BEGINNINGS: [&str; 2] = ["<s>", "<｜begin▁of▁sentence｜>"];

/// What `prompt` puts around its gap, if all of it is in one layout: each sentinel once, in order, the last one at the
/// end. `is_own` says of a sentinel that it is the model's own, as which it needs no reading.
pub fn read(prompt: &str, is_own: impl Fn(&str) -> bool) -> Option<TextAround> {
    let families = FIM_FAMILIES.iter().map(|sentinels| Layout { sentinels: *sentinels, padding: "" });
    families.chain(OTHERS).filter(|layout| !is_own(layout.sentinels.prefix)).find_map(|layout| layout.read(prompt))
}

impl Layout {
    const fn new(prefix: &'static str, suffix: &'static str, middle: &'static str, padding: &'static str) -> Self {
        Self { sentinels: FimSentinels::new(prefix, suffix, middle, &[]), padding }
    }

    fn read(&self, prompt: &str) -> Option<TextAround> {
        let FimSentinels { prefix, suffix, middle, order, boundaries } = self.sentinels;
        if !self.sentinels.layout().all(|sentinel| prompt.matches(sentinel).take(2).count() == 1) {
            return None;
        }
        let prompt = match middle {
            Some(middle) => prompt.trim_end().strip_suffix(middle)?,
            None => prompt,
        };
        let (first, second) = order.arrange(prefix, suffix);
        let (before, rest) = prompt.split_once(first)?;
        let (one, other) = rest.split_once(second)?;
        let (ahead, behind) = order.arrange(one, other);
        let ahead = ahead.strip_prefix(self.padding).unwrap_or(ahead);
        let ahead = ahead.strip_suffix(self.padding).unwrap_or(ahead);
        let behind = behind.strip_suffix(self.padding).unwrap_or(behind);
        let before = BEGINNINGS.iter().find_map(|beginning| before.strip_prefix(beginning)).unwrap_or(before);
        // Other files, with that model's tokens between them.
        let before = boundaries.iter().fold(before.to_owned(), |before, boundary| before.replace(boundary, "\n"));
        Some(TextAround { prefix: before + ahead, suffix: behind.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn around(prompt: &str) -> Option<(String, String)> {
        read(prompt, |sentinel| sentinel == "<|fim_prefix|>").map(|TextAround { prefix, suffix }| (prefix, suffix))
    }

    #[test]
    fn every_layout_is_read_and_the_models_own_is_not() {
        for prompt in [
            "<fim_prefix>a\n<fim_suffix> b<fim_middle>",
            "<fim-prefix>a\n<fim-suffix> b<fim-middle>",
            "<｜fim▁begin｜>a\n<｜fim▁hole｜> b<｜fim▁end｜>",
            "<|fim_begin|>a\n<|fim_hole|> b<|fim_end|>\n",
            "<|code_prefix|>a\n<|code_suffix|> b<|code_middle|>",
            "<PRE> a\n <SUF> b <MID>",
            "<s>[SUFFIX] b[PREFIX]a\n",
            "<[fim-suffix]> b<[fim-prefix]>a\n<[fim-middle]>",
        ] {
            assert_eq!(around(prompt), Some(("a\n".to_owned(), " b".to_owned())), "{prompt}");
        }
        assert_eq!(around("<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"), None);
    }

    #[test]
    fn other_files_come_before_the_prefix_without_the_tokens_between_them() {
        let prompt = "<repo_name>r<file_sep>x.py\n1<file_sep>y.py\n<fim_prefix>a<fim_suffix>b<fim_middle>";
        assert_eq!(around(prompt), Some(("\nr\nx.py\n1\ny.py\na".to_owned(), "b".to_owned())));
    }

    #[test]
    fn code_about_sentinels_is_no_layout() {
        for prompt in [
            "",
            "<fim_prefix>a<fim_suffix>b",
            "<fim_prefix>a<fim_suffix>b<fim_middle>c",
            "<fim_suffix>b<fim_prefix>a<fim_middle>",
            "<fim_prefix>a<fim_prefix>a<fim_suffix>b<fim_middle>",
            "[PREFIX]a[SUFFIX]b",
            "LAYOUT = ('<PRE>', '<SUF>', '<MID>')\n",
        ] {
            assert_eq!(around(prompt), None, "{prompt}");
        }
    }
}
