//! Experiments on the way of a request: the arm that answers for an alias, the shadows beside it, and what is recorded
//! of each.

use std::sync::Arc;
use std::time::Duration;

use futures::future::try_join_all;
use serde_json::json;

use super::AppState;
use super::auth::Caller;
use super::error::ApiError;
use super::reply::random_id;
use crate::engine::fairness::{Account, Priority};
use crate::experiments::{
    ArmUnderWay, Asked, Assignment, Experiments, Outcome, Record, Shadow, prompt_hash, user_hash,
};
use crate::generation::{
    Access, Completed, Generated, Generation, GenerationError, GenerationOptions, GenerationRequest, Prompt,
    ResolvedModel, SequenceUsage, TextStream, Timing,
};
use crate::icl::{self, Select};
use crate::metrics::Metrics;

/// One run of an arm, recorded when this is dropped: as cancelled, unless it was told how the run ended. That of a
/// request without an experiment records nothing.
#[derive(Default)]
pub struct Trial(Option<Run>);

struct Run {
    experiments: Arc<Experiments>,
    record: Record,
    /// Of a comparison.
    under_way: Option<ArmUnderWay>,
    /// To be run once this arm has ended, so that nobody waits longer for it.
    shadows: Vec<ShadowRun>,
}

struct ShadowRun {
    generation: Arc<Generation>,
    metrics: Arc<Metrics>,
    experiments: Arc<Experiments>,
    request: GenerationRequest,
    record: Record,
}

/// Where `request` names an experiment's alias, puts the arm's model in its place. `user` is who the request says it is
/// for; arms that the caller may not know of are not for it.
///
/// # Errors
/// 400 when the request says more of weights or examples than the alias, which is all the arm is there to say; 404 when
/// no arm is left for the caller.
pub fn choose_arm(
    state: &AppState,
    caller: &Caller,
    user: Option<&str>,
    request: &mut GenerationRequest,
) -> Result<Option<Assignment>, ApiError> {
    let Some(alias) = request.selection.model.clone() else { return Ok(None) };
    if !state.experiments.is_alias(&alias) {
        return Ok(None);
    }
    let field = match (&request.selection.adapters, &request.icl) {
        (Some(adapters), _) => Some(adapters.name),
        (None, Some(_)) => Some("icl"),
        (None, None) => None,
    };
    if let Some(field) = field {
        let message = format!("`{alias}` is an experiment, whose arms say what `{field}` would: leave it out");
        return Err(ApiError::invalid(field, message));
    }
    let sticky_key = asker(caller, user).map_or_else(|| random_id("once"), str::to_owned);
    let assignment = state.experiments.assign(&alias, &sticky_key, |adapter| caller.access.allows(adapter));
    let assignment = assignment.ok_or_else(|| GenerationError::unknown_model("model", &alias))?;
    set_model(request, &assignment.model)?;
    Ok(Some(assignment))
}

/// Who the request says it is for, else whose key it has. An empty name is nobody's: clients send it that have no users.
fn asker<'a>(caller: &'a Caller, user: Option<&'a str>) -> Option<&'a str> {
    user.filter(|user| !user.is_empty()).or(caller.identity.as_deref())
}

fn set_model(request: &mut GenerationRequest, model: &str) -> Result<(), ApiError> {
    let (model, icl) = icl::Selection::split_model_name(model)?;
    (request.selection.model, request.icl) = (Some(model.to_owned()), icl);
    Ok(())
}

/// The same asked of a shadow's model. It takes of the share of who asks, behind all else that they ask for.
fn shadow_of(request: &GenerationRequest, caller: &Account, model: &str) -> Result<GenerationRequest, ApiError> {
    let mut request = request.clone();
    set_model(&mut request, model)?;
    request.options.account = Account { priority: Priority::Batch, ..caller.clone() };
    Ok(request)
}

impl Trial {
    /// Of a request that was assigned to an arm, before anything of it has run; `id` is that of its reply.
    pub fn assigned(
        state: &AppState,
        caller: &Caller,
        user: Option<&str>,
        id: &str,
        assignment: Assignment,
        request: &GenerationRequest,
    ) -> Result<Self, ApiError> {
        let Assignment { experiment, arm, model, shadows } = assignment;
        let prompt = as_sent(&request.prompts);
        let prompt_hash = Some(prompt_hash(&prompt));
        let is_kept = state.experiments.keeps_prompts(&experiment) && has_one_whole_answer(request);
        let asked = is_kept.then(|| Asked { prompt, user_hash: asker(caller, user).map(user_hash) });
        let record = Record { experiment: Some(experiment), model, prompt_hash, ..Record::begin(id, &arm) };
        let shadows = shadows.into_iter().map(|Shadow { arm, model }| {
            let request = shadow_of(request, &caller.account, &model)?;
            Ok(ShadowRun {
                generation: state.generation.clone(),
                metrics: state.metrics.clone(),
                experiments: state.experiments.clone(),
                request,
                record: Record { arm, model, shadow: true, ..record.clone() },
            })
        });
        let shadows = shadows.collect::<Result<_, ApiError>>()?;
        let record = Record { asked, ..record };
        Ok(Self(Some(Run { experiments: state.experiments.clone(), record, under_way: None, shadows })))
    }

