//! What a device does in a step is the same however it does it: recorded or not, with a summary of the logits or all of them.

mod events;
mod shapes;
mod tiny;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use emulator::Emulator;
use kernels::attention::{BLOCK_SIZE, BlockId, KvType};
use kernels::cuda::Cuda;
use kernels::device::{AdapterTier, Caller, DeviceError, Lease, Logits, Placement, StepLimits, Summary};
use lorry::adapter::canonical::Adapter;
use lorry::engine::fairness::Account;
use lorry::engine::request::{Event, PromptOutput, Request, SamplingParams};
use lorry::engine::{EngineConfig, EngineHandle};
use lorry::metrics::Metrics;
use lorry::model::decoder::Decoder;
use lorry::model::spec::ModelSpec;
use lorry::model::{AdapterGroup, BlockCopy, ForwardBatch, Model, SequenceRows};
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::sync::mpsc;

use events::next_event;
use shapes::Shapes;
use tiny::peft::{Kind, PeftAdapter, with_virtual_tokens};
use tiny::{TinyFile, emulated_gpu, place, random_tokens};

impl TinyFile {
    fn load(&self, max_rows: usize, max_sequences: usize) -> Decoder<Cuda<Emulator>> {
        self.load_keeping(KvType::F16, max_rows, max_sequences)
    }

    fn load_keeping(&self, kv_type: KvType, max_rows: usize, max_sequences: usize) -> Decoder<Cuda<Emulator>> {
        let mut decoder = Decoder::load(&self.path, emulated_gpu(kv_type), usize::MAX).unwrap();
        decoder.reserve(StepLimits { max_rows, max_sequences }, NUM_BLOCKS).unwrap();
        decoder
    }

    fn of_kind(&self, kind: Kind) -> Arc<Adapter> {
        PeftAdapter::random(kind, &self.spec, 1).load(&format!("{kind:?}"), &Shapes(self.spec.clone()))
    }
}

/// Blocks of every sequence, and those of the rows that make a step too large to be recorded.
const BLOCKS_EACH: usize = 4;
const NUM_SEQUENCES: usize = 6;
const FILLERS: usize = 65;
const NUM_BLOCKS: usize = NUM_SEQUENCES * BLOCKS_EACH + FILLERS.div_ceil(BLOCK_SIZE);

#[derive(Clone)]
struct Sequence {
    tokens: Vec<u32>,
    adapter: Option<Arc<Adapter>>,
    blocks: Vec<BlockId>,
    num_done: usize,
}

impl Sequence {
    /// The one of number `number` among those that run.
    fn new(spec: &ModelSpec, adapter: Option<Arc<Adapter>>, number: usize, seed: u64) -> Self {
        let mut blocks: Vec<_> = (0..BLOCKS_EACH).map(|i| BlockId((number * BLOCKS_EACH + i) as u32)).collect();
        blocks.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
        let tokens = with_virtual_tokens(random_tokens(spec, 10 + seed as usize % 20, seed), adapter.as_ref());
        Self { tokens, adapter, blocks, num_done: 0 }
    }
}

/// So many next rows of some sequences, and whether their logits are wanted.
#[derive(Default)]
struct Plan<'a> {
    parts: Vec<(&'a Sequence, usize)>,
    copies: Vec<BlockCopy>,
    wants_logits: bool,
}

/// Bits of the logits of a step's rows; `num_fillers` rows of the base run beside them.
fn run(decoder: &mut Decoder<Cuda<Emulator>>, plan: &Plan<'_>, num_fillers: usize) -> Vec<Vec<u32>> {
    let (mut tokens, mut sequences, mut groups) = (Vec::new(), Vec::new(), Vec::new());
    for &(sequence, num_rows) in &plan.parts {
        let rows = tokens.len()..tokens.len() + num_rows;
        tokens.extend_from_slice(&sequence.tokens[sequence.num_done..][..num_rows]);
        let adapter = sequence.adapter.iter().cloned();
        groups.extend(adapter.map(|adapter| AdapterGroup { rows: rows.clone(), adapter }));
        sequences.push(SequenceRows { rows, first_position: sequence.num_done, block_table: &sequence.blocks });
    }
    let logits_rows: Vec<usize> = if plan.wants_logits { (0..tokens.len()).collect() } else { Vec::new() };
    let blocks: Vec<_> = (NUM_SEQUENCES * BLOCKS_EACH..NUM_BLOCKS).map(|block| BlockId(block as u32)).collect();
    if num_fillers > 0 {
        let rows = tokens.len()..tokens.len() + num_fillers;
        tokens.extend(rows.clone().map(|row| row as u32));
        sequences.push(SequenceRows { rows, first_position: 0, block_table: &blocks });
    }
    let batch = ForwardBatch {
        copies: &plan.copies,
        tokens: &tokens,
        sequences: &sequences,
        groups: &groups,
        logits_rows: &logits_rows,
    };
    let mut bits = Bits::default();
    decoder.forward(&batch, &mut bits).unwrap();
    assert!(bits.is_under_way, "the time of the step was not given away");
    bits.rows
}

