//! All stores of one folder, and the choice from them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use tracing::warn;

use super::embedding::{self, EmbeddingEndpoint};
use super::error::{IclError, OpenError, StoreError};
use super::python_random;
use super::selection::{Chosen, DEFAULT_SEED, MAX_K, Select, Selection};
use super::store::{MAX_STORE_BYTES, Store, check_name};
use super::{Example, TokenBudget};
use crate::atomic_file::{sync_folder, write_atomically};
use crate::config::{DEFAULT_ICL_DIR, IclConfig};

const MAX_STORES: usize = 256;
const EXTENSION: &str = "jsonl";

/// Every example store, each a file `<name>.jsonl`; what is served is what is in the files.
#[derive(Debug)]
pub struct IclStores {
    dir: Option<PathBuf>,
    nearest_last: bool,
    endpoint: Option<EmbeddingEndpoint>,
    stores: RwLock<BTreeMap<String, Arc<Store>>>,
    /// Held while files change, so that they change in the order the stores do.
    writing: Mutex<()>,
}

impl IclStores {
    /// Loads every store of `icl.dir`. The default folder may be absent.
    ///
    /// # Errors
    /// A folder or file that cannot be read, or a store that breaks a limit.
    pub fn open(config: &IclConfig) -> Result<Self, OpenError> {
        let dir = config.dir();
        let stores = match dir {
            Some(dir) if dir == Path::new(DEFAULT_ICL_DIR) && !dir.exists() => {
                warn!("there is no folder {}: no example stores yet", dir.display());
                BTreeMap::new()
            }
            Some(dir) => read_folder(dir)?,
            None => BTreeMap::new(),
        };
        Ok(Self {
            dir: dir.map(Path::to_owned),
            nearest_last: config.nearest_last,
            endpoint: EmbeddingEndpoint::new(config),
            stores: RwLock::new(stores),
            writing: Mutex::new(()),
        })
    }

    /// All stores, by name.
    pub fn list(&self) -> Vec<Arc<Store>> {
        self.read().values().cloned().collect()
    }

    /// # Errors
    /// When there is no such store; the error lists those there are.
    pub fn get(&self, name: &str) -> Result<Arc<Store>, StoreError> {
        let stores = self.read();
        stores.get(name).cloned().ok_or_else(|| unknown(name, &stores))
    }

    /// Replaces or creates a store, first its file and then what is served. Blocks until the disk has it.
    ///
    /// # Errors
    /// A name or example that breaks a limit, or a file that cannot be written: the store is then as it was.
    pub fn put(&self, name: &str, examples: Vec<Example>) -> Result<Arc<Store>, StoreError> {
        let store = Arc::new(Store::new(name, examples)?);
        let dir = self.dir.as_deref().ok_or(StoreError::NoFolder)?;
        let _writing = self.lock();
        let is_new = !self.read().contains_key(name);
        if is_new && self.read().len() >= MAX_STORES {
            return Err(StoreError::TooManyStores { max: MAX_STORES });
        }
        write_atomically(dir, &file_name(name), store.to_jsonl().as_bytes())
            .map_err(|source| not_writable(dir, name, source))?;
        self.write().insert(name.to_owned(), store.clone());
        Ok(store)
    }

    /// Deletes a store and its file. Requests that have begun keep their examples.
    ///
    /// # Errors
    /// When there is no such store, or its file cannot be deleted: it is then still served.
    pub fn delete(&self, name: &str) -> Result<(), StoreError> {
        let dir = self.dir.as_deref().ok_or(StoreError::NoFolder)?;
        let _writing = self.lock();
        self.get(name)?;
        match fs::remove_file(dir.join(file_name(name))).and_then(|()| sync_folder(dir)) {
            Err(source) if source.kind() != ErrorKind::NotFound => return Err(not_writable(dir, name, source)),
            _ => self.write().remove(name),
        };
        Ok(())
    }

