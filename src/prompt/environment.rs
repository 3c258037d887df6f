//! The environment that Hugging Face renders chat templates in: what minijinja does not have of it, or has otherwise.

use std::fmt::Write as _;
use std::io::{self, Write};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use regex::{Captures, Regex};
use serde::Serialize;
use serde_json::ser::{Formatter, Serializer};

/// With one template, under `name`.
pub fn with_template(name: &'static str, source: &str) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(|out, state, value| match text_with_floats(value) {
        Some(text) => out.write_str(&text).map_err(Error::from),
        None => minijinja::escape_formatter(out, state, value),
    });
    environment.add_filter("string", string);
    environment.add_filter("tojson", to_json);
    environment.add_filter("truncate", truncate);
    environment.add_test("iterable", is_iterable);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_template_owned(name, without_training_marks(source))?;
    Ok(environment)
}

/// Hugging Face's `{% generation %}` marks what is trained on, and renders as what is in it.
fn without_training_marks(source: &str) -> String {
    let mark = Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").expect("a literal that is tested");
    let replace = |found: &Captures<'_>| {
        let statement = if found.get(2).is_some() { "endif" } else { "if true" };
        format!("{{%{} {statement} {}%}}", &found[1], &found[3])
    };
    mark.replace_all(source, replace).into_owned()
}

/// Python's `None` is not.
fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

fn raise_exception(message: String) -> Result<String, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// Local time by a `strftime` format.
fn strftime_now(format: &str) -> Result<String, Error> {
    let mut text = String::new();
    write!(text, "{}", chrono::Local::now().format(format))
        .map_err(|_| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: bad format {format:?}")))?;
    Ok(text)
}

fn string(state: &State, value: &Value) -> Result<Value, Error> {
    text_with_floats(value).map_or_else(|| minijinja::filters::string(state, value), |text| Ok(Value::from(text)))
}

/// As Python prints it, where something in it is a number that minijinja prints otherwise.
fn text_with_floats(value: &Value) -> Option<String> {
    match value.kind() {
        ValueKind::Number if !value.is_integer() => {
            let text = python_float(f64::try_from(value.clone()).ok()?);
            text.contains('e').then_some(text)
        }
        ValueKind::Seq => {
            let items: Vec<_> = value.try_iter().ok()?.map(|item| (text_with_floats(&item), item)).collect();
            items.iter().any(|(text, _)| text.is_some()).then_some(())?;
            let items: Vec<_> =
                items.into_iter().map(|(text, item)| text.unwrap_or_else(|| format!("{item:?}"))).collect();
            Some(format!("[{}]", items.join(", ")))
        }
        ValueKind::Map => {
            let fields = value.try_iter().ok()?.map(|key| {
                let field = value.get_item(&key).unwrap_or_default();
                (format!("{key:?}"), text_with_floats(&field), field)
            });
            let fields: Vec<_> = fields.collect();
            fields.iter().any(|(_, text, _)| text.is_some()).then_some(())?;
            let fields = fields
                .into_iter()
                .map(|(key, text, field)| format!("{key}: {}", text.unwrap_or_else(|| format!("{field:?}"))));
            Some(format!("{{{}}}", fields.collect::<Vec<_>>().join(", ")))
        }
        _ => None,
    }
}

/// Python's `json.dumps`, with the options that Hugging Face's `tojson` hands on. Nothing is escaped for HTML.
fn to_json(value: &Value, ensure_ascii: Option<bool>, options: Kwargs) -> Result<String, Error> {
    let ensure_ascii = ensure_ascii.or(options.get("ensure_ascii")?).unwrap_or(false);
    let indent = options.get::<Option<usize>>("indent")?;
    let separators = options.get::<Option<Vec<String>>>("separators")?;
    let sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    options.assert_all_used()?;
    let (item_separator, key_separator) = match separators.as_deref() {
        Some([item, key]) => (item.as_str(), key.as_str()),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "tojson: separators are two")),
        None => (if indent.is_some() { "," } else { ", " }, ": "),
    };
    let style = PythonJson { indent, item_separator, key_separator, ensure_ascii, depth: 0, is_empty: true };
    let mut json = Vec::new();
    let mut serializer = Serializer::with_formatter(&mut json, style);
    let written = if sort_keys {
        serde_json::to_value(value).map(sorted).and_then(|value| value.serialize(&mut serializer))
    } else {
        value.serialize(&mut serializer)
    };
    let refused = |cause: &dyn std::fmt::Display| Error::new(ErrorKind::BadSerialization, format!("tojson: {cause}"));
    written.map_err(|cause| refused(&cause))?;
    String::from_utf8(json).map_err(|cause| refused(&cause))
}

