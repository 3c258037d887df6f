//! Changes of the folder that clients ask for. Whatever is to be installed has been loaded before anything is touched.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use cap_std::fs::Dir;

use super::error::{ChangeError, Refusal};
use super::outcome::Loaded;
use super::worker::{Worker, noticed};
use crate::adapter::canonical::Adapter;
use crate::adapter::error::AdapterError;
use crate::adapter::files::{AdapterFiles, FILES, Fingerprint, Glance, report_left_out};
use crate::adapter::generations;
use crate::adapter::residency::Urgency;
use crate::adapter::root::{Root, Staging};

/// Stands for a generation where the files are none that could be served.
const UNREADABLE: &str = "unreadable";

/// What the folder holds under a name.
struct Present {
    folder: Dir,
    fingerprint: Fingerprint,
    /// `None` where the files are none that could be served.
    generation: Option<String>,
    /// What it leads to stays where it is.
    is_link: bool,
}

impl Present {
    fn generation(&self) -> &str {
        self.generation.as_deref().unwrap_or(UNREADABLE)
    }

    /// Whether there is nothing beside what [`generations::keep`] keeps.
    fn is_kept_whole(&self) -> bool {
        let is_kept = |name: &std::ffi::OsStr| FILES.iter().any(|file| name == *file);
        self.folder.entries().is_ok_and(|entries| {
            entries.map(|entry| entry.map(|entry| is_kept(&entry.file_name()))).all(|kept| kept.unwrap_or(false))
        })
    }
}

impl Worker {
    pub fn install_folder(&mut self, name: &str, path: &Path, expected: Option<&str>) -> Result<(), ChangeError> {
        let root = self.open()?;
        // The same answer for what is outside and what is not there: this is no way to ask about the rest of the disk.
        let folder = root
            .folder(path)
            .map_err(|_| ChangeError::Source("there is no such folder under the folder of adapters".to_owned()))?;
        report_left_out(name, &folder);
        let (_, files) = AdapterFiles::read_settled(&folder, self.options.max_adapter_bytes);
        self.install(name, &files.map_err(unreadable)?, expected)
    }

    /// Puts the files in place of what is there, if that is what is expected, and if they can be served.
    pub fn install(&mut self, name: &str, files: &AdapterFiles, expected: Option<&str>) -> Result<(), ChangeError> {
        let root = self.open()?;
        let present = self.present(&root, name)?;
        let generation = files.generation();
        if present.as_ref().is_some_and(|present| present.generation() == generation) {
            // Whatever was expected: a change that is sent again has been made.
            self.take_up(&root, name, None)?;
            return Ok(());
        }
        check_expected(present.as_ref(), expected)?;
        let started = Instant::now();
        let adapter = self.assemble(name, files).map_err(ChangeError::Refused)?;
        let took = started.elapsed();
        self.check_size(adapter.coverage.resident_bytes as u64)?;
        let mut staging = root.staging().map_err(folder_error)?;
        staging.dir().and_then(|folder| files.write(&folder)).map_err(folder_error)?;
        self.keep_present(&root, name, present.as_ref())?;
        staging.swap(name).map_err(folder_error)?;
        self.put_away(&root, name, present.as_ref(), staging)?;
        self.take_up(&root, name, Some((adapter, took)))
    }

    /// Takes the folder away. What it held stays among the kept generations.
    pub fn remove(&mut self, name: &str, expected: Option<&str>) -> Result<(), ChangeError> {
        let root = self.open()?;
        let Some(present) = self.present(&root, name)? else { return Err(ChangeError::Unknown(name.to_owned())) };
        check_expected(Some(&present), expected)?;
        self.keep_present(&root, name, Some(&present))?;
        let mut taken = root.staging().map_err(folder_error)?;
        taken.take(name).map_err(folder_error)?;
        self.put_away(&root, name, Some(&present), taken)?;
        self.shared.lock().forget(name);
        Ok(())
    }

