//! Fill-in-the-middle prompts.

use crate::tokenizer::sentinels::fim_family;
use crate::tokenizer::{Specials, Tokenizer, TokenizerError};

/// How a model wants a prefix and a suffix: each behind its sentinel token, then the sentinel of the middle (PSM).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FillInMiddle {
    prefix: u32,
    suffix: u32,
    middle: u32,
}

impl FillInMiddle {
    /// `None` for a model whose vocabulary has no complete set of sentinels: it was not trained for this.
    pub fn detect(tokenizer: &Tokenizer) -> Option<Self> {
        let family = fim_family(|text| tokenizer.special_id(text))?;
        Some(Self {
            prefix: tokenizer.special_id(family.prefix)?,
            suffix: tokenizer.special_id(family.suffix)?,
            middle: tokenizer.special_id(family.middle)?,
        })
    }

    /// The prompt's token ids, ready to run. A sentinel's text inside `prefix` or `suffix` stays text.
    pub fn render(&self, tokenizer: &Tokenizer, prefix: &str, suffix: &str) -> Result<Vec<u32>, TokenizerError> {
        let mut ids: Vec<u32> = tokenizer.bos().into_iter().collect();
        ids.push(self.prefix);
        ids.extend(tokenizer.encode(prefix, Specials::AsText)?);
        ids.push(self.suffix);
        ids.extend(tokenizer.encode(suffix, Specials::AsText)?);
        ids.push(self.middle);
        Ok(ids)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentinels_are_ids_and_a_users_sentinel_is_text() {
        let tokenizer = Tokenizer::tiny(&["<fim_prefix>", "<fim_middle>", "<fim_suffix>"]);
        let fim = FillInMiddle::detect(&tokenizer).expect("all three sentinels");
        let ids = fim.render(&tokenizer, "a<fim_middle>", "b").unwrap();
        assert_eq!(ids.iter().filter(|id| tokenizer.is_special(**id)).count(), 3);
        assert_eq!((ids[0], ids[1]), (258, 97));
        assert_eq!(ids[ids.len() - 3..], [260, 98, 259]);
    }

    #[test]
    fn an_incomplete_set_of_sentinels_is_no_fill_in_the_middle() {
        assert_eq!(FillInMiddle::detect(&Tokenizer::tiny(&["<fim_prefix>", "<fim_middle>", "<file_sep>"])), None);
    }
}