/// As Jinja has it: a text that is longer, by more than a few characters, loses its end, and the word that is cut.
fn truncate(
    text: &str,
    length: Option<usize>,
    kills_words: Option<bool>,
    end: Option<String>,
    options: Kwargs,
) -> Result<String, Error> {
    let length = length.or(options.get("length")?).unwrap_or(255);
    let kills_words = kills_words.or(options.get("killwords")?).unwrap_or(false);
    let end = end.or(options.get("end")?).unwrap_or_else(|| "...".to_owned());
    let leeway = options.get::<Option<usize>>("leeway")?.unwrap_or(5);
    options.assert_all_used()?;
    let too_short = || Error::new(ErrorKind::InvalidOperation, format!("truncate: {length} has no room for {end:?}"));
    let num_kept = length.checked_sub(end.chars().count()).ok_or_else(too_short)?;
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(text.to_owned());
    }
    let kept: String = text.chars().take(num_kept).collect();
    let words = kept.rsplit_once(' ').filter(|_| !kills_words).map_or(&*kept, |(words, _)| words);
    Ok(format!("{words}{end}"))
}

fn sorted(value: serde_json::Value) -> serde_json::Value {
    match value {
        serde_json::Value::Array(items) => items.into_iter().map(sorted).collect(),
        serde_json::Value::Object(map) => {
            let mut pairs: Vec<_> = map.into_iter().map(|(key, value)| (key, sorted(value))).collect();
            pairs.sort_by(|(a, _), (b, _)| a.cmp(b));
            serde_json::Value::Object(pairs.into_iter().collect())
        }
        other => other,
    }
}

/// How Python writes JSON.
struct PythonJson<'a> {
    /// Spaces for each level, on lines of their own.
    indent: Option<usize>,
    item_separator: &'a str,
    key_separator: &'a str,
    ensure_ascii: bool,
    depth: usize,
    /// Whether nothing stands in what was opened last.
    is_empty: bool,
}

impl PythonJson<'_> {
    fn new_line<W: ?Sized + Write>(&self, writer: &mut W) -> io::Result<()> {
        match self.indent {
            Some(indent) => write!(writer, "\n{:width$}", "", width = indent * self.depth),
            None => Ok(()),
        }
    }

    fn open<W: ?Sized + Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.is_empty = true;
        writer.write_all(bracket)
    }

    fn item<W: ?Sized + Write>(&mut self, writer: &mut W, is_first: bool) -> io::Result<()> {
        if !is_first {
            writer.write_all(self.item_separator.as_bytes())?;
        }
        self.new_line(writer)
    }

    fn close<W: ?Sized + Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if !self.is_empty {
            self.new_line(writer)?;
        }
        self.is_empty = false;
        writer.write_all(bracket)
    }
}

impl Formatter for PythonJson<'_> {
    fn begin_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"[")
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, is_first: bool) -> io::Result<()> {
        self.item(writer, is_first)
    }

    fn end_array_value<W: ?Sized + Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.is_empty = false;
        Ok(())
    }

    fn end_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"]")
    }

    fn begin_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"{")
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, is_first: bool) -> io::Result<()> {
        self.item(writer, is_first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.key_separator.as_bytes())
    }

    fn end_object_value<W: ?Sized + Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.is_empty = false;
        Ok(())
    }

    fn end_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"}")
    }

    fn write_string_fragment<W: ?Sized + Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        if !self.ensure_ascii {
            return writer.write_all(fragment.as_bytes());
        }
        for unit in fragment.encode_utf16() {
            match u8::try_from(unit) {
                Ok(byte) if byte.is_ascii() => writer.write_all(&[byte])?,
                _ => write!(writer, "\\u{unit:04x}")?,
            }
        }
        Ok(())
    }

    fn write_f64<W: ?Sized + Write>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        writer.write_all(python_float(value).as_bytes())
    }
}

/// Python's `repr` of a finite number: the fewest digits that mean it, with an exponent below 1e-4 and from 1e16 on.
fn python_float(value: f64) -> String {
    let scientific = format!("{value:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(exponent) if !(-4..16).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{mantissa}e{sign}{:02}", exponent.abs())
        }
        _ => format!("{value:?}"),
    }
}

