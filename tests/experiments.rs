//! Experiments through the library: what is reported, what a canary does, and what survives a crash or a bad disk. None of
//! it needs a model. Two tests run this binary again as a child, to kill it or to take its rights away.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lorry::experiments::{
    ArmReport, CanaryState, Experiments, ExperimentsConfig, ModelNames, Outcome, Record, Report, Unavailable, Vote,
    VoteError, VoteKind, prompt_hash,
};
use lorry::metrics::Metrics;

const BASE: &str = "coder:1b";
const ARMS: &str =
    "arms = [{name = 'base', model = 'coder:1b', weight = 1}, {name = 'tuned', model = 'conala', weight = 1},
    {name = 'shadow', model = 'bash', shadow = true}]";
const CANARY: &str =
    "arms = [{name = 'base', model = 'coder:1b', weight = 1}, {name = 'tuned', model = 'conala', weight = 1, canary = true}]
    bounds = {max_error_rate = 0.2, min_samples = 10}";

/// An adapter, and its generation that was bad.
type RolledBack = (String, Option<String>);

/// An experiment `e` on the alias `coder`, and what it rolled back.
struct Lab {
    experiments: Experiments,
    metrics: Arc<Metrics>,
    rolled_back: Arc<Mutex<Vec<RolledBack>>>,
}

impl Lab {
    fn open(database: &Path, arms: &str) -> Self {
        Self::with_limits(database, arms, 64, 1024)
    }

    fn with_limits(database: &Path, arms: &str, max_mib: u32, max_queued: usize) -> Self {
        let config = format!(
            "path = ''\nmax_mib = {max_mib}\nmax_queued = {max_queued}\nkeep_text = true\n
             [[run]]\nname = 'e'\nalias = 'coder'\n{arms}"
        );
        let config: ExperimentsConfig = toml::from_str(&config).unwrap();
        config.validate(BASE, &BTreeMap::new()).unwrap();
        let (metrics, rolled_back) = (Arc::new(Metrics::new("base")), Arc::new(Mutex::new(Vec::new())));
        let calls = rolled_back.clone();
        let on_roll_back = Box::new(move |adapter: &str, generation: Option<&str>| {
            calls.lock().unwrap().push((adapter.to_owned(), generation.map(str::to_owned)));
        });
        let experiments = Experiments::start(
            &config,
            database.to_path_buf(),
            ModelNames::new(BASE, &BTreeMap::new(), |_| false),
            metrics.clone(),
            on_roll_back,
        )
        .unwrap();
        Self { experiments, metrics, rolled_back }
    }

    async fn vote(&self, id: &str, user: &str, kind: VoteKind, arm: Option<&str>) -> Result<(), VoteError> {
        let (id, user, arm) = (id.to_owned(), user.to_owned(), arm.map(str::to_owned));
        self.experiments.vote(Vote { id, user, kind, arm, text: None }).await
    }

    async fn accept(&self, id: &str) -> Result<(), VoteError> {
        self.vote(id, "", VoteKind::Accepted, None).await
    }

    /// Returns when everything before it has been written, or could not be.
    async fn settle(&self) {
        let _ = self.vote("settled", "", VoteKind::View, None).await;
    }

    async fn report(&self) -> Report {
        self.experiments.report("e").await.unwrap().unwrap()
    }

    async fn arm(&self, name: &str) -> ArmReport {
        self.report().await.arms.into_iter().find(|arm| arm.name == name).unwrap()
    }

    fn writes(&self, result: &str) -> u64 {
        self.metrics.experiment_writes_total.with_label_values(&[result]).get()
    }
}

fn request(id: &str, arm: &str) -> Record {
    let model = match arm {
        "base" => BASE,
        "tuned" => "coder:1b-conala",
        _ => "bash",
    };
    Record {
        id: id.to_owned(),
        started_ms: 0,
        experiment: Some("e".to_owned()),
        arm: arm.to_owned(),
        model: model.to_owned(),
        generation: None,
        shadow: arm == "shadow",
        outcome: Outcome::Completed,
        prompt_hash: None,
        ttft_ms: Some(10.0),
        tpot_ms: None,
        prompt_tokens: 7,
        completion_tokens: 3,
        text: None,
        asked: None,
    }
}

