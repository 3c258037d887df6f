//! From requests and votes on a running server to files for training, with the command as it runs; and what of prompts is
//! kept until then.

mod adapter_server;
mod running;
mod tiny;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use reqwest::StatusCode;
use running::Running;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A server with an experiment `one` on the alias `coder`, and what it is configured with.
struct Lab {
    server: Running,
    dir: TempDir,
}

impl Lab {
    fn start(keep_prompts_mib: u32) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = format!(
            "[experiments]\npath = {:?}\n[[experiments.run]]\nname = 'one'\nalias = 'coder'\n
             keep_prompts_mib = {keep_prompts_mib}\narms = [{{name = 'base', model = 'tiny', weight = 1}}]",
            dir.path().join("experiments.db")
        );
        fs::write(dir.path().join("lorry.toml"), &config).unwrap();
        Self { server: Running::start(&config, &[]), dir }
    }

    /// The reply's id and text.
    async fn ask(&self, user: &str, prompt: &str, more: Value) -> (String, String) {
        let mut body = more;
        body["model"] = json!("coder");
        body["prompt"] = json!(prompt);
        if !user.is_empty() {
            body["user"] = json!(user);
        }
        let reply: Value = self.server.completion(body).send().await.unwrap().json().await.unwrap();
        let text = |value: &Value| value.as_str().unwrap_or_else(|| panic!("{reply}")).to_owned();
        (text(&reply["id"]), text(&reply["choices"][0]["text"]))
    }

    async fn vote(&self, vote: Value) {
        let request = self.server.client.post(format!("{}/v1/feedback", self.server.url)).bearer_auth("secret");
        let response = request.body(vote.to_string()).send().await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
    }

    async fn edit(&self, user: &str, prompt: &str, text: &str) {
        let (id, _) = self.ask(user, prompt, json!({})).await;
        self.vote(json!({"id": id, "kind": "edited", "text": text})).await;
    }

    fn feedback(&self, verb: &str, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lorry"));
        command.args(["feedback", verb]).args(args).arg("--config").arg(self.dir.path().join("lorry.toml"));
        command.env("LORRY_HOME", self.dir.path()).current_dir(self.dir.path()).output().unwrap()
    }

    /// The summary.
    fn export(&self, args: &[&str]) -> String {
        let output = self.feedback("export", &[&["one"], args].concat());
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Of the files that were written into `folder`, by name.
    fn lines(&self, folder: &str) -> BTreeMap<String, Vec<Value>> {
        let read = |file: PathBuf| {
            let lines = fs::read_to_string(&file).unwrap();
            let lines = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            (file.file_name().unwrap().to_string_lossy().into_owned(), lines)
        };
        fs::read_dir(self.dir.path().join(folder)).unwrap().map(|entry| read(entry.unwrap().path())).collect()
    }

    fn is_on_disk(&self, text: &str) -> bool {
        let files = fs::read_dir(self.dir.path()).unwrap().map(|entry| entry.unwrap().path());
        files.filter(|file| is_database(file)).any(|file| contains(&fs::read(file).unwrap(), text.as_bytes()))
    }
}

fn is_database(file: &Path) -> bool {
    file.file_name().unwrap().to_string_lossy().starts_with("experiments.db")
}

