//! What the registry makes of what was found in the folder and of what was loaded.

use std::sync::Arc;
use std::time::Duration;

use super::entry::Entry;
use super::error::{AcquireError, Refusal};
use super::events::AdapterChange;
use super::state::{CompositionKey, Load, State, Target, resident_bytes};
use super::status::Tier;
use crate::adapter::canonical::Adapter;
use crate::adapter::files::{Fingerprint, Glance};
use crate::adapter::residency::{ItemId, Reservation, Urgency};

/// A folder that is replaced by two renames is missing in between.
const REMOVAL_GRACE: Duration = Duration::from_millis(50);
/// Files that were not touched for so long are not being written any more. Until then, what they replace is served where they
/// cannot be.
const REST: Duration = Duration::from_secs(2);

/// A folder with an adapter, not seen before or changed since.
#[derive(Debug)]
pub struct Noticed {
    pub name: String,
    pub fingerprint: Option<Fingerprint>,
    pub glance: Result<Glance, Refusal>,
    /// Where the files are known from before.
    pub generation: Option<String>,
    pub previous_generations: Vec<String>,
}

/// What the files of an adapter turned into.
#[derive(Debug)]
pub struct Loaded {
    pub fingerprint: Option<Fingerprint>,
    pub generation: Option<String>,
    pub adapter: Result<Adapter, Refusal>,
    /// Since the files were opened.
    pub took: Duration,
}

/// Of the folder.
impl State {
    /// Takes up a folder, and plans to load it.
    pub fn record(&mut self, noticed: Noticed, urgency: Urgency, now: Duration) {
        let Noticed { name, fingerprint, glance, generation, previous_generations } = noticed;
        if !self.entries.contains_key(&name) {
            self.entries.insert(name.clone(), Entry { id: self.num_ids, ..Entry::default() });
            self.num_ids += 1;
            self.events.tell(&name, generation.as_deref(), AdapterChange::Registered);
        }
        let Some(entry) = self.entries.get_mut(&name) else { return };
        entry.is_missing = false;
        entry.previous_generations = previous_generations;
        match glance {
            Err(refusal) => {
                self.fail(&name, fingerprint, generation, refusal, now);
            }
            Ok(glance) => {
                entry.notice(fingerprint, now);
                (entry.method, entry.coverage, entry.failure) = (None, None, None);
                self.identify(&name, generation);
                let Some(entry) = self.entries.get_mut(&name) else { return };
                entry.resident_bytes = glance.resident_bytes;
                entry.manifest = Arc::new(glance.manifest);
                let is_resident = entry.item.is_some_and(|item| self.resident.contains_key(&item));
                entry.is_stale = is_resident;
                // Until it is loaded the old generation is served: that must not wait behind others.
                let urgency = match urgency {
                    _ if is_resident => Urgency::Request,
                    Urgency::Fill if entry.manifest.pin => Urgency::Prefetch,
                    urgency => urgency,
                };
                self.load_of(Target::Adapter(name), urgency, now).is_due = true;
            }
        }
    }

    /// What is known of the generation of the files that the folder has now.
    fn identify(&mut self, name: &str, generation: Option<String>) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        entry.generation = generation;
        let Some(generation) = &entry.generation else { return };
        let last_generation = entry.last_generation.replace(generation.clone());
        if let Some(previous_generation) = last_generation.filter(|last| last != generation) {
            self.events.tell(name, Some(generation), AdapterChange::Replaced { previous_generation });
        }
    }

    pub fn set_previous_generations(&mut self, name: &str, previous: Vec<String>) {
        if let Some(entry) = self.entries.get_mut(name) {
            entry.previous_generations = previous;
        }
    }

    /// A scan has ended; the next one is due within `time`. For signs from during it what people wait for comes first: a scan
    /// may take longer than signs may wait, and be followed by the next one for as long as files are copied in.
    pub fn rescan_within(&mut self, time: Duration, now: Duration) {
        let retries = self.entries.values().filter_map(|entry| Some(entry.hindrance.as_ref()?.retry_at));
        // What was due is being tried.
        let retries = retries.filter(|retry_at| *retry_at > now);
        self.rescan_at = retries.fold(self.rescan_at.min(now + time), Duration::min);
        self.changed = self.changed.map(|_| (now, now));
    }

    /// Lets go of every adapter that is not among `present`, if it was not there the last time either.
    pub fn remove_missing(&mut self, present: &[String], now: Duration) {
        let mut gone = Vec::new();
        for (name, entry) in &mut self.entries {
            let is_missing = present.binary_search(name).is_err();
            if is_missing && entry.is_missing {
                gone.push(name.clone());
            } else if is_missing {
                self.rescan_at = self.rescan_at.min(now + REMOVAL_GRACE);
            }
            entry.is_missing = is_missing;
        }
        for name in gone {
            self.forget(&name);
        }
    }

    pub fn forget(&mut self, name: &str) {
        self.retire_current(name);
        if let Some(entry) = self.entries.remove(name) {
            self.events.tell(name, entry.generation.as_deref(), AdapterChange::Removed);
        }
        if let Some(load) = self.take_load(&Target::Adapter(name.to_owned())) {
            load.end(&Err(AcquireError::Unknown(name.to_owned())));
        }
        tracing::info!("adapter {name} removed");
    }
}

