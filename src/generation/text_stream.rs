//! One sequence seen from outside: engine events in, text out.

mod indented_block;

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures::{Stream, StreamExt};
use tokio::sync::{mpsc, watch};

use self::indented_block::IndentedBlock;
use super::GenerationError;
use super::deadline::{Alarm, Deadline};
use super::recorder::{Recorder, ReplyFailure, Timing};
use super::report::RequestReport;
use crate::engine::prediction::Prediction;
use crate::engine::request::{Event, FinishReason, TokenLogprob};
use crate::rate_limit::RateLimit;
use crate::tokenizer::Tokenizer;
use crate::tokenizer::detokenize::{Detokenizer, StopOutcome, StopStrings};

/// The text of one sequence as it comes. Dropping it cancels the sequence.
#[derive(Debug)]
pub struct TextStream {
    events: mpsc::UnboundedReceiver<Event>,
    assembler: TextAssembler,
    recorder: Recorder,
    time_limit: Option<Duration>,
    alarm: Option<Alarm>,
    ready: VecDeque<Result<TextEvent, GenerationError>>,
    ended: bool,
    score: Option<f32>,
    /// Whose output it is.
    charged_to: Option<Arc<RateLimit>>,
    prediction: Option<Prediction>,
    /// While any stream lives, the server has not drained.
    _in_flight: watch::Receiver<()>,
}

#[derive(Debug, Clone, PartialEq)]
pub enum TextEvent {
    /// Never without text, except where token records are wanted and their text came to nothing.
    Delta(TextDelta),
    /// The last event.
    Finished {
        reason: FinishReason,
        /// The stop string that ended it, of the request or of its adapter.
        stop: Option<String>,
        usage: SequenceUsage,
        timing: Timing,
        score: Option<f32>,
    },
}

#[derive(Debug, Clone, Default, PartialEq)]
pub struct TextDelta {
    pub text: String,
    /// The tokens that begin in `text`; empty unless log-probabilities were asked for.
    pub tokens: Vec<TokenRecord>,
}

/// A token of the prompt (with `echo`) or of the output.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenRecord {
    pub id: u32,
    /// Where its text begins, in characters of the whole text (the echoed prompt included).
    pub text_offset: usize,
    /// `None` for the first token of a prompt, which nothing predicts.
    pub logprob: Option<TokenLogprob>,
}

/// Counts in tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SequenceUsage {
    pub num_prompt_tokens: usize,
    /// Prompt tokens whose KV was found in the prefix cache.
    pub num_cached_tokens: usize,
    pub num_output_tokens: usize,
    /// Where the client sent a prediction.
    pub prediction: Option<PredictionUsage>,
}

/// What came of a prediction, in tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PredictionUsage {
    /// Those that the output has.
    pub num_accepted: usize,
    /// The others.
    pub num_rejected: usize,
}

/// A whole sequence: what its [`TextStream`] said until it finished.
#[derive(Debug, Clone, PartialEq)]
pub struct Completed {
    pub text: String,
    pub tokens: Vec<TokenRecord>,
    pub reason: FinishReason,
    /// The stop string that ended it, of the request or of its adapter.
    pub stop: Option<String>,
    pub usage: SequenceUsage,
    pub timing: Timing,
    /// Only of beam search.
    pub score: Option<f32>,
}

/// What a [`TextStream`] must know of its sequence.
pub(super) struct TextStreamOptions {
    pub tokenizer: Arc<Tokenizer>,
    pub num_prompt_tokens: usize,
    pub stop: Vec<String>,
    /// Whether deltas carry token records.
    pub logprobs: bool,
    /// Whether the stop token has one, too.
    pub records_stop_token: bool,
    /// Special tokens that are text here.
    pub shown_tokens: Vec<u32>,
    /// What the output begins with, the model having read it as the end of its prompt.
    pub output_prefix: String,
    /// As [`GenerationOptions`](super::GenerationOptions) has them.
    pub min_indent: usize,
    pub time_limit: Option<Duration>,
    pub echo: Option<Echo>,
}

/// The prompt, to be repeated before the output.
#[derive(Debug)]
pub(super) struct Echo {
    pub prompt_tokens: Vec<u32>,
    /// How many of them the server put in front; they have no text.
    pub num_added_tokens: usize,
}

