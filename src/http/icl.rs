//! `/v1/icl`: the stores of in-context examples, listed, shown, replaced and deleted.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value, json};
use tokio::task::spawn_blocking;

use super::AppState;
use super::auth::Admin;
use super::error::ApiError;
use super::fields::{Fields, PathName, wrong_type};
use crate::icl::{Example, Store, StoreError};

#[derive(Debug, JsonSchema, Serialize)]
pub struct StoreList {
    object: &'static str,
    data: Vec<StoreCard>,
}

#[derive(Debug, JsonSchema, Serialize)]
pub struct StoreCard {
    name: String,
    version: String,
    num_examples: usize,
}

#[derive(Debug, JsonSchema, Serialize)]
pub struct WholeStore {
    #[serde(flatten)]
    card: StoreCard,
    examples: Vec<NumberedExample>,
}

#[derive(Debug, JsonSchema, Serialize)]
struct NumberedExample {
    id: usize,
    #[serde(flatten)]
    example: Example,
}

pub async fn list(State(state): State<AppState>) -> Json<StoreList> {
    Json(StoreList { object: "list", data: state.generation.icl().list().iter().map(card).collect() })
}

pub async fn get(State(state): State<AppState>, PathName(name): PathName) -> Result<Json<WholeStore>, ApiError> {
    let store = state.generation.icl().get(&name)?;
    let numbered = |(id, example): (usize, &Example)| NumberedExample { id, example: example.clone() };
    let examples = store.examples().iter().enumerate().map(numbered).collect();
    Ok(Json(WholeStore { card: card(&store), examples }))
}

/// Replaces or creates a store: `{"examples": [{"instruction", "code"}]}`.
pub async fn put(
    State(state): State<AppState>,
    _: Admin,
    PathName(name): PathName,
    fields: Fields,
) -> Result<Json<StoreCard>, ApiError> {
    let examples = fields.array("examples")?.ok_or_else(|| ApiError::invalid("examples", "`examples` is required"))?;
    let examples =
        examples.iter().enumerate().map(|(index, value)| example(index, value)).collect::<Result<Vec<_>, _>>()?;
    let store = blocking(move || state.generation.icl().put(&name, examples)).await?;
    Ok(Json(card(&store)))
}

pub async fn delete(
    State(state): State<AppState>,
    _: Admin,
    PathName(name): PathName,
) -> Result<Json<Value>, ApiError> {
    let deleted = name.clone();
    blocking(move || state.generation.icl().delete(&name)).await?;
    Ok(Json(json!({"name": deleted, "deleted": true})))
}

/// Waits for the disk off the connection threads.
async fn blocking<T: Send + 'static>(
    change: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, ApiError> {
    let changed = spawn_blocking(change).await.map_err(|_| ApiError::internal())?;
    Ok(changed?)
}

fn card(store: &Arc<Store>) -> StoreCard {
    StoreCard {
        name: store.name().to_owned(),
        version: store.version().to_owned(),
        num_examples: store.examples().len(),
    }
}

fn example(index: usize, value: &Value) -> Result<Example, ApiError> {
    let path = format!("examples[{index}]");
    let object = value.as_object().ok_or_else(|| wrong_type(&path, "an object", value))?;
    Ok(Example { instruction: text(&path, object, "instruction")?, code: text(&path, object, "code")? })
}

fn text(path: &str, example: &Map<String, Value>, field: &str) -> Result<String, ApiError> {
    let value = example.get(field).unwrap_or(&Value::Null);
    let text = value.as_str().ok_or_else(|| wrong_type(&format!("{path}.{field}"), "a string", value))?;
    Ok(text.to_owned())
}
