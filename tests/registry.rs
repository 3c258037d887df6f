//! The folder of adapters while it changes: what is noticed, what stays in memory, and who gets which generation.

mod folder;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use folder::{Fixture, MAX_WAIT, eventually, generation, phases, status, weights, write};
use futures::FutureExt;
use futures::future::join_all;
use lorry::adapter::registry::{AcquireError, AdapterRegistry, ChangeError, Phase, SelfTest, Source, Tier, Usage};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

#[tokio::test]
async fn what_is_added_replaced_and_removed_is_noticed() {
    let fixture = Fixture::new(&["a"]);
    let registry = fixture.registry();
    let first = registry.acquire("a").await.unwrap();
    assert_eq!(registry.acquire("b").await.unwrap_err(), AcquireError::Unknown("b".to_owned()));

    fixture.write("b", 1.0);
    eventually("b is loaded", || registry.status("b").is_some_and(|status| status.phase == Phase::Ready));
    fixture.write("a", 2.0);
    eventually("a is replaced", || generation(&registry, "a").as_deref() != Some(&first.generation));
    let second = registry.acquire("a").await.unwrap();
    assert_ne!(second.generation, first.generation);
    // Written over in place, the length unchanged.
    fs::write(fixture.path("a/adapter_model.safetensors"), weights(3.0)).unwrap();
    eventually("a is replaced again", || generation(&registry, "a").as_deref() != Some(&second.generation));
    fs::remove_dir_all(fixture.path("b")).unwrap();
    eventually("b is gone", || registry.status("b").is_none());
    assert_eq!(registry.acquire("b").await.unwrap_err(), AcquireError::Unknown("b".to_owned()));
    let ids: Vec<usize> = registry.list().iter().map(|status| status.id).collect();
    assert_eq!(ids, [0]);
}

#[tokio::test]
async fn a_request_keeps_the_generation_it_got_and_everything_returns_in_the_end() {
    let fixture = Fixture::new(&["a"]);
    let registry = fixture.registry();
    let old = registry.acquire("a").await.unwrap();
    let bytes = old.coverage.resident_bytes as u64;
    fixture.write("a", 2.0);
    eventually("a is replaced", || generation(&registry, "a").as_deref() != Some(&old.generation));
    let new = registry.acquire("a").await.unwrap();
    assert_eq!(status(&registry, "a").in_flight, 2);
    assert_eq!(registry.usage(), Usage { registered: 1, resident: 1, resident_bytes: 2 * bytes, leases: 2 });
    drop(old);
    eventually("the old one is freed", || registry.usage().resident_bytes == bytes);
    fs::remove_dir_all(fixture.path("a")).unwrap();
    eventually("a is removed", || registry.status("a").is_none());
    assert_eq!(registry.usage(), Usage { registered: 0, resident: 0, resident_bytes: bytes, leases: 1 });
    assert!(fixture.metrics.render(|_| true).contains("\nlorry_adapter_leases 1\n"));
    drop(new);
    eventually("all is back", || registry.usage() == Usage::default());
    let rendered = fixture.metrics.render(|_| true);
    for gauge in ["lorry_adapters_registered", "lorry_adapters_resident", "lorry_adapter_resident_bytes"] {
        assert!(rendered.contains(&format!("\n{gauge} 0\n")), "{rendered}");
    }
}

#[tokio::test]
async fn what_is_broken_is_refused_once_until_its_files_change() {
    let fixture = Fixture::new(&["a"]);
    let registry = fixture.registry();
    let held = registry.acquire("a").await.unwrap();
    let whole = weights(2.0);
    // A copy under way, not noticed by its header: the sites of the configuration are not all there.
    let config = fs::read_to_string(fixture.path("a/adapter_config.json")).unwrap();
    fs::write(fixture.path("a/adapter_config.json"), config.replace("v_proj", "k_proj")).unwrap();
    eventually("a is refused", || status(&registry, "a").phase == Phase::Failed);
    let num_tries = fixture.metrics.vllm.adapter_load.get_sample_count();
    for _ in 0..10 {
        let error = registry.acquire("a").await.unwrap_err();
        assert!(
            matches!(&error, AcquireError::Refused { cause, .. } if cause.contains("k_proj") || cause.contains("v_proj")),
            "{error}"
        );
    }
    assert_eq!(fixture.metrics.vllm.adapter_load.get_sample_count(), num_tries);
    assert_eq!((fixture.metrics.adapter_refusals_total.get(), status(&registry, "a").in_flight), (1, 1));

    // This is seen by the header.
    fs::write(fixture.path("a/adapter_model.safetensors"), &whole[..whole.len() - 1]).unwrap();
    eventually("a is cut off", || status(&registry, "a").error.is_some_and(|error| error.contains("truncated")));
    assert_eq!(fixture.metrics.vllm.adapter_load.get_sample_count(), num_tries);

    fs::write(fixture.path("a/adapter_model.safetensors"), &whole).unwrap();
    fs::write(fixture.path("a/adapter_config.json"), config).unwrap();
    eventually("a is healed", || status(&registry, "a").phase == Phase::Ready);
    assert_ne!(registry.acquire("a").await.unwrap().generation, held.generation);
}

