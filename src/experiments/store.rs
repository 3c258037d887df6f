//! The SQLite file: requests, votes, and what became of canaries.
//!
//! One writer in WAL mode, with a sync at each commit: what was committed is there after `kill -9` and after a power cut.
//! Readers open their own connection and block nobody.

use std::io;
use std::path::Path;
use std::time::Duration;

use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ToSql, ToSqlOutput, ValueRef};
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, Transaction, TransactionBehavior, params};

use super::canary::{CanaryStatus, RollBack};
use super::promotion::Promotion;
use super::vote::{Outcome, Record, StoredVote, Vote, VoteKind};

/// Step `n` brings a file of `user_version` `n` to `n + 1`. Never change one that was released: add another.
const MIGRATIONS: &[&str] = &[
    "
    CREATE TABLE requests (
        id TEXT NOT NULL, arm TEXT NOT NULL, experiment TEXT, model TEXT NOT NULL, generation TEXT,
        shadow INTEGER NOT NULL, outcome TEXT NOT NULL, prompt_hash INTEGER, ttft_ms REAL, tpot_ms REAL,
        prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, text TEXT, created_ms INTEGER NOT NULL,
        PRIMARY KEY (id, arm)
    ) WITHOUT ROWID;
    CREATE INDEX requests_by_arm ON requests (experiment, arm, created_ms) WHERE experiment IS NOT NULL;
    CREATE TABLE votes (
        id TEXT NOT NULL, user TEXT NOT NULL, sort TEXT NOT NULL, kind TEXT NOT NULL, arm TEXT, text TEXT,
        created_ms INTEGER NOT NULL,
        PRIMARY KEY (id, user, sort)
    ) WITHOUT ROWID;
    CREATE INDEX winners ON votes (sort) WHERE sort = 'winner';
    CREATE TABLE canaries (
        experiment TEXT PRIMARY KEY, definition TEXT NOT NULL, since_ms INTEGER NOT NULL, rolled_back_ms INTEGER, cause TEXT
    ) WITHOUT ROWID;
    ",
    "
    ALTER TABLE requests ADD COLUMN has_prompt INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE requests ADD COLUMN user_hash INTEGER;
    CREATE TABLE prompts (
        experiment TEXT NOT NULL, hash INTEGER NOT NULL, asked_ms INTEGER NOT NULL, bytes INTEGER NOT NULL,
        prompt TEXT NOT NULL,
        PRIMARY KEY (experiment, hash)
    ) WITHOUT ROWID;
    CREATE INDEX prompts_by_age ON prompts (experiment, asked_ms, bytes);
    ",
    "
    CREATE TABLE promotions (
        number INTEGER PRIMARY KEY, experiment TEXT NOT NULL, id TEXT NOT NULL, definition TEXT NOT NULL,
        record TEXT NOT NULL,
        UNIQUE (experiment, id)
    );
    ",
];

/// What users think of a reply, by one vote: the latest judgement, of whomever; a view, where there is none.
const OPINION: &str = "SELECT v.kind FROM votes v";
const LATEST_OPINION: &str = "AND v.sort <> 'winner' ORDER BY v.sort = 'view', v.created_ms DESC, v.user DESC LIMIT 1";

/// How long to wait for another process that writes.
const BUSY_TIMEOUT: Duration = Duration::from_secs(2);

/// For the log; what a client may know of it is [`Unavailable`].
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("its folder cannot be made: {0}")]
    Folder(#[from] io::Error),
    #[error(transparent)]
    Sqlite(#[from] rusqlite::Error),
    #[error("it has version {found}, and this lorry knows up to {known}")]
    Newer { found: u32, known: u32 },
}

/// Why votes cannot be recorded or read at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    #[error("the experiments database or its disk is full: free some space, or raise experiments.max_mib")]
    Full,
    #[error("the experiments database is read-only: make its file and folder writable")]
    ReadOnly,
    #[error("the experiments database cannot be opened: check experiments.path and who may write there")]
    CannotOpen,
    #[error("the disk under the experiments database fails: the server's log says how")]
    Disk,
    #[error("the experiments database is damaged: move it away, and a new one is made")]
    Damaged,
    #[error(
        "the experiments database was written by a newer lorry: update this one, or choose another experiments.path"
    )]
    Newer,
    #[error("the experiments database is busy: try again shortly")]
    Busy,
    #[error("the experiments database failed: the server's log says why")]
    Failed,
}