fn contains(bytes: &[u8], text: &[u8]) -> bool {
    bytes.windows(text.len()).any(|window| window == text)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_users_accepted_or_edited_to_becomes_files_for_training() {
    let lab = Lab::start(1);
    let (id, accepted_text) = lab.ask("ann", "the first prompt", json!({})).await;
    lab.vote(json!({"id": id, "kind": "accepted"})).await;
    for user in 0..40 {
        for prompt in ["sort", "reverse"] {
            lab.edit(&user.to_string(), &format!("{prompt} {user}"), &format!("xs.{prompt}() # {user}")).await;
        }
    }
    // What is not taken, or not as it was.
    let (id, _) = lab.ask("ann", "rejected", json!({})).await;
    lab.vote(json!({"id": id, "kind": "rejected"})).await;
    let (id, _) = lab.ask("ann", "two choices", json!({"n": 2})).await;
    lab.vote(json!({"id": id, "kind": "accepted"})).await;
    lab.ask("ann", "never judged", json!({})).await;
    lab.edit("ann", "the first prompt", "another completion").await;
    lab.edit("ann", "the first prompt", "another completion").await;
    lab.edit("ann", "connect", "connect(password='hunter2')").await;
    lab.edit("ann", "password = 'hunter2' is the database's", "connect()").await;

    let summary = lab.export(&[]);
    for part in [
        "87 judged replies",
        "83 taken: 1 accepted, 82 edited",
        "1 left out: rejected",
        "1 left out: without a prompt",
        "1 left out: with a secret",
        "1 left out: the same as one that is taken",
        "1 replaced in prompts: password",
    ] {
        assert!(summary.contains(part), "{part}: {summary}");
    }
    let files = lab.lines("feedback-one");
    assert_eq!(files.keys().collect::<Vec<_>>(), ["dev.jsonl", "test.jsonl", "train.jsonl"]);
    let all: Vec<&Value> = files.values().flatten().collect();
    assert_eq!(all.len(), 83);
    for pair in [
        json!({"prompt": "the first prompt", "completion": accepted_text}),
        json!({"prompt": "the first prompt", "completion": "another completion"}),
        json!({"prompt": "password = '<secret>' is the database's", "completion": "connect()"}),
        json!({"prompt": "sort 7", "completion": "xs.sort() # 7"}),
    ] {
        assert!(all.contains(&&pair), "{pair}: {all:?}");
    }
    let users_of = |file: &str| -> BTreeSet<String> {
        let users = files[file].iter().filter_map(|line| line["completion"].as_str()?.rsplit_once(" # "));
        users.map(|(_, user)| user.to_owned()).collect()
    };
    let [train, dev, test] = ["train.jsonl", "dev.jsonl", "test.jsonl"].map(users_of);
    assert_eq!(train.len() + dev.len() + test.len(), 40, "nobody is in two");
    assert!(!dev.is_empty() && !test.is_empty() && train.len() > dev.len() + test.len(), "{dev:?} {test:?}");

    // Again, and otherwise.
    assert_eq!((lab.export(&[]), lab.lines("feedback-one")), (summary, files));
    lab.export(&["--split-by", "prompt", "--dev", "0", "--test", "0.4", "--out", "other"]);
    let files = lab.lines("other");
    assert_eq!((files["dev.jsonl"].len(), files.values().map(Vec::len).sum::<usize>()), (0, 83));
    assert!(lab.export(&["--format", "messages"]).contains("85 left out: of a prompt that is no chat"));

    let refused = |verb: &str, args: &[&str]| {
        let output = lab.feedback(verb, args);
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(refused("export", &["two"]).contains(r#"has nothing of an experiment "two"; the experiments in it: one"#));
    assert!(refused("export", &["one", "--dev", "0.5"]).contains("less than 0.5"));

    assert!(lab.is_on_disk("reverse 7") && lab.is_on_disk("xs.reverse() # 7"));
    let output = lab.feedback("forget", &["one"]);
    assert!(String::from_utf8_lossy(&output.stdout).contains("88 requests of one are forgotten"), "{output:?}");
    assert!(!lab.is_on_disk("reverse 7") && !lab.is_on_disk("xs.reverse() # 7"));
    assert!(refused("forget", &["one"]).contains("has nothing of an experiment"));
    // The server goes on.
    lab.edit("ann", "the second prompt", "text").await;
    assert!(lab.export(&[]).contains("1 taken"));
}

#[tokio::test(flavor = "multi_thread")]
async fn prompts_are_not_kept_unless_the_experiment_says_so() {
    let lab = Lab::start(0);
    lab.edit("ann", "a prompt that nobody keeps", "an edit").await;
    assert!(lab.is_on_disk("an edit") && !lab.is_on_disk("a prompt that nobody keeps"));
    let summary = lab.export(&[]);
    assert!(summary.contains("0 taken") && summary.contains("1 left out: without a prompt"), "{summary}");
}

#[tokio::test(flavor = "multi_thread")]
async fn where_nothing_says_who_the_user_is_it_is_the_key() {
    let lab = Lab::start(1);
    for i in 0..20 {
        lab.edit("", &format!("prompt {i}"), &format!("text {i}")).await;
    }
    let summary = lab.export(&[]);
    let files = lab.lines("feedback-one");
    assert_eq!(files.values().filter(|lines| lines.len() == 20).count(), 1, "{summary}");
    assert!(
        summary.contains("20 in ") && summary.contains("of 1 users") && !summary.contains("not known"),
        "{summary}"
    );
}
