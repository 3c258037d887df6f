//! The one thread that reads and changes the folder: it scans, loads, composes and installs, one thing at a time.
//!
//! It runs at lowered priority, so that what is loaded waits for the engine and not the engine for it.

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use cap_std::fs::Dir;

use super::outcome::{Loaded, Noticed};
use super::state::{Members, Target, Task};
use super::{RegistryOptions, Shared};
use crate::adapter::canonical::Adapter;
use crate::adapter::compose::compose;
use crate::adapter::error::AdapterError;
use crate::adapter::files::{AdapterFiles, Fingerprint, Glance, report_left_out};
use crate::adapter::residency::Urgency;
use crate::adapter::root::{NAME_RULE, Root, is_valid_name};
use crate::adapter::{generations, loader};
use crate::background::lower_priority;
use crate::model::BaseWeights;

pub struct Worker {
    pub(super) shared: Arc<Shared>,
    pub(super) path: PathBuf,
    pub(super) base: Arc<dyn BaseWeights>,
    pub(super) options: RegistryOptions,
    /// Off from the first failure on: a folder that cannot be written.
    keeps_generations: bool,
    is_root_lost: bool,
}

impl Worker {
    pub fn new(shared: Arc<Shared>, path: PathBuf, base: Arc<dyn BaseWeights>, options: RegistryOptions) -> Self {
        let keeps_generations = options.keep_generations > 0;
        Self { shared, path, base, options, keeps_generations, is_root_lost: false }
    }

    /// Runs until the registry is dropped. Tells `opened` when all that fits at the beginning is loaded.
    pub fn run(mut self, opened: Sender<()>) {
        lower_priority("adapters are loaded");
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
        match Root::open(&self.path).and_then(|root| Ok((root.folder_names()?, root))) {
            Ok((mut names, root)) => {
                self.is_root_lost = false;
                names.retain(|name| self.look_at(&root, name, urgency));
                self.shared.lock().remove_missing(&names, self.shared.now());
            }
            Err(e) if !self.is_root_lost => {
                self.is_root_lost = true;
                tracing::error!(
                    "the adapter folder {} cannot be read: {e}; serving what is known",
                    self.path.display()
                );
            }
            Err(_) => {}
        }
        self.shared.lock().rescan_within(self.options.rescan, self.shared.now());
    }

    /// Whether the folder holds an adapter; takes it up if it is new or changed.
    fn look_at(&self, root: &Root, name: &str, urgency: Urgency) -> bool {
        let (fingerprint, glance) = match root.folder(Path::new(name)) {
            Ok(folder) => {
                let fingerprint = Fingerprint::of(&folder);
                if self.shared.lock().is_known(name, Some(&fingerprint)) {
                    return true;
                }
                if !fingerprint.is_adapter(&folder) {
                    return false;
                }
                let glance = if is_valid_name(name) {
                    Glance::at(&folder, self.options.max_adapter_bytes).map_err(|e| e.to_string())
                } else {
                    Err(format!("the folder's name {NAME_RULE}: rename it"))
                };
                (Some(fingerprint), glance)
            }
            Err(AdapterError::Folder(e)) if e.kind() == io::ErrorKind::NotFound => return false,
            Err(_) if self.shared.lock().is_known(name, None) => return true,
            Err(e) => (None, Err(e.to_string())),
        };
        self.shared.lock().record(noticed(root, name, fingerprint, glance), urgency, self.shared.now());
        true
    }

    fn load(&mut self, name: &str) {
        let started = Instant::now();
        let folder = Root::open(&self.path)
            .map_err(AdapterError::Folder)
            .and_then(|root| root.folder(Path::new(name)).map(|folder| (root, folder)));
        let (root, folder) = match folder {
            Ok(opened) => opened,
            Err(e) => {
                let adapter = Err(e.to_string());
                let loaded = Loaded { fingerprint: None, generation: None, adapter, took: started.elapsed() };
                return self.shared.lock().finish_adapter(name, loaded, self.shared.now());
            }
        };
        report_left_out(name, &folder);
        let (fingerprint, files) = AdapterFiles::read_settled(&folder, self.options.max_adapter_bytes);
        let known = self.shared.lock().known_generation(name, &fingerprint);
        let (generation, adapter) = self.loaded(name, files);
        let loaded = Loaded { fingerprint: Some(fingerprint.clone()), generation, adapter, took: started.elapsed() };
        let generation = loaded.generation.clone().filter(|_| loaded.adapter.is_ok());
        self.shared.metrics.vllm.adapter_load.observe(started.elapsed().as_secs_f64());
        self.shared.lock().finish_adapter(name, loaded, self.shared.now());
        self.shared.loaded.notify_one();
        if let Some(generation) = generation
            && known.as_ref() != Some(&generation)
            && Fingerprint::of(&folder) == fingerprint
        {
            self.keep(&root, name, &generation, &folder);
        }
    }

    /// The generation, where the files can be read, and what they turned into.
    fn loaded(
        &self,
        name: &str,
        files: Result<AdapterFiles, AdapterError>,
    ) -> (Option<String>, Result<Adapter, String>) {
        match files {
            Err(e) => (None, Err(e.to_string())),
            Ok(files) => match self.assemble(name, &files) {
                Ok(adapter) => (Some(adapter.generation.clone()), Ok(adapter)),
                Err(cause) => (Some(files.generation()), Err(cause)),
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
    pub(super) fn keep(&mut self, root: &Root, name: &str, generation: &str, folder: &Dir) {
        if !self.keeps_generations {
            return;
        }
        match generations::keep(root, name, generation, folder, self.options.keep_generations) {
            Ok(()) => {
                let kept = generations::list(root, name).into_iter().map(|(kept, _)| kept);
                let previous = kept.filter(|kept| kept != generation).collect();
                self.shared.lock().set_previous_generations(name, previous);
            }
            Err(e) => {
                self.keeps_generations = false;
                tracing::warn!("the adapter folder cannot be written ({e}): no earlier generations are kept");
            }
        }
    }
}

/// What is known of a folder without reading the weights: the kept generation that has the same files is this one.
pub(super) fn noticed(
    root: &Root,
    name: &str,
    fingerprint: Option<Fingerprint>,
    glance: Result<Glance, String>,
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
