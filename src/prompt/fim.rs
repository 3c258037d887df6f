//! Fill-in-the-middle prompts.

pub mod foreign;

use serde::Serialize;

use crate::tokenizer::sentinels::FimTokens;
use crate::tokenizer::{Specials, Tokenizer, TokenizerError};

/// How a model wants a prefix and a suffix: each behind its sentinel token, in its order, then the sentinel of the middle
/// if it has one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FillInMiddle {
    tokens: FimTokens,
    /// `None` for a model that was trained on single files.
    repository: Option<RepositoryTokens>,
}

/// What stands before the name of a repository, and of each of its files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct RepositoryTokens {
    repository: u32,
    file: u32,
}

/// Text from elsewhere that is worth knowing at the gap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ContextFile {
    pub name: String,
    pub text: String,
}

const REPOSITORY_TOKENS: [&str; 3] = ["<|repo_name|>", "<repo_name>", "<reponame>"];
const FILE_TOKENS: [&str; 2] = ["<|file_sep|>", "<file_sep>"];
/// Clients name neither; the names only complete the layout, as in llama.cpp.
const REPOSITORY_NAME: &str = "myproject";
const CURRENT_FILE_NAME: &str = "filename";

/// A gap and what stands around it, in tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Gap {
    /// The model's first token, if it wants one.
    beginning: Option<u32>,
    /// Other files, before the sentinel of the prefix.
    context: Vec<u32>,
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    /// How the middle begins, where that is not for the model to say.
    middle: Vec<u32>,
}

impl FillInMiddle {
    /// `None` for a model whose vocabulary has no complete set of sentinels: it was not trained for this.
    pub fn detect(tokenizer: &Tokenizer) -> Option<Self> {
        let id = |texts: &[&str]| texts.iter().find_map(|text| tokenizer.special_id(text));
        let repository = id(&REPOSITORY_TOKENS).zip(id(&FILE_TOKENS));
        tokenizer.fim().map(|tokens| Self {
            tokens: tokens.clone(),
            repository: repository.map(|(repository, file)| RepositoryTokens { repository, file }),
        })
    }

    /// The prompt's token ids, ready to run. A sentinel's text inside the texts stays text. `files` are from the oldest
    /// to the newest, and left out where the model was trained on single files.
    pub fn render(
        &self,
        tokenizer: &Tokenizer,
        files: &[ContextFile],
        prefix: &str,
        suffix: &str,
    ) -> Result<Vec<u32>, TokenizerError> {
        Ok(self.tokens(&Gap {
            beginning: tokenizer.bos(),
            context: self.context(tokenizer, files)?,
            prefix: tokenizer.encode(prefix, Specials::AsText)?,
            suffix: tokenizer.encode_continuation(suffix)?,
            middle: Vec::new(),
        }))
    }

    fn context(&self, tokenizer: &Tokenizer, files: &[ContextFile]) -> Result<Vec<u32>, TokenizerError> {
        let Some(RepositoryTokens { repository, file }) = self.repository.filter(|_| !files.is_empty()) else {
            return Ok(Vec::new());
        };
        let encode = |text: &str| tokenizer.encode(text, Specials::AsText);
        let mut tokens = vec![repository];
        tokens.extend(encode(&format!("{REPOSITORY_NAME}\n"))?);
        for ContextFile { name, text } in files {
            tokens.push(file);
            tokens.extend(encode(&format!("{name}\n{text}"))?);
        }
        tokens.push(file);
        tokens.extend(encode(&format!("{CURRENT_FILE_NAME}\n"))?);
        Ok(tokens)
    }

    /// `tokens` with at most `max_tokens` of them, if they lay out one gap. What is farthest from it goes first.
    pub fn fit(&self, tokenizer: &Tokenizer, tokens: Vec<u32>, max_tokens: usize) -> Vec<u32> {
        if tokens.len() <= max_tokens {
            return tokens;
        }
        match self.read(tokenizer, &tokens) {
            Some(mut gap) => {
                gap.cut(max_tokens.saturating_sub(self.tokens.num_sentinels()));
                self.tokens(&gap)
            }
            None => tokens,
        }
    }

    /// Whether a sentinel of this text is this model's own.
    pub fn is_own(&self, tokenizer: &Tokenizer, sentinel: &str) -> bool {
        tokenizer.special_id(sentinel).is_some_and(|id| self.tokens.all().any(|own| own == id))
    }