fn compared(id: &str, arm: &str, model: &str) -> Record {
    Record { experiment: None, model: model.to_owned(), ..request(id, arm) }
}

fn database(folder: &tempfile::TempDir) -> PathBuf {
    folder.path().join("state/experiments.db")
}

#[tokio::test]
async fn an_arm_on_an_adapter_that_somebody_may_not_see_is_not_in_the_report() {
    let folder = tempfile::tempdir().unwrap();
    let lab = Lab::open(&database(&folder), CANARY);
    let whole = lab.experiments.report("e").await.unwrap().unwrap();
    let visible = |may_see: bool| {
        let report = lab.experiments.visible(whole.clone(), |adapter| {
            assert_eq!(adapter, "conala");
            may_see
        });
        let arms: Vec<_> = report.arms.into_iter().map(|arm| arm.name).collect();
        (arms, report.pairs.len(), report.canary.is_some())
    };
    assert_eq!(visible(true), (vec!["base".to_owned(), "tuned".to_owned()], 1, true));
    assert_eq!(visible(false), (vec!["base".to_owned()], 0, false));
}

#[tokio::test]
async fn a_report_counts_requests_tokens_and_latency_by_arm() {
    let folder = tempfile::tempdir().unwrap();
    let lab = Lab::open(&database(&folder), ARMS);
    for i in 1..=20 {
        let id = format!("cmpl-{i}");
        let (ttft_ms, generation) = (Some(f64::from(i)), Some(format!("v{i}")));
        lab.experiments.record(Record { ttft_ms, generation, tpot_ms: Some(2.0), ..request(&id, "base") });
        lab.experiments.record(request(&id, "shadow"));
    }
    lab.experiments.record(Record { outcome: Outcome::Failed, ttft_ms: None, ..request("cmpl-x", "base") });
    // A run of what the arm was before its model was changed.
    lab.experiments.record(Record { model: "other".to_owned(), ..request("cmpl-y", "base") });
    lab.settle().await;
    let base = lab.arm("base").await;
    assert_eq!((base.requests, base.errors, base.prompt_tokens, base.completion_tokens), (21, 1, 147, 63));
    assert_eq!((base.ttft_ms.p50, base.ttft_ms.p95), (Some(10.0), Some(19.0)));
    assert_eq!((base.tpot_ms.p50, base.tpot_ms.p95), (Some(2.0), Some(2.0)));
    let shadow = lab.arm("shadow").await;
    assert_eq!((shadow.requests, shadow.shadow, shadow.shown), (20, true, 0));
    assert_eq!(lab.arm("tuned").await.requests, 0);
    assert_eq!(lab.writes("written"), 43);
}

#[tokio::test]
async fn acceptance_is_of_what_was_shown_by_each_users_last_word() {
    let folder = tempfile::tempdir().unwrap();
    let lab = Lab::open(&database(&folder), ARMS);
    let judgements = [
        ("a", vec![VoteKind::View, VoteKind::Accepted]),
        ("b", vec![VoteKind::Accepted, VoteKind::Rejected]),
        ("c", vec![VoteKind::Accepted, VoteKind::Edited, VoteKind::View]),
        ("d", vec![VoteKind::View]),
        ("e", vec![]),
    ];
    for (id, kinds) in judgements {
        lab.experiments.record(request(id, "base"));
        lab.experiments.record(request(id, "shadow"));
        for kind in kinds {
            lab.vote(id, "ann", kind, None).await.unwrap();
        }
    }
    let base = lab.arm("base").await;
    assert_eq!((base.shown, base.accepted, base.rejected, base.edited), (4, 1, 1, 1));
    assert_eq!(base.acceptance.rate, Some(0.25));
    assert!(base.acceptance.low < 0.05 && base.acceptance.high > 0.69, "{:?}", base.acceptance);
    assert_eq!(lab.arm("shadow").await.shown, 0);
}

