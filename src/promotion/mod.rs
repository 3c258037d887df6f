//! Promotions at work: a candidate is measured on held-out feedback beside what is served, and takes over the canary's arm
//! if it does better. What happens to it there is for `experiments` to watch.

mod begin;
mod placing;
mod scoring;

use std::sync::Arc;
use std::time::Duration;

use futures::future::try_join;
use tokio::task::spawn_blocking;
use tokio::time::sleep;

pub use begin::{BeginError, begin};
pub use placing::{PlaceError, place};

use crate::experiments::{Check, Checked, Experiments, MOST_PAIRS, Promotion, PromotionRule};
use crate::feedback::{HeldOut, held_out};
use crate::generation::{Generation, GenerationError};
use crate::icl;
use scoring::{Scored, Scorer, has_room};

/// How often a server that is full is asked again.
const POLL: Duration = Duration::from_millis(20);
/// How long is waited where what was begun came to nothing.
const RETRY: Duration = Duration::from_secs(1);

/// Checks every candidate, one after the other, for as long as it is polled. One whose check was cut off by the end of the
/// server is checked again; one that is withdrawn keeps no other waiting.
pub async fn run(generation: &Generation, experiments: &Arc<Experiments>) {
    loop {
        let (experiment, promotion) = experiments.next_unchecked().await;
        let checked = match experiments.promotes(&experiment) {
            Ok((rule, of_arm)) => check(generation, experiments, &experiment, &promotion, rule, of_arm).await,
            Err(error) => Some(Checked::Failed { check: None, cause: error.to_string() }),
        };
        if let Some(checked) = checked {
            experiments.checked(&experiment, &promotion.id, checked).await;
        }
    }
}

/// `None` for a candidate that was withdrawn meanwhile, which is not installed.
async fn check(
    generation: &Generation,
    experiments: &Arc<Experiments>,
    experiment: &str,
    promotion: &Promotion,
    rule: &PromotionRule,
    of_arm: &str,
) -> Option<Checked> {
    let measured = async {
        let pairs = pairs(experiments, experiment, rule).await?;
        measure(generation, promotion, &pairs, rule).await
    };
    let measured = tokio::select! {
        biased;
        () = experiments.until_not_checking(experiment, &promotion.id) => return None,
        measured = measured => measured,
    };
    let check = match measured {
        Ok(check) if check.has_passed => check,
        Ok(check) => return Some(Checked::Measured { check, replaced_generation: None }),
        Err(cause) => return Some(Checked::Failed { check: None, cause }),
    };
    let is_wanted = || experiments.is_checking(experiment, &promotion.id);
    match place(generation.adapters(), &promotion.adapter, &promotion.generation, of_arm, is_wanted).await {
        Ok(replaced_generation) => Some(Checked::Measured { check, replaced_generation }),
        Err(PlaceError::Withdrawn) => None,
        Err(error) => Some(Checked::Failed { check: Some(check), cause: error.to_string() }),
    }
}

async fn pairs(experiments: &Arc<Experiments>, experiment: &str, rule: &PromotionRule) -> Result<Vec<HeldOut>, String> {
    let (experiments, experiment, rule) = (experiments.clone(), experiment.to_owned(), rule.clone());
    let read = spawn_blocking(move || {
        let mut pairs = held_out(&experiments.judged_replies(&experiment)?, &rule);
        pairs.drain(..pairs.len().saturating_sub(MOST_PAIRS));
        Ok(pairs)
    });
    match read.await {
        Ok(Ok(pairs)) => Ok(pairs),
        Ok(Err::<_, crate::experiments::Unavailable>(cause)) => Err(cause.to_string()),
        Err(panic) => Err(format!("the held-out feedback could not be read: {panic}")),
    }
}

/// The error says why there is nothing to go by.
async fn measure(
    generation: &Generation,
    promotion: &Promotion,
    pairs: &[HeldOut],
    rule: &PromotionRule,
) -> Result<Check, String> {
    let (model, icl) = icl::Selection::split_model_name(&promotion.incumbent_model).map_err(|e| e.to_string())?;
    let mut candidate =
        Scorer { model: &promotion.adapter, icl: None, generation: Some(Some(promotion.generation.clone())) };
    let mut incumbent = Scorer { model, icl, generation: None };
    let (mut logprobs, mut left_out) = (Vec::new(), 0);
    for pair in pairs {
        let both = try_join(
            until_there_is_room(generation, &candidate, pair),
            until_there_is_room(generation, &incumbent, pair),
        );
        match both.await.map_err(|error| format!("it could not be measured: {error}"))? {
            (
                Scored::Logprob { mean: of_candidate, generation: first },
                Scored::Logprob { mean, generation: second },
            ) => {
                candidate.keep_to(first)?;
                incumbent.keep_to(second)?;
                logprobs.push((of_candidate, mean));
            }
            _ => left_out += 1,
        }
    }
    if logprobs.iter().any(|(a, b)| !a.is_finite() || !b.is_finite()) {
        return Err(
            "a log-probability is not a number: the weights of the candidate or the incumbent are broken".to_owned()
        );
    }
    if logprobs.len() < rule.min_pairs {
        let (found, min) = (logprobs.len(), rule.min_pairs);
        return Err(format!(
            "{found} held-out pairs fit into the context and the template, and promotion.min_pairs is {min}"
        ));
    }
    Ok(Check::new(&logprobs, left_out))
}

/// While the server stops this does not end.
async fn until_there_is_room(
    generation: &Generation,
    scorer: &Scorer<'_>,
    pair: &HeldOut,
) -> Result<Scored, GenerationError> {
    loop {
        if !has_room(generation) {
            sleep(POLL).await;
            continue;
        }
        let scored = scorer.score(generation, pair).await;
        match scored.as_ref().err().and_then(patience) {
            Some(patience) => sleep(patience).await,
            None => return scored,
        }
    }
}

/// How long to wait until it is tried again; `None` where the error says something of the candidate or the incumbent. What
/// says more of the server than of them is no end of a check: once the server has stopped, the next one makes it again.
fn patience(error: &GenerationError) -> Option<Duration> {
    match error {
        GenerationError::Overloaded => Some(POLL),
        GenerationError::ShuttingDown
        | GenerationError::EngineStopped
        | GenerationError::OutOfMemory(_)
        | GenerationError::UnreadableAdapter(_)
        | GenerationError::DeadlineExceeded { .. } => Some(RETRY),
        GenerationError::UnknownModel { .. }
        | GenerationError::InvalidParameter { .. }
        | GenerationError::InvalidSelection { .. }
        | GenerationError::Icl(_)
        | GenerationError::ContextLengthExceeded { .. }
        | GenerationError::PromptTooLarge { .. }
        | GenerationError::Failed(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_is_short_of_something_or_stops_ends_no_check() {
        let unknown = GenerationError::unknown_model("model", "m");
        for (error, is_tried_again) in [
            (GenerationError::Overloaded, true),
            (GenerationError::ShuttingDown, true),
            (GenerationError::EngineStopped, true),
            (GenerationError::OutOfMemory("no memory".to_owned()), true),
            (GenerationError::UnreadableAdapter("no more files can be opened".to_owned()), true),
            (GenerationError::DeadlineExceeded { max_seconds: 1 }, true),
            (unknown, false),
            (GenerationError::Failed("the model has no such layer".to_owned()), false),
        ] {
            assert_eq!(patience(&error).is_some(), is_tried_again, "{error}");
        }
    }
}
