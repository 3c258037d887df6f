//! What the engine thread does: plan, forward and sample, emit.

use std::collections::{HashMap, HashSet, VecDeque};
use std::mem;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use kernels::attention::BLOCK_SIZE;
use kernels::device::{DeviceError, Lease, Placement};

use super::EngineConfig;
use super::client::{Client, Drawn, End};
use super::forward::{Sampled, UnderWay};
use super::outbox::Outbox;
use super::prefix_disk::{BlockFiles, PrefixDisk};
use super::request::{Event, FinishReason, Request};
use super::sampler::{Sampler, Scratch};
use super::scheduler::Scheduler;
use super::sequence::{Sequence, SequenceId};
use super::step_cost::StepCost;
use crate::adapter::canonical::Adapter;
use crate::metrics::Metrics;
use crate::model::{ForwardBatch, Model, SequenceRows};

/// Model and scheduler, and the clients of every sequence.
pub(super) struct Engine {
    model: Box<dyn Model>,
    context_length: usize,
    scheduler: Scheduler,
    /// Those of sequences that have ended too, until they are told.
    clients: HashMap<SequenceId, Client>,
    outbox: Outbox,
    /// Requests whose adapters are not on the device yet, oldest first.
    arriving: VecDeque<Arriving>,
    prefix_disk: Option<PrefixDisk>,
    next_id: u64,
    metrics: Arc<Metrics>,
    buffers: Buffers,
    step_cost: StepCost,
    max_inter_token: Option<Duration>,
}

/// A request that waits for its adapter.
struct Arriving {
    request: Request,
    accepted: Instant,
    /// Keeps the adapter from going again before the request has started.
    lease: Option<Lease>,
}

/// How long an engine with nothing but arriving requests waits before it looks again.
const ARRIVAL_POLL: Duration = Duration::from_micros(200);

/// Memory reused by every step.
#[derive(Default)]
struct Buffers {
    sequences: Vec<SequenceRows<'static>>,
    sampled: Vec<Sampled>,
    ended: Vec<SequenceId>,
    sampling: Scratch,
    raw_logits: Vec<f32>,
}

impl Engine {
    pub fn new(
        mut model: Box<dyn Model>,
        config: &EngineConfig,
        block_files: Option<BlockFiles>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let num_blocks = model.num_kv_blocks();
        let mut scheduler = Scheduler::new(config.max_batch_rows, config.max_sequences, num_blocks)
            .with_speculation(config.max_draft_tokens);
        let block_files = block_files.filter(|_| model.host_kv().is_some());
        if block_files.is_some() {
            scheduler = scheduler.with_saving();
        }
        metrics.vllm.set_capacity(BLOCK_SIZE, num_blocks, config.max_sequences.min(config.max_batch_rows));
        Self {
            model,
            context_length: config.context_length.min(num_blocks * BLOCK_SIZE),
            scheduler,
            clients: HashMap::new(),
            outbox: Outbox::default(),
            arriving: VecDeque::new(),
            prefix_disk: block_files.map(|files| PrefixDisk::new(files, config.max_batch_rows)),
            next_id: 0,
            metrics,
            buffers: Buffers::default(),
            step_cost: StepCost::default(),
            max_inter_token: config.max_inter_token,
        }
    }

    pub fn is_idle(&self) -> bool {
        self.clients.is_empty() && self.arriving.is_empty()
    }

    /// Whether blocks wait to be written though nothing is to be computed.
    pub fn has_unsaved(&self) -> bool {
        self.scheduler.has_unsaved()
    }

    /// Puts a request in the queue, or fails it when the model could not run it.
    pub fn enqueue(&mut self, request: Request, accepted: Instant) {
        // The next step begins later for it than those who wait for tokens should notice.
        self.deliver();
        match self.check(&request) {
            Err(reason) => end_unstarted(request, Event::Failed(reason)),
            Ok(()) if request.adapter.is_none() => self.start(request, accepted, Lease::default()),
            Ok(()) => {
                self.arriving.push_back(Arriving { request, accepted, lease: None });
                self.start_arrived();
            }
        }
    }