    /// The gap of a prompt that has each sentinel once, in order.
    fn read(&self, tokenizer: &Tokenizer, tokens: &[u32]) -> Option<Gap> {
        let place = |sentinel| {
            let mut places = tokens.iter().enumerate().filter(|(_, token)| **token == sentinel).map(|(place, _)| place);
            places.next().filter(|_| places.next().is_none())
        };
        let (first, second) = self.tokens.order.arrange(self.tokens.prefix, self.tokens.suffix);
        let (first, second) = (place(first)?, place(second)?);
        let end = self.tokens.middle.map_or(Some(tokens.len()), place)?;
        if !(first < second && second < end) {
            return None;
        }
        let (prefix, suffix) = self.tokens.order.arrange(&tokens[first + 1..second], &tokens[second + 1..end]);
        let beginning = tokens.first().copied().filter(|first| Some(*first) == tokenizer.bos());
        Some(Gap {
            beginning,
            context: tokens[usize::from(beginning.is_some())..first].to_vec(),
            prefix: prefix.to_vec(),
            suffix: suffix.to_vec(),
            middle: tokens.get(end + 1..).unwrap_or_default().to_vec(),
        })
    }

    /// Whether a sentinel, or a token between files, steers the model: what follows is code for a place in a file.
    pub fn is_in(&self, tokens: &[u32]) -> bool {
        tokens.iter().any(|token| self.tokens.all().any(|sentinel| sentinel == *token))
    }

    fn tokens(&self, gap: &Gap) -> Vec<u32> {
        let Gap { beginning, context, prefix, suffix, middle } = gap;
        let mut tokens: Vec<u32> = beginning.iter().chain(context).copied().collect();
        let parts = self.tokens.order.arrange((self.tokens.prefix, prefix), (self.tokens.suffix, suffix));
        for (sentinel, text) in <[_; 2]>::from(parts) {
            tokens.push(sentinel);
            tokens.extend(text);
        }
        tokens.extend(self.tokens.middle);
        tokens.extend(middle);
        tokens
    }
}

impl Gap {
    /// Cuts what is farthest from the gap until the prompt has at most `max_tokens` tokens beside its sentinels: first the
    /// head of other files, then the head of the prefix and the tail of the suffix, of which the suffix keeps a quarter of
    /// the room.
    fn cut(&mut self, max_tokens: usize) {
        let kept = usize::from(self.beginning.is_some()) + self.middle.len();
        let room = max_tokens.saturating_sub(kept);
        let suffix_room = (room / 4).max(room.saturating_sub(self.prefix.len()));
        self.suffix.truncate(suffix_room);
        keep_tail(&mut self.prefix, room - self.suffix.len());
        keep_tail(&mut self.context, room - self.suffix.len() - self.prefix.len());
    }
}

