//! Adapters in a device's own memory: who is there, who goes, and what requests see of it.

mod events;
mod shapes;
mod tiny;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use emulator::Emulator;
use kernels::attention::KvType;
use kernels::cuda::Cuda;
use kernels::device::{AdapterTier, Caller, Device, DeviceError, Lease, Placement, StepLimits};
use lorry::adapter::canonical::Adapter;
use lorry::engine::fairness::Account;
use lorry::engine::request::{Event, PromptOutput, Request, SamplingParams};
use lorry::engine::{EngineConfig, EngineHandle, EngineState};
use lorry::metrics::Metrics;
use lorry::model::decoder::Decoder;
use lorry::model::gguf::GgufError;
use lorry::model::spec::ModelSpec;
use lorry::model::{ForwardBatch, Model};
use tokio::sync::mpsc::{self, UnboundedReceiver};

use events::next_event;
use shapes::Shapes;
use tiny::peft::{Kind, PeftAdapter};
use tiny::{TinyFile, random_tokens};

const ROOMY: usize = 1 << 30;

impl TinyFile {
    fn load(&self, total: usize, budget: usize) -> Result<Decoder<Cuda<Emulator>>, GgufError> {
        Decoder::load(&self.path, Cuda::new(Emulator::new(total), budget, KvType::F16), usize::MAX)
    }

    /// With room for the steps of these tests.
    fn ready(&self, total: usize, budget: usize) -> Decoder<Cuda<Emulator>> {
        let mut decoder = self.load(total, budget).unwrap();
        decoder.reserve(LIMITS, NUM_BLOCKS).unwrap();
        decoder
    }

    /// A device that knows the shape, which is all that placing takes.
    fn device(&self, total: usize, budget: usize) -> Cuda<Emulator> {
        let mut device = Cuda::new(Emulator::new(total), budget, KvType::F16);
        device.prepare(&self.spec.shape(), &self.spec.attention_plan()).unwrap();
        device
    }

    /// Bytes that count for an adapter.
    fn counted(&self, adapter: &Adapter) -> usize {
        let mut device = self.device(ROOMY, ROOMY);
        wait(&mut device, adapter).unwrap();
        tier(&device).resident_bytes
    }
}

const LIMITS: StepLimits = StepLimits { max_rows: 64, max_sequences: 8 };
const NUM_BLOCKS: usize = 64;

fn used(device: &Cuda<Emulator>) -> usize {
    device.driver().used().load(Ordering::Relaxed)
}

fn tier(device: &Cuda<Emulator>) -> AdapterTier {
    device.adapter_tier().unwrap()
}

fn ask(device: &mut Cuda<Emulator>, adapter: &Adapter) -> Result<Placement, DeviceError> {
    device.bring_adapters();
    device.place(&adapter.generation, &adapter.weights, adapter.manifest.pin)
}

/// Asks until the adapter is there.
fn wait(device: &mut Cuda<Emulator>, adapter: &Adapter) -> Result<Lease, DeviceError> {
    for _ in 0..10_000 {
        if let Placement::Ready(lease) = ask(device, adapter)? {
            return Ok(lease);
        }
        thread::sleep(Duration::from_millis(1));
    }
    panic!("adapter {} does not arrive", adapter.name);
}

fn is_there(device: &mut Cuda<Emulator>, adapter: &Adapter) -> bool {
    matches!(ask(device, adapter), Ok(Placement::Ready(_)))
}

fn pinned(adapter: Arc<Adapter>) -> Arc<Adapter> {
    let mut adapter = Arc::try_unwrap(adapter).unwrap();
    adapter.manifest.pin = true;
    Arc::new(adapter)
}