/// In place of a file, a link to itself: what is there the system can tell nobody, not even who may read everything.
fn put_unreadable(path: &Path) {
    let link = path.with_extension("new");
    std::os::unix::fs::symlink(path.file_name().unwrap(), &link).unwrap();
    fs::rename(&link, path).unwrap();
}

#[tokio::test]
async fn what_cannot_be_looked_at_for_a_moment_is_served_as_it_was() {
    let fixture = Fixture::new(&["a"]);
    let registry = fixture.registry();
    let first = registry.acquire("a").await.unwrap().generation.clone();
    for file in ["adapter_model.safetensors", "adapter_config.json"] {
        let away = fixture.path(".away");
        fs::hard_link(fixture.path("a").join(file), &away).unwrap();
        put_unreadable(&fixture.path("a").join(file));
        // The folder has been scanned, and more than once.
        for name in ["b", "c", "d"] {
            // Whole at once, and away at once: half of it would be refused.
            let hidden = fixture.path(&format!(".{name}"));
            fixture.write(&format!(".{name}"), 1.0);
            fs::rename(&hidden, fixture.path(name)).unwrap();
            eventually("the folder is scanned", || registry.status(name).is_some());
            fs::rename(fixture.path(name), &hidden).unwrap();
            fs::remove_dir_all(&hidden).unwrap();
            eventually("the folder is scanned", || registry.status(name).is_none());
            assert_eq!(registry.acquire("a").await.unwrap().generation, first);
        }
        let error = registry.remove("a", None).await.unwrap_err();
        assert!(matches!(&error, ChangeError::Folder(cause) if cause.contains(file)), "{error}");
        let error = registry.install("x", Source::Folder("a".into()), None).await.unwrap_err();
        assert!(matches!(&error, ChangeError::Folder(cause) if cause.contains(file)), "{error}");
        fs::rename(&away, fixture.path("a").join(file)).unwrap();
    }
    fs::write(fixture.path(".new"), weights(2.0)).unwrap();
    fs::rename(fixture.path(".new"), fixture.path("a/adapter_model.safetensors")).unwrap();
    eventually("a is replaced", || generation(&registry, "a").is_some_and(|now| now != first));
    assert_eq!((status(&registry, "a").error, fixture.metrics.adapter_refusals_total.get()), (None, 0));
}

#[tokio::test]
async fn what_could_not_be_looked_at_is_named_and_served_once_it_can_be() {
    let fixture = Fixture::new(&["a"]);
    let away = fixture.path(".away");
    fs::rename(fixture.path("a/adapter_config.json"), &away).unwrap();
    put_unreadable(&fixture.path("a/adapter_config.json"));
    // Nobody's adapter, as a disk has it.
    fs::create_dir(fixture.path("lost+found")).unwrap();
    put_unreadable(&fixture.path("lost+found/adapter_config.json"));
    let registry = fixture.registry();
    let a = status(&registry, "a");
    assert!(a.phase == Phase::Registered && a.error.is_some_and(|e| e.contains("adapter_config.json")));
    assert_eq!(registry.list().len(), 1);
    let error = registry.acquire("a").await.unwrap_err();
    assert!(matches!(error, AcquireError::Unreadable { .. }), "{error}");
    fs::rename(&away, fixture.path("a/adapter_config.json")).unwrap();
    eventually("a is served", || status(&registry, "a").phase == Phase::Ready);
    assert_eq!(status(&registry, "a").error, None);
}

