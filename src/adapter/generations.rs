//! The files of earlier generations, kept as hard links so that an adapter can be rolled back.
//!
//! `.lorry/generations/<name>/<generation>/` holds the files, and a record of their fingerprint: files that were
//! rewritten in place changed with their links, and are no longer that generation. What else the folder of the adapter held
//! when it was taken away or replaced is there too, in `folder/`. What is no longer a generation goes when the next is kept.

use std::cmp::Reverse;
use std::io;
use std::time::{Duration, SystemTime};

use cap_std::fs::{Dir, OpenOptions};

use super::files::{AdapterFiles, FILES, Fingerprint};
use super::root::{self, Root, Staging};

const FOLDER: &str = ".lorry/generations";
const RECORD: &str = "fingerprint.json";
const WHOLE: &str = "folder";
/// What file systems tell apart that keep no more than microseconds.
const TICK: Duration = Duration::from_millis(1);

/// Keeps the files in `folder` as `generation` of `name`, and `num_kept` others. Several servers may do so at once in one
/// folder of adapters: a generation appears whole.
pub fn keep(root: &Root, name: &str, generation: &str, folder: &Dir, num_kept: usize) -> io::Result<()> {
    let path = path(name, generation);
    if !is_kept(root, &path)? {
        root.dir.create_dir_all(format!("{FOLDER}/{name}"))?;
        let staging = root.staging()?;
        let kept = staging.dir()?;
        for file in FILES {
            link(folder, file, &kept)?;
        }
        record(&kept)?;
        let put = staging.replace(&path);
        // Another server may have been quicker.
        if put.is_err() && !is_kept(root, &path)? {
            return put;
        }
    }
    // Its time says when the generation was last in use: after all others, also where a clock has been set back.
    let latest = kept(root, name).into_iter().find(|(_, other, _)| other != generation);
    let last_used = latest.map_or(SystemTime::UNIX_EPOCH, |(latest, ..)| latest + TICK).max(SystemTime::now());
    mark_used(&root.dir.open_dir(&path)?, last_used)?;
    prune(root, name, generation, num_kept);
    Ok(())
}

/// Deletes what is no longer whole, and the generations that were last in use before `num_kept` others than `current`.
fn prune(root: &Root, name: &str, current: &str, num_kept: usize) {
    let Ok(entries) = root.dir.read_dir(format!("{FOLDER}/{name}")) else { return };
    let folders =
        entries.flatten().filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.open_dir().ok()?)));
    let lost = folders.filter(|(other, folder)| other != current && is_lost(folder, other)).map(|(other, _)| other);
    // First, as some of these may be found whole.
    let lost: Vec<String> = lost.collect();
    let others = list(root, name).into_iter().map(|(other, _)| other).filter(|other| other != current);
    for old in lost.into_iter().chain(others.skip(num_kept)) {
        match root.dir.remove_dir_all(path(name, &old)) {
            // Another server may have been quicker.
            Err(e) if e.kind() != io::ErrorKind::NotFound => tracing::warn!(
                "adapter {name}: the files of its generation {old:.8} are kept longer than asked for: {e}"
            ),
            _ => {}
        }
    }
}

/// Whether files were removed or changed since they were kept. Where only their times did, as in a copy of the whole folder,
/// they are recorded anew.
fn is_lost(kept: &Dir, generation: &str) -> bool {
    if !intact(kept).is_ok_and(|intact| intact.is_none()) {
        return false;
    }
    match AdapterFiles::read_settled(kept, u64::MAX).1 {
        Ok(files) if files.generation() == generation => {
            let last_used = kept.metadata(RECORD).and_then(|record| record.modified());
            let last_used = last_used.map_or(SystemTime::UNIX_EPOCH, cap_std::time::SystemTime::into_std);
            if let Err(e) = record(kept).and_then(|()| mark_used(kept, last_used)) {
                tracing::warn!("the generation {generation:.8} is whole, and cannot be recorded as that: {e}");
            }
            false
        }
        Ok(_) => true,
        Err(e) => !e.may_pass(),
    }
}