impl TextStream {
    pub(super) fn new(
        events: mpsc::UnboundedReceiver<Event>,
        options: TextStreamOptions,
        recorder: Recorder,
        in_flight: watch::Receiver<()>,
    ) -> Self {
        let time_limit = options.time_limit;
        let assembler = TextAssembler::new(options);
        Self {
            events,
            assembler,
            recorder,
            time_limit,
            alarm: None,
            ready: VecDeque::new(),
            ended: false,
            score: None,
            charged_to: None,
            prediction: None,
            _in_flight: in_flight,
        }
    }

    /// Says in the usage how much of it the output has.
    #[must_use]
    pub(super) fn with_prediction(mut self, prediction: Option<Prediction>) -> Self {
        self.prediction = prediction;
        self
    }

    /// Ends it at `deadline` with what there is.
    #[must_use]
    pub(super) fn with_deadline(self, deadline: Option<Deadline>) -> Self {
        Self { alarm: deadline.map(Alarm::new), ..self }
    }

    /// Its failure is that of `reply`, and the other way round.
    pub(super) fn part_of(&mut self, reply: &ReplyFailure) {
        self.recorder.part_of(reply);
    }

    /// From now on, `limit` pays for each token of the output.
    pub(super) fn charge_to(&mut self, limit: &Arc<RateLimit>) {
        self.charged_to = Some(limit.clone());
    }

    /// Its end is said in `report`; of the choices of a prompt, the first has that prompt.
    pub(super) fn report_to(&mut self, report: &Arc<RequestReport>, is_first_choice: bool) {
        self.recorder.report_to(report, is_first_choice);
    }

    /// What is known so far.
    pub fn usage(&self) -> SequenceUsage {
        let prediction = self.prediction.as_ref().map(|prediction| PredictionUsage {
            num_accepted: prediction.num_accepted(),
            num_rejected: prediction.num_rejected(),
        });
        SequenceUsage { prediction, ..self.assembler.usage }
    }

    /// Waits for the first event, which is still to be had.
    ///
    /// # Errors
    /// It was one, and the last.
    pub async fn begun(&mut self) -> Result<(), GenerationError> {
        poll_fn(|cx| self.poll_ready(cx)).await;
        match self.ready.pop_front_if(|event| event.is_err()) {
            Some(Err(error)) => Err(error),
            _ => Ok(()),
        }
    }

