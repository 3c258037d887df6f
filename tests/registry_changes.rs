//! Changes of the folder of adapters that clients ask for: safe, atomic, and possible to take back.

mod fixtures;
mod folder;

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use fixtures::{copy_adapter, fixtures};
use folder::{Fixture, Shapes, eventually, generation, install, status, write};
use lorry::adapter::registry::{AcquireError, AdapterRegistry, ChangeError, Phase};
use lorry::metrics::Metrics;

#[tokio::test]
async fn a_change_is_made_only_to_the_generation_it_was_meant_for() {
    let fixture = Fixture::new(&[]);
    let registry = fixture.registry();
    write(&fixture.path(".staging/1"), 1.0, "");
    write(&fixture.path(".staging/2"), 2.0, "");
    let first = install(&registry, "a", ".staging/1", Some("")).await.unwrap();
    assert_eq!(status(&registry, "a").phase, Phase::Ready);
    let conflict =
        |expected: &str, found: &str| ChangeError::Conflict { expected: expected.to_owned(), found: found.to_owned() };
    assert_eq!(install(&registry, "a", ".staging/2", Some("")).await, Err(conflict("", &first)));
    assert_eq!(install(&registry, "b", ".staging/2", Some(&first)).await, Err(conflict(&first, "")));
    assert_eq!(registry.remove("a", Some("0")).await, Err(conflict("0", &first)));
    let second = install(&registry, "a", ".staging/2", Some(&first)).await.unwrap();
    assert_ne!(first, second);
    assert_eq!(registry.acquire("a").await.unwrap().generation, second);
    assert_eq!(registry.remove("a", Some(&second)).await, Ok(()));
    assert!(registry.status("a").is_none() && !fixture.path("a").exists());
    assert_eq!(registry.remove("a", None).await, Err(ChangeError::Unknown("a".to_owned())));
}

#[tokio::test]
async fn the_same_content_again_changes_nothing() {
    let fixture = Fixture::new(&["a"]);
    let registry = fixture.registry();
    let before = (generation(&registry, "a"), fs::metadata(fixture.path("a")).unwrap().modified().unwrap());
    write(&fixture.path(".staging/1"), 1.0, "");
    for source in [".staging/1", "a"] {
        install(&registry, "a", source, None).await.unwrap();
    }
    let after = (generation(&registry, "a"), fs::metadata(fixture.path("a")).unwrap().modified().unwrap());
    assert_eq!(after, before);
    assert_eq!(fixture.num_loads(), 1);
}

#[tokio::test]
async fn what_cannot_be_served_is_not_installed() {
    let fixture = Fixture::new(&["a"]);
    let registry = fixture.registry();
    let before = generation(&registry, "a");
    write(&fixture.path(".staging/bad"), f32::NAN, "");
    write(&fixture.path(".staging/digest"), 1.0, &format!("sha256 = '{}'", "0".repeat(64)));
    fs::create_dir(fixture.path("notes")).unwrap();
    for (folder, word) in [(".staging/bad", "NaN"), (".staging/digest", "sha256"), ("notes", "adapter_config.json")] {
        for name in ["a", "b"] {
            let error = install(&registry, name, folder, None).await.unwrap_err();
            assert!(matches!(&error, ChangeError::Refused(cause) if cause.contains(word)), "{error}");
        }
    }
    let outside = tempfile::tempdir().unwrap();
    write(&outside.path().join("x"), 1.0, "");
    let outside = outside.path().join("x");
    std::os::unix::fs::symlink(&outside, fixture.path(".link")).unwrap();
    for folder in ["none", "..", ".link", outside.to_str().unwrap()] {
        let error = install(&registry, "b", folder, None).await.unwrap_err();
        assert!(matches!(&error, ChangeError::Source(cause) if !cause.contains('/')), "{error}");
    }
    for name in ["..", "", "a/b", ".hidden", "é"] {
        assert!(matches!(install(&registry, name, "a", None).await, Err(ChangeError::InvalidName(_))), "{name}");
    }
    assert!(matches!(install(&registry, "notes", "a", None).await, Err(ChangeError::NoAdapter(_))));
    assert_eq!((generation(&registry, "a"), registry.list().len()), (before, 1));
    assert!(fs::read_dir(fixture.path(".lorry/staging")).map_or(true, |mut left| left.next().is_none()));
}