/// Notes what the files are now.
fn record(kept: &Dir) -> io::Result<()> {
    let fingerprint = serde_json::to_vec(&Fingerprint::of(kept).map_err(io::Error::other)?)?;
    kept.write(RECORD, fingerprint)
}

fn mark_used(kept: &Dir, last_used: SystemTime) -> io::Result<()> {
    kept.open_with(RECORD, OpenOptions::new().write(true))?.into_std().set_modified(last_used)
}

/// What [`keep`] has kept is on the disk when this returns: it may be the only copy soon.
pub fn sync(root: &Root, name: &str, generation: &str) -> io::Result<()> {
    let path = path(name, generation);
    let kept = root.dir.open_dir(&path)?;
    for file in FILES.into_iter().chain([RECORD]) {
        match kept.open(file) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            file => file?.sync_all()?,
        }
    }
    root::sync(&kept)?;
    root.sync_name(&path)
}

/// Puts what was taken out of the folder of adapters, where [`keep`] has kept its files, beside them.
pub fn keep_whole(root: &Root, name: &str, generation: &str, taken: &mut Staging<'_>) -> io::Result<()> {
    let path = format!("{}/{WHOLE}", path(name, generation));
    taken.swap(&path)?;
    root.settle_name(&path);
    Ok(())
}

fn path(name: &str, generation: &str) -> String {
    format!("{FOLDER}/{name}/{generation}")
}

/// A link where that is possible, else a copy. Nothing is there yet under that name: a copy over a link to the same file would
/// empty both.
fn link(from: &Dir, file: &str, to: &Dir) -> io::Result<()> {
    match from.symlink_metadata(file) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Ok(metadata) if metadata.is_file() && from.hard_link(file, to, file).is_ok() => Ok(()),
        _ => from.copy(file, to, file).map(drop),
    }
}

/// The kept generations of `name` and their files, the one last in use first.
pub fn list(root: &Root, name: &str) -> Vec<(String, Fingerprint)> {
    kept(root, name).into_iter().map(|(_, generation, fingerprint)| (generation, fingerprint)).collect()
}

/// As [`list`], with the times of their last use.
fn kept(root: &Root, name: &str) -> Vec<(SystemTime, String, Fingerprint)> {
    let Ok(entries) = root.dir.read_dir(format!("{FOLDER}/{name}")) else { return Vec::new() };
    let mut kept: Vec<_> = entries
        .flatten()
        .filter_map(|entry| {
            let folder = entry.open_dir().ok()?;
            let fingerprint = intact(&folder).ok()??;
            let last_used = folder.metadata(RECORD).and_then(|record| record.modified()).ok()?.into_std();
            Some((last_used, entry.file_name().into_string().ok()?, fingerprint))
        })
        .collect();
    kept.sort_unstable_by_key(|(last_used, ..)| Reverse(*last_used));
    kept
}

/// The folder of a kept generation; its content is for the caller to verify.
pub fn open(root: &Root, name: &str, generation: &str) -> io::Result<Dir> {
    root.dir.open_dir(path(name, generation))
}

/// What cannot be looked at is not given up for lost.
fn is_kept(root: &Root, path: &str) -> io::Result<bool> {
    match root.dir.open_dir(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        kept => Ok(intact(&kept?)?.is_some()),
    }
}

