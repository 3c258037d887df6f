//! Fine-tuning jobs of the command as it runs, with a shell script for a trainer.

#![cfg(target_os = "linux")]

mod adapter_server;
mod running;
mod tiny;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;

use adapter_server::write_adapter;
use running::{ADMIN, Running, sent};

/// Waits while there is a file `hold`, fails where there is `fail`, and else leaves a copy of `made`.
const TRAINER: &str = r#"
here=$(dirname "$0")
echo $$ >> "$here/pids"
env > "$here/environment"
cp "$1" "$here/recipe.toml"
echo 'for people'
echo '{"type": "begin", "step": 0, "steps": 2, "examples": 9, "validation_examples": 1, "left_out": 0}'
echo '{"type": "validation", "step": 0, "loss": 3.0}'
echo '{"type": "step", "step": 1, "loss": 2.5, "tokens": 40}'
while [ -e "$here/hold" ]; do sleep 0.02; done
if [ -e "$here/fail" ]; then printf '10%%\rerror: no memory\n' >&2; exit 3; fi
echo '{"type": "step", "step": 2, "loss": 2.0, "tokens": 80}'
echo '{"type": "validation", "step": 2, "loss": 1.5}'
cp -r "$here/made" "$3"
"#;

struct Server {
    running: Running,
    dir: PathBuf,
}

impl Server {
    fn start(dir: &TempDir) -> Self {
        let dir = dir.path().to_owned();
        let script = dir.join("trainer.sh");
        fs::write(&script, TRAINER).unwrap();
        write_adapter(&dir.join("made"), 7);
        let config = format!("[fine_tuning]\nenabled = true\nmax_file_mib = 1\ncommand = ['/bin/sh', {script:?}]");
        let running = Running::start_in(&dir, &config, &[ADMIN]);
        Self { running, dir }
    }

    fn hold(&self) {
        fs::write(self.dir.join("hold"), "").unwrap();
    }

    fn let_go(&self) {
        fs::remove_file(self.dir.join("hold")).unwrap();
    }

    fn upload(&self, text: &str, purpose: &str) -> RequestBuilder {
        self.running.upload(text, purpose, &[])
    }

    /// The id of a file with so many examples.
    async fn file(&self, num_examples: usize) -> String {
        let (status, file) = sent(self.upload(&examples(num_examples), "fine-tune")).await;
        assert_eq!(status, StatusCode::OK, "{file}");
        file["id"].as_str().unwrap().to_owned()
    }

    async fn create(&self, mut body: Value) -> (StatusCode, Value) {
        body["model"] = json!("tiny");
        sent(self.running.admin(Method::POST, "/fine_tuning/jobs").body(body.to_string())).await
    }

    /// The id of a job.
    async fn job(&self) -> String {
        let (status, job) = self.create(json!({"training_file": self.file(10).await})).await;
        assert_eq!((status, &job["status"]), (StatusCode::OK, &json!("queued")), "{job}");
        job["id"].as_str().unwrap().to_owned()
    }

    async fn cancel(&self, id: &str) -> (StatusCode, Value) {
        sent(self.running.admin(Method::POST, &format!("/fine_tuning/jobs/{id}/cancel"))).await
    }

    /// The job, when it has this status.
    async fn until(&self, id: &str, status: &str) -> Value {
        let path = format!("/fine_tuning/jobs/{id}");
        let mut job = Value::Null;
        until(async || {
            job = self.running.admin_get(&path).await;
            assert!(job["status"] == status || job["finished_at"].is_null(), "{job}");
            job["status"] == status
        })
        .await;
        job
    }

    /// Messages, the first first.
    async fn messages(&self, id: &str) -> Vec<String> {
        let events = self.running.admin_get(&format!("/fine_tuning/jobs/{id}/events?limit=100")).await;
        let events = events["data"].as_array().unwrap().iter().rev();
        events.map(|event| event["message"].as_str().unwrap().to_owned()).collect()
    }

    fn folder(&self, job: &str) -> PathBuf {
        self.dir.join("state/fine_tuning/jobs").join(job)
    }

