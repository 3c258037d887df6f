//! Bodies that nobody would send, to each route that reads one: whatever comes, the answer is one that `/openapi.json`
//! has, and never that the server failed.

use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::{Config as RunConfig, TestCaseError, TestRunner};
use tokio::runtime::Runtime;

use super::contract::{Operation, Sent, documented, sent};
use super::*;

/// For each route and kind of body.
const NUM_CASES: u32 = 64;

/// JSON of any shape, with what is often misread: limits of integers, depth, lone surrogates, text of some length.
fn any_json() -> impl Strategy<Value = Value> {
    let edges = [
        json!(null),
        json!(i64::MIN),
        json!(u64::MAX),
        json!(-1),
        json!(0),
        json!(1),
        json!(1e308),
        json!(-0.0),
        json!(""),
        json!("\u{0}"),
        json!("a".repeat(5000)),
        json!("é🦀\u{feff}<|end|>"),
        (0..100).fold(json!(1), |inner, _| json!([inner])),
        (0..100).fold(json!({}), |inner, _| json!({"properties": inner, "type": "object"})),
    ];
    let leaf = prop_oneof![
        select(edges.to_vec()),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (-3_i64..200).prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 32, 6, |inner| {
        let names = prop_oneof![select(NAMES.to_vec()).prop_map(str::to_owned), ".{0,4}"];
        let object = proptest::collection::btree_map(names, inner.clone(), 0..6);
        prop_oneof![
            proptest::collection::vec(inner, 0..6).prop_map(Value::from),
            object.prop_map(|fields| fields.into_iter().collect()),
        ]
    })
}

/// Of fields in fields.
const NAMES: [&str; 24] = [
    "type",
    "role",
    "content",
    "text",
    "name",
    "id",
    "scale",
    "function",
    "arguments",
    "parameters",
    "schema",
    "json_schema",
    "store",
    "k",
    "select",
    "include_usage",
    "format",
    "effort",
    "tool_calls",
    "input",
    "edits",
    "prefix",
    "body",
    "examples",
];

/// A change of an example: the field, by its place among those that the route reads, and what it becomes.
type Change = (Index, Option<Value>);

fn changes() -> impl Strategy<Value = Vec<Change>> {
    proptest::collection::vec((any::<Index>(), proptest::option::weighted(0.9, any_json())), 1..4)
}

/// `null` and absence are the same to parsers.
fn changed(operation: &Operation, example: &Value, changes: Vec<Change>) -> Value {
    let names: Vec<&String> = operation.properties.keys().collect();
    let mut body = example.clone();
    for (field, value) in changes.into_iter().filter(|_| !names.is_empty()) {
        // Beside `example`, or within it.
        let name = field.get(&names);
        match (&mut body[name.as_str()], value) {
            (Value::Array(items), Some(value)) if !items.is_empty() => *field.get_mut(items) = value,
            (Value::Object(fields), Some(value)) if !fields.is_empty() => {
                let places = fields.values_mut().collect::<Vec<_>>();
                let index = field.index(places.len());
                places.into_iter().skip(index).take(1).for_each(|place| *place = value.clone());
            }
            (place, value) => *place = value.unwrap_or_default(),
        }
    }
    body
}

struct Target {
    runtime: Runtime,
    server: Server,
    operations: Vec<Operation>,
}

impl Target {
    fn start() -> Self {
        let runtime = Runtime::new().unwrap();
        let server = runtime.block_on(Server::able());
        let operations = runtime.block_on(documented(&server));
        Self { runtime, server, operations }
    }

    /// Runs `bodies` against every route that reads a body.
    fn run<S: Strategy>(&self, bodies: &S, write: impl Fn(&Operation, S::Value) -> Vec<u8>) {
        for operation in self.operations.iter().filter(|operation| !operation.examples.is_empty()) {
            let config = RunConfig { failure_persistence: None, ..RunConfig::with_cases(NUM_CASES) };
            let ran = TestRunner::new(config).run(bodies, |body| {
                let body = write(operation, body);
                let shown = String::from_utf8_lossy(&body).into_owned();
                let reply = self.runtime.block_on(sent(operation.request(&self.server).body(body)));
                check(operation, &reply).map_err(|fault| TestCaseError::fail(format!("{fault} to {shown}")))
            });
            ran.unwrap_or_else(|error| panic!("{}: {error:.2000}", operation.name()));
        }
        self.runtime.block_on(self.server.until_idle());
    }
}

fn check(operation: &Operation, reply: &Sent) -> Result<(), String> {
    // What is not served is answered so whatever is sent.
    if reply.status.is_server_error() && reply.status != StatusCode::NOT_IMPLEMENTED {
        return Err(format!("{} {:.500}", reply.status, reply.text));
    }
    operation.fault(reply).map_or(Ok(()), Err)
}

#[test]
fn a_body_with_changed_fields_is_answered_or_refused_in_the_words_of_its_interface() {
    Target::start().run(&(any::<Index>(), changes()), |operation, (example, changes)| {
        changed(operation, example.get(&operation.examples), changes).to_string().into_bytes()
    });
}

#[test]
fn any_json_is_answered_or_refused_in_the_words_of_its_interface() {
    Target::start().run(&any_json(), |_, body| body.to_string().into_bytes());
}

#[test]
fn a_body_with_changed_bytes_is_answered_or_refused_in_the_words_of_its_interface() {
    let edits = proptest::collection::vec((any::<Index>(), any::<u8>()), 0..4);
    Target::start().run(&(any::<Index>(), edits, any::<Index>()), |operation, (example, edits, end)| {
        let mut body = example.get(&operation.examples).to_string().into_bytes();
        for (place, byte) in edits {
            *place.get_mut(&mut body) = byte;
        }
        body.truncate(end.index(2 * body.len() + 1));
        body
    });
}
