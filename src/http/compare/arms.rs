//! From the body of a comparison to the plain request of each arm: the shared fields, with the arm's own over them.

use serde_json::{Map, Value};

use super::super::chat::ChatShape;
use super::super::completions::CompletionShape;
use super::super::error::ApiError;
use super::super::fields::{Fields, wrong_type};
use super::super::reply::ReplyShape;
use super::super::sampling::{LENGTH_NAMES, SEED_NAMES, STOP_NAMES, parse_seed};
use super::super::selection::ADAPTER_FIELDS;
use crate::generation::{GenerationRequest, random_seed};

pub const MIN_ARMS: usize = 2;
pub const MAX_ARMS: usize = 16;
pub const MAX_NAME_LEN: usize = 64;
/// Fields of the comparison, which no arm gets.
const OF_COMPARISON: [&str; 4] = ["arms", "on_error", "stream", "stream_options"];
/// Fields that say the same in different ways: an arm that has one of them gets none of the others.
pub const ALTERNATIVES: [&[&str]; 6] = [
    &ADAPTER_FIELDS,
    &["prompt", "messages"],
    &LENGTH_NAMES,
    &SEED_NAMES,
    &STOP_NAMES,
    &["repetition_penalty", "repeat_penalty"],
];

#[derive(Debug)]
pub struct CompareRequest {
    pub arms: Vec<ArmRequest>,
    /// Of every arm that has none of its own.
    pub seed: i64,
    pub on_error: OnError,
    pub is_streamed: bool,
}

/// What becomes of the others when one arm cannot be served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnError {
    /// Nothing is generated.
    Fail,
    /// They run without it.
    Skip,
}

#[derive(Debug)]
pub struct ArmRequest {
    pub name: String,
    index: usize,
    /// The names of the fields that it has from the comparison.
    shared: Vec<String>,
    /// Who it says it is for.
    pub user: Option<String>,
    pub request: Result<GenerationRequest, ApiError>,
}

impl CompareRequest {
    /// # Errors
    /// 400 for what is wrong with the comparison itself; what is wrong with an arm is in the arm.
    pub fn parse(fields: &Fields) -> Result<Self, ApiError> {
        let on_error = match fields.string("on_error")? {
            None | Some("fail") => OnError::Fail,
            Some("skip") => OnError::Skip,
            Some(other) => {
                let message = format!("`on_error` must be \"fail\" or \"skip\", not {other:?}");
                return Err(ApiError::invalid("on_error", message));
            }
        };
        let is_streamed = fields.boolean("stream")?.unwrap_or(false);
        let seed = parse_seed(fields)?.unwrap_or_else(random_seed);
        let items = fields.array("arms")?.ok_or_else(|| ApiError::invalid("arms", "`arms` is required"))?;
        if !(MIN_ARMS..=MAX_ARMS).contains(&items.len()) {
            let message = format!("`arms` must have {MIN_ARMS} to {MAX_ARMS} arms, not {}", items.len());
            return Err(ApiError::invalid("arms", message));
        }
        let mut arms: Vec<ArmRequest> = Vec::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            let arm = ArmRequest::parse(index, item, fields, seed)?;
            if arms.iter().any(|other| other.name == arm.name) {
                let message = format!("`arms[{index}].name` {:?} is taken by another arm", arm.name);
                return Err(ApiError::invalid(&format!("arms[{index}].name"), message));
            }
            arms.push(arm);
        }
        Ok(Self { arms, seed, on_error, is_streamed })
    }
}

impl ArmRequest {
    fn parse(index: usize, item: &Value, shared: &Fields, seed: i64) -> Result<Self, ApiError> {
        let Value::Object(own) = item else {
            return Err(wrong_type(&format!("arms[{index}]"), "an object with a `name`", item));
        };
        let at = format!("arms[{index}].name");
        let name = match own.get("name") {
            None | Some(Value::Null) => return Err(ApiError::invalid(&at, format!("`{at}` is required"))),
            Some(Value::String(name)) => name.clone(),
            Some(other) => return Err(wrong_type(&at, "a string", other)),
        };
        if name.is_empty() || name.chars().count() > MAX_NAME_LEN {
            return Err(ApiError::invalid(&at, format!("`{at}` must have 1 to {MAX_NAME_LEN} characters")));
        }
        let is_given = |field: &&str| own.get(*field).is_some_and(|value| !value.is_null());
        if let Some(field) = OF_COMPARISON.into_iter().find(is_given) {
            let at = format!("arms[{index}].{field}");
            let message = format!("`{at}` is for all arms at once: say `{field}` beside `arms`");
            return Err(ApiError::invalid(&at, message));
        }
        let (shared, fields) = overlay(shared, own);
        // An arm that asks for a drawn seed does not get that of the others.
        let has_own = SEED_NAMES.iter().any(|name| own.get(*name).is_some_and(|seed| !seed.is_null()));
        let user = fields.string("user").map(|user| user.map(str::to_owned));
        let request = user.clone().and_then(|_| parse_request(&fields)).map(|mut request| {
            request.options.seed.get_or_insert_with(|| if has_own { random_seed() } else { seed });
            // Alternatives cost time, the token's own log-probability next to none.
            request.options.top_logprobs.get_or_insert(0);
            // The sum is over the output, in chat and in completions.
            request.options.records_stop_token = false;
            request
        });
        Ok(Self { name, index, shared, user: user.ok().flatten(), request })
    }

