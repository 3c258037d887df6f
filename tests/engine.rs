//! The engine over a fake model: what its clients are told, and what it gives back.

mod events;
mod hash_model;

use std::sync::{Arc, Mutex, mpsc as channel};
use std::thread;
use std::time::{Duration, Instant};

use events::next_event;
use hash_model::{BROKEN, HashModel, NAN, PANIC, Stepwise};
use lorry::adapter::canonical::{Adapter, AdapterWeights, Prelude};
use lorry::engine::fairness::Account;
use lorry::engine::prediction::Prediction;
use lorry::engine::request::{Event, FinishReason, PromptOutput, Request, SamplingParams};
use lorry::engine::{EngineConfig, EngineHandle, EngineState, EngineStopped, Overloaded};
use lorry::metrics::Metrics;
use tokio::sync::mpsc::{self, UnboundedReceiver};

fn start_stepwise(config: EngineConfig, num_steps: usize) -> (EngineHandle, channel::Sender<()>) {
    let (step, go_on) = channel::channel();
    let model = Stepwise { inner: HashModel::new(Arc::default(), 64), go_on, steps_left: num_steps };
    (EngineHandle::start(Box::new(model), config, Arc::new(Metrics::new("base"))), step)
}

const CONFIG: EngineConfig = EngineConfig {
    max_batch_rows: 256,
    max_sequences: 16,
    max_queued: 64,
    context_length: 1024,
    max_draft_tokens: 0,
    max_inter_token: None,
};

fn start(max_batch_rows: usize, num_blocks: usize, metrics: &Arc<Metrics>) -> EngineHandle {
    start_gated(max_batch_rows, num_blocks, metrics, Arc::default())
}

fn start_gated(max_batch_rows: usize, num_blocks: usize, metrics: &Arc<Metrics>, gate: Arc<Mutex<()>>) -> EngineHandle {
    start_with(EngineConfig { max_batch_rows, ..CONFIG }, num_blocks, metrics, gate)
}

fn start_with(config: EngineConfig, num_blocks: usize, metrics: &Arc<Metrics>, gate: Arc<Mutex<()>>) -> EngineHandle {
    EngineHandle::start(Box::new(HashModel::new(gate, num_blocks)), config, metrics.clone())
}

fn start_roomy() -> EngineHandle {
    start(256, 64, &Arc::new(Metrics::new("base")))
}

fn adapter(name: &str) -> Arc<Adapter> {
    Arc::new(Adapter { name: name.to_owned(), generation: name.to_owned(), ..Adapter::default() })
}

#[derive(Clone)]
struct Ask {
    prompt_tokens: Vec<u32>,
    adapter: Option<Arc<Adapter>>,
    temperature: f32,
    seed: u64,
    max_tokens: usize,
    stop_tokens: Vec<u32>,
    top_logprobs: Option<usize>,
    prompt_logprobs: bool,
    logit_bias: Vec<(u32, f32)>,
    prediction: Option<Prediction>,
    deadline: Option<Instant>,
}

impl Ask {
    fn new(prompt_tokens: Vec<u32>, max_tokens: usize) -> Self {
        Self {
            prompt_tokens,
            adapter: None,
            temperature: 0.0,
            seed: 0,
            max_tokens,
            stop_tokens: Vec::new(),
            top_logprobs: None,
            prompt_logprobs: false,
            logit_bias: Vec::new(),
            prediction: None,
            deadline: None,
        }
    }

    fn submit(&self, handle: &EngineHandle) -> UnboundedReceiver<Event> {
        self.try_submit(handle).expect("the engine runs")
    }

