//! The plan by itself: the clock is the tests' own, and no folder is looked at.

use tokio::sync::oneshot::Receiver;
use tokio::sync::oneshot::error::TryRecvError;

use super::error::Refusal;
use super::outcome::{Loaded, Noticed};
use super::state::{Target, Task};
use super::*;
use crate::adapter::canonical::Coverage;
use crate::adapter::files::{Fingerprint, Glance};
use crate::adapter::manifest::AdapterManifest;

const MAX_WAIT: Duration = Duration::from_secs(30);
const BYTES: u64 = 10;

fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// With memory for so many adapters, and a half.
fn state(num_adapters: u64) -> State {
    let residency = Residency::new(num_adapters * BYTES + BYTES / 2, Duration::ZERO);
    State::new(residency, MAX_WAIT, Arc::new(Metrics::default()))
}

fn register(state: &mut State, name: &str, now: Duration) {
    find(state, name, None, Ok(()), now);
}

fn find(state: &mut State, name: &str, fingerprint: Option<Fingerprint>, glance: Result<(), Refusal>, now: Duration) {
    let glance = glance.map(|()| Glance { manifest: AdapterManifest::default(), resident_bytes: BYTES });
    let (name, previous_generations) = (name.to_owned(), Vec::new());
    let noticed = Noticed { name, fingerprint, glance, generation: None, previous_generations };
    state.record(noticed, Urgency::Fill, now);
}

/// Of one file of this length.
fn fingerprint(len: u64) -> Option<Fingerprint> {
    let stamp = serde_json::json!({"len": len, "modified": {"secs_since_epoch": 0, "nanos_since_epoch": 0}});
    serde_json::from_value(serde_json::json!([stamp, null, null])).unwrap()
}

fn passing() -> Refusal {
    Refusal { cause: "no more files can be opened".to_owned(), may_pass: true }
}

fn lasting() -> Refusal {
    Refusal::from("the file is cut off".to_owned())
}

/// Does all that can be loaded.
fn load(state: &mut State, generation: &str, now: Duration) {
    while let Task::Load(target) = state.next_task(now) {
        let Target::Adapter(name) = target else { panic!("no adapter") };
        let coverage = Coverage { resident_bytes: BYTES as usize, ..Coverage::default() };
        let generation = format!("{name}{generation}");
        let adapter = Adapter { name: name.clone(), generation: generation.clone(), coverage, ..Adapter::default() };
        // Of the files that were noticed.
        let fingerprint = state.entries[&name].fingerprint.clone();
        let loaded = Loaded { fingerprint, generation: Some(generation), adapter: Ok(adapter), took: Duration::ZERO };
        state.finish_adapter(&name, loaded, now);
    }
}

fn waits(acquired: Acquired) -> Receiver<Lease> {
    match acquired {
        Acquired::Later(lease) => lease,
        Acquired::Now(lease) => panic!("it is there: {lease:?}"),
    }
}

fn held(state: &mut State, name: &str, now: Duration) -> Arc<Adapter> {
    match state.acquire(name, Urgency::Request, now) {
        Acquired::Now(lease) => lease.unwrap(),
        Acquired::Later(_) => panic!("{name} is not in memory"),
    }
}

#[test]
fn what_is_waited_for_is_loaded_between_scans_that_take_longer_than_signs_wait() {
    let mut state = state(1);
    register(&mut state, "a", at(0));
    state.notice(at(0));
    assert!(matches!(state.next_task(at(1)), Task::Scan));
    // Files are being copied in all the while.
    (1..5).for_each(|second| state.notice(at(second)));
    let mut lease = waits(state.acquire("a", Urgency::Request, at(2)));
    state.rescan_within(at(3600), at(5));
    load(&mut state, "1", at(5));
    assert_eq!(lease.try_recv().unwrap().unwrap().generation, "a1");
    assert!(matches!(state.next_task(at(6)), Task::Scan), "and the signs are not forgotten");
}

