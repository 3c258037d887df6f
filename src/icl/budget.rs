//! How many of the chosen examples fit.

use std::error::Error;

use super::{Example, IclError, Selection};

pub type CountError = Box<dyn Error + Send + Sync>;

/// What a prompt with examples must fit into.
pub struct TokenBudget<'a> {
    /// What the context leaves for the prompt, examples and instruction together.
    pub max_prompt_tokens: usize,
    /// Tokens of the whole prompt with these examples in this order; none is a prompt too. It renders and encodes.
    pub count: &'a dyn Fn(&[&Example]) -> Result<usize, CountError>,
}

impl TokenBudget<'_> {
    /// How many of the first examples to keep; `prompt_examples(n)` are `n` of them as the prompt has them.
    ///
    /// All of `selection.k`, unless the request gives a budget: then as many as are in it, at least one.
    pub(super) fn fit<'e>(
        &self,
        selection: &Selection,
        prompt_examples: impl Fn(usize) -> Vec<&'e Example>,
    ) -> Result<usize, IclError> {
        let k = selection.k;
        let count = |n: usize| (self.count)(&prompt_examples(n)).map_err(IclError::Count);
        // More examples make a longer prompt, so few counts find the most that fit.
        let most = |limit: usize| -> Result<usize, IclError> {
            let (mut fitting, mut too_many) = (0, k);
            while fitting + 1 < too_many {
                let middle = fitting.midpoint(too_many);
                if count(middle)? <= limit { fitting = middle } else { too_many = middle }
            }
            Ok(fitting)
        };
        let num_prompt_tokens = count(k)?;
        let Some(budget) = selection.budget else {
            if num_prompt_tokens <= self.max_prompt_tokens {
                return Ok(k);
            }
            return Err(IclError::PromptTooLong {
                store: selection.store.clone(),
                k,
                num_prompt_tokens,
                max_prompt_tokens: self.max_prompt_tokens,
                num_fitting: most(self.max_prompt_tokens)?,
            });
        };
        let limit = self.max_prompt_tokens.min(count(0)?.saturating_add(budget));
        if num_prompt_tokens <= limit {
            return Ok(k);
        }
        match most(limit)? {
            0 => Err(IclError::BudgetTooSmall { store: selection.store.clone(), k, budget }),
            fitting => Ok(fitting),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::Select;
    use super::*;

    const INSTRUCTION_LEN: usize = 10;

    /// A prompt of ten tokens and one per byte of code.
    fn fit(lens: &[usize], budget: Option<usize>, max_prompt_tokens: usize) -> Result<usize, IclError> {
        let examples: Vec<Example> =
            lens.iter().map(|&len| Example { instruction: String::new(), code: "x".repeat(len) }).collect();
        let selection = Selection { store: "s".to_owned(), k: lens.len(), select: Select::Fixed, seed: None, budget };
        let count = |examples: &[&Example]| Ok(INSTRUCTION_LEN + examples.iter().map(|e| e.code.len()).sum::<usize>());
        let budget = TokenBudget { max_prompt_tokens, count: &count };
        budget.fit(&selection, |n| examples[..n].iter().collect())
    }

    #[test]
    fn too_many_for_the_context_are_refused_with_the_number_that_would_fit() {
        assert_eq!(fit(&[5, 5, 5], None, 25).unwrap(), 3);
        let error = fit(&[5, 5, 5], None, 24).unwrap_err().to_string();
        assert!(error.contains("25 tokens, 24 is the most; 2 would fit"), "{error}");
        let error = fit(&[5], None, 9).unwrap_err().to_string();
        assert!(error.contains("0 would fit"), "{error}");
    }

    #[test]
    fn a_budget_cuts_to_what_is_in_it_and_never_to_none() {
        assert_eq!(fit(&[5, 5, 5], Some(15), 100).unwrap(), 3);
        assert_eq!(fit(&[5, 5, 5], Some(14), 100).unwrap(), 2);
        let error = fit(&[5, 5, 5], Some(4), 100).unwrap_err();
        assert!(error.field() == Some("icl.budget") && error.to_string().contains("4 tokens"), "{error}");
    }

    #[test]
    fn a_budget_is_also_held_to_the_context() {
        assert_eq!(fit(&[5, 5, 5], Some(100), 21).unwrap(), 2);
    }

    #[test]
    fn a_prompt_that_cannot_be_counted_is_an_error() {
        let selection = Selection { store: "s".into(), k: 1, select: Select::Fixed, seed: None, budget: None };
        let budget = TokenBudget { max_prompt_tokens: 9, count: &|_| Err("no template".into()) };
        let error = budget.fit(&selection, |_| Vec::new()).unwrap_err().to_string();
        assert!(error.contains("no template"), "{error}");
    }

    proptest! {
        #[test]
        fn what_is_kept_fits_and_one_more_would_not(lens in prop::collection::vec(1usize..20, 1..30), budget in 1usize..200) {
            let tokens = |n: usize| lens[..n].iter().sum::<usize>();
            match fit(&lens, Some(budget), usize::MAX) {
                Ok(kept) => {
                    prop_assert!(tokens(kept) <= budget);
                    prop_assert!(kept == lens.len() || tokens(kept + 1) > budget);
                }
                Err(_) => prop_assert!(lens[0] > budget),
            }
        }
    }
}