    /// Of an arm of the comparison `id`, which votes may name.
    pub fn compared(state: &AppState, id: &str, arm: &str, request: &GenerationRequest) -> Self {
        let record = Record { prompt_hash: Some(prompt_hash(&as_sent(&request.prompts))), ..Record::begin(id, arm) };
        let (experiments, under_way) = (state.experiments.clone(), Some(state.experiments.begin_compared(id, arm)));
        Self(Some(Run { experiments, record, under_way, shadows: Vec::new() }))
    }

    /// What the arm turned out to be.
    pub fn started(&mut self, model: &ResolvedModel, icl: Option<&icl::Chosen>) {
        let Some(Run { record, .. }) = &mut self.0 else { return };
        record.generation = model.adapter.as_ref().map(|adapter| adapter.generation.clone());
        // An arm of an experiment is known by the name that its configuration gives.
        if record.experiment.is_none() {
            record.model = full_name(model, icl);
        }
    }

    /// Output of the choice `index`; only that of the first is kept.
    pub fn push(&mut self, index: usize, text: &str) {
        if let (Some(Run { record, .. }), 0) = (&mut self.0, index) {
            record.text.get_or_insert_default().push_str(text);
        }
    }

    /// The choice `index` has ended. The clock is that of the first.
    pub fn ended(&mut self, index: usize, usage: SequenceUsage, timing: Timing) {
        let Some(Run { record, .. }) = &mut self.0 else { return };
        let tokens = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        record.completion_tokens = record.completion_tokens.saturating_add(tokens(usage.num_output_tokens));
        if index == 0 {
            let milliseconds = |duration: Duration| duration.as_secs_f64() * 1e3;
            record.prompt_tokens = tokens(usage.num_prompt_tokens);
            record.ttft_ms = timing.first_token.map(milliseconds);
            record.tpot_ms = timing.per_output_token.map(milliseconds);
        }
    }

    /// The choice `index`, whole.
    pub fn choice(&mut self, index: usize, completed: &Completed) {
        self.push(index, &completed.text);
        self.ended(index, completed.usage, completed.timing);
    }

    /// Everything has ended well: records it, and runs the shadows.
    pub fn completed(&mut self) {
        let shadows = self.0.as_mut().map(|run| {
            run.record.outcome = Outcome::Completed;
            std::mem::take(&mut run.shadows)
        });
        self.record();
        shadows.into_iter().flatten().for_each(|shadow| drop(tokio::spawn(shadow.run())));
    }

    /// The server has broken off.
    pub fn failed(&mut self) {
        if let Some(run) = &mut self.0 {
            run.record.outcome = Outcome::Failed;
        }
        self.record();
    }

    /// Nothing has begun. What no arm could have served is not held against this one.
    pub fn refused(&mut self, error: &GenerationError) {
        match error {
            GenerationError::Overloaded
            | GenerationError::ShuttingDown
            | GenerationError::InvalidParameter { .. }
            | GenerationError::PromptTooLarge { .. }
            | GenerationError::ContextLengthExceeded { .. } => self.0 = None,
            GenerationError::UnknownModel { .. }
            | GenerationError::InvalidSelection { .. }
            | GenerationError::Icl(_)
            | GenerationError::OutOfMemory(_)
            | GenerationError::UnreadableAdapter(_)
            | GenerationError::DeadlineExceeded { .. }
            | GenerationError::EngineStopped
            | GenerationError::Failed(_) => self.failed(),
        }
    }

    fn record(&mut self) {
        if let Some(Run { experiments, record, under_way, .. }) = self.0.take() {
            experiments.record(record);
            drop(under_way);
        }
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        self.record();
    }
}