#[test]
fn an_adapter_of_any_method_takes_what_is_counted_for_it() {
    let tiny = TinyFile::new();
    let base = Shapes(tiny.spec.clone());
    let of_kind = |kind: Kind| PeftAdapter::random(kind, &tiny.spec, 1).load(&format!("{kind:?}"), &base);
    let adapters = Kind::ALL.into_iter().map(of_kind).chain([1, 3, 8, 100].map(|rank| tiny.lora(rank, rank as u64)));
    let mut device = tiny.device(ROOMY, ROOMY);
    for adapter in adapters {
        let (memory, counted) = (used(&device), tier(&device).resident_bytes);
        wait(&mut device, &adapter).unwrap();
        let (memory, counted) = (used(&device) - memory, tier(&device).resident_bytes - counted);
        assert_eq!(memory, counted, "{}", adapter.name);
    }
}

#[test]
fn what_was_used_longest_ago_goes_first() {
    let tiny = TinyFile::new();
    let adapters: Vec<_> = (0..6).map(|seed| tiny.lora(2, seed)).collect();
    let mut device = tiny.device(ROOMY, 3 * tiny.counted(&adapters[0]));
    let (mut expected, mut num_loads) = (Vec::new(), 0);
    for number in random_tokens(&tiny.spec, 60, 1).into_iter().map(|token| token as usize % adapters.len()) {
        wait(&mut device, &adapters[number]).unwrap();
        if let Some(place) = expected.iter().position(|there| *there == number) {
            expected.remove(place);
        } else {
            num_loads += 1;
        }
        expected.push(number);
        expected.drain(..expected.len().saturating_sub(3));
        assert_eq!(tier(&device).loads, num_loads, "{expected:?} are there");
    }
    assert_eq!(tier(&device).evictions, num_loads - 3);
}

#[test]
fn what_is_pinned_goes_last() {
    let tiny = TinyFile::new();
    let adapters: Vec<_> = (0..5).map(|seed| tiny.lora(4, seed)).collect();
    let [a, b, c, d, e] = adapters.try_into().unwrap();
    let a = pinned(a);
    let mut device = tiny.device(ROOMY, 3 * tiny.counted(&a));
    for adapter in [&a, &b, &c, &b, &d] {
        wait(&mut device, adapter).unwrap();
    }
    assert!([&a, &b, &d].into_iter().all(|adapter| is_there(&mut device, adapter)), "c was used before b");
    assert_eq!(tier(&device).evictions, 1);
    let held = [wait(&mut device, &b).unwrap(), wait(&mut device, &d).unwrap()];
    wait(&mut device, &e).unwrap();
    assert!([&b, &d, &e].into_iter().all(|adapter| is_there(&mut device, adapter)), "only a is not in use");
    drop(held);
    let AdapterTier { resident, resident_bytes, loads, evictions, .. } = tier(&device);
    assert_eq!((resident, loads, evictions), (3, 5, 2));
    assert_eq!(resident_bytes, 3 * tiny.counted(&a));
}

#[test]
fn what_the_host_has_dropped_goes_before_all_others() {
    let tiny = TinyFile::new();
    let [a, b, c] = [0, 1, 2].map(|seed| tiny.lora(4, seed));
    let b = pinned(b);
    let mut device = tiny.device(ROOMY, 2 * tiny.counted(&a));
    for adapter in [&a, &b] {
        wait(&mut device, adapter).unwrap();
    }
    drop(b);
    wait(&mut device, &c).unwrap();
    assert!(is_there(&mut device, &a) && is_there(&mut device, &c));
}

