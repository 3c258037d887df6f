//! What became of the replies of an experiment, out of the file alone: no server needs to run, and one may.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::store::{Store, StoreError};
use super::vote::{Outcome, VoteKind, user_hash};

/// A reply that a user has judged, by the latest judgement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JudgedReply {
    /// Accepted, rejected or edited.
    pub kind: VoteKind,
    pub outcome: Outcome,
    /// A list in JSON with the one prompt, as the client sent it; `None` where it was not kept, or has gone.
    pub prompt: Option<String>,
    /// `None` where outputs are not kept.
    pub output: Option<String>,
    pub edited_to: Option<String>,
    /// From [`user_hash`], of whoever asked, else of whoever judged; `None` where nothing says who that was.
    pub user_hash: Option<i64>,
}

/// Why nothing can be read, or taken, out of a file.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("{} is not there: no experiment has been recorded, or experiments.path is another", .0.display())]
    Missing(PathBuf),
    #[error("{} has nothing of an experiment {name:?}; the experiments in it: {}", .path.display(), .known.join(", "))]
    UnknownExperiment { path: PathBuf, name: String, known: Vec<String> },
    #[error("{}: {cause}", .path.display())]
    Store { path: PathBuf, cause: StoreError },
}

/// The judged replies of `experiment` that users saw, in order of time.
///
/// # Errors
/// The file is not there, knows nothing of the experiment, or cannot be read.
pub fn judged_replies(path: &Path, experiment: &str) -> Result<Vec<JudgedReply>, FileError> {
    let store = open(path, experiment)?;
    read(&store, experiment).map_err(|cause| FileError::Store { path: path.to_owned(), cause: cause.into() })
}

/// Deletes what users of `experiment` sent, were answered and said of it, and how many requests that were. Whether its
/// canary was rolled back stays: forgetting is no second chance.
///
/// # Errors
/// As of [`judged_replies`], or the file cannot be written; nothing has changed then.
pub fn forget(path: &Path, experiment: &str) -> Result<usize, FileError> {
    let mut store = open(path, experiment)?;
    delete(&mut store, experiment).map_err(|cause| FileError::Store { path: path.to_owned(), cause })
}

fn open(path: &Path, experiment: &str) -> Result<Store, FileError> {
    let failed = |cause| FileError::Store { path: path.to_owned(), cause };
    let store = Store::open_for_reading(path).map_err(failed)?.ok_or_else(|| FileError::Missing(path.to_owned()))?;
    let known = known_experiments(&store).map_err(|cause| failed(cause.into()))?;
    if known.iter().any(|known| known == experiment) {
        return Ok(store);
    }
    Err(FileError::UnknownExperiment { path: path.to_owned(), name: experiment.to_owned(), known })
}

fn known_experiments(store: &Store) -> rusqlite::Result<Vec<String>> {
    let query = "SELECT DISTINCT experiment FROM requests WHERE experiment IS NOT NULL ORDER BY experiment";
    store.connection().prepare(query)?.query_map([], |row| row.get(0))?.collect()
}

fn read(store: &Store, experiment: &str) -> rusqlite::Result<Vec<JudgedReply>> {
    let mut statement = store.connection().prepare(
        "SELECT r.id, v.kind, r.outcome, p.prompt, r.text, v.text, r.user_hash, v.user
         FROM requests r
         JOIN votes v ON v.id = r.id AND v.sort = 'judgement'
         LEFT JOIN prompts p ON r.has_prompt AND p.experiment = r.experiment AND p.hash = r.prompt_hash
         WHERE r.experiment = ?1 AND NOT r.shadow ORDER BY v.created_ms, r.id, v.user",
    )?;
    let mut rows = statement.query([experiment])?;
    let (mut replies, mut places) = (Vec::new(), HashMap::new());
    while let Some(row) = rows.next()? {
        let judged_by: String = row.get(7)?;
        let judged_by = Some(judged_by).filter(|user| !user.is_empty());
        let reply = JudgedReply {
            kind: row.get(1)?,
            outcome: row.get(2)?,
            prompt: row.get(3)?,
            output: row.get(4)?,
            edited_to: row.get(5)?,
            user_hash: row.get::<_, Option<i64>>(6)?.or_else(|| judged_by.as_deref().map(user_hash)),
        };
        // A later judgement replaces an earlier one, as in reports.
        let place = *places.entry(row.get::<_, String>(0)?).or_insert(replies.len());
        match replies.get_mut(place) {
            Some(earlier) => *earlier = reply,
            None => replies.push(reply),
        }
    }
    Ok(replies)
}

fn delete(store: &mut Store, experiment: &str) -> Result<usize, StoreError> {
    let deleted = store.transaction(|transaction| {
        let requests = "SELECT id FROM requests WHERE experiment = ?1";
        transaction.execute(&format!("DELETE FROM votes WHERE id IN ({requests})"), [experiment])?;
        transaction.execute("DELETE FROM prompts WHERE experiment = ?1", [experiment])?;
        transaction.execute("DELETE FROM requests WHERE experiment = ?1", [experiment])
    })?;
    store.empty_log()?;
    Ok(deleted)
}
