//! The adapters of a folder: which there are, which are in memory, and the generation each request gets.
//!
//! The folder is the truth: what is added, replaced or removed there is noticed. `state` knows and plans, `outcome`
//! takes up what was found and loaded, `worker` does it, `changes` is what clients may do to the folder.

mod changes;
mod entry;
mod error;
mod events;
mod outcome;
mod state;
mod status;
#[cfg(test)]
mod tests;
mod watch;
mod worker;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use notify::RecommendedWatcher;
use tokio::sync::{Notify, broadcast, oneshot};

pub use error::{AcquireError, ChangeError, RegistryError};
pub use events::{AdapterChange, AdapterEvent};
pub use status::{AdapterStatus, AdapterUsage, Phase, SelfTest, Source, Tier, Usage};

use super::canonical::Adapter;
use super::hub;
use super::residency::{Residency, Urgency};
use super::root::{NAME_RULE, Root, is_valid_name};
use crate::metrics::Metrics;
use crate::model::BaseWeights;
use state::{Acquired, Lease, State};
use worker::Worker;

/// More than a folder has room for on a full disk.
const PROBE: [u8; 4096] = [0; 4096];

/// The limits that adapters are kept within; `config/default.toml` says what each means.
#[derive(Debug, Clone)]
pub struct RegistryOptions {
    pub host_budget_bytes: u64,
    pub max_adapter_bytes: u64,
    pub min_residency: Duration,
    pub max_wait: Duration,
    pub rescan: Duration,
    pub keep_generations: usize,
}

/// Cheap to ask, never blocked by loading. Dropping it ends its threads.
#[derive(Debug)]
pub struct AdapterRegistry {
    shared: Arc<Shared>,
    /// `None` where there is no folder of adapters.
    folder: Option<Folder>,
}

#[derive(Debug)]
struct Folder {
    path: PathBuf,
    max_adapter_bytes: u64,
    worker: Option<JoinHandle<()>>,
    _watcher: Option<RecommendedWatcher>,
}

/// What the registry and its worker both have.
pub(crate) struct Shared {
    state: Mutex<State>,
    /// For the worker: there is something to do.
    wake: Condvar,
    /// For whoever measures adapters: one was loaded.
    loaded: Notify,
    metrics: Arc<Metrics>,
    opened: Instant,
}

impl Shared {
    fn new(residency: Residency, max_wait: Duration, metrics: Arc<Metrics>) -> Arc<Self> {
        let shared = Arc::new(Self {
            state: Mutex::new(State::new(residency, max_wait, metrics.clone())),
            wake: Condvar::new(),
            loaded: Notify::new(),
            metrics,
            opened: Instant::now(),
        });
        let usage = Arc::downgrade(&shared);
        shared.metrics.report_adapters(move || {
            let Some(shared) = usage.upgrade() else { return (Usage::default(), Vec::new()) };
            let state = shared.lock();
            (state.usage(), state.usage_by_adapter())
        });
        shared
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.opened.elapsed()
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("usage", &self.lock().usage()).finish_non_exhaustive()
    }
}

impl AdapterRegistry {
    /// Takes up every direct sub-folder of `root` that holds an adapter, and loads them until the memory is full: the
    /// pinned first, then in order of the names. Blocks for as long as that takes. Without a root there are none.
    ///
    /// An adapter that is refused is logged and stops no other.
    ///
    /// # Errors
    /// When the root itself cannot be read.
    pub fn open(
        root: Option<&Path>,
        base: Arc<dyn BaseWeights>,
        options: RegistryOptions,
        metrics: Arc<Metrics>,
    ) -> Result<Self, RegistryError> {
        let shared =
            Shared::new(Residency::new(options.host_budget_bytes, options.min_residency), options.max_wait, metrics);
        let Some(root) = root else { return Ok(Self { shared, folder: None }) };

        let path = root.to_path_buf();
        Root::open(root).map_err(|source| RegistryError::Root { root: path.clone(), source })?;
        // Before the first scan, so that nothing is missed.
        let noticed = shared.clone();
        let watcher = watch::watch(root, move || {
            noticed.lock().notice(noticed.now());
            noticed.wake.notify_one();
        });
        let watcher = watcher.inspect_err(|e| {
            tracing::warn!("changes of the adapter folder are noticed by the rescan only: {e}");
        });
        let max_adapter_bytes = options.max_adapter_bytes;
        let worker = Worker::new(shared.clone(), path.clone(), base, options);
        let (opened, is_open) = mpsc::channel();
        let worker = thread::Builder::new().name("lorry-adapters".to_owned()).spawn(move || worker.run(opened));
        let worker = Some(worker.map_err(RegistryError::Thread)?);
        // Ends when the worker has dropped its end.
        let _ = is_open.recv();
        Ok(Self { shared, folder: Some(Folder { path, max_adapter_bytes, worker, _watcher: watcher.ok() }) })
    }