#[tokio::test]
async fn comparisons_and_judgements_of_the_same_prompt_are_pairs() {
    let folder = tempfile::tempdir().unwrap();
    let lab = Lab::open(&database(&folder), ARMS);
    // Comparisons name their arms as they like; the models say which arms of the experiment they are.
    for i in 0..10 {
        let id = format!("cmp-{i}");
        lab.experiments.record(compared(&id, "zero-shot", "Coder-1B"));
        lab.experiments.record(compared(&id, "with adapter", "conala"));
        lab.experiments.record(compared(&id, "stranger", "coder:1b-unknown"));
    }
    for (i, winner) in
        [(0, "zero-shot"), (1, "with adapter"), (2, "with adapter"), (3, "with adapter"), (4, "stranger")]
    {
        lab.vote(&format!("cmp-{i}"), "ann", VoteKind::Winner, Some(winner)).await.unwrap();
    }
    lab.vote("cmp-5", "ann", VoteKind::Winner, None).await.unwrap();
    lab.vote("cmp-0", "bob", VoteKind::Winner, Some("with adapter")).await.unwrap();
    // The same prompt through the alias, by users of different arms.
    for (prompt, base, tuned) in
        [("p", VoteKind::Rejected, VoteKind::Accepted), ("q", VoteKind::Accepted, VoteKind::Accepted)]
    {
        for (arm, kind) in [("base", base), ("tuned", tuned)] {
            let id = format!("{prompt}-{arm}");
            lab.experiments.record(Record { prompt_hash: Some(prompt_hash(prompt)), ..request(&id, arm) });
            lab.vote(&id, "", kind, None).await.unwrap();
        }
    }
    let report = lab.report().await;
    assert_eq!(report.pairs.len(), 3);
    let pair = &report.pairs[0];
    assert_eq!((pair.a.as_str(), pair.b.as_str()), ("base", "tuned"));
    assert_eq!((pair.a_wins, pair.b_wins, pair.ties), (1, 5, 2));
    assert!((pair.p_value - 14.0 / 64.0).abs() < 1e-12, "{}", pair.p_value);
    let wins = |index: usize| (report.arms[index].wins, report.arms[index].comparisons);
    assert_eq!((wins(0), wins(1), wins(2)), ((1, 7), (4, 7), (0, 0)));
    assert_eq!(report.arms[1].win_rate.rate, Some(4.0 / 7.0));
}

#[tokio::test]
async fn a_comparison_of_what_no_arm_serves_says_nothing_of_the_arms() {
    let folder = tempfile::tempdir().unwrap();
    let lab = Lab::open(&database(&folder), ARMS);
    for (id, model) in [("half", "coder:1b-conala@0.5"), ("shots", "coder:1b-conala+icl:s@1"), ("whole", "conala")] {
        lab.experiments.record(compared(id, "zero-shot", BASE));
        lab.experiments.record(compared(id, "other", model));
        lab.vote(id, "ann", VoteKind::Winner, Some("other")).await.unwrap();
    }
    for (arm, wins) in [("base", 0), ("tuned", 1)] {
        let arm = lab.arm(arm).await;
        assert_eq!((arm.wins, arm.comparisons), (wins, 1), "{}", arm.name);
    }
}

#[tokio::test]
async fn a_vote_before_its_comparison_has_ended_counts_if_there_is_such_an_arm() {
    let folder = tempfile::tempdir().unwrap();
    let lab = Lab::open(&database(&folder), ARMS);
    for (id, winner) in [("a", Some("zero-shot")), ("b", Some("tuned")), ("c", None)] {
        lab.vote(id, "ann", VoteKind::Winner, winner).await.unwrap();
        lab.experiments.record(compared(id, "zero-shot", BASE));
        lab.experiments.record(compared(id, "with adapter", "conala"));
    }
    lab.settle().await;
    for (arm, wins) in [("base", 1), ("tuned", 0)] {
        let arm = lab.arm(arm).await;
        assert_eq!((arm.wins, arm.comparisons), (wins, 2), "{}", arm.name);
    }
}

