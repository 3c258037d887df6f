//! The folder of adapters as it is now. Nothing outside it is ever opened, whatever its links say.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::path::{Component, Path, PathBuf};

use cap_std::ambient_authority;
use cap_std::fs::{Dir, Metadata, OpenOptions};

use super::error::AdapterError;
use super::files::leads_outside;

const MAX_NAME_LEN: usize = 64;
/// Hidden, so never an adapter.
const STAGING: &str = ".lorry/staging";
/// How the name of what is not finished ends there. All else was taken out of its place.
const NEW: &str = ".new";
/// Shared by all who have something staged, and held alone by who clears away what was left.
const STAGING_LOCK: &str = ".lorry/staging.lock";
/// For what was in the way and is none that could be kept to roll back to.
const REMOVED: &str = ".lorry/removed";
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

/// A name as text: its bytes are escaped where it is none, and it is no valid one then.
pub fn as_text(name: &OsStr) -> String {
    name.to_str().map_or_else(|| name.as_encoded_bytes().escape_ascii().to_string(), str::to_owned)
}

pub fn is_hidden(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b".")
}

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
    pub fn folder_names(&self) -> io::Result<Vec<OsString>> {
        let mut names = Vec::new();
        for entry in self.dir.entries()? {
            let entry = entry?;
            let name = entry.file_name();
            let kind = entry.file_type()?;
            // A link that cannot be followed may still be one to a folder.
            let leads_to_folder = || match self.path.join(&name).metadata() {
                Ok(metadata) => metadata.is_dir(),
                Err(e) => e.kind() != io::ErrorKind::NotFound,
            };
            let is_folder = kind.is_dir() || kind.is_symlink() && leads_to_folder();
            if is_folder && !is_hidden(&name) {
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

    /// What was done to the name `target`, here and in what is staged, is on the disk when this returns.
    pub fn sync_name(&self, target: &str) -> io::Result<()> {
        let above = Path::new(target).ancestors().skip(1).filter(|path| !path.as_os_str().is_empty());
        for path in above.chain([Path::new(STAGING)]) {
            sync(&self.dir.open_dir(path)?)?;
        }
        sync(&self.dir)
    }

    /// As [`sync_name`](Self::sync_name), of what has been done: that it might not outlive a power cut is no reason to deny it.
    pub fn settle_name(&self, target: &str) {
        if let Err(e) = self.sync_name(target) {
            tracing::warn!("what was done to {target} in the folder of adapters may be undone by a power cut: {e}");
        }
    }

    /// A new empty folder for what is not finished.
    pub fn staging(&self) -> io::Result<Staging<'_>> {
        self.dir.create_dir_all(STAGING)?;
        let all = self.dir.open_dir(STAGING)?;
        let lock = self.staging_lock()?;
        // Where a file system has no locks, nobody gets this one alone.
        let _ = lock.lock_shared();
        // Servers that share the folder may have the same process id, each in its own container.
        let id = format!("{:016x}", rand::random::<u64>());
        let name = format!("{id}{NEW}");
        all.create_dir(&name)?;
        Ok(Staging { root: self, all, id, name, is_left: false, _lock: lock })
    }

    /// Clears away what servers have left that were killed: what was not finished is deleted, and what had been taken out of
    /// its place is put aside. Nothing, while any server has something staged.
    pub fn clear_staging(&self) -> io::Result<()> {
        let all = match self.dir.open_dir(STAGING) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            all => all?,
        };
        let left: Vec<OsString> = all.entries()?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<_>>()?;
        if left.is_empty() {
            return Ok(());
        }
        let lock = self.staging_lock()?;
        if lock.try_lock().is_err() {
            return Ok(());
        }
        for name in left {
            if name.as_encoded_bytes().ends_with(NEW.as_bytes()) {
                remove(&all, Path::new(&name));
                continue;
            }
            self.dir.create_dir_all(REMOVED)?;
            let aside = Path::new(REMOVED).join(&name);
            match all.rename(&name, &self.dir, &aside) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                renamed => {
                    renamed?;
                    let aside = as_text(aside.as_os_str());
                    self.settle_name(&aside);
                    tracing::warn!(
                        "what a server took out of the folder of adapters before it was killed is in {aside} now"
                    );
                }
            }
        }
        Ok(())
    }

    fn staging_lock(&self) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.write(true).create(true);
        Ok(self.dir.open_with(STAGING_LOCK, &options)?.into_std())
    }
}