#[test]
fn each_request_waits_for_memory_for_its_own_time() {
    let mut state = state(1);
    register(&mut state, "a", at(0));
    load(&mut state, "1", at(0));
    let _held = held(&mut state, "a", at(0));
    register(&mut state, "b", at(0));
    let mut leases = [0, 20].map(|second| waits(state.acquire("b", Urgency::Request, at(second))));
    for (now, has_ended) in [(29, [false, false]), (30, [true, false]), (49, [true, false]), (50, [true, true])] {
        load(&mut state, "1", at(now));
        for (lease, has_ended) in leases.iter_mut().zip(has_ended) {
            let told = match lease.try_recv() {
                Ok(lease) => lease.is_err_and(|error| error == AcquireError::OutOfMemory("b".to_owned())),
                // It has been told before.
                Err(error) => error == TryRecvError::Closed,
            };
            assert_eq!(told, has_ended, "after {now} s");
        }
    }
}

#[test]
fn a_replaced_adapter_is_served_while_the_new_files_wait_for_memory() {
    let mut state = state(1);
    register(&mut state, "a", at(0));
    load(&mut state, "1", at(0));
    let first = held(&mut state, "a", at(0));
    register(&mut state, "a", at(1));
    for now in [1, 30] {
        load(&mut state, "2", at(now));
        assert!(state.status("a").unwrap().is_stale);
        assert_eq!(held(&mut state, "a", at(now)).generation, "a1");
    }
    // But not for ever.
    load(&mut state, "2", at(31));
    let mut lease = waits(state.acquire("a", Urgency::Request, at(31)));
    drop(first);
    load(&mut state, "2", at(32));
    assert_eq!(lease.try_recv().unwrap().unwrap().generation, "a2");
}

#[test]
fn a_replaced_adapter_is_loaded_as_soon_as_there_is_memory() {
    let mut state = state(1);
    register(&mut state, "a", at(0));
    load(&mut state, "1", at(0));
    let first = held(&mut state, "a", at(0));
    register(&mut state, "a", at(1));
    load(&mut state, "2", at(1));
    drop(first);
    load(&mut state, "2", at(2));
    assert_eq!(held(&mut state, "a", at(2)).generation, "a2");
}

#[test]
fn a_composition_that_never_fits_beside_its_members_is_refused_with_both_numbers() {
    let mut state = state(3);
    ["a", "b"].iter().for_each(|name| register(&mut state, name, at(0)));
    load(&mut state, "1", at(0));
    let members = ["a", "b"].map(|name| (held(&mut state, name, at(0)), 0.5));
    let mut composed = waits(state.compose(members.to_vec(), at(0)));
    assert!(matches!(state.next_task(at(0)), Task::Wait(_)));
    let refusal = composed.try_recv().unwrap().unwrap_err();
    assert!(
        matches!(&refusal, AcquireError::Composition(cause) if cause.contains("40 bytes") && cause.contains("35")),
        "{refusal}"
    );
}

#[test]
fn files_that_cannot_be_read_are_tried_again_and_what_was_there_is_served_meanwhile() {
    let mut state = state(2);
    find(&mut state, "a", fingerprint(1), Ok(()), at(0));
    load(&mut state, "1", at(0));
    for (now, retry_at) in [(10, 11), (11, 13), (13, 17), (17, 25), (25, 41), (41, 73), (73, 133), (133, 193)] {
        find(&mut state, "a", fingerprint(2), Err(passing()), at(now));
        state.rescan_within(at(3600), at(now));
        let status = state.status("a").unwrap();
        assert_eq!((status.phase, status.error), (Phase::Ready, Some(passing().cause)));
        assert_eq!(held(&mut state, "a", at(now)).generation, "a1");
        let a_moment = Duration::from_millis(1);
        assert!(matches!(state.next_task(at(retry_at) - a_moment), Task::Wait(_)), "{now}");
        assert!(state.is_known("a", fingerprint(2).as_ref(), at(retry_at) - a_moment));
        assert!(matches!(state.next_task(at(retry_at)), Task::Scan), "{now}");
        assert!(!state.is_known("a", fingerprint(2).as_ref(), at(retry_at)));
    }
    find(&mut state, "a", fingerprint(2), Ok(()), at(193));
    state.rescan_within(at(3600), at(193));
    load(&mut state, "2", at(193));
    assert_eq!(held(&mut state, "a", at(193)).generation, "a2");
    assert_eq!((state.status("a").unwrap().error, state.metrics.adapter_refusals_total.get()), (None, 0));
}