    /// Ready when there is an event to take, or none will come.
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while self.ready.is_empty() && !self.ended {
            match self.events.poll_recv(cx) {
                Poll::Ready(Some(event)) => self.on_event(event),
                Poll::Ready(None) => self.fail(GenerationError::EngineStopped),
                // What was drawn in time is given.
                Poll::Pending => {
                    let Some(alarm) = &mut self.alarm else { return Poll::Pending };
                    ready!(alarm.poll(cx));
                    self.on_deadline();
                }
            }
        }
        Poll::Ready(())
    }

    /// Waits for the end of the sequence.
    pub async fn collect(mut self) -> Result<Completed, GenerationError> {
        let (mut text, mut tokens) = (String::new(), Vec::new());
        while let Some(event) = self.next().await {
            match event? {
                TextEvent::Delta(delta) => {
                    text.push_str(&delta.text);
                    tokens.extend(delta.tokens);
                }
                TextEvent::Finished { reason, stop, usage, timing, score } => {
                    return Ok(Completed { text, tokens, reason, stop, usage, timing, score });
                }
            }
        }
        Err(GenerationError::EngineStopped)
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Started { queue, cached_tokens } => {
                let usage = &mut self.assembler.usage;
                usage.num_cached_tokens = cached_tokens;
                self.recorder.start(queue, usage.num_prompt_tokens, cached_tokens);
            }
            // Only asked for by those who read the events themselves.
            Event::PromptLogits(_) => {}
            Event::PromptToken(logprob) => self.assembler.prompt_logprobs.push(logprob),
            Event::Token { id, logprob } => {
                self.recorder.token();
                if let Some(alarm) = &self.alarm {
                    alarm.deadline.note_output();
                }
                if let Some(prediction) = &mut self.prediction {
                    prediction.follow(id);
                }
                if let Some(limit) = &self.charged_to {
                    limit.spend(1, Instant::now());
                }
                let (delta, stopped) = self.assembler.token(id, logprob);
                self.push_delta(delta);
                if stopped {
                    self.finish(FinishReason::Stop);
                } else if self.is_out_of_time() {
                    self.release_rest(FinishReason::Length);
                }
            }
            Event::StopToken { id, logprob } => self.assembler.stop_token(id, logprob),
            Event::Score(score) => self.score = Some(score),
            Event::Finished(reason) => self.release_rest(reason),
            Event::OutOfTime => self.on_deadline(),
            Event::Failed(cause) => self.fail(GenerationError::Failed(cause)),
            Event::Stopped => self.fail(GenerationError::EngineStopped),
        }
    }

    /// Half a line is of no use, whatever it took.
    fn is_out_of_time(&self) -> bool {
        let limit = self.time_limit.filter(|_| self.assembler.has_line);
        limit.zip(self.recorder.since_first_token()).is_some_and(|(limit, elapsed)| elapsed > limit)
    }

    /// The deadline has passed. One of several sequences that has nothing yet is cut like the others; where none has, that is an error.
    fn on_deadline(&mut self) {
        match self.alarm.as_ref().map(|alarm| &alarm.deadline).filter(|deadline| !deadline.has_output()) {
            Some(deadline) => self.fail(deadline.exceeded()),
            None => self.release_rest(FinishReason::Length),
        }
    }

    /// Finishes with what is held back, for `reason` unless a stop is in it.
    fn release_rest(&mut self, reason: FinishReason) {
        let (delta, stopped) = self.assembler.end();
        self.push_delta(delta);
        self.finish(if stopped { FinishReason::Stop } else { reason });
    }

    fn push_delta(&mut self, delta: TextDelta) {
        if delta != TextDelta::default() {
            self.ready.push_back(Ok(TextEvent::Delta(delta)));
        }
    }

    fn finish(&mut self, reason: FinishReason) {
        self.recorder.finish(match reason {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        });
        let finished = TextEvent::Finished {
            reason,
            stop: self.assembler.found_stop.take(),
            usage: self.usage(),
            timing: self.recorder.timing(),
            score: self.score,
        };
        self.ready.push_back(Ok(finished));
        self.end();
    }

    pub(super) fn fail(&mut self, error: GenerationError) {
        self.recorder.finish("error");
        self.ready.push_back(Err(error));
        self.end();
    }

    /// Closing the channel tells the engine at once, however long the client takes to read the rest.
    fn end(&mut self) {
        self.ended = true;
        self.events.close();
    }
}

impl Stream for TextStream {
    type Item = Result<TextEvent, GenerationError>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        ready!(this.poll_ready(cx));
        Poll::Ready(this.ready.pop_front())
    }
}

/// Turns tokens into text: holds back half characters and what may become a stop string, and keeps the token records in
/// step with the text that was let go.
#[derive(Debug)]
struct TextAssembler {
    tokenizer: Arc<Tokenizer>,
    detokenizer: Detokenizer,
    stops: StopStrings,
    found_stop: Option<String>,
    block: Option<IndentedBlock>,
    /// Whether the model has ended a line.
    has_line: bool,
    logprobs: bool,
    records_stop_token: bool,
    stop_token: Option<(u32, TokenLogprob)>,
    output_prefix: String,
    echo: Option<Echo>,
    prompt_logprobs: Vec<Option<TokenLogprob>>,
    /// Records whose text is still held back.
    held: VecDeque<TokenRecord>,
    /// Characters detokenized, and of these the characters let go.
    num_chars_seen: usize,
    num_chars_released: usize,
    usage: SequenceUsage,
}

impl TextAssembler {
    fn new(options: TextStreamOptions) -> Self {
        Self {
            detokenizer: Detokenizer::new(options.tokenizer.clone()).showing(options.shown_tokens),
            tokenizer: options.tokenizer,
            stops: StopStrings::new(options.stop),
            found_stop: None,
            block: (options.min_indent > 0).then(|| IndentedBlock::new(options.min_indent)),
            has_line: false,
            logprobs: options.logprobs,
            records_stop_token: options.records_stop_token,
            stop_token: None,
            output_prefix: options.output_prefix,
            echo: options.echo,
            prompt_logprobs: Vec::new(),
            held: VecDeque::new(),
            num_chars_seen: 0,
            num_chars_released: 0,
            usage: SequenceUsage { num_prompt_tokens: options.num_prompt_tokens, ..SequenceUsage::default() },
        }
    }