fn keep_tail(tokens: &mut Vec<u32>, most: usize) {
    tokens.drain(..tokens.len().saturating_sub(most));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::tokenizer::sentinels::FIM_FAMILIES;

    const SENTINELS: [&str; 4] = ["<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<file_sep>"];

    fn tiny() -> (Tokenizer, FillInMiddle) {
        let tokenizer = Tokenizer::tiny(&SENTINELS);
        let fim = FillInMiddle::detect(&tokenizer).expect("all three sentinels");
        (tokenizer, fim)
    }

    #[test]
    fn sentinels_are_ids_and_a_users_sentinel_is_text() {
        let (tokenizer, fim) = tiny();
        let ids = fim.render(&tokenizer, &[], "a<fim_middle>", "b").unwrap();
        assert_eq!(ids.iter().filter(|id| tokenizer.is_special(**id)).count(), 3);
        assert_eq!((ids[0], ids[1]), (258, 97));
        assert_eq!(ids[ids.len() - 3..], [260, 98, 259]);
    }

    #[test]
    fn an_incomplete_set_of_sentinels_is_no_fill_in_the_middle() {
        assert_eq!(FillInMiddle::detect(&Tokenizer::tiny(&["<fim_prefix>", "<fim_middle>", "<file_sep>"])), None);
    }

    #[test]
    fn what_a_client_laid_out_is_read_and_written_back_as_it_was() {
        let (tokenizer, fim) = tiny();
        let read = |prompt: &str| {
            let tokens = tokenizer.encode(prompt, Specials::Parse).unwrap();
            assert_eq!(fim.is_in(&tokens), prompt.contains("<f"), "{prompt}");
            fim.read(&tokenizer, &tokens).map(|gap| (fim.tokens(&gap) == tokens, gap.context.len()))
        };
        assert_eq!(read("<fim_prefix>ab<fim_suffix>c<fim_middle>"), Some((true, 0)));
        assert_eq!(read("<file_sep>xy<fim_prefix>ab<fim_suffix>c<fim_middle>"), Some((true, 3)));
        assert_eq!(read("<fim_prefix>ab<fim_suffix>c<fim_middle>begun"), Some((true, 0)));
        for other in [
            "ab",
            "<file_sep>ab",
            "<fim_prefix>a<fim_suffix>b",
            "<fim_suffix>a<fim_prefix>b<fim_middle>",
            "<fim_prefix>a<fim_suffix>b<fim_suffix>b<fim_middle>",
        ] {
            assert_eq!(read(other), None, "{other}");
        }
    }

    #[test]
    fn files_stand_before_the_gap_where_the_model_knows_repositories() {
        let files = [("a.py", "x<file_sep>"), ("b.py", "y")];
        let files = files.map(|(name, text)| ContextFile { name: name.to_owned(), text: text.to_owned() });
        let sentinels = ["<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<file_sep>", "<repo_name>"];
        let tokenizer = Tokenizer::tiny(&sentinels);
        let fim = FillInMiddle::detect(&tokenizer).unwrap();
        let laid_out = "<repo_name>myproject\n<file_sep>a.py\nx\u{1}<file_sep>b.py\ny<file_sep>filename\n<fim_prefix>p<fim_suffix>s<fim_middle>";
        let mut expected = tokenizer.encode(laid_out, Specials::Parse).unwrap();
        let place = expected.iter().position(|token| *token == 1).unwrap();
        expected.splice(place..=place, tokenizer.encode("<file_sep>", Specials::AsText).unwrap());
        assert_eq!(fim.render(&tokenizer, &files, "p", "s").unwrap(), expected);
        let (tokenizer, single) = tiny();
        let alone = single.render(&tokenizer, &[], "p", "s").unwrap();
        assert_eq!(single.render(&tokenizer, &files, "p", "s").unwrap(), alone);
    }

    #[test]
    fn every_family_lays_out_a_gap_in_its_own_way() {
        for (laid_out, boundary) in [
            ("<|fim_prefix|>p<|fim_suffix|>s<|fim_middle|>", "<|file_sep|>"),
            ("<fim_prefix>p<fim_suffix>s<fim_middle>", "<filename>"),
            ("<fim-prefix>p<fim-suffix>s<fim-middle>", "<fim-pad>"),
            ("<｜fim▁begin｜>p<｜fim▁hole｜>s<｜fim▁end｜>", "<|EOT|>"),
            ("<|code_prefix|>p<|code_suffix|>s<|code_middle|>", "<|endoftext|>"),
            ("▁<PRE>p▁<SUF>s▁<MID>", "▁<EOT>"),
            ("[SUFFIX]s[PREFIX]p", "[MIDDLE]"),
            ("<[fim-suffix]>s<[fim-prefix]>p<[fim-middle]>", "<[end▁of▁sentence]>"),
        ] {
            let family = FIM_FAMILIES.iter().find(|family| laid_out.contains(family.prefix)).expect(laid_out);
            let specials: Vec<&str> = family.layout().chain([boundary]).collect();
            let tokenizer = Tokenizer::tiny(&specials);
            let fim = FillInMiddle::detect(&tokenizer).expect(laid_out);
            let expected = tokenizer.encode(laid_out, Specials::Parse).unwrap();
            assert_eq!(fim.render(&tokenizer, &[], "p", "s").unwrap(), expected, "{laid_out}");
            let gap = fim.read(&tokenizer, &expected).expect(laid_out);
            assert_eq!((&gap.prefix[..], &gap.suffix[..]), (&b"p".map(u32::from)[..], &b"s".map(u32::from)[..]));
            let stops = tokenizer.stop_tokens();
            assert!(expected.iter().filter(|id| **id > 255).all(|id| stops.contains(id)), "{laid_out}");
            assert!(stops.contains(&tokenizer.special_id(boundary).unwrap()), "{boundary}");
        }
    }

    #[test]
    fn code_llamas_prefix_begins_with_a_space_and_its_suffix_does_not() {
        // As transformers' CodeLlamaTokenizer: `▁<PRE> {prefix} ▁<SUF>{suffix} ▁<MID>`, the spaces parts of the sentinels.
        let tokenizer = Tokenizer::tiny_pieces(&["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>", "▁", "a", "▁a", "b", "▁b"]);
        let fim = FillInMiddle::detect(&tokenizer).expect("the pieces");
        assert_eq!(fim.render(&tokenizer, &[], "a", "b").unwrap(), [256, 262, 257, 263, 258]);
        assert_eq!(fim.render(&tokenizer, &[], "a", "").unwrap(), [256, 262, 257, 258]);
    }

    proptest! {
        #[test]
        fn a_cut_keeps_what_is_next_to_the_gap(num_context in 0usize..9, num_prefix in 0usize..40,
            num_suffix in 0usize..40, max_tokens in 3usize..80) {
            let whole = Gap {
                beginning: None,
                context: vec![1; num_context],
                prefix: (100..).take(num_prefix).collect(),
                suffix: (200..).take(num_suffix).collect(),
                middle: Vec::new(),
            };
            let mut cut = whole.clone();
            cut.cut(max_tokens - 3);
            let (_, fim) = tiny();
            let (before, after) = (fim.tokens(&whole).len(), fim.tokens(&cut).len());
            // Nothing is cut in vain.
            prop_assert_eq!(after, before.min(max_tokens));
            prop_assert!(whole.prefix.ends_with(&cut.prefix) && whole.suffix.starts_with(&cut.suffix));
            let room = max_tokens - 3;
            prop_assert!(cut.suffix.len() >= num_suffix.min(room / 4));
            prop_assert!(cut.prefix.len() >= num_prefix.min(room - room / 4));
        }
    }
}
