//! Checks of candidates beside requests.

use super::*;
use crate::experiments::{Asked, Candidate, Outcome, Record, Stage, Vote, VoteKind, prompt_hash, user_hash};

async fn start(folder: &Path) -> Server {
    let run = |name: &str| {
        format!(
            "[[run]]\nname = '{name}'\nalias = 'alias-{name}'\nkeep_prompts_mib = 1
             arms = [{{name = 'base', model = '{BASE}', weight = 1}},
             {{name = 'tuned', model = 'x', weight = 1, canary = true}}]
             bounds = {{min_samples = 1}}\npromotion = {{min_pairs = 6, min_shown = 1, test = 0.4}}\n"
        )
    };
    let path = folder.join("experiments.db");
    let head = format!("path = '{}'\nmax_mib = 1\nmax_queued = 64\nkeep_text = true\n", path.display());
    Server::start_with(&["<|end|>"], Duration::ZERO, &(head + &run("one") + &run("two"))).await
}

/// Has users accept replies to their prompts, of which some are held out.
async fn accept(server: &Server, experiment: &str) {
    for user in 0..40 {
        let (id, prompt) = (format!("cmpl-{user}"), json!([user.to_string()]).to_string());
        server.experiments.record(Record {
            experiment: Some(experiment.to_owned()),
            model: BASE.to_owned(),
            outcome: Outcome::Completed,
            prompt_hash: Some(prompt_hash(&prompt)),
            text: Some("abc".to_owned()),
            asked: Some(Asked { prompt, user_hash: Some(user_hash(&user.to_string())) }),
            ..Record::begin(&id, "base")
        });
        let vote = Vote { id, user: String::new(), kind: VoteKind::Accepted, arm: None, text: None };
        server.experiments.vote(vote).await.unwrap();
    }
}

/// What becomes of it, and why.
async fn latest(server: &Server, experiment: &str) -> (Stage, String) {
    let promotion = server.experiments.report(experiment).await.unwrap().unwrap().promotion.unwrap();
    (promotion.stage, promotion.steps.last().and_then(|step| step.cause.clone()).unwrap_or_default())
}

async fn until_refused(server: &Server, experiment: &str) -> String {
    let polled = async {
        loop {
            match latest(server, experiment).await {
                (Stage::Refused, cause) => return cause,
                _ => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), polled).await.expect("it is refused")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_waits_for_room_and_holds_nobody_up_once_it_is_withdrawn() {
    let folder = tempfile::tempdir().unwrap();
    let server = start(folder.path()).await;
    accept(&server, "one").await;
    // Half of the places are free, and no more than are to be left.
    let taken = [server.engine.try_permit().unwrap(), server.engine.try_permit().unwrap()];
    let candidate = || Candidate { adapter: "no-such".to_owned(), generation: "g".to_owned(), trained: None };
    server.experiments.promote("one", candidate()).await.unwrap();
    server.experiments.promote("two", candidate()).await.unwrap();
    server.experiments.reset("one").await.unwrap();
    let cause = until_refused(&server, "two").await;
    assert!(cause.starts_with("0 held-out pairs fit"), "{cause}");
    assert_eq!(latest(&server, "one").await.0, Stage::Withdrawn, "it has waited, and is not installed");

    // One that is not withdrawn is checked as soon as there is room.
    server.experiments.promote("one", candidate()).await.unwrap();
    drop(taken);
    let cause = until_refused(&server, "one").await;
    assert!(cause.contains("`no-such` does not exist"), "{cause}");
}