impl From<&StoreError> for Unavailable {
    fn from(error: &StoreError) -> Self {
        match error {
            StoreError::Newer { .. } => Self::Newer,
            StoreError::Folder(e) => match e.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full,
                io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => Self::ReadOnly,
                _ => Self::CannotOpen,
            },
            StoreError::Sqlite(e) => match e.sqlite_error_code() {
                Some(ErrorCode::DiskFull) => Self::Full,
                Some(ErrorCode::ReadOnly | ErrorCode::PermissionDenied) => Self::ReadOnly,
                Some(ErrorCode::CannotOpen) => Self::CannotOpen,
                Some(ErrorCode::SystemIoFailure) => Self::Disk,
                Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => Self::Damaged,
                Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Self::Busy,
                _ => Self::Failed,
            },
        }
    }
}

/// A past request, as far as a canary's bounds go.
#[derive(Debug, Clone, PartialEq)]
pub struct PastRequest {
    pub id: String,
    pub generation: Option<String>,
    pub outcome: Outcome,
    pub ttft_ms: Option<f64>,
    pub shown: bool,
    pub accepted: bool,
}

/// The one connection that writes.
#[derive(Debug)]
pub struct Store(Connection);

impl Store {
    /// Opens or makes the file, and brings it to the latest version.
    pub fn open(path: &Path, max_mib: u32) -> Result<Self, StoreError> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let mut connection = Connection::open(path)?;
        connection.busy_timeout(BUSY_TIMEOUT)?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        overwrite_what_is_deleted(&connection)?;
        let page_size: u32 = connection.pragma_query_value(None, "page_size", |row| row.get(0))?;
        let max_pages = ((i64::from(max_mib) << 20) / i64::from(page_size)).min(i64::from(u32::MAX - 1));
        // Answers with a row, the limit in force, as `pragma_update` does not expect.
        connection.pragma_update_and_check(None, "max_page_count", max_pages, |_| Ok(()))?;
        migrate(&mut connection)?;
        Ok(Self(connection))
    }

    /// For reading beside the writer; `None` while there is no file.
    pub fn open_for_reading(path: &Path) -> Result<Option<Self>, StoreError> {
        if !path.exists() {
            return Ok(None);
        }
        // Not read-only: the first reader after a crash must replay the log.
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let mut connection = Connection::open_with_flags(path, flags)?;
        connection.busy_timeout(BUSY_TIMEOUT)?;
        overwrite_what_is_deleted(&connection)?;
        migrate(&mut connection)?;
        Ok(Some(Self(connection)))
    }

    /// Everything in `write` or, after an error, nothing.
    pub fn transaction<T>(
        &mut self,
        write: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T>,
    ) -> Result<T, StoreError> {
        let transaction = self.0.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let written = write(&transaction)?;
        transaction.commit()?;
        Ok(written)
    }

    /// Moves everything from the log into the file, so that nothing that was deleted is left in the log. While somebody
    /// reads, that is for the next commit to do.
    pub(super) fn empty_log(&self) -> Result<(), StoreError> {
        Ok(self.0.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))?)
    }

    pub(super) fn connection(&self) -> &Connection {
        &self.0
    }

    /// The votes on an id, in order of time.
    pub fn votes(&self, id: &str) -> Result<Vec<StoredVote>, StoreError> {
        let mut statement = self.0.prepare(
            "SELECT kind, arm, text, user, created_ms FROM votes WHERE id = ?1 ORDER BY created_ms, user, sort",
        )?;
        let votes = statement.query_map([id], |row| {
            let user: String = row.get(3)?;
            let created_ms: i64 = row.get(4)?;
            Ok(StoredVote {
                kind: row.get(0)?,
                arm: row.get(1)?,
                text: row.get(2)?,
                user: Some(user).filter(|user| !user.is_empty()),
                created: created_ms / 1000,
            })
        })?;
        Ok(votes.collect::<Result<_, _>>()?)
    }

    /// The status of a canary, if it was kept for this very definition of its experiment.
    pub fn canary(&self, experiment: &str, definition: &str) -> Result<Option<CanaryStatus>, StoreError> {
        let query = "SELECT since_ms, rolled_back_ms, cause FROM canaries WHERE experiment = ?1 AND definition = ?2";
        let row = self.0.query_row(query, [experiment, definition], |row| {
            let (at, cause): (Option<i64>, Option<String>) = (row.get(1)?, row.get(2)?);
            let rolled_back = at.zip(cause).map(|(at_ms, cause)| RollBack { at_ms, cause });
            Ok(CanaryStatus { since_ms: row.get(0)?, rolled_back })
        });
        Ok(row.optional()?)
    }

    /// What users think of a reply: their latest judgement, else that it was viewed.
    pub fn opinion(&self, id: &str) -> Result<Option<VoteKind>, StoreError> {
        let mut statement = self.0.prepare(&format!("{OPINION} WHERE v.id = ?1 {LATEST_OPINION}"))?;
        Ok(statement.query_row([id], |row| row.get(0)).optional()?)
    }

    /// The latest promotion, if it was begun under this very definition of its experiment.
    pub fn promotion(&self, experiment: &str, definition: &str) -> Result<Option<Promotion>, StoreError> {
        let query = "SELECT record, definition FROM promotions WHERE experiment = ?1 ORDER BY number DESC LIMIT 1";
        let row = self.0.query_row(query, [experiment], |row| Ok((row.get(0)?, row.get::<_, String>(1)?)));
        Ok(row.optional()?.filter(|(_, of)| of == definition).map(|(promotion, _)| promotion))
    }

    /// All of them, the latest first.
    pub fn promotions(&self, experiment: &str) -> Result<Vec<Promotion>, StoreError> {
        let query = "SELECT record FROM promotions WHERE experiment = ?1 ORDER BY number DESC";
        let mut statement = self.0.prepare(query)?;
        Ok(statement.query_map([experiment], |row| row.get(0))?.collect::<Result<_, _>>()?)
    }

    /// The latest `limit` served requests since `since_ms`, in order of time: those of `arm`, or of every arm but it.
    pub fn past_requests(
        &self,
        experiment: &str,
        arm: &str,
        of_others: bool,
        since_ms: i64,
        limit: usize,
    ) -> Result<Vec<PastRequest>, StoreError> {
        let query = format!(
            "SELECT id, generation, outcome, ttft_ms, ({OPINION} WHERE v.id = r.id {LATEST_OPINION})
             FROM requests r
             WHERE experiment = ?1 AND (arm <> ?2) = ?3 AND NOT shadow AND created_ms >= ?4
             ORDER BY created_ms DESC LIMIT ?5"
        );
        let mut statement = self.0.prepare(&query)?;
        let requests = statement.query_map(params![experiment, arm, of_others, since_ms, limit as i64], |row| {
            let opinion: Option<VoteKind> = row.get(4)?;
            Ok(PastRequest {
                id: row.get(0)?,
                generation: row.get(1)?,
                outcome: row.get(2)?,
                ttft_ms: row.get(3)?,
                shown: opinion.is_some(),
                accepted: opinion == Some(VoteKind::Accepted),
            })
        })?;
        let mut requests: Vec<PastRequest> = requests.collect::<Result<_, _>>()?;
        requests.reverse();
        Ok(requests)
    }
}

