//! Token ids back to text as they come: only what is incomplete is held back, be it a character or a possible stop
//! string.

use std::sync::Arc;

use super::Tokenizer;

/// Turns one sequence's tokens into text, a token at a time.
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    decoder: Utf8Decoder,
    keep_specials: bool,
    /// Special tokens that are kept even so.
    shown: Vec<u32>,
}

impl Detokenizer {
    /// Special tokens give no text.
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Self { tokenizer, decoder: Utf8Decoder::default(), keep_specials: false, shown: Vec::new() }
    }

    /// Special tokens give their own text, such as `<|im_end|>`.
    pub fn with_special_tokens(tokenizer: Arc<Tokenizer>) -> Self {
        Self { keep_specials: true, ..Self::new(tokenizer) }
    }

    /// These special tokens give their own text.
    #[must_use]
    pub fn showing(self, shown: Vec<u32>) -> Self {
        Self { shown, ..self }
    }

    /// The text that is complete with this token; empty within a character of several tokens.
    /// Bytes that cannot become a character are U+FFFD.
    pub fn push(&mut self, id: u32) -> String {
        if !self.keep_specials && self.tokenizer.is_special(id) && !self.shown.contains(&id) {
            return String::new();
        }
        self.decoder.push(self.tokenizer.token_bytes(id))
    }

    /// What is left of a character that was never completed, as U+FFFD.
    pub fn finish(&mut self) -> String {
        self.decoder.finish()
    }
}

/// Incremental, lossy UTF-8: all output together is `String::from_utf8_lossy` of all input together.
#[derive(Debug, Default)]
struct Utf8Decoder {
    /// The beginning of a character, at most three bytes.
    held: Vec<u8>,
}

impl Utf8Decoder {
    fn push(&mut self, bytes: &[u8]) -> String {
        self.held.extend_from_slice(bytes);
        let mut text = String::with_capacity(self.held.len());
        let mut rest = self.held.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, invalid) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    let Some(invalid_len) = error.error_len() else {
                        rest = invalid;
                        break;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &invalid[invalid_len..];
                }
            }
        }
        let num_done = self.held.len() - rest.len();
        self.held.drain(..num_done);
        text
    }

    fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.held)).into_owned()
    }
}

/// What one push to [`StopStrings`] gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopOutcome {
    /// Text that is certainly before any stop string.
    Continue(String),
    /// The stop string that has been found, and all that was left before it: generation ends here.
    Stopped { text: String, stop: String },
}

/// Looks for stop strings in a stream of text. The one that is complete first counts; of those complete at the same
/// character, the longest. How the text is cut into pushes makes no difference.
#[derive(Debug)]
pub struct StopStrings {
    stops: Vec<String>,
    /// The longest end of the text so far that begins a stop string.
    held: String,
}

impl StopStrings {
    /// Empty strings are left out: they would stop everything at once.
    pub fn new(stops: impl IntoIterator<Item = String>) -> Self {
        Self { stops: stops.into_iter().filter(|stop| !stop.is_empty()).collect(), held: String::new() }
    }

    /// Call no more after a match.
    pub fn push(&mut self, text: &str) -> StopOutcome {
        let mut text = std::mem::take(&mut self.held) + text;
        let found = self.stops.iter().filter_map(|stop| text.find(stop).map(|start| (start + stop.len(), start)));
        if let Some((end, start)) = found.min() {
            let stop = text[start..end].to_owned();
            text.truncate(start);
            return StopOutcome::Stopped { text, stop };
        }
        let held_len = self.stops.iter().map(|stop| longest_overlap(&text, stop)).max().unwrap_or(0);
        self.held = text.split_off(text.len() - held_len);
        StopOutcome::Continue(text)
    }