#[tokio::test]
async fn earlier_generations_can_be_installed_again() {
    let fixture = Fixture::new(&["a"]);
    let registry = fixture.registry();
    let mut generations = vec![generation(&registry, "a").unwrap()];
    for value in [2.0, 3.0] {
        let latest = generations.last().cloned();
        fixture.write("a", value);
        eventually("a is replaced", || generation(&registry, "a") != latest);
        generations.extend(generation(&registry, "a"));
    }
    write(&fixture.path(".staging/4"), 4.0, "");
    generations.push(install(&registry, "a", ".staging/4", None).await.unwrap());
    let [_, second, third, fourth] = &generations[..] else { panic!("{generations:?}") };
    assert_eq!(status(&registry, "a").previous_generations, [third.clone(), second.clone()]);

    let rolled_back = registry.roll_back("a", None, None).await.unwrap();
    assert_eq!(rolled_back.generation.as_ref(), Some(third));
    assert_eq!(registry.acquire("a").await.unwrap().generation, *third);
    assert_eq!(rolled_back.previous_generations, [fourth.clone(), second.clone()]);
    assert_eq!(registry.roll_back("a", Some(second), None).await.unwrap().generation.as_ref(), Some(second));
    let error = registry.roll_back("a", Some(&generations[0]), None).await.unwrap_err();
    assert!(matches!(error, ChangeError::Source(_)), "{error}");

    // By whoever thinks that another one is there.
    let conflict = ChangeError::Conflict { expected: third.clone(), found: second.clone() };
    assert_eq!(registry.roll_back("a", None, Some(third)).await.unwrap_err(), conflict);
    assert_eq!(generation(&registry, "a").as_ref(), Some(second));
    assert_eq!(registry.roll_back("a", Some(third), Some(second)).await.unwrap().generation.as_ref(), Some(third));
    registry.roll_back("a", Some(second), None).await.unwrap();

    registry.remove("a", None).await.unwrap();
    assert_eq!(registry.acquire("a").await.unwrap_err(), AcquireError::Unknown("a".to_owned()));
    assert_eq!(registry.roll_back("a", None, None).await.unwrap().generation.as_ref(), Some(second));
    assert_eq!(registry.roll_back("b", None, None).await.unwrap_err(), ChangeError::Unknown("b".to_owned()));
}

/// What lies in a folder under the root, whatever it is called beyond its beginning.
fn read_under(fixture: &Fixture, folder: &str, begins: &str, file: &str) -> Option<String> {
    let found = fs::read_dir(fixture.path(folder)).ok()?.flatten();
    let mut found = found.filter(|entry| entry.file_name().to_string_lossy().starts_with(begins));
    fs::read_to_string(found.next()?.path().join(file)).ok()
}

fn is_staging_empty(fixture: &Fixture) -> bool {
    fs::read_dir(fixture.path(".lorry/staging")).is_ok_and(|mut left| left.next().is_none())
}

#[tokio::test]
async fn what_cannot_be_kept_is_neither_replaced_nor_removed_and_is_served_on() {
    let fixture = Fixture::new(&["a"]);
    let registry = fixture.registry();
    let first = generation(&registry, "a").unwrap();
    write(&fixture.path(".staging/2"), 2.0, "");
    let kept = fixture.path(".lorry/generations");
    fs::remove_dir_all(&kept).unwrap();
    fs::write(&kept, "in the way").unwrap();
    for _ in 0..2 {
        let errors = [
            install(&registry, "a", ".staging/2", None).await.unwrap_err(),
            registry.remove("a", None).await.unwrap_err(),
        ];
        for error in errors {
            assert!(matches!(&error, ChangeError::Folder(cause) if cause.contains("cannot be kept")), "{error}");
        }
        assert_eq!(registry.acquire("a").await.unwrap().generation, first);
        assert!(fixture.path("a/adapter_model.safetensors").exists() && is_staging_empty(&fixture));
    }
    // It was not given up for good.
    fs::remove_file(&kept).unwrap();
    let second = install(&registry, "a", ".staging/2", None).await.unwrap();
    assert_eq!(status(&registry, "a").previous_generations, std::slice::from_ref(&first));
    registry.remove("a", None).await.unwrap();
    for generation in [&first, &second] {
        assert_eq!(
            registry.roll_back("a", Some(generation), None).await.unwrap().generation.as_ref(),
            Some(generation)
        );
    }
}

