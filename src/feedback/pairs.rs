//! From judged replies to pairs for training: what is taken, what is left out and why, and who is trained on.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;

use clap::{Args, ValueEnum};
use serde::Serialize;
use serde_json::{Value, json};

use super::secrets::{Found, secret_in};
use crate::experiments::{JudgedReply, Outcome, VoteKind, prompt_hash};

/// How a pair is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// `{"prompt", "completion"}`: of completions, and of chats that are one message.
    Prompt,
    /// `{"messages"}`: of chats, whole.
    Messages,
    /// Each as it was asked; in no file.
    #[value(skip)]
    AsAsked,
}

/// What is never in two splits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SplitBy {
    User,
    /// For feedback that does not say whose it is, or comes from few.
    Prompt,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Split {
    Train,
    Dev,
    Test,
}

/// What becomes of judged replies.
#[derive(Debug, Clone, Copy, Args)]
pub struct Plan {
    /// Lines with `prompt` and `completion`, of completions and chats of one message, or with `messages`, of chats.
    #[arg(long, value_enum, default_value = "prompt")]
    pub format: Format,
    /// What is in one of the files only.
    #[arg(long, value_enum, default_value = "user")]
    pub split_by: SplitBy,
    /// Share of the users, or prompts, that decide when training ends.
    #[arg(long, value_name = "SHARE", default_value_t = 0.1, value_parser = share)]
    pub dev: f64,
    /// Share of the users, or prompts, that the adapter is measured on.
    #[arg(long, value_name = "SHARE", default_value_t = 0.1, value_parser = share)]
    pub test: f64,
}

/// Two of them leave something to train on.
fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share| (0.0..0.5).contains(share));
    share.ok_or_else(|| "must be at least 0 and less than 0.5".to_owned())
}

/// One line of a file for training.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Line {
    Prompt { prompt: String, completion: String },
    Messages { messages: Vec<Value> },
}

/// Why a judged reply is not trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum LeftOut {
    Rejected,
    NoPrompt,
    NoOutput,
    BrokenOff,
    Empty,
    Gap,
    Tokens,
    Chat,
    NoChat,
    Calls,
    Parts,
    Opening,
    Secret,
    Repeated,
    OtherSplit,
}

#[derive(Debug, Default)]
pub struct Pairs {
    pub lines: BTreeMap<Split, Vec<Line>>,
    /// Of each split.
    users: BTreeMap<Split, BTreeSet<i64>>,
    num_replies: usize,
    num_accepted: usize,
    num_edited: usize,
    num_of_nobody: usize,
    left_out: BTreeMap<LeftOut, usize>,
    /// Secrets in prompts, by rule.
    num_replaced: BTreeMap<&'static str, usize>,
}

impl Split {
    pub const ALL: [Self; 3] = [Self::Train, Self::Dev, Self::Test];

    pub fn file_name(self) -> &'static str {
        match self {
            Self::Train => "train.jsonl",
            Self::Dev => "dev.jsonl",
            Self::Test => "test.jsonl",
        }
    }

    /// By the hash of a user or prompt alone: the same in every export, of every experiment.
    pub(super) fn of(hash: i64, plan: &Plan) -> Self {
        let position = (hash.cast_unsigned() >> 11) as f64 / (1u64 << 53) as f64;
        match position {
            position if position < plan.test => Self::Test,
            position if position < plan.test + plan.dev => Self::Dev,
            _ => Self::Train,
        }
    }
}

impl Pairs {
    /// The same replies, in the same order, give the same pairs.
    pub fn new(replies: &[JudgedReply], plan: &Plan) -> Self {
        let mut pairs = Self { num_replies: replies.len(), ..Self::default() };
        let mut taken = Taken::default();
        for reply in replies {
            if let Err(cause) = pairs.take(reply, plan, &mut taken) {
                *pairs.left_out.entry(cause).or_default() += 1;
            }
        }
        pairs
    }