#[tokio::test]
async fn an_alias_is_split_by_user_with_shadows_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let lab = Lab::open(&database(&folder), ARMS);
    assert_eq!(lab.experiments.assign("unknown", "ann", |_| true), None);
    let mut arms = HashSet::new();
    for user in 0..50 {
        let first = lab.experiments.assign("coder", &user.to_string(), |_| true).unwrap();
        assert_eq!(lab.experiments.assign("coder", &user.to_string(), |_| true), Some(first.clone()));
        assert_eq!((first.experiment.as_str(), first.shadows[0].model.as_str()), ("e", "bash"));
        arms.insert((first.arm, first.model));
    }
    assert_eq!(arms, HashSet::from([("base".into(), "coder:1b".into()), ("tuned".into(), "conala".into())]));
}

fn arms_served(lab: &Lab) -> HashSet<String> {
    (0..100).map(|user| lab.experiments.assign("coder", &user.to_string(), |_| true).unwrap().arm).collect()
}

#[tokio::test]
async fn a_canary_that_breaks_its_bound_leaves_the_traffic_until_it_is_reset() {
    let folder = tempfile::tempdir().unwrap();
    let lab = Lab::open(&database(&folder), CANARY);
    assert_eq!(arms_served(&lab).len(), 2);
    for i in 0..20 {
        let outcome = if i % 3 == 0 { Outcome::Failed } else { Outcome::Completed };
        lab.experiments.record(Record { outcome, ..request(&format!("cmpl-{i}"), "tuned") });
        lab.experiments.record(request(&format!("cmpl-base-{i}"), "base"));
    }
    lab.settle().await;
    assert_eq!(*lab.rolled_back.lock().unwrap(), [("conala".to_owned(), None)], "the hook is called once");
    assert_eq!(arms_served(&lab), HashSet::from(["base".to_owned()]));
    assert!(lab.experiments.is_rolled_back("e", "tuned") && !lab.experiments.is_rolled_back("e", "base"));
    let canary = lab.report().await.canary.unwrap();
    assert_eq!((canary.arm.as_str(), canary.state), ("tuned", CanaryState::RolledBack));
    assert!(canary.cause.unwrap().contains("max_error_rate") && canary.rolled_back_at.is_some());

    drop(lab);
    let lab = Lab::open(&database(&folder), CANARY);
    assert_eq!(arms_served(&lab), HashSet::from(["base".to_owned()]), "also after a restart");
    lab.experiments.reset("e").await.unwrap();
    lab.settle().await;
    assert_eq!(arms_served(&lab).len(), 2);
    assert_eq!(lab.report().await.canary.unwrap().state, CanaryState::Watching);
    assert!(lab.rolled_back.lock().unwrap().is_empty(), "what was before the reset does not count");
}

#[tokio::test]
async fn what_is_rolled_back_is_the_generation_that_broke_the_bound_also_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let of = |generation: &str, i: usize| {
        let (id, generation) = (format!("cmpl-{generation}-{i}"), Some(generation.to_owned()));
        Record { outcome: Outcome::Failed, generation, ..request(&id, "tuned") }
    };
    let lab = Lab::open(&database(&folder), CANARY);
    (0..9).for_each(|i| lab.experiments.record(of("v1", i)));
    lab.settle().await;
    // Requests are kept in order of milliseconds.
    tokio::time::sleep(Duration::from_millis(5)).await;
    (0..9).for_each(|i| lab.experiments.record(of("v2", i)));
    lab.settle().await;
    assert!(lab.rolled_back.lock().unwrap().is_empty(), "nine samples prove nothing");
    drop(lab);
    let lab = Lab::open(&database(&folder), CANARY);
    lab.experiments.record(Record { outcome: Outcome::Failed, ..request("cmpl-9", "tuned") });
    lab.settle().await;
    assert_eq!(*lab.rolled_back.lock().unwrap(), [("conala".to_owned(), Some("v2".to_owned()))]);
}