    /// Before it is taken away: what cannot be kept stays in place.
    fn keep_present(&self, root: &Root, name: &str, present: Option<&Present>) -> Result<(), ChangeError> {
        let Some(present) = present else { return Ok(()) };
        if Fingerprint::of(&present.folder).map_err(unreadable)? != present.fingerprint {
            return Err(changed_meanwhile(Some(present)));
        }
        match &present.generation {
            Some(generation) if self.options.keep_generations > 0 => {
                let kept = self.keep(root, name, generation, &present.folder);
                kept.and_then(|()| generations::sync(root, name, generation)).map_err(not_kept)
            }
            _ => Ok(()),
        }
    }

    /// What was `taken` out of the folder under `name` stays where it is found again, as far as it is not kept yet; and back
    /// in its place where that cannot be done, or where it is not what was there before.
    fn put_away(
        &self,
        root: &Root,
        name: &str,
        present: Option<&Present>,
        mut taken: Staging<'_>,
    ) -> Result<(), ChangeError> {
        let put = match present {
            Some(present) if present.is_link => Ok(()),
            Some(present)
                if taken
                    .dir()
                    .is_ok_and(|taken| Fingerprint::of(&taken).ok().as_ref() == Some(&present.fingerprint)) =>
            {
                self.put_where_it_stays(root, name, present, &mut taken).map_err(not_kept)
            }
            None if taken.metadata().is_err_and(|e| e.kind() == io::ErrorKind::NotFound) => Ok(()),
            _ => Err(changed_meanwhile(present)),
        };
        if put.is_ok() {
            // Before the rest of what was there is deleted.
            root.settle_name(name);
        } else if let Err(e) = taken.swap(name) {
            let place = taken.leave();
            tracing::error!("adapter {name}: what was there is in {place} and cannot be put back: {e}");
        }
        put
    }

    fn put_where_it_stays(
        &self,
        root: &Root,
        name: &str,
        present: &Present,
        taken: &mut Staging<'_>,
    ) -> io::Result<()> {
        match &present.generation {
            Some(_) if self.options.keep_generations == 0 || present.is_kept_whole() => Ok(()),
            Some(generation) => generations::keep_whole(root, name, generation, taken),
            None => {
                let place = taken.put_aside(name)?;
                tracing::info!(
                    "adapter {name}: what was there is no generation to roll back to, and is in {place} now"
                );
                Ok(())
            }
        }
    }

    pub fn roll_back(&mut self, name: &str, to: Option<&str>, expected: Option<&str>) -> Result<(), ChangeError> {
        let root = self.open()?;
        let present = self.present(&root, name)?;
        check_expected(present.as_ref(), expected)?;
        let is_present = present.is_some();
        let present = present.and_then(|present| present.generation);
        let kept: Vec<String> = generations::list(&root, name).into_iter().map(|(kept, _)| kept).collect();
        if !is_present && kept.is_empty() {
            return Err(ChangeError::Unknown(name.to_owned()));
        }
        let chosen = match to {
            Some(to) => kept.iter().find(|kept| *kept == to),
            None => kept.iter().find(|kept| present.as_ref() != Some(kept)),
        };
        let Some(generation) = chosen else {
            let kept = if kept.is_empty() { "none".to_owned() } else { kept.join(", ") };
            return Err(ChangeError::Source(format!("no such earlier generation is kept; there are: {kept}")));
        };
        let folder = generations::open(&root, name, generation).map_err(folder_error)?;
        let (_, files) = AdapterFiles::read_settled(&folder, self.options.max_adapter_bytes);
        let files = files.map_err(unreadable)?;
        if files.generation() != *generation {
            return Err(ChangeError::Source(format!("the files of the generation {generation} have changed")));
        }
        self.install(name, &files, None)
    }

    fn check_size(&self, bytes: u64) -> Result<(), ChangeError> {
        let residency = &self.shared.lock().residency;
        if residency.can_hold(bytes) { Ok(()) } else { Err(ChangeError::Refused(residency.too_large(bytes))) }
    }

