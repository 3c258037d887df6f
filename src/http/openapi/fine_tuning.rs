//! Files, and fine-tuning jobs.

use serde_json::{Map, Value, json};

use super::document::{Access, Document, JSON, Operation};
use super::schema::{array, count, integer, item, object, properties, required_text, text};
use crate::http::fine_tuning::{
    CheckpointView, DeletedFile, FileView, JobEventView, JobView, MAX_BATCH_SIZE, MAX_EPOCHS, MAX_MULTIPLIER, MAX_RANK,
    MAX_SEED, MAX_SUFFIX_LEN, MAX_VIRTUAL_TOKENS, METHODS, MIN_MULTIPLIER, PURPOSE, Page,
};

const FILES: &str = "Files";
const JOBS: &str = "Fine-tuning";

pub fn describe(document: &mut Document) {
    describe_files(document);
    describe_jobs(document);
}

fn listed(operation: Operation, max_limit: u32) -> Operation {
    operation
        .access(Access::Admin)
        .query("limit", "How many at most.", json!({"type": "integer", "minimum": 1, "maximum": max_limit}))
        .query("after", "The last one of the page before.", json!({"type": "string"}))
        .refuses(&[400])
}

fn describe_files(document: &mut Document) {
    let file = [(JSON, document.of::<FileView>())];
    document.add(
        Operation::post("/v1/files", FILES, "Takes in a file of examples")
            .describing("The file may be as large as `fine_tuning.max_file_mib` says.")
            .access(Access::Admin)
            .takes_form(item(
                json!({"file": {"type": "string", "format": "binary"}, "purpose": {"const": PURPOSE}}),
                &["file", "purpose"],
            ))
            .answers(200, "It is kept.", &file)
            .refuses(&[507]),
    );
    let list = document.of::<Page<FileView>>();
    document.add(
        listed(Operation::get("/v1/files", FILES, "All files, the latest first"), 10_000)
            .query("order", "By the time of their making.", json!({"enum": ["asc", "desc"]}))
            .query("purpose", "Only files of this purpose.", json!({"type": "string"}))
            .answers(200, "A page of them.", &[(JSON, list)]),
    );
    document.add(
        Operation::get("/v1/files/{id}", FILES, "A file")
            .access(Access::Admin)
            .answers(200, "What it is.", &file)
            .refuses(&[400, 404]),
    );
    let deleted = document.of::<DeletedFile>();
    document.add(
        Operation::new("delete", "/v1/files/{id}", FILES, "Deletes a file")
            .describing("Jobs that were made of it have it still.")
            .access(Access::Admin)
            .answers(200, "It is gone.", &[(JSON, deleted)])
            .refuses(&[400, 404, 507]),
    );
    document.add(
        Operation::get("/v1/files/{id}/content", FILES, "What is in a file")
            .access(Access::Admin)
            .answers(200, "As it was sent.", &[("application/octet-stream", json!({}))])
            .refuses(&[400, 404, 507]),
    );
}

fn auto_or(schema: Value, description: &str) -> Value {
    json!({"anyOf": [{"const": "auto"}, schema, {"type": "null"}], "description": description})
}

fn hyperparameters() -> Value {
    let whole = |max: u32| json!({"type": "integer", "minimum": 1, "maximum": max});
    let multiplier = json!({"type": "number", "minimum": MIN_MULTIPLIER, "maximum": MAX_MULTIPLIER});
    let fields = json!({
        "n_epochs": auto_or(whole(MAX_EPOCHS), "How often all examples are learned from, at most: less often where the validation loss falls no more."),
        "batch_size": auto_or(whole(MAX_BATCH_SIZE), "Examples of a step."),
        "learning_rate_multiplier": auto_or(multiplier, "Of the method's own rate."),
    });
    object(fields, &[], "What is not given is `auto`.")
}

fn method() -> Value {
    let own = |name: &str| match name {
        "lora" => Some(("rank", count(1, MAX_RANK, "Of every linear layer."))),
        "prompt" | "prefix" => Some(("num_virtual_tokens", count(1, MAX_VIRTUAL_TOKENS, "Before every prompt."))),
        _ => None,
    };
    let mut fields = Map::new();
    fields.insert("type".to_owned(), json!({"enum": METHODS}));
    for name in METHODS {
        let mut settings = json!({"hyperparameters": hyperparameters()});
        if let Some((field, schema)) = own(name) {
            settings[field] = schema;
        }
        fields.insert(name.to_owned(), object(settings, &[], "Of this `type` alone."));
    }
    object(Value::Object(fields), &["type"], "`supervised`, if nothing is said, is `lora` under OpenAI's name.")
}

fn describe_jobs(document: &mut Document) {
    let job = [(JSON, document.of::<JobView>())];
    let fields = properties(json!({
        "model": required_text(),
        "training_file": required_text(),
        "validation_file": text("Of other examples; if there is none, every tenth of the training file is kept for that."),
        "suffix": {"type": ["string", "null"], "minLength": 1, "maxLength": MAX_SUFFIX_LEN,
            "description": "A part of the adapter's name: letters, digits, dots, dashes and underscores."},
        "seed": integer(0, MAX_SEED, "Drawn, if there is none."),
        "hyperparameters": hyperparameters(),
        "method": method(),
        "metadata": {"type": ["object", "null"], "maxProperties": 16, "additionalProperties": {"type": "string"}},
        "integrations": array(json!(false), "There are none here."),
    }));
    document.add(
        Operation::post("/v1/fine_tuning/jobs", JOBS, "Trains an adapter on a file")
            .describing("The file is read at once: a bad line is refused with its number and field.")
            .access(Access::Admin)
            .takes(
                fields,
                &["model", "training_file"],
                &[
                    json!({"model": "", "training_file": "file-1"}),
                    json!({"model": "", "training_file": "file-1", "suffix": "mine", "seed": 1,
                        "method": {"type": "lora", "lora": {"rank": 8, "hyperparameters": {"n_epochs": 3}}}}),
                ],
            )
            .answers(200, "It is queued.", &job)
            .refuses(&[404, 507]),
    );
    let list = document.of::<Page<JobView>>();
    document.add(listed(Operation::get("/v1/fine_tuning/jobs", JOBS, "All jobs, the latest first"), 100).answers(
        200,
        "A page of them.",
        &[(JSON, list)],
    ));
    document.add(
        Operation::get("/v1/fine_tuning/jobs/{id}", JOBS, "A job")
            .access(Access::Admin)
            .answers(200, "As it is now.", &job)
            .refuses(&[400, 404]),
    );
    document.add(
        Operation::post("/v1/fine_tuning/jobs/{id}/cancel", JOBS, "Ends a job that has not ended")
            .access(Access::Admin)
            .answers(200, "It is cancelled.", &job)
            .refuses(&[400, 404, 507]),
    );
    let events = document.of::<Page<JobEventView>>();
    document.add(
        listed(
            Operation::get("/v1/fine_tuning/jobs/{id}/events", JOBS, "What happened to a job, the latest first"),
            10_000,
        )
        .answers(200, "A page of it.", &[(JSON, events)])
        .refuses(&[404]),
    );
    let checkpoints = document.of::<Page<CheckpointView>>();
    document.add(
        listed(Operation::get("/v1/fine_tuning/jobs/{id}/checkpoints", JOBS, "The weights that a job has kept"), 100)
            .describing("Those with the lowest loss on the validation examples, once they are served.")
            .answers(200, "A page of them.", &[(JSON, checkpoints)])
            .refuses(&[404]),
    );
}