impl ShadowRun {
    /// Only with room to spare: a shadow must not be why a user is turned away.
    async fn run(self) {
        let Self { generation, metrics, experiments, request, record } = self;
        if !generation.is_half_free() {
            metrics.experiment_writes_total.with_label_values(&["skipped"]).inc();
            return;
        }
        let mut trial = Trial(Some(Run { experiments, record, under_way: None, shadows: Vec::new() }));
        let Generated { model, icl, sequences, .. } = match generation.start(request, &Access::All).await {
            Ok(generated) => generated,
            Err(error) => return trial.refused(&error),
        };
        trial.started(&model, icl.as_ref());
        match try_join_all(sequences.into_iter().map(TextStream::collect)).await {
            Ok(completed) => {
                completed.iter().enumerate().for_each(|(index, completed)| trial.choice(index, completed));
                trial.completed();
            }
            Err(_) => trial.failed(),
        }
    }
}

/// As a model name asks for it; strengths, and ways of choosing, that no name asks for stand behind what they are of.
fn full_name(model: &ResolvedModel, icl: Option<&icl::Chosen>) -> String {
    let mut name = model.id.clone();
    if model.applied.iter().any(|adapter| adapter.scale != 1.0) {
        let strengths: Vec<_> = model.applied.iter().map(|adapter| adapter.scale.to_string()).collect();
        name = format!("{name}@{}", strengths.join("+"));
    }
    let Some(icl) = icl else { return name };
    let select = match icl.select {
        Select::Fixed => "",
        Select::Random => ",random",
        Select::Bm25 => ",bm25",
        Select::Hybrid => ",hybrid",
    };
    format!("{name}+icl:{}@{}{select}", icl.store.name(), icl.ids.len())
}

/// The prompts, before anything is made of them.
fn as_sent(prompts: &[Prompt]) -> String {
    json!(prompts).to_string()
}

/// Whether the text that is recorded is all of the only answer to the only prompt, and the prompt all that it came from.
fn has_one_whole_answer(request: &GenerationRequest) -> bool {
    let GenerationOptions { num_choices, echo, hides_prefix, tools, .. } = &request.options;
    request.prompts.len() == 1 && *num_choices == 1 && !echo && !hides_prefix && tools.is_none()
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;
    use crate::adapter::canonical::Member;
    use crate::generation::Selection;
    use crate::icl::{Example, Store};

    #[test]
    fn a_compared_arm_is_recorded_as_what_its_name_serves_or_as_something_else() {
        let store = Store::new("s", vec![Example { instruction: "a".to_owned(), code: "b".to_owned() }]).unwrap();
        let store = Arc::new(store);
        let name = |id: &str, applied: &[(&str, f32)], select: Option<Select>| {
            let member = |(name, scale): &(&str, f32)| Member {
                name: (*name).to_owned(),
                generation: String::new(),
                scale: *scale,
            };
            let applied = applied.iter().map(member).collect();
            let icl = select.map(|select| icl::Chosen { store: store.clone(), select, seed: None, ids: vec![0] });
            full_name(&ResolvedModel { id: id.to_owned(), adapter: None, applied }, icl.as_ref())
        };
        for (id, applied, select, expected) in [
            ("m", vec![], None, "m"),
            ("m-x", vec![("x", 1.0)], None, "m-x"),
            ("m-x", vec![("x", 0.5)], None, "m-x@0.5"),
            ("m-x", vec![("x", -4.0)], None, "m-x@-4"),
            ("m-x+y", vec![("x", 1.0), ("y", 1.0)], None, "m-x+y"),
            ("m-x+y", vec![("x", 1.0), ("y", 0.25)], None, "m-x+y@1+0.25"),
            ("m-x", vec![("x", 1.0)], Some(Select::Fixed), "m-x+icl:s@1"),
            ("m-x", vec![("x", 2.0)], Some(Select::Bm25), "m-x@2+icl:s@1,bm25"),
        ] {
            assert_eq!(name(id, &applied, select), expected);
        }
    }

    #[test]
    fn a_shadow_takes_of_the_share_of_who_asks_and_of_nobody_elses() {
        let caller = Account { key: Arc::from("ann"), weight: NonZeroU32::new(3).unwrap(), priority: Priority::Chat };
        let request = GenerationRequest {
            selection: Selection { model: Some("coder".to_owned()), ..Selection::default() },
            icl: None,
            prompt_format: None,
            prompts: vec![Prompt::Text("abc".to_owned())],
            options: GenerationOptions::default(),
        };
        let shadow = shadow_of(&request, &caller, "tuned").unwrap();
        assert_eq!(shadow.options.account, Account { priority: Priority::Batch, ..caller });
        assert_eq!((shadow.selection.model.as_deref(), &shadow.prompts), (Some("tuned"), &request.prompts));
    }
}
