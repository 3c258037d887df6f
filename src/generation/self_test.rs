//! What a newly loaded adapter does to the base: the change of the logits after a fixed prompt, measured in the engine.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::sleep;

use super::Generation;
use crate::adapter::canonical::Adapter;
use crate::adapter::registry::SelfTest;
use crate::engine::EngineHandle;
use crate::engine::fairness::Account;
use crate::engine::request::{Event, PromptOutput, Request, SamplingParams};
use crate::tokenizer::Specials;

/// So few tokens that their rows hardly slow the step they share with running sequences.
const PROMPT: &str = "def main():";
/// How long a test waits for the engine to have nothing else to do.
const MAX_WAIT: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(20);

#[derive(Debug, thiserror::Error)]
enum SelfTestError {
    #[error("the prompt of the test has no tokens")]
    NoPrompt,
    #[error("the engine has stopped")]
    EngineStopped,
    #[error("the engine failed: {0}")]
    Failed(String),
}

/// Tests every generation that is loaded for the first time, one after the other, for as long as it is polled. Where requests
/// have a single place, none is tested.
pub async fn run(generation: &Generation) {
    let Generation { base, adapters, engine, .. } = generation;
    let prompt = base.tokenizer.encode(PROMPT, Specials::AsText).unwrap_or_default();
    let mut base_logits = None;
    loop {
        // A test that waits must not keep its adapter in memory.
        let adapter = Arc::downgrade(&adapters.next_untested().await);
        wait_for_quiet(engine).await;
        let place = place(engine).await;
        let Some(adapter) = adapter.upgrade() else { continue };
        match test(&adapter, engine, place, &prompt, &mut base_logits).await {
            Ok(result) => adapters.report_self_test(&adapter.name, &adapter.generation, result),
            Err(error) => tracing::warn!("adapter {} could not be tested: {error}", adapter.name),
        }
    }
}

async fn wait_for_quiet(engine: &EngineHandle) {
    let started = Instant::now();
    let is_busy = || engine.state().running + engine.state().waiting > 0;
    while is_busy() && started.elapsed() < MAX_WAIT {
        sleep(POLL).await;
    }
}

/// A place in the queue that is not the last one: a test must not be why a request is refused. `None` when the engine has
/// stopped.
async fn place(engine: &EngineHandle) -> Option<Arc<OwnedSemaphorePermit>> {
    while engine.is_alive() {
        if engine.num_free_places() > 1
            && let Ok(permit) = engine.try_permit()
        {
            return Some(permit);
        }
        sleep(POLL).await;
    }
    None
}

async fn test(
    adapter: &Arc<Adapter>,
    engine: &EngineHandle,
    place: Option<Arc<OwnedSemaphorePermit>>,
    prompt: &[u32],
    base_logits: &mut Option<Vec<f32>>,
) -> Result<SelfTest, SelfTestError> {
    let place = place.ok_or(SelfTestError::EngineStopped)?;
    if base_logits.is_none() {
        *base_logits = Some(logits(engine, place.clone(), prompt, None).await?);
    }
    let adapted = logits(engine, place, prompt, Some(adapter.clone())).await?;
    Ok(compare(base_logits.as_deref().unwrap_or_default(), &adapted))
}

/// The logits after the last token of `prompt`.
async fn logits(
    engine: &EngineHandle,
    permit: Arc<OwnedSemaphorePermit>,
    prompt: &[u32],
    adapter: Option<Arc<Adapter>>,
) -> Result<Vec<f32>, SelfTestError> {
    if prompt.is_empty() {
        return Err(SelfTestError::NoPrompt);
    }
    let (events, mut receiver) = mpsc::unbounded_channel();
    let request = Request {
        prompt_tokens: prompt.to_vec(),
        num_pinned_tokens: 0,
        adapter,
        account: Account::default(),
        sampling: SamplingParams::GREEDY,
        max_tokens: 0,
        stop_tokens: Arc::from([]),
        top_logprobs: None,
        grammar: None,
        prediction: None,
        prompt_output: PromptOutput::Logits,
        deadline: None,
        events,
        permit,
    };
    engine.submit(request).map_err(|_| SelfTestError::EngineStopped)?;
    while let Some(event) = receiver.recv().await {
        match event {
            Event::PromptLogits(logits) => return Ok(logits),
            Event::Failed(cause) => return Err(SelfTestError::Failed(cause)),
            Event::Stopped => return Err(SelfTestError::EngineStopped),
            _ => {}
        }
    }
    Err(SelfTestError::EngineStopped)
}

/// A change that is no number is kept as one.
fn compare(base: &[f32], adapted: &[f32]) -> SelfTest {
    let changes = || base.iter().zip(adapted).map(|(base, adapted)| (base - adapted).abs());
    SelfTest {
        max_logit_change: changes().max_by(f32::total_cmp).unwrap_or(0.0),
        mean_logit_change: changes().sum::<f32>() / base.len().max(1) as f32,
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use kernels::device::{Caller, DeviceError};

    use super::*;
    use crate::engine::EngineConfig;
    use crate::metrics::Metrics;
    use crate::model::random::Shape;
    use crate::model::spec::ModelSpec;
    use crate::model::{ForwardBatch, Model};

    /// Is asked for nothing.
    struct Idle(ModelSpec);

    impl Model for Idle {
        fn spec(&self) -> &ModelSpec {
            &self.0
        }

        fn num_kv_blocks(&self) -> usize {
            1
        }

        fn forward(&mut self, _: &ForwardBatch<'_>, _: &mut dyn Caller) -> Result<(), DeviceError> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_test_leaves_the_last_place_to_requests() {
        let config = EngineConfig {
            max_batch_rows: 1,
            max_sequences: 1,
            max_queued: 2,
            context_length: 16,
            max_draft_tokens: 0,
            max_inter_token: None,
        };
        let model = Idle("0.5b".parse::<Shape>().unwrap().spec);
        let engine = EngineHandle::start(Box::new(model), config, Arc::new(Metrics::default()));
        let taken = engine.try_permit().unwrap();
        assert!(place(&engine).now_or_never().is_none());
        drop(taken);
        let place = place(&engine).now_or_never().unwrap();
        assert!(place.is_some() && engine.num_free_places() == 1);
    }

    #[test]
    fn the_largest_and_the_mean_change_are_of_either_sign() {
        let result = compare(&[0.0, 1.0, 2.0, 3.0], &[0.0, 2.0, 0.0, 3.0]);
        assert_eq!((result.max_logit_change, result.mean_logit_change), (2.0, 0.75));
    }

    #[test]
    fn a_logit_that_is_no_number_shows() {
        let result = compare(&[0.0, 1.0], &[f32::NAN, 1.0]);
        assert!(result.max_logit_change.is_nan() && result.mean_logit_change.is_nan());
    }
}
