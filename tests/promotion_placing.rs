//! What becomes of the adapter of a canary's arm when a candidate takes it over, or does not.

mod folder;

use std::cell::{Cell, RefCell};

use folder::{Fixture, generation};
use lorry::adapter::registry::AcquireError;
use lorry::promotion::{PlaceError, place};

/// With the candidates `a` and `b`, of different weights.
fn fixture() -> Fixture {
    let fixture = Fixture::new(&["a"]);
    fixture.write("b", 2.0);
    fixture
}

#[tokio::test]
async fn a_candidate_replaces_what_its_arm_served() {
    let fixture = fixture();
    let registry = fixture.registry();
    let (a, b) = (generation(&registry, "a").unwrap(), generation(&registry, "b").unwrap());
    assert_eq!(place(&registry, "a", &a, "tuned", || true).await, Ok(None));
    assert_eq!(place(&registry, "b", &b, "tuned", || true).await, Ok(Some(a)));
    assert_eq!(registry.acquire("tuned").await.unwrap().generation, b);
    // Made again, as after a `kill -9`.
    assert_eq!(place(&registry, "b", &b, "tuned", || true).await, Ok(None));
    assert_eq!(place(&registry, "b", &b, "b", || true).await, Ok(None), "the arm's own");
}

#[tokio::test]
async fn what_was_replaced_or_is_not_there_is_not_installed() {
    let fixture = fixture();
    let registry = fixture.registry();
    let b = generation(&registry, "b").unwrap();
    for (candidate, name) in [("a", "tuned"), ("none", "tuned"), ("a", "a")] {
        assert_eq!(place(&registry, candidate, &b, name, || true).await, Err(PlaceError::Replaced), "{candidate}");
    }
    assert_eq!(place(&registry, "b", &b, "tuned", || false).await, Err(PlaceError::Withdrawn));
    assert!(registry.status("tuned").is_none() && !fixture.path("tuned").exists());
    let refused = place(&registry, "b", &b, "no/name", || true).await;
    assert!(matches!(refused, Err(PlaceError::Install { .. })), "{refused:?}");
}

#[tokio::test]
async fn a_candidate_that_is_withdrawn_while_it_is_installed_leaves_what_was_there() {
    let fixture = fixture();
    let registry = fixture.registry();
    let (a, b) = (generation(&registry, "a").unwrap(), generation(&registry, "b").unwrap());
    let withdrawn_later = || {
        let num_asked = Cell::new(0);
        move || num_asked.replace(num_asked.get() + 1) == 0
    };
    assert_eq!(place(&registry, "b", &b, "tuned", withdrawn_later()).await, Err(PlaceError::Withdrawn));
    assert!(registry.status("tuned").is_none() && !fixture.path("tuned").exists());
    place(&registry, "a", &a, "tuned", || true).await.unwrap();
    assert_eq!(place(&registry, "b", &b, "tuned", withdrawn_later()).await, Err(PlaceError::Withdrawn));
    assert_eq!(generation(&registry, "tuned"), Some(a.clone()));
    assert_eq!(registry.acquire("tuned").await.unwrap().generation, a);
}

#[tokio::test]
async fn a_candidate_waits_for_memory() {
    let fixture = fixture().with_room_for(1);
    let registry = fixture.registry();
    let a = registry.acquire("a").await.unwrap();
    let generation = a.generation.clone();
    let held = RefCell::new(Some(a));
    let num_asked = Cell::new(0);
    // There is room from when it has waited in vain once.
    let is_wanted = || {
        num_asked.set(num_asked.get() + 1);
        if num_asked.get() == 2 {
            held.take();
        }
        true
    };
    assert_eq!(place(&registry, "a", &generation, "tuned", is_wanted).await, Ok(None));
    assert!(num_asked.get() > 2);
    let no_memory = AcquireError::OutOfMemory("tuned".to_owned());
    assert_eq!(registry.acquire("tuned").await.map(|tuned| tuned.generation.clone()), Ok(generation), "{no_memory}");
}

#[tokio::test]
async fn a_candidate_waits_for_memory_while_what_it_replaces_is_served() {
    let fixture = fixture().with_room_for(2);
    let registry = fixture.registry();
    let (a, b) = (generation(&registry, "a").unwrap(), generation(&registry, "b").unwrap());
    assert_eq!(place(&registry, "a", &a, "tuned", || true).await, Ok(None));
    let held = RefCell::new(vec![registry.acquire("tuned").await.unwrap(), registry.acquire("b").await.unwrap()]);
    let num_asked = Cell::new(0);
    let is_wanted = || {
        num_asked.set(num_asked.get() + 1);
        if num_asked.get() == 2 {
            held.borrow_mut().clear();
        }
        true
    };
    assert_eq!(place(&registry, "b", &b, "tuned", is_wanted).await, Ok(Some(a)));
    assert_eq!(registry.acquire("tuned").await.unwrap().generation, b);
}
