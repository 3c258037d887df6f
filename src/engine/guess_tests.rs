//! Guesses change no event, whatever decides on the tokens: grammars, penalties, biases, seeds, stop tokens, predictions.

use std::sync::Arc;

use kernels::device::{Caller, DeviceError, HostLogits};
use prometheus::IntCounter;
use serde_json::json;
use tokio::sync::mpsc;

use super::fairness::Account;
use super::prediction::Prediction;
use super::request::{Event, PromptOutput, Request, SamplingParams};
use super::{EngineConfig, EngineHandle};
use crate::grammar::{Constraint, GrammarCompiler};
use crate::metrics::Metrics;
use crate::model::spec::{Architecture, Features, ModelSpec};
use crate::model::{ForwardBatch, Model};
use crate::tokenizer::Tokenizer;

const STOP: u32 = 258;
const VOCAB_SIZE: usize = 259;
const MAX_TOKENS: usize = 90;

/// Knows the last token alone, so that outputs repeat themselves.
struct Forgetful(ModelSpec);

impl Model for Forgetful {
    fn spec(&self) -> &ModelSpec {
        &self.0
    }

    fn num_kv_blocks(&self) -> usize {
        256
    }

    fn forward(&mut self, batch: &ForwardBatch<'_>, caller: &mut dyn Caller) -> Result<(), DeviceError> {
        caller.meanwhile();
        for (index, &row) in batch.logits_rows.iter().enumerate() {
            let last = u64::from(batch.tokens[row]);
            let logit = |id: u64| ((last * 1_000_003 + id).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f32;
            let mut logits: Vec<f32> = (0..VOCAB_SIZE as u64).map(|id| logit(id) / (1 << 21) as f32).collect();
            caller.on_logits(index, &mut HostLogits(&mut logits))?;
        }
        Ok(())
    }
}

fn start(max_draft_tokens: usize) -> (EngineHandle, Arc<Metrics>) {
    let spec = ModelSpec {
        architecture: Architecture::Llama,
        hidden_size: 32,
        intermediate_size: 32,
        num_layers: 1,
        num_heads: 1,
        num_kv_heads: 1,
        head_dim: 32,
        vocab_size: VOCAB_SIZE,
        rope_theta: 1e4,
        norm_eps: 1e-5,
        context_length: 256,
        features: Features::PLAIN,
    };
    let config = EngineConfig {
        max_batch_rows: 256,
        max_sequences: 64,
        max_queued: 256,
        context_length: 256,
        max_draft_tokens,
        max_inter_token: None,
    };
    let metrics = Arc::new(Metrics::new("base"));
    (EngineHandle::start(Box::new(Forgetful(spec)), config, metrics.clone()), metrics)
}

struct Ask {
    constraint: Option<Constraint>,
    sampling: SamplingParams,
    stop_tokens: Vec<u32>,
    prediction: &'static str,
}

impl Ask {
    fn request(&self, handle: &EngineHandle, grammars: &GrammarCompiler) -> (Request, mpsc::UnboundedReceiver<Event>) {
        let (events, receiver) = mpsc::unbounded_channel();
        let expected: Vec<u32> = self.prediction.bytes().map(u32::from).collect();
        let request = Request {
            prompt_tokens: b"abcd".map(u32::from).to_vec(),
            num_pinned_tokens: 0,
            adapter: None,
            account: Account::default(),
            sampling: self.sampling.clone(),
            grammar: self.constraint.as_ref().map(|constraint| grammars.compile(constraint).expect("it has outputs")),
            prediction: (!expected.is_empty()).then(|| Prediction::new(expected)),
            max_tokens: MAX_TOKENS,
            stop_tokens: self.stop_tokens.clone().into(),
            top_logprobs: Some(2),
            prompt_output: PromptOutput::Nothing,
            deadline: None,
            events,
            permit: handle.try_permit().expect("the queue has room"),
        };
        (request, receiver)
    }
}

/// Every event but `Started`, whose content depends on the clock and the cache.
fn collect(mut receiver: mpsc::UnboundedReceiver<Event>) -> Vec<Event> {
    let all = std::iter::from_fn(|| receiver.blocking_recv());
    all.filter(|event| !matches!(event, Event::Started { .. })).collect()
}

fn asks() -> Vec<Ask> {
    let greedy = SamplingParams::GREEDY;
    let drawn = SamplingParams { temperature: 0.6, seed: 7, ..greedy.clone() };
    let samplings = [
        greedy.clone(),
        SamplingParams { repetition_penalty: 1.2, presence_penalty: 0.3, frequency_penalty: 0.4, ..greedy.clone() },
        SamplingParams { logit_bias: vec![(97, 3.0), (98, -2.0), (STOP, 1.5)], ..greedy },
        SamplingParams { top_k: 3, ..drawn.clone() },
        SamplingParams { top_p: 0.8, min_p: 0.1, frequency_penalty: -0.5, ..drawn },
    ];
    let items = json!({"type": "array", "items": {"enum": ["ab", "abc", 1]}, "minItems": 5, "maxItems": 9});
    let constraints = [
        (None, ""),
        (Some(Constraint::Regex("(abc|abd){3,20}".to_owned())), "abcabcabdabdabcabcabc"),
        (Some(Constraint::JsonSchema(items)), r#"["abc","abc","abc","abc","abc"]"#),
        (Some(Constraint::Gbnf("root ::= \"(\" root? \")\" | \"aé\" root | \"a\"".to_owned())), "aéaéaéaé((((a))))"),
        (Some(Constraint::Choice(vec!["abababababababab".to_owned(), "abababababababac".to_owned()])), ""),
    ];
    let mut asks = Vec::new();
    for (constraint, prediction) in constraints {
        for sampling in &samplings {
            for (prediction, stop_tokens) in [("", vec![STOP]), (prediction, vec![STOP, 99]), (prediction, vec![])] {
                let (constraint, sampling) = (constraint.clone(), sampling.clone());
                asks.push(Ask { constraint, sampling, stop_tokens, prediction });
            }
        }
    }
    asks
}

#[test]
fn an_output_is_the_same_with_and_without_guesses_alone_and_beside_others() {
    let counter = IntCounter::new("compiled", "Compiled.").unwrap();
    let grammars = GrammarCompiler::new(Arc::new(Tokenizer::tiny(&["<|end|>"])), counter);
    let (plain, _) = start(0);
    let asks = asks();
    let expected: Vec<_> = asks
        .iter()
        .map(|ask| {
            let (request, receiver) = ask.request(&plain, &grammars);
            plain.submit(request).unwrap();
            collect(receiver)
        })
        .collect();
    let all_end = expected.iter().all(|events| matches!(events.last(), Some(Event::Finished(_))));
    assert!(all_end, "{:?}", expected.iter().map(|events| events.last()).collect::<Vec<_>>());

    let (guessing, metrics) = start(63);
    for (ask, expected) in asks.iter().zip(&expected) {
        // The second time, past replies have all of it.
        for _ in 0..2 {
            let (request, receiver) = ask.request(&guessing, &grammars);
            guessing.submit(request).unwrap();
            assert_eq!(&collect(receiver), expected, "{:?} {:?}", ask.constraint, ask.sampling);
        }
    }
    let num_accepted = metrics.vllm.accepted_tokens_total.get();
    assert!(num_accepted > 1000, "{num_accepted}");

    // So few that there are rows for guesses.
    for (asks, expected) in asks.chunks(6).zip(expected.chunks(6)) {
        let (requests, receivers): (Vec<_>, Vec<_>) = asks.iter().map(|ask| ask.request(&guessing, &grammars)).unzip();
        guessing.submit_together(requests).unwrap();
        for ((ask, expected), receiver) in asks.iter().zip(expected).zip(receivers) {
            assert_eq!(&collect(receiver), expected, "{:?} {:?}", ask.constraint, ask.sampling);
        }
    }
    assert!(metrics.vllm.accepted_tokens_total.get() > num_accepted);
}
