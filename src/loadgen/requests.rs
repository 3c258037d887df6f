//! Files of requests: JSON lines, with times as a trace and without as a mix, and the CSV of Azure's public traces.

use std::fs;
use std::path::Path;
use std::time::Duration;

use chrono::NaiveDateTime;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::LoadgenError;
use super::workload::{Ask, COMPLETIONS, Destination, MAX_PROMPT_TOKENS};

/// Azure's times: a date, and seconds with as many digits as there are.
const TIMESTAMP: &str = "%Y-%m-%d %H:%M:%S%.f";
const CSV_TITLES: &str = "TIMESTAMP,ContextTokens,GeneratedTokens";

/// One line. Of `body`, `prompt` and `prompt_tokens` it has one.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    /// Seconds from the start.
    at: Option<f64>,
    path: Option<String>,
    body: Option<Map<String, Value>>,
    prompt: Option<String>,
    prompt_tokens: Option<usize>,
    model: Option<String>,
    max_tokens: Option<usize>,
}

impl Line {
    /// `index` is that of the line.
    fn ask(self, index: usize, destination: &Destination) -> Result<Ask, String> {
        let path = self.path.as_deref();
        let max_tokens = self.max_tokens.ok_or("`max_tokens` is missing");
        match (self.body, self.prompt, self.prompt_tokens) {
            (Some(body), None, None) => {
                if self.model.is_some() || self.max_tokens.is_some() {
                    return Err("`model` and `max_tokens` go into the `body` where there is one".to_owned());
                }
                destination.target(path.unwrap_or(COMPLETIONS), body).map(Ask::Given)
            }
            (None, Some(prompt), None) => {
                let mut body = Map::from_iter([("prompt".to_owned(), prompt.into())]);
                body.insert("max_tokens".to_owned(), max_tokens?.into());
                let model = self.model.or_else(|| destination.model(index));
                body.extend(model.map(|model| ("model".to_owned(), model.into())));
                destination.target(path.unwrap_or(COMPLETIONS), body).map(Ask::Given)
            }
            (None, None, Some(prompt_tokens)) if path.is_none() => {
                if prompt_tokens > MAX_PROMPT_TOKENS {
                    return Err(format!("`prompt_tokens` must be at most {MAX_PROMPT_TOKENS}"));
                }
                let model = self.model.or_else(|| destination.model(index));
                Ok(Ask::Sized { model, prompt_tokens, max_tokens: max_tokens? })
            }
            (None, None, Some(_)) => Err("`path` goes with a `body` or a `prompt`".to_owned()),
            _ => Err("it must have one of `body`, `prompt` and `prompt_tokens`".to_owned()),
        }
    }
}

/// Requests without times, to be sent in turn; at least one.
///
/// # Errors
/// A file that cannot be read or has no request, and a line that is none.
pub fn read_mix(path: &Path, destination: &Destination) -> Result<Vec<Ask>, LoadgenError> {
    read(path, |text| {
        json_lines(text, |index, line| match line.at {
            Some(_) => Err("`at` belongs to a trace: replay it with --trace".to_owned()),
            None => line.ask(index, destination),
        })
    })
}

/// Requests with their offsets from the start, in order; at least one.
///
/// # Errors
/// As of [`read_mix`].
pub fn read_trace(path: &Path, destination: &Destination) -> Result<Vec<(Duration, Ask)>, LoadgenError> {
    let mut requests = read(path, |text| match text.starts_with(CSV_TITLES) {
        true => csv_lines(text, destination),
        false => json_lines(text, |index, line| {
            let at = line.at.ok_or("`at` is missing: seconds from the start")?;
            let at = Duration::try_from_secs_f64(at).map_err(|cause| format!("`at`: {cause}"))?;
            Ok((at, line.ask(index, destination)?))
        }),
    })?;
    requests.sort_by_key(|&(at, _)| at);
    Ok(requests)
}

fn read<T>(path: &Path, parse: impl FnOnce(&str) -> Result<Vec<T>, (usize, String)>) -> Result<Vec<T>, LoadgenError> {
    let file = path.display().to_string();
    let text = fs::read_to_string(path).map_err(|source| LoadgenError::File { file: file.clone(), source })?;
    let requests =
        parse(&text).map_err(|(index, cause)| LoadgenError::Line { file: file.clone(), number: index + 1, cause })?;
    if requests.is_empty() { Err(LoadgenError::Empty { file }) } else { Ok(requests) }
}

/// Empty lines are passed over. An error has the index of its line.
fn json_lines<T>(
    text: &str,
    mut parse: impl FnMut(usize, Line) -> Result<T, String>,
) -> Result<Vec<T>, (usize, String)> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let parsed = lines.map(|(index, line)| {
        let line = serde_json::from_str(line).map_err(|cause| (index, cause.to_string()))?;
        parse(index, line).map_err(|cause| (index, cause))
    });
    parsed.collect()
}

/// Times count from the earliest.
fn csv_lines(text: &str, destination: &Destination) -> Result<Vec<(Duration, Ask)>, (usize, String)> {
    let mut rows = Vec::new();
    for (index, line) in text.lines().enumerate().skip(1).filter(|(_, line)| !line.trim().is_empty()) {
        let row = csv_row(line).filter(|row| row.1 <= MAX_PROMPT_TOKENS);
        let row =
            row.ok_or_else(|| (index, format!("`{line}` is not {CSV_TITLES} of at most {MAX_PROMPT_TOKENS} tokens")))?;
        rows.push(row);
    }
    let start = rows.iter().map(|row| row.0).min().unwrap_or_default();
    let requests = rows.into_iter().enumerate().map(|(index, (time, prompt_tokens, max_tokens))| {
        let at = (time - start).to_std().unwrap_or_default();
        (at, Ask::Sized { model: destination.model(index), prompt_tokens, max_tokens })
    });
    Ok(requests.collect())
}

