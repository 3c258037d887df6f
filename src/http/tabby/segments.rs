//! What surrounds an editor's cursor, as a gap to fill.

use serde_json::{Map, Value};

use crate::generation::{ContextFile, GenerationRequest};
use crate::http::completions::CompletionShape;
use crate::http::error::ApiError;
use crate::http::fields::{Fields, wrong_type};
use crate::http::gap::{ItemFields, context_files, set_context, text};
use crate::http::reply::ReplyShape;
use crate::http::sampling::{LENGTH_NAMES, STOP_NAMES, set_default};
use crate::http::sent_as::SentAs;

/// As in Tabby.
const MAX_TOKENS: usize = 64;
const TEMPERATURE: f64 = 0.1;
/// What completes code ends with the paragraph.
const STOP: &str = "\n\n";

/// What is said of a request beside its text; all else is read like any completion's.
const OWN: [&str; 4] = ["language", "segments", "mode", "debug_options"];
/// From what matters least at the cursor to what matters most.
pub const SNIPPETS: [&str; 3] =
    ["relevant_snippets_from_recently_opened_files", "declarations", "relevant_snippets_from_changed_files"];
const SNIPPET: ItemFields = ItemFields { name: "filepath", text: "body", unnamed: "snippet" };

/// And where its fields came from.
pub fn read(fields: &Fields) -> Result<(GenerationRequest, SentAs), ApiError> {
    fields.string("language")?;
    if fields.string("mode")?.is_some_and(|mode| mode != "standard") {
        return Err(ApiError::invalid("mode", "`mode` must be `standard`: next edits are not served here"));
    }
    if fields
        .object("debug_options")?
        .is_some_and(|options| options.get("raw_prompt").is_some_and(|raw| !raw.is_null()))
    {
        let message = "`debug_options.raw_prompt` is not served: send it as `prompt`, without `segments`";
        return Err(ApiError::invalid("debug_options", message));
    }
    if fields.boolean("stream")?.unwrap_or(false) {
        return Err(ApiError::invalid("stream", "`stream` must be false: a completion of `segments` comes whole"));
    }
    let Some(segments) = fields.object("segments")? else {
        return Err(ApiError::invalid("segments", "`segments` is required"));
    };
    let prefix = text(segments, "segments", "prefix")?
        .ok_or_else(|| ApiError::invalid("segments.prefix", "`segments.prefix` is required"))?;
    let suffix = text(segments, "segments", "suffix")?.unwrap_or_default();
    let mut completion = fields.without(&OWN);
    let mut sent_as = SentAs::default();
    sent_as.set(&mut completion, "prompt", "segments.prefix", prefix.into())?;
    sent_as.set(&mut completion, "suffix", "segments.suffix", suffix.into())?;
    set_default(&mut completion, &LENGTH_NAMES, "max_tokens", MAX_TOKENS.into());
    set_default(&mut completion, &["temperature"], "temperature", TEMPERATURE.into());
    set_default(&mut completion, &STOP_NAMES, "stop", STOP.into());
    let mut request = CompletionShape::parse(&completion.into()).map_err(|error| sent_as.word(error))?;
    let indent = indent_of_last_line(prefix);
    request.options.min_indent = request.options.min_indent.max(indent);
    set_context(&mut request, &files(segments)?);
    Ok((request, sent_as))
}

/// A line that leaves the block of the cursor belongs to what is there already.
fn indent_of_last_line(prefix: &str) -> usize {
    let line = prefix.rsplit('\n').next().unwrap_or_default();
    line.len() - line.trim_start_matches([' ', '\t']).len()
}