    fn try_submit(&self, handle: &EngineHandle) -> Result<UnboundedReceiver<Event>, EngineStopped> {
        let (events, receiver) = mpsc::unbounded_channel();
        handle.submit(Request {
            prompt_tokens: self.prompt_tokens.clone(),
            num_pinned_tokens: 0,
            adapter: self.adapter.clone(),
            account: Account::default(),
            sampling: SamplingParams {
                temperature: self.temperature,
                top_k: 0,
                top_p: 0.95,
                min_p: 0.0,
                repetition_penalty: 1.1,
                presence_penalty: 0.0,
                frequency_penalty: 0.0,
                logit_bias: self.logit_bias.clone(),
                seed: self.seed,
            },
            max_tokens: self.max_tokens,
            stop_tokens: self.stop_tokens.clone().into(),
            top_logprobs: self.top_logprobs,
            grammar: None,
            prediction: self.prediction.clone(),
            prompt_output: if self.prompt_logprobs { PromptOutput::Logprobs } else { PromptOutput::Nothing },
            deadline: self.deadline,
            events,
            permit: handle.try_permit().expect("the queue has room"),
        })?;
        Ok(receiver)
    }
}

/// Every event but `Started`, whose content depends on the clock and the cache.
fn collect(mut receiver: UnboundedReceiver<Event>) -> Vec<Event> {
    let mut events = Vec::new();
    while let Some(event) = next_event(&mut receiver) {
        if !matches!(event, Event::Started { .. }) {
            events.push(event);
        }
    }
    events
}

fn output_tokens(events: &[Event]) -> Vec<u32> {
    let tokens = events.iter().filter_map(|event| match event {
        Event::Token { id, .. } => Some(*id),
        _ => None,
    });
    tokens.collect()
}

