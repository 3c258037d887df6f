//! SentencePiece BPE (GGUF's `llama`): the adjacent pair whose union has the best score is merged first, or that which merges say
//! is first, the leftmost among equals; characters outside the vocabulary become their UTF-8 bytes.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use tokenizers::pre_tokenizers::metaspace::PrependScheme;

use super::Place;
use super::vocabulary::{Spaces, TokenKind, TokenizerMetadata, parse_byte};

#[derive(Debug)]
pub struct SentencePiece {
    /// Id and score of every token that text may become.
    pieces: HashMap<String, (u32, f32)>,
    /// The scores of pairs that merge, where they are not those of the tokens that pairs become.
    pairs: Option<HashMap<(u32, u32), f32>>,
    /// `[256]`
    byte_ids: Vec<Option<u32>>,
    unknown: Option<u32>,
    spaces: Spaces,
}

/// A stretch of the text, linked to its neighbours. An empty one has been merged into its left neighbour.
#[derive(Debug, Clone)]
struct Symbol {
    start: usize,
    end: usize,
    previous: Option<usize>,
    next: Option<usize>,
}

/// A merge that was possible when it was found: `text[start..end]` is a token.
#[derive(Debug, PartialEq)]
struct Merge {
    score: f32,
    left: usize,
    right: usize,
    start: usize,
    end: usize,
}

impl Eq for Merge {}

impl Ord for Merge {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then_with(|| other.left.cmp(&self.left))
    }
}

impl PartialOrd for Merge {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl SentencePiece {
    pub fn new(metadata: &TokenizerMetadata) -> Self {
        let mut pieces = HashMap::with_capacity(metadata.tokens.len());
        let mut byte_ids = vec![None; 256];
        let mut unknown = None;
        for ((id, text, kind), score) in metadata.iter().zip(&metadata.scores) {
            match kind {
                TokenKind::Normal | TokenKind::UserDefined => {
                    pieces.insert(text.to_string(), (id, *score));
                }
                TokenKind::Byte => {
                    if let Some(byte) = parse_byte(text) {
                        byte_ids[usize::from(byte)] = Some(id);
                    }
                }
                TokenKind::Unknown => unknown = Some(id),
                TokenKind::Control | TokenKind::Unused => {}
            }
        }
        let id = |text: &String| pieces.get(text).map(|(id, _)| *id);
        let pair = |((left, right), rank): (&(String, String), u32)| Some(((id(left)?, id(right)?), -(rank as f32)));
        let pairs = metadata.merges.iter().zip(0..).filter_map(pair).collect();
        let pairs = (!metadata.merges.is_empty()).then_some(pairs);
        Self { pieces, pairs, byte_ids, unknown, spaces: metadata.spaces.clone() }
    }

    pub fn id_of(&self, text: &str) -> Option<u32> {
        self.pieces.get(text).map(|(id, _)| *id)
    }

    pub fn encode(&self, text: &str, place: Place, ids: &mut Vec<u32>) {
        let text = text.replace(' ', "▁");
        let is_prefixed = match self.spaces.prepend {
            PrependScheme::Always => place != Place::Within,
            PrependScheme::First => place == Place::Beginning,
            PrependScheme::Never => false,
        };
        let prefix = if is_prefixed && (self.spaces.doubles || !text.starts_with('▁')) { "▁" } else { "" };
        let text = format!("{prefix}{text}");
        let mut symbols = split_chars(&text);
        let mut merges = BinaryHeap::new();
        for left in 0..symbols.len() {
            merges.extend(self.merge_at(&text, &symbols, left));
        }
        while let Some(merge) = merges.pop() {
            let (left, right) = (&symbols[merge.left], &symbols[merge.right]);
            let is_stale = left.start != merge.start || left.end != right.start || right.end != merge.end;
            if is_stale || right.start == right.end {
                continue;
            }
            let next = right.next;
            symbols[merge.left].end = merge.end;
            symbols[merge.left].next = next;
            symbols[merge.right].start = merge.end;
            if let Some(next) = next {
                symbols[next].previous = Some(merge.left);
            }
            merges.extend(self.merge_at(&text, &symbols, merge.left));
            if let Some(previous) = symbols[merge.left].previous {
                merges.extend(self.merge_at(&text, &symbols, previous));
            }
        }
        for symbol in symbols.iter().filter(|s| s.start < s.end) {
            self.append(&text[symbol.start..symbol.end], ids);
        }
    }

