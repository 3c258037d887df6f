//! The one thread that reads and changes the folder: it scans, loads, composes and installs, one thing at a time.
//!
//! It runs at lowered priority, so that what is loaded waits for the engine and not the engine for it.

use std::any::Any;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use cap_std::fs::Dir;

use super::error::Refusal;
use super::outcome::{Loaded, Noticed};
use super::state::{Members, Target, Task};
use super::{RegistryOptions, Shared};
use crate::adapter::canonical::Adapter;
use crate::adapter::compose::compose;
use crate::adapter::error::AdapterError;
use crate::adapter::files::{self, AdapterFiles, Fingerprint, Glance, WEIGHTS_FILE, report_left_out};
use crate::adapter::residency::Urgency;
use crate::adapter::root::{NAME_RULE, Root, as_text, is_valid_name};
use crate::adapter::{generations, loader, peft_config};
use crate::background::lower_priority;
use crate::model::BaseWeights;

/// Until the folder is looked at again where something in it could not be.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// More than lies between the two renames by which a folder is exchanged for another.
const EXCHANGE: Duration = Duration::from_millis(20);

pub struct Worker {
    pub(super) shared: Arc<Shared>,
    pub(super) path: PathBuf,
    pub(super) base: Arc<dyn BaseWeights>,
    pub(super) options: RegistryOptions,
    /// What was told and still holds: that the root cannot be read, is an adapter itself, has folders that cannot be looked
    /// at, cannot be written.
    is_root_lost: bool,
    is_root_an_adapter: bool,
    is_unseen_told: bool,
    is_not_writable: bool,
    /// In the scan under way, a known folder that cannot be looked at, and why.
    unseen: Option<(String, AdapterError)>,
    /// By folder, what was told of adapters that lie deeper in it.
    told_nested: HashMap<String, String>,
}

/// What a look at a folder shows.
enum Look {
    Known,
    NoAdapter,
    /// No adapter; its own folders hold some, in words.
    Nested(String),
    Found(Dir, Fingerprint),
}

impl Worker {
    pub fn new(shared: Arc<Shared>, path: PathBuf, base: Arc<dyn BaseWeights>, options: RegistryOptions) -> Self {
        Self {
            shared,
            path,
            base,
            options,
            is_root_lost: false,
            is_root_an_adapter: false,
            is_unseen_told: false,
            is_not_writable: false,
            unseen: None,
            told_nested: HashMap::new(),
        }
    }

    /// Runs until the registry is dropped. Tells `opened` when all that fits at the beginning is loaded.
    pub fn run(mut self, opened: Sender<()>) {
        lower_priority("adapters are loaded");
        if let Ok(root) = Root::open(&self.path)
            && let Err(e) = root.clear_staging()
        {
            tracing::warn!("what a server that was killed has left in the folder of adapters stays there: {e}");
        }
        self.scan(Urgency::Fill);
        let mut opened = Some(opened);
        loop {
            match self.next_task(&mut opened) {
                Task::Stop => return,
                Task::Scan => self.scan(Urgency::Prefetch),
                Task::Change(change) => change(&mut self),
                Task::Load(Target::Adapter(name)) => self.load(&name),
                Task::Load(Target::Composition(key, members)) => {
                    let composed = self.compose(&members);
                    drop(members);
                    self.shared.lock().finish_composition(key, composed, self.shared.now());
                }
                Task::Wait(_) => {}
            }
        }
    }

    /// Waits until there is something to do.
    fn next_task(&self, opened: &mut Option<Sender<()>>) -> Task {
        let mut state = self.shared.lock();
        loop {
            let task = state.next_task(self.shared.now());
            let trash = state.take_trash();
            if !trash.is_empty() {
                drop(state);
                drop(trash);
                state = self.shared.lock();
            }
            let Task::Wait(time) = task else { return task };
            *opened = None;
            let (locked, _) = self.shared.wake.wait_timeout(state, time).unwrap_or_else(PoisonError::into_inner);
            state = locked;
        }
    }