/// Cancelling has no reply to wait for.
fn wait_until_empty(handle: &EngineHandle) {
    for _ in 0..2000 {
        if handle.state() == EngineState::default() {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("resources are still held: {:?}", handle.state());
}

/// Requests of every kind: base and two adapters, short and long, greedy and drawn, plain and scored.
fn mixed_asks() -> Vec<Ask> {
    let adapters = [None, Some(adapter("a")), Some(adapter("b"))];
    (0..24u64)
        .map(|index| {
            let num_prompt_tokens = [3, 20, 48, 90][index as usize % 4];
            // Few distinct prompts, so that requests meet each other's prefixes.
            let prompt = (0..num_prompt_tokens).map(|position| (position * 7 + index as u32 % 2) % 60).collect();
            Ask {
                adapter: adapters[index as usize % 3].clone(),
                temperature: if index % 2 == 0 { 0.0 } else { 0.8 },
                seed: index,
                stop_tokens: if index % 5 == 0 { vec![11, 12] } else { Vec::new() },
                top_logprobs: (index % 4 == 1).then_some(3),
                prompt_logprobs: index % 8 == 5,
                ..Ask::new(prompt, 40)
            }
        })
        .collect()
}

#[test]
fn guessing_ahead_changes_no_event_and_returns_everything() {
    let asks: Vec<Ask> = mixed_asks()
        .into_iter()
        // So few likely tokens that the output repeats itself.
        .map(|ask| Ask { logit_bias: vec![(5, 40.0), (11, 38.0), (13, 40.0)], max_tokens: 60, ..ask })
        .collect();
    let expected: Vec<Vec<Event>> = asks.iter().map(|ask| collect(ask.submit(&start_roomy()))).collect();

    for (max_batch_rows, num_blocks, max_draft_tokens) in [(256, 256, 9), (256, 256, 63), (20, 20, 63)] {
        let metrics = Arc::new(Metrics::new("base"));
        let config = EngineConfig { max_batch_rows, max_draft_tokens, max_sequences: 4, ..CONFIG };
        let handle = start_with(config, num_blocks, &metrics, Arc::default());
        let receivers: Vec<_> = asks.iter().map(|ask| ask.submit(&handle)).collect();
        for (index, receiver) in receivers.into_iter().enumerate() {
            assert_eq!(collect(receiver), expected[index], "request {index} in {max_batch_rows} rows");
        }
        assert_eq!(handle.state(), EngineState::default());
        let (accepted, guessed) = (metrics.vllm.accepted_tokens_total.get(), metrics.vllm.draft_tokens_total.get());
        assert!(accepted > 100, "{accepted}");
        assert!(guessed > accepted, "some guesses are wrong");
    }
}

#[test]
fn guesses_from_past_replies_come_true_where_the_same_is_asked_again_and_change_no_event() {
    let metrics = Arc::new(Metrics::new("base"));
    let handle = start_with(EngineConfig { max_draft_tokens: 63, ..CONFIG }, 64, &metrics, Arc::default());
    let ask = Ask { temperature: 0.8, ..Ask::new(vec![1, 2, 3, 4], 60) };
    let expected = collect(ask.submit(&start_roomy()));
    let num_accepted = [(); 2].map(|()| {
        assert_eq!(collect(ask.submit(&handle)), expected);
        metrics.vllm.accepted_tokens_total.get()
    });
    assert!(num_accepted[0] < 10 && num_accepted[1] > 40, "{num_accepted:?}");
}

#[test]
fn a_prediction_right_or_wrong_changes_no_event() {
    let asks = mixed_asks();
    let expected: Vec<Vec<Event>> = asks.iter().map(|ask| collect(ask.submit(&start_roomy()))).collect();
    let guess = |is_right: bool| {
        let metrics = Arc::new(Metrics::new("base"));
        let config = EngineConfig { max_draft_tokens: 63, max_sequences: 4, ..CONFIG };
        let handle = start_with(config, 64, &metrics, Arc::default());
        let submit = |(ask, events): (&Ask, &Vec<Event>)| {
            let mut tokens = output_tokens(events);
            // One token is another, and the rest is found again.
            tokens.iter_mut().skip(9).step_by(if is_right { 60 } else { 2 }).for_each(|token| *token = 60 - *token);
            let prediction = Some(Prediction::new(tokens));
            Ask { prediction, ..ask.clone() }.submit(&handle)
        };
        let receivers: Vec<_> = asks.iter().zip(&expected).map(submit).collect();
        for (index, receiver) in receivers.into_iter().enumerate() {
            assert_eq!(collect(receiver), expected[index], "request {index}, right: {is_right}");
        }
        // Gone in the middle of its guesses, it leaves nothing behind.
        let expected_of_first = Some(Prediction::new(output_tokens(&expected[0])));
        drop(Ask { prediction: expected_of_first, ..asks[0].clone() }.submit(&handle));
        wait_until_empty(&handle);
        (metrics.vllm.accepted_tokens_total.get(), metrics.vllm.draft_tokens_total.get())
    };
    let (right, wrong) = (guess(true), guess(false));
    assert!(right.0 > wrong.0 && right.0 > 200, "{right:?} {wrong:?}");
    assert!(wrong.1 > wrong.0, "some guesses are wrong");
}

#[test]
fn a_prelude_takes_positions_and_no_prompt_tokens() {
    let rows = vec![0.0; 5 * 32];
    let prelude = Some(Prelude::Embeddings { num_tokens: 5, rows });
    let weights = Arc::new(AdapterWeights { prelude, ..AdapterWeights::default() });
    let adapter = Adapter { generation: "with prelude".to_owned(), weights, ..Adapter::default() };
    let handle = start_roomy();
    let ask = Ask { adapter: Some(Arc::new(adapter)), ..Ask::new((0..30).collect(), 4) };
    for cached in [0, 29] {
        let mut receiver = ask.submit(&handle);
        let Some(Event::Started { cached_tokens, .. }) = next_event(&mut receiver) else { panic!("it starts") };
        // All but the last of thirty tokens; the five positions before them no client has sent.
        assert_eq!(cached_tokens, cached);
        assert_eq!(output_tokens(&collect(receiver)).len(), 4);
    }
    let scored = collect(Ask { prompt_logprobs: true, top_logprobs: Some(0), ..ask.clone() }.submit(&handle));
    let num_scored = scored.iter().filter(|event| matches!(event, Event::PromptToken(_))).count();
    assert_eq!((num_scored, &scored[0]), (30, &Event::PromptToken(None)));
    let too_long = Ask { prompt_tokens: vec![1; 1020], ..ask };
    assert!(matches!(collect(too_long.submit(&handle))[..], [Event::Failed(_)]));
}

#[test]
fn a_sequence_among_many_equals_the_sequence_alone_and_everything_returns() {
    let asks = mixed_asks();
    let alone: Vec<Vec<Event>> = asks.iter().map(|ask| collect(ask.submit(&start_roomy()))).collect();

    let metrics = Arc::new(Metrics::new("base"));
    // So few blocks and rows that sequences are chunked, wait and are preempted.
    let handle = start(20, 14, &metrics);
    for _ in 0..3 {
        let mut kept = Vec::new();
        let mut cancelled = Vec::new();
        for (index, ask) in asks.iter().enumerate() {
            kept.push(ask.submit(&handle));
            if index % 3 == 0 {
                cancelled.push(Ask { max_tokens: 100, ..ask.clone() }.submit(&handle));
            }
        }
        // Half leave while they wait, half in the middle of their output.
        for (index, mut receiver) in cancelled.into_iter().enumerate() {
            while index % 2 == 1 && !matches!(next_event(&mut receiver), Some(Event::Token { .. }) | None) {}
        }
        for (index, receiver) in kept.into_iter().enumerate() {
            assert_eq!(collect(receiver), alone[index], "request {index}");
        }
        wait_until_empty(&handle);
    }
    assert!(metrics.vllm.num_preemptions_total.get() > 0, "the pool was meant to be too small");
    assert!(metrics.vllm.prefix_cache_hits_total.get() > 0, "prefixes were meant to be reused");
    assert!(asks.iter().flat_map(|ask| &ask.adapter).all(|adapter| Arc::strong_count(adapter) == 8));
    let permits: Vec<_> = (0..64).map(|_| handle.try_permit()).collect();
    assert!(permits.iter().all(Result::is_ok));
    assert!(matches!(handle.try_permit(), Err(Overloaded { max_queued: 64 })));
}

#[test]
fn an_adapter_changes_the_output_of_its_own_requests_alone() {
    let handle = start_roomy();
    let base = Ask::new((0..40).collect(), 20);
    let adapted = Ask { adapter: Some(adapter("a")), ..base.clone() };
    let receivers = [&base, &adapted, &base].map(|ask| ask.submit(&handle));
    let [first, second, third] = receivers.map(|receiver| output_tokens(&collect(receiver)));
    assert_eq!(first, third);
    assert_ne!(first, second);
}

#[test]
fn who_sees_the_last_event_sees_the_resources_returned() {
    let handle = start_roomy();
    let mut receiver = Ask::new(vec![1; 50], 5).submit(&handle);
    while let Some(event) = next_event(&mut receiver) {
        if matches!(event, Event::Finished(_)) {
            assert_eq!(handle.state(), EngineState::default());
        }
    }
}

#[test]
fn what_came_of_a_step_is_told_while_the_next_one_runs_and_at_once_if_there_is_none() {
    let (handle, step) = start_stepwise(CONFIG, 4);
    let mut long = Ask::new(vec![1; 20], 3).submit(&handle);
    assert!(matches!(next_event(&mut long), Some(Event::Started { .. })), "its first step is held");
    let mut short = Ask::new(vec![2; 50], 1).submit(&handle);
    step.send(()).unwrap();
    assert!(matches!(next_event(&mut long), Some(Event::Token { .. })), "the second step is held");
    assert!(matches!(next_event(&mut short), Some(Event::Started { .. })));
    step.send(()).unwrap();
    assert!(matches!(next_event(&mut long), Some(Event::Token { .. })), "the third step is held");
    assert!(matches!(next_event(&mut short), Some(Event::Token { .. })));
    assert_eq!(next_event(&mut short), Some(Event::Finished(FinishReason::Length)));
    assert_eq!(handle.state(), EngineState { running: 1, waiting: 0, kv_blocks_used: 2 }, "the short one's are back");
    step.send(()).unwrap();
    assert!(matches!(next_event(&mut long), Some(Event::Token { .. })));
    assert_eq!(next_event(&mut long), Some(Event::Finished(FinishReason::Length)));
    assert_eq!(handle.state(), EngineState::default());
}

#[test]
fn whoever_leaves_holds_nothing_in_the_next_step_be_it_decoding_prefilling_or_queued() {
    const DECODING: usize = 0;
    for leaving in 0..3 {
        let config = EngineConfig { max_batch_rows: 32, max_sequences: 2, ..CONFIG };
        let (handle, step) = start_stepwise(config, 1000);
        // One more that stays: what it is told says that a step has begun.
        let mut staying = Ask::new(vec![4; 5], 100).submit(&handle);
        let mut asks = vec![Some(Ask::new(vec![1; 5], 100).submit(&handle))];
        let go_on = |staying: &mut UnboundedReceiver<Event>| {
            step.send(()).unwrap();
            while !matches!(next_event(staying), Some(Event::Token { .. })) {}
        };
        go_on(&mut staying);
        go_on(&mut staying);
        if leaving != DECODING {
            asks[DECODING] = None;
            // A slot for a prompt of many steps, none for the one behind it.
            asks.extend([2, 3].map(|token| Some(Ask::new(vec![token; 500], 100).submit(&handle))));
            go_on(&mut staying);
            go_on(&mut staying);
            assert_eq!((handle.state().running, handle.state().waiting), (2, 1));
        }
        let before = (handle.state(), handle.num_free_places());
        asks[leaving] = None;
        // The step under way ends, and the next one is without it.
        go_on(&mut staying);
        let after = handle.state();
        assert_eq!(handle.num_free_places(), before.1 + 1, "{leaving}");
        assert_eq!(after.running + after.waiting, before.0.running + before.0.waiting - 1, "{leaving}");
        if leaving == DECODING {
            assert_eq!(after.kv_blocks_used, 1, "of the one that stays");
        }
        drop((staying, asks));
        step.send(()).unwrap();
        wait_until_empty(&handle);
        assert_eq!(handle.num_free_places(), CONFIG.max_queued);
    }
}

#[test]
fn tokens_are_told_though_the_next_step_fails_at_once() {
    let alone = output_tokens(&collect(Ask::new(vec![1; 20], 10).submit(&start_roomy())));
    let (handle, step) = start_stepwise(CONFIG, 3);
    let receiver = Ask::new(vec![1; 20], 10).submit(&handle);
    (0..3).for_each(|_| step.send(()).unwrap());
    let events = collect(receiver);
    assert_eq!(output_tokens(&events), alone[..3]);
    assert!(matches!(events.last(), Some(Event::Failed(reason)) if reason.contains("a worn layer")), "{events:?}");
    assert_eq!(handle.state(), EngineState::default());
}

/// Of a request that is sent and waited for.
fn cached_tokens(ask: &Ask, handle: &EngineHandle) -> usize {
    let mut receiver = ask.submit(handle);
    let Some(Event::Started { cached_tokens, .. }) = next_event(&mut receiver) else { panic!("it starts") };
    collect(receiver);
    cached_tokens
}

#[test]
fn a_repeated_prompt_reports_its_cached_tokens() {
    let handle = start_roomy();
    let ask = Ask::new((0..40).collect(), 1);
    assert_eq!([cached_tokens(&ask, &handle), cached_tokens(&ask, &handle)], [0, 39]);
}

#[test]
fn the_next_turn_of_a_conversation_computes_what_is_new_in_it() {
    let handle = start_roomy();
    let prompt: Vec<u32> = (0..40).collect();
    let ask = Ask { temperature: 0.8, ..Ask::new(prompt.clone(), 30) };
    let reply = output_tokens(&collect(ask.submit(&handle)));
    let next = Ask::new([prompt, reply, vec![7; 5]].concat(), 1);
    assert_eq!(cached_tokens(&next, &handle), 69, "the reply's last token was drawn and not computed");
}

#[test]
fn a_prompt_sent_several_times_at_once_is_computed_once_though_the_first_is_cancelled() {
    let ask = Ask::new((0..100).map(|position| position % 60).collect(), 5);
    let alone = collect(ask.submit(&start_roomy()));
    for (is_cancelled, num_cached) in [(false, 99 + 99), (true, 32 + 99)] {
        let metrics = Arc::new(Metrics::new("base"));
        let gate = Arc::new(Mutex::new(()));
        let closed = gate.lock().expect("nobody panicked with it");
        let handle = start_gated(32, 64, &metrics, gate.clone());
        let mut first = ask.submit(&handle);
        assert!(matches!(next_event(&mut first), Some(Event::Started { .. })), "its first step is held");
        let others = [(); 2].map(|()| ask.submit(&handle));
        let first = (!is_cancelled).then_some(first);
        drop(closed);
        for receiver in first.into_iter().chain(others) {
            assert_eq!(collect(receiver), alone);
        }
        assert_eq!(metrics.vllm.prefix_cache_hits_total.get(), num_cached);
        assert_eq!(handle.state(), EngineState::default());
    }
}

#[test]
fn a_stop_token_ends_the_output_without_being_part_of_it() {
    let handle = start_roomy();
    let free = output_tokens(&collect(Ask::new(vec![1, 2, 3], 10).submit(&handle)));
    let stop = free[4];
    let expected = free.iter().position(|&token| token == stop).expect("it is there");
    let events = collect(Ask { stop_tokens: vec![stop], ..Ask::new(vec![1, 2, 3], 10) }.submit(&handle));
    assert_eq!(output_tokens(&events), free[..expected]);
    assert_eq!(events.last(), Some(&Event::Finished(FinishReason::Stop)));
}

#[test]
fn no_output_tokens_means_the_prompt_is_scored_and_nothing_more() {
    let handle = start_roomy();
    let ask = Ask { prompt_logprobs: true, top_logprobs: Some(2), ..Ask::new(vec![1, 2, 3], 0) };
    let events = collect(ask.submit(&handle));
    let [
        Event::PromptToken(None),
        Event::PromptToken(Some(second)),
        Event::PromptToken(Some(_)),
        Event::Finished(reason),
    ] = events.as_slice()
    else {
        panic!("{events:?}");
    };
    assert!(second.logprob < 0.0 && second.top.len() == 2);
    assert_eq!(*reason, FinishReason::Length);
    assert_eq!(collect(Ask::new(vec![1], 0).submit(&handle)), [Event::Finished(FinishReason::Length)]);
}

#[test]
fn the_context_ends_the_output() {
    let handle = start(256, 3, &Arc::new(Metrics::new("base")));
    assert_eq!(handle.context_length(), 48);
    let events = collect(Ask::new(vec![1; 40], 100).submit(&handle));
    assert_eq!(output_tokens(&events).len(), 8);
    assert_eq!(events.last(), Some(&Event::Finished(FinishReason::Length)));
}

#[test]
fn a_request_the_model_cannot_run_fails_alone() {
    let handle = start_roomy();
    let good = Ask::new(vec![1, 2, 3], 30).submit(&handle);
    let cases = [
        (vec![], "no tokens"),
        (vec![1; 1025], "1025 positions"),
        (vec![64], "token 64"),
        (vec![1, NAN], "not a number"),
    ];
    for (prompt_tokens, expected) in cases {
        let events = collect(Ask::new(prompt_tokens, 5).submit(&handle));
        assert!(matches!(events.as_slice(), [Event::Failed(reason)] if reason.contains(expected)), "{events:?}");
    }
    assert_eq!(output_tokens(&collect(good)).len(), 30);
    assert_eq!(handle.state(), EngineState::default());
}

#[test]
fn what_is_late_ends_alone_though_nobody_reads_it() {
    let handle = start_roomy();
    let good = Ask::new(vec![1, 2, 3], 30).submit(&handle);
    let late = Ask { deadline: Some(Instant::now()), ..Ask::new(vec![1], 900) };
    assert_eq!(collect(late.submit(&handle)), [Event::OutOfTime]);
    assert_eq!(output_tokens(&collect(good)).len(), 30);

    let gate = Arc::new(Mutex::new(()));
    let closed = gate.lock().expect("nobody panicked with it");
    let handle = start_gated(256, 64, &Arc::new(Metrics::new("base")), gate.clone());
    let deadline = Instant::now() + Duration::from_millis(20);
    let unread = Ask { deadline: Some(deadline), ..Ask::new(vec![1], 900) }.submit(&handle);
    thread::sleep(deadline.saturating_duration_since(Instant::now()));
    drop(closed);
    let events = collect(unread);
    assert_eq!(events.last(), Some(&Event::OutOfTime));
    assert!(events.len() <= 2, "with what the step under way drew: {events:?}");
    assert_eq!(handle.state(), EngineState::default());
}

#[test]
fn a_failing_step_fails_every_request_and_stops_the_engine() {
    for (token, expected) in [(PANIC, "a bad token"), (BROKEN, "a broken layer")] {
        let gate = Arc::new(Mutex::new(()));
        let closed = gate.lock().expect("nobody panicked with it");
        let handle = start_gated(256, 64, &Arc::new(Metrics::new("base")), gate.clone());
        let bystander = Ask::new(vec![1], 900).submit(&handle);
        let culprit = Ask::new(vec![1, token], 5).submit(&handle);
        drop(closed);
        for receiver in [bystander, culprit] {
            let events = collect(receiver);
            assert!(matches!(events.last(), Some(Event::Failed(reason)) if reason.contains(expected)), "{events:?}");
        }
        assert!(!handle.is_alive());
        assert_eq!(handle.state(), EngineState::default());
        assert_eq!(Ask::new(vec![1], 5).try_submit(&handle).err(), Some(EngineStopped));
    }
}

#[test]
fn a_failing_step_is_not_held_against_what_has_not_begun() {
    let gate = Arc::new(Mutex::new(()));
    let closed = gate.lock().expect("nobody panicked with it");
    let config = EngineConfig { max_sequences: 1, ..CONFIG };
    let handle = start_with(config, 64, &Arc::new(Metrics::new("base")), gate.clone());
    let culprit = Ask::new(vec![1, PANIC], 5).submit(&handle);
    let waiting = Ask::new(vec![1], 5).submit(&handle);
    drop(closed);
    assert!(matches!(collect(culprit).last(), Some(Event::Failed(_))));
    assert_eq!(collect(waiting), [Event::Stopped]);
}

#[test]
fn stopping_fails_what_is_running_and_refuses_what_comes() {
    let gate = Arc::new(Mutex::new(()));
    let closed = gate.lock().expect("nobody panicked with it");
    let handle = start_gated(256, 64, &Arc::new(Metrics::new("base")), gate.clone());
    let receivers: Vec<_> = (0..20).map(|_| Ask::new(vec![1], 900).submit(&handle)).collect();
    handle.stop();
    drop(closed);
    for receiver in receivers {
        assert_eq!(collect(receiver).last(), Some(&Event::Stopped));
    }
    assert!(!handle.is_alive());
    assert_eq!(handle.state(), EngineState::default());
    assert!(Ask::new(vec![1], 5).try_submit(&handle).is_err());
}