    /// The merge of a symbol with its right neighbour, if their union is a token.
    fn merge_at(&self, text: &str, symbols: &[Symbol], left: usize) -> Option<Merge> {
        let right = symbols[left].next?;
        let (start, end) = (symbols[left].start, symbols[right].end);
        if self.spaces.splits && text[symbols[right].start..].starts_with('▁') {
            return None;
        }
        let (_, of_token) = self.pieces.get(&text[start..end])?;
        let score = match &self.pairs {
            None => *of_token,
            Some(pairs) => {
                let [one, other] = [left, right].map(|at| self.id_of(&text[symbols[at].start..symbols[at].end]));
                *pairs.get(&(one?, other?))?
            }
        };
        Some(Merge { score, left, right, start, end })
    }

    fn append(&self, piece: &str, ids: &mut Vec<u32>) {
        match self.id_of(piece) {
            Some(id) => ids.push(id),
            None => ids.extend(piece.bytes().filter_map(|byte| self.byte_ids[usize::from(byte)].or(self.unknown))),
        }
    }
}

fn split_chars(text: &str) -> Vec<Symbol> {
    let mut symbols: Vec<Symbol> = text
        .char_indices()
        .enumerate()
        .map(|(i, (start, c))| Symbol {
            start,
            end: start + c.len_utf8(),
            previous: i.checked_sub(1),
            next: Some(i + 1),
        })
        .collect();
    if let Some(last) = symbols.last_mut() {
        last.next = None;
    }
    symbols
}

#[cfg(test)]
mod tests {
    use super::super::vocabulary::TokenizerModel;
    use super::*;

    fn sentence_piece(pieces: &[(&str, f32)]) -> SentencePiece {
        let mut tokens: Vec<String> = (0..256).map(|byte| format!("<0x{byte:02X}>")).collect();
        let mut kinds = vec![TokenKind::Byte; 256];
        let mut scores = vec![0.0; 256];
        for (text, score) in pieces {
            tokens.push(text.to_string());
            kinds.push(TokenKind::Normal);
            scores.push(*score);
        }
        SentencePiece::new(&TokenizerMetadata {
            model: TokenizerModel::SentencePiece,
            pre: crate::tokenizer::vocabulary::PreTokenizer::None,
            tokens,
            kinds,
            scores,
            merges: vec![],
            bos: None,
            eos: None,
            other_ends: vec![],
            fim: None,
            add_bos: None,
            spaces: Spaces::prefixed(true),
            strips: Default::default(),
        })
    }

    fn encode(pieces: &[(&str, f32)], text: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        sentence_piece(pieces).encode(text, Place::Beginning, &mut ids);
        ids
    }

    #[test]
    fn the_best_scored_pair_merges_first() {
        let pieces = [("▁", -9.0), ("a", -9.0), ("b", -9.0), ("c", -9.0), ("ab", -2.0), ("bc", -1.0), ("▁a", -3.0)];
        assert_eq!(encode(&pieces, "abc"), [262, 261], "bc before ab, then ▁a");
    }

    #[test]
    fn the_leftmost_of_equal_pairs_merges_first() {
        let pieces = [("▁", -9.0), ("a", -9.0), ("aa", -1.0)];
        assert_eq!(encode(&pieces, "aaa"), [256, 258, 257]);
    }

    #[test]
    fn a_merged_pair_merges_on() {
        let pieces = [("▁", -9.0), ("a", -9.0), ("b", -9.0), ("ab", -1.0), ("abab", -2.0), ("▁abab", -3.0)];
        assert_eq!(encode(&pieces, "abab"), [261]);
    }

    #[test]
    fn an_unknown_character_becomes_its_bytes() {
        assert_eq!(encode(&[("▁", -1.0)], "é"), [256, 0xc3, 0xa9]);
    }
}