fn files(segments: &Map<String, Value>) -> Result<Vec<ContextFile>, ApiError> {
    let mut files = Vec::new();
    if let Some(clipboard) = text(segments, "segments", "clipboard")?.filter(|clipboard| !clipboard.is_empty()) {
        files.push(ContextFile { name: "clipboard".to_owned(), text: clipboard.to_owned() });
    }
    for name in SNIPPETS {
        let at = format!("segments.{name}");
        let snippets = match segments.get(name) {
            None | Some(Value::Null) => continue,
            Some(Value::Array(snippets)) => snippets,
            Some(other) => return Err(wrong_type(&at, "an array", other)),
        };
        // The most relevant comes first.
        files.extend(context_files(&at, snippets, &SNIPPET)?.into_iter().rev());
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::generation::Prompt;

    fn parse(body: Value) -> Result<GenerationRequest, ApiError> {
        read(&Fields::parse(body.to_string().as_bytes())?).map(|(request, _)| request)
    }

    #[test]
    fn segments_are_a_gap_with_the_most_relevant_snippet_next_to_it() {
        let segments = json!({"prefix": "def f():\n    ", "suffix": "\n", "filepath": "f.py", "git_url": null,
            "declarations": [{"filepath": "a.py", "body": "A"}, {"filepath": "b.py", "body": "B"}],
            "relevant_snippets_from_changed_files": [{"filepath": "c.py", "body": "C", "score": 0.5}],
            "clipboard": "D"});
        let request = parse(json!({"language": "python", "segments": segments, "user": "ann"})).unwrap();
        let [Prompt::FillInMiddle { files, prefix, suffix }] = &request.prompts[..] else { panic!("one gap") };
        assert_eq!((prefix.as_str(), suffix.as_str()), ("def f():\n    ", "\n"));
        assert_eq!(files.iter().map(|file| file.text.as_str()).collect::<String>(), "DBAC");
        let options = request.options;
        assert_eq!((options.max_tokens, options.temperature, options.min_indent), (Some(64), Some(0.1), 4));
        assert_eq!(options.stop, ["\n\n"]);
    }

    #[test]
    fn what_is_asked_for_wins_over_what_tabby_would_do() {
        let body = json!({"segments": {"prefix": "a"}, "temperature": 0.7, "seed": 3, "max_tokens": 8, "stop": [";"]});
        let options = parse(body).unwrap().options;
        assert_eq!((options.max_tokens, options.temperature, options.seed), (Some(8), Some(0.7), Some(3)));
        assert_eq!((options.stop, options.min_indent), (vec![";".to_owned()], 0));
    }

    #[test]
    fn what_says_nothing_leaves_what_tabby_would_do_and_other_names_say_as_much() {
        let nothing = json!({"segments": {"prefix": "a"}, "temperature": null, "max_tokens": null, "stop": null});
        let options = parse(nothing).unwrap().options;
        assert_eq!((options.max_tokens, options.temperature), (Some(MAX_TOKENS), Some(0.1)));
        assert_eq!(options.stop, [STOP]);
        for name in LENGTH_NAMES {
            assert_eq!(
                parse(json!({"segments": {"prefix": "a"}, name: 8})).unwrap().options.max_tokens,
                Some(8),
                "{name}"
            );
        }
        for stops in [json!([";"]), json!([])] {
            let options = parse(json!({"segments": {"prefix": "a"}, "stop_sequences": stops})).unwrap().options;
            assert_eq!(json!(options.stop), stops);
        }
    }

    #[test]
    fn what_cannot_be_read_is_refused_by_its_field() {
        for (body, param) in [
            (json!({"segments": {}}), "segments.prefix"),
            (json!({"segments": {"prefix": "a"}, "stream": true}), "stream"),
            (json!({"segments": {"prefix": "a"}, "n": 1.5}), "n"),
            (json!({"segments": {"prefix": 1}}), "segments.prefix"),
            (json!({"segments": []}), "segments"),
            (json!({"segments": {"prefix": "a", "suffix": 1}}), "segments.suffix"),
            (json!({"segments": {"prefix": "a", "clipboard": 1}}), "segments.clipboard"),
            (json!({"segments": {"prefix": "a", "declarations": {}}}), "segments.declarations"),
            (json!({"segments": {"prefix": "a", "declarations": [1]}}), "segments.declarations[0]"),
            (json!({"segments": {"prefix": "a", "declarations": [{"body": 1}]}}), "segments.declarations[0].body"),
            (json!({"segments": {"prefix": "a"}, "mode": "next_edit_suggestion"}), "mode"),
            (json!({"segments": {"prefix": "a"}, "debug_options": {"raw_prompt": "x"}}), "debug_options"),
            (json!({"segments": {"prefix": "a"}, "language": 1}), "language"),
        ] {
            assert_eq!(parse(body.clone()).unwrap_err().param(), Some(param), "{body}");
        }
    }
}
