//! The promises of the design, kept by the real decoder: on a tiny random model, and on `smollm2:135m` where it is there.
//!
//! Each device has a test of its own that names its places.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use candle_core::quantized::GgmlDType;
use kernels::attention::{BLOCK_SIZE, BlockId, KvType};
use lorry::adapter::canonical::Adapter;
use lorry::adapter::files::AdapterFiles;
use lorry::adapter::loader;
use lorry::app::App;
use lorry::config::{self, Config, Overrides};
use lorry::engine::fairness::Account;
use lorry::engine::request::{Event, PromptOutput, Request, SamplingParams};
use lorry::engine::{EngineConfig, EngineHandle, EngineState};
use lorry::generation::{Access, GenerationError, GenerationOptions, GenerationRequest, Selection};
use lorry::metrics::Metrics;
use lorry::model::base_weights::GgufWeights;
use lorry::model::spec::{Architecture, ModelSpec, Module};
use lorry::model::{AdapterGroup, SequenceRows};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::tensor::{Dtype, TensorView, serialize};
use tokio::sync::mpsc::{self, UnboundedReceiver};

use crate::events::{Reply, next_event};
use crate::shapes::Shapes;
use crate::tiny::peft::{Kind, PeftAdapter, with_virtual_tokens};
use crate::tiny::{Loaded, Lora, Place, TinyModel, logits_alone, logits_of_rows, place, random_tokens};
use crate::{ADAPTER_STEP, engine_place, places};

const MAX_QUEUED: usize = 256;

fn tiny_model() -> TinyModel {
    TinyModel::new(Architecture::Qwen2, GgmlDType::Q4K, 1)
}

/// LoRA of many ranks, and one adapter of every method.
fn random_adapters(spec: &ModelSpec) -> Vec<Arc<Adapter>> {
    let ranks = [1, 2, 4, 8, 16, 3, 5, 32];
    let lora = |(i, rank)| Lora::random(spec, rank, i % 2 == 1, i as u64).adapter(&format!("adapter-{i}"));
    // The head of a real model takes too long to draw.
    let kinds = Kind::ALL.into_iter().filter(|kind| *kind != Kind::LoraSavedHead || spec.vocab_size < 1000);
    let base = Shapes(spec.clone());
    let of_kind = |kind: Kind| PeftAdapter::random(kind, spec, kind as u64).load(&format!("{kind:?}"), &base);
    ranks.into_iter().enumerate().map(lora).chain(kinds.map(of_kind)).collect()
}

/// As many of them as the device is quick enough for; at least of four methods.
fn some_adapters(spec: &ModelSpec) -> Vec<Arc<Adapter>> {
    random_adapters(spec).into_iter().step_by(ADAPTER_STEP).collect()
}

/// A sequence to run among others.
struct Member {
    tokens: Vec<u32>,
    adapter: Option<Arc<Adapter>>,
}

/// The base first, in the middle and last; two sequences of one adapter; lengths around the ends of KV blocks.
fn members(spec: &ModelSpec, adapters: &[Arc<Adapter>], length: usize) -> Vec<Member> {
    let mut adapters: Vec<_> = adapters.iter().cloned().map(Some).collect();
    adapters.insert(3, adapters[2].clone());
    adapters.insert(4, None);
    adapters.insert(0, None);
    adapters.push(None);
    let tokens = |i: usize| random_tokens(spec, length + i * 5 % 13, i as u64);
    let member = |(i, adapter): (usize, Option<Arc<Adapter>>)| Member {
        tokens: with_virtual_tokens(tokens(i), adapter.as_ref()),
        adapter,
    };
    adapters.into_iter().enumerate().map(member).collect()
}

