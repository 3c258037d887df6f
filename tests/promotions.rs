//! Promotions of the command as it runs: from feedback that is held out to all of an alias's traffic, or back.

#![cfg(target_os = "linux")]

mod adapter_server;
mod running;
mod tiny;

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use lorry::experiments::user_hash;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;

use adapter_server::write_adapter;
use running::{ADMIN, Running, sent};

const NUM_USERS: usize = 40;
const HELD_OUT: f64 = 0.4;
/// Leaves a copy of `made`, with the job's folder in its description: no two jobs leave the same.
const TRAINER: &str = r#"
echo '{"type": "begin", "step": 0, "steps": 1, "examples": 9, "validation_examples": 1, "left_out": 0}'
echo '{"type": "step", "step": 1, "loss": 2.5, "tokens": 40}'
echo '{"type": "validation", "step": 1, "loss": 1.5}'
cp -r "$(dirname "$0")/made" "$3"
echo "description = '$(dirname "$1")'" > "$3/adapter.toml"
"#;

/// A server with an experiment `one` that promotes in the arm of the adapter `tuned`, which is not there yet, and the
/// candidate `b`; and with an experiment `two` that does not.
struct Lab {
    running: Running,
}

/// What the user of this number asks.
fn prompt(user: usize) -> String {
    format!("prompt {user}\n")
}

/// What users may want: each letter, some times.
fn wanted() -> Vec<String> {
    ('a'..='z').map(|letter| letter.to_string().repeat(6)).collect()
}

/// As `lorry feedback export` splits.
fn is_held_out(user: usize) -> bool {
    let hash = user_hash(&user.to_string()).cast_unsigned();
    ((hash >> 11) as f64) < HELD_OUT * (1u64 << 53) as f64
}