    /// Of every trainer so far.
    fn pids(&self) -> Vec<String> {
        let pids = fs::read_to_string(self.dir.join("pids")).unwrap_or_default();
        pids.lines().map(str::to_owned).collect()
    }

    /// Of the trainer that waits, when it does.
    async fn trainer(&self, number: usize) -> String {
        until(async || self.pids().len() == number).await;
        self.pids().pop().unwrap()
    }
}

fn examples(count: usize) -> String {
    r#"{"prompt": "a", "completion": "b"}"#.repeat(count).replace("}{", "}\n{")
}

async fn until(mut condition: impl AsyncFnMut() -> bool) {
    let polled = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), polled).await.expect("the condition comes true");
}

/// Whether a process runs; one that nobody has waited for does not.
fn runs(pid: &str) -> bool {
    let stat = fs::read_to_string(Path::new("/proc").join(pid).join("stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, state)| !state.starts_with('Z'))
}

fn named<'a>(error: &'a Value, param: &str) -> &'a str {
    assert_eq!(error["error"]["param"], param, "{error}");
    error["error"]["message"].as_str().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_becomes_an_adapter_that_is_served_without_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&dir);
    let (training, validation) = (server.file(10).await, server.file(1).await);
    let method = json!({"type": "lora", "lora": {"rank": 4, "hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}});
    let asked = json!({"training_file": training, "validation_file": validation, "suffix": "mine", "seed": 3,
        "method": method, "metadata": {"for": "a test"}});
    let (status, job) = server.create(asked).await;
    assert_eq!(status, StatusCode::OK, "{job}");
    assert_eq!((&job["object"], &job["fine_tuned_model"]), (&json!("fine_tuning.job"), &Value::Null));
    let id = job["id"].as_str().unwrap();
    let job = server.until(id, "succeeded").await;
    let model = job["fine_tuned_model"].as_str().unwrap();
    assert!(model.starts_with("tiny-ft-mine-"), "{model}");
    let hyperparameters = json!({"n_epochs": 2, "batch_size": 8, "learning_rate_multiplier": 1.0});
    assert_eq!(job["hyperparameters"], hyperparameters);
    assert_eq!(job["method"], json!({"type": "lora", "lora": {"rank": 4, "hyperparameters": hyperparameters}}));
    assert_eq!((&job["trained_tokens"], &job["metadata"]["for"]), (&json!(80), &json!("a test")));

    let completion = server.running.completion(json!({"model": model})).send().await.unwrap();
    assert_eq!(completion.status(), StatusCode::OK);
    let reply: Value = completion.json().await.unwrap();
    assert_eq!(reply["model"], model);

    let recipe: toml::Table = fs::read_to_string(server.dir.join("recipe.toml")).unwrap().parse().unwrap();
    assert_eq!(recipe["validation"].as_str(), Some("validation.jsonl"));
    assert_eq!(recipe["training"]["validation_examples"].as_integer(), Some(1));
    assert_eq!((recipe["peft"]["r"].as_integer(), recipe["training"]["seed"].as_integer()), (Some(4), Some(3)));
    let environment = fs::read_to_string(server.dir.join("environment")).unwrap();
    assert!(!environment.contains("ADMIN_KEY"), "{environment}");

    let events = server.running.admin_get(&format!("/fine_tuning/jobs/{id}/events?limit=2")).await;
    assert_eq!((events["data"].as_array().unwrap().len(), &events["has_more"]), (2, &json!(true)));
    assert_eq!(events["data"][0]["message"], "The job has succeeded");
    let after = events["last_id"].as_str().unwrap();
    let older = server.running.admin_get(&format!("/fine_tuning/jobs/{id}/events?after={after}")).await;
    assert_eq!(older["data"][0]["data"], json!({"step": 2, "total_steps": 2, "valid_loss": 1.5}));
    assert_eq!(older["data"][1]["data"], json!({"step": 2, "total_steps": 2, "train_loss": 2.0}));
    let checkpoints = server.running.admin_get(&format!("/fine_tuning/jobs/{id}/checkpoints")).await;
    let [checkpoint] = checkpoints["data"].as_array().unwrap().as_slice() else { panic!("{checkpoints}") };
    assert_eq!((&checkpoint["step_number"], &checkpoint["metrics"]["valid_loss"]), (&json!(2), &json!(1.5)));
    assert_eq!(checkpoint["fine_tuned_model_checkpoint"], model);

    let jobs = server.running.admin_get("/fine_tuning/jobs?limit=1").await;
    assert_eq!((&jobs["data"][0]["id"], &jobs["has_more"]), (&json!(id), &json!(false)));
    // Nothing of the training is left but what tells of it.
    let left = fs::read_dir(server.folder(id)).unwrap();
    let mut left: Vec<_> = left.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    left.sort_unstable();
    assert_eq!(left, ["events.jsonl", "job.json", "recipe.toml"]);
    let metrics = sent(server.running.client.get(format!("{}/metrics", server.running.url))).await.1;
    assert!(metrics.as_str().unwrap().contains("lorry_fine_tuning_jobs{status=\"succeeded\"} 1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_training_that_ends_early_has_succeeded_and_says_at_which_step_and_why() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&dir);
    for (reason, said) in [("early_stopping", "the validation loss falls no more"), ("last_step", "all steps are done")]
    {
        let end = format!(r#"echo '{{"type": "end", "step": 2, "reason": "{reason}"}}'"#);
        let script = TRAINER.replace("\"steps\": 2", "\"steps\": 5").replace("cp -r", &format!("{end}\ncp -r"));
        fs::write(server.dir.join("trainer.sh"), script).unwrap();
        let id = server.job().await;
        let job = server.until(&id, "succeeded").await;
        assert!(job["fine_tuned_model"].is_string() && job["error"].is_null(), "{job}");
        let messages = server.messages(&id).await;
        let expected = format!("Training ended at step 2/5: {said}");
        assert_eq!(messages.iter().filter(|message| **message == expected).count(), 1, "{messages:#?}");
        let checkpoints = server.running.admin_get(&format!("/fine_tuning/jobs/{id}/checkpoints")).await;
        assert_eq!(checkpoints["data"][0]["step_number"], json!(2));
    }
    let recipe: toml::Table = fs::read_to_string(server.dir.join("recipe.toml")).unwrap().parse().unwrap();
    assert_eq!(recipe["training"]["early_stopping_patience"].as_integer(), Some(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_kept_shown_and_deleted_and_its_job_has_it_still() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&dir);
    let id = server.file(10).await;
    let file = server.running.admin_get(&format!("/files/{id}")).await;
    assert_eq!((&file["filename"], &file["purpose"]), (&json!("train.jsonl"), &json!("fine-tune")));
    let content = sent(server.running.admin(Method::GET, &format!("/files/{id}/content"))).await.1;
    assert_eq!((content, &file["bytes"]), (Value::String(examples(10)), &json!(examples(10).len())));
    server.hold();
    let (_, job) = server.create(json!({"training_file": id})).await;
    let (status, deleted) = sent(server.running.admin(Method::DELETE, &format!("/files/{id}"))).await;
    assert_eq!((status, &deleted["deleted"]), (StatusCode::OK, &json!(true)));
    let (status, error) = sent(server.running.admin(Method::GET, &format!("/files/{id}"))).await;
    assert_eq!((status, &error["error"]["code"]), (StatusCode::NOT_FOUND, &json!("file_not_found")));
    assert_eq!(server.running.admin_get("/files").await["data"], json!([]));
    server.let_go();
    server.until(job["id"].as_str().unwrap(), "succeeded").await;

    let (status, error) = sent(server.upload("{}", "batch")).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(named(&error, "purpose").contains("`fine-tune`"));
    for (part, more) in [("split", "train"), ("file", "{}"), ("purpose", "fine-tune")] {
        let (status, error) = sent(server.running.upload(&examples(10), "fine-tune", &[(part, more)])).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{error}");
        assert!(named(&error, part).contains(part), "{error}");
    }
    let (status, _) = sent(server.upload(&"a".repeat((1 << 20) + 1), "fine-tune")).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
    let (status, _) = sent(server.running.admin(Method::POST, "/files").body("{}")).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert_eq!(fs::read_dir(server.dir.join("state/fine_tuning/files")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_file_is_refused_with_its_line_and_field() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&dir);
    let bad = format!("{}\n{{\"prompt\": \"a\"}}", examples(10));
    let (_, file) = sent(server.upload(&bad, "fine-tune")).await;
    let (status, error) = server.create(json!({"training_file": file["id"]})).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(named(&error, "training_file").ends_with("line 11: `completion` must be a string"), "{error}");
    let good = server.file(10).await;
    let (_, error) = server.create(json!({"training_file": good, "validation_file": file["id"]})).await;
    assert!(named(&error, "validation_file").contains("line 11"));
    let (_, error) = server.create(json!({"training_file": server.file(9).await})).await;
    assert!(named(&error, "training_file").contains("9 examples"));
    let (status, error) = server.create(json!({"training_file": "../jobs"})).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(named(&error, "training_file").contains("there is no file"));
    assert_eq!(server.running.admin_get("/fine_tuning/jobs").await["data"], json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trainer_that_is_killed_or_fails_fails_its_job_with_the_cause_and_the_next_one_runs() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&dir);
    server.hold();
    let (first, second) = (server.job().await, server.job().await);
    let pid = server.trainer(1).await;
    // One at a time.
    assert_eq!(server.running.admin_get(&format!("/fine_tuning/jobs/{second}")).await["status"], "queued");
    assert!(Command::new("kill").args(["-KILL", &pid]).status().unwrap().success());
    let job = server.until(&first, "failed").await;
    let expected = "the trainer was killed by signal 9";
    assert!(job["error"]["message"].as_str().unwrap().starts_with(expected), "{job}");
    assert!(job["fine_tuned_model"].is_null());

    server.trainer(2).await;
    fs::write(server.dir.join("fail"), "").unwrap();
    server.let_go();
    let job = server.until(&second, "failed").await;
    assert_eq!(job["error"]["message"], "the trainer ended with status 3: 10%\nerror: no memory");
    fs::remove_file(server.dir.join("fail")).unwrap();

    fs::remove_file(server.dir.join("made/adapter_model.safetensors")).unwrap();
    let job = server.until(&server.job().await, "failed").await;
    assert!(job["error"]["message"].as_str().unwrap().contains("cannot be served"), "{job}");
    assert_eq!(server.running.admin_get("/adapters").await["data"].as_array().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_cancelled_before_and_while_it_runs_and_not_after() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&dir);
    server.hold();
    let (running, queued) = (server.job().await, server.job().await);
    let pid = server.trainer(1).await;
    let (status, job) = server.cancel(&queued).await;
    assert_eq!((status, &job["status"]), (StatusCode::OK, &json!("cancelled")));
    let (status, job) = server.cancel(&running).await;
    assert_eq!((status, &job["status"]), (StatusCode::OK, &json!("cancelled")));
    assert!(job["finished_at"].is_u64() && job["error"].is_null(), "{job}");
    until(async || !runs(&pid)).await;
    let (status, error) = server.cancel(&running).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "{error}");
    assert_eq!(server.cancel("ftjob-none").await.0, StatusCode::NOT_FOUND);
    server.let_go();
    server.until(&server.job().await, "succeeded").await;
    assert_eq!(server.running.admin_get(&format!("/fine_tuning/jobs/{running}")).await["status"], "cancelled");
    assert_eq!(server.pids().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_killed_in_mid_training_loses_no_job_and_leaves_no_trainer() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&dir);
    server.hold();
    let (cut_off, queued) = (server.job().await, server.job().await);
    let pid = server.trainer(1).await;
    until(async || server.messages(&cut_off).await.iter().any(|message| message.contains("Step 1/2"))).await;
    // As by `kill -9`.
    drop(server);
    until(async || !runs(&pid)).await;

    let server = Server::start(&dir);
    let second = server.trainer(2).await;
    assert!(runs(&second));
    assert_eq!(server.running.admin_get(&format!("/fine_tuning/jobs/{cut_off}")).await["status"], "running");
    server.let_go();
    server.until(&cut_off, "succeeded").await;
    server.until(&queued, "succeeded").await;
    let messages = server.messages(&cut_off).await;
    assert_eq!(messages.iter().filter(|message| message.contains("was started again in mid-training")).count(), 1);
    assert_eq!(messages.iter().filter(|message| message.contains("Step 1/2")).count(), 2, "{messages:#?}");
    assert!(!server.messages(&queued).await.iter().any(|message| message.contains("started again")));
    drop(server);

    let server = Server::start(&dir);
    assert_eq!(server.running.admin_get(&format!("/fine_tuning/jobs/{cut_off}")).await["status"], "succeeded");
    assert_eq!(server.running.admin_get("/fine_tuning/jobs").await["data"][0]["id"], json!(queued));
    assert_eq!(server.pids().len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trainer_that_leaves_a_process_behind_is_not_waited_for_beyond_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&dir);
    // In a session of its own, where no signal to the trainer's group finds it; it has both outputs.
    let daemon = "setsid sh -c 'echo $$ > \"$0/daemon\"; exec sleep 100' \"$here\" &";
    let waits = "while [ ! -s \"$here/daemon\" ]; do sleep 0.02; done";
    let script = TRAINER.replace("echo 'for people'", &format!("{daemon}\n{waits}"));
    fs::write(server.dir.join("trainer.sh"), script).unwrap();
    server.until(&server.job().await, "succeeded").await;
    let daemon = fs::read_to_string(server.dir.join("daemon")).unwrap();
    assert!(runs(daemon.trim()), "it ran when the job had ended");
    assert!(Command::new("kill").args(["-KILL", daemon.trim()]).status().unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_that_cannot_be_written_is_refused_and_the_job_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&dir);
    server.hold();
    let (running, queued) = (server.job().await, server.job().await);
    let pid = server.trainer(1).await;
    for (id, status) in [(&running, "running"), (&queued, "queued")] {
        // In the record's place, so that no other can be put there.
        let record = server.folder(id).join("job.json");
        let kept = fs::read(&record).unwrap();
        fs::remove_file(&record).unwrap();
        fs::create_dir(&record).unwrap();
        let (refused, error) = server.cancel(id).await;
        assert_eq!((refused, &error["error"]["code"]), (StatusCode::INSUFFICIENT_STORAGE, &json!("not_writable")));
        assert_eq!(server.running.admin_get(&format!("/fine_tuning/jobs/{id}")).await["status"], status);
        fs::remove_dir(&record).unwrap();
        fs::write(&record, kept).unwrap();
    }
    assert!(runs(&pid));
    assert_eq!(server.cancel(&queued).await.0, StatusCode::OK);
    server.let_go();
    server.until(&running, "succeeded").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_that_cannot_be_installed_is_kept_and_none_is_trained_for_a_folder_that_takes_none() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&dir);
    server.hold();
    let id = server.job().await;
    server.trainer(1).await;
    // Where unfinished adapters are put.
    let staging = server.dir.join("adapters/.lorry");
    fs::remove_dir_all(&staging).unwrap();
    fs::write(&staging, "").unwrap();
    let (status, error) = server.create(json!({"training_file": server.file(10).await})).await;
    assert_eq!(status, StatusCode::INSUFFICIENT_STORAGE, "{error}");
    assert!(error["error"]["message"].as_str().unwrap().contains("the folder of adapters"), "{error}");
    server.let_go();
    let job = server.until(&id, "failed").await;
    let kept = server.folder(&id).join("trained");
    assert!(job["error"]["message"].as_str().unwrap().contains(kept.to_str().unwrap()), "{job}");
    assert!(kept.join("adapter_model.safetensors").is_file());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_waits_for_its_base_and_begins_anew_where_its_recipe_is_another() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&dir);
    server.hold();
    let (cut_off, queued) = (server.job().await, server.job().await);
    server.trainer(1).await;
    let folders = [&cut_off, &queued].map(|id| server.folder(id));
    drop(server);
    // A checkpoint, by another version of the recipe; and a job that was made when another base was served.
    fs::create_dir(folders[0].join("adapter")).unwrap();
    fs::write(folders[0].join("adapter/checkpoint.pt"), "").unwrap();
    fs::write(folders[0].join("recipe.toml"), "name = 'older'").unwrap();
    let with_model = |from: &str, to: &str| {
        let record = fs::read_to_string(folders[1].join("job.json")).unwrap();
        assert!(record.contains(from), "{record}");
        fs::write(folders[1].join("job.json"), record.replace(from, to)).unwrap();
    };
    with_model("\"model\": \"tiny\"", "\"model\": \"other\"");

    let server = Server::start(&dir);
    server.let_go();
    server.until(&cut_off, "succeeded").await;
    assert!(server.messages(&cut_off).await.iter().any(|message| message.contains("training begins anew")));
    assert_eq!(server.running.admin_get(&format!("/fine_tuning/jobs/{queued}")).await["status"], "queued");
    let waits = "The job waits for the base other: tiny is served now";
    assert_eq!(server.messages(&queued).await.iter().filter(|message| *message == waits).count(), 1);
    // Those of the base that is served do not wait for it.
    server.until(&server.job().await, "succeeded").await;
    drop(server);
    with_model("\"model\": \"other\"", "\"model\": \"tiny\"");
    let server = Server::start(&dir);
    server.until(&queued, "succeeded").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_another_server_has_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&dir);
    let mut second = Command::new(env!("CARGO_BIN_EXE_lorry"));
    second.args(["serve", "--port", "0", "--config"]).arg(server.dir.join("lorry.toml"));
    second.arg("--model").arg(server.dir.join("tiny.gguf")).arg("--adapters").arg(server.dir.join("adapters"));
    second.env("LORRY_HOME", &server.dir).env(ADMIN.0, ADMIN.1).env_remove("RUST_LOG");
    let mut second = second.stderr(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(second.stderr.take().unwrap()).lines().map_while(Result::ok);
    // If it serves it has not been refused, and does not end by itself.
    let said: Vec<String> = lines.take_while(|line| !line.contains("serving tiny on ")).collect();
    let _ = second.kill();
    let said = (second.wait().unwrap().code(), said.join("\n"));
    assert!(said.0 == Some(1) && said.1.contains("is used by another server"), "{said:?}");
    assert!(said.1.contains("state/fine_tuning") && said.1.contains("fine_tuning.dir"), "{said:?}");
    server.until(&server.job().await, "succeeded").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trainer_has_its_limits() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&dir);
    // In KiB, and in steps.
    fs::write(server.dir.join("trainer.sh"), "echo memory $(ulimit -d) nice $(nice) >&2; exit 4").unwrap();
    let job = server.until(&server.job().await, "failed").await;
    let own = String::from_utf8(Command::new("nice").output().unwrap().stdout).unwrap();
    let nice = (own.trim().parse::<i32>().unwrap() + 10).min(19);
    let expected = format!("the trainer ended with status 4: memory 8388608 nice {nice}");
    assert_eq!(job["error"]["message"], expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn fine_tuning_is_for_the_admin_key_and_off_unless_it_is_turned_on() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&dir);
    for (method, path) in [
        (Method::POST, "/files"),
        (Method::GET, "/files"),
        (Method::POST, "/fine_tuning/jobs"),
        (Method::GET, "/fine_tuning/jobs"),
    ] {
        let request = || server.running.client.request(method.clone(), format!("{}/v1{path}", server.running.url));
        let (status, error) = sent(request().bearer_auth("secret").body("{}")).await;
        assert_eq!((status, &error["error"]["code"]), (StatusCode::FORBIDDEN, &json!("admin_key_required")), "{path}");
        assert_eq!(sent(request().body("{}")).await.0, StatusCode::UNAUTHORIZED, "{path}");
    }
    let off = Running::start("", &[ADMIN]);
    for path in ["/files", "/fine_tuning/jobs"] {
        let (status, error) = sent(off.client.get(format!("{}/v1{path}", off.url)).bearer_auth("admin")).await;
        assert_eq!((status, &error["error"]["code"]), (StatusCode::FORBIDDEN, &json!("fine_tuning_off")));
        assert!(error["error"]["message"].as_str().unwrap().contains("fine_tuning.enabled"), "{error}");
    }
}