    fn take(&mut self, reply: &JudgedReply, plan: &Plan, taken: &mut Taken) -> Result<(), LeftOut> {
        let completion = completion(reply)?;
        let asked = Asked::parse(reply.prompt.as_deref().ok_or(LeftOut::NoPrompt)?)?;
        // Of this reply alone until it is taken.
        let mut found = Found::default();
        let asked = asked.in_format(plan.format)?.scrubbed(&mut found);
        if secret_in(completion).is_some() || found.is_repeated_in(completion) {
            return Err(LeftOut::Secret);
        }
        let prompt = asked.key();
        let split = match (plan.split_by, reply.user_hash) {
            (SplitBy::User, Some(user_hash)) => Split::of(user_hash, plan),
            // It may be anybody's.
            (SplitBy::User, None) => Split::Train,
            (SplitBy::Prompt, _) => Split::of(prompt_hash(&prompt), plan),
        };
        taken.take(split, prompt, completion.trim().to_owned())?;
        for (rule, count) in found.counts {
            *self.num_replaced.entry(rule).or_default() += count;
        }
        let num_taken = if reply.kind == VoteKind::Edited { &mut self.num_edited } else { &mut self.num_accepted };
        *num_taken += 1;
        if let Some(user_hash) = reply.user_hash {
            self.users.entry(split).or_default().insert(user_hash);
        } else {
            self.num_of_nobody += 1;
        }
        self.lines.entry(split).or_default().push(asked.into_line(completion.to_owned()));
        Ok(())
    }
}

/// What the user wanted the reply to be.
fn completion(reply: &JudgedReply) -> Result<&str, LeftOut> {
    let text = match reply.kind {
        VoteKind::Edited => reply.edited_to.as_deref(),
        VoteKind::Accepted if reply.outcome == Outcome::Completed => reply.output.as_deref(),
        VoteKind::Accepted => return Err(LeftOut::BrokenOff),
        VoteKind::Rejected | VoteKind::View | VoteKind::Winner => return Err(LeftOut::Rejected),
    };
    let text = text.ok_or(LeftOut::NoOutput)?;
    if text.trim().is_empty() { Err(LeftOut::Empty) } else { Ok(text) }
}

/// A prompt that there are pairs of.
enum Asked {
    Text(String),
    Chat(Vec<Value>),
}

impl Asked {
    /// Of the list, in JSON, that is kept: see [`crate::generation::Prompt`].
    fn parse(kept: &str) -> Result<Self, LeftOut> {
        let mut prompts: Vec<Value> = serde_json::from_str(kept).unwrap_or_default();
        match prompts.pop().ok_or(LeftOut::NoPrompt)? {
            Value::String(text) => Ok(Self::Text(text)),
            Value::Array(messages) if messages.iter().all(Value::is_object) => Ok(Self::Chat(messages)),
            Value::Array(_) => Err(LeftOut::Tokens),
            _ => Err(LeftOut::Gap),
        }
    }

    fn in_format(self, format: Format) -> Result<Self, LeftOut> {
        match (self, format) {
            (Self::Chat(messages), Format::Prompt) => match &messages[..] {
                [message] => text_of(message).map(Self::Text),
                _ => Err(LeftOut::Chat),
            },
            (Self::Chat(messages), Format::Messages) => plain(&messages).map(Self::Chat),
            (Self::Text(_), Format::Messages) => Err(LeftOut::NoChat),
            (asked, _) => Ok(asked),
        }
    }

    fn scrubbed(self, found: &mut Found) -> Self {
        match self {
            Self::Text(text) => Self::Text(found.scrub(&text)),
            Self::Chat(mut messages) => {
                messages.iter_mut().for_each(|message| scrub_strings(message, found));
                Self::Chat(messages)
            }
        }
    }

    /// The same for prompts that are.
    fn key(&self) -> String {
        match self {
            Self::Text(text) => text.trim().to_owned(),
            Self::Chat(messages) => Value::from(messages.clone()).to_string(),
        }
    }

    fn into_line(self, completion: String) -> Line {
        match self {
            Self::Text(prompt) => Line::Prompt { prompt, completion },
            Self::Chat(mut messages) => {
                messages.push(json!({"role": "assistant", "content": completion}));
                Line::Messages { messages }
            }
        }
    }
}

/// The messages as training takes them: of three roles, with a text, and with nothing learned of answers that nobody has
/// judged.
fn plain(messages: &[Value]) -> Result<Vec<Value>, LeftOut> {
    let plain: Vec<Value> = messages.iter().map(plain_message).collect::<Result<_, _>>()?;
    if plain.first().is_some_and(|message| message["role"] == "assistant") {
        return Err(LeftOut::Opening);
    }
    Ok(plain)
}