pub fn insert_record(transaction: &Transaction<'_>, record: &Record, created_ms: i64) -> rusqlite::Result<()> {
    let mut statement = transaction.prepare(
        "INSERT INTO requests (id, arm, experiment, model, generation, shadow, outcome, prompt_hash, ttft_ms, tpot_ms,
             prompt_tokens, completion_tokens, text, created_ms, has_prompt, user_hash)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16)
         ON CONFLICT (id, arm) DO NOTHING",
    )?;
    statement.execute(params![
        record.id,
        record.arm,
        record.experiment,
        record.model,
        record.generation,
        record.shadow,
        record.outcome,
        record.prompt_hash,
        record.ttft_ms,
        record.tpot_ms,
        record.prompt_tokens,
        record.completion_tokens,
        record.text,
        created_ms,
        record.asked.is_some(),
        record.asked.as_ref().and_then(|asked| asked.user_hash),
    ])?;
    if let (Some(asked), Some(experiment), Some(hash)) = (&record.asked, &record.experiment, record.prompt_hash) {
        let mut statement = transaction.prepare(
            "INSERT INTO prompts (experiment, hash, asked_ms, bytes, prompt) VALUES (?1, ?2, ?3, ?4, ?5)
             ON CONFLICT (experiment, hash) DO UPDATE SET asked_ms = excluded.asked_ms",
        )?;
        let bytes = asked.prompt.len() as i64;
        statement.execute(params![experiment, hash, created_ms, bytes, asked.prompt])?;
    }
    Ok(())
}