    /// The text held back, when the sequence ends without a match.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes of the longest end of `text` that is a beginning of `stop`, but not all of it.
fn longest_overlap(text: &str, stop: &str) -> usize {
    let beginnings = stop.char_indices().rev().map(|(end, _)| &stop[..end]);
    beginnings.into_iter().find(|beginning| text.ends_with(beginning)).map_or(0, str::len)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn half_a_character_is_held_until_it_is_whole() {
        let mut decoder = Utf8Decoder::default();
        assert_eq!(decoder.push(&[0xf0, 0x9f]), "");
        assert_eq!(decoder.push(&[0x9a, 0x9a, b'!']), "🚚!");
        assert_eq!(decoder.finish(), "");
    }

    #[test]
    fn bytes_that_cannot_become_a_character_are_replaced_at_once() {
        let mut decoder = Utf8Decoder::default();
        assert_eq!(decoder.push(&[b'a', 0xff, b'b']), "a\u{fffd}b");
        assert_eq!(decoder.push(&[0xe2, 0x82]), "");
        assert_eq!(decoder.push(b"c"), "\u{fffd}c");
    }

    #[test]
    fn special_tokens_give_text_only_when_kept() {
        let tokenizer = Arc::new(Tokenizer::tiny(&["<|im_end|>"]));
        assert_eq!(Detokenizer::new(Arc::clone(&tokenizer)).push(258), "");
        assert_eq!(Detokenizer::with_special_tokens(tokenizer).push(258), "<|im_end|>");
    }

    #[test]
    fn an_unfinished_character_is_replaced_at_the_end() {
        let mut detokenizer = Detokenizer::new(Arc::new(Tokenizer::tiny(&[])));
        assert_eq!(detokenizer.push(0xc3), "");
        assert_eq!(detokenizer.finish(), "\u{fffd}");
    }

    #[test]
    fn only_a_possible_stop_string_is_held_back() {
        let mut stops = StopStrings::new(["\n\n".to_string(), String::new()]);
        assert_eq!(stops.push("a\n"), StopOutcome::Continue("a".into()));
        assert_eq!(stops.push("b\n"), StopOutcome::Continue("\nb".into()));
        assert_eq!(stops.push("\nc"), StopOutcome::Stopped { text: String::new(), stop: "\n\n".into() });
    }

    #[test]
    fn what_was_held_back_comes_at_the_end() {
        let mut stops = StopStrings::new(["END".to_string()]);
        assert_eq!(stops.push("the EN"), StopOutcome::Continue("the ".into()));
        assert_eq!(stops.finish(), "EN");
    }

    #[test]
    fn the_stop_string_that_is_complete_first_counts() {
        let mut stops = StopStrings::new(["abcd".to_string(), "bc".to_string()]);
        assert_eq!(stops.push("xabcd"), StopOutcome::Stopped { text: "xa".into(), stop: "bc".into() });
    }

    /// The reference: the shortest beginning of the whole text that ends in a stop string.
    fn search(text: &str, stops: &[String]) -> StopOutcome {
        for (end, c) in text.char_indices() {
            let seen = &text[..end + c.len_utf8()];
            let longest = stops.iter().filter(|s| !s.is_empty() && seen.ends_with(*s)).map(String::len).max();
            if let Some(stop_len) = longest {
                let (text, stop) = seen.split_at(seen.len() - stop_len);
                return StopOutcome::Stopped { text: text.to_string(), stop: stop.to_string() };
            }
        }
        StopOutcome::Continue(text.to_string())
    }

    fn search_in_chunks(chunks: &[String], stops: &[String]) -> StopOutcome {
        let mut stream = StopStrings::new(stops.to_vec());
        let mut released = String::new();
        for chunk in chunks {
            match stream.push(chunk) {
                StopOutcome::Continue(text) => released += &text,
                StopOutcome::Stopped { text, stop } => return StopOutcome::Stopped { text: released + &text, stop },
            }
        }
        StopOutcome::Continue(released + &stream.finish())
    }

    proptest! {
        #[test]
        fn bytes_in_any_chunks_decode_like_the_whole(
            chunks in prop::collection::vec(prop::collection::vec(prop_oneof![any::<u8>(), 0x80..=0xf4u8], 0..6), 0..12),
        ) {
            let mut decoder = Utf8Decoder::default();
            let mut text: String = chunks.iter().map(|chunk| decoder.push(chunk)).collect();
            text += &decoder.finish();
            prop_assert_eq!(text, String::from_utf8_lossy(&chunks.concat()).into_owned());
        }

        #[test]
        fn text_in_any_chunks_stops_where_the_whole_text_does(
            chunks in prop::collection::vec("[abé]{0,4}", 0..10),
            stops in prop::collection::vec("[abé]{0,5}", 0..4),
        ) {
            prop_assert_eq!(search_in_chunks(&chunks, &stops), search(&chunks.concat(), &stops));
        }
    }
}