#[tokio::test]
async fn all_that_a_folder_held_is_kept_when_it_is_replaced_or_removed() {
    let fixture = Fixture::new(&["a"]);
    fs::write(fixture.path("a/README.md"), "first").unwrap();
    fs::create_dir(fixture.path("a/checkpoint-1")).unwrap();
    fs::write(fixture.path("a/checkpoint-1/optimizer.pt"), "state").unwrap();
    let registry = fixture.registry();
    let first = generation(&registry, "a").unwrap();
    write(&fixture.path(".staging/2"), 2.0, "");
    let second = install(&registry, "a", ".staging/2", None).await.unwrap();
    let kept = |generation: &str, file: &str| {
        fs::read_to_string(fixture.path(".lorry/generations/a").join(generation).join("folder").join(file)).ok()
    };
    assert_eq!(kept(&first, "README.md").as_deref(), Some("first"));
    assert_eq!(kept(&first, "checkpoint-1/optimizer.pt").as_deref(), Some("state"));

    fs::write(fixture.path("a/README.md"), "second").unwrap();
    registry.remove("a", None).await.unwrap();
    assert_eq!(kept(&second, "README.md").as_deref(), Some("second"));
    assert!(!fixture.path("a").exists() && is_staging_empty(&fixture));
    // Rolling back puts the generation there, and leaves what else was kept where it is.
    for generation in [&first, &second, &first] {
        registry.roll_back("a", Some(generation), None).await.unwrap();
        assert_eq!(registry.acquire("a").await.unwrap().generation, *generation);
    }
    assert_eq!(kept(&first, "checkpoint-1/optimizer.pt").as_deref(), Some("state"));
    assert_eq!(kept(&second, "README.md").as_deref(), Some("second"));
}

#[tokio::test]
async fn what_is_no_generation_is_put_aside_whole_when_it_is_replaced_or_removed() {
    let fixture = Fixture::new(&[]);
    for name in ["pickle", "gguf", "half"] {
        fs::create_dir(fixture.path(name)).unwrap();
    }
    fs::write(fixture.path("pickle/adapter_model.bin"), "the only copy").unwrap();
    fs::write(fixture.path("gguf/sql.gguf"), "the only copy").unwrap();
    fs::write(fixture.path("half/adapter_model.safetensors"), "the only copy").unwrap();
    let registry = fixture.registry();
    assert!(registry.list().iter().all(|status| status.phase == Phase::Failed && status.error.is_some()));
    write(&fixture.path(".staging/1"), 1.0, "");

    fs::create_dir_all(fixture.path(".lorry")).unwrap();
    fs::write(fixture.path(".lorry/removed"), "in the way").unwrap();
    for name in ["pickle", "gguf", "half"] {
        let error = install(&registry, name, ".staging/1", None).await.unwrap_err();
        assert!(matches!(&error, ChangeError::Folder(cause) if cause.contains("cannot be kept")), "{error}");
        assert!(matches!(registry.remove(name, None).await, Err(ChangeError::Folder(_))));
    }
    assert_eq!(fs::read_to_string(fixture.path("pickle/adapter_model.bin")).unwrap(), "the only copy");
    assert!(is_staging_empty(&fixture) && registry.list().len() == 3);

    fs::remove_file(fixture.path(".lorry/removed")).unwrap();
    install(&registry, "pickle", ".staging/1", None).await.unwrap();
    assert_eq!(registry.acquire("pickle").await.unwrap().name, "pickle");
    registry.remove("gguf", None).await.unwrap();
    registry.remove("half", None).await.unwrap();
    for (name, file) in
        [("pickle-", "adapter_model.bin"), ("gguf-", "sql.gguf"), ("half-", "adapter_model.safetensors")]
    {
        let found = read_under(&fixture, ".lorry/removed", name, file);
        assert_eq!(found.as_deref(), Some("the only copy"), "{name}");
    }
    assert!(is_staging_empty(&fixture));
}