#[tokio::test]
async fn a_canary_remembers_its_requests_across_a_restart_and_forgets_them_with_its_definition() {
    let folder = tempfile::tempdir().unwrap();
    let failed = |i: usize| Record { outcome: Outcome::Failed, ..request(&format!("cmpl-{i}"), "tuned") };
    let lab = Lab::open(&database(&folder), CANARY);
    (0..9).for_each(|i| lab.experiments.record(failed(i)));
    drop(lab);
    let lab = Lab::open(&database(&folder), CANARY);
    assert_eq!(arms_served(&lab).len(), 2, "nine samples prove nothing");
    lab.experiments.record(failed(9));
    lab.settle().await;
    assert_eq!(arms_served(&lab).len(), 1);
    drop(lab);
    let lab = Lab::open(&database(&folder), &CANARY.replace("0.2", "0.3"));
    lab.settle().await;
    assert_eq!(arms_served(&lab).len(), 2);
}

#[tokio::test]
async fn a_vote_counts_for_a_canary_whether_it_or_its_request_came_first() {
    let folder = tempfile::tempdir().unwrap();
    let lab = Lab::open(&database(&folder), &CANARY.replace("max_error_rate = 0.2", "min_acceptance = 0.5"));
    for i in 0..10 {
        let id = format!("cmpl-{i}");
        lab.vote(&id, "ann", if i < 4 { VoteKind::Accepted } else { VoteKind::View }, None).await.unwrap();
        lab.experiments.record(request(&id, "tuned"));
    }
    lab.settle().await;
    assert!(lab.report().await.canary.unwrap().cause.unwrap().contains("4 of 10 were accepted"));
}

#[tokio::test]
async fn the_latest_judgement_of_whomever_counts_for_a_canary_before_and_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let canary = CANARY.replace("max_error_rate = 0.2", "min_acceptance = 0.5");
    let lab = Lab::open(&database(&folder), &canary);
    for i in 0..9 {
        let id = format!("cmpl-{i}");
        lab.experiments.record(request(&id, "tuned"));
        lab.vote(&id, "ann", VoteKind::Accepted, None).await.unwrap();
        lab.vote(&id, "bob", if i < 6 { VoteKind::Rejected } else { VoteKind::View }, None).await.unwrap();
    }
    drop(lab);
    let lab = Lab::open(&database(&folder), &canary);
    assert_eq!(arms_served(&lab).len(), 2, "nine samples prove nothing");
    lab.experiments.record(request("cmpl-9", "tuned"));
    lab.vote("cmpl-9", "ann", VoteKind::View, None).await.unwrap();
    assert!(lab.report().await.canary.unwrap().cause.unwrap().contains("3 of 10 were accepted"));
}

#[tokio::test]
async fn a_report_names_the_weights_of_the_latest_request_that_had_any() {
    let folder = tempfile::tempdir().unwrap();
    let lab = Lab::open(&database(&folder), ARMS);
    lab.experiments.record(Record { generation: Some("g1".to_owned()), ..request("cmpl-1", "tuned") });
    lab.settle().await;
    lab.experiments.record(Record { outcome: Outcome::Failed, ..request("cmpl-2", "tuned") });
    lab.settle().await;
    assert_eq!(lab.arm("tuned").await.generation.as_deref(), Some("g1"));
}

#[tokio::test]
async fn a_canary_is_watched_while_nothing_can_be_written() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("state"), "a file where the folder should be").unwrap();
    let lab = Lab::open(&database(&folder), CANARY);
    for i in 0..10 {
        lab.experiments.record(Record { outcome: Outcome::Failed, ..request(&format!("cmpl-{i}"), "tuned") });
    }
    lab.settle().await;
    assert_eq!(arms_served(&lab).len(), 1);
    fs::remove_file(folder.path().join("state")).unwrap();
    lab.accept("cmpl-1").await.unwrap();
    drop(lab);
    assert_eq!(arms_served(&Lab::open(&database(&folder), CANARY)).len(), 1, "written when the disk was back");
}