fn csv_row(line: &str) -> Option<(NaiveDateTime, usize, usize)> {
    let mut cells = line.trim().split(',');
    let time = NaiveDateTime::parse_from_str(cells.next()?, TIMESTAMP).ok()?;
    let row = (time, cells.next()?.parse().ok()?, cells.next()?.parse().ok()?);
    cells.next().is_none().then_some(row)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use serde_json::json;

    use super::*;
    use crate::terminal::ServerArgs;

    fn destination() -> Destination {
        Destination::new(&ServerArgs { url: "http://host:1/".to_owned(), api_key: None }, &["default".to_owned()])
            .unwrap()
    }

    fn file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    fn trace(text: &str) -> Result<Vec<(Duration, Ask)>, String> {
        read_trace(file(text).path(), &destination()).map_err(|error| error.to_string())
    }

    fn sized(model: &str, prompt_tokens: usize, max_tokens: usize) -> Ask {
        Ask::Sized { model: Some(model.to_owned()), prompt_tokens, max_tokens }
    }

    #[test]
    fn a_trace_has_bodies_prompts_and_lengths_in_the_order_of_their_times() {
        let text = [
            json!({"at": 2.5, "prompt_tokens": 30, "max_tokens": 4, "model": "a"}).to_string(),
            String::new(),
            json!({"at": 0.5, "path": "/v1/chat/completions", "body": {"messages": [], "model": "b"}}).to_string(),
            json!({"at": 1, "prompt": "x", "max_tokens": 3}).to_string(),
        ];
        let requests = trace(&text.join("\n")).unwrap();
        let times: Vec<_> = requests.iter().map(|(at, _)| at.as_secs_f64()).collect();
        assert_eq!(times, [0.5, 1.0, 2.5]);
        let sent = |index: usize| {
            let target = destination().make(&requests[index].1, 0, 0);
            (target.uri.to_string(), serde_json::from_slice(&target.body).unwrap())
        };
        let usage = json!({"include_usage": true});
        let chat = json!({"messages": [], "model": "b", "stream": true, "stream_options": usage});
        assert_eq!(sent(0), ("http://host:1/v1/chat/completions".to_owned(), chat));
        let completion =
            json!({"prompt": "x", "max_tokens": 3, "model": "default", "stream": true, "stream_options": usage});
        assert_eq!(sent(1), ("http://host:1/v1/completions".to_owned(), completion));
        assert_eq!(requests[2].1, sized("a", 30, 4));
    }

    #[test]
    fn a_csv_of_azure_counts_from_its_earliest_time() {
        let text = format!(
            "{CSV_TITLES}\r\n2023-11-16 18:17:03.9799600,4808,10\r\n2023-11-16 18:17:02.4799600,110,27\r\n2023-11-17 18:17:02.5,1,2"
        );
        let day = Duration::from_secs(86_400);
        let expected = vec![
            (Duration::ZERO, sized("default", 110, 27)),
            (Duration::from_millis(1500), sized("default", 4808, 10)),
            (day + Duration::from_nanos(20_040_000), sized("default", 1, 2)),
        ];
        assert_eq!(trace(&text), Ok(expected));
    }

    #[test]
    fn a_bad_line_is_named_with_its_number_and_its_field() {
        let good = r#"{"at": 0, "prompt": "x", "max_tokens": 1}"#;
        for (bad, cause) in [
            (r#"{"prompt": "x", "max_tokens": 1}"#, "`at` is missing"),
            (r#"{"at": -1, "prompt": "x", "max_tokens": 1}"#, "`at`"),
            (r#"{"at": 1, "prompt": "x"}"#, "`max_tokens` is missing"),
            (r#"{"at": 1}"#, "one of `body`, `prompt` and `prompt_tokens`"),
            (r#"{"at": 1, "prompt": "x", "prompt_tokens": 1, "max_tokens": 1}"#, "one of `body`"),
            (r#"{"at": 1, "body": {}, "max_tokens": 1}"#, "`max_tokens` go into the `body`"),
            (r#"{"at": 1, "body": {"stream": false}}"#, "`stream`"),
            (r#"{"at": 1, "body": {}, "path": "v1"}"#, "`path` must begin with a slash"),
            (r#"{"at": 1, "path": "/v1", "prompt_tokens": 1, "max_tokens": 1}"#, "`path` goes with"),
            (r#"{"at": 1, "promt": "x"}"#, "promt"),
            (r#"{"at": 1, "prompt_tokens": 10000001, "max_tokens": 1}"#, "`prompt_tokens` must be at most"),
            ("{", "EOF"),
        ] {
            let error = trace(&format!("{good}\n\n{bad}\n")).unwrap_err();
            assert!(error.contains("line 3") && error.contains(cause), "{bad}: {error}");
        }
        let error = trace(&format!("{CSV_TITLES}\n2023-11-16 18:17:03.97,4808")).unwrap_err();
        assert!(error.contains("line 2"), "{error}");
    }

    #[test]
    fn a_mix_has_no_times_and_neither_file_may_be_empty() {
        let mix = |text: &str| read_mix(file(text).path(), &destination()).map_err(|error| error.to_string());
        assert_eq!(mix(r#"{"prompt_tokens": 5, "max_tokens": 2, "model": "a"}"#), Ok(vec![sized("a", 5, 2)]));
        assert!(mix(r#"{"at": 0, "prompt_tokens": 5, "max_tokens": 2}"#).unwrap_err().contains("--trace"));
        assert!(mix("\n").unwrap_err().contains("no request"));
        assert!(trace(CSV_TITLES).unwrap_err().contains("no request"));
    }
}