    /// Every adapter, in order of the names.
    pub fn list(&self) -> Vec<AdapterStatus> {
        let state = self.shared.lock();
        state.names().filter_map(|name| state.status(name)).collect()
    }

    pub fn status(&self, name: &str) -> Option<AdapterStatus> {
        self.shared.lock().status(name)
    }

    pub fn usage(&self) -> Usage {
        self.shared.lock().usage()
    }

    /// The adapters in memory, in order of the names.
    pub fn resident(&self) -> Vec<Arc<Adapter>> {
        self.shared.lock().resident()
    }

    /// The current generation of an adapter, loaded if it is not in memory. Held for as long as the result lives.
    pub async fn acquire(&self, name: &str) -> Result<Arc<Adapter>, AcquireError> {
        self.acquire_for(name, Urgency::Request).await
    }

    async fn acquire_for(&self, name: &str, urgency: Urgency) -> Lease {
        let acquired = self.shared.lock().acquire(name, urgency, self.shared.now());
        self.wait(acquired, || AcquireError::OutOfMemory(name.to_owned())).await
    }

    async fn wait(&self, acquired: Acquired, stopped: impl FnOnce() -> AcquireError) -> Lease {
        match acquired {
            Acquired::Now(lease) => lease,
            Acquired::Later(lease) => {
                self.shared.wake.notify_one();
                lease.await.unwrap_or_else(|_| Err(stopped()))
            }
        }
    }

    /// Several adapters as one, each at its own strength; `None` when every strength is 0, which is the base.
    pub async fn compose(&self, members: &[(String, f32)]) -> Result<Option<Arc<Adapter>>, AcquireError> {
        for (name, _) in members.iter().filter(|(_, scale)| *scale == 0.0) {
            let status = self.status(name).ok_or_else(|| AcquireError::Unknown(name.clone()))?;
            if let Some(cause) = status.refusal() {
                return Err(AcquireError::Refused { name: name.clone(), cause: cause.to_owned() });
            }
        }
        let members: Vec<_> = members.iter().filter(|(_, scale)| *scale != 0.0).collect();
        match members[..] {
            [] => return Ok(None),
            [(name, 1.0)] => return self.acquire(name).await.map(Some),
            _ => {}
        }
        let known = self.shared.lock().known_composition(&members, self.shared.now());
        if known.is_some() {
            return Ok(known);
        }
        let adapters = try_join_all(members.iter().map(|(name, _)| self.acquire(name))).await?;
        let members: Vec<_> = adapters.into_iter().zip(members.iter().map(|(_, scale)| *scale)).collect();
        let acquired = self.shared.lock().compose(members, self.shared.now());
        let stopped = || AcquireError::Composition("the server is stopping".to_owned());
        self.wait(acquired, stopped).await.map(Some)
    }

    /// Loads an adapter before anybody asks for it.
    pub async fn load(&self, name: &str) -> Result<AdapterStatus, AcquireError> {
        self.acquire_for(name, Urgency::Prefetch).await?;
        self.status(name).ok_or_else(|| AcquireError::Unknown(name.to_owned()))
    }

    /// Copies an adapter into the root under `name`, atomically, and loads it. `expected` is the generation that it may
    /// replace (`Some("")`: none), `None` replaces any. The same content again changes nothing.
    pub async fn install(
        &self,
        name: &str,
        source: Source,
        expected: Option<&str>,
    ) -> Result<AdapterStatus, ChangeError> {
        let (to, expected) = (name.to_owned(), expected.map(str::to_owned));
        match source {
            Source::Folder(path) => {
                self.change(name, move |worker| worker.install_folder(&to, &path, expected.as_deref())).await?;
            }
            Source::Hub { repo, revision } => {
                let files = self.download(repo, revision).await?;
                self.change(name, move |worker| worker.install(&to, &files, expected.as_deref())).await?;
            }
            Source::Files(files) => {
                self.change(name, move |worker| worker.install(&to, &files, expected.as_deref())).await?;
            }
        }
        self.status(name).ok_or_else(|| ChangeError::Unknown(name.to_owned()))
    }