#[tokio::test]
async fn a_full_file_refuses_votes_with_the_cause_and_takes_them_again_when_there_is_room() {
    let folder = tempfile::tempdir().unwrap();
    let lab = Lab::with_limits(&database(&folder), ARMS, 1, 1024);
    let text = "x".repeat(64 << 10);
    for i in 0..40 {
        lab.experiments.record(Record { text: Some(text.clone()), ..request(&format!("cmpl-{i}"), "base") });
        lab.settle().await;
    }
    let mut votes = 0;
    let error = loop {
        match lab.accept(&format!("{votes}-{}", "x".repeat(200))).await {
            Ok(()) => votes += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(error, VoteError::Unavailable(Unavailable::Full));
    assert!(error.to_string().contains("experiments.max_mib") && lab.writes("failed") > 0, "{error}");
    assert!(lab.experiments.assign("coder", "ann", |_| true).is_some());
    assert!(lab.arm("base").await.requests > 0, "reports are still there");

    let other = rusqlite::Connection::open(database(&folder)).unwrap();
    other.execute_batch("DELETE FROM requests").unwrap();
    lab.accept("again").await.unwrap();
    assert_eq!(lab.experiments.votes("again").await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_file_that_is_no_database_or_a_newer_one_is_left_alone_until_it_is_moved_away() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("experiments.db");
    fs::write(&path, "not a database, but a note to myself\n".repeat(100)).unwrap();
    let lab = Lab::open(&path, ARMS);
    assert_eq!(lab.accept("a").await, Err(VoteError::Unavailable(Unavailable::Damaged)));
    assert_eq!(lab.experiments.votes("a").await, Err(Unavailable::Damaged));
    assert!(fs::read_to_string(&path).unwrap().contains("a note to myself"));
    fs::remove_file(&path).unwrap();
    lab.accept("a").await.unwrap();
    drop(lab);

    rusqlite::Connection::open(&path).unwrap().pragma_update(None, "user_version", 99).unwrap();
    let lab = Lab::open(&path, ARMS);
    assert_eq!(lab.accept("b").await, Err(VoteError::Unavailable(Unavailable::Newer)));
}

#[tokio::test]
async fn a_file_moved_away_while_it_is_in_use_is_made_anew() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("experiments.db");
    let lab = Lab::open(&path, ARMS);
    lab.accept("a").await.unwrap();
    for name in ["experiments.db", "experiments.db-wal", "experiments.db-shm"] {
        fs::rename(folder.path().join(name), folder.path().join(format!("old-{name}"))).unwrap();
    }
    lab.accept("b").await.unwrap();
    drop(lab);
    let lab = Lab::open(&path, ARMS);
    assert_eq!(lab.experiments.votes("b").await.unwrap().len(), 1);
    assert!(lab.experiments.votes("a").await.unwrap().is_empty());
}

#[tokio::test]
async fn a_full_queue_drops_requests_and_refuses_votes_without_waiting() {
    let folder = tempfile::tempdir().unwrap();
    let lab = Lab::with_limits(&database(&folder), ARMS, 64, 2);
    lab.settle().await;
    let other = rusqlite::Connection::open(database(&folder)).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    // The writer waits for the other one with what it has taken; two more fit into the queue.
    for i in 0..600 {
        lab.experiments.record(request(&format!("cmpl-{i}"), "base"));
    }
    assert!(lab.writes("dropped") > 0);
    assert_eq!(lab.accept("a").await, Err(VoteError::Unavailable(Unavailable::Busy)));
    other.execute_batch("ROLLBACK").unwrap();
}

/// Runs the test `name` of this binary in a process of its own, as `nobody` if `unprivileged`.
fn child(name: &str, folder: &Path, unprivileged: bool) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([name, "--exact", "--nocapture", "--test-threads=1"]);
    command.env("LORRY_TEST_FOLDER", folder).stdout(Stdio::piped()).stderr(Stdio::null());
    #[cfg(unix)]
    if unprivileged {
        use std::os::unix::process::CommandExt;
        command.uid(65534).gid(65534);
    }
    command.spawn().unwrap()
}

/// Set in a child only.
fn folder_of_child() -> Option<PathBuf> {
    std::env::var_os("LORRY_TEST_FOLDER").map(PathBuf::from)
}

#[tokio::test]
async fn child_that_votes_until_it_is_killed() {
    let Some(folder) = folder_of_child() else { return };
    let lab = Arc::new(Lab::open(&folder.join("experiments.db"), ARMS));
    // Several at once, so that they share commits.
    let voters = (0..4).map(|voter| {
        let lab = lab.clone();
        tokio::spawn(async move {
            for i in 0.. {
                let id = format!("vote-{voter}-{i}");
                lab.accept(&id).await.unwrap();
                println!("\nacknowledged {id}");
            }
        })
    });
    futures::future::join_all(voters.collect::<Vec<_>>()).await;
}

#[tokio::test]
async fn every_acknowledged_vote_is_there_after_kill_9() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("experiments.db");
    let mut acknowledged = Vec::new();
    for round in 1..=3 {
        let mut child = child("child_that_votes_until_it_is_killed", folder.path(), false);
        let lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let mut ids = lines.filter_map(|line| line.strip_prefix("acknowledged ").map(str::to_owned));
        acknowledged.extend(ids.by_ref().take(100 * round));
        // SIGKILL, in the middle of more votes; what was printed meanwhile was acknowledged too.
        child.kill().unwrap();
        acknowledged.extend(ids);
        child.wait().unwrap();
    }
    assert!(acknowledged.len() >= 600, "{}", acknowledged.len());
    let lab = Lab::open(&path, ARMS);
    for id in &acknowledged {
        let votes = lab.experiments.votes(id).await.unwrap();
        assert_eq!(votes.len(), 1, "{id} was acknowledged");
    }
    let whole: String = rusqlite::Connection::open(&path)
        .unwrap()
        .pragma_query_value(None, "integrity_check", |row| row.get(0))
        .unwrap();
    assert_eq!(whole, "ok");
}

