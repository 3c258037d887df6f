//! Okapi BM25 over the instructions of a store.

use std::collections::{BTreeSet, HashMap};

/// How fast more of the same word stops counting.
const K1: f64 = 1.2;
/// How much a longer instruction must say to score the same.
const B: f64 = 0.75;

#[derive(Debug)]
pub(super) struct Bm25 {
    /// By word: the documents that have it, ascending, each with what the word adds to its score.
    postings: HashMap<String, Vec<(usize, f64)>>,
    num_documents: usize,
}

impl Bm25 {
    pub(super) fn new<'a>(documents: impl Iterator<Item = &'a str>) -> Self {
        let mut counts: HashMap<String, Vec<(usize, f64)>> = HashMap::new();
        let mut lens = Vec::new();
        for (index, document) in documents.enumerate() {
            let words = words(document);
            lens.push(words.len() as f64);
            for word in words {
                let postings = counts.entry(word).or_default();
                match postings.last_mut() {
                    Some((last, count)) if *last == index => *count += 1.0,
                    _ => postings.push((index, 1.0)),
                }
            }
        }
        // At least 1: instructions without any word are possible, and divide by nothing.
        let mean_len = (lens.iter().sum::<f64>() / lens.len().max(1) as f64).max(1.0);
        let mut postings = counts;
        for documents in postings.values_mut() {
            let num_with = documents.len() as f64;
            let rarity = (1.0 + (lens.len() as f64 - num_with + 0.5) / (num_with + 0.5)).ln();
            for (index, count) in documents {
                let len_penalty = 1.0 - B + B * lens[*index] / mean_len;
                *count = rarity * *count * (K1 + 1.0) / (*count + K1 * len_penalty);
            }
        }
        Self { postings, num_documents: lens.len() }
    }

    /// All documents, the nearest first; equals by their index. Each word of the query counts once.
    pub(super) fn rank(&self, query: &str) -> Vec<usize> {
        let mut scores = vec![0.0; self.num_documents];
        // In order, so that sums round the same every time.
        for word in BTreeSet::from_iter(words(query)) {
            for &(index, weight) in self.postings.get(&word).into_iter().flatten() {
                scores[index] += weight;
            }
        }
        rank_by(&scores)
    }
}

/// Indices by descending score; equals by index.
pub(super) fn rank_by(scores: &[f64]) -> Vec<usize> {
    let mut ranked: Vec<usize> = (0..scores.len()).collect();
    ranked.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    ranked
}

/// Lower-case words; identifiers fall apart at punctuation, at a change of case, and between letters and digits, and what is
/// written without spaces at each character.
fn words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut previous = ' ';
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        if !c.is_alphanumeric() || begins_word(previous, c, rest.peek().copied()) {
            words.extend((!word.is_empty()).then(|| std::mem::take(&mut word)));
        }
        if c.is_alphanumeric() {
            word.extend(c.to_lowercase());
        }
        previous = c;
    }
    words.extend((!word.is_empty()).then_some(word));
    words
}

/// Between `previous` and `c`, as in `readLine`, `HTTPServer`, `utf8`.
fn begins_word(previous: char, c: char, next: Option<char>) -> bool {
    let after_lower_or_before_lower = previous.is_lowercase() || next.is_some_and(char::is_lowercase);
    c.is_numeric() != previous.is_numeric()
        || (c.is_uppercase() && after_lower_or_before_lower)
        || is_word(c)
        || is_word(previous)
}

/// Of Han and Hiragana, which have no spaces between words: a sentence would be one word, that no other sentence has. Each
/// character is one instead, as by Unicode's rules for words (UAX #29).
fn is_word(c: char) -> bool {
    matches!(c, '々' | 'ぁ'..='ゟ' | '㐀'..='䶿' | '一'..='鿿' | '\u{f900}'..='\u{faff}' | '\u{20000}'..='\u{3ffff}')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rank(documents: &[&str], query: &str) -> Vec<usize> {
        Bm25::new(documents.iter().copied()).rank(query)
    }

    #[test]
    fn identifiers_fall_apart_into_words() {
        assert_eq!(words("parseHTTPServer2 max_len(x)"), ["parse", "http", "server", "2", "max", "len", "x"]);
        assert_eq!(words("`DataFrame.iloc`, don't É"), ["data", "frame", "iloc", "don", "t", "é"]);
        assert!(words(" -- \n").is_empty());
    }

    #[test]
    fn what_is_written_without_spaces_is_found_by_its_characters() {
        assert_eq!(words("用pandas读取csv文件"), ["用", "pandas", "读", "取", "csv", "文", "件"]);
        assert_eq!(words("リストを並べ替える"), ["リスト", "を", "並", "べ", "替", "え", "る"]);
        assert_eq!(words("목록을 정렬"), ["목록을", "정렬"]);
        let documents = ["读取文件的每一行", "反转字符串", "对列表排序", "リストを逆順にする"];
        assert_eq!(rank(&documents, "按价格排序列表")[0], 2);
        assert_eq!(rank(&documents, "把字符串反转过来")[0], 1);
        assert_eq!(rank(&documents, "リストを並べ替える")[0], 3);
    }

    #[test]
    fn the_nearest_shares_the_rarest_words() {
        let documents = ["sort a list of words", "read a file of words", "reverse a list", "sort the keys of a dict"];
        assert_eq!(rank(&documents, "how to sort dict_keys")[..2], [3, 0]);
        assert_eq!(rank(&documents, "readFile")[0], 1);
    }

    #[test]
    fn a_shorter_text_with_the_word_is_nearer_and_repeating_it_helps_less_and_less() {
        assert_eq!(rank(&["sort x y z u v w", "sort x"], "sort"), [1, 0]);
        let scores = Bm25::new(["sort a", "sort sort", "b c"].into_iter());
        let weights = &scores.postings["sort"];
        assert!(weights[0].1 < weights[1].1 && weights[1].1 < 2.0 * weights[0].1, "{weights:?}");
    }

    #[test]
    fn the_score_is_that_of_okapis_formula() {
        let index = Bm25::new(["a b", "a a c d"].into_iter());
        // N = 2, mean length 3; b: df 1, tf 1, length 2.
        let expected = (1.0f64 + 1.5 / 1.5).ln() * 2.2 / (1.0 + 1.2 * (0.25 + 0.75 * 2.0 / 3.0));
        assert!((index.postings["b"][0].1 - expected).abs() < 1e-12);
    }

    #[test]
    fn without_a_common_word_the_order_is_the_stores() {
        assert_eq!(rank(&["b", "a", "--"], "z"), [0, 1, 2]);
        assert_eq!(rank(&["same words", "other", "same words"], "words"), [0, 2, 1]);
    }

    proptest! {
        #[test]
        fn every_document_is_ranked_once_and_every_time_alike(documents in prop::collection::vec("[a-f]{1,3}( [a-f]{1,3}){0,5}", 1..20), query in "\\PC*") {
            let index = Bm25::new(documents.iter().map(String::as_str));
            let mut ranked = index.rank(&query);
            ranked.sort_unstable();
            prop_assert_eq!(ranked, (0..documents.len()).collect::<Vec<_>>());
            prop_assert_eq!(index.rank(&query), index.rank(&query));
        }
    }
}