    /// Whether something could be installed now: there is a folder, and room for a file in it.
    pub fn check_writable(&self) -> Result<(), ChangeError> {
        let folder = self.folder()?;
        let written = Root::open(&folder.path).and_then(|root| root.staging()?.dir()?.write("probe", PROBE));
        written.map_err(|e| ChangeError::Folder(e.to_string()))
    }

    async fn download(
        &self,
        repo: String,
        revision: Option<String>,
    ) -> Result<super::files::AdapterFiles, ChangeError> {
        let folder = self.folder()?;
        let (path, max_bytes) = (folder.path.clone(), folder.max_adapter_bytes);
        let download = move || {
            let root = Root::open(&path).map_err(|e| ChangeError::Folder(e.to_string()))?;
            let staging = root.staging().map_err(|e| ChangeError::Folder(e.to_string()))?;
            hub::fetch(&repo, revision.as_deref(), &staging.path(), max_bytes).map_err(ChangeError::Source)
        };
        let downloaded = tokio::task::spawn_blocking(download).await;
        downloaded.unwrap_or_else(|_| Err(ChangeError::Source("the download failed: the log says more".to_owned())))
    }

    /// Takes an adapter out of the root. Requests that hold it go on; its files stay among the previous generations.
    pub async fn remove(&self, name: &str, expected: Option<&str>) -> Result<(), ChangeError> {
        let (removed, expected) = (name.to_owned(), expected.map(str::to_owned));
        self.change(name, move |worker| worker.remove(&removed, expected.as_deref())).await
    }

    /// Installs a previous generation again: `to`, or the latest. `expected` as for [`AdapterRegistry::install`].
    pub async fn roll_back(
        &self,
        name: &str,
        to: Option<&str>,
        expected: Option<&str>,
    ) -> Result<AdapterStatus, ChangeError> {
        let (rolled_back, to, expected) = (name.to_owned(), to.map(str::to_owned), expected.map(str::to_owned));
        self.change(name, move |worker| worker.roll_back(&rolled_back, to.as_deref(), expected.as_deref())).await?;
        self.status(name).ok_or_else(|| ChangeError::Unknown(name.to_owned()))
    }

    /// Has the worker do it. It is done even if nobody waits for the end.
    async fn change(
        &self,
        name: &str,
        work: impl FnOnce(&mut Worker) -> Result<(), ChangeError> + Send + 'static,
    ) -> Result<(), ChangeError> {
        self.folder()?;
        if !is_valid_name(name) {
            return Err(ChangeError::InvalidName(format!("the name of an adapter {NAME_RULE}")));
        }
        let (reply, result) = oneshot::channel();
        self.shared.lock().push_change(Box::new(move |worker| {
            // Who no longer waits has dropped the other end.
            let _ = reply.send(work(worker));
        }));
        self.shared.wake.notify_one();
        result.await.unwrap_or_else(|_| Err(ChangeError::Folder("the server is stopping".to_owned())))
    }

    fn folder(&self) -> Result<&Folder, ChangeError> {
        self.folder.as_ref().ok_or(ChangeError::NoFolder)
    }

    /// All that happens to adapters from now on. Who does not keep up loses the oldest, and is told how many.
    pub fn events(&self) -> broadcast::Receiver<Arc<AdapterEvent>> {
        self.shared.lock().events.listen()
    }

    /// The next adapter that was loaded and not yet measured, each generation once. Cancelling loses none.
    pub async fn next_untested(&self) -> Arc<Adapter> {
        loop {
            let loaded = self.shared.loaded.notified();
            if let Some(adapter) = self.shared.lock().next_untested() {
                return adapter;
            }
            loaded.await;
        }
    }

    /// What measuring an adapter gave; shown in its status.
    pub fn report_self_test(&self, name: &str, generation: &str, self_test: SelfTest) {
        let is_current = self.shared.lock().report_self_test(name, generation, self_test);
        if is_current && self_test.is_inert() {
            tracing::warn!("adapter {name} changes nothing: was it trained, and on this base?");
        }
    }
}

/// Without a folder: there are no adapters.
impl Default for AdapterRegistry {
    fn default() -> Self {
        let residency = Residency::new(0, Duration::ZERO);
        Self { shared: Shared::new(residency, Duration::ZERO, Arc::new(Metrics::default())), folder: None }
    }
}

impl Drop for AdapterRegistry {
    fn drop(&mut self) {
        self.shared.lock().stop();
        self.shared.wake.notify_one();
        if let Some(worker) = self.folder.as_mut().and_then(|folder| folder.worker.take())
            && worker.join().is_err()
        {
            tracing::error!("the thread that loads adapters panicked");
        }
    }
}
