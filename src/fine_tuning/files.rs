//! Uploaded files: in a folder, each beside a record of what it is. They never change.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use super::ids::next_id;
use crate::atomic_file::{sync_folder, write_atomically};

const ID_PREFIX: &str = "file-";
const RECORD: &str = "json";
const CONTENT: &str = "jsonl";

#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    #[error("there is no file {0:?}: GET /v1/files lists them")]
    Unknown(String),
    #[error("the files would take {bytes} bytes together, more than fine_tuning.max_files_mib: delete some")]
    Full { bytes: u64 },
    #[error("the folder of files cannot be changed: {0}")]
    Disk(#[from] io::Error),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// Sorts by the time of its making.
    pub id: String,
    pub bytes: u64,
    /// Unix seconds.
    pub created_at: u64,
    pub filename: String,
}

#[derive(Debug)]
pub struct Files {
    dir: PathBuf,
    max_bytes: u64,
    files: Mutex<BTreeMap<String, File>>,
}

impl Files {
    /// Opens or makes the folder, and removes what is left of uploads that never ended.
    pub fn open(dir: PathBuf, max_bytes: u64) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        let paths: Vec<PathBuf> = fs::read_dir(&dir)?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
        let mut files = BTreeMap::new();
        for path in paths.iter().filter(|path| path.extension().is_some_and(|extension| extension == RECORD)) {
            match serde_json::from_slice::<File>(&fs::read(path)?) {
                Ok(file) => _ = files.insert(file.id.clone(), file),
                Err(e) => tracing::error!("the record {} of an uploaded file is damaged: {e}", path.display()),
            }
        }
        for path in paths.iter().filter(|path| path.extension().is_some_and(|extension| extension != RECORD)) {
            let id = path.file_stem().unwrap_or_default().to_string_lossy();
            let is_damaged = path.with_extension(RECORD).exists();
            if !files.contains_key(&*id) && !is_damaged {
                fs::remove_file(path)?;
            }
        }
        Ok(Self { dir, max_bytes, files: Mutex::new(files) })
    }

    /// A file to write an upload into; gone again unless it is given to [`Files::add`].
    pub fn begin(&self) -> io::Result<NamedTempFile> {
        tempfile::Builder::new().prefix(".").suffix(".part").tempfile_in(&self.dir)
    }

    /// Keeps what was written into `content`. Blocks until the disk has it.
    ///
    /// # Errors
    /// There is no room for it, or it cannot be written.
    pub fn add(&self, content: NamedTempFile, filename: String) -> Result<File, FilesError> {
        let bytes = content.as_file().metadata()?.len();
        content.as_file().sync_all()?;
        let created_at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let mut files = self.lock();
        let together = files.values().map(|file| file.bytes).sum::<u64>() + bytes;
        if together > self.max_bytes {
            return Err(FilesError::Full { bytes: together });
        }
        let id = next_id(ID_PREFIX, files.keys().next_back().map(String::as_str));
        let file = File { id: id.clone(), bytes, created_at, filename };
        self.keep(content, &file)?;
        files.insert(id, file.clone());
        Ok(file)
    }

    /// Both its content and its record, or nothing: the room that is left is for others.
    fn keep(&self, content: NamedTempFile, file: &File) -> io::Result<()> {
        let record = serde_json::to_vec(file).map_err(io::Error::other)?;
        content.persist(self.content(&file.id)).map_err(|e| e.error)?;
        // With its record it is there.
        let written = write_atomically(&self.dir, &format!("{}.{RECORD}", file.id), &record);
        if written.is_err() {
            [self.record(&file.id), self.content(&file.id)].iter().for_each(|path| remove_leftover(path));
        }
        written
    }

    /// In the order in which they were made.
    pub fn list(&self) -> Vec<File> {
        self.lock().values().cloned().collect()
    }

    pub fn get(&self, id: &str) -> Result<File, FilesError> {
        self.lock().get(id).cloned().ok_or_else(|| FilesError::Unknown(id.to_owned()))
    }

    /// Opened for reading.
    pub fn open_content(&self, id: &str) -> Result<fs::File, FilesError> {
        // Only what is known becomes a path.
        let file = self.get(id)?;
        Ok(fs::File::open(self.content(&file.id))?)
    }

    /// Puts the content at `path`, which lasts when the file is deleted.
    pub fn keep_at(&self, id: &str, path: &Path) -> Result<(), FilesError> {
        let content = self.content(&self.get(id)?.id);
        // A link where that is possible.
        fs::hard_link(&content, path).or_else(|_| fs::copy(&content, path).map(drop))?;
        Ok(())
    }

    /// # Errors
    /// There is none, or it cannot be deleted: it is then still there.
    pub fn delete(&self, id: &str) -> Result<(), FilesError> {
        let mut files = self.lock();
        let id = files.get(id).ok_or_else(|| FilesError::Unknown(id.to_owned()))?.id.clone();
        if let Err(e) = fs::remove_file(self.record(&id))
            && e.kind() != ErrorKind::NotFound
        {
            return Err(e.into());
        }
        // Without its record it is no file; what is left of it is removed at the next start.
        files.remove(&id);
        remove_leftover(&self.content(&id));
        if let Err(e) = sync_folder(&self.dir) {
            tracing::warn!("a power cut may bring back the uploaded file {id}, which was deleted: {e}");
        }
        Ok(())
    }

    fn record(&self, id: &str) -> PathBuf {
        self.dir.join(id).with_extension(RECORD)
    }

    fn content(&self, id: &str) -> PathBuf {
        self.dir.join(id).with_extension(CONTENT)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, File>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn remove_leftover(path: &Path) {
    if let Err(e) = fs::remove_file(path)
        && e.kind() != ErrorKind::NotFound
    {
        tracing::warn!("what is left of an uploaded file cannot be removed: {}: {e}", path.display());
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn add(files: &Files, text: &str) -> Result<File, FilesError> {
        let mut content = files.begin().unwrap();
        content.write_all(text.as_bytes()).unwrap();
        files.add(content, "train.jsonl".to_owned())
    }

    #[test]
    fn files_are_there_after_a_restart_until_they_are_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Files::open(dir.path().to_owned(), 10).unwrap();
        let (first, second) = (add(&open(), "first").unwrap(), add(&open(), "other").unwrap());
        assert!(matches!(add(&open(), "x"), Err(FilesError::Full { bytes: 11 })));
        drop(open().begin().unwrap().keep().unwrap());
        assert_eq!(open().list(), [first.clone(), second.clone()]);
        let mut text = String::new();
        open().open_content(&first.id).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "first");
        open().delete(&first.id).unwrap();
        assert!(matches!(open().get(&first.id), Err(FilesError::Unknown(_))));
        assert_eq!(open().list(), [second]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn what_a_job_keeps_lasts_when_the_file_is_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::open(dir.path().join("files"), 10).unwrap();
        let file = add(&files, "first").unwrap();
        let kept = dir.path().join("kept");
        files.keep_at(&file.id, &kept).unwrap();
        files.delete(&file.id).unwrap();
        assert_eq!(fs::read_to_string(kept).unwrap(), "first");
    }

    fn names(dir: &Path) -> Vec<String> {
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_file_whose_record_cannot_be_written_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::open(dir.path().to_owned(), 10).unwrap();
        let file = File { id: "file-1".to_owned(), bytes: 0, created_at: 0, filename: String::new() };
        // In its place, so that nothing else can be put there.
        fs::create_dir(files.record(&file.id)).unwrap();
        files.keep(files.begin().unwrap(), &file).unwrap_err();
        assert_eq!(names(dir.path()), ["file-1.json"]);
    }

    #[test]
    fn a_file_is_deleted_with_its_record_whatever_becomes_of_its_content() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::open(dir.path().to_owned(), 10).unwrap();
        let file = add(&files, "first").unwrap();
        fs::remove_file(files.content(&file.id)).unwrap();
        fs::create_dir(files.content(&file.id)).unwrap();
        files.delete(&file.id).unwrap();
        assert!(matches!(files.get(&file.id), Err(FilesError::Unknown(_))));
        assert!(!names(dir.path()).contains(&format!("{}.json", file.id)));
    }
}
