//! Adapters, stores of in-context examples, votes and experiments.

use serde_json::{Value, json};

use super::document::{Access, Document, EVENTS, JSON, Operation, TEXT};
use super::schema::{boolean, closed, count, item, not_null, one_of, properties, required_text, text};
use crate::experiments::{Promotion, Report, StoredVote};
use crate::http::adapter_events::{EventView, MissedView};
use crate::http::adapters::AdapterView;
use crate::http::feedback::MAX_NAME_LEN;
use crate::http::icl::{StoreCard, StoreList, WholeStore};
use crate::icl::{MAX_CODE_BYTES, MAX_EXAMPLES, MAX_INSTRUCTION_BYTES};

const ADAPTERS: &str = "Adapters";
const EXAMPLES: &str = "In-context examples";
const EXPERIMENTS: &str = "Experiments";

pub fn describe(document: &mut Document) {
    describe_adapters(document);
    describe_vllm(document);
    describe_stores(document);
    describe_votes(document);
    describe_experiments(document);
}

fn describe_adapters(document: &mut Document) {
    let list = document.list_of::<AdapterView>();
    document.add(Operation::get("/v1/adapters", ADAPTERS, "All adapters").answers(
        200,
        "Each as it is now.",
        &[(JSON, list)],
    ));
    let event = json!({"anyOf": [document.of::<EventView>(), document.of::<MissedView>()]});
    document.add(
        Operation::get("/v1/adapters/events", ADAPTERS, "What happens to adapters, as it happens")
            .describing("Ends when the server does.")
            .answers(200, "An event for each change.", &[(EVENTS, event)]),
    );
    let view = [(JSON, document.of::<AdapterView>())];
    let path = "/v1/adapters/{name}";
    document.add(
        Operation::get(path, ADAPTERS, "An adapter")
            .answers(200, "As it is now.", &view)
            .answers_with_header(200, "etag")
            .refuses(&[400, 404]),
    );
    let conditional = |operation: Operation| {
        operation
            .header("if-match", "The generation that is replaced, or `*`.")
            .header("if-none-match", "`*`: there must be none.")
    };
    let if_generation = || text("The generation that is replaced; empty for none.");
    let put = Operation::new("put", path, ADAPTERS, "Installs an adapter, or replaces it")
        .access(Access::Admin)
        .takes_schema(
            closed(json!({"type": "object",
            "properties": {
                "source": text("`hf:owner/repo`, with or without `@revision`."),
                "path": text("A folder under that of the adapters."),
                "if_generation": if_generation(),
            },
            "anyOf": [
                {"required": ["source"], "properties": {"source": required_text(), "path": {"type": "null"}}},
                {"required": ["path"], "properties": {"path": required_text(), "source": {"type": "null"}}},
            ]})),
            &[json!({"path": "no-such-folder"}), json!({"source": "hf:owner/repo"})],
            true,
        );
    document.add(
        conditional(put)
            .answers(200, "It was replaced.", &view)
            .answers(201, "It is new.", &view)
            .answers_with_header(200, "etag")
            .answers_with_header(201, "etag")
            .refuses(&[404, 409, 412, 422, 507]),
    );
    document.add(
        conditional(Operation::new("delete", path, ADAPTERS, "Takes an adapter out"))
            .access(Access::Admin)
            .answers(204, "There is none of this name.", &[])
            .refuses(&[400, 409, 412, 422, 507]),
    );
    document.add(
        Operation::post(
            "/v1/adapters/{name}/load",
            ADAPTERS,
            "Brings an adapter into memory, as its first request would",
        )
        .answers(200, "As it is now.", &view)
        .answers_with_header(200, "etag")
        .refuses(&[400, 404, 422]),
    );
    let roll_back = Operation::post("/v1/adapters/{name}/rollback", ADAPTERS, "Goes back to an earlier generation")
        .access(Access::Admin)
        .takes_schema(
            closed(item(
                json!({
                    "generation": text("The one before, if nothing is said."),
                    "if_generation": if_generation(),
                }),
                &[],
            )),
            &[json!({"generation": null})],
            false,
        );
    document.add(
        conditional(roll_back)
            .answers(200, "As it is now.", &view)
            .answers_with_header(200, "etag")
            .refuses(&[404, 409, 412, 422, 507]),
    );
}

fn describe_vllm(document: &mut Document) {
    let done = [(TEXT, required_text())];
    let name = || json!({"type": "string"});
    document.add(
        Operation::post("/v1/load_lora_adapter", "vLLM", "Installs an adapter")
            .access(Access::Admin)
            .takes(
                properties(json!({
                    "lora_name": name(),
                    "lora_path": name(),
                    "load_inplace": boolean("Replaces the one of this name."),
                })),
                &["lora_name", "lora_path"],
                &[json!({"lora_name": "a", "lora_path": "no-such-folder"})],
            )
            .answers(200, "It is there.", &done)
            .refuses(&[404, 409, 422, 507]),
    );
    document.add(
        Operation::post("/v1/unload_lora_adapter", "vLLM", "Takes an adapter out")
            .access(Access::Admin)
            .takes(properties(json!({"lora_name": name()})), &["lora_name"], &[json!({"lora_name": "no-such-adapter"})])
            .answers(200, "It is gone.", &done)
            .refuses(&[404, 409, 412, 422, 507]),
    );
}

