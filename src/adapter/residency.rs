//! What stays in memory and what has to go: a plan over bytes and times, without clock, files or threads.
//!
//! Times are what has passed since the registry was opened.

use std::collections::BTreeMap;
use std::time::Duration;

/// Something that takes memory: one generation of an adapter, or a composition. Never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ItemId(pub u64);

/// What a load may push out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Urgency {
    /// Nobody asked: only what is free is taken.
    Fill,
    /// Wanted soon: takes the place of what was not used for longest, but of nothing younger than the minimum residency.
    Prefetch,
    /// A request waits: the young go too when nothing else is left.
    Request,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Reservation {
    /// The bytes are taken; these items are gone from the plan and must be dropped now.
    Granted { evicted: Vec<ItemId> },
    /// Nothing may go now that would make room; nothing has changed.
    Wait,
    /// Larger than the whole budget.
    TooLarge,
}

#[derive(Debug)]
struct Item {
    bytes: u64,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Being loaded.
    Reserved,
    Resident {
        pinned: bool,
        since: Duration,
        last_used: Duration,
    },
    /// Replaced or removed, and still held by requests.
    Retired,
}

#[derive(Debug)]
pub struct Residency {
    budget: u64,
    min_residency: Duration,
    items: BTreeMap<ItemId, Item>,
    used: u64,
}

impl Residency {
    /// `budget` in bytes.
    pub fn new(budget: u64, min_residency: Duration) -> Self {
        Self { budget, min_residency, items: BTreeMap::new(), used: 0 }
    }

    /// Whether so much can ever fit.
    pub fn can_hold(&self, bytes: u64) -> bool {
        bytes <= self.budget
    }

    /// What to say of what cannot.
    pub fn too_large(&self, bytes: u64) -> String {
        let budget = self.budget;
        format!("it takes {bytes} bytes of memory, adapters.host_budget_mib allows {budget} for all: raise it")
    }

    /// Bytes of everything that is loaded, being loaded, or gone and still held.
    pub fn used(&self) -> u64 {
        self.used
    }

    /// Takes `bytes` for `item`, which is new or has a reservation that this one replaces.
    pub fn reserve(
        &mut self,
        item: ItemId,
        bytes: u64,
        urgency: Urgency,
        now: Duration,
        is_held: impl Fn(ItemId) -> bool,
    ) -> Reservation {
        if !self.can_hold(bytes) {
            return Reservation::TooLarge;
        }
        let others = self.used - self.items.get(&item).map_or(0, |reserved| reserved.bytes);
        let Some(evicted) = self.victims((others + bytes).saturating_sub(self.budget), urgency, now, is_held) else {
            return Reservation::Wait;
        };
        for victim in &evicted {
            self.remove(*victim);
        }
        self.remove(item);
        self.items.insert(item, Item { bytes, state: State::Reserved });
        self.used += bytes;
        Reservation::Granted { evicted }
    }

    /// What has to go so that `missing` bytes become free, the least recently used first.
    fn victims(
        &self,
        missing: u64,
        urgency: Urgency,
        now: Duration,
        is_held: impl Fn(ItemId) -> bool,
    ) -> Option<Vec<ItemId>> {
        let mut candidates: Vec<_> = self
            .items
            .iter()
            .filter_map(|(id, item)| match item.state {
                State::Resident { pinned: false, since, last_used } => {
                    let is_young = now.saturating_sub(since) < self.min_residency;
                    let may_go = urgency == Urgency::Request || urgency == Urgency::Prefetch && !is_young;
                    (may_go && !is_held(*id)).then_some((is_young, last_used, *id, item.bytes))
                }
                _ => None,
            })
            .collect();
        candidates.sort_unstable();
        let (mut victims, mut freed) = (Vec::new(), 0);
        for (_, _, id, bytes) in candidates {
            if freed >= missing {
                break;
            }
            victims.push(id);
            freed += bytes;
        }
        (freed >= missing).then_some(victims)
    }