impl Lab {
    fn start(dir: &TempDir) -> Self {
        let dir = dir.path().to_owned();
        let script = dir.join("trainer.sh");
        fs::write(&script, TRAINER).unwrap();
        for (adapter, seed) in [("adapters/b", 2), ("adapters/broken", 3), ("made", 7)] {
            write_adapter(&dir.join(adapter), seed);
        }
        fs::write(dir.join("adapters/broken/adapter.toml"), "promt = 'x'").unwrap();
        let arms = |weight: f64| {
            format!(
                "arms = [{{name = 'base', model = 'tiny', weight = 1}},
                 {{name = 'tuned', model = 'tuned', weight = {weight}, canary = true}}]
                 bounds = {{max_error_rate = 0.5, min_samples = 3}}\nkeep_prompts_mib = 1\n"
            )
        };
        let config = format!(
            "[fine_tuning]\nenabled = true\ncommand = ['/bin/sh', {script:?}]
             [[experiments.run]]\nname = 'one'\nalias = 'coder'\n{}
             promotion = {{min_pairs = 6, min_shown = 6, test = {HELD_OUT}}}
             [[experiments.run]]\nname = 'two'\nalias = 'other'\n{}",
            arms(1.0),
            arms(2.0)
        );
        let running = Running::start_in(&dir, &config, &[ADMIN]);
        Self { running }
    }

    async fn post(&self, path: &str, body: Value) -> (StatusCode, Value) {
        sent(self.running.admin(Method::POST, path).body(body.to_string())).await
    }

    /// Id of the reply, and the model that gave it.
    async fn ask(&self, user: usize) -> (String, String) {
        let body = json!({"model": "coder", "prompt": prompt(user), "user": user.to_string()});
        let (status, reply) = sent(self.running.completion(body)).await;
        assert_eq!(status, StatusCode::OK, "{reply}");
        (reply["id"].as_str().unwrap().to_owned(), reply["model"].as_str().unwrap().to_owned())
    }

    /// Who answers the users.
    async fn models(&self) -> BTreeSet<String> {
        let mut models = BTreeSet::new();
        for user in 0..NUM_USERS {
            models.insert(self.ask(user).await.1);
        }
        models
    }

    async fn vote(&self, vote: Value) {
        let (status, reply) = self.post("/feedback", vote).await;
        assert_eq!(status, StatusCode::OK, "{reply}");
    }

    /// Mean log-probability of a token of each of [`wanted`] behind the prompt.
    async fn logprobs(&self, model: &str, user: usize) -> Vec<f64> {
        let prompts: Vec<_> = wanted().iter().map(|wanted| prompt(user) + wanted).collect();
        let body = json!({"model": model, "prompt": prompts, "echo": true, "logprobs": 1, "max_tokens": 0});
        let (status, reply) = sent(self.running.completion(body)).await;
        assert_eq!(status, StatusCode::OK, "{reply}");
        let mean = |(choice, wanted): (&Value, String)| {
            let logprobs = choice["logprobs"]["token_logprobs"].as_array().unwrap();
            let last = &logprobs[logprobs.len() - wanted.len()..];
            last.iter().map(|logprob| logprob.as_f64().unwrap()).sum::<f64>() / last.len() as f64
        };
        reply["choices"].as_array().unwrap().iter().zip(wanted()).map(mean).collect()
    }

    /// Has every user edit a reply to what is likeliest to `b` against the base, or the other way round. Result: the
    /// log-probabilities of what is held out, to `b` and to the base.
    async fn teach(&self, likelier: bool) -> Vec<(f64, f64)> {
        let mut held_out = Vec::new();
        for user in 0..NUM_USERS {
            let (of_candidate, of_base) = (self.logprobs("b", user).await, self.logprobs("tiny", user).await);
            let sign = if likelier { 1.0 } else { -1.0 };
            let gain = |index: &usize| sign * (of_candidate[*index] - of_base[*index]);
            let best = (0..of_base.len()).max_by(|a, b| gain(a).total_cmp(&gain(b))).unwrap();
            assert!(gain(&best) > 0.0, "the adapter changes something");
            let (id, model) = self.ask(user).await;
            assert_eq!(model, "tiny", "the candidate has no traffic yet");
            let user_name = user.to_string();
            self.vote(json!({"id": id, "kind": "edited", "text": wanted()[best], "user": user_name})).await;
            if is_held_out(user) {
                held_out.push((of_candidate[best], of_base[best]));
            }
        }
        assert!(held_out.len() >= 6);
        held_out
    }

    /// Installs a copy of the adapter `from`, a model or the name of an adapter, as `name`.
    async fn put(&self, name: &str, from: &str) {
        let path = json!({"path": from.strip_prefix("tiny-").unwrap_or(from)});
        let put = self.running.admin(Method::PUT, &format!("/adapters/{name}")).body(path.to_string());
        let (status, reply) = sent(put).await;
        assert!(status.is_success(), "{reply}");
    }

    async fn promote(&self, body: Value) -> (StatusCode, Value) {
        self.post("/experiments/one/promotions", body).await
    }

    /// The promotion, when it has come to this.
    async fn until(&self, stage: &str) -> Value {
        let polled = async {
            loop {
                let promotion = self.running.admin_get("/experiments/one").await["promotion"].clone();
                if promotion["stage"] == stage {
                    return promotion;
                }
                assert_eq!(promotion["stage"], "checking", "{promotion}");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), polled).await.expect("it comes to this")
    }

    /// Users ask and judge until the canary is decided; what the candidate wrote is accepted or not.
    async fn judge(&self, accepts: bool) -> Value {
        for user in 0..10 * NUM_USERS {
            let (id, model) = self.ask(user).await;
            let kind = if accepts || model == "tiny" { "accepted" } else { "rejected" };
            self.vote(json!({"id": id, "kind": kind, "user": user.to_string()})).await;
            let promotion = self.running.admin_get("/experiments/one").await["promotion"].clone();
            if promotion["stage"] != "canary" {
                return promotion;
            }
        }
        panic!("the canary is never decided: {}", self.running.admin_get("/experiments/one").await);
    }

    /// The name of the adapter that was trained on `file`, and its job.
    async fn trained_on(&self, file: &str) -> (String, Value) {
        let (status, file) = sent(self.running.upload(file, "fine-tune", &[])).await;
        assert_eq!(status, StatusCode::OK, "{file}");
        let asked = json!({"model": "tiny", "training_file": file["id"]});
        let (status, job) = self.post("/fine_tuning/jobs", asked).await;
        assert_eq!(status, StatusCode::OK, "{job}");
        let path = format!("/fine_tuning/jobs/{}", job["id"].as_str().unwrap());
        loop {
            let job = self.running.admin_get(&path).await;
            if let Some(model) = job["fine_tuned_model"].as_str() {
                return (model.to_owned(), job);
            }
            assert!(job["finished_at"].is_null(), "{job}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

fn stages(promotion: &Value) -> Vec<&str> {
    promotion["steps"].as_array().unwrap().iter().map(|step| step["stage"].as_str().unwrap()).collect()
}

fn models(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// Prompts and completions of users with these numbers, a line each.
fn lines(users: impl Iterator<Item = usize>) -> String {
    users.map(|user| json!({"prompt": prompt(user), "completion": "x"}).to_string() + "\n").collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_candidate_is_checked_on_what_is_held_out_and_gets_its_arm_and_then_the_whole() {
    let dir = tempfile::tempdir().unwrap();
    let lab = Lab::start(&dir);
    let held_out = lab.teach(true).await;
    let (status, promotion) = lab.promote(json!({"adapter": "b"})).await;
    assert_eq!(status, StatusCode::OK, "{promotion}");
    let begun = (&promotion["stage"], &promotion["adapter"], &promotion["arm"], &promotion["incumbent"]);
    assert_eq!(begun, (&json!("checking"), &json!("b"), &json!("tuned"), &json!("base")));

    let promotion = lab.until("canary").await;
    let check = &promotion["check"];
    let counts = (&check["pairs"], &check["wins"], &check["losses"], &check["left_out"]);
    assert_eq!(counts, (&json!(held_out.len()), &json!(held_out.len()), &json!(0), &json!(0)));
    let mean = |of: fn(&(f64, f64)) -> f64| held_out.iter().map(of).sum::<f64>() / held_out.len() as f64;
    for (name, expected) in [("candidate_logprob", mean(|pair| pair.0)), ("incumbent_logprob", mean(|pair| pair.1))] {
        let found = check[name].as_f64().unwrap();
        assert!((found - expected).abs() < 1e-5, "{name}: {found}, and the server says {expected} itself");
    }
    let (candidate, tuned) =
        (lab.running.admin_get("/adapters/b").await, lab.running.admin_get("/adapters/tuned").await);
    assert_eq!((&candidate["generation"], &tuned["generation"]), (&promotion["generation"], &promotion["generation"]));
    assert_eq!(lab.models().await, models(&["tiny", "tiny-tuned"]));
    let (status, error) = lab.promote(json!({"adapter": "a"})).await;
    assert_eq!((status, &error["error"]["code"]), (StatusCode::CONFLICT, &json!("promotion_under_way")), "{error}");

    let whole = lab.judge(true).await;
    assert_eq!(stages(&whole), ["checking", "canary", "whole"], "{whole}");
    assert_eq!(lab.models().await, models(&["tiny-tuned"]));
    // As by `kill -9`.
    drop(lab);

    let lab = Lab::start(&dir);
    assert_eq!(lab.models().await, models(&["tiny-tuned"]));
    let (status, report) = lab.post("/experiments/one/reset", json!({})).await;
    assert_eq!((status, &report["promotion"]["stage"]), (StatusCode::OK, &json!("withdrawn")));
    assert_eq!(lab.models().await, models(&["tiny"]));
    let list = lab.running.admin_get("/experiments/one/promotions").await;
    assert_eq!(list["data"], json!([report["promotion"]]));
    assert_eq!(stages(&list["data"][0]), ["checking", "canary", "whole", "withdrawn"]);
    assert!(list["data"][0]["steps"].as_array().unwrap().iter().all(|step| step["at"].as_i64() > Some(1_700_000_000)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_candidate_that_does_worse_gets_no_traffic() {
    let dir = tempfile::tempdir().unwrap();
    let lab = Lab::start(&dir);
    let held_out = lab.teach(false).await;
    lab.promote(json!({"adapter": "b"})).await;
    let refused = lab.until("refused").await;
    assert_eq!(refused["check"]["losses"], held_out.len());
    assert!(refused["steps"][1]["cause"].as_str().unwrap().starts_with("0 of "), "{refused}");
    assert_eq!(lab.models().await, models(&["tiny"]));
    assert_eq!(sent(lab.running.admin(Method::GET, "/adapters/tuned")).await.0, StatusCode::NOT_FOUND);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_candidate_that_users_do_not_like_goes_back() {
    let dir = tempfile::tempdir().unwrap();
    let lab = Lab::start(&dir);
    lab.teach(true).await;
    lab.promote(json!({"adapter": "b"})).await;
    lab.until("canary").await;
    let back = lab.judge(false).await;
    assert_eq!(stages(&back), ["checking", "canary", "back"], "{back}");
    assert!(back["steps"][2]["cause"].as_str().unwrap().contains("0 of 6 were accepted"), "{back}");
    assert_eq!(lab.models().await, models(&["tiny"]));
    // Nothing keeps it from another try.
    let (status, promotion) = lab.promote(json!({"adapter": "b"})).await;
    assert_eq!((status, &promotion["stage"]), (StatusCode::OK, &json!("checking")), "{promotion}");
    assert_eq!(lab.running.admin_get("/experiments/one/promotions").await["data"].as_array().unwrap().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_trained_on_what_is_held_out_is_refused_and_a_record_says_what_others_were() {
    let dir = tempfile::tempdir().unwrap();
    let lab = Lab::start(&dir);
    lab.teach(true).await;
    let (leaked, job) = lab.trained_on(&lines(0..NUM_USERS)).await;
    let (status, error) = lab.promote(json!({"adapter": leaked})).await;
    let message = error["error"]["message"].as_str().unwrap();
    assert_eq!((status, &error["error"]["param"]), (StatusCode::BAD_REQUEST, &json!("adapter")), "{error}");
    assert!(message.contains(job["training_file"].as_str().unwrap()) && message.contains("--test"), "{message}");

    let (clean, job) = lab.trained_on(&lines((0..NUM_USERS).filter(|user| !is_held_out(*user)))).await;
    let (status, promotion) = lab.promote(json!({"adapter": clean})).await;
    let trained = json!({"job": job["id"], "training_file": job["training_file"], "validation_file": null,
        "valid_loss": 1.5, "is_verified": true});
    assert_eq!((status, &promotion["trained"]), (StatusCode::OK, &trained), "{promotion}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_known_by_what_it_made_and_not_by_its_adapters_name() {
    let dir = tempfile::tempdir().unwrap();
    let lab = Lab::start(&dir);
    lab.teach(true).await;
    let (leaked, leaked_job) = lab.trained_on(&lines(0..NUM_USERS)).await;
    let of_others = || lines((0..NUM_USERS).filter(|user| !is_held_out(*user)));
    let ((first, first_job), (second, second_job)) =
        (lab.trained_on(&of_others()).await, lab.trained_on(&of_others()).await);
    // Under a name that no job gave, and under that of a job which made something else.
    let first = first.strip_prefix("tiny-").unwrap();
    for name in ["copied", first] {
        lab.put(name, &leaked).await;
        let (status, error) = lab.promote(json!({"adapter": name})).await;
        assert_eq!((status, &error["error"]["param"]), (StatusCode::BAD_REQUEST, &json!("adapter")), "{error}");
        let message = error["error"]["message"].as_str().unwrap();
        assert!(message.contains(leaked_job["training_file"].as_str().unwrap()), "{message}");
    }
    let promoted = async |name: &str| {
        let (status, promotion) = lab.promote(json!({"adapter": name})).await;
        assert_eq!(status, StatusCode::OK, "{promotion}");
        assert_eq!(lab.post("/experiments/one/reset", json!({})).await.0, StatusCode::OK);
        promotion["trained"].clone()
    };
    // What nobody trained here, under the name of a job.
    lab.put(first, "b").await;
    assert_eq!(promoted(first).await, Value::Null);
    let second = second.strip_prefix("tiny-").unwrap();
    for name in [first, "copied", second] {
        lab.put(name, second).await;
        assert_eq!(promoted(name).await["job"], second_job["id"]);
    }

    // A record of before the content was kept.
    drop(lab);
    let record = dir.path().join("state/fine_tuning/jobs").join(first_job["id"].as_str().unwrap()).join("job.json");
    let mut old: Value = serde_json::from_slice(&fs::read(&record).unwrap()).unwrap();
    old.as_object_mut().unwrap().remove("generation").unwrap();
    fs::write(&record, old.to_string()).unwrap();
    let lab = Lab::start(&dir);
    for (content, job, is_verified) in [(second, &second_job, true), ("b", &first_job, false)] {
        lab.put(first, content).await;
        let (status, promotion) = lab.promote(json!({"adapter": first})).await;
        assert_eq!(status, StatusCode::OK, "{promotion}");
        let trained = &promotion["trained"];
        assert_eq!((&trained["job"], &trained["is_verified"]), (&job["id"], &json!(is_verified)), "{promotion}");
        assert_eq!(lab.post("/experiments/one/reset", json!({})).await.0, StatusCode::OK);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_promoted_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let lab = Lab::start(&dir);
    let (status, error) = lab.promote(json!({"adapter": "b"})).await;
    assert_eq!((status, &error["error"]["param"]), (StatusCode::BAD_REQUEST, &json!("name")), "{error}");
    assert!(error["error"]["message"].as_str().unwrap().contains("has 0 held-out pairs"), "{error}");

    for (path, adapter, status, param, word) in [
        ("/experiments/none/promotions", json!("b"), StatusCode::NOT_FOUND, Value::Null, "no experiment \"none\""),
        ("/experiments/two/promotions", json!("b"), StatusCode::BAD_REQUEST, json!("name"), "promotes nothing"),
        ("/experiments/one/promotions", json!("c"), StatusCode::NOT_FOUND, json!("adapter"), "c"),
        ("/experiments/one/promotions", json!("broken"), StatusCode::NOT_FOUND, json!("adapter"), "promt"),
        ("/experiments/one/promotions", Value::Null, StatusCode::NOT_FOUND, json!("adapter"), "tuned"),
        ("/experiments/one/promotions", json!("tiny"), StatusCode::BAD_REQUEST, json!("adapter"), "is the base"),
        ("/experiments/one/promotions", json!(1), StatusCode::BAD_REQUEST, json!("adapter"), "a string"),
    ] {
        let (got, error) = lab.post(path, json!({"adapter": adapter})).await;
        assert_eq!((got, &error["error"]["param"]), (status, &param), "{path} {adapter}: {error}");
        assert!(error["error"]["message"].as_str().unwrap().contains(word), "{path} {adapter}: {error}");
    }
    let of_team = lab.running.client.post(format!("{}/v1/experiments/one/promotions", lab.running.url));
    let (status, error) = sent(of_team.bearer_auth("secret").body("{}")).await;
    assert_eq!((status, &error["error"]["code"]), (StatusCode::FORBIDDEN, &json!("admin_key_required")));
    assert_eq!(lab.running.admin_get("/experiments/one/promotions").await["data"], json!([]));
    assert_eq!(lab.running.admin_get("/experiments/one").await["promotion"], Value::Null);
}
