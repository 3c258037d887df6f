//! Jobs on disk: a folder for each, with its record, its events, and what its trainer reads and writes.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use super::job::{Event, Job};
use super::recipe;
use crate::atomic_file::{sync_folder, write_atomically};

pub const ID_PREFIX: &str = "ftjob-";
const RECORD: &str = "job.json";
const EVENTS: &str = "events.jsonl";
/// Where the trainer puts its checkpoint and then the adapter.
const ADAPTER: &str = "adapter";
/// Where an adapter is kept that could not be installed.
const KEPT: &str = "trained";

#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
}

impl Store {
    /// Opens or makes the folder; and the jobs in it. Removes what jobs have left that have ended, or were never whole.
    pub fn open(dir: PathBuf) -> io::Result<(Self, BTreeMap<String, Job>)> {
        fs::create_dir_all(&dir)?;
        let mut jobs = BTreeMap::new();
        for entry in fs::read_dir(&dir)? {
            let folder = entry?.path();
            let path = folder.join(RECORD);
            let record = match fs::read(&path) {
                Ok(record) => record,
                Err(e) if e.kind() == ErrorKind::NotFound => {
                    remove_cut_off(&folder);
                    continue;
                }
                Err(e) if e.kind() == ErrorKind::NotADirectory => continue,
                Err(e) => return Err(e),
            };
            match serde_json::from_slice::<Job>(&record) {
                Ok(job) => _ = jobs.insert(job.id.clone(), job),
                Err(e) => tracing::error!("the record {} of a fine-tuning job is damaged: {e}", path.display()),
            }
        }
        let store = Self { dir };
        jobs.values().filter(|job| job.status.is_final()).for_each(|job| store.clear(&job.id));
        Ok((store, jobs))
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

    /// Puts the adapter where nothing removes it. Returns its folder.
    pub fn keep_adapter(&self, id: &str) -> io::Result<PathBuf> {
        let kept = self.folder(id).join(KEPT);
        // Of the same job, which ran again: its end could not be written.
        if kept.exists() {
            fs::remove_dir_all(&kept)?;
        }
        fs::rename(self.adapter(id), &kept)?;
        for entry in fs::read_dir(&kept)? {
            File::open(entry?.path())?.sync_all()?;
        }
        sync_folder(&kept)?;
        sync_folder(&self.folder(id))?;
        Ok(kept)
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

/// A job that was never there for a client: its making was cut off. What is not named as a job is somebody else's.
fn remove_cut_off(folder: &Path) {
    let is_job = folder.file_name().is_some_and(|name| name.to_string_lossy().starts_with(ID_PREFIX));
    if is_job && let Err(e) = fs::remove_dir_all(folder) {
        tracing::warn!("what was left of the making of a job cannot be removed: {}: {e}", folder.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fine_tuning::job::{Hyperparameters, Method, Status};

    fn job(id: &str, status: Status) -> Job {
        Job {
            id: id.to_owned(),
            created_at: 1,
            finished_at: None,
            status,
            model: "m".to_owned(),
            adapter: "ft-1".to_owned(),
            generation: None,
            training_file: "file-1".to_owned(),
            validation_file: None,
            max_validation: None,
            seed: 1,
            method: Method::Supervised,
            hyperparameters: Hyperparameters::default(),
            metadata: None,
            trained_tokens: None,
            error: None,
            checkpoint: None,
        }
    }

    fn names(folder: &Path) -> Vec<String> {
        let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn what_a_stop_has_left_of_jobs_that_are_over_is_gone_at_the_next_start() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_owned();
        let (store, _) = Store::open(path.clone()).unwrap();
        for (id, status) in [("ftjob-1", Status::Cancelled), ("ftjob-2", Status::Running)] {
            store.save(&job(id, status)).unwrap();
            fs::create_dir(store.adapter(id)).unwrap();
            fs::write(store.folder(id).join(recipe::TRAINING_FILE), "").unwrap();
        }
        // Cut off before its record was there; and what nobody has put there as a job.
        for folder in ["ftjob-3", "other"] {
            fs::create_dir(path.join(folder)).unwrap();
            fs::write(path.join(folder).join(recipe::TRAINING_FILE), "").unwrap();
        }
        let (store, jobs) = Store::open(path.clone()).unwrap();
        assert_eq!(jobs.keys().collect::<Vec<_>>(), ["ftjob-1", "ftjob-2"]);
        assert_eq!(names(&path), ["ftjob-1", "ftjob-2", "other"]);
        assert_eq!(names(&store.folder("ftjob-1")), ["job.json"]);
        assert_eq!(names(&store.folder("ftjob-2")), ["adapter", "job.json", "training.jsonl"]);
    }

    #[test]
    fn an_adapter_that_is_kept_outlasts_what_is_cleared() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(dir.path().to_owned()).unwrap();
        store.save(&job("ftjob-1", Status::Failed)).unwrap();
        fs::create_dir(store.adapter("ftjob-1")).unwrap();
        fs::write(store.adapter("ftjob-1").join("weights"), "w").unwrap();
        store.keep_adapter("ftjob-1").unwrap();
        fs::create_dir(store.adapter("ftjob-1")).unwrap();
        fs::write(store.adapter("ftjob-1").join("weights"), "w2").unwrap();
        let kept = store.keep_adapter("ftjob-1").unwrap();
        store.clear("ftjob-1");
        Store::open(dir.path().to_owned()).unwrap();
        assert_eq!(fs::read_to_string(kept.join("weights")).unwrap(), "w2");
    }
}