/// Logits `[member][position][vocab]` of all members side by side: they begin at different steps, every other one is
/// prefilled `chunk` rows at a time, the rest go row by row as in decoding, and their KV blocks interleave.
fn logits_together(decoder: &mut dyn Loaded, members: &[Member], chunk: usize) -> Vec<Vec<Vec<f32>>> {
    let longest = members.iter().map(|member| member.tokens.len()).max().unwrap_or(0);
    let num_blocks = longest.div_ceil(BLOCK_SIZE);
    let block = |member: usize, index: usize| BlockId(((num_blocks - 1 - index) * members.len() + member) as u32);
    let tables: Vec<Vec<BlockId>> =
        (0..members.len()).map(|member| (0..num_blocks).map(|index| block(member, index)).collect()).collect();
    decoder.reserve(num_blocks * members.len());
    let adapters = members.iter().filter_map(|member| member.adapter.as_ref());
    let _leases: Vec<_> = adapters.map(|adapter| place(decoder, adapter)).collect();
    let mut all: Vec<Vec<Vec<f32>>> = vec![Vec::new(); members.len()];
    let mut step = 0;
    while all.iter().zip(members).any(|(logits, member)| logits.len() < member.tokens.len()) {
        let (mut tokens, mut sequences, mut owners) = (Vec::new(), Vec::new(), Vec::new());
        let mut groups: Vec<AdapterGroup> = Vec::new();
        for (i, member) in members.iter().enumerate().filter(|(i, _)| step >= i % 4) {
            let first_position = all[i].len();
            let most = if i % 2 == 0 { chunk } else { 1 };
            let num_rows = most.min(member.tokens.len() - first_position);
            if num_rows == 0 {
                continue;
            }
            let rows = tokens.len()..tokens.len() + num_rows;
            tokens.extend_from_slice(&member.tokens[first_position..][..num_rows]);
            owners.extend(rows.clone().map(|_| i));
            match (&member.adapter, groups.last_mut()) {
                (Some(adapter), Some(group)) if Arc::ptr_eq(adapter, &group.adapter) => group.rows.end = rows.end,
                (Some(adapter), _) => groups.push(AdapterGroup { rows: rows.clone(), adapter: adapter.clone() }),
                (None, _) => {}
            }
            sequences.push(SequenceRows { rows, first_position, block_table: &tables[i] });
        }
        let of_rows = logits_of_rows(decoder, &tokens, &sequences, &groups);
        owners.into_iter().zip(of_rows).for_each(|(owner, logits): (usize, _)| all[owner].push(logits));
        step += 1;
    }
    all
}

fn bits(logits: &[Vec<f32>]) -> Vec<Vec<u32>> {
    logits.iter().map(|row| row.iter().map(|logit| logit.to_bits()).collect()).collect()
}

/// Runs every member alone, then all together in each place and with each size of chunk.
fn check_rows(
    load: &dyn Fn(Place) -> Box<dyn Loaded>,
    adapters: fn(&ModelSpec) -> Vec<Arc<Adapter>>,
    alone: Place,
    length: usize,
    together: &[(Place, usize)],
) {
    let mut decoder = load(alone);
    let adapters = adapters(decoder.spec());
    let members = members(decoder.spec(), &adapters, length);
    let run_alone = |member: &Member| bits(&logits_alone(&mut *decoder, &member.tokens, member.adapter.as_ref()));
    let expected: Vec<_> = members.iter().map(run_alone).collect();
    for &(place, chunk) in together {
        let mut decoder = load(place);
        for (i, logits) in logits_together(&mut *decoder, &members, chunk).iter().enumerate() {
            assert!(bits(logits) == expected[i], "sequence {i}, {place:?}, chunks of {chunk}");
        }
    }
}

