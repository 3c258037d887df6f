//! The folder of adapters as it is now. Nothing outside it is ever opened, whatever its links say.

use std::io;
use std::path::{Component, Path, PathBuf};

use cap_std::ambient_authority;
use cap_std::fs::Dir;

use super::error::AdapterError;
use super::files::leads_outside;

const MAX_NAME_LEN: usize = 64;
/// Hidden, so never an adapter.
const STAGING: &str = ".lorry/staging";
/// Where the paths of adapters are, that of their events is; and metrics call what no single adapter serves so.
const RESERVED_NAMES: [&str; 3] = ["events", "base", "composition"];

/// Whether a client can write it in a model id.
pub fn is_valid_name(name: &str) -> bool {
    name.len() <= MAX_NAME_LEN
        && !RESERVED_NAMES.contains(&name)
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
}

pub const NAME_RULE: &str = "must be 1 to 64 letters, digits, dots, dashes and underscores, beginning with a letter or digit, and none of \
                             `events`, `base` and `composition`";

/// The folder opened. Opened anew for each piece of work: the path may be a link that is pointed elsewhere.
#[derive(Debug)]
pub struct Root {
    pub dir: Dir,
    /// Resolved.
    path: PathBuf,
}

impl Root {
    pub fn open(path: &Path) -> io::Result<Self> {
        let path = path.canonicalize()?;
        Ok(Self { dir: Dir::open_ambient_dir(&path, ambient_authority())?, path })
    }

    /// Names of the sub-folders that are not hidden, links to folders among them, sorted.
    pub fn folder_names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in self.dir.entries()? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let kind = entry.file_type()?;
            let is_folder = kind.is_dir() || kind.is_symlink() && self.path.join(&name).is_dir();
            if is_folder && !name.starts_with('.') {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    /// Opens the folder at `path`, relative to the root or absolute, wherever links lead it, as long as that is in here.
    pub fn folder(&self, path: &Path) -> Result<Dir, AdapterError> {
        let opened =
            if path.is_absolute() { Err(io::ErrorKind::PermissionDenied.into()) } else { self.dir.open_dir(path) };
        let refused = match opened {
            Ok(folder) => return Ok(folder),
            Err(e) => e,
        };
        if !leads_outside(&refused) {
            return Err(AdapterError::Folder(refused));
        }
        // Absolute paths and absolute links lead out of a handle even where they come back in.
        let resolved = self.path.join(path).canonicalize().map_err(AdapterError::Folder)?;
        let inside = resolved.strip_prefix(&self.path).map_err(|_| AdapterError::FolderOutside)?;
        self.dir.open_dir(inside).map_err(AdapterError::Folder)
    }

    /// A new empty folder for what is not finished.
    pub fn staging(&self) -> io::Result<Staging<'_>> {
        self.dir.create_dir_all(STAGING)?;
        let all = self.dir.open_dir(STAGING)?;
        // Servers that share the folder may have the same process id, each in its own container.
        let name = format!("{:016x}", rand::random::<u64>());
        all.create_dir(&name)?;
        Ok(Staging { root: self, all, name })
    }
}

/// A folder that vanishes with what is in it, unless it was put into place.
#[derive(Debug)]
pub struct Staging<'a> {
    root: &'a Root,
    all: Dir,
    name: String,
}