/// Of loading.
impl State {
    /// An adapter that was loaded before it was put in the folder. Where there is no room for it, it is known at least.
    pub fn adopt(&mut self, name: &str, loaded: Loaded, bytes: u64, now: Duration) {
        let target = Target::Adapter(name.to_owned());
        let item = self.load_of(target, Urgency::Prefetch, now).item;
        if let Reservation::Granted { .. } = self.reserve(item, bytes, Urgency::Prefetch, now) {
            self.finish_adapter(name, loaded, now);
        } else {
            self.identify(name, loaded.generation);
        }
    }

    pub fn finish_adapter(&mut self, name: &str, loaded: Loaded, now: Duration) {
        let Some(load) = self.take_load(&Target::Adapter(name.to_owned())) else { return };
        let Some(entry) = self.entries.get_mut(name) else {
            self.residency.remove(load.item);
            return load.end(&Err(AcquireError::Unknown(name.to_owned())));
        };
        match loaded.adapter {
            Ok(adapter) => {
                entry.notice(loaded.fingerprint, now);
                self.identify(name, loaded.generation);
                self.settle(name, load, adapter, loaded.took, now);
            }
            Err(refusal) => {
                self.residency.remove(load.item);
                let error = self.fail(name, loaded.fingerprint, loaded.generation, refusal, now);
                load.end(&Err(error));
            }
        }
    }

    /// Files were found that cannot be served, or not be read. What may pass is tried again, and until then what is served is
    /// served on; so it is beside files that may still be being written.
    fn fail(
        &mut self,
        name: &str,
        fingerprint: Option<Fingerprint>,
        generation: Option<String>,
        Refusal { cause, may_pass }: Refusal,
        now: Duration,
    ) -> AcquireError {
        let is_served = self.entries.get(name).is_some_and(|entry| self.current(entry).is_some());
        let Some(entry) = self.entries.get_mut(name) else { return AcquireError::Unknown(name.to_owned()) };
        // What cannot be looked at may be what is known.
        if fingerprint.is_some() || !may_pass {
            entry.notice(fingerprint, now);
        }
        let rested_at = entry.noticed_at + REST;
        let is_rested = !is_served || rested_at <= now;
        if !may_pass && is_rested {
            (entry.method, entry.coverage) = (None, None);
            self.identify(name, generation);
            self.refuse(name, cause.clone());
            return AcquireError::Refused { name: name.to_owned(), cause };
        }
        if entry.hinder(&cause, (!may_pass).then_some(rested_at), now) {
            let meanwhile = if is_served { "; what was served before is served on" } else { "" };
            tracing::warn!("adapter {name} is tried again: {cause}{meanwhile}");
        }
        if let Some(hindrance) = &entry.hindrance {
            self.rescan_at = self.rescan_at.min(hindrance.retry_at);
        }
        let error = AcquireError::Unreadable { name: name.to_owned(), cause };
        if let Some(load) = self.take_load(&Target::Adapter(name.to_owned())) {
            self.residency.remove(load.item);
            load.end(&Err(error.clone()));
        }
        error
    }