    /// The error under the name that the field has in the comparison: `arms[i].field`, or the shared field's own.
    pub fn placed(&self, error: ApiError) -> ApiError {
        let part = format!("arm {:?}", self.name);
        let place = match error.param() {
            None => format!("arms[{}]", self.index),
            Some(param) => {
                let field = param.split(['.', '[']).next().unwrap_or(param);
                let is_shared = self.shared.iter().any(|shared| shared == field);
                if is_shared { param.to_owned() } else { format!("arms[{}].{param}", self.index) }
            }
        };
        error.of_part(&part, &place)
    }
}

/// The fields of the arm's plain request, and the names of those that are shared.
fn overlay(shared: &Fields, own: &Map<String, Value>) -> (Vec<String>, Fields) {
    let is_replaced = |field: &str| {
        let mut alternatives = ALTERNATIVES.iter().filter(|names| names.contains(&field));
        own.contains_key(field) || alternatives.any(|names| names.iter().any(|name| own.contains_key(*name)))
    };
    let of_arm = |(field, _): &(&String, &Value)| !OF_COMPARISON.contains(&field.as_str()) && *field != "name";
    let shared = shared.iter().filter(of_arm).filter(|(field, _)| !is_replaced(field));
    let fields: Map<_, _> =
        shared.clone().chain(own.iter().filter(of_arm)).map(|(f, v)| (f.clone(), v.clone())).collect();
    (shared.map(|(field, _)| field.clone()).collect(), Fields::from(fields))
}

