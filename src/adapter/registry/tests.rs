//! The plan by itself: the clock is the tests' own, and no folder is looked at.

use tokio::sync::oneshot::Receiver;
use tokio::sync::oneshot::error::TryRecvError;

use super::outcome::{Loaded, Noticed};
use super::state::{Target, Task};
use super::*;
use crate::adapter::canonical::Coverage;
use crate::adapter::files::Glance;
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
    let glance = Ok(Glance { manifest: AdapterManifest::default(), resident_bytes: BYTES });
    let (name, previous_generations) = (name.to_owned(), Vec::new());
    let noticed = Noticed { name, fingerprint: None, glance, generation: None, previous_generations };
    state.record(noticed, Urgency::Fill, now);
}

/// Does all that can be loaded.
fn load(state: &mut State, generation: &str, now: Duration) {
    while let Task::Load(target) = state.next_task(now) {
        let Target::Adapter(name) = target else { panic!("no adapter") };
        let coverage = Coverage { resident_bytes: BYTES as usize, ..Coverage::default() };
        let generation = format!("{name}{generation}");
        let adapter = Adapter { name: name.clone(), generation: generation.clone(), coverage, ..Adapter::default() };
        let loaded =
            Loaded { fingerprint: None, generation: Some(generation), adapter: Ok(adapter), took: Duration::ZERO };
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