/// Lets the prompts go that were not asked for longest, where an experiment has more than `max_bytes` of them.
pub fn trim_prompts(transaction: &Transaction<'_>, experiment: &str, max_bytes: u64) -> rusqlite::Result<()> {
    let max_bytes = i64::try_from(max_bytes).unwrap_or(i64::MAX);
    let query = "SELECT COALESCE(SUM(bytes), 0) FROM prompts WHERE experiment = ?1";
    let kept_bytes: i64 = transaction.query_row(query, [experiment], |row| row.get(0))?;
    if kept_bytes > max_bytes {
        // Some more than must go, so that not each of the next requests has to make room.
        transaction.execute(
            "DELETE FROM prompts WHERE experiment = ?1 AND hash IN (
                 SELECT hash FROM (
                     SELECT hash, SUM(bytes) OVER (ORDER BY asked_ms DESC, hash) AS bytes_up_to
                     FROM prompts WHERE experiment = ?1
                 ) WHERE bytes_up_to > ?2
             )",
            params![experiment, max_bytes - max_bytes / 8],
        )?;
    }
    Ok(())
}

pub fn insert_vote(transaction: &Transaction<'_>, vote: &Vote, created_ms: i64) -> rusqlite::Result<()> {
    let mut statement = transaction.prepare(
        "INSERT INTO votes (id, user, sort, kind, arm, text, created_ms) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)
         ON CONFLICT (id, user, sort) DO UPDATE
         SET kind = excluded.kind, arm = excluded.arm, text = excluded.text, created_ms = excluded.created_ms",
    )?;
    statement.execute(params![vote.id, vote.user, vote.kind.sort(), vote.kind, vote.arm, vote.text, created_ms])?;
    Ok(())
}

/// The arms that were shown under an id; empty if none was recorded.
pub fn arms_of(transaction: &Transaction<'_>, id: &str) -> rusqlite::Result<Vec<String>> {
    let mut statement = transaction.prepare("SELECT arm FROM requests WHERE id = ?1 AND NOT shadow ORDER BY arm")?;
    statement.query_map([id], |row| row.get(0))?.collect()
}

/// `definition` is the experiment as it is configured: under another one, the canary begins anew.
pub fn save_canary(
    transaction: &Transaction<'_>,
    experiment: &str,
    definition: &str,
    status: &CanaryStatus,
) -> rusqlite::Result<()> {
    let rolled_back = status.rolled_back.as_ref();
    transaction.execute(
        "INSERT OR REPLACE INTO canaries (experiment, definition, since_ms, rolled_back_ms, cause)
         VALUES (?1, ?2, ?3, ?4, ?5)",
        params![
            experiment,
            definition,
            status.since_ms,
            rolled_back.map(|rolled_back| rolled_back.at_ms),
            rolled_back.map(|rolled_back| &rolled_back.cause)
        ],
    )?;
    Ok(())
}

/// `definition` as for [`save_canary`].
pub fn save_promotion(
    transaction: &Transaction<'_>,
    experiment: &str,
    definition: &str,
    promotion: &Promotion,
) -> rusqlite::Result<()> {
    transaction.execute(
        "INSERT INTO promotions (experiment, id, definition, record) VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT (experiment, id) DO UPDATE SET record = excluded.record",
        params![experiment, promotion.id, definition, promotion],
    )?;
    Ok(())
}

impl ToSql for Promotion {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        let record = serde_json::to_string(self).map_err(|e| rusqlite::Error::ToSqlConversionFailure(Box::new(e)))?;
        Ok(record.into())
    }
}

impl FromSql for Promotion {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        serde_json::from_str(value.as_str()?).map_err(|e| FromSqlError::Other(Box::new(e)))
    }
}

impl Outcome {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

impl ToSql for Outcome {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(self.name().into())
    }
}

impl FromSql for Outcome {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        let name = value.as_str()?;
        let known = [Self::Completed, Self::Failed, Self::Cancelled].into_iter().find(|known| known.name() == name);
        known.ok_or(FromSqlError::InvalidType)
    }
}