/// Keeps the logits of a step.
#[derive(Default)]
struct Bits {
    is_under_way: bool,
    rows: Vec<Vec<u32>>,
}

impl Caller for Bits {
    fn meanwhile(&mut self) {
        assert!(!self.is_under_way, "once in a step");
        self.is_under_way = true;
    }

    fn on_logits(&mut self, _index: usize, logits: &mut dyn Logits) -> Result<(), DeviceError> {
        assert!(self.is_under_way, "logits before the time of the step was given away");
        self.rows.push(logits.all()?.iter().map(|logit| logit.to_bits()).collect());
        Ok(())
    }
}

fn place_all(decoder: &mut Decoder<Cuda<Emulator>>, adapters: &[Arc<Adapter>]) -> Vec<Lease> {
    adapters.iter().map(|adapter| place(decoder, adapter)).collect()
}

fn num_graphs(decoder: &Decoder<Cuda<Emulator>>) -> usize {
    decoder.device().driver().num_graphs()
}

#[test]
fn replayed_steps_of_any_mix_give_the_bits_of_steps_that_are_not_recorded() {
    KvType::ALL.into_iter().for_each(check_replays);
}

fn check_replays(kv_type: KvType) {
    let tiny = TinyFile::new();
    let kinds = [Kind::Ia3Wide, Kind::LoraSavedHead, Kind::PrefixTuning, Kind::LoraEverywhere];
    let adapters: Vec<_> = kinds.map(|kind| tiny.of_kind(kind)).into_iter().chain([tiny.lora(8, 8)]).collect();
    // As many rows as no bucket has.
    let load = |max_rows, max_sequences| tiny.load_keeping(kv_type, max_rows, max_sequences);
    let (mut recorded, mut eager) = (load(9, NUM_SEQUENCES), load(128, NUM_SEQUENCES + 1));
    let _leases = (place_all(&mut recorded, &adapters), place_all(&mut eager, &adapters));
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let any_adapter = |rng: &mut ChaCha8Rng| adapters.get(rng.random_range(0..adapters.len() * 2)).cloned();
    let mut sequences: Vec<_> =
        (0..NUM_SEQUENCES).map(|i| Sequence::new(&tiny.spec, any_adapter(&mut rng), i, i as u64)).collect();
    let num_steps = 60;
    let mut num_copied = 0;
    for step in 0..num_steps {
        let mut copies = Vec::new();
        for number in 0..NUM_SEQUENCES {
            if sequences[number].num_done < sequences[number].tokens.len() {
                continue;
            }
            let next = Sequence::new(&tiny.spec, any_adapter(&mut rng), number, step + 100);
            // It goes on where another one parts from it within its first block.
            let like = rng.random_range(0..NUM_SEQUENCES);
            let num_shared = rng.random_range(0..=sequences[like].num_done.min(BLOCK_SIZE));
            sequences[number] = if like != number && num_shared > 0 && copies.is_empty() {
                copies.push(BlockCopy { from: sequences[like].blocks[0], to: next.blocks[0] });
                let Sequence { tokens, adapter, .. } = sequences[like].clone();
                Sequence { tokens, adapter, num_done: num_shared.min(sequences[like].tokens.len() - 1), ..next }
            } else {
                next
            };
        }
        num_copied += copies.len();
        let mut numbers: Vec<usize> = (0..NUM_SEQUENCES).collect();
        numbers.shuffle(&mut rng);
        numbers.truncate(rng.random_range(1..=NUM_SEQUENCES));
        let mut num_free = rng.random_range(numbers.len()..=9) - numbers.len();
        let num_rows: Vec<usize> = numbers
            .iter()
            .map(|&number| {
                let num_more = num_free.min(sequences[number].tokens.len() - sequences[number].num_done - 1);
                num_free -= num_more;
                1 + num_more
            })
            .collect();
        let parts = numbers.iter().zip(&num_rows).map(|(&number, &rows)| (&sequences[number], rows)).collect();
        let plan = Plan { parts, copies, wants_logits: rng.random_bool(0.8) };
        let expected = run(&mut eager, &plan, FILLERS);
        assert!(run(&mut recorded, &plan, 0) == expected, "step {step}: {num_rows:?} rows");
        for (number, rows) in numbers.into_iter().zip(num_rows) {
            sequences[number].num_done += rows;
        }
    }
    assert_eq!(num_graphs(&eager), 0);
    let num_replayed = num_steps as usize - num_graphs(&recorded);
    assert!(num_replayed > 30 && num_copied > 3, "{num_replayed} steps replayed, {num_copied} copies");
}