    /// The text that `id` sets free, and whether a stop string ended the sequence.
    fn token(&mut self, id: u32, logprob: Option<TokenLogprob>) -> (TextDelta, bool) {
        let mut delta = self.take_beginning();
        self.usage.num_output_tokens += 1;
        if self.logprobs {
            self.held.push_back(TokenRecord { id, text_offset: self.num_chars_seen, logprob });
        }
        let text = self.detokenizer.push(id);
        let stopped = self.push_text(&text, &mut delta);
        (delta, stopped)
    }

    /// The token that ended the sequence. It has no text; its record is the last.
    fn stop_token(&mut self, id: u32, logprob: TokenLogprob) {
        self.stop_token = (self.logprobs && self.records_stop_token).then_some((id, logprob));
    }

    /// Everything still held back, and whether a stop string was in it.
    fn end(&mut self) -> (TextDelta, bool) {
        let mut delta = self.take_beginning();
        let text = self.detokenizer.finish();
        let mut stopped = self.push_text(&text, &mut delta);
        if !stopped {
            let rest = self.stops.finish();
            stopped = self.release(&rest, &mut delta);
        }
        if !stopped {
            self.release_block(&mut delta);
            delta.tokens.extend(self.held.drain(..));
            let text_offset = self.num_chars_seen;
            let stop_token = self.stop_token.take();
            delta.tokens.extend(stop_token.map(|(id, logprob)| TokenRecord {
                id,
                text_offset,
                logprob: Some(logprob),
            }));
        }
        (delta, stopped)
    }

    fn push_text(&mut self, text: &str, delta: &mut TextDelta) -> bool {
        self.num_chars_seen += text.chars().count();
        self.has_line |= text.contains('\n');
        let (released, stop) = match self.stops.push(text) {
            StopOutcome::Continue(text) => (text, None),
            StopOutcome::Stopped { text, stop } => (text, Some(stop)),
        };
        // A block that has ended did so before the stop string.
        let is_out = self.release(&released, delta);
        if !is_out && stop.is_some() {
            self.release_block(delta);
            self.found_stop = stop;
        }
        is_out || self.found_stop.is_some()
    }

    /// Whether the text ends the output, which is then cut.
    fn release(&mut self, text: &str, delta: &mut TextDelta) -> bool {
        match &mut self.block {
            None => {
                self.let_go(text, delta);
                false
            }
            Some(block) => {
                let (inside, has_ended) = block.push(text);
                self.let_go(&inside, delta);
                has_ended
            }
        }
    }

    /// What the block has held back, the output having ended in it.
    fn release_block(&mut self, delta: &mut TextDelta) {
        let rest = self.block.as_mut().map(IndentedBlock::finish).unwrap_or_default();
        self.let_go(&rest, delta);
    }

    fn let_go(&mut self, text: &str, delta: &mut TextDelta) {
        self.num_chars_released += text.chars().count();
        delta.text.push_str(text);
        while let Some(record) = self.held.pop_front_if(|record| record.text_offset < self.num_chars_released) {
            delta.tokens.push(record);
        }
    }

    /// What comes before the model's own text, once.
    fn take_beginning(&mut self) -> TextDelta {
        let mut delta = self.take_echo();
        let output_prefix = std::mem::take(&mut self.output_prefix);
        let num_chars = output_prefix.chars().count();
        self.num_chars_seen += num_chars;
        self.num_chars_released += num_chars;
        delta.text.push_str(&output_prefix);
        delta
    }

    /// The prompt, once: by the first output event all its log-probabilities have come.
    fn take_echo(&mut self) -> TextDelta {
        let mut delta = TextDelta::default();
        let Some(echo) = self.echo.take() else { return delta };
        let mut detokenizer = Detokenizer::with_special_tokens(self.tokenizer.clone());
        let mut logprobs = std::mem::take(&mut self.prompt_logprobs).into_iter();
        let mut num_chars = 0;
        for (index, &id) in echo.prompt_tokens.iter().enumerate() {
            if self.logprobs {
                let logprob = logprobs.next().flatten();
                delta.tokens.push(TokenRecord { id, text_offset: num_chars, logprob });
            }
            if index >= echo.num_added_tokens {
                let text = detokenizer.push(id);
                num_chars += text.chars().count();
                delta.text.push_str(&text);
            }
        }
        let rest = detokenizer.finish();
        num_chars += rest.chars().count();
        delta.text.push_str(&rest);
        self.num_chars_seen = num_chars;
        self.num_chars_released = num_chars;
        delta
    }
}

#[cfg(test)]
mod tests;