#[cfg(test)]
mod tests {
    use minijinja::context;
    use minijinja::value::Serde;
    use serde_json::json;

    use super::*;

    fn render(source: &str, value: &serde_json::Value) -> Result<String, Error> {
        let environment = with_template("test", source)?;
        environment.get_template("test")?.render(context! { value => Serde(value) })
    }

    /// What `json.dumps` of Python 3.11 gives.
    #[test]
    fn tojson_writes_as_python_does() {
        let value =
            json!({"z": ["<a href='x'>&\n\"\\u003c é🚚\u{7f}\u{1}", true, null, [], {}], "a": {"n": -7, "é": 1.0}});
        let text = "\"<a href='x'>&\\n\\\"\\\\u003c é🚚\u{7f}\\u0001\"";
        let plain = format!(r#"{{"z": [{text}, true, null, [], {{}}], "a": {{"n": -7, "é": 1.0}}}}"#);
        let lines = format!(
            "{{\n  \"z\": [\n    {text},\n    true,\n    null,\n    [],\n    {{}}\n  ],\n  \"a\": {{\n    \"n\": -7,\n    \"é\": 1.0\n  }}\n}}"
        );
        let is_sorted = format!(r#"{{"a": {{"n": -7, "é": 1.0}}, "z": [{text}, true, null, [], {{}}]}}"#);
        for (arguments, expected) in [
            ("", plain.clone()),
            ("()", plain.clone()),
            ("(ensure_ascii=true)", plain.replace('é', "\\u00e9").replace('🚚', "\\ud83d\\ude9a")),
            ("(separators=(',', ':'))", plain.replace(", ", ",").replace(": ", ":")),
            ("(sort_keys=true)", is_sorted),
            ("(indent=2, sort_keys=false)", lines),
        ] {
            assert_eq!(render(&format!("{{{{ value | tojson{arguments} }}}}"), &value).unwrap(), expected);
        }
        assert!(render("{{ value | tojson(indentation=2) }}", &value).is_err());
    }

    #[test]
    fn numbers_are_written_as_python_writes_them() {
        for (value, expected) in [
            (0.1, "0.1"),
            (1e-4, "0.0001"),
            (1.5e-5, "1.5e-05"),
            (-1e-7, "-1e-07"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.25e120, "1.25e+120"),
            (-0.0, "-0.0"),
            (123_456.5, "123456.5"),
        ] {
            for source in ["{{ value | tojson }}", "{{ value }}", "{{ value | string }}"] {
                assert_eq!(render(source, &json!(value)).unwrap(), expected, "{source}");
            }
        }
        let nested = json!({"a": [1e-7, "it's", {"b": 2e20, "c": null}], "d": true});
        let expected = "{'a': [1e-07, \"it's\", {'b': 2e+20, 'c': None}], 'd': True}";
        assert_eq!(render("{{ value }}", &nested).unwrap(), expected);
    }

    /// What Jinja 3.1 gives.
    #[test]
    fn truncate_cuts_as_jinja_does() {
        let text = json!("foo bar baz qux");
        for (arguments, expected) in [
            ("(9)", "foo..."),
            ("(9, true)", "foo ba..."),
            ("(11)", "foo bar baz qux"),
            ("(11, false, '...', leeway=0)", "foo bar..."),
            ("(length=9, killwords=true, end='…')", "foo bar …"),
            ("(5, end='')", "foo"),
            ("", "foo bar baz qux"),
        ] {
            assert_eq!(
                render(&format!("{{{{ value | truncate{arguments} }}}}"), &text).unwrap(),
                expected,
                "{arguments}"
            );
        }
        let long = json!("é".repeat(300));
        assert_eq!(render("{{ value | truncate }}", &long).unwrap(), format!("{}...", "é".repeat(252)));
        for wrong in ["(2)", "(9, by=3)"] {
            assert!(render(&format!("{{{{ value | truncate{wrong} }}}}"), &text).is_err(), "{wrong}");
        }
    }

    #[test]
    fn none_is_not_iterable() {
        let source = "{{ value is iterable }} {{ [] is iterable }} {{ 'a' is iterable }} {{ 1 is iterable }}";
        assert_eq!(render(source, &serde_json::Value::Null).unwrap(), "False True True False");
    }
}