/// What is in the folder, and its names, is on the disk when this returns.
pub fn sync(folder: &Dir) -> io::Result<()> {
    #[cfg(any(target_os = "linux", target_os = "macos"))]
    {
        use rustix::fs::{Mode, OFlags};
        // The handle itself may be one that can only be walked through.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let readable = rustix::fs::openat(folder, ".", flags, Mode::empty())?;
        match rustix::fs::fsync(readable).map_err(io::Error::from) {
            Err(e) if !is_unsupported(&e) => Err(e),
            _ => Ok(()),
        }
    }
    #[cfg(not(any(target_os = "linux", target_os = "macos")))]
    {
        let _ = folder;
        Ok(())
    }
}

/// Whether it says that a file system cannot do what it was asked for.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Unsupported | io::ErrorKind::InvalidInput)
}

/// A folder that vanishes with what is in it, unless it was put into place.
#[derive(Debug)]
pub struct Staging<'a> {
    root: &'a Root,
    all: Dir,
    id: String,
    name: String,
    is_left: bool,
    _lock: File,
}

impl Staging<'_> {
    pub fn dir(&self) -> io::Result<Dir> {
        self.all.open_dir(&self.name)
    }

    pub fn path(&self) -> PathBuf {
        self.root.path.join(STAGING).join(&self.name)
    }

    /// Puts the folder where nothing is.
    ///
    /// # Errors
    /// When something is there, too.
    pub fn add(&self, target: &str) -> io::Result<()> {
        self.all.rename(&self.name, &self.root.dir, target)
    }

    /// Puts the folder in place of `target`, which nobody sees missing; what was there vanishes.
    pub fn replace(mut self, target: &str) -> io::Result<()> {
        self.swap(target)
    }

    /// Puts the folder in place of `target`, which nobody sees missing; what was there is in here then.
    pub fn swap(&mut self, target: &str) -> io::Result<()> {
        debug_assert!(Path::new(target).components().all(|part| matches!(part, Component::Normal(_))));
        match self.root.dir.symlink_metadata(target) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => self.add(target),
            Err(e) => Err(e),
            Ok(_) => {
                let taken = self.name_of_taken(target);
                self.all.rename(&self.name, &self.all, &taken)?;
                self.name = taken;
                match self.exchange(target) {
                    Err(e) if is_unsupported(&e) => self.exchange_by_renames(target),
                    exchanged => exchanged,
                }
            }
        }
    }

    /// By which it is known from what is not finished, and found again.
    fn name_of_taken(&self, target: &str) -> String {
        let name = target.rsplit('/').next().unwrap_or(target);
        format!("{name}-{}", self.id)
    }

    /// At every moment what was there has a name.
    fn exchange_by_renames(&self, target: &str) -> io::Result<()> {
        let aside = format!("{}-aside", self.name);
        self.root.dir.rename(target, &self.all, &aside)?;
        match self.all.rename(&self.name, &self.root.dir, target) {
            Ok(()) => self.all.rename(&aside, &self.all, &self.name),
            Err(e) => {
                self.all.rename(&aside, &self.root.dir, target)?;
                Err(e)
            }
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

    /// Takes `target` out of the root, in here.
    pub fn take(&mut self, target: &str) -> io::Result<()> {
        self.all.remove_dir(&self.name)?;
        self.name = self.name_of_taken(target);
        self.root.dir.rename(target, &self.all, &self.name)
    }

    /// What is in here, if anything is.
    pub fn metadata(&self) -> io::Result<Metadata> {
        self.all.symlink_metadata(&self.name)
    }

    /// Puts what was taken out under the name `name` where it stays until somebody deletes it. Says where that is.
    pub fn put_aside(&self, name: &str) -> io::Result<String> {
        self.root.dir.create_dir_all(REMOVED)?;
        let path = format!("{REMOVED}/{name}-{}", self.id);
        self.add(&path)?;
        self.root.settle_name(&path);
        Ok(path)
    }

    /// Leaves here what cannot be put anywhere else. Says where that is.
    pub fn leave(mut self) -> String {
        self.is_left = true;
        format!("{STAGING}/{}", self.name)
    }
}

impl Drop for Staging<'_> {
    fn drop(&mut self) {
        if !self.is_left {
            remove(&self.all, Path::new(&self.name));
        }
    }
}

