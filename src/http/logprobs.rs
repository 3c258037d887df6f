//! Token records as the two interfaces report log-probabilities.

use std::collections::BTreeMap;

use super::types::{ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, TokenAlternative};
use crate::engine::request::TokenLogprob;
use crate::generation::TokenRecord;
use crate::tokenizer::Tokenizer;

/// JSON has no minus infinity; this is as good as impossible.
const LEAST_LOGPROB: f32 = -9999.0;

pub fn completion_logprobs(tokenizer: &Tokenizer, records: &[TokenRecord]) -> CompletionLogprobs {
    CompletionLogprobs {
        tokens: records.iter().map(|record| token_name(tokenizer.token_bytes(record.id))).collect(),
        token_logprobs: records.iter().map(|record| record.logprob.as_ref().map(|l| finite(l.logprob))).collect(),
        top_logprobs: records
            .iter()
            .map(|record| Some(top_logprobs(tokenizer, record.id, record.logprob.as_ref()?)))
            .collect(),
        text_offset: records.iter().map(|record| record.text_offset).collect(),
    }
}

/// By token text, the token itself always among them. Of tokens with the same text the most likely counts.
fn top_logprobs(tokenizer: &Tokenizer, id: u32, logprob: &TokenLogprob) -> BTreeMap<String, f32> {
    let mut by_text = BTreeMap::new();
    for (id, logprob) in logprob.top.iter().copied().chain([(id, logprob.logprob)]) {
        let entry = by_text.entry(token_name(tokenizer.token_bytes(id))).or_insert(LEAST_LOGPROB);
        *entry = logprob.max(*entry);
    }
    by_text
}

/// Tokens without a log-probability, those of an echoed prompt's beginning, do not occur in chat.
pub fn chat_logprobs(tokenizer: &Tokenizer, records: &[TokenRecord]) -> ChatLogprobs {
    let alternative = |id, logprob| {
        let bytes = tokenizer.token_bytes(id);
        TokenAlternative {
            token: tokenizer.token_text(id).into_owned(),
            logprob: finite(logprob),
            bytes: bytes.to_vec(),
        }
    };
    let content = records.iter().filter_map(|record| {
        let logprob = record.logprob.as_ref()?;
        let top_logprobs = logprob.top.iter().map(|&(id, logprob)| alternative(id, logprob)).collect();
        Some(ChatTokenLogprob { chosen: alternative(record.id, logprob.logprob), top_logprobs })
    });
    ChatLogprobs { content: content.collect() }
}

/// The token's text, or its bytes where they are only part of a character, so that two such tokens stay distinct.
fn token_name(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().fold("bytes:".to_owned(), |name, byte| name + &format!("\\x{byte:02x}")),
    }
}

fn finite(logprob: f32) -> f32 {
    logprob.max(LEAST_LOGPROB)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn part_of_a_character_is_named_by_its_bytes() {
        assert_eq!(token_name(b"def"), "def");
        assert_eq!(token_name(&[0xf0, 0x9f]), "bytes:\\xf0\\x9f");
    }

    #[test]
    fn impossible_tokens_have_a_finite_logprob() {
        assert_eq!(finite(f32::NEG_INFINITY), LEAST_LOGPROB);
        assert_eq!(finite(-1.5), -1.5);
    }
}