pub(super) fn plain_message(message: &Value) -> Result<Value, LeftOut> {
    let calls = [&message["tool_calls"], &message["function_call"]];
    let has_calls =
        calls.into_iter().any(|calls| !calls.is_null() && calls.as_array().is_none_or(|all| !all.is_empty()));
    match message["role"].as_str() {
        _ if has_calls => Err(LeftOut::Calls),
        Some("system" | "developer") => Ok(json!({"role": "system", "content": text_of(message)?})),
        Some("user") => Ok(json!({"role": "user", "content": text_of(message)?})),
        Some("assistant") => Ok(json!({"role": "assistant", "content": text_of(message)?, "weight": 0})),
        _ => Err(LeftOut::Calls),
    }
}

/// As the base's template sees it.
fn text_of(message: &Value) -> Result<String, LeftOut> {
    match &message["content"] {
        Value::Null => Ok(String::new()),
        Value::String(text) => Ok(text.clone()),
        Value::Array(parts) => {
            let text = |part: &Value| part["text"].as_str().filter(|_| part["type"] == "text").map(str::to_owned);
            parts.iter().map(text).collect::<Option<_>>().ok_or(LeftOut::Parts)
        }
        _ => Err(LeftOut::Parts),
    }
}

fn scrub_strings(value: &mut Value, found: &mut Found) {
    match value {
        Value::String(text) => *text = found.scrub(text),
        Value::Array(items) => items.iter_mut().for_each(|item| scrub_strings(item, found)),
        Value::Object(fields) => fields.values_mut().for_each(|field| scrub_strings(field, found)),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// The prompts that there are pairs of, each in one split, and with what completions.
#[derive(Default)]
struct Taken(HashMap<String, (Split, HashSet<String>)>);

impl Taken {
    fn take(&mut self, split: Split, prompt: String, completion: String) -> Result<(), LeftOut> {
        let (first_split, completions) = self.0.entry(prompt).or_insert_with(|| (split, HashSet::new()));
        if completions.contains(&completion) {
            return Err(LeftOut::Repeated);
        }
        if *first_split != split {
            return Err(LeftOut::OtherSplit);
        }
        completions.insert(completion);
        Ok(())
    }
}

impl LeftOut {
    fn reason(self) -> &'static str {
        match self {
            Self::Rejected => "rejected",
            Self::NoPrompt => {
                "without a prompt: from before keep_prompts_mib was set, gone for later ones, or of a request with tools, \
                 several prompts or several choices"
            }
            Self::NoOutput => "without an output: experiments.keep_text was off",
            Self::BrokenOff => "accepted before the reply had ended",
            Self::Empty => "nothing but blanks",
            Self::Gap => "of fill-in-the-middle, which such lines do not say",
            Self::Tokens => "of a prompt that was sent as tokens",
            Self::Chat => "of a conversation: --format messages takes it",
            Self::NoChat => "of a prompt that is no chat: --format prompt takes it",
            Self::Calls => "of a conversation with calls of tools, which such lines do not say",
            Self::Parts => "of a conversation with more than texts, which such lines do not say",
            Self::Opening => "of a conversation that begins with the assistant, whom nobody has asked",
            Self::Secret => "with a secret in what would be learned",
            Self::Repeated => "the same as one that is taken",
            Self::OtherSplit => "of a prompt that another split has",
        }
    }
}

/// A summary: how many there were, what was taken, and what was not.
impl fmt::Display for Pairs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:>7} judged replies", self.num_replies)?;
        writeln!(
            f,
            "{:>7} taken: {} accepted, {} edited",
            self.num_accepted + self.num_edited,
            self.num_accepted,
            self.num_edited
        )?;
        for (cause, count) in &self.left_out {
            writeln!(f, "{count:>7} left out: {}", cause.reason())?;
        }
        for split in Split::ALL {
            let num_lines = self.lines.get(&split).map_or(0, Vec::len);
            let num_users = self.users.get(&split).map_or(0, BTreeSet::len);
            writeln!(f, "{num_lines:>7} in {}, of {num_users} users", split.file_name())?;
        }
        if self.num_of_nobody > 0 {
            writeln!(f, "{:>7} of users who are not known", self.num_of_nobody)?;
        }
        for (rule, count) in &self.num_replaced {
            writeln!(f, "{count:>7} replaced in prompts: {rule}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experiments::user_hash;

    const PLAN: Plan = Plan { format: Format::Prompt, split_by: SplitBy::User, dev: 0.2, test: 0.2 };

    fn accepted(user: &str, prompt: impl Serialize, output: &str) -> JudgedReply {
        JudgedReply {
            kind: VoteKind::Accepted,
            outcome: Outcome::Completed,
            prompt: Some(json!([prompt]).to_string()),
            output: Some(output.to_owned()),
            edited_to: None,
            user_hash: Some(user).filter(|user| !user.is_empty()).map(user_hash),
        }
    }

    fn edited(user: &str, prompt: &str, text: &str) -> JudgedReply {
        let edited_to = Some(text.to_owned());
        JudgedReply { kind: VoteKind::Edited, edited_to, ..accepted(user, prompt, "what it was") }
    }

    fn lines(pairs: &Pairs) -> Vec<Value> {
        pairs.lines.values().flatten().map(|line| serde_json::to_value(line).unwrap()).collect()
    }

    #[test]
    fn what_was_accepted_or_edited_to_is_a_pair() {
        let replies = [accepted("ann", "sort xs", "xs.sort()"), edited("ann", "reverse xs", "xs.reverse()\n")];
        let pairs = Pairs::new(&replies, &PLAN);
        let expected = [
            json!({"prompt": "sort xs", "completion": "xs.sort()"}),
            json!({"prompt": "reverse xs", "completion": "xs.reverse()\n"}),
        ];
        assert_eq!(lines(&pairs), expected);
        assert!(pairs.to_string().contains("2 taken: 1 accepted, 1 edited"), "{pairs}");
        // In the order that people read.
        let line = serde_json::to_string(pairs.lines.values().flatten().next().unwrap()).unwrap();
        assert_eq!(line, r#"{"prompt":"sort xs","completion":"xs.sort()"}"#);
    }

    #[test]
    fn chats_are_lines_of_messages_or_of_their_one_message() {
        let one = json!([{"role": "user", "content": "sort xs"}]);
        let two = json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "sort xs"}]);
        let replies = [accepted("ann", one, "a"), accepted("ann", two, "b"), accepted("ann", "text", "c")];
        let pairs = Pairs::new(&replies, &PLAN);
        let expected = [json!({"prompt": "sort xs", "completion": "a"}), json!({"prompt": "text", "completion": "c"})];
        assert_eq!((lines(&pairs).as_slice(), pairs.left_out[&LeftOut::Chat]), (&expected[..], 1));
        let pairs = Pairs::new(&replies, &Plan { format: Format::Messages, ..PLAN });
        assert_eq!(lines(&pairs)[1]["messages"][2], json!({"role": "assistant", "content": "b"}));
        assert_eq!((lines(&pairs).len(), pairs.left_out[&LeftOut::NoChat]), (2, 1));
    }

    #[test]
    fn what_is_left_out_is_counted_by_its_cause() {
        let reply = accepted("ann", "sort xs", "xs.sort()");
        let gap = json!({"prefix": "a", "suffix": "b"});
        for (reply, cause) in [
            (JudgedReply { kind: VoteKind::Rejected, ..reply.clone() }, LeftOut::Rejected),
            (JudgedReply { prompt: None, ..reply.clone() }, LeftOut::NoPrompt),
            (JudgedReply { output: None, ..reply.clone() }, LeftOut::NoOutput),
            (JudgedReply { outcome: Outcome::Cancelled, ..reply.clone() }, LeftOut::BrokenOff),
            (accepted("ann", "sort xs", " \n"), LeftOut::Empty),
            (accepted("ann", gap, "x"), LeftOut::Gap),
            (accepted("ann", [1, 2, 3], "x"), LeftOut::Tokens),
            (accepted("ann", "connect", "connect(password='hunter2')"), LeftOut::Secret),
        ] {
            let pairs = Pairs::new(std::slice::from_ref(&reply), &PLAN);
            assert_eq!((pairs.left_out.get(&cause), lines(&pairs).len()), (Some(&1), 0), "{reply:?}");
            let summary = pairs.to_string();
            assert!(summary.contains(&format!("1 left out: {}", cause.reason())), "{summary}");
        }
        let broken_off = JudgedReply { outcome: Outcome::Cancelled, ..edited("ann", "sort xs", "sorted(xs)") };
        assert_eq!(lines(&Pairs::new(&[broken_off], &PLAN)).len(), 1, "the edit is whole");
    }

    #[test]
    fn secrets_in_prompts_are_replaced_and_not_learned_from_there_either() {
        let replies = [
            accepted("ann", "use password='hunter2' for db", "connect(db)"),
            accepted("ann", "log in with password='hunter2'", "login('hunter2')"),
        ];
        let pairs = Pairs::new(&replies, &PLAN);
        assert_eq!(lines(&pairs), [json!({"prompt": "use password='<secret>' for db", "completion": "connect(db)"})]);
        assert_eq!((pairs.left_out[&LeftOut::Secret], pairs.num_replaced["password"]), (1, 1));
        let chat = json!([{"role": "user", "content": [{"type": "text", "text": "password='hunter2'"}]}]);
        let pairs = Pairs::new(&[accepted("ann", chat, "ok")], &Plan { format: Format::Messages, ..PLAN });
        assert_eq!(lines(&pairs)[0]["messages"][0]["content"], "password='<secret>'");
    }

    /// `text` as a part of a message.
    fn parts(texts: &[&str]) -> Value {
        texts.iter().map(|text| json!({"type": "text", "text": text})).collect()
    }

    #[test]
    fn nothing_is_learned_of_answers_in_a_conversation_but_of_its_last() {
        let chat = json!([
            {"role": "user", "content": "log in"},
            {"role": "assistant", "content": "login('x')"},
            {"role": "user", "content": "no, with a key"},
            {"role": "assistant", "content": "login(key)", "weight": 1},
            {"role": "user", "content": "and out"},
        ]);
        let pairs = Pairs::new(&[accepted("ann", chat, "logout()")], &Plan { format: Format::Messages, ..PLAN });
        let messages = lines(&pairs)[0]["messages"].as_array().unwrap().clone();
        let weights: Vec<_> = messages.iter().map(|message| message["weight"].as_u64()).collect();
        assert_eq!(weights, [None, Some(0), None, Some(0), None, None]);
        assert_eq!(messages[5], json!({"role": "assistant", "content": "logout()"}));
    }

    #[test]
    fn what_is_exported_of_a_chat_is_what_fine_tuning_takes() {
        let chat = json!([
            {"role": "developer", "content": parts(&["Be", " brief."]), "name": "ops"},
            {"role": "user", "content": parts(&["sort ", "xs"]), "name": "ann"},
            {"role": "assistant", "content": null, "tool_calls": [], "function_call": null, "refusal": null},
            {"role": "assistant", "content": "xs.sort()", "tool_calls": null, "reasoning_content": "hm"},
            {"role": "user", "content": "and reverse"},
        ]);
        let pairs = Pairs::new(&[accepted("ann", chat, "xs[::-1]")], &Plan { format: Format::Messages, ..PLAN });
        let expected = json!({"messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "sort xs"},
            {"role": "assistant", "content": "", "weight": 0},
            {"role": "assistant", "content": "xs.sort()", "weight": 0},
            {"role": "user", "content": "and reverse"},
            {"role": "assistant", "content": "xs[::-1]"},
        ]});
        assert_eq!(lines(&pairs), std::slice::from_ref(&expected));
        let line = expected.to_string();
        assert_eq!(crate::fine_tuning::check_examples(line.as_bytes(), 1).unwrap().answers, 1);
        let one = json!([{"role": "user", "content": parts(&["sort ", "xs"])}]);
        let pairs = Pairs::new(&[accepted("ann", one, "xs.sort()")], &PLAN);
        assert_eq!(lines(&pairs), [json!({"prompt": "sort xs", "completion": "xs.sort()"})]);
    }

    #[test]
    fn what_training_cannot_be_told_of_a_chat_is_left_out_by_its_cause() {
        let user = json!({"role": "user", "content": "sort xs"});
        let image = json!([{"type": "text", "text": "this"}, {"type": "image_url", "image_url": {"url": "data:"}}]);
        let call = json!([{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]);
        for (chat, cause) in [
            (json!([user, {"role": "assistant", "content": null, "tool_calls": call}]), LeftOut::Calls),
            (json!([user, {"role": "assistant", "content": "", "function_call": {"name": "f"}}]), LeftOut::Calls),
            (json!([user, {"role": "tool", "content": "1", "tool_call_id": "1"}]), LeftOut::Calls),
            (json!([{"role": "user", "content": image}]), LeftOut::Parts),
            (json!([{"role": "assistant", "content": "Hello!"}, user]), LeftOut::Opening),
        ] {
            let replies = [accepted("ann", &chat, "xs.sort()")];
            let pairs = Pairs::new(&replies, &Plan { format: Format::Messages, ..PLAN });
            assert_eq!((pairs.left_out.get(&cause), lines(&pairs).len()), (Some(&1), 0), "{chat}");
            assert!(pairs.to_string().contains(cause.reason()), "{pairs}");
        }
    }

    #[test]
    fn the_same_pair_is_taken_once_and_another_completion_of_its_prompt_too() {
        let replies = [
            accepted("ann", "sort xs", "xs.sort()"),
            accepted("ann", " sort xs\n", "xs.sort()\n"),
            edited("ann", "sort xs", "sorted(xs)"),
            edited("ann", "sort xs", "xs.sort()"),
        ];
        let pairs = Pairs::new(&replies, &PLAN);
        assert_eq!((lines(&pairs).len(), pairs.left_out[&LeftOut::Repeated]), (2, 2));
    }

    #[test]
    fn no_user_and_no_prompt_is_in_two_splits() {
        let replies: Vec<JudgedReply> = (0..2000)
            .map(|i| accepted(&format!("user {}", i % 300), format!("prompt {}", i % 1700), &format!("output {i}")))
            .collect();
        for split_by in [SplitBy::User, SplitBy::Prompt] {
            let pairs = Pairs::new(&replies, &Plan { split_by, ..PLAN });
            let mut split_of = HashMap::new();
            for (split, line) in
                pairs.lines.iter().flat_map(|(split, lines)| lines.iter().map(move |line| (split, line)))
            {
                let Line::Prompt { prompt, completion } = line else { panic!("{line:?}") };
                assert_eq!(split_of.entry(prompt.clone()).or_insert(split), &split, "{prompt}");
                let number: usize = completion.strip_prefix("output ").unwrap().parse().unwrap();
                if split_by == SplitBy::User {
                    assert_eq!(
                        split_of.entry(format!("user {}", number % 300)).or_insert(split),
                        &split,
                        "{completion}"
                    );
                }
            }
            for (split, share) in [(Split::Train, 0.6), (Split::Dev, 0.2), (Split::Test, 0.2)] {
                let got = pairs.lines[&split].len() as f64 / lines(&pairs).len() as f64;
                assert!((got - share).abs() < 0.08, "{split:?} has {got}");
            }
        }
    }

    #[test]
    fn a_user_is_in_the_same_split_in_every_version() {
        // Computed apart, from the same formula in Python.
        let splits = ["ann", "bob", "eve", "dan", "joe", "kim"].map(|user| Split::of(user_hash(user), &PLAN));
        assert_eq!(splits, [Split::Dev, Split::Train, Split::Train, Split::Train, Split::Train, Split::Test]);
        // More to test on takes nobody from there.
        let more = Plan { test: 0.4, ..PLAN };
        for hash in (0..1000).map(|user| user_hash(&user.to_string())) {
            assert!(Split::of(hash, &PLAN) != Split::Test || Split::of(hash, &more) == Split::Test);
        }
    }

    #[test]
    fn who_is_not_known_is_trained_on_and_counted() {
        let replies: Vec<JudgedReply> =
            (0..50).map(|i| accepted("", format!("prompt {i}"), &format!("output {i}"))).collect();
        let pairs = Pairs::new(&replies, &PLAN);
        assert_eq!((pairs.lines[&Split::Train].len(), pairs.num_of_nobody), (50, 50));
        assert!(pairs.to_string().contains("50 of users who are not known"), "{pairs}");
        let by_prompt = Pairs::new(&replies, &Plan { split_by: SplitBy::Prompt, ..PLAN });
        assert!(by_prompt.lines.len() == 3, "{by_prompt}");
    }
}