    /// Chooses examples for `instruction`, orders them as the prompt has them, and keeps what `budget` allows.
    ///
    /// Counts tokens, and with `hybrid` asks the embedding endpoint: call it where blocking is allowed.
    ///
    /// # Errors
    /// Each names the field of the request at fault: see [`IclError`]. There is never a fallback to fewer examples or
    /// to another way of choosing, but for what `icl.budget` asks for.
    pub fn select(
        &self,
        selection: &Selection,
        instruction: &str,
        budget: &TokenBudget<'_>,
    ) -> Result<Chosen, IclError> {
        let Selection { k, select, .. } = *selection;
        let store = self
            .get(&selection.store)
            .map_err(|_| IclError::UnknownStore { store: selection.store.clone(), known: known(&self.read()) })?;
        if !(1..=MAX_K).contains(&k) {
            return Err(IclError::K(k));
        }
        let num_examples = store.examples().len();
        if k > num_examples {
            return Err(IclError::NotEnough { store: selection.store.clone(), k, num_examples });
        }
        let seed = (select == Select::Random).then(|| selection.seed.unwrap_or(DEFAULT_SEED));
        let mut ranked = match select {
            Select::Fixed => (0..k).collect(),
            Select::Random => python_random::sample(seed.unwrap_or(DEFAULT_SEED), num_examples, k),
            Select::Bm25 => store.bm25.rank(instruction),
            Select::Hybrid => self.rank_hybrid(&store, instruction)?,
        };
        ranked.truncate(k);
        let reversed = self.nearest_last && matches!(select, Select::Bm25 | Select::Hybrid);
        let in_prompt_order = |n: usize| {
            let mut ids = ranked[..n].to_vec();
            if reversed {
                ids.reverse();
            }
            ids
        };
        let kept =
            budget.fit(selection, |n| in_prompt_order(n).into_iter().map(|id| &store.examples()[id]).collect())?;
        let ids = in_prompt_order(kept);
        Ok(Chosen { store, select, seed, ids })
    }

    fn rank_hybrid(&self, store: &Store, instruction: &str) -> Result<Vec<usize>, IclError> {
        let endpoint = self.endpoint.as_ref().ok_or(IclError::NoEmbeddings)?;
        let documents = store.embeddings(endpoint)?;
        let query = endpoint.embed(&[instruction])?.pop().unwrap_or_default();
        let by_meaning = embedding::rank_by_cosine(&documents, &query)?;
        Ok(embedding::fuse(&store.bm25.rank(instruction), &by_meaning))
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<String, Arc<Store>>> {
        self.stores.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, BTreeMap<String, Arc<Store>>> {
        self.stores.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn known(stores: &BTreeMap<String, Arc<Store>>) -> String {
    if stores.is_empty() {
        return "there are none".to_owned();
    }
    let names: Vec<&str> = stores.keys().map(String::as_str).collect();
    format!("there are: {}", names.join(", "))
}

fn unknown(name: &str, stores: &BTreeMap<String, Arc<Store>>) -> StoreError {
    StoreError::Unknown { name: name.to_owned(), known: known(stores) }
}

fn not_writable(dir: &Path, name: &str, source: io::Error) -> StoreError {
    warn!(folder = %dir.display(), store = name, error = %source, "an example store could not be written");
    StoreError::NotWritable { name: name.to_owned(), source }
}

fn file_name(name: &str) -> String {
    format!("{name}.{EXTENSION}")
}

/// The stores of a folder; files of other kinds, hidden ones included, are left alone.
fn read_folder(dir: &Path) -> Result<BTreeMap<String, Arc<Store>>, OpenError> {
    let in_folder = |source| OpenError::Folder { path: dir.to_owned(), source };
    let mut stores = BTreeMap::new();
    for entry in fs::read_dir(dir).map_err(in_folder)? {
        let path = entry.map_err(in_folder)?.path();
        let is_store = path.extension().is_some_and(|extension| extension == EXTENSION) && path.is_file();
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        if !is_store || name.starts_with('.') {
            continue;
        }
        let in_file = |source| OpenError::Store { path: path.clone(), source };
        check_name(&name).map_err(in_file)?;
        if stores.len() >= MAX_STORES {
            return Err(in_file(StoreError::TooManyStores { max: MAX_STORES }));
        }
        stores.insert(name.to_string(), Arc::new(Store::from_jsonl(&name, &read_file(&path)?, &path)?));
    }
    Ok(stores)
}

fn read_file(path: &Path) -> Result<String, OpenError> {
    let mut text = String::new();
    let file = File::open(path).map_err(|source| OpenError::Unreadable { path: path.to_owned(), source })?;
    // One byte more than allowed, to see that it is too much.
    file.take(MAX_STORE_BYTES as u64 + 1)
        .read_to_string(&mut text)
        .map_err(|source| OpenError::Unreadable { path: path.to_owned(), source })?;
    if text.len() > MAX_STORE_BYTES {
        let source = StoreError::TooLarge { num_bytes: text.len(), max: MAX_STORE_BYTES };
        return Err(OpenError::Store { path: path.to_owned(), source });
    }
    Ok(text)
}
