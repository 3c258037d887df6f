//! One prompt, several arms.

use serde_json::json;

use super::document::{Document, EVENTS, JSON, Operation};
use super::fields::completion_or_chat;
use super::openai::OF_GENERATION;
use super::schema::{boolean, item, one_of, properties};
use crate::http::compare::{Chunk, CompareReply, End, MAX_ARMS, MAX_NAME_LEN, MIN_ARMS};

pub fn describe(document: &mut Document) {
    let mut fields = completion_or_chat(document);
    let mut own = fields.clone();
    own.extend(properties(json!({"name": {"type": "string", "minLength": 1, "maxLength": MAX_NAME_LEN}})));
    let arms =
        json!({"type": "array", "minItems": MIN_ARMS, "maxItems": MAX_ARMS, "items": item(json!(own), &["name"])});
    fields.extend(properties(json!({
        "arms": arms,
        "on_error": one_of(&["fail", "skip"], "What becomes of the others when an arm cannot be served."),
        "stream": boolean("Sends the replies as events while they are written."),
    })));
    let (reply, chunk, end) = (document.of::<CompareReply<'_>>(), document.of::<Chunk<'_>>(), document.of::<End<'_>>());
    let event = json!({"anyOf": [chunk, end]});
    let arms = json!([{"name": "a"}, {"name": "b", "temperature": 0}]);
    document.add(
        Operation::post("/v1/compare", "lorry", "Answers one prompt with several models, adapters or options")
            .describing("Fields of the comparison hold for every arm that has none of its own.")
            .takes(
                fields,
                &["arms"],
                &[
                    json!({"prompt": "def add(a, b):", "max_tokens": 16, "arms": arms}),
                    json!({"prompt": "def add(a, b):", "max_tokens": 2, "use_beam_search": true, "arms": arms}),
                    json!({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, "arms": arms}),
                ],
            )
            .answers(200, "Each arm's reply, or why it has none.", &[(JSON, reply), (EVENTS, event)])
            .refuses(&OF_GENERATION),
    );
}
