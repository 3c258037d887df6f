//! One engine without a model: the scheduler of the server, and a clock that a cost model moves on.

use std::time::Duration;

use lorry::engine::EngineConfig;
use lorry::engine::scheduler::Scheduler;
use lorry::engine::sequence::{LogitsUse, Sequence, SequenceId};
use lorry::engine::step_cost::StepCost;

use crate::cost::{Cost, Work};

pub struct Machine {
    scheduler: Scheduler,
    step_cost: StepCost,
    max_inter_token: Option<Duration>,
    /// Of the step under way.
    seconds: f64,
}

/// What every model says; nothing reads it.
const TOKEN: u32 = 0;

impl Machine {
    /// Guesses nothing ahead: what comes true of guesses is a matter of the texts.
    pub fn new(config: &EngineConfig, num_blocks: usize) -> Self {
        Self {
            scheduler: Scheduler::new(config.max_batch_rows, config.max_sequences, num_blocks),
            step_cost: StepCost::default(),
            max_inter_token: config.max_inter_token,
            seconds: 0.0,
        }
    }

    pub fn enqueue(&mut self, sequence: Sequence) {
        self.scheduler.enqueue(sequence);
    }

    pub fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    /// Plans a step; what it has to do and how long that takes, `None` where nothing is to be done.
    pub fn begin_step(&mut self, cost: &Cost) -> Option<(Work, f64)> {
        if self.scheduler.is_empty() {
            return None;
        }
        self.scheduler.set_step_rows(self.step_cost.step_rows(self.max_inter_token));
        self.scheduler.schedule();
        let work = Work::of_plan(&self.scheduler);
        self.seconds = cost.seconds(&work);
        Some((work, self.seconds))
    }

    /// Ends the step: `on_token` is told whose tokens it drew, and whether they are the last.
    pub fn end_step(&mut self, mut on_token: impl FnMut(SequenceId, bool)) {
        let plan = self.scheduler.plan();
        let (num_rows, num_logits_rows) = (plan.tokens.len(), plan.logits_rows.len());
        self.step_cost.observe(num_rows, num_logits_rows, Duration::from_secs_f64(self.seconds));
        let drawn: Vec<SequenceId> =
            plan.logits.iter().filter(|(_, logits_use)| *logits_use == LogitsUse::Sample).map(|(id, _)| *id).collect();
        self.scheduler.commit();
        for id in drawn {
            let Some(sequence) = self.scheduler.get_mut(id) else { continue };
            sequence.push(TOKEN);
            let is_last = sequence.is_at_max_tokens();
            if is_last {
                self.scheduler.remove(id);
            }
            on_token(id, is_last);
        }
    }
}