#[test]
fn who_asks_for_an_adapter_takes_and_frees_no_memory() {
    let tiny = TinyFile::new();
    let [a, b] = [0, 1].map(|seed| tiny.lora(4, seed));
    let budget = tiny.counted(&a) * 3 / 2;
    let mut device = tiny.device(ROOMY, budget);
    let empty = used(&device);
    let place = |device: &mut Cuda<Emulator>, adapter: &Adapter| {
        for _ in 0..5 {
            let placement = device.place(&adapter.generation, &adapter.weights, false).unwrap();
            assert!(matches!(placement, Placement::Loading(_)), "{placement:?}");
            // Long enough for it to be laid out.
            thread::sleep(Duration::from_millis(10));
        }
    };
    place(&mut device, &a);
    assert_eq!(used(&device), empty);
    while !device.bring_adapters() {}
    assert!(is_there(&mut device, &a) && !device.bring_adapters(), "it arrives once");
    let with_one = used(&device);
    place(&mut device, &b);
    assert_eq!((used(&device), tier(&device).evictions), (with_one, 1), "what goes is in the books");
    while !device.bring_adapters() {
        assert!(used(&device) <= with_one);
    }
    assert!(is_there(&mut device, &b));
    assert_eq!(used(&device), with_one);
}

#[test]
fn what_is_in_use_or_awaited_stays() {
    let tiny = TinyFile::new();
    let [a, b] = [0, 1].map(|seed| tiny.lora(4, seed));
    let mut device = tiny.device(ROOMY, tiny.counted(&a) * 3 / 2);
    let Ok(Placement::Loading(awaited)) = ask(&mut device, &a) else { panic!("it is not there yet") };
    while tier(&device).loads == 0 {
        assert_eq!(ask(&mut device, &b).unwrap(), Placement::Full);
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(ask(&mut device, &b).unwrap(), Placement::Full, "a is there, and somebody waits for it");
    let Ok(Placement::Ready(lease)) = ask(&mut device, &a) else { panic!("it was there") };
    drop(awaited);
    assert_eq!(ask(&mut device, &b).unwrap(), Placement::Full, "a is in use");
    drop(lease);
    wait(&mut device, &b).unwrap();
    assert_eq!((tier(&device).loads, tier(&device).evictions), (2, 1));
    // Nobody waits for what was asked for first.
    drop(ask(&mut device, &a).unwrap());
    wait(&mut device, &b).unwrap();
}

#[test]
fn an_adapter_that_finds_no_memory_fails_alone_and_may_be_asked_for_again() {
    let tiny = TinyFile::new();
    let (big, small) = (tiny.lora(64, 0), tiny.lora(4, 1));
    let total = used(&tiny.device(ROOMY, ROOMY)) + tiny.counted(&small);
    let mut device = tiny.device(total, ROOMY);
    for _ in 0..2 {
        assert!(matches!(ask(&mut device, &big), Ok(Placement::Loading(_))));
        // Long enough for it to have failed.
        thread::sleep(Duration::from_millis(50));
        wait(&mut device, &small).unwrap();
        let error = wait(&mut device, &big).unwrap_err().to_string();
        assert!(error.contains("no room for") && error.contains(&format!("of {total} are free")), "{error}");
        assert_eq!(tier(&device).resident_bytes, tiny.counted(&small), "{error}");
    }
    // What fails and is forgotten by the host leaves nothing either.
    drop(ask(&mut device, &big));
    drop(big);
    thread::sleep(Duration::from_millis(50));
    wait(&mut device, &small).unwrap();
    assert_eq!(tier(&device).resident_bytes, tiny.counted(&small));
}

#[test]
fn less_memory_than_the_budget_promises_makes_room_too() {
    let tiny = TinyFile::new();
    let adapters: Vec<_> = (0..3).map(|seed| tiny.lora(4, seed)).collect();
    let total = used(&tiny.device(ROOMY, ROOMY)) + tiny.counted(&adapters[0]) * 3 / 2;
    let mut device = tiny.device(total, ROOMY);
    for adapter in &adapters {
        wait(&mut device, adapter).unwrap();
    }
    assert_eq!((tier(&device).resident, tier(&device).evictions), (1, 2));
}

#[test]
fn a_device_with_too_little_memory_says_how_much_it_has() {
    let tiny = TinyFile::new();
    let roomy = tiny.load(ROOMY, ROOMY).unwrap();
    let (weights, memory) = (used(roomy.device()), used(tiny.ready(ROOMY, ROOMY).device()));
    let says_numbers = |error: &str, total: usize| {
        assert!(error.contains("no room for") && error.contains(&format!("of {total} are free")), "{error}");
    };
    for total in [weights / 2, weights - 1] {
        says_numbers(&tiny.load(total, ROOMY).unwrap_err().to_string(), total);
    }
    for total in [weights, (weights + memory) / 2, memory - 1] {
        let mut decoder = tiny.load(total, ROOMY).unwrap();
        says_numbers(&decoder.reserve(LIMITS, NUM_BLOCKS).unwrap_err().to_string(), total);
        says_numbers(&decoder.device().max_kv_blocks(LIMITS, 0).unwrap_err().to_string(), total);
    }
    tiny.ready(memory, ROOMY);
}

/// A model on a small device, watched from outside.
struct Watched {
    inner: Decoder<Cuda<Emulator>>,
    /// The most bytes of adapters there have been.
    most_bytes: Arc<AtomicUsize>,
    num_asked: Arc<AtomicUsize>,
    /// Adapters keep arriving while this is set.
    is_slow: Arc<AtomicBool>,
}

impl Model for Watched {
    fn spec(&self) -> &ModelSpec {
        self.inner.spec()
    }

    fn num_kv_blocks(&self) -> usize {
        self.inner.num_kv_blocks()
    }

    fn place(&mut self, adapter: &Adapter) -> Result<Placement, DeviceError> {
        let placement = self.inner.place(adapter);
        self.most_bytes.fetch_max(tier(self.inner.device()).resident_bytes, Ordering::Relaxed);
        self.num_asked.fetch_add(1, Ordering::Relaxed);
        match placement {
            Ok(Placement::Ready(lease)) if self.is_slow.load(Ordering::Relaxed) => Ok(Placement::Loading(lease)),
            placement => placement,
        }
    }

    fn bring_adapters(&mut self) -> bool {
        self.inner.bring_adapters()
    }

    fn adapter_tier(&self) -> Option<AdapterTier> {
        self.inner.adapter_tier()
    }

    fn forward(&mut self, batch: &ForwardBatch<'_>, caller: &mut dyn Caller) -> Result<(), DeviceError> {
        self.inner.forward(batch, caller)
    }
}

const MAX_QUEUED: usize = 64;

/// An engine on a device, and what is seen of it.
struct Served {
    engine: EngineHandle,
    metrics: Arc<Metrics>,
    most_bytes: Arc<AtomicUsize>,
    num_asked: Arc<AtomicUsize>,
    is_slow: Arc<AtomicBool>,
}

impl Served {
    fn new(decoder: Decoder<Cuda<Emulator>>) -> Self {
        let (most_bytes, num_asked, is_slow) = (Arc::default(), Arc::default(), Arc::default());
        let model = Watched {
            inner: decoder,
            most_bytes: Arc::clone(&most_bytes),
            num_asked: Arc::clone(&num_asked),
            is_slow: Arc::clone(&is_slow),
        };
        let config = EngineConfig {
            max_batch_rows: LIMITS.max_rows,
            max_sequences: LIMITS.max_sequences,
            max_queued: MAX_QUEUED,
            context_length: 256,
            max_draft_tokens: 0,
            max_inter_token: None,
        };
        let metrics = Arc::new(Metrics::new("base"));
        let engine = EngineHandle::start(Box::new(model), config, metrics.clone());
        Self { engine, metrics, most_bytes, num_asked, is_slow }
    }

    fn submit(&self, prompt: &[u32], adapter: Option<&Arc<Adapter>>, max_tokens: usize) -> UnboundedReceiver<Event> {
        let (events, receiver) = mpsc::unbounded_channel();
        let request = Request {
            prompt_tokens: prompt.to_vec(),
            num_pinned_tokens: 0,
            adapter: adapter.cloned(),
            account: Account::default(),
            sampling: SamplingParams { temperature: 0.8, seed: 7, ..SamplingParams::GREEDY },
            max_tokens,
            stop_tokens: Arc::from([]),
            top_logprobs: Some(2),
            grammar: None,
            prediction: None,
            prompt_output: PromptOutput::Nothing,
            deadline: None,
            events,
            permit: self.engine.try_permit().unwrap(),
        };
        self.engine.submit(request).unwrap();
        receiver
    }

    /// All events but the first, which says how long it waited.
    fn run(&self, prompt: &[u32], adapter: Option<&Arc<Adapter>>) -> Vec<Event> {
        rest(&mut self.submit(prompt, adapter, 6))
    }
}

/// The events still to come, but [`Event::Started`].
fn rest(receiver: &mut UnboundedReceiver<Event>) -> Vec<Event> {
    let events = std::iter::from_fn(|| next_event(receiver));
    events.filter(|event| !matches!(event, Event::Started { .. })).collect()
}

/// Whether a request has ended well, of the events that are there now.
fn has_finished(receiver: &mut UnboundedReceiver<Event>) -> bool {
    std::iter::from_fn(|| receiver.try_recv().ok()).any(|event| matches!(event, Event::Finished(_)))
}

fn started(receiver: &mut UnboundedReceiver<Event>) {
    let event = next_event(receiver);
    assert!(matches!(event, Some(Event::Started { .. })), "{event:?}");
}

/// What a request was refused with.
fn failure(events: &[Event]) -> &str {
    match events {
        [Event::Failed(reason)] => reason,
        _ => panic!("{events:?}"),
    }
}

#[test]
fn five_adapters_on_a_device_for_two_give_what_each_gives_alone() {
    let tiny = TinyFile::new();
    let adapters: Vec<_> = (0..5).map(|seed| tiny.lora(4, seed)).collect();
    let prompts: Vec<_> = (0..10).map(|seed| random_tokens(&tiny.spec, 5 + seed, seed as u64)).collect();
    let roomy = Served::new(tiny.ready(ROOMY, ROOMY));
    let alone: Vec<_> = prompts.iter().enumerate().map(|(i, prompt)| roomy.run(prompt, adapters.get(i % 6))).collect();
    let budget = 2 * tiny.counted(&adapters[0]) + 100;
    let small = Served::new(tiny.ready(ROOMY, budget));
    let mut receivers: Vec<_> =
        prompts.iter().enumerate().map(|(i, prompt)| small.submit(prompt, adapters.get(i % 6), 6)).collect();
    for (i, receiver) in receivers.iter_mut().enumerate() {
        assert_eq!(rest(receiver), alone[i], "request {i}");
    }
    let most = small.most_bytes.load(Ordering::Relaxed);
    assert!(most <= budget && most > tiny.counted(&adapters[0]), "{most} of {budget} bytes");
    let of_device = small.metrics.device_adapters().unwrap();
    assert!(of_device.evictions_total.get() >= 3, "five adapters were there, two at a time");
    assert!(of_device.resident.get() <= 2 && of_device.resident_bytes.get() as usize <= budget);
    assert_eq!(small.engine.state(), EngineState::default());
    assert!(adapters.iter().all(|adapter| Arc::strong_count(adapter) == 1));
}

#[test]
fn an_adapter_arrives_while_others_are_served() {
    let tiny = TinyFile::new();
    let served = Served::new(tiny.ready(ROOMY, ROOMY));
    let mut base = served.submit(&[1, 2, 3], None, 200);
    started(&mut base);
    let mut arriving = served.submit(&[1, 2, 3], Some(&tiny.lora(4, 0)), 6);
    started(&mut arriving);
    assert!(!has_finished(&mut base), "it came only when there was nothing else to do");
}

#[test]
fn an_adapter_the_device_can_never_hold_fails_its_request_alone() {
    let tiny = TinyFile::new();
    let (small, big) = (tiny.lora(4, 0), tiny.lora(64, 1));
    let memory = used(tiny.ready(ROOMY, ROOMY).device());
    let (counted, budget) = (tiny.counted(&big), tiny.counted(&small) * 2);
    let total = memory + budget;
    let cases = [
        (Served::new(tiny.ready(ROOMY, budget)), format!("takes {counted} bytes"), format!("allows {budget} for all")),
        (Served::new(tiny.ready(total, ROOMY)), "no room for".to_owned(), format!("of {total} are free")),
    ];
    for (served, wanted, available) in cases {
        let mut beside = served.submit(&[3, 4, 5], Some(&small), 20);
        let events = served.run(&[3, 4], Some(&big));
        let reason = failure(&events);
        assert!(reason.contains(&wanted) && reason.contains(&available) && reason.contains("adapter-1"), "{reason}");
        assert!(!served.run(&[3, 4], Some(&small)).is_empty() && served.engine.is_alive());
        assert_eq!(rest(&mut beside).last(), served.run(&[3, 4, 5], None).last(), "it ends by its length");
        assert_eq!(served.engine.state(), EngineState::default());
    }
}

#[test]
fn whoever_finds_no_room_is_next_and_the_base_does_not_wait() {
    let tiny = TinyFile::new();
    let [a, b] = [0, 1].map(|seed| tiny.lora(4, seed));
    let served = Served::new(tiny.ready(ROOMY, tiny.counted(&a) * 3 / 2));
    let mut first = served.submit(&[1, 2, 3], Some(&a), 60);
    started(&mut first);
    let mut full = served.submit(&[1, 2, 3], Some(&b), 6);
    // Its adapter is there, but it may not keep it from making room.
    let mut behind = served.submit(&[4, 5], Some(&a), 6);
    let mut base = served.submit(&[1, 2, 3], None, 6);
    rest(&mut base);
    assert!(full.is_empty() && behind.is_empty() && !has_finished(&mut first), "the base waits for nobody");
    started(&mut full);
    assert!(has_finished(&mut first), "its adapter was in use");
    assert!(behind.is_empty(), "it has overtaken");
    started(&mut behind);
    assert!(has_finished(&mut full));
    assert_eq!(rest(&mut behind).len(), 7);
    let of_device = served.metrics.device_adapters().unwrap();
    assert_eq!((of_device.loads_total.get(), of_device.evictions_total.get()), (3, 2));
}

#[test]
fn a_request_that_leaves_while_its_adapter_arrives_leaves_nothing() {
    let tiny = TinyFile::new();
    let [a, b] = [0, 1].map(|seed| tiny.lora(4, seed));
    let served = Served::new(tiny.ready(ROOMY, tiny.counted(&a) * 3 / 2));
    served.is_slow.store(true, Ordering::Relaxed);
    let arriving = served.submit(&[1, 2, 3], Some(&a), 6);
    let full = served.submit(&[1, 2, 3], Some(&b), 6);
    let asked = served.num_asked.load(Ordering::Relaxed);
    while served.num_asked.load(Ordering::Relaxed) < asked + 20 || served.engine.state().waiting < 2 {
        thread::sleep(Duration::from_millis(1));
    }
    drop((arriving, full));
    let deadline = Instant::now() + Duration::from_secs(30);
    while served.engine.state().waiting > 0 {
        assert!(Instant::now() < deadline, "they are still waited for");
        thread::sleep(Duration::from_millis(1));
    }
    served.is_slow.store(false, Ordering::Relaxed);
    assert_eq!(served.run(&[1, 2, 3], Some(&b)).len(), 7);
    assert_eq!(served.engine.state(), EngineState::default());
    assert_eq!(Arc::strong_count(&a), 1);
    assert_eq!((Arc::strong_count(&a.weights), Arc::strong_count(&b.weights)), (1, 1));
    assert_eq!(served.engine.num_free_places(), MAX_QUEUED);
}
