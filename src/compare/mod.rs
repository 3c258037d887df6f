//! Several arms on one prompt, side by side in one batch. An arm is the plain request it stands for: nothing here
//! touches what it computes.

mod agreement;

use std::collections::VecDeque;
use std::sync::Arc;

use futures::StreamExt;
use futures::stream::{BoxStream, SelectAll, select_all};

use crate::engine::request::FinishReason;
use crate::generation::{
    Generated, Generation, GenerationError, Prepared, ReplyFailure, RequestReport, ResolvedModel, SequenceUsage,
    TextEvent, Timing,
};
use crate::icl::Chosen;
use crate::rate_limit::RateLimit;
use agreement::agreement;

/// Arms under way, by their place in the request. Dropping it cancels them all.
pub struct Comparison {
    arms: Vec<Option<Arm>>,
    events: SelectAll<BoxStream<'static, (usize, Result<TextEvent, GenerationError>)>>,
    /// Events to be told before the next one is waited for.
    ready: VecDeque<(usize, ArmEvent)>,
}

/// What was promised to an arm, and what it has said so far.
#[derive(Debug)]
pub struct Arm {
    pub model: ResolvedModel,
    pub icl: Option<Chosen>,
    pub seed: i64,
    text: String,
    tokens: Vec<u32>,
    logprob: f64,
    state: ArmState,
}

#[derive(Debug)]
enum ArmState {
    Running,
    /// Not told yet, for want of the first arm's output.
    Finished(FinishReason, SequenceUsage, Timing),
    Told,
}

#[derive(Debug)]
pub enum ArmEvent {
    /// Never empty.
    Delta(String),
    Finished(ArmResult),
    Failed(GenerationError),
}

#[derive(Debug)]
pub struct ArmResult {
    pub text: String,
    pub reason: FinishReason,
    pub usage: SequenceUsage,
    pub timing: Timing,
    /// Of the whole output: the sum over its tokens.
    pub logprob: f64,
    /// With the first arm's output, from 0 to 1; `None` when that has none.
    pub agreement: Option<f64>,
}

impl Comparison {
    /// Starts every arm that could be prepared, `None` for the others. Each has one prompt, one choice and
    /// log-probabilities. With `fails_whole`, one that fails ends the others. `charged_to` pays for their tokens, and what came
    /// of each is said in `report`.
    ///
    /// # Errors
    /// The engine has stopped.
    pub fn start(
        generation: &Generation,
        arms: Vec<Option<Prepared>>,
        fails_whole: bool,
        charged_to: Option<&Arc<RateLimit>>,
        report: &Arc<RequestReport>,
    ) -> Result<Self, GenerationError> {
        let is_there: Vec<bool> = arms.iter().map(Option::is_some).collect();
        let mut generated = generation.launch_together(arms.into_iter().flatten().collect())?;
        if fails_whole {
            let reply = ReplyFailure::default();
            generated.iter_mut().for_each(|arm| arm.part_of(&reply));
        }
        if let Some(limit) = charged_to {
            generated.iter_mut().for_each(|arm| arm.charge_to(limit));
        }
        generated.iter_mut().for_each(|arm| arm.report_to(report));
        let mut generated = generated.into_iter();
        let mut streams = Vec::new();
        let mut start = |index: usize, Generated { model, icl, seed, sequences, .. }: Generated| {
            streams.extend(sequences.into_iter().map(|sequence| sequence.map(move |event| (index, event)).boxed()));
            Arm { model, icl, seed, text: String::new(), tokens: Vec::new(), logprob: 0.0, state: ArmState::Running }
        };
        let arms = is_there.into_iter().enumerate();
        let arms = arms.map(|(index, is_there)| is_there.then(|| generated.next()).flatten().map(|g| start(index, g)));
        Ok(Self { arms: arms.collect(), events: select_all(streams), ready: VecDeque::new() })
    }

    /// `None` for an arm that did not start or has failed.
    pub fn arms(&self) -> impl Iterator<Item = Option<&Arm>> {
        self.arms.iter().map(Option::as_ref)
    }

    /// What the arm `.0` has to say next; `None` after the end of all. An arm ends with [`ArmEvent::Finished`], though
    /// not before the first arm has ended, or with [`ArmEvent::Failed`].
    pub async fn next(&mut self) -> Option<(usize, ArmEvent)> {
        while self.ready.is_empty() {
            let (index, event) = self.events.next().await?;
            self.on_event(index, event);
        }
        self.ready.pop_front()
    }

    fn on_event(&mut self, index: usize, event: Result<TextEvent, GenerationError>) {
        let Some(arm) = &mut self.arms[index] else { return };
        match event {
            Ok(TextEvent::Delta(delta)) => {
                arm.text.push_str(&delta.text);
                arm.tokens.extend(delta.tokens.iter().map(|token| token.id));
                let logprobs = delta.tokens.iter().filter_map(|token| token.logprob.as_ref());
                // One after the other, so that the sum does not depend on how the output was cut into deltas.
                arm.logprob = logprobs.fold(arm.logprob, |sum, token| sum + f64::from(token.logprob));
                if !delta.text.is_empty() {
                    self.ready.push_back((index, ArmEvent::Delta(delta.text)));
                }
            }
            Ok(TextEvent::Finished { reason, usage, timing, .. }) => {
                arm.state = ArmState::Finished(reason, usage, timing);
                self.tell_finished();
            }
            Err(error) => {
                self.arms[index] = None;
                self.ready.push_back((index, ArmEvent::Failed(error)));
                self.tell_finished();
            }
        }
    }

    /// Tells of the arms that have finished, once it is known what they are compared with.
    fn tell_finished(&mut self) {
        let first = self.arms.first().and_then(Option::as_ref);
        if first.is_some_and(|first| matches!(first.state, ArmState::Running)) {
            return;
        }
        let first = first.map(|first| (first.text.clone(), first.tokens.clone()));
        for (index, arm) in self.arms.iter_mut().enumerate() {
            let Some(arm) = arm else { continue };
            let ArmState::Finished(reason, usage, timing) = arm.state else { continue };
            arm.state = ArmState::Told;
            let agreement = first.as_ref().map(|(text, tokens)| {
                // The same text may come from other tokens.
                if *text == arm.text { 1.0 } else { agreement(tokens, &arm.tokens) }
            });
            let (text, logprob) = (arm.text.clone(), arm.logprob);
            let result = ArmResult { text, reason, usage, timing, logprob, agreement };
            self.ready.push_back((index, ArmEvent::Finished(result)));
        }
    }
}