fn describe_stores(document: &mut Document) {
    let list = document.of::<StoreList>();
    document.add(Operation::get("/v1/icl", EXAMPLES, "All stores").answers(200, "Their names.", &[(JSON, list)]));
    let path = "/v1/icl/{name}";
    let (whole, card) = (document.of::<WholeStore>(), document.of::<StoreCard>());
    document.add(
        Operation::get(path, EXAMPLES, "A store")
            .answers(200, "With its examples.", &[(JSON, whole)])
            .refuses(&[400, 404]),
    );
    let text = |max: usize| json!({"type": "string", "minLength": 1, "maxLength": max});
    let example = item(
        json!({"instruction": text(MAX_INSTRUCTION_BYTES), "code": text(MAX_CODE_BYTES)}),
        &["instruction", "code"],
    );
    let examples = json!({"type": "array", "minItems": 1, "maxItems": MAX_EXAMPLES, "items": example});
    document.add(
        Operation::new("put", path, EXAMPLES, "Creates or replaces a store")
            .access(Access::Admin)
            .takes(
                properties(json!({"examples": examples})),
                &["examples"],
                &[json!({"examples": [{"instruction": "add a and b", "code": "a + b"}]})],
            )
            .answers(200, "The store as it is now.", &[(JSON, card)])
            .refuses(&[409, 507]),
    );
    let deleted = item(json!({"name": required_text(), "deleted": {"const": true}}), &["name", "deleted"]);
    document.add(
        Operation::new("delete", path, EXAMPLES, "Deletes a store")
            .access(Access::Admin)
            .answers(200, "It is gone.", &[(JSON, deleted)])
            .refuses(&[400, 404, 409, 507]),
    );
}

fn describe_votes(document: &mut Document) {
    let id = || json!({"type": "string", "minLength": 1, "maxLength": MAX_NAME_LEN});
    let user = json!({"type": ["string", "null"], "minLength": 1, "maxLength": MAX_NAME_LEN});
    let vote = |kind: Value, others: Value| {
        let mut fields = properties(
            json!({"id": id(), "user": user, "kind": kind, "arm": {"type": "null"}, "text": {"type": "null"}}),
        );
        fields.extend(properties(others));
        fields
    };
    let winner = vote(json!({"const": "winner"}), json!({"arm": user}));
    let edited = vote(json!({"const": "edited"}), json!({"text": required_text()}));
    let judged = vote(json!({"enum": ["accepted", "rejected"]}), json!({}));
    let kinds = [(winner, vec!["id", "kind"]), (edited, vec!["id", "kind", "text"]), (judged, vec!["id", "kind"])];
    let kinds = kinds.map(|(fields, required)| item(Value::Object(fields), &required));
    let recorded = item(json!({"id": required_text(), "recorded": {"const": true}}), &["id", "recorded"]);
    document.add(
        Operation::post("/v1/feedback", EXPERIMENTS, "What a user thought of a reply or a comparison")
            .describing("`arm` names the winner of a comparison; `text` is what an output was edited to.")
            .takes_schema(
                json!({"type": "object", "anyOf": kinds}),
                &[
                    json!({"id": "cmpl-1", "kind": "accepted"}),
                    json!({"id": "cmp-1", "kind": "winner", "arm": null}),
                    json!({"id": "cmpl-1", "kind": "edited", "text": "a + b"}),
                ],
                true,
            )
            .answers(200, "The vote is kept.", &[(JSON, recorded)]),
    );
    let vote = document.of::<StoredVote>();
    let votes = item(json!({"id": required_text(), "votes": {"type": "array", "items": vote}}), &["id", "votes"]);
    document.add(
        Operation::get("/v1/feedback/{id}", EXPERIMENTS, "The votes on a reply")
            .answers(200, "All of them.", &[(JSON, votes)])
            .refuses(&[400]),
    );
    document.add(
        Operation::post("/v1/events", "Tabby", "That a completion was shown, taken or dismissed")
            .takes(
                properties(json!({
                    "type": not_null(one_of(&["view", "select", "dismiss"], "What happened.")),
                    "completion_id": id(),
                    "choice_index": count(0, u32::MAX, "Of the completion."),
                    "user": user,
                })),
                &["type", "completion_id"],
                &[json!({"type": "view", "completion_id": "cmpl-1", "choice_index": 0})],
            )
            .answers(200, "It is kept.", &[]),
    );
}

fn describe_experiments(document: &mut Document) {
    let list = document.list_of::<Report>();
    let report = [(JSON, document.of::<Report>())];
    document.add(Operation::get("/v1/experiments", EXPERIMENTS, "How the experiments stand").answers(
        200,
        "A report of each.",
        &[(JSON, list)],
    ));
    document.add(
        Operation::get("/v1/experiments/{name}", EXPERIMENTS, "How an experiment stands")
            .answers(200, "Its report.", &report)
            .refuses(&[400, 404]),
    );
    document.add(
        Operation::post(
            "/v1/experiments/{name}/reset",
            EXPERIMENTS,
            "Puts a canary that was rolled back into traffic again, or ends a promotion",
        )
        .access(Access::Admin)
        .answers(200, "Its report.", &report)
        .refuses(&[400, 404]),
    );
    let path = "/v1/experiments/{name}/promotions";
    let list = document.list_of::<Promotion>();
    document.add(
        Operation::get(path, EXPERIMENTS, "What was promoted in an experiment, or was to be")
            .answers(200, "The latest first.", &[(JSON, list)])
            .refuses(&[400, 404]),
    );
    let promotion = [(JSON, document.of::<Promotion>())];
    document.add(
        Operation::post(path, EXPERIMENTS, "Checks an adapter on held-out feedback, and promotes it if it does better")
            .access(Access::Admin)
            .takes_schema(
                closed(item(json!({"adapter": text("What the canary's arm serves, if nothing is said.")}), &[])),
                &[json!({"adapter": null}), json!({"adapter": "no-such-adapter"})],
                false,
            )
            .answers(200, "It is checked.", &promotion)
            .refuses(&[404, 409, 422]),
    );
}
