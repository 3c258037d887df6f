//! Guesses the next tokens of a sequence from its own text, and from past replies: where its last few tokens occurred before, what
//! followed then may follow again. Edited code, lists and renamed functions are mostly repetition.
//!
//! A guess costs a row of the step and is never trusted: its row is sampled like any other, and the guess counts only
//! where it equals the token that was drawn. The output is the same, bit for bit, with and without guessing.

use super::past_replies;

/// Tokens that must match before their continuation is guessed, longest first: a longer match is a better guess.
const MATCH_LENGTHS: [usize; 3] = [5, 3, 2];
/// Least of them in past replies: what two tokens were followed by in another text says little.
const MIN_PAST_MATCH: usize = 3;
/// Guesses of a sequence that has not been tried yet.
const FIRST_LENGTH: usize = 3;
/// Most steps that a sequence whose guesses fail goes without one.
const MAX_PAUSE: usize = 32;
/// Most guesses at once: after one that failed, and after more and more that came true.
const MOST: [usize; 3] = [15, 31, 63];

/// One sequence's guesses, and how well they have done.
#[derive(Debug)]
pub struct Speculation {
    draft: Vec<u32>,
    num_accepted: usize,
    /// Guesses to make next: doubled when all came true, else as many as did.
    length: usize,
    /// Guesses that came true since one did not.
    run: usize,
    /// Steps to go without a guess, and how many that will be after the next failure.
    pause: usize,
    next_pause: usize,
}

impl Default for Speculation {
    fn default() -> Self {
        Self { draft: Vec::new(), num_accepted: 0, length: FIRST_LENGTH, run: 0, pause: 0, next_pause: 1 }
    }
}

impl Speculation {
    /// The guesses of the current step.
    pub fn draft(&self) -> &[u32] {
        &self.draft
    }

    /// Guesses at most `most` tokens that follow `tokens`: those that the client expects, else from the text itself or from `past`
    /// replies.
    pub fn propose(&mut self, tokens: &[u32], expected: &[u32], past: &[u32], most: usize) {
        self.draft.clear();
        if self.pause > 0 {
            self.pause -= 1;
            return;
        }
        let next = match expected {
            [] => continuation(tokens, past).unwrap_or_default(),
            expected => expected,
        };
        self.draft.extend(next.iter().take(most.min(self.length)));
    }

    /// Gives up all guesses but the first `most`.
    pub fn truncate(&mut self, most: usize) {
        self.draft.truncate(most);
    }

    /// Most guesses that are worth their rows where the base of a step takes as long as `as_base` rows: what gives most
    /// tokens a second if a passage that has been copied for a while goes on for about as long again. (Of `run` guesses that came true
    /// in a row, the next `n` do with probability `run / (run + n)`, so that about `run · ln(1 + n / run)` of `n` count.)
    pub fn worth_guessing(&self, as_base: usize) -> usize {
        let run = self.run.max(1) as f64;
        let tokens_per_row = |most: usize| (1.0 + run * (most as f64 / run).ln_1p()) / (as_base + 1 + most) as f64;
        let best = MOST.into_iter().max_by(|a, b| tokens_per_row(*a).total_cmp(&tokens_per_row(*b)));
        best.unwrap_or(MOST[0])
    }

    /// The next guess came true.
    pub fn accept(&mut self) {
        self.num_accepted += 1;
    }

    /// Learns from the guesses of a step, and forgets them.
    pub fn settle(&mut self) {
        let (num_guessed, num_accepted) = (self.draft.len(), std::mem::take(&mut self.num_accepted));
        self.draft.clear();
        if num_guessed == 0 {
            return;
        }
        self.run = if num_accepted == num_guessed { self.run + num_guessed } else { 0 };
        if num_accepted == 0 {
            (self.length, self.pause) = (FIRST_LENGTH, self.next_pause);
            self.next_pause = (2 * self.next_pause).min(MAX_PAUSE);
            return;
        }
        self.next_pause = 1;
        if num_accepted == num_guessed {
            self.length = self.length.max(2 * num_guessed);
        } else {
            self.length = num_accepted.clamp(2, MOST[0]);
        }
    }
}

