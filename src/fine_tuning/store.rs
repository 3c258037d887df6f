//! Jobs on disk: a folder for each, with its record, its events, and what its trainer reads and writes.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::PathBuf;

use super::job::{Event, Job};
use super::recipe;
use crate::atomic_file::write_atomically;

const RECORD: &str = "job.json";
const EVENTS: &str = "events.jsonl";
/// Where the trainer puts its checkpoint and then the adapter.
const ADAPTER: &str = "adapter";

#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
}

impl Store {
    /// Opens or makes the folder; and the jobs in it.
    pub fn open(dir: PathBuf) -> io::Result<(Self, BTreeMap<String, Job>)> {
        fs::create_dir_all(&dir)?;
        let mut jobs = BTreeMap::new();
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path().join(RECORD);
            let record = match fs::read(&path) {
                Ok(record) => record,
                // It was never there for a client: its making was cut off.
                Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => continue,
                Err(e) => return Err(e),
            };
            match serde_json::from_slice::<Job>(&record) {
                Ok(job) => _ = jobs.insert(job.id.clone(), job),
                Err(e) => tracing::error!("the record {} of a fine-tuning job is damaged: {e}", path.display()),
            }
        }
        Ok((Self { dir }, jobs))
    }

    pub fn folder(&self, id: &str) -> PathBuf {
        self.dir.join(id)
    }

    pub fn recipe(&self, id: &str) -> PathBuf {
        self.folder(id).join(recipe::FILE)
    }

    pub fn adapter(&self, id: &str) -> PathBuf {
        self.folder(id).join(ADAPTER)
    }

    pub fn save(&self, job: &Job) -> io::Result<()> {
        let record = serde_json::to_vec_pretty(job).map_err(io::Error::other)?;
        write_atomically(&self.folder(&job.id), RECORD, &record)
    }

    pub fn append(&self, id: &str, event: &Event) -> io::Result<()> {
        let mut line = serde_json::to_vec(event).map_err(io::Error::other)?;
        line.push(b'\n');
        OpenOptions::new().create(true).append(true).open(self.folder(id).join(EVENTS))?.write_all(&line)
    }

    /// In order of time. A line that a power cut left unfinished is passed over, and keeps its place.
    pub fn events(&self, id: &str) -> io::Result<Vec<(usize, Event)>> {
        let text = match fs::read(self.folder(id).join(EVENTS)) {
            Err(e) if e.kind() == ErrorKind::NotFound => Vec::new(),
            read => read?,
        };
        let lines = text.split(|byte| *byte == b'\n').enumerate();
        Ok(lines.filter_map(|(index, line)| Some((index, serde_json::from_slice(line).ok()?))).collect())
    }

    /// Removes what only training needs.
    pub fn clear(&self, id: &str) {
        let removed = [
            fs::remove_dir_all(self.adapter(id)),
            fs::remove_file(self.folder(id).join(recipe::TRAINING_FILE)),
            fs::remove_file(self.folder(id).join(recipe::VALIDATION_FILE)),
        ];
        let failures = removed.into_iter().filter_map(Result::err).filter(|e| e.kind() != ErrorKind::NotFound);
        failures.for_each(|e| tracing::warn!("fine-tuning job {id}: files of its training cannot be removed: {e}"));
    }
}