    fn settle(&mut self, name: &str, load: Load, adapter: Adapter, took: Duration, now: Duration) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        let bytes = resident_bytes(&adapter);
        entry.resident_bytes = bytes;
        entry.method = Some(adapter.method);
        entry.coverage = Some(adapter.coverage.clone());
        entry.manifest = Arc::new(adapter.manifest.clone());
        (entry.failure, entry.hindrance) = (None, None);
        let (pinned, old) = (adapter.manifest.pin, entry.item);
        let adapter = Arc::new(adapter);
        if let Some(same) =
            old.and_then(|old| self.resident.get(&old)).filter(|old| old.generation == adapter.generation)
        {
            entry.is_stale = false;
            self.residency.remove(load.item);
            load.end(&Ok(same.clone()));
            return self.trash.push(adapter);
        }
        match self.reserve(load.item, bytes, load.urgency, now) {
            Reservation::Granted { .. } => {
                self.retire_all_but(name, &adapter.generation);
                self.residency.commit(load.item, bytes, pinned, now);
                if let Some(entry) = self.entries.get_mut(name) {
                    (entry.item, entry.is_stale) = (Some(load.item), false);
                }
                let coverage = &adapter.coverage;
                tracing::info!(
                    "adapter {name}: {} of {} sites, rank {}, {:.1} MB, generation {:.8}",
                    coverage.num_sites,
                    coverage.num_expected_sites,
                    coverage.max_rank,
                    bytes as f64 / 1e6,
                    adapter.generation
                );
                self.metrics.of_adapter(name).loads_total.inc();
                let change = AdapterChange::Loaded { tier: Tier::Host, seconds: took.as_secs_f64() };
                self.events.tell(name, Some(&adapter.generation), change);
                self.resident.insert(load.item, adapter.clone());
                load.end(&Ok(adapter));
            }
            // More than was estimated: again, now that the size is known.
            Reservation::Wait => {
                self.residency.remove(load.item);
                self.trash.push(adapter);
                self.loads.push(load);
            }
            Reservation::TooLarge => {
                self.residency.remove(load.item);
                self.trash.push(adapter);
                let cause = self.residency.too_large(bytes);
                self.refuse(name, cause.clone());
                load.end(&Err(AcquireError::Refused { name: name.to_owned(), cause }));
            }
        }
    }

    pub fn finish_composition(&mut self, key: CompositionKey, composed: Result<Adapter, String>, now: Duration) {
        let Some(load) = self.take_load(&Target::Composition(key.clone(), Vec::new())) else { return };
        let adapter = match composed {
            Ok(adapter) => Arc::new(adapter),
            Err(cause) => {
                self.residency.remove(load.item);
                return load.end(&Err(AcquireError::Composition(cause)));
            }
        };
        let bytes = resident_bytes(&adapter);
        match self.reserve(load.item, bytes, load.urgency, now) {
            Reservation::Granted { .. } => {
                self.residency.commit(load.item, bytes, false, now);
                self.resident.insert(load.item, adapter.clone());
                self.compositions.insert(key, load.item);
                load.end(&Ok(adapter));
            }
            Reservation::Wait | Reservation::TooLarge => {
                self.residency.remove(load.item);
                self.trash.push(adapter);
                let needed = bytes + load.target.bytes_beside();
                match self.residency.can_hold(needed) {
                    true => self.end_without_memory(load),
                    false => load.end(&Err(AcquireError::Composition(self.residency.too_large(needed)))),
                }
            }
        }
    }

    /// Larger than the whole budget: it will never fit.
    pub(super) fn refuse_size(&mut self, index: usize) {
        let load = self.loads.remove(index);
        let cause = self.residency.too_large(self.bytes_of(&load.target) + load.target.bytes_beside());
        match load.target.clone() {
            Target::Adapter(name) => {
                self.refuse(&name, cause.clone());
                load.end(&Err(AcquireError::Refused { name, cause }));
            }
            Target::Composition(..) => load.end(&Err(AcquireError::Composition(cause))),
        }
    }

    /// From now on the name is an error; what runs goes on.
    fn refuse(&mut self, name: &str, cause: String) {
        tracing::error!("adapter {name} refused: {cause}");
        self.metrics.adapter_refusals_total.inc();
        self.retire_current(name);
        let Some(entry) = self.entries.get_mut(name) else { return };
        self.events.tell(name, entry.generation.as_deref(), AdapterChange::refused(&cause));
        (entry.failure, entry.hindrance) = (Some(cause.clone()), None);
        if let Some(load) = self.take_load(&Target::Adapter(name.to_owned())) {
            self.residency.remove(load.item);
            load.end(&Err(AcquireError::Refused { name: name.to_owned(), cause }));
        }
    }

    fn take_load(&mut self, target: &Target) -> Option<Load> {
        let index = self.loads.iter().position(|load| load.target.is(target))?;
        Some(self.loads.remove(index))
    }

    /// The old generation may not be served for ever because there is no memory for the new one.
    pub(super) fn retire_stale(&mut self, name: &str) {
        if self.entries.get(name).is_some_and(|entry| entry.is_stale) {
            self.retire_current(name);
        }
    }

    /// Nobody gets what is resident of `name` any more, nor a composition with it.
    fn retire_current(&mut self, name: &str) {
        self.retire_all_but(name, "");
    }

    fn retire_all_but(&mut self, name: &str, generation: &str) {
        if let Some(entry) = self.entries.get_mut(name) {
            entry.is_stale = false;
            if let Some(item) = entry.item.take() {
                self.retire(item, vec![name.to_owned()]);
            }
        }
        let is_old =
            |(member, its_generation, _): &(String, String, u32)| member == name && its_generation != generation;
        let composed: Vec<_> = self.compositions.extract_if(|key, _| key.iter().any(is_old)).collect();
        for (key, item) in composed {
            self.retire(item, key.into_iter().map(|(member, ..)| member).collect());
        }
    }

    fn retire(&mut self, item: ItemId, names: Vec<String>) {
        if let Some(adapter) = self.resident.remove(&item) {
            self.residency.retire(item);
            self.retired.push((item, adapter, names));
        }
    }
}
