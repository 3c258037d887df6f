//! What a client expects of an output, followed token by token: where the output agrees, it says what comes next.
//!
//! Where an output stands in its prediction follows from the two alone, so that it is the same in any batch.

use std::sync::Arc;

/// Tokens of an output that must be found in the rest of the prediction before it is followed again from there.
const REJOIN_LENGTH: usize = 4;

/// The expected tokens of one output, and how far it has come.
#[derive(Debug, Clone)]
pub struct Prediction {
    tokens: Arc<[u32]>,
    /// Where the prediction goes on. It never goes back: each of its tokens counts once.
    next: usize,
    /// Whether the last token of the output was the expected one.
    is_followed: bool,
    num_accepted: usize,
    /// The last tokens of the output.
    tail: Vec<u32>,
}

impl Prediction {
    pub fn new(tokens: impl Into<Arc<[u32]>>) -> Self {
        Self { tokens: tokens.into(), next: 0, is_followed: true, num_accepted: 0, tail: Vec::new() }
    }

    /// `token` has come next in the output.
    pub fn follow(&mut self, token: u32) {
        if self.tail.len() == REJOIN_LENGTH {
            self.tail.remove(0);
        }
        self.tail.push(token);
        let rest = self.tokens.get(self.next..).unwrap_or_default();
        let advance = match rest.first() {
            Some(expected) if *expected == token => Some(1),
            _ if self.tail.len() < REJOIN_LENGTH => None,
            _ => rest.windows(REJOIN_LENGTH).position(|window| window == self.tail).map(|at| at + REJOIN_LENGTH),
        };
        self.is_followed = advance.is_some();
        if let Some(advance) = advance {
            self.next += advance;
            self.num_accepted += 1;
        }
    }

    /// What is expected next; nothing where the output has left the prediction.
    pub fn expected(&self) -> &[u32] {
        if self.is_followed { &self.tokens[self.next..] } else { &[] }
    }

    /// Tokens of the output that were the expected ones.
    pub fn num_accepted(&self) -> usize {
        self.num_accepted
    }

    /// Tokens of the prediction that the output has not had.
    pub fn num_rejected(&self) -> usize {
        self.tokens.len() - self.num_accepted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn followed(prediction: &[u32], output: &[u32]) -> Prediction {
        let mut prediction = Prediction::new(prediction);
        output.iter().for_each(|token| prediction.follow(*token));
        prediction
    }

    #[test]
    fn the_rest_is_expected_while_the_output_agrees() {
        let prediction = followed(&[1, 2, 3, 4], &[1, 2]);
        assert_eq!((prediction.expected(), prediction.num_accepted(), prediction.num_rejected()), (&[3, 4][..], 2, 2));
        assert!(followed(&[1, 2], &[1, 2, 3]).expected().is_empty());
    }

    #[test]
    fn an_output_that_replaces_inserts_or_leaves_out_is_followed_again() {
        let text: Vec<u32> = (1..20).collect();
        for (output, next) in
            [(vec![1, 2, 77, 4, 5, 6, 7], 8), (vec![1, 2, 77, 78, 79, 3], 4), (vec![1, 2, 8, 9, 10, 11], 12)]
        {
            assert_eq!(followed(&text, &output).expected().first(), Some(&next), "{output:?}");
        }
        assert!(followed(&text, &[1, 2, 77]).expected().is_empty());
    }

    #[test]
    fn no_token_counts_twice() {
        let prediction = followed(&[5, 5], &[5, 5, 5, 5, 5, 5]);
        assert_eq!((prediction.num_accepted(), prediction.num_rejected()), (2, 0));
    }
}