impl Staging<'_> {
    pub fn dir(&self) -> io::Result<Dir> {
        self.all.open_dir(&self.name)
    }

    pub fn path(&self) -> PathBuf {
        self.root.path.join(STAGING).join(&self.name)
    }

    /// Puts the folder in place of `target`, which nobody sees missing; what was there vanishes.
    pub fn replace(self, target: &str) -> io::Result<()> {
        debug_assert!(Path::new(target).components().all(|part| matches!(part, Component::Normal(_))));
        if self.root.dir.symlink_metadata(target).is_err() {
            return self.all.rename(&self.name, &self.root.dir, target);
        }
        match self.exchange(target) {
            Ok(()) => Ok(()),
            // A file system that cannot exchange two folders.
            Err(e) if matches!(e.kind(), io::ErrorKind::Unsupported | io::ErrorKind::InvalidInput) => {
                let old = self.root.staging()?;
                old.all.remove_dir(&old.name)?;
                self.root.dir.rename(target, &old.all, &old.name)?;
                let replaced = self.all.rename(&self.name, &self.root.dir, target);
                if replaced.is_err() {
                    old.all.rename(&old.name, &self.root.dir, target)?;
                }
                replaced
            }
            Err(e) => Err(e),
        }
    }

    #[cfg(any(target_os = "linux", target_os = "macos"))]
    fn exchange(&self, target: &str) -> io::Result<()> {
        use rustix::fs::{RenameFlags, renameat_with};
        Ok(renameat_with(&self.all, &self.name, &self.root.dir, target, RenameFlags::EXCHANGE)?)
    }

    #[cfg(not(any(target_os = "linux", target_os = "macos")))]
    fn exchange(&self, _target: &str) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Takes `target` out of the root, and deletes it.
    pub fn take(self, target: &str) -> io::Result<()> {
        self.all.remove_dir(&self.name)?;
        self.root.dir.rename(target, &self.all, &self.name)
    }
}

impl Drop for Staging<'_> {
    fn drop(&mut self) {
        remove(&self.all, &self.name);
    }
}

/// What cannot be deleted stays hidden; nothing reads it again.
fn remove(parent: &Dir, name: &str) {
    let removed = match parent.symlink_metadata(name) {
        Ok(metadata) if metadata.is_symlink() => parent.remove_file(name),
        Ok(_) => parent.remove_dir_all(name),
        Err(_) => Ok(()),
    };
    if let Err(e) = removed {
        tracing::warn!("a folder under {STAGING} cannot be deleted: {e}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_what_a_client_can_write_in_a_model_id() {
        for good in ["a", "conala", "A1.b_c-d", &"x".repeat(64)] {
            assert!(is_valid_name(good), "{good}");
        }
        for bad in
            ["", "-a", "_a", ".a", "..", "a b", "a/b", "a:b", "é", &"x".repeat(65), "events", "base", "composition"]
        {
            assert!(!is_valid_name(bad), "{bad}");
        }
    }

    #[test]
    fn a_staged_folder_replaces_whole_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path()).unwrap();
        for text in ["first", "second"] {
            let staging = root.staging().unwrap();
            staging.dir().unwrap().write("file", text).unwrap();
            staging.replace("a").unwrap();
            assert_eq!(root.dir.read_to_string("a/file").unwrap(), text);
        }
        root.staging().unwrap().take("a").unwrap();
        assert!(root.folder_names().unwrap().is_empty());
        assert_eq!(root.dir.read_dir(STAGING).unwrap().count(), 0);
    }

    #[cfg(unix)]
    #[test]
    fn only_folders_under_the_root_are_opened() {
        use std::os::unix::fs::symlink;
        let outside = tempfile::tempdir().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path()).unwrap();
        root.dir.create_dir_all("sub/a").unwrap();
        symlink(outside.path(), dir.path().join("out")).unwrap();
        symlink(dir.path().join("sub/a"), dir.path().join("in")).unwrap();
        symlink("../sub/a", dir.path().join("sub/relative")).unwrap();
        let absolute = dir.path().join("sub/a");
        for inside in ["sub/a", "in", "sub/relative", "sub/../sub/a", absolute.to_str().unwrap()] {
            assert!(root.folder(Path::new(inside)).is_ok(), "{inside}");
        }
        for bad in ["out", "..", "sub/../..", "/", outside.path().to_str().unwrap()] {
            assert!(matches!(root.folder(Path::new(bad)), Err(AdapterError::FolderOutside)), "{bad}");
        }
        assert!(matches!(root.folder(Path::new("none")), Err(AdapterError::Folder(_))));
        assert_eq!(root.folder_names().unwrap(), ["in", "out", "sub"]);
    }
}