    /// Starts the requests whose adapters are on the device. While one finds no room there, none behind it starts, so that
    /// those who hold the room end.
    fn start_arrived(&mut self) {
        let (mut is_full, now) = (false, Instant::now());
        for _ in 0..self.arriving.len() {
            let Some(Arriving { request, accepted, lease }) = self.arriving.pop_front() else { return };
            let Some(adapter) = request.adapter.clone().filter(|_| !request.events.is_closed()) else { continue };
            if is_over(request.deadline, now) {
                end_unstarted(request, Event::OutOfTime);
                continue;
            }
            match if is_full { Ok(Placement::Full) } else { self.model.place(&adapter) } {
                Ok(Placement::Ready(lease)) => self.start(request, accepted, lease),
                Ok(Placement::Loading(lease)) => {
                    self.arriving.push_back(Arriving { request, accepted, lease: Some(lease) });
                }
                Ok(Placement::Full) => {
                    is_full = true;
                    self.arriving.push_back(Arriving { request, accepted, lease });
                }
                Err(error) => {
                    end_unstarted(request, Event::Failed(format!("adapter {:?}: {error}", adapter.name)));
                }
            }
        }
    }

    /// Hands a request that can run to the scheduler.
    fn start(&mut self, request: Request, accepted: Instant, lease: Lease) {
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        let client = Client {
            events: request.events,
            permit: request.permit,
            _lease: lease,
            accepted,
            deadline: request.deadline,
            is_started: false,
            sampler: Sampler::new(request.sampling, &request.prompt_tokens),
            grammar: request.grammar,
            stop_tokens: request.stop_tokens,
            top_logprobs: request.top_logprobs,
            prompt_output: request.prompt_output,
        };
        self.clients.insert(id, client);
        let Request { prompt_tokens, num_pinned_tokens, adapter, prediction, prompt_output, .. } = request;
        let max_tokens =
            request.max_tokens.min(self.context_length - num_positions(&prompt_tokens, adapter.as_deref()));
        let sequence = Sequence::new(id, &prompt_tokens, max_tokens, adapter, prompt_output);
        let sequence = sequence.with_pinned_prefix(num_pinned_tokens).with_prediction(prediction);
        let sequence = sequence.for_account(request.account);
        match &mut self.prefix_disk {
            Some(disk) => disk.enqueue(sequence, &mut self.scheduler),
            None => self.scheduler.enqueue(sequence),
        }
    }

    /// One pass of the model over the rows of this step. After an error the engine can only be aborted.
    pub fn step(&mut self) -> Result<(), DeviceError> {
        self.drop_cancelled();
        self.end_late();
        self.start_arrived();
        if let (Some(disk), Some(kv)) = (&mut self.prefix_disk, self.model.host_kv()) {
            disk.save(&mut self.scheduler, kv);
            disk.restore(&mut self.scheduler, kv);
        }
        let num_preempted = self.scheduler.num_preempted();
        self.scheduler.set_step_rows(self.step_cost.step_rows(self.max_inter_token));
        self.scheduler.schedule();
        self.metrics.vllm.num_preemptions_total.inc_by((self.scheduler.num_preempted() - num_preempted) as u64);
        self.metrics.vllm.draft_tokens_total.inc_by(self.scheduler.num_drafted() as u64);
        if let Some(tier) = self.model.adapter_tier() {
            self.metrics.set_device_adapters(&tier);
        }
        if self.scheduler.plan().sequences.is_empty() {
            publish(&self.metrics, &self.scheduler, self.num_arriving());
            self.deliver();
            // With a step, the model does it beside that.
            if !self.model.bring_adapters() && self.num_arriving() > 0 {
                thread::sleep(ARRIVAL_POLL);
            }
            return Ok(());
        }
        let (num_rows, num_logits_rows) = (self.scheduler.plan().tokens.len(), self.scheduler.plan().logits_rows.len());
        let begin = Instant::now();
        self.forward()?;
        self.step_cost.observe(num_rows, num_logits_rows, begin.elapsed());
        self.scheduler.commit();
        self.emit();
        self.end_scored();
        if self.scheduler.is_empty() {
            // No next step, during which they would be told.
            self.deliver();
        }
        Ok(())
    }