/// What the files are now, if they are what was kept.
fn intact(kept: &Dir) -> io::Result<Option<Fingerprint>> {
    let record = match kept.read(RECORD) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        record => record?,
    };
    let fingerprint = Fingerprint::of(kept).map_err(io::Error::other)?;
    let is_intact = serde_json::from_slice(&record).is_ok_and(|record| fingerprint.is_recorded_as(&record));
    Ok(is_intact.then_some(fingerprint))
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn names(root: &Root, name: &str) -> Vec<String> {
        list(root, name).into_iter().map(|(generation, _)| generation).collect()
    }

    fn write(root: &Root, text: &str) -> Dir {
        let staging = root.staging().unwrap();
        staging.dir().unwrap().write(FILES[0], text).unwrap();
        staging.replace("a").unwrap();
        root.dir.open_dir("a").unwrap()
    }

    #[test]
    fn the_latest_generations_are_kept_in_order_of_their_use() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path()).unwrap();
        for generation in ["1", "2", "3", "2", "4"] {
            keep(&root, "a", generation, &write(&root, generation), 2).unwrap();
        }
        assert_eq!(names(&root, "a"), ["4", "2", "3"]);
        assert_eq!(open(&root, "a", "2").unwrap().read_to_string(FILES[0]).unwrap(), "2");
        assert!(names(&root, "b").is_empty() && open(&root, "a", "1").is_err());
    }

    #[test]
    fn a_clock_that_was_set_back_changes_no_order() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path()).unwrap();
        keep(&root, "a", "1", &write(&root, "1"), 2).unwrap();
        let record = root.dir.open_with(format!("{FOLDER}/a/1/{RECORD}"), OpenOptions::new().write(true)).unwrap();
        record.into_std().set_modified(SystemTime::now() + Duration::from_secs(86_400)).unwrap();
        for generation in ["2", "3", "4"] {
            keep(&root, "a", generation, &write(&root, generation), 2).unwrap();
        }
        assert_eq!(names(&root, "a"), ["4", "3", "2"]);
    }

    #[test]
    fn several_servers_keep_one_generation_at_once_and_lose_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path()).unwrap();
        for generation in 0..40 {
            let generation = generation.to_string();
            write(&root, &generation);
            thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        let root = Root::open(dir.path()).unwrap();
                        let folder = root.dir.open_dir("a").unwrap();
                        // Another may be putting the same into its place.
                        let _ = keep(&root, "a", &generation, &folder, 100);
                    });
                }
            });
            assert_eq!(root.dir.read_to_string(format!("a/{}", FILES[0])).unwrap(), generation);
            let of_kept = open(&root, "a", &generation).unwrap().read_to_string(FILES[0]).unwrap();
            assert_eq!((of_kept, names(&root, "a")[0].clone()), (generation.clone(), generation));
        }
    }

    #[test]
    fn a_generation_that_was_written_over_is_no_longer_one() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path()).unwrap();
        let folder = write(&root, "1");
        keep(&root, "a", "1", &folder, 2).unwrap();
        assert_eq!(names(&root, "a"), ["1"]);
        folder.write(FILES[0], "changed").unwrap();
        assert!(names(&root, "a").is_empty());
        keep(&root, "a", "1", &write(&root, "1"), 2).unwrap();
        assert_eq!(names(&root, "a"), ["1"]);
    }

    /// Keeps an adapter's files with these weights, and returns what it is kept as.
    fn keep_adapter(root: &Root, weights: &str, num_kept: usize) -> String {
        let files = AdapterFiles { config: b"{}".into(), manifest: None, weights: weights.into() };
        let staging = root.staging().unwrap();
        files.write(&staging.dir().unwrap()).unwrap();
        staging.replace("a").unwrap();
        keep(root, "a", &files.generation(), &root.dir.open_dir("a").unwrap(), num_kept).unwrap();
        files.generation()
    }

    #[test]
    fn what_is_no_longer_whole_is_deleted_when_the_next_is_kept_and_displaces_nothing() {
        let spoil: [fn(&Dir); 5] = [
            |kept| kept.remove_file(FILES[0]).unwrap(),
            |kept| kept.remove_file(FILES[1]).unwrap(),
            |kept| kept.write(FILES[1], "changed").unwrap(),
            |kept| kept.write(FILES[2], "pin = true").unwrap(),
            // As by a server that was killed while it deleted them.
            |kept| [RECORD, FILES[0]].iter().for_each(|file| kept.remove_file(file).unwrap()),
        ];
        for (index, spoil) in spoil.into_iter().enumerate() {
            let dir = tempfile::tempdir().unwrap();
            let root = Root::open(dir.path()).unwrap();
            let [first, second] = ["1", "2"].map(|weights| keep_adapter(&root, weights, 2));
            spoil(&open(&root, "a", &second).unwrap());
            let third = keep_adapter(&root, "3", 2);
            assert_eq!(names(&root, "a"), [third, first], "{index}");
            assert_eq!(root.dir.read_dir(format!("{FOLDER}/a")).unwrap().count(), 2, "{index}");
        }
    }

    #[test]
    fn a_copy_with_other_times_is_recorded_anew_and_what_cannot_be_read_stays() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path()).unwrap();
        let [first, second] = ["1", "2"].map(|weights| keep_adapter(&root, weights, 3));
        let without_record = keep_adapter(&root, "3", 3);
        root.dir.remove_file(format!("{FOLDER}/a/{without_record}/{RECORD}")).unwrap();
        for file in FILES[..2].iter().map(|file| format!("{FOLDER}/a/{first}/{file}")) {
            let file = root.dir.open_with(file, OpenOptions::new().write(true)).unwrap();
            file.into_std().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        }
        let unreadable = format!("{FOLDER}/a/{second}/{}", FILES[1]);
        root.dir.remove_file(&unreadable).unwrap();
        // A link to itself.
        root.dir.symlink(FILES[1], &unreadable).unwrap();
        assert!(names(&root, "a").is_empty());
        let last = keep_adapter(&root, "4", 3);
        assert_eq!(names(&root, "a"), [last, first.clone(), without_record]);
        assert_eq!(open(&root, "a", &first).unwrap().read_to_string(FILES[1]).unwrap(), "1");
        assert!(open(&root, "a", &second).is_ok());
    }

    #[test]
    fn what_was_kept_is_found_again_where_disks_have_other_numbers() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path()).unwrap();
        keep(&root, "a", "1", &write(&root, "1"), 2).unwrap();
        let path = format!("{FOLDER}/a/1");
        // As it was written before.
        let mut record: serde_json::Value =
            serde_json::from_slice(&root.dir.read(format!("{path}/{RECORD}")).unwrap()).unwrap();
        record[0]["device"] = 9.into();
        root.dir.write(format!("{path}/{RECORD}"), record.to_string()).unwrap();
        assert_eq!(names(&root, "a"), ["1"]);
    }

    #[test]
    fn the_whole_folder_is_kept_beside_its_files_and_goes_with_them() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path()).unwrap();
        let readme = format!("{FOLDER}/a/1/{WHOLE}/README.md");
        for text in ["first", "second"] {
            let folder = write(&root, "1");
            folder.write("README.md", text).unwrap();
            keep(&root, "a", "1", &folder, 1).unwrap();
            sync(&root, "a", "1").unwrap();
            let mut taken = root.staging().unwrap();
            taken.take("a").unwrap();
            keep_whole(&root, "a", "1", &mut taken).unwrap();
            drop(taken);
            assert_eq!(
                (root.dir.read_to_string(&readme).unwrap(), names(&root, "a")),
                (text.to_owned(), vec!["1".to_owned()])
            );
        }
        for generation in ["2", "3"] {
            keep(&root, "a", generation, &write(&root, generation), 1).unwrap();
        }
        assert!(!root.dir.exists(readme) && names(&root, "a") == ["3", "2"]);
    }

    #[test]
    fn what_cannot_be_kept_is_an_error_and_takes_nothing_away() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::open(dir.path()).unwrap();
        let folder = write(&root, "1");
        keep(&root, "a", "1", &folder, 2).unwrap();
        root.dir.rename(format!("{FOLDER}/a"), &root.dir, "kept").unwrap();
        root.dir.write(format!("{FOLDER}/a"), "").unwrap();
        keep(&root, "a", "2", &write(&root, "2"), 2).unwrap_err();
        assert_eq!(root.dir.read_to_string(format!("a/{}", FILES[0])).unwrap(), "2");
        assert!(root.dir.exists("kept/1"));
    }
}
