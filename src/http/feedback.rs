//! What users thought of completions and comparisons: `/v1/feedback`, and Tabby's `/v1/events`.
//!
//! Ids are not checked against what was generated: a client may report that it shows a completion before the completion
//! has ended, and one that belongs to no experiment may be judged too.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde_json::{Value, json};

use super::AppState;
use super::error::ApiError;
use super::fields::{Fields, PathName};
use crate::experiments::{Vote, VoteError, VoteKind};

/// Bytes of an id, a user or an arm.
pub const MAX_NAME_LEN: usize = 256;

pub async fn vote(State(state): State<AppState>, fields: Fields) -> Result<Json<Value>, ApiError> {
    let vote = parse_vote(&fields)?;
    let id = vote.id.clone();
    state.experiments.vote(vote).await?;
    Ok(Json(json!({"id": id, "recorded": true})))
}

pub async fn votes(State(state): State<AppState>, PathName(id): PathName) -> Result<Json<Value>, ApiError> {
    let votes = state.experiments.votes(&id).await?;
    Ok(Json(json!({"id": id, "votes": votes})))
}

/// Tabby answers its plugins with an empty 200.
pub async fn event(State(state): State<AppState>, fields: Fields) -> Result<StatusCode, ApiError> {
    let kind = match required(&fields, "type")? {
        "view" => VoteKind::View,
        "select" => VoteKind::Accepted,
        "dismiss" => VoteKind::Rejected,
        other => {
            let message = format!("`type` must be `view`, `select` or `dismiss`, not {other:?}");
            return Err(ApiError::invalid("type", message));
        }
    };
    fields.count("choice_index", 0..=u32::MAX)?;
    let id = name(&fields, "completion_id")?.ok_or_else(|| missing("completion_id"))?;
    let user = name(&fields, "user")?.unwrap_or_default();
    state.experiments.vote(Vote { id, user, kind, arm: None, text: None }).await?;
    Ok(StatusCode::OK)
}

fn parse_vote(fields: &Fields) -> Result<Vote, ApiError> {
    let id = name(fields, "id")?.ok_or_else(|| missing("id"))?;
    let kind = match VoteKind::parse(required(fields, "kind")?) {
        Some(kind) if kind != VoteKind::View => kind,
        _ => return Err(ApiError::invalid("kind", "`kind` must be `winner`, `accepted`, `rejected` or `edited`")),
    };
    let arm = name(fields, "arm")?;
    if arm.is_some() && kind != VoteKind::Winner {
        return Err(ApiError::invalid("arm", "`arm` names the winner: it needs the `kind` `winner`"));
    }
    let text = fields.string("text")?.map(str::to_owned);
    if text.is_some() != (kind == VoteKind::Edited) {
        let message = "`text` is what an output was edited to: the `kind` `edited` needs it, and no other has it";
        return Err(ApiError::invalid("text", message));
    }
    Ok(Vote { id, user: name(fields, "user")?.unwrap_or_default(), kind, arm, text })
}

fn name(fields: &Fields, field: &str) -> Result<Option<String>, ApiError> {
    match fields.string(field)? {
        Some(name) if name.is_empty() || name.len() > MAX_NAME_LEN || name.contains(char::is_control) => {
            Err(ApiError::invalid(field, format!("`{field}` must be 1 to {MAX_NAME_LEN} bytes of printable text")))
        }
        name => Ok(name.map(str::to_owned)),
    }
}

fn required<'a>(fields: &'a Fields, field: &str) -> Result<&'a str, ApiError> {
    fields.string(field)?.ok_or_else(|| missing(field))
}

fn missing(field: &str) -> ApiError {
    ApiError::invalid(field, format!("`{field}` is missing"))
}

impl From<VoteError> for ApiError {
    fn from(error: VoteError) -> Self {
        match error {
            VoteError::UnknownArm { .. } => Self::invalid("arm", error.to_string()),
            VoteError::Unavailable(cause) => cause.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: Value) -> Result<Vote, Value> {
        let fields = Fields::parse(body.to_string().as_bytes()).unwrap();
        parse_vote(&fields).map_err(|error| serde_json::to_value(error.into_envelope()).unwrap())
    }

    #[test]
    fn a_winner_without_an_arm_is_a_tie() {
        let vote = parse(json!({"id": "cmp-1", "kind": "winner", "arm": null})).unwrap();
        assert_eq!((vote.kind, vote.arm, vote.user.as_str()), (VoteKind::Winner, None, ""));
        let vote = parse(json!({"id": "cmp-1", "kind": "winner", "arm": "base", "user": "ann"})).unwrap();
        assert_eq!((vote.arm.as_deref(), vote.user.as_str()), (Some("base"), "ann"));
    }

    #[test]
    fn what_does_not_fit_together_is_refused_by_its_field() {
        for (body, param) in [
            (json!({"kind": "accepted"}), "id"),
            (json!({"id": "", "kind": "accepted"}), "id"),
            (json!({"id": "x\n", "kind": "accepted"}), "id"),
            (json!({"id": "x".repeat(257), "kind": "accepted"}), "id"),
            (json!({"id": 1, "kind": "accepted"}), "id"),
            (json!({"id": "x"}), "kind"),
            (json!({"id": "x", "kind": "liked"}), "kind"),
            (json!({"id": "x", "kind": "view"}), "kind"),
            (json!({"id": "x", "kind": "accepted", "arm": "base"}), "arm"),
            (json!({"id": "x", "kind": "accepted", "text": "y"}), "text"),
            (json!({"id": "x", "kind": "edited"}), "text"),
            (json!({"id": "x", "kind": "accepted", "user": ""}), "user"),
        ] {
            let error = parse(body.clone()).unwrap_err();
            assert_eq!(error["error"]["param"], param, "{body}");
        }
    }
}