    fn open(&self) -> Result<Root, ChangeError> {
        Root::open(&self.path).map_err(folder_error)
    }

    /// # Errors
    /// When a folder that is no adapter has the name: it is somebody's, and not to be replaced. And when it cannot be said what
    /// it is: it could not be kept.
    fn present(&self, root: &Root, name: &str) -> Result<Option<Present>, ChangeError> {
        let folder = match root.folder(Path::new(name)) {
            Ok(folder) => folder,
            Err(AdapterError::Folder(e)) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(ChangeError::Folder(e.to_string())),
        };
        let fingerprint = Fingerprint::of(&folder).map_err(unreadable)?;
        if !fingerprint.is_adapter(&folder).map_err(unreadable)? {
            return Err(ChangeError::NoAdapter(name.to_owned()));
        }
        let is_link = root.dir.symlink_metadata(name).map_err(folder_error)?.is_symlink();
        if let Some(known) = self.shared.lock().known_generation(name, &fingerprint) {
            return Ok(Some(Present { folder, fingerprint, generation: Some(known), is_link }));
        }
        let (read, files) = AdapterFiles::read_settled(&folder, self.options.max_adapter_bytes);
        let generation = match files {
            Ok(files) => Some(files.generation()),
            Err(e) if e.may_pass() => return Err(unreadable(e)),
            Err(_) => None,
        };
        Ok(Some(Present { folder, fingerprint: read.unwrap_or(fingerprint), generation, is_link }))
    }

    /// Makes what is in the folder now what is served, without waiting to notice it.
    fn take_up(&mut self, root: &Root, name: &str, adapter: Option<(Adapter, Duration)>) -> Result<(), ChangeError> {
        let folder = root.folder(Path::new(name)).map_err(|e| ChangeError::Folder(e.to_string()))?;
        let fingerprint = Fingerprint::of(&folder).map_err(unreadable)?;
        let now = self.shared.now();
        if !self.shared.lock().is_known(name, Some(&fingerprint), now) {
            let glance = Glance::at(&folder, self.options.max_adapter_bytes).map_err(Refusal::from);
            let noticed = noticed(root, name, Some(fingerprint.clone()), glance);
            self.shared.lock().record(noticed, Urgency::Prefetch, now);
        }
        let Some((adapter, took)) = adapter else { return Ok(()) };
        let generation = adapter.generation.clone();
        let bytes = adapter.coverage.resident_bytes as u64;
        let loaded =
            Loaded { fingerprint: Some(fingerprint), generation: Some(generation.clone()), adapter: Ok(adapter), took };
        self.shared.lock().adopt(name, loaded, bytes, now);
        self.shared.loaded.notify_one();
        self.keep_loaded(root, name, &generation, &folder);
        Ok(())
    }
}

fn check_expected(present: Option<&Present>, expected: Option<&str>) -> Result<(), ChangeError> {
    let found = present.map_or("", Present::generation);
    match expected.filter(|expected| *expected != found) {
        None => Ok(()),
        Some(expected) => Err(ChangeError::Conflict { expected: expected.to_owned(), found: found.to_owned() }),
    }
}

fn folder_error(e: io::Error) -> ChangeError {
    ChangeError::Folder(e.to_string())
}

fn changed_meanwhile(present: Option<&Present>) -> ChangeError {
    let expected = present.map_or("", Present::generation).to_owned();
    ChangeError::Conflict { expected, found: "another, put there meanwhile".to_owned() }
}

/// What was there before could not be kept, and is there still.
fn not_kept(e: io::Error) -> ChangeError {
    ChangeError::Folder(format!("what it holds cannot be kept, and stays: {e}"))
}

/// What may pass says nothing of the files.
fn unreadable(e: AdapterError) -> ChangeError {
    if e.may_pass() { ChangeError::Folder(e.to_string()) } else { ChangeError::Refused(e.to_string()) }
}