#[test]
fn the_next_request_tries_again_what_could_not_be_read() {
    let mut state = state(1);
    find(&mut state, "a", fingerprint(1), Ok(()), at(0));
    for (now, retry_at) in [(0, 1), (1, 3)] {
        let mut lease = waits(state.acquire("a", Urgency::Request, at(now)));
        assert!(matches!(state.next_task(at(now)), Task::Load(_)));
        let adapter = Err(passing());
        let loaded = Loaded { fingerprint: fingerprint(1), generation: None, adapter, took: Duration::ZERO };
        state.finish_adapter("a", loaded, at(now));
        let unreadable = AcquireError::Unreadable { name: "a".to_owned(), cause: passing().cause };
        assert_eq!(lease.try_recv().unwrap().unwrap_err(), unreadable);
        let Acquired::Now(Err(error)) = state.acquire("a", Urgency::Request, at(now)) else { panic!("too early") };
        assert_eq!((error, state.status("a").unwrap().phase), (unreadable, Phase::Registered));
        state.rescan_within(at(3600), at(now));
        assert!(matches!(state.next_task(at(retry_at)), Task::Scan));
    }
    let mut lease = waits(state.acquire("a", Urgency::Request, at(3)));
    load(&mut state, "1", at(3));
    assert_eq!(lease.try_recv().unwrap().unwrap().generation, "a1");
    assert_eq!(state.status("a").unwrap().error, None);
    assert_eq!(state.usage().resident_bytes, BYTES);
}

#[test]
fn a_folder_that_cannot_be_opened_any_more_is_what_it_was() {
    let mut state = state(1);
    find(&mut state, "a", fingerprint(1), Ok(()), at(0));
    let mut lease = waits(state.acquire("a", Urgency::Request, at(0)));
    assert!(matches!(state.next_task(at(0)), Task::Load(_)));
    let loaded = Loaded { fingerprint: None, generation: None, adapter: Err(passing()), took: Duration::ZERO };
    state.finish_adapter("a", loaded, at(0));
    assert!(matches!(lease.try_recv(), Ok(Err(AcquireError::Unreadable { .. }))));
    assert!(state.has_seen("a") && state.is_known("a", fingerprint(1).as_ref(), at(0)));
    // One that never could be is there, and named.
    find(&mut state, "b", None, Err(passing()), at(0));
    assert!(!state.has_seen("b"));
    assert_eq!(state.status("b").unwrap().error, Some(passing().cause));
}

#[test]
fn what_is_served_is_refused_when_the_files_that_replace_it_are_not_being_written_any_more() {
    let mut state = state(1);
    find(&mut state, "a", fingerprint(1), Ok(()), at(0));
    load(&mut state, "1", at(0));
    // Twice they are seen half written.
    for (now, len) in [(10, 2), (11, 3)] {
        find(&mut state, "a", fingerprint(len), Err(lasting()), at(now));
        let status = state.status("a").unwrap();
        assert_eq!((status.phase, status.error), (Phase::Ready, Some(lasting().cause)));
    }
    assert_eq!(held(&mut state, "a", at(12)).generation, "a1");
    assert!(matches!(state.next_task(at(12)), Task::Scan));
    state.rescan_within(at(3600), at(12));
    assert!(matches!(state.next_task(at(12)), Task::Wait(_)) && matches!(state.next_task(at(13)), Task::Scan));
    find(&mut state, "a", fingerprint(3), Err(lasting()), at(13));
    assert_eq!(state.status("a").unwrap().phase, Phase::Failed);
    assert!(matches!(state.acquire("a", Urgency::Request, at(13)), Acquired::Now(Err(AcquireError::Refused { .. }))));
    // Nothing is tried again before the files change, and nothing waits where nothing is served.
    state.rescan_within(at(3600), at(13));
    assert!(state.is_known("a", fingerprint(3).as_ref(), at(3000)));
    assert!(matches!(state.next_task(at(3000)), Task::Wait(_)));
    find(&mut state, "b", fingerprint(1), Err(lasting()), at(13));
    assert_eq!(state.status("b").unwrap().phase, Phase::Failed);
}