    fn scan(&mut self, urgency: Urgency) {
        let mut within = self.options.rescan;
        match Root::open(&self.path).and_then(|root| Ok((root.folder_names()?, root))) {
            Ok((folders, root)) => {
                self.is_root_lost = false;
                self.look_at_root(&root);
                let adapters = folders.iter().filter(|folder| self.look_at(&root, folder, urgency));
                let mut names: Vec<String> = adapters.map(|folder| as_text(folder)).collect();
                names.sort_unstable();
                self.shared.lock().remove_missing(&names, self.shared.now());
                let unseen = self.unseen.take();
                if let Some((name, e)) = &unseen {
                    within = within.min(LOOK_AGAIN);
                    if !self.is_unseen_told {
                        tracing::warn!(
                            "the folder of the adapter {name}, or more, cannot be looked at: {e}; serving what is known"
                        );
                    }
                }
                self.is_unseen_told = unseen.is_some();
            }
            Err(e) => {
                within = within.min(LOOK_AGAIN);
                if !self.is_root_lost {
                    let path = self.path.display();
                    tracing::error!("the adapter folder {path} cannot be read: {e}; serving what is known");
                }
                self.is_root_lost = true;
            }
        }
        self.shared.lock().rescan_within(within, self.shared.now());
    }

    fn look_at_root(&mut self, root: &Root) {
        let is_an_adapter =
            [peft_config::FILE, WEIGHTS_FILE].iter().any(|file| root.dir.symlink_metadata(file).is_ok());
        if is_an_adapter && !self.is_root_an_adapter {
            tracing::error!(
                "{} holds the files of an adapter, which is not served: adapters.dir is the folder above, with one folder for \
                 each adapter",
                self.path.display()
            );
        }
        self.is_root_an_adapter = is_an_adapter;
    }

    /// Whether the folder holds an adapter; takes it up if it is new or changed.
    fn look_at(&mut self, root: &Root, folder: &OsStr, urgency: Urgency) -> bool {
        let name = &*as_text(folder);
        let (fingerprint, glance) = match self.look(root, folder, name) {
            Ok(Look::Known) => return true,
            Ok(Look::NoAdapter) => return false,
            Ok(Look::Nested(held)) => {
                if self.told_nested.insert(name.to_owned(), held.clone()).as_ref() != Some(&held) {
                    tracing::warn!("{name} is no adapter: {held}");
                }
                return false;
            }
            Ok(Look::Found(folder, fingerprint)) => (Some(fingerprint), self.glance(name, &folder)),
            Err(AdapterError::Folder(e)) if e.kind() == io::ErrorKind::NotFound => return false,
            Err(e) if e.may_pass() && self.shared.lock().has_seen(name) => {
                self.unseen.get_or_insert((name.to_owned(), e));
                return true;
            }
            // Others' folders, as `lost+found`, are nobody's adapters.
            Err(e) if e.may_pass() && !is_valid_name(name) => return false,
            Err(e) => (None, Err(Refusal::from(e))),
        };
        let now = self.shared.now();
        let state = self.shared.lock();
        // Of a folder without files of its own, or that cannot be opened, the cause alone says whether it has changed.
        let is_told = glance.as_ref().is_err_and(|refusal| state.error(name) == Some(refusal.cause.as_str()));
        if !is_told || !state.is_known(name, fingerprint.as_ref(), now) {
            drop(state);
            let noticed = noticed(root, name, fingerprint, glance);
            self.shared.lock().record(noticed, urgency, now);
        }
        true
    }

    fn look(&self, root: &Root, folder: &OsStr, name: &str) -> Result<Look, AdapterError> {
        let folder = root.folder(Path::new(folder))?;
        let fingerprint = Fingerprint::of(&folder)?;
        if fingerprint.has_files() && self.shared.lock().is_known(name, Some(&fingerprint), self.shared.now()) {
            return Ok(Look::Known);
        }
        if fingerprint.is_adapter(&folder)? {
            return Ok(Look::Found(folder, fingerprint));
        }
        Ok(files::nested(&folder).map_or(Look::NoAdapter, Look::Nested))
    }

    fn glance(&self, name: &str, folder: &Dir) -> Result<Glance, Refusal> {
        if !is_valid_name(name) {
            return Err(Refusal::from(format!("the folder's name {NAME_RULE}: rename it")));
        }
        Glance::at(folder, self.options.max_adapter_bytes).map_err(Refusal::from)
    }

    /// The root and an adapter's folder; a folder that is being exchanged by two renames is not there for a moment.
    fn open_settled(&self, name: &str) -> Result<(Root, Dir), AdapterError> {
        let open = || {
            let root = Root::open(&self.path).map_err(AdapterError::Folder)?;
            root.folder(Path::new(name)).map(|folder| (root, folder))
        };
        match open() {
            Err(AdapterError::Folder(e)) if e.kind() == io::ErrorKind::NotFound => {
                thread::sleep(EXCHANGE);
                open()
            }
            opened => opened,
        }
    }