/// The plain request: of the chat interface where there are messages, else of completions.
fn parse_request(fields: &Fields) -> Result<GenerationRequest, ApiError> {
    let request = match (fields.get("messages"), fields.get("prompt")) {
        (Some(_), Some(_)) => {
            return Err(ApiError::invalid("messages", "`messages` cannot be combined with `prompt`: leave one out"));
        }
        (None, None) => return Err(ApiError::invalid("prompt", "`prompt` or `messages` is required")),
        (Some(_), None) => ChatShape::parse(fields)?,
        (None, Some(_)) => CompletionShape::parse(fields)?,
    };
    if request.prompts.len() != 1 {
        return Err(ApiError::invalid("prompt", format!("an arm has one `prompt`, not {}", request.prompts.len())));
    }
    if request.options.num_choices != 1 {
        return Err(ApiError::invalid("n", "an arm has one choice: leave `n` out, or make more arms"));
    }
    if request.options.echo {
        return Err(ApiError::invalid("echo", "`echo` is not for comparisons: leave it out"));
    }
    if request.options.tools.is_some() {
        return Err(ApiError::invalid("tools", "an arm calls no `tools`: leave them out"));
    }
    Ok(request)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::generation::Prompt;

    fn parse(body: Value) -> Result<CompareRequest, ApiError> {
        CompareRequest::parse(&Fields::parse(body.to_string().as_bytes()).unwrap())
    }

    fn param(error: ApiError) -> Value {
        serde_json::to_value(error.into_envelope()).unwrap()["error"]["param"].clone()
    }

    #[test]
    fn an_arm_is_the_shared_request_with_its_own_fields_over_it() {
        let body = json!({"prompt": "p", "max_tokens": 5, "temperature": 0.5, "adapter": "x", "seed": 9, "stop": "s",
        "arms": [
            {"name": "a"},
            {"name": "b", "max_completion_tokens": 7, "adapters": [], "temperature": null, "seed": 1, "stop": null},
            {"name": "c", "messages": [{"role": "user", "content": "q"}], "max_tokens": 7},
        ]});
        let compared = parse(body).unwrap();
        let requests: Vec<_> = compared.arms.iter().map(|arm| arm.request.as_ref().unwrap()).collect();
        let [a, b, c] = requests[..] else { panic!("three arms") };
        assert_eq!((a.options.max_tokens, a.options.temperature, a.options.seed), (Some(5), Some(0.5), Some(9)));
        assert_eq!((a.prompts.as_slice(), a.options.stop.len()), ([Prompt::Text("p".into())].as_slice(), 1));
        assert_eq!(a.selection.adapters.as_ref().unwrap().entries.len(), 1);
        assert_eq!((b.options.max_tokens, b.options.temperature, b.options.seed), (Some(7), None, Some(1)));
        assert_eq!((b.options.stop.len(), b.selection.adapters.as_ref().unwrap().entries.len()), (0, 0));
        assert!(matches!(c.prompts.as_slice(), [Prompt::Chat(_)]));
        assert_eq!(c.options.max_tokens, Some(7));
        assert!([a, b, c].iter().all(|request| request.options.top_logprobs == Some(0)));
    }

    #[test]
    fn a_seed_that_is_to_be_drawn_is_the_arms_own() {
        let arms = json!([{"name": "a"}, {"name": "b", "seed": -1}, {"name": "c", "random_seed": 3}]);
        let compared = parse(json!({"prompt": "p", "seed": 9, "arms": arms})).unwrap();
        let seeds: Vec<_> = compared.arms.iter().map(|arm| arm.request.as_ref().unwrap().options.seed).collect();
        assert_eq!((seeds[0], seeds[2]), (Some(9), Some(3)));
        assert!(seeds[1].is_some() && seeds[1] != Some(9) && seeds[1] != Some(-1), "{seeds:?}");
        let drawn = parse(json!({"prompt": "p", "seed": -1, "arms": [{"name": "a"}, {"name": "b"}]})).unwrap();
        assert_ne!(drawn.seed, -1);
    }

    #[test]
    fn what_is_wrong_with_the_comparison_is_named_and_refuses_it() {
        let two = json!([{"name": "a"}, {"name": "b"}]);
        for (body, place) in [
            (json!({"prompt": "p"}), "arms"),
            (json!({"prompt": "p", "arms": {}}), "arms"),
            (json!({"prompt": "p", "arms": [{"name": "a"}]}), "arms"),
            (
                json!({"prompt": "p", "arms": (0..17).map(|i| json!({"name": i.to_string()})).collect::<Vec<_>>()}),
                "arms",
            ),
            (json!({"prompt": "p", "arms": [{"name": "a"}, "b"]}), "arms[1]"),
            (json!({"prompt": "p", "arms": [{"name": "a"}, {}]}), "arms[1].name"),
            (json!({"prompt": "p", "arms": [{"name": ""}, {"name": "b"}]}), "arms[0].name"),
            (json!({"prompt": "p", "arms": [{"name": "a"}, {"name": 1}]}), "arms[1].name"),
            (json!({"prompt": "p", "arms": [{"name": "a"}, {"name": "a"}]}), "arms[1].name"),
            (json!({"prompt": "p", "arms": [{"name": "a"}, {"name": "b", "on_error": "skip"}]}), "arms[1].on_error"),
            (json!({"prompt": "p", "arms": [{"name": "a", "stream": true}, {"name": "b"}]}), "arms[0].stream"),
            (json!({"prompt": "p", "arms": [{"name": "a"}, {"name": "b", "arms": []}]}), "arms[1].arms"),
            (json!({"prompt": "p", "arms": two, "on_error": "ignore"}), "on_error"),
            (json!({"prompt": "p", "arms": two, "stream": 1}), "stream"),
            (json!({"prompt": "p", "arms": two, "seed": "x"}), "seed"),
        ] {
            assert_eq!(param(parse(body.clone()).unwrap_err()), place, "{body}");
        }
    }

    #[test]
    fn what_is_wrong_with_an_arm_is_named_where_it_was_written() {
        for (shared, own, place) in [
            (json!({"prompt": "p"}), json!({"temperature": 9}), "arms[1].temperature"),
            (json!({"prompt": "p", "temperature": 9}), json!({}), "temperature"),
            (json!({"prompt": "p"}), json!({"adapters": [{"scale": 1}]}), "arms[1].adapters[0].name"),
            (json!({"prompt": "p"}), json!({"adapter": "x", "lora": []}), "arms[1].adapter"),
            (json!({"prompt": "p"}), json!({"messages": 1}), "arms[1].messages"),
            (json!({"prompt": "p"}), json!({"prompt": ["a", "b"]}), "arms[1].prompt"),
            (json!({"prompt": "p", "messages": []}), json!({}), "messages"),
            (json!({}), json!({}), "arms[1].prompt"),
            (json!({"prompt": "p"}), json!({"n": 2}), "arms[1].n"),
            (json!({"prompt": "p", "echo": true}), json!({}), "echo"),
            (json!({"prompt": "p", "grammar": 1}), json!({}), "grammar"),
            (json!({"prompt": "p"}), json!({"user": 1}), "arms[1].user"),
            (json!({"prompt": "p"}), json!({"guided_json": 1}), "arms[1].guided_json"),
        ] {
            let (mut body, mut own) = (shared, own);
            own["name"] = json!("b");
            body["arms"] = json!([{"name": "a"}, own]);
            let compared = parse(body.clone()).unwrap();
            let arm = &compared.arms[1];
            let error = arm.placed(arm.request.clone().unwrap_err());
            let message = serde_json::to_value(error.clone().into_envelope()).unwrap()["error"]["message"].to_string();
            assert!(message.starts_with("\"arm \\\"b\\\": "), "{message}");
            assert_eq!(param(error), place, "{body}");
        }
    }
}