#[tokio::test]
async fn a_change_is_answered_with_the_generation_of_its_files_also_without_memory_for_them() {
    let mut fixture = Fixture::new(&["a"]).with_room_for(1);
    fixture.options.max_wait = Duration::from_secs(600);
    let registry = fixture.registry();
    let held = registry.acquire("a").await.unwrap();
    let first = held.generation.clone();
    ["2", "3"]
        .iter()
        .zip([2.0, 3.0])
        .for_each(|(to, value)| write(&fixture.path(&format!(".staging/{to}")), value, ""));
    let mut installed = first.clone();
    for source in [".staging/2", ".staging/3"] {
        let next = install(&registry, "a", source, Some(&installed)).await.unwrap();
        let a = status(&registry, "a");
        assert_eq!((a.files_generation.as_ref(), a.generation.as_ref(), a.is_stale), (Some(&next), Some(&first), true));
        assert_ne!(next, installed);
        installed = next;
    }
    // A name that is new, and the way back.
    let new = install(&registry, "b", ".staging/2", Some("")).await.unwrap();
    assert_eq!((generation(&registry, "b").as_ref(), status(&registry, "b").is_stale), (Some(&new), false));
    let back = registry.roll_back("a", None, Some(&installed)).await.unwrap();
    assert_eq!(back.files_generation.as_ref(), Some(&new), "the same files");
    assert_eq!(registry.acquire("a").await.unwrap().generation, first);
    drop(held);
    eventually("it is loaded when there is memory", || generation(&registry, "a") == back.files_generation);
    assert_eq!(install(&registry, "a", ".staging/2", Some(&new)).await, Ok(new));
}

#[tokio::test]
async fn what_a_killed_server_left_half_done_is_cleared_away_at_the_next_start() {
    let fixture = Fixture::new(&["a"]);
    write(&fixture.path(".lorry/staging/0123456789abcdef.new"), 2.0, "");
    write(&fixture.path(".lorry/staging/a-0123456789abcdef"), 3.0, "");
    fs::write(fixture.path(".lorry/staging/a-0123456789abcdef/README.md"), "the only copy").unwrap();
    let registry = fixture.registry();
    assert!(is_staging_empty(&fixture));
    assert_eq!(read_under(&fixture, ".lorry/removed", "a-", "README.md").as_deref(), Some("the only copy"));
    assert_eq!(registry.list().len(), 1);
    write(&fixture.path(".staging/2"), 2.0, "");
    install(&registry, "a", ".staging/2", None).await.unwrap();
    assert!(is_staging_empty(&fixture));
}

#[tokio::test]
async fn a_link_is_removed_and_what_it_leads_to_stays() {
    let fixture = Fixture::new(&[]);
    write(&fixture.path(".releases/1"), 1.0, "");
    std::os::unix::fs::symlink(".releases/1", fixture.path("a")).unwrap();
    let registry = fixture.registry();
    let first = generation(&registry, "a").unwrap();
    write(&fixture.path(".staging/2"), 2.0, "");
    install(&registry, "a", ".staging/2", None).await.unwrap();
    assert!(fixture.path(".releases/1/adapter_config.json").exists() && is_staging_empty(&fixture));
    assert_eq!(registry.roll_back("a", None, None).await.unwrap().generation, Some(first));
}

