//! `priority`: how urgent a request is beside others of the same key. Each route has its own where the request says
//! nothing: somebody who types waits for a completion, somebody who reads for a chat.

use serde_json::Value;

use super::error::ApiError;
use super::fields::{Fields, wrong_type};
use crate::engine::fairness::{Account, Priority};

/// By name, or by number as in vLLM, where less is more urgent and 0 is what the route gives.
pub fn parse_priority(fields: &Fields, of_route: Priority) -> Result<Account, ApiError> {
    let priority = match fields.get("priority") {
        None => of_route,
        Some(Value::String(name)) => {
            Priority::ALL.into_iter().find(|priority| priority.name() == name).ok_or_else(|| {
                let names = Priority::ALL.map(Priority::name).join(", ");
                ApiError::invalid("priority", format!("`priority` is `{name:.80}`, not one of {names}"))
            })?
        }
        Some(Value::Number(_)) => match fields.integer("priority", i64::MIN..=i64::MAX)? {
            Some(..=-1) => Priority::Completion,
            None | Some(0) => of_route,
            Some(1..) => Priority::Batch,
        },
        Some(other) => return Err(wrong_type("priority", "a name or an integer", other)),
    };
    Ok(Account { priority, ..Account::default() })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(value: Value) -> Result<Priority, ApiError> {
        let fields = Fields::parse(json!({"priority": value}).to_string().as_bytes()).unwrap();
        parse_priority(&fields, Priority::Chat).map(|account| account.priority)
    }

    #[test]
    fn a_name_or_a_number_says_more_than_the_route() {
        for (value, priority) in [
            (json!(null), Priority::Chat),
            (json!(0), Priority::Chat),
            (json!("completion"), Priority::Completion),
            (json!("batch"), Priority::Batch),
            (json!(-3), Priority::Completion),
            (json!(10), Priority::Batch),
        ] {
            assert_eq!(parse(value.clone()), Ok(priority), "{value}");
        }
        for value in [json!("high"), json!(""), json!(1.5), json!([]), json!(true)] {
            assert_eq!(parse(value.clone()).unwrap_err().param(), Some("priority"), "{value}");
        }
    }
}