#[test]
fn a_row_among_adapters_of_every_method_and_the_base_has_the_bits_of_the_row_alone() {
    let model = tiny_model();
    for (alone, together) in places() {
        let together = together.iter().flat_map(|place| [1, 7, 16, 64].map(|chunk| (*place, chunk)));
        check_rows(&|place| model.load(place), random_adapters, alone, 24, &together.collect::<Vec<_>>());
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_batch_for_every_weight_type() {
    use GgmlDType::{BF16, F16, F32, Q2K, Q3K, Q4_0, Q4_1, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
    for dtype in [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2K, Q3K, Q5K, Q6K, F16, BF16, F32] {
        let model = TinyModel::new(Architecture::Llama, dtype, 2);
        // Weights know nothing of how keys and values are kept.
        for (alone, together) in places().into_iter().filter(|(place, _)| place.kv_type() == KvType::F16) {
            check_rows(&|place| model.load(place), some_adapters, alone, 12, &[(together[0], 7)]);
        }
    }
}

#[test]
fn a_row_of_a_real_model_has_the_bits_of_the_row_alone() {
    let path = config::lorry_home().unwrap().join("models/SmolLM2-135M-Instruct.Q4_1.gguf");
    if !path.exists() {
        return println!("skipped: smollm2:135m is not there");
    }
    let (alone, together) = places().pop().expect("there is a place");
    check_rows(&|place| place.load(&path, 256).unwrap(), some_adapters, alone, 10, &[(together[0], 7)]);
}

fn start(model: &TinyModel, max_batch_rows: usize, num_blocks: usize, metrics: &Arc<Metrics>) -> EngineHandle {
    start_guessing(model, 0, max_batch_rows, num_blocks, metrics)
}

fn start_guessing(
    model: &TinyModel,
    max_draft_tokens: usize,
    max_batch_rows: usize,
    num_blocks: usize,
    metrics: &Arc<Metrics>,
) -> EngineHandle {
    let config = EngineConfig {
        max_batch_rows,
        max_sequences: 16,
        max_queued: MAX_QUEUED,
        context_length: 256,
        max_draft_tokens,
        max_inter_token: None,
    };
    let mut decoder = model.load(engine_place());
    decoder.reserve(num_blocks);
    EngineHandle::start(decoder, config, metrics.clone())
}

fn start_roomy(model: &TinyModel) -> EngineHandle {
    start(model, 64, 128, &Arc::new(Metrics::new("base")))
}

#[derive(Clone)]
struct Ask {
    prompt_tokens: Vec<u32>,
    adapter: Option<Arc<Adapter>>,
    max_tokens: usize,
    logit_bias: Vec<(u32, f32)>,
}

impl Ask {
    fn new(prompt_tokens: Vec<u32>, adapter: Option<&Arc<Adapter>>) -> Self {
        Self { prompt_tokens, adapter: adapter.cloned(), max_tokens: 12, logit_bias: Vec::new() }
    }

    fn submit(&self, engine: &EngineHandle) -> UnboundedReceiver<Event> {
        let (events, receiver) = mpsc::unbounded_channel();
        let sampling =
            SamplingParams { temperature: 0.8, logit_bias: self.logit_bias.clone(), seed: 7, ..SamplingParams::GREEDY };
        let request = Request {
            prompt_tokens: self.prompt_tokens.clone(),
            num_pinned_tokens: 0,
            adapter: self.adapter.clone(),
            account: Account::default(),
            sampling,
            max_tokens: self.max_tokens,
            stop_tokens: Arc::from([]),
            top_logprobs: Some(3),
            grammar: None,
            prediction: None,
            prompt_output: PromptOutput::Nothing,
            deadline: None,
            events,
            permit: engine.try_permit().unwrap(),
        };
        engine.submit(request).unwrap();
        receiver
    }

    fn run(&self, engine: &EngineHandle) -> Reply {
        Reply::of(self.submit(engine))
    }
}

/// The base and each adapter, over prompts that share a beginning.
fn mixed_asks(spec: &ModelSpec, adapters: &[Arc<Adapter>]) -> Vec<Ask> {
    let common = random_tokens(spec, 40, 3);
    let prompt = |i: u64| [common.clone(), random_tokens(spec, 1 + i as usize * 7 % 30, i)].concat();
    let models = std::iter::once(None).chain(adapters.iter().map(Some));
    models.flat_map(|adapter| (0..3).map(move |i| Ask::new(prompt(i), adapter))).collect()
}

#[test]
fn tokens_and_logprobs_are_the_same_alone_among_others_and_from_the_prefix_cache() {
    let model = tiny_model();
    let adapters = some_adapters(&model.spec);
    let asks = mixed_asks(&model.spec, &adapters);
    let alone: Vec<Reply> = asks.iter().map(|ask| ask.run(&start_roomy(&model))).collect();
    assert!(alone.iter().all(|reply| reply.cached_tokens == 0 && reply.events.len() == 13));
    for max_batch_rows in [5, 64, 256] {
        let engine = start(&model, max_batch_rows, 256, &Arc::new(Metrics::new("base")));
        for round in 0..2 {
            let receivers: Vec<_> = asks.iter().map(|ask| ask.submit(&engine)).collect();
            for (i, receiver) in receivers.into_iter().enumerate() {
                let reply = Reply::of(receiver);
                assert_eq!(reply.events, alone[i].events, "request {i}, {max_batch_rows} rows, round {round}");
                // Two blocks at least, of which a prelude takes its part.
                let least = 2 * BLOCK_SIZE - asks[i].adapter.as_ref().map_or(0, |adapter| adapter.num_virtual_tokens());
                assert!(round == 0 || reply.cached_tokens >= least, "request {i}: {} cached", reply.cached_tokens);
            }
        }
    }
}

/// A PEFT folder with these weights, and `extra` tensors of one value each.
fn write_peft(dir: &Path, lora: &Lora, extra: &[&str]) {
    let names = Module::PLAIN.map(Module::name);
    let config = serde_json::json!({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": lora.rank,
        "lora_alpha": lora.scale * lora.rank as f32, "target_modules": names});
    let mut tensors: BTreeMap<String, (Vec<usize>, &[f32])> = BTreeMap::new();
    for (layer, sites) in lora.sites.iter().enumerate() {
        for (module, site) in Module::PLAIN.into_iter().zip(sites) {
            let path = format!("base_model.model.model.layers.{layer}.{}.{}", module.parent(), module.name());
            let (inputs, outputs) = site.shape;
            tensors.insert(format!("{path}.lora_A.weight"), (vec![lora.rank, inputs], &site.a));
            tensors.insert(format!("{path}.lora_B.weight"), (vec![outputs, lora.rank], &site.b));
        }
    }
    tensors.extend(extra.iter().map(|name| ((*name).to_owned(), (vec![1], [1.0].as_slice()))));
    let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let tensors: BTreeMap<_, _> =
        tensors.into_iter().map(|(name, (shape, values))| (name, (shape, bytes(values)))).collect();
    let views = tensors.iter().map(|(name, (shape, bytes))| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap();
        (name, view)
    });
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    fs::write(dir.join("adapter_model.safetensors"), serialize(views, None).unwrap()).unwrap();
}

#[tokio::test]
async fn a_refused_or_unknown_model_is_an_error_and_never_the_base() {
    let model = tiny_model();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    model.write(&path);
    let adapters = dir.path().join("adapters");
    let lora = Lora::random(&model.spec, 4, false, 1);
    write_peft(&adapters.join("whole"), &lora, &[]);
    write_peft(&adapters.join("homeless"), &lora, &["base_model.model.model.layers.2.mlp.up_proj.lora_A.weight"]);
    let text = |path: &Path| Some(path.to_string_lossy().into_owned());
    let overrides = Overrides { model: text(&path), adapters: text(&adapters), ..Overrides::default() };
    let app = App::load(Config::load(None, &overrides).unwrap()).unwrap();
    let generation = app.state.generation;

    let resolve = async |name: &str| generation.resolve(&Selection::model(name), &Access::All).await.unwrap().adapter;
    let whole = resolve("whole").await.unwrap();
    assert_eq!((whole.coverage.num_sites, whole.coverage.max_rank), (14, 4));
    assert!(resolve("tiny").await.is_none());
    for (name, cause) in [("homeless", "layers.2"), ("tiny-homeless", "layers.2"), ("nobody", "/v1/models")] {
        assert!(app.adapters.acquire(name).await.is_err());
        let (selection, options) = (Selection::model(name), GenerationOptions::default());
        let request = GenerationRequest { selection, icl: None, prompt_format: None, prompts: Vec::new(), options };
        let error = generation.start(request, &Access::All).await.unwrap_err();
        assert!(matches!(error, GenerationError::UnknownModel { .. }), "{error}");
        assert!(error.to_string().contains(cause), "{error}");
    }
}

#[test]
fn the_base_gives_the_same_bits_whether_or_not_adapters_are_served_beside_it() {
    let model = tiny_model();
    let asks: Vec<Ask> = (0..8).map(|i| Ask::new(random_tokens(&model.spec, 10 + i * 9, i as u64), None)).collect();
    let without = start_roomy(&model);
    let expected: Vec<_> = asks.iter().map(|ask| ask.run(&without).events).collect();

    let with = start_roomy(&model);
    let adapters = some_adapters(&model.spec);
    let adapted = mixed_asks(&model.spec, &adapters);
    let busy: Vec<_> = adapted.iter().map(|ask| Ask { max_tokens: 40, ..ask.clone() }.submit(&with)).collect();
    for beside in [true, false] {
        let receivers: Vec<_> = asks.iter().map(|ask| ask.submit(&with)).collect();
        for (i, receiver) in receivers.into_iter().enumerate() {
            assert_eq!(Reply::of(receiver).events, expected[i], "prompt {i}, adapters beside it: {beside}");
        }
    }
    assert!(busy.into_iter().all(|receiver| !Reply::of(receiver).is_failed()));
}

#[test]
fn guessing_ahead_changes_no_bit_of_any_reply() {
    let model = tiny_model();
    let adapters = some_adapters(&model.spec);
    // So few likely tokens that the output repeats itself and guesses come true.
    let logit_bias = vec![(3, 30.0), (5, 30.0)];
    let asks: Vec<Ask> = mixed_asks(&model.spec, &adapters)
        .into_iter()
        .map(|ask| Ask { max_tokens: 40, logit_bias: logit_bias.clone(), ..ask })
        .collect();
    let plain = start_roomy(&model);
    let expected: Vec<Reply> = asks.iter().map(|ask| ask.run(&plain)).collect();
    let metrics = Arc::new(Metrics::new("base"));
    let guessing = start_guessing(&model, 63, 64, 128, &metrics);
    for pair in asks.chunks(3).zip(expected.chunks(3)) {
        let receivers: Vec<_> = pair.0.iter().map(|ask| ask.submit(&guessing)).collect();
        for (receiver, expected) in receivers.into_iter().zip(pair.1) {
            assert_eq!(Reply::of(receiver).events, expected.events);
        }
    }
    let (accepted, guessed) = (metrics.vllm.accepted_tokens_total.get(), metrics.vllm.draft_tokens_total.get());
    assert!(accepted > 50 && guessed > accepted);
}

#[test]
fn the_prefix_cache_never_crosses_generations_that_differ_in_one_weight() {
    let model = tiny_model();
    let dir = tempfile::tempdir().unwrap();
    let mut lora = Lora::random(&model.spec, 4, false, 1);
    model.write(&dir.path().join("base.gguf"));
    let base = GgufWeights::open(&dir.path().join("base.gguf")).unwrap();
    let load = |lora: &Lora| {
        write_peft(dir.path(), lora, &[]);
        Arc::new(loader::load("same-name", &AdapterFiles::read(dir.path()).unwrap(), &base).unwrap())
    };
    let old = load(&lora);
    lora.sites[0][Module::VProj.index()].b[0] += 0.5;
    let new = load(&lora);
    assert_ne!(old.generation, new.generation);

    let prompt = random_tokens(&model.spec, 40, 4);
    let asks = [None, Some(&old), Some(&new)].map(|adapter| Ask::new(prompt.clone(), adapter));
    let expected = asks.each_ref().map(|ask| ask.run(&start_roomy(&model)).events);
    assert!(expected[0] != expected[1] && expected[1] != expected[2]);
    let engine = start_roomy(&model);
    for cached_tokens in [0, 39] {
        for (ask, expected) in asks.iter().zip(&expected) {
            assert_eq!(ask.run(&engine), Reply { cached_tokens, events: expected.clone() });
        }
    }
    // The new generation again from its file: the same bytes are the same identity.
    let again = Ask { adapter: Some(load(&lora)), ..asks[2].clone() };
    assert_eq!(again.run(&engine).cached_tokens, 39);
}

#[test]
fn a_prompt_that_parts_within_a_cached_block_has_the_bits_of_one_alone() {
    let model = tiny_model();
    let adapters = some_adapters(&model.spec);
    let whole = random_tokens(&model.spec, 60, 5);
    for adapter in [None, Some(&adapters[0])] {
        let engine = start_roomy(&model);
        Ask::new(whole.clone(), adapter).run(&engine);
        for (num_shared, num_more) in [(27, 1), (27, 9), (1, 30), (59, 1), (47, 40)] {
            let more = random_tokens(&model.spec, num_more, 6 + num_more as u64);
            let prompt: Vec<u32> = whole[..num_shared].iter().chain(&more).copied().collect();
            assert_ne!(prompt[num_shared], whole[num_shared], "they part where the test says");
            let ask = Ask::new(prompt, adapter);
            let expected = ask.run(&start_roomy(&model));
            let reply = ask.run(&engine);
            assert_eq!(reply.events, expected.events);
            assert!(reply.cached_tokens >= num_shared.min(31) && expected.cached_tokens == 0, "{reply:?}");
        }
    }
}

#[test]
fn every_resource_returns_after_any_mix_of_finished_cancelled_and_failed_requests() {
    let model = tiny_model();
    let adapters = some_adapters(&model.spec);
    let metrics = Arc::new(Metrics::new("base"));
    // So few blocks that sequences wait and are preempted.
    let engine = start(&model, 24, 10, &metrics);
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let (mut kept, mut failing, mut leaving) = (Vec::new(), Vec::new(), Vec::new());
    for i in 0..150 {
        let adapter = adapters.get(rng.random_range(0..adapters.len() + 2));
        let prompt = random_tokens(&model.spec, rng.random_range(1..80), rng.random_range(0..4));
        let ask = Ask { max_tokens: rng.random_range(1..40), ..Ask::new(prompt, adapter) };
        match i % 5 {
            0 => failing.push(Ask { prompt_tokens: Vec::new(), ..ask }.submit(&engine)),
            1 => failing.push(Ask { logit_bias: vec![(1, f32::NAN)], ..ask }.submit(&engine)),
            2 => leaving.push((rng.random_range(0..20), ask.submit(&engine))),
            _ => kept.push(ask.submit(&engine)),
        }
        // Some leave before their first event, some between tokens, some too late.
        if !leaving.is_empty() && rng.random_bool(0.2) {
            let (num_events, mut receiver) = leaving.swap_remove(rng.random_range(0..leaving.len()));
            (0..num_events).take_while(|_| next_event(&mut receiver).is_some()).for_each(drop);
        }
    }
    drop(leaving);
    assert!(kept.into_iter().all(|receiver| !Reply::of(receiver).is_failed()));
    assert!(failing.into_iter().all(|receiver| Reply::of(receiver).is_failed()));
    // The step that ends this request has let go of everyone who left before it.
    assert!(!Ask::new(vec![1], adapters.first()).run(&engine).is_failed());

    assert_eq!(engine.state(), EngineState::default());
    assert!(metrics.vllm.num_preemptions_total.get() > 0, "the pool was meant to be too small");
    assert!(adapters.iter().all(|adapter| Arc::strong_count(adapter) == 1), "an adapter is still held");
    let permits: Vec<_> = (0..MAX_QUEUED).map(|_| engine.try_permit()).collect();
    assert!(permits.iter().all(Result::is_ok) && engine.try_permit().is_err());
}