// Elsewhere every name is text.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_folder_whose_name_is_no_text_is_refused_by_name_until_it_is_renamed() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let fixture = Fixture::new(&["a"]);
    let path = |name: &[u8]| fixture.dir.path().join(OsStr::from_bytes(name));
    for name in [&b"caf\xe9"[..], b"\xff", b"\xfe"] {
        write(&path(name), 1.0, "");
    }
    // Whether by itself or by a link; but not what is hidden, or holds no adapter.
    std::os::unix::fs::symlink("a", path(b"link\xff")).unwrap();
    write(&path(b".\xff"), 1.0, "");
    fs::create_dir(path(b"empty\xff")).unwrap();
    let registry = fixture.registry();
    let names: Vec<_> = registry.list().into_iter().map(|status| status.name).collect();
    assert_eq!(names, [r"\xfe", r"\xff", "a", r"caf\xe9", r"link\xff"]);
    for name in names.iter().filter(|name| *name != "a") {
        let status = status(&registry, name);
        let error = status.error.unwrap();
        assert!(status.phase == Phase::Failed && error.contains("the folder's name must be"), "{name}: {error}");
    }
    assert_eq!(fixture.metrics.adapter_refusals_total.get(), 4);
    fs::rename(path(b"caf\xe9"), path(b"cafe")).unwrap();
    eventually("it is served by its new name", || {
        registry.status("cafe").is_some_and(|cafe| cafe.phase == Phase::Ready)
    });
    eventually("the old name is gone", || registry.status(r"caf\xe9").is_none());
    assert_eq!(fixture.metrics.adapter_refusals_total.get(), 4, "and the others are refused once");
}

#[tokio::test]
async fn many_requests_for_a_cold_adapter_are_one_load() {
    let fixture = Fixture::new(&["a", "b"]).with_room_for(1);
    let registry = fixture.registry();
    assert_eq!(phases(&registry), [Phase::Ready, Phase::Registered]);
    assert_eq!(status(&registry, "b").tier, Tier::Disk);
    let adapters = join_all((0..16).map(|_| registry.acquire("b"))).await;
    let first = adapters[0].as_ref().unwrap();
    assert!(adapters.iter().all(|adapter| Arc::ptr_eq(adapter.as_ref().unwrap(), first)));
    assert_eq!((fixture.num_loads(), status(&registry, "b").in_flight), (2, 16));
    assert_eq!((phases(&registry), fixture.num_evictions()), (vec![Phase::Registered, Phase::Ready], 1));
}

#[tokio::test]
async fn the_least_recently_used_makes_room_and_the_pinned_stays() {
    let fixture = Fixture::new(&["a", "b", "c", "d"]).with_room_for(3);
    fs::write(fixture.path("d/adapter.toml"), "pin = true").unwrap();
    let registry = fixture.registry();
    let resident = || registry.resident().iter().map(|adapter| adapter.name.clone()).collect::<Vec<_>>();
    assert_eq!(resident(), ["a", "b", "d"]);
    registry.acquire("b").await.unwrap();
    registry.acquire("a").await.unwrap();
    registry.acquire("c").await.unwrap();
    assert_eq!(resident(), ["a", "c", "d"]);
    let held = registry.acquire("a").await.unwrap();
    registry.acquire("b").await.unwrap();
    assert_eq!(resident(), ["a", "b", "d"]);
    drop(held);
}

#[tokio::test]
async fn a_request_waits_for_memory_and_not_for_ever() {
    let fixture = Fixture::new(&["a", "b"]).with_room_for(1);
    let registry = fixture.registry();
    let held = registry.acquire("a").await.unwrap();
    assert_eq!(registry.acquire("b").await.unwrap_err(), AcquireError::OutOfMemory("b".to_owned()));
    assert_eq!(status(&registry, "b").phase, Phase::Registered);
    let (acquired, ()) = tokio::join!(registry.acquire("b"), async {
        tokio::time::sleep(MAX_WAIT / 10).await;
        drop(held);
    });
    assert_eq!(acquired.unwrap().name, "b");
}

#[tokio::test]
async fn what_nobody_waits_for_any_more_is_not_loaded() {
    let names: Vec<String> = (0..100).map(|number| format!("adapter-{number:02}")).collect();
    let fixture = Fixture::new(&names.iter().map(String::as_str).collect::<Vec<_>>()).with_room_for(1);
    let registry = fixture.registry();
    assert_eq!(fixture.num_loads(), 1);
    for name in &names[1..] {
        assert!(registry.acquire(name).now_or_never().is_none());
    }
    assert_eq!(registry.acquire("adapter-07").await.unwrap().name, "adapter-07");
    // Of those that were left at once, some may have begun before.
    assert!(fixture.num_loads() < 50, "{}", fixture.num_loads());
}