    /// Has what was computed written, for the next start. Not to be called after a failure.
    pub fn save_all(&mut self) {
        if let (Some(disk), Some(kv)) = (&mut self.prefix_disk, self.model.host_kv()) {
            disk.save_all(&mut self.scheduler, kv);
        }
    }

    /// Ends with `last` every sequence that has had a part in a step, the one under way included, and the others as no cause
    /// of it; no more steps can be made. Nothing of its bookkeeping is relied on.
    pub fn abort(&mut self, last: &Event) {
        let planned: HashSet<SequenceId> = self.scheduler.plan().sequences.iter().map(|planned| planned.id).collect();
        self.metrics.vllm.set_load(0, 0, 0.0);
        // What was drawn before is theirs.
        self.outbox.deliver(&mut self.clients);
        for (id, client) in self.clients.drain() {
            drop(client.permit);
            let had_a_part = client.is_started || planned.contains(&id);
            let _ = client.events.send(if had_a_part { last.clone() } else { Event::Stopped });
        }
        self.arriving.drain(..).for_each(|arriving| end_unstarted(arriving.request, Event::Stopped));
    }

    /// What cannot run is refused here, because a panic in the model would end every other sequence too.
    fn check(&self, request: &Request) -> Result<(), String> {
        let (num_tokens, vocab_size) = (request.prompt_tokens.len(), self.model.spec().vocab_size);
        if num_tokens == 0 {
            return Err("the prompt has no tokens".to_owned());
        }
        let num_positions = num_positions(&request.prompt_tokens, request.adapter.as_deref());
        if num_positions > self.context_length {
            return Err(format!(
                "the prompt takes {num_positions} positions, the context holds {}",
                self.context_length
            ));
        }
        match request.prompt_tokens.iter().find(|&&token| token as usize >= vocab_size) {
            Some(token) => Err(format!("prompt token {token} is not in the model's vocabulary of {vocab_size}")),
            None => Ok(()),
        }
    }

    /// Ends the sequences nobody listens to.
    fn drop_cancelled(&mut self) {
        self.end_where(
            |client| client.events.is_closed(),
            |engine, id| {
                engine.scheduler.remove(id);
                engine.clients.remove(&id);
            },
        );
    }

    /// Ends the sequences whose time is over. Who reads them may not see that: a client that has stalled reads nothing.
    fn end_late(&mut self) {
        let now = Instant::now();
        self.end_where(|client| is_over(client.deadline, now), |engine, id| engine.end(id, Event::OutOfTime));
    }

    /// Ends by `end` the sequences of these clients, those too that wait for what is read for them.
    fn end_where(&mut self, is_ended: impl Fn(&Client) -> bool, end: impl Fn(&mut Self, SequenceId)) {
        let mut ended = mem::take(&mut self.buffers.ended);
        ended.extend(self.clients.iter().filter(|(_, client)| is_ended(client)).map(|(id, _)| *id));
        for id in ended.drain(..) {
            if let Some(disk) = &mut self.prefix_disk {
                disk.remove(id);
            }
            end(self, id);
        }
        self.buffers.ended = ended;
    }

    /// Runs the planned rows. Clients are told meanwhile what came of the step before.
    fn forward(&mut self) -> Result<(), DeviceError> {
        let (num_arriving, has_disk) = (self.num_arriving(), self.prefix_disk.is_some());
        let Self { model, scheduler, clients, outbox, metrics, buffers, .. } = self;
        let Buffers { sequences, sampled, sampling, raw_logits, .. } = buffers;
        let plan = scheduler.plan();
        let mut rows = recycle(mem::take(sequences));
        rows.extend(plan.sequences.iter().map(|planned| SequenceRows {
            rows: planned.rows.clone(),
            first_position: planned.first_position,
            block_table: scheduler.sequence(planned).block_table(),
        }));
        let batch = ForwardBatch {
            copies: &plan.copies,
            tokens: &plan.tokens,
            sequences: &rows,
            groups: &plan.groups,
            logits_rows: &plan.logits_rows,
        };
        let mut under_way =
            UnderWay { scheduler, num_arriving, has_disk, clients, outbox, metrics, sampled, sampling, raw_logits };
        model.forward(&batch, &mut under_way)?;
        *sequences = recycle(rows);
        Ok(())
    }