#[test]
fn a_replayed_step_does_the_launches_of_the_recorded_one() {
    let tiny = TinyFile::new();
    let adapters = [tiny.lora(8, 8), tiny.lora(4, 4)];
    let mut decoder = tiny.load(64, NUM_SEQUENCES);
    let _leases = place_all(&mut decoder, &adapters);
    let sequence = |i: usize, adapter: Option<&Arc<Adapter>>| Sequence::new(&tiny.spec, adapter.cloned(), i, i as u64);
    let [first, second, base] = [sequence(0, Some(&adapters[0])), sequence(1, Some(&adapters[1])), sequence(2, None)];
    let copies = vec![BlockCopy { from: BlockId(20), to: BlockId(21) }];
    let mut launches = |parts: Vec<(&Sequence, usize)>, copies: Vec<BlockCopy>| {
        let before = decoder.device().driver().num_launches();
        run(&mut decoder, &Plan { parts, copies, wants_logits: true }, 0);
        (decoder.device().driver().num_launches() - before, num_graphs(&decoder))
    };
    let (recorded, num_graphs) = launches(vec![(&first, 4), (&base, 3)], Vec::new());
    assert_eq!(num_graphs, 1);
    assert_eq!(launches(vec![(&base, 1), (&second, 2), (&first, 5)], Vec::new()), (recorded, 1));
    assert_eq!(launches(vec![(&second, 5)], Vec::new()), (recorded, 1));
    // Blocks are copied beside what is recorded.
    assert_eq!(launches(vec![(&second, 8)], copies), (recorded + 1, 1));
    let (of_base, num_graphs) = launches(vec![(&base, 8)], Vec::new());
    assert!(of_base < recorded && num_graphs == 2, "{of_base} launches without adapters, {recorded} with");
}

#[test]
fn what_grows_is_recorded_anew_and_stays_right() {
    let tiny = TinyFile::new();
    let adapters = [tiny.lora(8, 8), tiny.lora(100, 100)];
    let (mut recorded, mut eager) = (tiny.load(64, 2), tiny.load(128, NUM_SEQUENCES + 1));
    let _leases = (place_all(&mut recorded, &adapters), place_all(&mut eager, &adapters));
    let sequence = |i: usize, adapter: Option<&Arc<Adapter>>| Sequence::new(&tiny.spec, adapter.cloned(), i, i as u64);
    let [small, large] = [sequence(0, Some(&adapters[0])), sequence(1, Some(&adapters[1]))];
    let bases: Vec<_> = (2..6).map(|i| sequence(i, None)).collect();
    let mut check = |parts: Vec<(&Sequence, usize)>, num_fillers: usize, what: &str| {
        let plan = Plan { parts, copies: Vec::new(), wants_logits: true };
        let expected = run(&mut eager, &plan, FILLERS);
        assert!(run(&mut recorded, &plan, num_fillers) == expected, "{what}");
        num_graphs(&recorded)
    };
    let mut check_small = |what: &str| check(vec![(&small, 3)], 0, what);
    assert_eq!((check_small("first"), check_small("again")), (1, 1));
    assert_eq!(check(vec![(&large, 3)], 0, "a greater rank"), 2);
    assert_eq!(check(vec![(&small, 2), (&large, 2)], 0, "both ranks"), 2);
    assert_eq!(check(vec![(&small, 3)], FILLERS, "more rows"), 2);
    assert_eq!(check(vec![(&small, 3)], 0, "after more rows"), 3);
    let many = bases.iter().map(|base| (base, 1)).collect();
    assert_eq!(check(many, 0, "more sequences"), 4);
    assert_eq!(check(vec![(&small, 3)], 0, "after more sequences"), 5);
    assert_eq!(check(vec![(&large, 3)], 0, "after all"), 5);
}

/// A model whose logits are counted when all of a row are asked for, and that may hide what else is known of them.
struct Hiding {
    inner: Decoder<Cuda<Emulator>>,
    hides: bool,
    num_rows_read: Arc<AtomicUsize>,
}

struct HidingLogits<'a> {
    inner: &'a mut dyn Logits,
    hides: bool,
    num_rows_read: &'a AtomicUsize,
}

impl Logits for HidingLogits<'_> {
    fn all(&mut self) -> Result<&mut [f32], DeviceError> {
        self.num_rows_read.fetch_add(1, Ordering::Relaxed);
        self.inner.all()
    }

    fn summary(&self) -> Option<Summary<'_>> {
        self.inner.summary().filter(|_| !self.hides)
    }
}

impl Model for Hiding {
    fn spec(&self) -> &ModelSpec {
        self.inner.spec()
    }