    /// What was reserved is loaded, in `bytes`, at most what was reserved.
    pub fn commit(&mut self, item: ItemId, bytes: u64, pinned: bool, now: Duration) {
        if let Some(entry) = self.items.get_mut(&item) {
            self.used = self.used - entry.bytes + bytes;
            *entry = Item { bytes, state: State::Resident { pinned, since: now, last_used: now } };
        }
    }

    pub fn touch(&mut self, item: ItemId, now: Duration) {
        if let Some(Item { state: State::Resident { last_used, .. }, .. }) = self.items.get_mut(&item) {
            *last_used = now;
        }
    }

    /// Nobody gets the item any more, and its bytes count until [`remove`](Self::remove).
    pub fn retire(&mut self, item: ItemId) {
        if let Some(entry) = self.items.get_mut(&item) {
            entry.state = State::Retired;
        }
    }

    /// Gives the bytes of an item back.
    pub fn remove(&mut self, item: ItemId) {
        if let Some(entry) = self.items.remove(&item) {
            self.used -= entry.bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use proptest::prelude::*;

    const NOBODY: fn(ItemId) -> bool = |_| false;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn load(residency: &mut Residency, item: u64, bytes: u64, pinned: bool, now: u64) -> Reservation {
        let reservation = residency.reserve(ItemId(item), bytes, Urgency::Request, seconds(now), NOBODY);
        residency.commit(ItemId(item), bytes, pinned, seconds(now));
        reservation
    }

    fn granted(evicted: &[u64]) -> Reservation {
        Reservation::Granted { evicted: evicted.iter().copied().map(ItemId).collect() }
    }

    #[test]
    fn the_least_recently_used_goes_first_and_only_as_many_as_needed() {
        let mut residency = Residency::new(30, Duration::ZERO);
        for item in 0..3 {
            assert_eq!(load(&mut residency, item, 10, false, item), granted(&[]));
        }
        residency.touch(ItemId(0), seconds(5));
        assert_eq!(load(&mut residency, 3, 10, false, 6), granted(&[1]));
        assert_eq!(load(&mut residency, 4, 15, false, 7), granted(&[2, 0]));
        assert_eq!(residency.used(), 25);
    }

    #[test]
    fn pinned_and_held_items_stay() {
        let mut residency = Residency::new(30, Duration::ZERO);
        load(&mut residency, 0, 10, true, 0);
        load(&mut residency, 1, 10, false, 1);
        load(&mut residency, 2, 10, false, 2);
        let held = |item| item == ItemId(1);
        let reserve =
            |residency: &mut Residency, bytes| residency.reserve(ItemId(3), bytes, Urgency::Request, seconds(3), held);
        assert_eq!(reserve(&mut residency, 11), Reservation::Wait);
        assert_eq!(reserve(&mut residency, 10), granted(&[2]));
    }

    #[test]
    fn the_young_go_for_a_waiting_request_only_and_last() {
        let mut residency = Residency::new(30, seconds(10));
        load(&mut residency, 0, 10, false, 0);
        load(&mut residency, 1, 10, false, 15);
        load(&mut residency, 2, 10, false, 16);
        residency.touch(ItemId(0), seconds(19));
        let mut reserve = |urgency, bytes| residency.reserve(ItemId(3), bytes, urgency, seconds(20), NOBODY);
        assert_eq!(reserve(Urgency::Fill, 10), Reservation::Wait);
        assert_eq!(reserve(Urgency::Prefetch, 20), Reservation::Wait);
        assert_eq!(reserve(Urgency::Request, 20), granted(&[0, 1]));
    }

    #[test]
    fn what_is_larger_than_the_budget_is_never_granted() {
        let mut residency = Residency::new(30, Duration::ZERO);
        assert_eq!(load(&mut residency, 0, 31, false, 0), Reservation::TooLarge);
        assert_eq!(load(&mut residency, 0, 30, false, 0), granted(&[]));
    }

    #[test]
    fn a_retired_item_counts_until_it_is_removed() {
        let mut residency = Residency::new(10, Duration::ZERO);
        load(&mut residency, 0, 10, false, 0);
        residency.retire(ItemId(0));
        assert_eq!(load(&mut residency, 1, 1, false, 1), Reservation::Wait);
        residency.remove(ItemId(0));
        assert_eq!(load(&mut residency, 1, 10, false, 1), granted(&[]));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Load { bytes: u64, urgency: Urgency, pinned: bool, smaller_by: u64 },
        Touch(u64),
        Hold(u64),
        LetGo(u64),
        Retire(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        let urgency = prop_oneof![Just(Urgency::Fill), Just(Urgency::Prefetch), Just(Urgency::Request)];
        prop_oneof![
            4 => (1u64..60, urgency, prop::bool::weighted(0.1), 0u64..20)
                .prop_map(|(bytes, urgency, pinned, smaller_by)| Step::Load { bytes, urgency, pinned, smaller_by }),
            1 => (0u64..40).prop_map(Step::Touch),
            1 => (0u64..40).prop_map(Step::Hold),
            1 => (0u64..40).prop_map(Step::LetGo),
            1 => (0u64..40).prop_map(Step::Retire),
        ]
    }

    proptest! {
        #[test]
        fn the_budget_holds_and_nothing_held_pinned_or_young_is_pushed_out(
            steps in prop::collection::vec(step(), 0..120), budget in 20u64..200
        ) {
            const MIN_RESIDENCY: u64 = 8;
            let mut residency = Residency::new(budget, seconds(MIN_RESIDENCY));
            // By item: bytes, pinned, loaded at.
            let mut resident: BTreeMap<u64, (u64, bool, u64)> = BTreeMap::new();
            let mut retired: BTreeMap<u64, u64> = BTreeMap::new();
            let mut held: BTreeSet<u64> = BTreeSet::new();
            for (now, step) in steps.into_iter().enumerate() {
                let (item, now) = (now as u64, now as u64);
                match step {
                    Step::Load { bytes, urgency, pinned, smaller_by } => {
                        let is_held = |item: ItemId| held.contains(&item.0);
                        match residency.reserve(ItemId(item), bytes, urgency, seconds(now), is_held) {
                            Reservation::Granted { evicted } => {
                                for ItemId(victim) in evicted {
                                    let (_, pinned, since) = resident.remove(&victim).expect("it was resident");
                                    prop_assert!(!pinned && !held.contains(&victim));
                                    prop_assert!(urgency != Urgency::Fill);
                                    prop_assert!(urgency == Urgency::Request || now - since >= MIN_RESIDENCY);
                                }
                                let bytes = bytes.saturating_sub(smaller_by);
                                residency.commit(ItemId(item), bytes, pinned, seconds(now));
                                resident.insert(item, (bytes, pinned, now));
                            }
                            Reservation::TooLarge => prop_assert!(bytes > budget),
                            Reservation::Wait => prop_assert!(residency.used() + bytes > budget),
                        }
                    }
                    Step::Touch(item) => residency.touch(ItemId(item), seconds(now)),
                    Step::Hold(item) => { held.insert(item); }
                    Step::LetGo(item) => {
                        held.remove(&item);
                        if retired.remove(&item).is_some() {
                            residency.remove(ItemId(item));
                        }
                    }
                    Step::Retire(item) => if let Some((bytes, _, _)) = resident.remove(&item) {
                        residency.retire(ItemId(item));
                        retired.insert(item, bytes);
                    },
                }
                let expected = resident.values().map(|(bytes, _, _)| bytes).sum::<u64>() + retired.values().sum::<u64>();
                prop_assert_eq!(residency.used(), expected);
                prop_assert!(residency.used() <= budget);
            }
        }
    }
}