    /// Adds the drawn tokens to their sequences and ends those that are complete. The clients are told later.
    fn emit(&mut self) {
        let mut sampled = mem::take(&mut self.buffers.sampled);
        for Sampled { id, is_after_guess, drawn } in sampled.drain(..) {
            if is_after_guess {
                self.scheduler.accept(id);
                self.metrics.vllm.accepted_tokens_total.inc();
            }
            let Some(sequence) = self.scheduler.get_mut(id) else { continue };
            match drawn {
                Err(error) => self.end(id, Event::Failed(error.to_string())),
                Ok(Drawn { token, logprob, ends: Some(End::StopToken) }) => {
                    if let Some(logprob) = logprob {
                        self.outbox.push(id, Event::StopToken { id: token, logprob });
                    }
                    self.end(id, Event::Finished(FinishReason::Stop));
                }
                Ok(Drawn { token, logprob, ends }) => {
                    sequence.push(token);
                    self.metrics.vllm.generation_tokens_total.inc();
                    self.outbox.push(id, Event::Token { id: token, logprob });
                    if ends == Some(End::Complete) {
                        self.end(id, Event::Finished(FinishReason::Stop));
                    } else if sequence.is_at_max_tokens() {
                        self.end(id, Event::Finished(FinishReason::Length));
                    }
                }
            }
        }
        self.buffers.sampled = sampled;
    }

    /// Ends the sequences that had nothing to generate and whose prompt is computed.
    fn end_scored(&mut self) {
        let mut scored = mem::take(&mut self.buffers.ended);
        scored.extend(self.scheduler.computed_without_output().map(Sequence::id));
        for id in scored.drain(..) {
            self.end(id, Event::Finished(FinishReason::Length));
        }
        self.buffers.ended = scored;
    }

    /// Ends a sequence.
    fn end(&mut self, id: SequenceId, event: Event) {
        self.scheduler.remove(id);
        self.outbox.push(id, event);
    }

    /// Requests that are accepted and not with the scheduler.
    fn num_arriving(&self) -> usize {
        self.arriving.len() + self.prefix_disk.as_ref().map_or(0, PrefixDisk::num_waiting)
    }

    /// Tells the clients all that there is to say.
    fn deliver(&mut self) {
        if !self.outbox.is_empty() {
            publish(&self.metrics, &self.scheduler, self.num_arriving());
            self.outbox.deliver(&mut self.clients);
        }
    }
}

/// Sets the gauges of what the engine holds.
pub(super) fn publish(metrics: &Metrics, scheduler: &Scheduler, num_arriving: usize) {
    metrics.vllm.set_load(scheduler.num_running(), scheduler.num_waiting() + num_arriving, scheduler.kv_usage());
}

fn is_over(deadline: Option<Instant>, now: Instant) -> bool {
    deadline.is_some_and(|deadline| deadline <= now)
}

/// Ends a request that has not started. A client that has gone needs no answer.
fn end_unstarted(request: Request, last: Event) {
    drop(request.permit);
    let _ = request.events.send(last);
}

/// Positions that a prompt takes with the prelude of its adapter.
fn num_positions(prompt_tokens: &[u32], adapter: Option<&Adapter>) -> usize {
    prompt_tokens.len() + adapter.map_or(0, Adapter::num_virtual_tokens)
}

/// The memory of a vector, for borrows of another lifetime.
fn recycle<'to>(mut rows: Vec<SequenceRows<'_>>) -> Vec<SequenceRows<'to>> {
    rows.clear();
    // Collecting in place keeps the allocation.
    rows.into_iter().map(|_| unreachable!("the vector is empty")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recycled_memory_keeps_its_place_and_capacity() {
        let rows: Vec<SequenceRows<'_>> = Vec::with_capacity(7);
        let before = (rows.as_ptr() as usize, rows.capacity());
        let rows = recycle(rows);
        assert_eq!((rows.as_ptr() as usize, rows.capacity()), before);
    }
}
