//! Signs that something in the folder has changed. What it is, the scan finds out.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use notify::event::{AccessKind, AccessMode};
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher};

/// Calls `notice` on every change under `root`, from a thread of its own, for as long as the result lives.
pub fn watch(root: &Path, notice: impl Fn() + Send + 'static) -> notify::Result<RecommendedWatcher> {
    let root = root.canonicalize()?;
    let inside = root.clone();
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
        // An error means that events were lost.
        if event.map_or(true, |event| is_change(&event, &inside)) {
            notice();
        }
    })?;
    watcher.watch(&root, RecursiveMode::Recursive)?;
    Ok(watcher)
}

/// Reading is no change, and nothing in a hidden folder is.
fn is_change(event: &Event, root: &Path) -> bool {
    let is_written = match event.kind {
        EventKind::Access(kind) => kind == AccessKind::Close(AccessMode::Write),
        _ => true,
    };
    let is_hidden = |path: &PathBuf| {
        let inside = path.strip_prefix(root).ok().and_then(|path| path.iter().next());
        inside.is_some_and(|first: &OsStr| first.as_encoded_bytes().starts_with(b"."))
    };
    is_written && (event.paths.is_empty() || !event.paths.iter().all(is_hidden))
}

#[cfg(test)]
mod tests {
    use super::*;
    use notify::event::CreateKind;

    #[test]
    fn only_writing_to_what_is_not_hidden_is_a_change() {
        let root = Path::new("/root");
        let create = EventKind::Create(CreateKind::Any);
        let open = EventKind::Access(AccessKind::Open(AccessMode::Any));
        let close = EventKind::Access(AccessKind::Close(AccessMode::Write));
        let event = |kind, path: &str| Event::new(kind).add_path(root.join(path));
        assert!(is_change(&event(create, "a/adapter.toml"), root));
        assert!(is_change(&event(close, "a/adapter.toml"), root));
        assert!(is_change(&event(create, ".lorry/staging/1").add_path(root.join("a")), root));
        assert!(!is_change(&event(open, "a/adapter.toml"), root));
        assert!(!is_change(&event(create, ".lorry/staging/1"), root));
    }
}