#[tokio::test]
async fn adapters_deeper_in_a_folder_are_left_alone_and_can_be_installed_or_moved() {
    let fixture = Fixture::new(&[]);
    write(&fixture.path("sql/checkpoint-500"), 1.0, "");
    write(&fixture.path("style/checkpoint-1/default"), 2.0, "");
    write(&fixture.path("both"), 1.0, "");
    write(&fixture.path("both/checkpoint-500"), 2.0, "");
    let registry = fixture.registry();
    assert_eq!(registry.list().len(), 1);
    assert_eq!(status(&registry, "both").phase, Phase::Ready);
    for (name, inside) in [("sql", "checkpoint-500"), ("style", "checkpoint-1/default")] {
        assert!(matches!(registry.acquire(name).await, Err(AcquireError::Unknown(_))));
        assert_eq!(registry.remove(name, None).await, Err(ChangeError::NoAdapter(name.to_owned())));
        assert!(matches!(install(&registry, name, "both", None).await, Err(ChangeError::NoAdapter(_))));
        assert!(fixture.path(name).join(inside).join("adapter_config.json").exists());
    }
    let error = install(&registry, "c", "sql", None).await.unwrap_err().to_string();
    assert!(error.contains("checkpoint-500") && error.contains("move"), "{error}");
    install(&registry, "sql-500", "sql/checkpoint-500", None).await.unwrap();
    assert_eq!(registry.acquire("sql-500").await.unwrap().name, "sql-500");
    fs::rename(fixture.path("sql/checkpoint-500"), fixture.path("moved")).unwrap();
    eventually("it is served where it was moved to", || {
        registry.status("moved").is_some_and(|status| status.phase == Phase::Ready)
    });
}

#[tokio::test]
async fn a_restart_finds_everything_as_it_was() {
    let mut fixture = Fixture::new(&["a", "b"]);
    let registry = fixture.registry();
    let first = generation(&registry, "a").unwrap();
    write(&fixture.path(".staging/2"), 2.0, "");
    install(&registry, "a", ".staging/2", None).await.unwrap();
    let before: Vec<_> = registry.list().into_iter().map(|a| (a.name, a.generation, a.previous_generations)).collect();
    assert_eq!(before[0].2, [first]);
    drop(registry);
    // The second time nothing is loaded: what is known is known from the folder alone.
    for budget in [1 << 30, 1] {
        fixture.options.host_budget_bytes = budget;
        fixture.metrics = Arc::new(Metrics::new("base"));
        let registry = fixture.registry();
        let after: Vec<_> =
            registry.list().into_iter().map(|a| (a.name, a.generation, a.previous_generations)).collect();
        assert_eq!((after, fixture.num_loads()), (before.clone(), if budget == 1 { 0 } else { 2 }));
    }
}

fn bad_adapters() -> Option<Vec<(String, PathBuf, String)>> {
    let bad = fs::read_dir(fixtures()?.join("bad_adapters")).unwrap().map(|entry| {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let word = fs::read_to_string(path.join("EXPECT.txt")).unwrap().trim().to_owned();
        (name, path, word)
    });
    Some(bad.collect())
}

#[tokio::test]
async fn every_bad_adapter_is_refused_at_start_by_hot_add_and_by_install_with_its_word() {
    let Some(bad) = bad_adapters() else { return };
    let fixture = Fixture::new(&[]);
    let smollm2 = || Shapes::new(49_152, 576, 1536, 30, (9, 3));
    let check = |registry: &AdapterRegistry, name: &str, word: &str| {
        eventually(name, || registry.status(name).is_some_and(|status| status.error.is_some()));
        let cause = status(registry, name).error.unwrap();
        assert!(cause.contains(word), "{name}: {cause:?} does not mention {word:?}");
    };
    let registry = fixture.registry_of(fixture.dir.path(), smollm2());
    for (name, path, word) in &bad {
        copy_adapter(path, &fixture.path(".staging").join(name));
        let error = install(&registry, name, &format!(".staging/{name}"), None).await.unwrap_err();
        assert!(matches!(&error, ChangeError::Refused(cause) if cause.contains(word)), "{name}: {error}");
        assert!(!fixture.path(name).exists());
        copy_adapter(path, &fixture.path(name));
    }
    bad.iter().for_each(|(name, _, word)| check(&registry, name, word));
    drop(registry);
    let registry = fixture.registry_of(fixture.dir.path(), smollm2());
    bad.iter().for_each(|(name, _, word)| check(&registry, name, word));
    assert!(registry.resident().is_empty());
}

#[tokio::test]
async fn without_a_folder_there_is_nothing_to_change() {
    let registry = AdapterRegistry::default();
    assert!(registry.list().is_empty());
    assert!(matches!(registry.acquire("a").await, Err(AcquireError::Unknown(_))));
    assert!(matches!(install(&registry, "a", "b", None).await, Err(ChangeError::NoFolder)));
}
