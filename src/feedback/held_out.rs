//! The feedback that no adapter is trained on, as an adapter is measured on it.

use std::collections::HashSet;
use std::io::{self, BufRead};

use serde_json::Value;

use super::pairs::{Format, Line, Pairs, Plan, Split, SplitBy};
use crate::experiments::{JudgedReply, PromotionRule, VoteKind};
use crate::generation::Prompt;

/// What a user wanted as the answer to a prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct HeldOut {
    pub prompt: Prompt,
    pub completion: String,
}

/// What `test.jsonl` of an export would have, by user, in order of time; but each as it was asked.
pub fn held_out(replies: &[JudgedReply], rule: &PromotionRule) -> Vec<HeldOut> {
    let is_taken = |reply: &&JudgedReply| !rule.only_edited || reply.kind == VoteKind::Edited;
    let replies: Vec<JudgedReply> = replies.iter().filter(is_taken).cloned().collect();
    let plan = Plan { format: Format::AsAsked, split_by: SplitBy::User, dev: 0.0, test: rule.test };
    let lines = Pairs::new(&replies, &plan).lines.remove(&Split::Test).unwrap_or_default();
    lines.into_iter().filter_map(HeldOut::of).collect()
}

impl HeldOut {
    /// `None` for a chat without an answer, which no line is.
    fn of(line: Line) -> Option<Self> {
        match line {
            Line::Prompt { prompt, completion } => Some(Self { prompt: Prompt::Text(prompt), completion }),
            Line::Messages { mut messages } => {
                let completion = messages.pop()?["content"].as_str()?.to_owned();
                Some(Self { prompt: Prompt::Chat(messages), completion })
            }
        }
    }

    /// What a file for training has of this prompt, in any format.
    fn keys(&self) -> Vec<String> {
        match &self.prompt {
            Prompt::Text(text) => vec![text_key(text)],
            Prompt::Chat(messages) => {
                let only = if let [message] = &messages[..] { message["content"].as_str() } else { None };
                only.map(text_key).into_iter().chain([chat_key(messages)]).collect()
            }
            Prompt::Tokens(_) | Prompt::FillInMiddle { .. } => Vec::new(),
        }
    }
}

/// How many of `pairs` have a prompt that the lines of `file`, for training, have too.
///
/// # Errors
/// It cannot be read.
pub fn count_trained_on(pairs: &[HeldOut], file: impl BufRead) -> io::Result<usize> {
    let mut trained_on = HashSet::new();
    for line in file.lines() {
        // What is no such line was not learned from.
        let row: Value = serde_json::from_str(&line?).unwrap_or_default();
        trained_on.extend(row["prompt"].as_str().map(text_key));
        trained_on.extend(
            row["messages"].as_array().and_then(|messages| messages.split_last()).map(|(_, asked)| chat_key(asked)),
        );
    }
    Ok(pairs.iter().filter(|pair| pair.keys().iter().any(|key| trained_on.contains(key))).count())
}

fn text_key(text: &str) -> String {
    text.trim().to_owned()
}

fn chat_key(messages: &[Value]) -> String {
    // Roles and texts alone: a file may say more of a message, as its weight.
    let message = |message: &Value| [message["role"].clone(), message["content"].clone()];
    Value::from(messages.iter().map(|asked| Value::from(message(asked).to_vec())).collect::<Vec<_>>()).to_string()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::experiments::{Outcome, user_hash};

    fn reply(user: u32, kind: VoteKind, prompt: Value) -> JudgedReply {
        JudgedReply {
            kind,
            outcome: Outcome::Completed,
            prompt: Some(json!([prompt]).to_string()),
            output: Some(format!("output {user}")),
            edited_to: (kind == VoteKind::Edited).then(|| format!("edit {user}")),
            user_hash: Some(user_hash(&user.to_string())),
        }
    }

    fn rule(only_edited: bool) -> PromotionRule {
        PromotionRule { min_pairs: 6, min_shown: 1, test: 0.2, only_edited }
    }

    fn replies() -> Vec<JudgedReply> {
        let chat = |user: u32| json!([{"role": "user", "content": format!("chat {user}")}]);
        let of_user = |user| {
            [
                reply(user, VoteKind::Accepted, json!(format!("prompt {user}"))),
                reply(user, VoteKind::Edited, chat(user)),
                reply(user, VoteKind::Rejected, json!(format!("rejected {user}"))),
            ]
        };
        (0..100).flat_map(of_user).collect()
    }

    #[test]
    fn what_is_held_out_is_as_it_was_asked_and_in_no_export_for_training() {
        let pairs = held_out(&replies(), &rule(false));
        assert!((20..60).contains(&pairs.len()), "{}", pairs.len());
        let chats = pairs.iter().filter(|pair| matches!(pair.prompt, Prompt::Chat(_))).count();
        assert_eq!(2 * chats, pairs.len());
        let edits = held_out(&replies(), &rule(true));
        assert!(edits.iter().all(|pair| pair.completion.starts_with("edit ")));
        assert_eq!(edits.len(), chats);

        for format in [Format::Prompt, Format::Messages] {
            let plan = Plan { format, split_by: SplitBy::User, dev: 0.1, test: 0.2 };
            let exported = Pairs::new(&replies(), &plan).lines;
            let file = |split: Split| {
                let lines = exported[&split].iter().map(|line| serde_json::to_string(line).unwrap());
                lines.collect::<Vec<_>>().join("\n")
            };
            let count = |split| count_trained_on(&pairs, file(split).as_bytes()).unwrap();
            let in_test = if format == Format::Prompt { pairs.len() } else { chats };
            assert_eq!((count(Split::Train), count(Split::Dev), count(Split::Test)), (0, 0, in_test));
        }
    }

    #[test]
    fn lines_that_are_none_were_not_trained_on() {
        let pairs = [HeldOut { prompt: Prompt::Text("a".to_owned()), completion: "b".to_owned() }];
        let count = |file: &str| count_trained_on(&pairs, file.as_bytes()).unwrap();
        assert_eq!(count("not JSON\n[1]\n{\"prompt\": 1}\n{\"messages\": []}"), 0);
        assert_eq!(count("{\"prompt\": \" a\\n\", \"completion\": \"c\"}"), 1);
    }
}