#[cfg(unix)]
#[tokio::test]
async fn child_in_a_read_only_folder() {
    use std::os::unix::fs::PermissionsExt;
    let Some(folder) = folder_of_child() else { return };
    let allow = |mode| fs::set_permissions(&folder, fs::Permissions::from_mode(mode)).unwrap();
    allow(0o555);
    let lab = Lab::open(&folder.join("state/experiments.db"), ARMS);
    assert_eq!(lab.accept("a").await, Err(VoteError::Unavailable(Unavailable::ReadOnly)));
    assert!(lab.experiments.assign("coder", "ann", |_| true).is_some());
    allow(0o755);
    lab.accept("a").await.unwrap();

    let state = folder.join("state");
    let allow = |folder_mode, file_mode| {
        fs::set_permissions(state.join("experiments.db"), fs::Permissions::from_mode(file_mode)).unwrap();
        fs::set_permissions(&state, fs::Permissions::from_mode(folder_mode)).unwrap();
    };
    drop(lab);
    allow(0o555, 0o444);
    let lab = Lab::open(&state.join("experiments.db"), ARMS);
    assert_eq!(lab.accept("b").await, Err(VoteError::Unavailable(Unavailable::ReadOnly)));
    allow(0o755, 0o644);
    lab.accept("b").await.unwrap();
    println!("\nrecovered");
}

#[cfg(unix)]
#[test]
fn a_read_only_folder_refuses_votes_with_the_cause_and_recovers() {
    use std::os::unix::fs::{PermissionsExt, chown};
    let folder = tempfile::tempdir().unwrap();
    // An administrator may write anywhere: the child becomes somebody who may not.
    let privileged = chown(folder.path(), Some(65534), Some(65534)).is_ok();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let output = child("child_in_a_read_only_folder", folder.path(), privileged).wait_with_output().unwrap();
    let output = String::from_utf8_lossy(&output.stdout);
    assert!(output.lines().any(|line| line == "recovered"), "{output}");
}