#[tokio::test]
async fn a_young_adapter_makes_room_for_a_request_and_not_for_a_prefetch() {
    let mut fixture = Fixture::new(&["a", "b"]).with_room_for(1);
    fixture.options.min_residency = Duration::from_secs(3600);
    let registry = fixture.registry();
    assert_eq!(registry.load("b").await.unwrap_err(), AcquireError::OutOfMemory("b".to_owned()));
    assert_eq!(registry.acquire("b").await.unwrap().name, "b");
    assert_eq!(phases(&registry), [Phase::Registered, Phase::Ready]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_memory_is_never_exceeded_whatever_is_asked() {
    let names: Vec<String> = (0..12).map(|i| format!("adapter-{i}")).collect();
    let fixture = Fixture::new(&names.iter().map(String::as_str).collect::<Vec<_>>()).with_room_for(5);
    let (registry, budget) = (Arc::new(fixture.registry()), fixture.options.host_budget_bytes);
    let client = |seed: u64| {
        let (registry, names) = (registry.clone(), names.clone());
        tokio::spawn(async move {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            for _ in 0..150 {
                let name = &names[rng.random_range(0..names.len())];
                let adapter = registry.acquire(name).await.unwrap();
                assert_eq!(adapter.name, *name);
                assert!(registry.usage().resident_bytes <= budget);
                if rng.random_bool(0.3) {
                    tokio::time::sleep(Duration::from_micros(rng.random_range(0..2000))).await;
                }
            }
        })
    };
    for ended in join_all((0..4).map(client)).await {
        ended.unwrap();
    }
    assert_eq!(registry.usage().leases, 0);
    assert!(fixture.num_evictions() > 50);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_request_for_a_live_adapter_fails_while_the_folder_changes() {
    let names = ["a", "b", "c", "d", "e", "f"];
    let fixture = Fixture::new(&names).with_room_for(3);
    let registry = Arc::new(fixture.registry());
    let client = |seed: u64| {
        let registry = registry.clone();
        tokio::spawn(async move {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            for _ in 0..200 {
                let name = names[rng.random_range(0..names.len())];
                assert_eq!(registry.acquire(name).await.unwrap().name, name);
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
    };
    let clients: Vec<_> = (0..3).map(client).collect();
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    for i in 0..12 {
        let value = 2.0 + i as f32;
        write(&fixture.path(".staging/new"), value, "");
        let name = names[rng.random_range(0..names.len())];
        let installed = registry.install(name, Source::Folder(".staging/new".into()), None).await.unwrap();
        let served = registry.acquire(name).await.unwrap();
        assert_eq!(Some(&served.generation), installed.generation.as_ref());
        fixture.write("x", value);
        tokio::time::sleep(Duration::from_millis(20)).await;
        fs::remove_dir_all(fixture.path("x")).unwrap();
    }
    for client in clients {
        client.await.unwrap();
    }
    eventually("nothing is held", || registry.usage().leases == 0);
}

#[tokio::test]
async fn what_is_larger_than_all_memory_is_refused_with_both_numbers() {
    let fixture = Fixture::new(&["a"]).with_room_for(0);
    let registry = fixture.registry();
    let bytes = registry.status("a").unwrap().error.unwrap();
    assert!(
        bytes.contains("host_budget_mib") && bytes.contains(&fixture.options.host_budget_bytes.to_string()),
        "{bytes}"
    );
    assert!(matches!(registry.acquire("a").await, Err(AcquireError::Refused { .. })));
    let error = registry.install("b", Source::Folder("a".into()), None).await.unwrap_err();
    assert!(matches!(&error, ChangeError::Refused(cause) if cause.contains("host_budget_mib")), "{error}");
    assert!(!fixture.path("b").exists());
}

#[tokio::test]
async fn a_thousand_registered_adapters_take_the_memory_of_those_in_use() {
    let fixture = Fixture::new(&[]).with_room_for(3);
    for i in 0..1000 {
        write(&fixture.path(&format!("adapter-{i:03}")), i as f32 / 100.0, "task = 'many'");
    }
    let registry = fixture.registry();
    let in_memory = |registry: &AdapterRegistry| (registry.usage().registered, registry.usage().resident);
    assert_eq!((in_memory(&registry), fixture.num_loads()), ((1000, 3), 3));
    let adapter = registry.acquire("adapter-777").await.unwrap();
    assert_eq!(adapter.name, "adapter-777");
    assert_eq!((in_memory(&registry), fixture.num_loads()), ((1000, 3), 4));
    let status = status(&registry, "adapter-500");
    assert_eq!(
        (status.phase, status.tier, status.manifest.task.as_deref()),
        (Phase::Registered, Tier::Disk, Some("many"))
    );
}

#[tokio::test]
async fn each_generation_is_handed_out_once_to_be_measured() {
    let fixture = Fixture::new(&["a", "b"]);
    let registry = fixture.registry();
    let (a, b) = (registry.next_untested().await, registry.next_untested().await);
    assert_eq!((a.name.as_str(), b.name.as_str()), ("a", "b"));
    let measured = SelfTest { max_logit_change: 2.5, mean_logit_change: 0.5 };
    registry.report_self_test("a", &a.generation, measured);
    registry.report_self_test("b", &b.generation, SelfTest { max_logit_change: 0.0, mean_logit_change: 0.0 });
    registry.report_self_test("a", "another", SelfTest { max_logit_change: 0.0, mean_logit_change: 0.0 });
    assert_eq!((status(&registry, "a").self_test, status(&registry, "a").is_inert), (Some(measured), false));
    assert!(status(&registry, "b").is_inert);
    fixture.write("a", 2.0);
    let again = registry.next_untested().await;
    assert!(again.name == "a" && again.generation != a.generation);
    assert_eq!(status(&registry, "a").self_test, None);
}

#[tokio::test]
async fn a_composition_names_live_adapters_and_strength_nothing_is_the_base() {
    let fixture = Fixture::new(&["a", "b"]);
    let registry = fixture.registry();
    let members =
        |members: &[(&str, f32)]| members.iter().map(|(name, scale)| (name.to_string(), *scale)).collect::<Vec<_>>();
    assert!(registry.compose(&members(&[("a", 0.0), ("b", 0.0)])).await.unwrap().is_none());
    let alone = registry.compose(&members(&[("a", 1.0), ("b", 0.0)])).await.unwrap().unwrap();
    assert!(Arc::ptr_eq(&alone, &registry.acquire("a").await.unwrap()));
    for unknown in [[("a", 1.0), ("x", 0.0)], [("a", 1.0), ("x", 0.5)]] {
        let error = registry.compose(&members(&unknown)).await.unwrap_err();
        assert_eq!(error, AcquireError::Unknown("x".to_owned()));
    }
}

#[tokio::test]
async fn a_composition_is_made_once_and_goes_with_its_members() {
    let fixture = Fixture::new(&["a", "b"]);
    let registry = fixture.registry();
    let members = |strength: f32| [("a".to_owned(), strength), ("b".to_owned(), 2.0)];
    let first = registry.compose(&members(0.5)).await.unwrap().unwrap();
    let again = registry.compose(&members(0.5)).await.unwrap().unwrap();
    assert!(Arc::ptr_eq(&first, &again));
    let other = registry.compose(&members(0.25)).await.unwrap().unwrap();
    assert_ne!(other.generation, first.generation);
    assert_eq!((status(&registry, "a").in_flight, status(&registry, "b").in_flight), (3, 3));
    assert_eq!((registry.usage().resident, registry.usage().leases), (4, 3));
    assert!(matches!(registry.compose(&members(f32::NAN)).await, Err(AcquireError::Composition(_))));

    fixture.write("a", 2.0);
    let old = first.members[0].generation.clone();
    eventually("a is replaced", || generation(&registry, "a").as_deref() != Some(&old));
    assert_eq!(registry.usage().resident, 2);
    let replaced = registry.compose(&members(0.5)).await.unwrap().unwrap();
    assert_ne!(replaced.generation, first.generation);
    drop((first, again, other, replaced));
    for name in ["a", "b"] {
        fs::remove_dir_all(fixture.path(name)).unwrap();
    }
    eventually("all is back", || registry.usage() == Usage::default());
}

#[tokio::test]
async fn a_composition_stays_when_its_members_have_made_room() {
    let fixture = Fixture::new(&["a", "b"]).with_room_for(4);
    let registry = fixture.registry();
    let members = [("a".to_owned(), 0.5), ("b".to_owned(), 2.0)];
    let composed = registry.compose(&members).await.unwrap().unwrap();
    for name in ["c", "d", "e"] {
        fixture.write(name, 1.0);
        eventually("it is there", || registry.status(name).is_some());
        drop(registry.acquire(name).await);
    }
    assert_eq!((status(&registry, "a").tier, status(&registry, "b").tier), (Tier::Disk, Tier::Disk));
    let num_loads = fixture.num_loads();
    assert!(Arc::ptr_eq(&registry.compose(&members).await.unwrap().unwrap(), &composed));
    assert_eq!(fixture.num_loads(), num_loads);
}
