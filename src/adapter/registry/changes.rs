//! Changes of the folder that clients ask for. Whatever is to be installed has been loaded before anything is touched.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use cap_std::fs::Dir;

use super::error::ChangeError;
use super::outcome::Loaded;
use super::worker::{Worker, noticed};
use crate::adapter::canonical::Adapter;
use crate::adapter::error::AdapterError;
use crate::adapter::files::{AdapterFiles, Fingerprint, Glance, report_left_out};
use crate::adapter::generations;
use crate::adapter::residency::Urgency;
use crate::adapter::root::Root;

/// Stands for a generation where the files cannot be read.
const UNREADABLE: &str = "unreadable";

/// What the folder holds under a name.
struct Present {
    folder: Dir,
    generation: String,
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
        self.install(name, &files.map_err(|e| ChangeError::Refused(e.to_string()))?, expected)
    }

    /// Puts the files in place of what is there, if that is what is expected, and if they can be served.
    pub fn install(&mut self, name: &str, files: &AdapterFiles, expected: Option<&str>) -> Result<(), ChangeError> {
        let root = self.open()?;
        let present = self.present(&root, name)?;
        let generation = files.generation();
        if present.as_ref().is_some_and(|present| present.generation == generation) {
            // Whatever was expected: a change that is sent again has been made.
            self.take_up(&root, name, None)?;
            return Ok(());
        }
        check_expected(present.as_ref(), expected)?;
        let started = Instant::now();
        let adapter = self.assemble(name, files).map_err(ChangeError::Refused)?;
        let took = started.elapsed();
        self.check_size(adapter.coverage.resident_bytes as u64)?;
        let staging = root.staging().map_err(folder_error)?;
        staging.dir().and_then(|folder| files.write(&folder)).map_err(folder_error)?;
        if let Some(present) = present.filter(|present| present.generation != UNREADABLE) {
            self.keep(&root, name, &present.generation, &present.folder);
        }
        staging.replace(name).map_err(folder_error)?;
        self.take_up(&root, name, Some((adapter, took)))
    }

    /// Takes the folder away. Its files stay among the kept generations.
    pub fn remove(&mut self, name: &str, expected: Option<&str>) -> Result<(), ChangeError> {
        let root = self.open()?;
        let Some(present) = self.present(&root, name)? else { return Err(ChangeError::Unknown(name.to_owned())) };
        check_expected(Some(&present), expected)?;
        if present.generation != UNREADABLE {
            self.keep(&root, name, &present.generation, &present.folder);
        }
        root.staging().and_then(|staging| staging.take(name)).map_err(folder_error)?;
        self.shared.lock().forget(name);
        Ok(())
    }

    pub fn roll_back(&mut self, name: &str, to: Option<&str>, expected: Option<&str>) -> Result<(), ChangeError> {
        let root = self.open()?;
        let present = self.present(&root, name)?;
        check_expected(present.as_ref(), expected)?;
        let present = present.map(|present| present.generation);
        let kept: Vec<String> = generations::list(&root, name).into_iter().map(|(kept, _)| kept).collect();
        if present.is_none() && kept.is_empty() {
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
        let files = files.map_err(|e| ChangeError::Refused(e.to_string()))?;
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
    /// When a folder that is no adapter has the name: it is somebody's, and not to be replaced.
    fn present(&self, root: &Root, name: &str) -> Result<Option<Present>, ChangeError> {
        let folder = match root.folder(Path::new(name)) {
            Ok(folder) => folder,
            Err(AdapterError::Folder(e)) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(ChangeError::Folder(e.to_string())),
        };
        let fingerprint = Fingerprint::of(&folder);
        if !fingerprint.is_adapter(&folder) {
            return Err(ChangeError::NoAdapter(name.to_owned()));
        }
        let known = self.shared.lock().known_generation(name, &fingerprint);
        let generation = known.unwrap_or_else(|| {
            let (_, files) = AdapterFiles::read_settled(&folder, self.options.max_adapter_bytes);
            files.map_or_else(|_| UNREADABLE.to_owned(), |files| files.generation())
        });
        Ok(Some(Present { folder, generation }))
    }

    /// Makes what is in the folder now what is served, without waiting to notice it.
    fn take_up(&mut self, root: &Root, name: &str, adapter: Option<(Adapter, Duration)>) -> Result<(), ChangeError> {
        let folder = root.folder(Path::new(name)).map_err(|e| ChangeError::Folder(e.to_string()))?;
        let fingerprint = Fingerprint::of(&folder);
        let now = self.shared.now();
        if !self.shared.lock().is_known(name, Some(&fingerprint)) {
            let glance = Glance::at(&folder, self.options.max_adapter_bytes).map_err(|e| e.to_string());
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
        self.keep(root, name, &generation, &folder);
        Ok(())
    }
}

fn check_expected(present: Option<&Present>, expected: Option<&str>) -> Result<(), ChangeError> {
    let found = present.map_or("", |present| present.generation.as_str());
    match expected.filter(|expected| *expected != found) {
        None => Ok(()),
        Some(expected) => Err(ChangeError::Conflict { expected: expected.to_owned(), found: found.to_owned() }),
    }
}

fn folder_error(e: io::Error) -> ChangeError {
    ChangeError::Folder(e.to_string())
}