    fn num_kv_blocks(&self) -> usize {
        self.inner.num_kv_blocks()
    }

    fn place(&mut self, adapter: &Adapter) -> Result<Placement, DeviceError> {
        self.inner.place(adapter)
    }

    fn bring_adapters(&mut self) -> bool {
        self.inner.bring_adapters()
    }

    fn adapter_tier(&self) -> Option<AdapterTier> {
        self.inner.adapter_tier()
    }

    fn forward(&mut self, batch: &ForwardBatch<'_>, caller: &mut dyn Caller) -> Result<(), DeviceError> {
        let Self { inner, hides, num_rows_read } = self;
        inner.forward(batch, &mut HidingCaller { inner: caller, hides: *hides, num_rows_read })
    }
}

struct HidingCaller<'a> {
    inner: &'a mut dyn Caller,
    hides: bool,
    num_rows_read: &'a AtomicUsize,
}

impl Caller for HidingCaller<'_> {
    fn meanwhile(&mut self) {
        self.inner.meanwhile();
    }

    fn on_logits(&mut self, index: usize, logits: &mut dyn Logits) -> Result<(), DeviceError> {
        let Self { inner, hides, num_rows_read } = self;
        inner.on_logits(index, &mut HidingLogits { inner: logits, hides: *hides, num_rows_read })
    }
}

#[test]
fn a_summary_of_the_logits_draws_what_all_of_them_draw() {
    let tiny = TinyFile::new();
    let adapter = tiny.lora(8, 8);
    let params = |temperature, top_k, top_p| SamplingParams { temperature, top_k, top_p, ..SamplingParams::GREEDY };
    let kinds = [params(0.0, 0, 1.0), params(0.9, 1, 1.0), params(0.8, 40, 0.9), params(1.5, 63, 1.0)];
    let engines = [false, true].map(|hides| {
        let num_rows_read = Arc::new(AtomicUsize::new(0));
        let model = Hiding { inner: tiny.load(64, 8), hides, num_rows_read: num_rows_read.clone() };
        let config = EngineConfig {
            max_batch_rows: 64,
            max_sequences: 8,
            max_queued: 64,
            context_length: 64,
            max_draft_tokens: 0,
            max_inter_token: None,
        };
        (EngineHandle::start(Box::new(model), config, Arc::new(Metrics::new("base"))), num_rows_read)
    });
    let [summarized, all] = engines.each_ref().map(|(engine, _)| {
        let submit = |(seed, sampling): (usize, &SamplingParams)| {
            let (events, receiver) = mpsc::unbounded_channel();
            let request = Request {
                prompt_tokens: random_tokens(&tiny.spec, 8, seed as u64),
                num_pinned_tokens: 0,
                adapter: Some(adapter.clone()).filter(|_| seed % 3 == 0),
                account: Account::default(),
                sampling: SamplingParams { seed: seed as u64, ..sampling.clone() },
                max_tokens: 12,
                stop_tokens: Arc::from([]),
                top_logprobs: Some(seed % 6),
                grammar: None,
                prediction: None,
                prompt_output: PromptOutput::Nothing,
                deadline: None,
                events,
                permit: engine.try_permit().unwrap(),
            };
            engine.submit(request).unwrap();
            receiver
        };
        let receivers: Vec<_> = (0..16).zip(kinds.iter().cycle()).map(submit).collect();
        let read = |mut receiver| {
            let events = std::iter::from_fn(|| next_event(&mut receiver));
            let tokens = events.filter_map(|event| match event {
                Event::Token { id, logprob } => Some((id, logprob.unwrap())),
                Event::Started { .. } | Event::Finished(_) => None,
                event => panic!("{event:?}"),
            });
            tokens.collect::<Vec<_>>()
        };
        receivers.into_iter().flat_map(read).collect::<Vec<_>>()
    });
    assert_eq!((summarized.len(), all.len()), (16 * 12, 16 * 12));
    for (place, ((token, found), (expected_token, expected))) in summarized.into_iter().zip(all).enumerate() {
        assert_eq!((token, found.top.len()), (expected_token, expected.top.len()), "token {place}");
        let pairs = found.top.iter().zip(&expected.top);
        assert!(pairs.clone().all(|(found, expected)| found.0 == expected.0), "token {place}");
        let differences = pairs.map(|(found, expected)| found.1 - expected.1);
        let most = differences.chain([found.logprob - expected.logprob]).map(f32::abs).fold(0.0, f32::max);
        assert!(most <= 1e-5, "token {place}: {most}");
    }
    let num_rows_read = engines.map(|(_, num_rows_read)| num_rows_read.load(Ordering::Relaxed));
    assert_eq!(num_rows_read, [0, 16 * 12], "rows of logits that were copied");
}