/// What cannot be deleted stays hidden; nothing reads it again.
fn remove(parent: &Dir, name: &Path) {
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

    fn staged<'a>(root: &'a Root, text: &str) -> Staging<'a> {
        let staging = root.staging().unwrap();
        staging.dir().unwrap().write("file", text).unwrap();
        staging
    }

    #[test]
    fn a_staged_folder_replaces_whole_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path()).unwrap();
        for text in ["first", "second"] {
            staged(&root, text).replace("a").unwrap();
            assert_eq!(root.dir.read_to_string("a/file").unwrap(), text);
        }
        root.staging().unwrap().take("a").unwrap();
        assert!(root.folder_names().unwrap().is_empty());
        assert_eq!(root.dir.read_dir(STAGING).unwrap().count(), 0);
    }

    #[test]
    fn what_was_in_place_is_at_hand_until_the_staging_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path()).unwrap();
        let swaps: [fn(&mut Staging<'_>, &str) -> io::Result<()>; 2] =
            [|staging, target| staging.swap(target), |staging, target| staging.exchange_by_renames(target)];
        for swap in swaps {
            staged(&root, "old").swap("a").unwrap();
            let mut staging = staged(&root, "new");
            swap(&mut staging, "a").unwrap();
            assert_eq!(staging.dir().unwrap().read_to_string("file").unwrap(), "old");
            // And back.
            swap(&mut staging, "a").unwrap();
            assert_eq!(root.dir.read_to_string("a/file").unwrap(), "old");
            staging.take("a").unwrap_err();
            assert_eq!(root.dir.read_to_string("a/file").unwrap(), "old", "what is staged is in its way");
        }
        assert_eq!(root.dir.read_dir(STAGING).unwrap().count(), 0);
    }

    #[test]
    fn what_is_put_aside_or_left_stays() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path()).unwrap();
        for text in ["1", "2"] {
            let aside = staged(&root, text).put_aside("a").unwrap();
            assert_eq!(root.dir.read_to_string(format!("{aside}/file")).unwrap(), text);
        }
        assert_eq!(root.dir.read_dir(REMOVED).unwrap().count(), 2);
        let left = staged(&root, "3").leave();
        assert_eq!(root.dir.read_to_string(format!("{left}/file")).unwrap(), "3");
        assert!(root.folder_names().unwrap().is_empty());
    }

    #[test]
    fn what_a_killed_server_left_is_deleted_or_put_aside_once_nobody_has_anything_staged() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path()).unwrap();
        root.clear_staging().unwrap();
        staged(&root, "half").leave();
        root.dir.create_dir("sub").unwrap();
        ["a", "sub/b"].iter().for_each(|target| staged(&root, "old").swap(target).unwrap());
        let mut swapped = staged(&root, "new");
        swapped.swap("a").unwrap();
        swapped.leave();
        let mut taken = root.staging().unwrap();
        taken.take("sub/b").unwrap();
        taken.leave();
        // Between two renames.
        root.dir.create_dir_all(format!("{STAGING}/c-0-aside")).unwrap();
        root.dir.write(format!("{STAGING}/c-0-aside/file"), "old").unwrap();
        let num_left = || root.dir.read_dir(STAGING).unwrap().count();

        // As by another server.
        let other = Root::open(dir.path()).unwrap();
        let staging = staged(&other, "under way");
        root.clear_staging().unwrap();
        assert_eq!((num_left(), root.dir.exists(REMOVED)), (5, false));
        assert_eq!(staging.dir().unwrap().read_to_string("file").unwrap(), "under way");
        drop(staging);
        root.clear_staging().unwrap();
        assert_eq!(num_left(), 0);
        let aside = root.dir.read_dir(REMOVED).unwrap().map(|entry| {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            (name[..2].to_owned(), entry.open_dir().unwrap().read_to_string("file").unwrap())
        });
        let mut aside: Vec<_> = aside.collect();
        aside.sort_unstable();
        assert_eq!(aside, ["a-", "b-", "c-"].map(|name| (name.to_owned(), "old".to_owned())));
        assert_eq!(root.dir.read_to_string("a/file").unwrap(), "new");
        staged(&root, "again").replace("a").unwrap();
    }

    #[test]
    fn nothing_is_added_over_what_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path()).unwrap();
        staged(&root, "first").add("a").unwrap();
        staged(&root, "second").add("a").unwrap_err();
        assert_eq!(root.dir.read_to_string("a/file").unwrap(), "first");
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