impl ToSql for VoteKind {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(self.name().into())
    }
}

impl FromSql for VoteKind {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        Self::parse(value.as_str()?).ok_or(FromSqlError::InvalidType)
    }
}

/// Texts of users must not stay behind in free pages.
fn overwrite_what_is_deleted(connection: &Connection) -> rusqlite::Result<()> {
    // Answers with a row.
    connection.pragma_update_and_check(None, "secure_delete", "ON", |_| Ok(()))
}

/// All steps and the new version in one transaction: a crash leaves the file as it was.
fn migrate(connection: &mut Connection) -> Result<(), StoreError> {
    let known = MIGRATIONS.len() as u32;
    let version = |connection: &Connection| connection.pragma_query_value(None, "user_version", |row| row.get(0));
    // The usual case, without a lock.
    if version(connection)? == known {
        return Ok(());
    }
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let found = version(&transaction)?;
    for step in MIGRATIONS.get(found as usize..).ok_or(StoreError::Newer { found, known })? {
        transaction.execute_batch(step)?;
    }
    transaction.pragma_update(None, "user_version", known)?;
    transaction.commit()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experiments::vote::{Asked, prompt_hash};

    fn asked(id: &str, prompt: &str) -> Record {
        let asked = Some(Asked { prompt: prompt.to_owned(), user_hash: Some(7) });
        let (experiment, prompt_hash) = (Some("e".to_owned()), Some(prompt_hash(prompt)));
        Record { experiment, prompt_hash, asked, ..Record::begin(id, "base") }
    }

    fn prompts(store: &Store) -> Vec<String> {
        let mut statement = store.connection().prepare("SELECT prompt FROM prompts ORDER BY asked_ms").unwrap();
        statement.query_map([], |row| row.get(0)).unwrap().collect::<Result<_, _>>().unwrap()
    }

    #[test]
    fn a_file_of_the_first_version_is_brought_up_with_what_it_has() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("experiments.db");
        let first = Connection::open(&path).unwrap();
        first.execute_batch(MIGRATIONS[0]).unwrap();
        first.pragma_update(None, "user_version", 1).unwrap();
        let request = "INSERT INTO requests (id, arm, experiment, model, shadow, outcome, prompt_tokens, completion_tokens, created_ms)
            VALUES ('old', 'base', 'e', 'm', 0, 'completed', 1, 1, 5)";
        first.execute_batch(request).unwrap();
        drop(first);
        let mut store = Store::open(&path, 1).unwrap();
        store.transaction(|transaction| insert_record(transaction, &asked("new", "p"), 6)).unwrap();
        let past = store.past_requests("e", "base", false, 0, 10).unwrap();
        assert_eq!(past.iter().map(|request| request.id.as_str()).collect::<Vec<_>>(), ["old", "new"]);
        assert_eq!(prompts(&store), ["p"]);
    }

    #[test]
    fn the_prompts_that_were_asked_for_last_are_kept_within_their_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(&folder.path().join("experiments.db"), 1).unwrap();
        // Eight of ten bytes each, the first of them again at the end.
        let numbers = (0..8).chain([0]);
        store
            .transaction(|transaction| {
                for (at_ms, number) in numbers.enumerate() {
                    let record = asked(&at_ms.to_string(), &format!("prompt {number:03}"));
                    insert_record(transaction, &record, at_ms as i64)?;
                }
                trim_prompts(transaction, "other", 0)?;
                trim_prompts(transaction, "e", 80)
            })
            .unwrap();
        assert_eq!(prompts(&store).len(), 8, "they fit");
        store.transaction(|transaction| trim_prompts(transaction, "e", 79)).unwrap();
        let kept = ["prompt 002", "prompt 003", "prompt 004", "prompt 005", "prompt 006", "prompt 007", "prompt 000"];
        assert_eq!(prompts(&store), kept);
        store.transaction(|transaction| trim_prompts(transaction, "e", 40)).unwrap();
        assert_eq!(
            prompts(&store),
            ["prompt 006", "prompt 007", "prompt 000"],
            "seven eighths of what there is room for"
        );
        store.transaction(|transaction| trim_prompts(transaction, "e", 0)).unwrap();
        assert!(prompts(&store).is_empty());
    }
}