    fn load(&mut self, name: &str) {
        let started = Instant::now();
        let (root, folder) = match self.open_settled(name) {
            Ok(opened) => opened,
            Err(e) => {
                let adapter = Err(Refusal::from(e));
                let loaded = Loaded { fingerprint: None, generation: None, adapter, took: started.elapsed() };
                return self.shared.lock().finish_adapter(name, loaded, self.shared.now());
            }
        };
        report_left_out(name, &folder);
        let (fingerprint, files) = AdapterFiles::read_settled(&folder, self.options.max_adapter_bytes);
        let known = fingerprint.as_ref().and_then(|read| self.shared.lock().known_generation(name, read));
        let (generation, adapter) = self.loaded(name, files);
        let loaded = Loaded { fingerprint: fingerprint.clone(), generation, adapter, took: started.elapsed() };
        let generation = loaded.generation.clone().filter(|_| loaded.adapter.is_ok());
        self.shared.metrics.vllm.adapter_load.observe(started.elapsed().as_secs_f64());
        self.shared.lock().finish_adapter(name, loaded, self.shared.now());
        self.shared.loaded.notify_one();
        if let Some(generation) = generation
            && known.as_ref() != Some(&generation)
            && Fingerprint::of(&folder).ok() == fingerprint
        {
            self.keep_loaded(&root, name, &generation, &folder);
        }
    }

    /// The generation, where the files can be read, and what they turned into.
    fn loaded(
        &self,
        name: &str,
        files: Result<AdapterFiles, AdapterError>,
    ) -> (Option<String>, Result<Adapter, Refusal>) {
        match files {
            Err(e) => (None, Err(Refusal::from(e))),
            Ok(files) => match self.assemble(name, &files) {
                Ok(adapter) => (Some(adapter.generation.clone()), Ok(adapter)),
                Err(cause) => (Some(files.generation()), Err(Refusal::from(cause))),
            },
        }
    }

    /// From files to an adapter; whatever is in them, the thread goes on.
    pub(super) fn assemble(&self, name: &str, files: &AdapterFiles) -> Result<Adapter, String> {
        unwound(|| loader::load(name, files, &*self.base))
    }

    fn compose(&self, members: &Members) -> Result<Adapter, String> {
        unwound(|| compose(members))
    }

    /// Keeps the files of a generation for a later roll-back, and what is known of the earlier ones up to date.
    pub(super) fn keep(&self, root: &Root, name: &str, generation: &str, folder: &Dir) -> io::Result<()> {
        if self.options.keep_generations == 0 {
            return Ok(());
        }
        generations::keep(root, name, generation, folder, self.options.keep_generations)?;
        let kept = generations::list(root, name).into_iter().map(|(kept, _)| kept);
        let previous = kept.filter(|kept| kept != generation).collect();
        self.shared.lock().set_previous_generations(name, previous);
        Ok(())
    }

    /// As [`keep`](Self::keep), of what is there to stay: it is served whether or not that can be done.
    pub(super) fn keep_loaded(&mut self, root: &Root, name: &str, generation: &str, folder: &Dir) {
        let kept = self.keep(root, name, generation, folder);
        if let Err(e) = &kept
            && !self.is_not_writable
        {
            tracing::warn!(
                "the adapter folder cannot be written ({e}): {name} and others are not kept to roll back to"
            );
        }
        self.is_not_writable = kept.is_err();
    }
}

/// What is known of a folder without reading the weights: the kept generation that has the same files is this one.
pub(super) fn noticed(
    root: &Root,
    name: &str,
    fingerprint: Option<Fingerprint>,
    glance: Result<Glance, Refusal>,
) -> Noticed {
    let kept = if is_valid_name(name) { generations::list(root, name) } else { Vec::new() };
    let (same, previous): (Vec<_>, Vec<_>) = kept.into_iter().partition(|(_, kept)| Some(kept) == fingerprint.as_ref());
    Noticed {
        name: name.to_owned(),
        fingerprint,
        glance,
        generation: same.into_iter().next().map(|(generation, _)| generation),
        previous_generations: previous.into_iter().map(|(generation, _)| generation).collect(),
    }
}

fn unwound<E: ToString>(work: impl FnOnce() -> Result<Adapter, E>) -> Result<Adapter, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(panic) => {
            tracing::error!("loading panicked: {}", message(&*panic));
            Err("the server failed to load it: its log says more".to_owned())
        }
    }
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}
