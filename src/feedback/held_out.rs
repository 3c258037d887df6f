//! The feedback that no adapter is trained on, as an adapter is measured on it.

use std::collections::HashSet;
use std::io::{self, BufRead};

use serde_json::{Value, json};

use super::pairs::{Format, Line, Pairs, Plan, Split, SplitBy, plain_message};
use crate::experiments::{JudgedReply, PromotionRule, VoteKind};
use crate::generation::Prompt;

/// What a user wanted as the answer to a prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct HeldOut {
    pub prompt: Prompt,
    pub completion: String,
}

/// What users of the held-out share wanted, in order of time, each as it was asked; without the prompts that an export, in
/// either format, has for training, as those that users of both shares sent.
pub fn held_out(replies: &[JudgedReply], rule: &PromotionRule) -> Vec<HeldOut> {
    // Whom an export takes for `dev.jsonl` is trained on as well: that decides when the training ends.
    let plan = |format| Plan { format, split_by: SplitBy::User, dev: 0.0, test: rule.test };
    let mut trained_on = HashSet::new();
    for format in [Format::Prompt, Format::Messages] {
        let lines = Pairs::new(replies, &plan(format)).lines.remove(&Split::Train).unwrap_or_default();
        lines.iter().for_each(|line| trained_on.extend(learned(&json!(line))));
    }
    let plan = plan(Format::AsAsked);
    let is_taken = |reply: &&JudgedReply| {
        let is_of_test = reply.user_hash.is_some_and(|hash| Split::of(hash, &plan) == Split::Test);
        is_of_test && (!rule.only_edited || reply.kind == VoteKind::Edited)
    };
    let replies: Vec<JudgedReply> = replies.iter().filter(is_taken).cloned().collect();
    let lines = Pairs::new(&replies, &plan).lines.remove(&Split::Test).unwrap_or_default();
    let pairs = lines.into_iter().filter_map(HeldOut::of);
    pairs.filter(|pair| pair.key().is_none_or(|key| !trained_on.contains(&key))).collect()
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

    /// What [`learned`] finds of this prompt in a file for training.
    fn key(&self) -> Option<String> {
        match &self.prompt {
            Prompt::Text(text) => Some(text_key(text)),
            Prompt::Chat(messages) => Some(chat_key(messages)),
            Prompt::Tokens(_) | Prompt::FillInMiddle { .. } => None,
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
        trained_on.extend(learned(&serde_json::from_str(&line?).unwrap_or_default()));
    }
    Ok(pairs.iter().filter_map(HeldOut::key).filter(|key| trained_on.contains(key)).count())
}

/// The prompts that a line for training has answers to which are learned: of a chat, all before each of those.
fn learned(row: &Value) -> Vec<String> {
    let messages = row["messages"].as_array().map_or(&[][..], Vec::as_slice);
    let is_learned = |message: &Value| message["role"] == "assistant" && message["weight"] != 0;
    let answers = messages.iter().enumerate().filter(|(_, message)| is_learned(message));
    let prompts = answers.map(|(index, _)| chat_key(&messages[..index]));
    row["prompt"].as_str().map(text_key).into_iter().chain(prompts).collect()
}

fn text_key(text: &str) -> String {
    text.trim().to_owned()
}

/// The same for a chat as it was asked and as an export writes it, which makes a text of one message.
fn chat_key(messages: &[Value]) -> String {
    let plain: Vec<Value> =
        messages.iter().map(|asked| plain_message(asked).unwrap_or_else(|_| asked.clone())).collect();
    if let [Value::Object(only)] = &plain[..]
        && let Some(text) = only.get("content").and_then(Value::as_str)
    {
        return text_key(text);
    }
    // Roles and texts alone: a file may say more of a message, as its weight.
    plain.iter().map(|message| json!([message["role"], message["content"]])).collect::<Value>().to_string()
}

#[cfg(test)]
mod tests {
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

    /// Users of each share.
    fn users(split: Split) -> impl Iterator<Item = u32> {
        let plan = Plan { format: Format::Prompt, split_by: SplitBy::User, dev: 0.1, test: 0.2 };
        (0..1000).filter(move |user| Split::of(user_hash(&user.to_string()), &plan) == split)
    }

    fn exported_for_training(replies: &[JudgedReply], format: Format) -> String {
        let plan = Plan { format, split_by: SplitBy::User, dev: 0.1, test: 0.2 };
        let lines = Pairs::new(replies, &plan).lines;
        let lines = [Split::Train, Split::Dev].into_iter().filter_map(|split| lines.get(&split)).flatten();
        lines.map(|line| serde_json::to_string(line).unwrap() + "\n").collect()
    }

    #[test]
    fn what_users_of_both_shares_asked_is_not_held_out_if_an_export_trains_on_it() {
        let message = |content: Value| json!({"role": "user", "content": content});
        let (text, chat) = (json!("sort xs"), json!([message(json!("sort xs"))]));
        let parts = json!([message(json!([{"type": "text", "text": "sort "}, {"type": "text", "text": "xs"}]))]);
        let developer =
            json!([{"role": "developer", "content": "Be brief."}, message(json!("sort xs")), message(json!("now"))]);
        let system =
            json!([{"role": "system", "content": "Be brief."}, message(json!("sort xs")), message(json!("now"))]);
        for learner in [Split::Train, Split::Dev] {
            let (learner, tester) = (users(learner).next().unwrap(), users(Split::Test).next().unwrap());
            for (of_learner, of_tester) in
                [(&text, &text), (&text, &chat), (&chat, &text), (&chat, &parts), (&system, &developer)]
            {
                let learned = reply(learner, VoteKind::Accepted, of_learner.clone());
                let tested = reply(tester, VoteKind::Edited, of_tester.clone());
                let own = reply(tester, VoteKind::Edited, json!("of the tester alone"));
                let replies = [learned, tested, own];
                for only_edited in [false, true] {
                    let pairs = held_out(&replies, &rule(only_edited));
                    let prompts: Vec<_> = pairs.iter().map(|pair| pair.prompt.clone()).collect();
                    assert_eq!(prompts, [Prompt::Text("of the tester alone".to_owned())], "{of_learner} {of_tester}");
                    for format in [Format::Prompt, Format::Messages] {
                        let file = exported_for_training(&replies, format);
                        assert_eq!(count_trained_on(&pairs, file.as_bytes()).unwrap(), 0, "{file}");
                    }
                }
            }
        }
    }

    #[test]
    fn what_an_export_leaves_to_the_test_is_held_out_whoever_asks_later() {
        let (learner, tester) = (users(Split::Train).next().unwrap(), users(Split::Test).next().unwrap());
        let replies = [
            reply(tester, VoteKind::Accepted, json!("sort xs")),
            reply(learner, VoteKind::Edited, json!("sort xs")),
            reply(tester, VoteKind::Edited, json!("sort xs")),
        ];
        assert_eq!(held_out(&replies, &rule(false)).len(), 2);
        assert_eq!(held_out(&replies, &rule(true)).len(), 1);
    }

    #[test]
    fn every_answer_that_a_chat_teaches_is_searched_for_and_no_other() {
        let chat = |content: Value| {
            let prompt = Prompt::Chat(vec![
                json!({"role": "developer", "content": "Be brief."}),
                json!({"role": "user", "content": content}),
            ]);
            HeldOut { prompt, completion: "b".to_owned() }
        };
        let pairs = [chat(json!("a")), chat(json!([{"type": "text", "text": "a"}]))];
        let line = |weight: Value| {
            json!({"messages": [
                {"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b", "weight": weight},
                {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"},
            ]})
            .to_string()
        };
        for (weight, expected) in [(json!(1), 2), (Value::Null, 2), (json!(0), 0)] {
            assert_eq!(count_trained_on(&pairs, line(weight.clone()).as_bytes()).unwrap(), expected, "{weight}");
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