/// What followed the longest end of the text that occurred before, where it did so last: in the text itself rather than in past
/// replies.
fn continuation<'a>(tokens: &'a [u32], past: &'a [u32]) -> Option<&'a [u32]> {
    MATCH_LENGTHS.into_iter().find_map(|length| {
        let (earlier, end) = tokens.split_at_checked(tokens.len().checked_sub(length)?)?;
        // An occurrence may reach into the end itself: a text of one repeated token continues with it.
        let windows = tokens[..earlier.len() + length - 1].windows(length);
        let in_text = windows.enumerate().rev().find(|(_, window)| *window == end);
        let in_text = in_text.map(|(at, _)| &tokens[at + length..]);
        in_text.or_else(|| past_replies::continuation(past, end).filter(|_| length >= MIN_PAST_MATCH))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proposed(tokens: &[u32], most: usize) -> Vec<u32> {
        let mut speculation = Speculation::default();
        speculation.propose(tokens, &[], &[], most);
        speculation.draft().to_vec()
    }

    /// How many are guessed in a step in which so many come true.
    fn guess(speculation: &mut Speculation, text: &[u32], num_accepted: usize) -> usize {
        speculation.propose(text, &[], &[], 64);
        let length = speculation.draft().len();
        (0..num_accepted.min(length)).for_each(|_| speculation.accept());
        speculation.settle();
        length
    }

    #[test]
    fn the_latest_longest_match_says_what_follows() {
        assert_eq!(proposed(&[1, 2, 3, 4, 5, 1, 2], 8), [3, 4, 5]);
        assert_eq!(proposed(&[1, 2, 7, 1, 2, 8, 1, 2], 1), [8]);
        // Three matching tokens outweigh a later match of two.
        assert_eq!(proposed(&[9, 1, 2, 7, 3, 1, 2, 8, 9, 1, 2], 1), [7]);
        assert_eq!(proposed(&[5, 5, 5], 8), [5]);
    }

    #[test]
    fn past_replies_say_what_follows_where_the_text_does_not() {
        let past = [1, 2, 3, 4, 5, 6, u32::MAX, 7, 8, 9];
        let proposed = |tokens: &[u32]| {
            let mut speculation = Speculation::default();
            speculation.propose(tokens, &[], &past, 8);
            speculation.draft().to_vec()
        };
        assert_eq!(proposed(&[0, 1, 2, 3]), [4, 5, 6]);
        assert_eq!(proposed(&[2, 3, 4, 9, 2, 3, 4]), [9, 2, 3], "as long a match in the text itself goes first");
        assert_eq!(proposed(&[3, 4, 9, 1, 2, 3, 4]), [5, 6], "a longer one in the past goes before that");
        assert!(proposed(&[0, 1, 2]).is_empty() && proposed(&[7, 8, 9]).is_empty());
    }

    #[test]
    fn nothing_is_guessed_without_a_match_or_room() {
        assert!(proposed(&[], 8).is_empty());
        assert!(proposed(&[1], 8).is_empty());
        assert!(proposed(&[1, 2, 3, 4], 8).is_empty());
        assert!(proposed(&[1, 2, 3, 1, 2], 0).is_empty());
    }

    #[test]
    fn what_the_client_expects_outweighs_the_text() {
        let mut speculation = Speculation::default();
        speculation.propose(&[1, 2, 3, 1, 2], &[7, 8, 9, 10], &[], 2);
        assert_eq!(speculation.draft(), [7, 8]);
    }

    #[test]
    fn guesses_grow_with_success_and_shrink_with_failure() {
        let text: Vec<u32> = (0..40).chain(0..5).collect();
        let mut speculation = Speculation::default();
        let mut next = |num_accepted: usize| guess(&mut speculation, &text, num_accepted);
        assert_eq!([next(9), next(9), next(4), next(9), next(9)], [3, 6, 12, 4, 8]);
    }

    #[test]
    fn the_longer_a_passage_is_copied_and_the_cheaper_rows_are_the_more_is_guessed() {
        let worth = |run: usize, as_base: usize| Speculation { run, ..Speculation::default() }.worth_guessing(as_base);
        assert_eq!([0, 30, 80, 400].map(|run| worth(run, 5)), [15, 15, 31, 63]);
        assert_eq!([0, 15, 30, 400].map(|run| worth(run, 100)), [31, 63, 63, 63]);
    }

    #[test]
    fn a_guess_that_fails_ends_the_copying() {
        let text: Vec<u32> = (0..200).chain(0..5).collect();
        let mut speculation = Speculation::default();
        let mut next = |num_accepted: usize| (guess(&mut speculation, &text, num_accepted), speculation.run);
        assert_eq!([next(99), next(99), next(99)], [(3, 3), (6, 9), (12, 21)]);
        assert_eq!([next(99), next(99), next(60)], [(24, 45), (48, 93), (64, 0)]);
        assert_eq!([next(99), next(99)], [(15, 15), (30, 45)]);
    }

    #[test]
    fn a_sequence_whose_guesses_fail_pauses_longer_each_time() {
        let text = [1, 2, 3, 1, 2];
        let mut speculation = Speculation::default();
        let mut steps_between = Vec::new();
        let mut steps = 0;
        while steps_between.len() < 8 {
            speculation.propose(&text, &[], &[], 4);
            if speculation.draft().is_empty() {
                steps += 1;
            } else {
                steps_between.push(steps);
                steps = 0;
            }
            speculation.settle();
        }
        assert_eq!(steps_between, [0, 1, 2, 4, 8, 16, 32, 32]);
    }
}
