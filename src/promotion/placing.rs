//! Puts a candidate where the canary's arm finds it, whole, or leaves what is there.

use tokio::time::sleep;

use super::RETRY;
use crate::adapter::registry::{AcquireError, AdapterRegistry, AdapterStatus, ChangeError, Source};

/// Why a candidate that has passed is not served.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError {
    #[error("it was replaced while it was checked: ask again")]
    Replaced,
    #[error("it has passed, and cannot be installed as {name}: {cause}")]
    Install { name: String, cause: ChangeError },
    #[error("it has passed, and cannot be loaded any more: {0}")]
    Load(#[from] AcquireError),
    /// Nobody wants it any more.
    #[error("it was withdrawn")]
    Withdrawn,
}

/// Installs the adapter `candidate`, of this generation, as `name`, and loads it, for as long as `is_wanted`. Result: the
/// generation that it replaces.
///
/// # Errors
/// See [`PlaceError`]; `name` has then what it had before.
pub async fn place(
    adapters: &AdapterRegistry,
    candidate: &str,
    generation: &str,
    name: &str,
    is_wanted: impl Fn() -> bool,
) -> Result<Option<String>, PlaceError> {
    if adapters.status(candidate).and_then(|status| status.generation).as_deref() != Some(generation) {
        return Err(PlaceError::Replaced);
    }
    if !is_wanted() {
        return Err(PlaceError::Withdrawn);
    }
    let before = adapters.status(name);
    let mut installed = generation.to_owned();
    if name != candidate {
        let status = adapters.install(name, Source::Folder(candidate.into()), None).await;
        let status = status.map_err(|cause| PlaceError::Install { name: name.to_owned(), cause })?;
        // Perhaps another one, which was put under the candidate's name meanwhile.
        installed = status.files_generation.unwrap_or(installed);
    }
    match load(adapters, generation, name, is_wanted).await {
        Ok(()) => Ok(before.and_then(|before| before.generation).filter(|before| before != generation)),
        Err(error) => {
            if name != candidate {
                put_back(adapters, name, &installed, before).await;
            }
            Err(error)
        }
    }
}

/// Waits for memory, and for files that cannot be read at the moment: neither says anything of the candidate.
async fn load(
    adapters: &AdapterRegistry,
    generation: &str,
    name: &str,
    is_wanted: impl Fn() -> bool,
) -> Result<(), PlaceError> {
    loop {
        let loaded = adapters.load(name).await;
        if !is_wanted() {
            return Err(PlaceError::Withdrawn);
        }
        match loaded {
            Ok(AdapterStatus { is_stale: true, .. } | AdapterStatus { generation: None, .. })
            | Err(AcquireError::OutOfMemory(_) | AcquireError::Unreadable { .. }) => sleep(RETRY).await,
            Ok(AdapterStatus { generation: Some(loaded), .. }) if loaded == generation => return Ok(()),
            Ok(_) => return Err(PlaceError::Replaced),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Unless somebody else has put something there meanwhile.
async fn put_back(adapters: &AdapterRegistry, name: &str, installed: &str, before: Option<AdapterStatus>) {
    let undone = match before {
        Some(before) => adapters.roll_back(name, before.generation.as_deref(), Some(installed)).await.map(drop),
        None => adapters.remove(name, Some(installed)).await,
    };
    if let Err(error) = undone {
        tracing::warn!("the adapter {name} stays as it is, without what was there before a candidate: {error}");
    }
}
