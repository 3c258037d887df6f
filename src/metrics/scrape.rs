//! What is asked at a scrape, because nobody tells when it changes: the folder of adapters, what of it is in memory, and what the
//! process has.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus::proto::MetricFamily;

use super::adapters::is_no_adapter;
use super::declarations::Declarations;
use super::{Metrics, vllm};
use crate::adapter::registry::{AdapterUsage, Tier, Usage};

impl Metrics {
    /// Every metric, of the adapters, and of arms that stand on one, those that `may_see` allows.
    pub(super) fn gather(&self, may_see: impl Fn(&str) -> bool) -> Vec<MetricFamily> {
        let (usage, mut registered) = self.ask_registry();
        let names: BTreeSet<_> = registered.iter().map(|adapter| adapter.name.clone()).collect();
        self.adapters.retain(|name| names.contains(name));
        let num_in_memory = registered.iter().filter(|adapter| adapter.tier == Tier::Host).count();
        registered.retain(|adapter| may_see(&adapter.name));
        let mut series = self.adapters.all();
        series.retain(|(name, _)| is_no_adapter(name) || may_see(name));

        let adapters = || series.iter().filter(|(name, _)| !is_no_adapter(name));
        let running: BTreeSet<_> = adapters().filter(|(_, series)| series.num_running() > 0).map(name_of).collect();
        let mut waiting: BTreeSet<_> = adapters().filter(|(_, series)| series.num_waiting() > 0).map(name_of).collect();
        waiting.extend(registered.iter().filter(|adapter| adapter.is_waited_for).map(|adapter| adapter.name.as_str()));

        let families = [
            self.declarations.gather(),
            self.vllm.gather(),
            requests_info(self.vllm.max_adapters.get(), &running, &waiting),
            self.residency(&registered, num_in_memory),
            memory(usage, &registered),
            process(self.started),
            self.arms.gather(&may_see),
        ];
        merged(families.into_iter().chain(series.iter().map(|(_, series)| series.gather())).flatten())
    }

    /// The adapters in memory, as vLLM is to say it; `num_in_memory` is of all, seen or not.
    fn residency(&self, adapters: &[AdapterUsage], num_in_memory: usize) -> Vec<MetricFamily> {
        let d = Declarations::with_labels(&vllm::labels(&self.model_name));
        let loaded = d.gauges(
            "vllm:lora_adapter_loaded",
            "Adapters in memory; `gpu` is that where the base runs.",
            &["adapter_name", "level", "pinned", "rank"],
        );
        // Which of them a card has, only the engine knows.
        let level = if self.device_adapters().is_some() { "cpu" } else { "gpu" };
        for adapter in adapters.iter().filter(|adapter| adapter.tier == Tier::Host) {
            let (pinned, rank) = (adapter.is_pinned.to_string(), adapter.max_rank.to_string());
            loaded.with_label_values(&[adapter.name.as_str(), level, &pinned, &rank]).set(1);
        }
        let on_device = self.device_adapters().map_or(num_in_memory as i64, |tier| tier.resident.get());
        d.gauge("vllm:num_gpu_loaded_lora_adapters", "Adapters in the memory where the base runs.").set(on_device);
        d.gauge("vllm:num_cpu_loaded_lora_adapters", "Adapters in the host's memory.").set(num_in_memory as i64);
        d.gather()
    }
}

/// Always one series, so that whoever looks for it learns that nothing runs; it has the labels of vLLM's, and no others.
fn requests_info(max_adapters: i64, running: &BTreeSet<&str>, waiting: &BTreeSet<&str>) -> Vec<MetricFamily> {
    let d = Declarations::default();
    let info = d.times(
        "vllm:lora_requests_info",
        "When it was that these adapters had requests running or waiting, in Unix seconds.",
        &["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
    );
    let list = |names: &BTreeSet<&str>| names.iter().copied().collect::<Vec<_>>().join(",");
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    info.with_label_values(&[max_adapters.to_string(), list(running), list(waiting)]).set(now.as_secs_f64());
    d.gather()
}

/// Of the host.
fn memory(usage: Usage, adapters: &[AdapterUsage]) -> Vec<MetricFamily> {
    let d = Declarations::default();
    let Usage { registered, resident, resident_bytes, leases } = usage;
    let totals = [
        ("lorry_adapters_registered", "Adapters known, in memory or not.", registered as u64),
        ("lorry_adapters_resident", "Adapters and compositions in memory.", resident as u64),
        ("lorry_adapter_resident_bytes", "Bytes of adapter weights in memory.", resident_bytes),
        ("lorry_adapter_leases", "Adapters held by sequences, counted once for each.", leases as u64),
    ];
    for (name, help, value) in totals {
        d.gauge(name, help).set(as_i64(value));
    }
    let bytes = d.gauges(
        "lorry_adapter_bytes",
        "Bytes it takes in memory, estimated until it was loaded once; `tier` is where it is.",
        &["adapter", "tier"],
    );
    for adapter in adapters {
        bytes.with_label_values(&[adapter.name.as_str(), adapter.tier.as_str()]).set(as_i64(adapter.bytes));
    }
    d.gather()
}

/// Under the names that Prometheus' own libraries have for it; what the system does not say is not there.
fn process(started: SystemTime) -> Vec<MetricFamily> {
    let d = Declarations::default();
    let since_epoch = started.duration_since(UNIX_EPOCH).unwrap_or_default();
    d.gauge("process_start_time_seconds", "When the server started, in Unix seconds.")
        .set(as_i64(since_epoch.as_secs()));
    if let Some(bytes) = resident_bytes() {
        d.gauge("process_resident_memory_bytes", "Memory of the server, mapped files in it too.").set(as_i64(bytes));
    }
    if let Ok(files) = fs::read_dir("/proc/self/fd") {
        d.gauge("process_open_fds", "Open files, connections among them.").set(as_i64(files.count() as u64));
    }
    d.gather()
}

fn resident_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

/// One family for each name, in their order.
fn merged(families: impl Iterator<Item = MetricFamily>) -> Vec<MetricFamily> {
    let mut by_name: BTreeMap<String, MetricFamily> = BTreeMap::new();
    for mut family in families {
        match by_name.get_mut(family.name()) {
            Some(known) => known.mut_metric().append(family.mut_metric()),
            None => drop(by_name.insert(family.name().to_owned(), family)),
        }
    }
    by_name.into_values().collect()
}

fn name_of<T>((name, _): &(String, T)) -> &str {
    name
}

fn as_i64(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
