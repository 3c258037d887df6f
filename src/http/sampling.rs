//! The generation parameters that completions and chat share.

use std::time::Duration;

use serde_json::{Map, Value};

use super::constraint::parse_constraint;
use super::error::ApiError;
use super::fields::{Fields, wrong_type};
use super::samplers::apply_order;
use crate::generation::{BeamOptions, GenerationOptions};

/// Most choices per prompt, as in OpenAI's interface.
pub const MAX_CHOICES: u32 = 128;
const MAX_BEAMS: u32 = 16;
/// The most tokens to generate: OpenAI's names, and those of llama.cpp, TGI and Ollama.
pub const LENGTH_NAMES: [&str; 5] =
    ["max_completion_tokens", "max_tokens", "n_predict", "max_new_tokens", "num_predict"];
/// As many tokens as there is room for.
const NO_LIMIT: i64 = -1;
/// Mistral's name is the second.
pub const SEED_NAMES: [&str; 2] = ["seed", "random_seed"];
pub const STOP_NAMES: [&str; 2] = ["stop", "stop_sequences"];
/// Each is looked for in every token's text.
pub const MAX_STOPS: usize = 128;
pub const MAX_STOP_BYTES: usize = 1024;
pub const MAX_INDENT: i64 = 1024;
/// What others write for a seed that is to be drawn.
const RANDOM_SEED: i64 = -1;

/// Reads every shared parameter but the log-probabilities, which the two interfaces name differently.
pub fn parse_options(fields: &Fields) -> Result<GenerationOptions, ApiError> {
    let num_choices = fields.count("n", 1..=MAX_CHOICES)?.unwrap_or(1);
    let beams = parse_beams(fields, num_choices)?;
    if beams.is_none() && fields.count("best_of", 1..=MAX_CHOICES)?.is_some_and(|best_of| best_of != num_choices) {
        return Err(ApiError::invalid("best_of", "`best_of` must equal `n`: choices are not ranked"));
    }
    let (constraint, constraint_param) = parse_constraint(fields)?.unzip();
    if let (Some(_), Some(param)) = (&beams, constraint_param) {
        return Err(ApiError::invalid(param, format!("`{param}` does not go with `use_beam_search`: leave one out")));
    }
    let repetition_penalty =
        fields.one_of(&["repetition_penalty", "repeat_penalty"], |name| fields.number(name, 0.01..=10.0))?;
    let mut options = GenerationOptions {
        num_choices,
        max_tokens: parse_max_tokens(fields)?,
        beams,
        temperature: fields.number("temperature", 0.0..=2.0)?,
        // Some clients write -1 for "off".
        top_k: fields.integer("top_k", -1..=i64::from(i32::MAX))?.map(|top_k| top_k.max(0) as usize),
        top_p: fields.number("top_p", 0.0..=1.0)?,
        min_p: fields.number("min_p", 0.0..=1.0)?,
        repetition_penalty,
        presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?,
        frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?,
        logit_bias: fields.object("logit_bias")?.map_or(Ok(Vec::new()), parse_logit_bias)?,
        seed: parse_seed(fields)?,
        stop: parse_stops(fields)?,
        stop_token_ids: parse_stop_token_ids(fields)?,
        ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
        min_indent: fields.integer("n_indent", -1..=MAX_INDENT)?.map_or(0, |indent| indent.max(0) as usize),
        time_limit: fields.integer("t_max_predict_ms", -1..=i64::from(u32::MAX))?.and_then(milliseconds),
        constraint,
        constraint_param: constraint_param.unwrap_or_default(),
        prediction: parse_prediction(fields, beams.is_some())?,
        ..GenerationOptions::default()
    };
    apply_order(fields, &mut options)?;
    Ok(options)
}

/// OpenAI's predicted output: `{"type": "content", "content": TEXT}`, the text also in parts.
fn parse_prediction(fields: &Fields, is_beam_search: bool) -> Result<Option<String>, ApiError> {
    const CONTENT: &str = "prediction.content";
    let Some(prediction) = fields.object("prediction")? else { return Ok(None) };
    if is_beam_search {
        let message = "`prediction` does not go with `use_beam_search`: leave one out";
        return Err(ApiError::invalid("prediction", message));
    }
    if prediction.get("type").is_none_or(|kind| kind != "content") {
        return Err(ApiError::invalid("prediction.type", "`prediction.type` must be \"content\""));
    }
    match prediction.get("content") {
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(Value::Array(parts)) => {
            let text = |part: &Value| part["text"].as_str().filter(|_| part["type"] == "text").map(str::to_owned);
            let texts: Option<String> = parts.iter().map(text).collect();
            let message = "`prediction.content` has a part that is not {\"type\": \"text\", \"text\": TEXT}";
            texts.map(Some).ok_or_else(|| ApiError::invalid(CONTENT, message))
        }
        other => Err(wrong_type(CONTENT, "a string or an array of parts", other.unwrap_or(&Value::Null))),
    }
}

/// 0 and less are no limit, as in llama.cpp.
fn milliseconds(count: i64) -> Option<Duration> {
    u64::try_from(count).ok().filter(|count| *count > 0).map(Duration::from_millis)
}

/// For interfaces in which an output goes on to its end where no length is given.
pub fn default_to_no_limit(fields: &mut Map<String, Value>) {
    set_default(fields, &LENGTH_NAMES, "n_predict", NO_LIMIT.into());
}

/// Puts `default` into the field `name` where none of `names`, which all mean the same, says anything.
pub fn set_default(fields: &mut Map<String, Value>, names: &[&str], name: &str, default: Value) {
    if names.iter().all(|name| fields.get(*name).is_none_or(Value::is_null)) {
        fields.insert(name.to_owned(), default);
    }
}

fn parse_max_tokens(fields: &Fields) -> Result<Option<usize>, ApiError> {
    fields.one_of(&LENGTH_NAMES, |name| match name {
        // -1 and -2 are "as many as there is room for".
        "n_predict" | "num_predict" => {
            let count = fields.integer(name, -2..=i64::from(u32::MAX))?;
            Ok(count.map(|count| usize::try_from(count).unwrap_or(usize::MAX)))
        }
        _ => fields.count(name, 0..=u32::MAX),
    })
}

/// `None` where it is to be drawn.
pub fn parse_seed(fields: &Fields) -> Result<Option<i64>, ApiError> {
    let seed = fields.one_of(&SEED_NAMES, |name| fields.integer(name, i64::MIN..=i64::MAX))?;
    Ok(seed.filter(|seed| *seed != RANDOM_SEED))
}

fn parse_stops(fields: &Fields) -> Result<Vec<String>, ApiError> {
    let stops = fields.one_of(&STOP_NAMES, |name| match fields.get(name) {
        None => Ok(None),
        // Before any of them is copied.
        Some(Value::Array(stops)) if stops.len() > MAX_STOPS => {
            let message = format!("`{name}` has {} strings, {MAX_STOPS} are the most", stops.len());
            Err(ApiError::invalid(name, message))
        }
        Some(_) => read_stops(fields, name).map(Some),
    })?;
    Ok(stops.unwrap_or_default())
}

fn read_stops(fields: &Fields, name: &str) -> Result<Vec<String>, ApiError> {
    let stops = fields.strings(name)?;
    match stops.iter().find(|stop| stop.len() > MAX_STOP_BYTES) {
        None => Ok(stops),
        Some(stop) => {
            let message = format!("`{name}` has a string of {} bytes, {MAX_STOP_BYTES} are the most", stop.len());
            Err(ApiError::invalid(name, message))
        }
    }
}

/// `stop_token_ids`, as of vLLM and SGLang.
fn parse_stop_token_ids(fields: &Fields) -> Result<Vec<u32>, ApiError> {
    let ids = fields.array("stop_token_ids")?.map_or(&[] as &[Value], Vec::as_slice);
    let id = |id: &Value| id.as_u64().and_then(|id| u32::try_from(id).ok());
    if ids.len() > MAX_STOPS {
        let message = format!("`stop_token_ids` has {} ids, {MAX_STOPS} are the most", ids.len());
        return Err(ApiError::invalid("stop_token_ids", message));
    }
    let refused = |value: &Value| {
        ApiError::invalid("stop_token_ids", format!("`stop_token_ids` has `{value:.80}`, which is no token id"))
    };
    ids.iter().map(|value| id(value).ok_or_else(|| refused(value))).collect()
}

/// `use_beam_search`, as of vLLM: `n` choices are the best of `best_of` beams (`n`, when it says nothing).
fn parse_beams(fields: &Fields, num_choices: usize) -> Result<Option<BeamOptions>, ApiError> {
    let length_penalty = fields.number("length_penalty", -10.0..=10.0)?.unwrap_or(1.0);
    let early_stopping = fields.boolean("early_stopping")?.unwrap_or(false);
    if !fields.boolean("use_beam_search")?.unwrap_or(false) {
        let asked = [("length_penalty", length_penalty != 1.0), ("early_stopping", early_stopping)];
        return match asked.into_iter().find(|(_, is_asked)| *is_asked) {
            None => Ok(None),
            Some((name, _)) => {
                let message = format!("`{name}` is of beam search: send `use_beam_search`: true, or leave it out");
                Err(ApiError::invalid(name, message))
            }
        };
    }
    let field = if fields.get("best_of").is_some() { "best_of" } else { "n" };
    let num_beams = fields.count(field, 1..=MAX_BEAMS)?.unwrap_or(num_choices);
    if num_beams < num_choices {
        return Err(ApiError::invalid("best_of", "`best_of` is the number of beams: it must not be less than `n`"));
    }
    // Beams are ranked by the model's own probabilities, and only those of their own tokens are kept.
    for (name, neutral) in [
        ("temperature", 0.0),
        ("top_p", 1.0),
        ("min_p", 0.0),
        ("top_logprobs", 0.0),
        ("repetition_penalty", 1.0),
        ("repeat_penalty", 1.0),
        ("presence_penalty", 0.0),
        ("frequency_penalty", 0.0),
        ("n_indent", 0.0),
        ("t_max_predict_ms", 0.0),
    ] {
        if fields.number(name, f64::MIN..=f64::MAX)?.is_some_and(|value| value != neutral) {
            let message = format!("`{name}` does not go with `use_beam_search`: leave it out, or send {neutral}");
            return Err(ApiError::invalid(name, message));
        }
    }
    // Less than 1 is "off".
    if fields.integer("top_k", i64::MIN..=i64::MAX)?.is_some_and(|top_k| top_k > 0) {
        return Err(ApiError::invalid("top_k", "`top_k` does not go with `use_beam_search`: leave it out, or send 0"));
    }
    // In chat a switch, which is as good here.
    if fields.get("logprobs").and_then(Value::as_f64).is_some_and(|count| count > 0.0) {
        let message = "`logprobs` of other tokens than the beams' own do not go with `use_beam_search`: send 0";
        return Err(ApiError::invalid("logprobs", message));
    }
    if fields.object("logit_bias")?.is_some_and(|bias| !bias.is_empty()) {
        return Err(ApiError::invalid("logit_bias", "`logit_bias` does not go with `use_beam_search`: leave it out"));
    }
    if fields.boolean("echo")?.unwrap_or(false) {
        return Err(ApiError::invalid("echo", "`echo` does not go with `use_beam_search`: leave it out"));
    }
    Ok(Some(BeamOptions { num_beams, length_penalty, early_stopping }))
}

/// `stream` and, with it, `stream_options`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    Plain,
    Stream(StreamUsage),
}

/// Which chunks of a stream have the usage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamUsage {
    None,
    /// `include_usage`: one of its own behind the choices.
    Last,
    /// `continuous_usage_stats`, as of vLLM: beside that, each of a choice what that has taken so far.
    Every,
}

impl Delivery {
    pub fn parse(fields: &Fields) -> Result<Self, ApiError> {
        let options = fields.object("stream_options")?;
        if !fields.boolean("stream")?.unwrap_or(false) {
            return match options {
                None => Ok(Self::Plain),
                Some(_) => Err(ApiError::invalid("stream_options", "`stream_options` needs `stream`: true")),
            };
        }
        let is_asked = |name: &str| match options.and_then(|options| options.get(name)) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(is_asked)) => Ok(*is_asked),
            Some(other) => Err(wrong_type(&format!("stream_options.{name}"), "true or false", other)),
        };
        match (is_asked("include_usage")?, is_asked("continuous_usage_stats")?) {
            (false, false) => Ok(Self::Stream(StreamUsage::None)),
            (true, false) => Ok(Self::Stream(StreamUsage::Last)),
            (true, true) => Ok(Self::Stream(StreamUsage::Every)),
            (false, true) => {
                let at = "stream_options.continuous_usage_stats";
                Err(ApiError::invalid(at, format!("`{at}` needs `include_usage`: true")))
            }
        }
    }
}

fn parse_logit_bias(biases: &Map<String, Value>) -> Result<Vec<(u32, f32)>, ApiError> {
    let parse = |(token, bias): (&String, &Value)| {
        let id = token.parse().map_err(|_| {
            ApiError::invalid("logit_bias", format!("`logit_bias` maps token ids to numbers; `{token}` is no token id"))
        })?;
        match bias.as_f64() {
            Some(bias) if (-100.0..=100.0).contains(&bias) => Ok((id, bias as f32)),
            Some(bias) => Err(ApiError::invalid(
                "logit_bias",
                format!("`logit_bias` of token {id} must be from -100 to 100, not {bias}"),
            )),
            None => Err(wrong_type("logit_bias", "an object of numbers", bias)),
        }
    };
    biases.iter().map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(json: &str) -> Fields {
        Fields::parse(json.as_bytes()).unwrap()
    }

    #[test]
    fn nothing_given_leaves_every_default_open() {
        let options = parse_options(&fields("{}")).unwrap();
        assert_eq!(options, GenerationOptions { num_choices: 1, ..GenerationOptions::default() });
    }

    #[test]
    fn every_parameter_is_read_under_its_own_name() {
        let options = parse_options(&fields(
            r#"{"n": 2, "best_of": 2, "temperature": 0.5, "top_k": -1, "top_p": 0.25, "min_p": 0.125,
                "repeat_penalty": 1.5, "presence_penalty": -1, "frequency_penalty": 2, "logit_bias": {"7": -100},
                "seed": -3, "stop": ["a", "b"], "ignore_eos": true, "user": 5}"#,
        ))
        .unwrap();
        let expected = GenerationOptions {
            num_choices: 2,
            temperature: Some(0.5),
            top_k: Some(0),
            top_p: Some(0.25),
            min_p: Some(0.125),
            repetition_penalty: Some(1.5),
            presence_penalty: Some(-1.0),
            frequency_penalty: Some(2.0),
            logit_bias: vec![(7, -100.0)],
            seed: Some(-3),
            stop: vec!["a".to_owned(), "b".to_owned()],
            ignore_eos: true,
            ..GenerationOptions::default()
        };
        assert_eq!(options, expected);
    }

    #[test]
    fn a_seed_of_minus_one_is_drawn_like_none() {
        let seed = |json: &str| parse_options(&fields(json)).unwrap().seed;
        assert_eq!([r#"{"seed": -1}"#, r#"{"seed": null}"#, "{}"].map(seed), [None; 3]);
        assert_eq!([r#"{"seed": 0}"#, r#"{"seed": -2}"#, r#"{"random_seed": 7}"#].map(seed), [0, -2, 7].map(Some));
    }

    #[test]
    fn the_names_of_other_servers_mean_the_same() {
        let options = |json: &str| parse_options(&fields(json)).unwrap();
        for name in LENGTH_NAMES {
            assert_eq!(options(&format!(r#"{{"{name}": 9}}"#)).max_tokens, Some(9), "{name}");
        }
        assert_eq!(options(r#"{"n_predict": -1}"#).max_tokens, Some(usize::MAX));
        assert_eq!(options(r#"{"max_completion_tokens": null, "max_tokens": 2, "n_predict": 2}"#).max_tokens, Some(2));
        assert_eq!(options(r#"{"stop_sequences": ["a"]}"#).stop, ["a"]);
        assert_eq!(options(r#"{"stop_token_ids": [7, 9]}"#).stop_token_ids, [7, 9]);
    }

    #[test]
    fn a_second_name_must_make_sense_and_say_the_same() {
        for (json, name) in [
            (r#"{"max_tokens": 2, "num_predict": 4294967296}"#, "num_predict"),
            (r#"{"seed": 2, "random_seed": "x"}"#, "random_seed"),
            (r#"{"stop": "a", "stop_sequences": [1]}"#, "stop_sequences"),
            (r#"{"repetition_penalty": 1, "repeat_penalty": 0}"#, "repeat_penalty"),
            (r#"{"repetition_penalty": 1, "repeat_penalty": 1.1}"#, "repeat_penalty"),
            (r#"{"max_tokens": 2, "num_predict": 3}"#, "num_predict"),
            (r#"{"max_tokens": 2, "max_completion_tokens": 0}"#, "max_tokens"),
            (r#"{"seed": 2, "random_seed": -1}"#, "random_seed"),
            (r#"{"stop": "a", "stop_sequences": ["b"]}"#, "stop_sequences"),
            (r#"{"early_stopping": {}}"#, "early_stopping"),
            (r#"{"length_penalty": 11}"#, "length_penalty"),
        ] {
            assert_eq!(parse_options(&fields(json)).unwrap_err().param(), Some(name), "{json}");
        }
    }

    #[test]
    fn stops_are_so_many_and_so_long_at_most() {
        let refusal = |name: &str, stops: Value| {
            let error = parse_options(&fields(&serde_json::json!({name: stops}).to_string())).unwrap_err();
            error.param().map(str::to_owned)
        };
        assert_eq!(refusal("stop", vec!["a"; MAX_STOPS + 1].into()).as_deref(), Some("stop"));
        assert_eq!(refusal("stop_sequences", "a".repeat(MAX_STOP_BYTES + 1).into()).as_deref(), Some("stop_sequences"));
        assert_eq!(refusal("stop_token_ids", vec![1; MAX_STOPS + 1].into()).as_deref(), Some("stop_token_ids"));
        let most = serde_json::json!({"stop": vec!["a".repeat(MAX_STOP_BYTES); MAX_STOPS]}).to_string();
        assert_eq!(parse_options(&fields(&most)).unwrap().stop.len(), MAX_STOPS);
    }

    #[test]
    fn what_cannot_be_served_is_refused() {
        for body in [
            r#"{"n": 0}"#,
            r#"{"n": 2, "best_of": 3}"#,
            r#"{"temperature": 2.1}"#,
            r#"{"logit_bias": {"x": 1}}"#,
            r#"{"logit_bias": {"1": 101}}"#,
            r#"{"logit_bias": [1]}"#,
            r#"{"seed": 1.5}"#,
            r#"{"max_tokens": -1}"#,
            r#"{"stop_token_ids": ["a"]}"#,
            r#"{"stop_token_ids": [4294967296]}"#,
        ] {
            assert!(parse_options(&fields(body)).is_err(), "{body}");
        }
    }

    #[test]
    fn beams_draw_nothing_and_tell_of_no_other_tokens() {
        let options = |field: &str| parse_options(&fields(&format!(r#"{{"use_beam_search": true, "n": 2, {field}}}"#)));
        for (field, name) in [
            (r#""top_k": 1"#, "top_k"),
            (r#""top_p": 0.9"#, "top_p"),
            (r#""min_p": 0.1"#, "min_p"),
            (r#""logprobs": 2"#, "logprobs"),
            (r#""logprobs": true, "top_logprobs": 2"#, "top_logprobs"),
        ] {
            assert_eq!(options(field).unwrap_err().param(), Some(name), "{field}");
        }
        for field in
            [r#""top_k": -1, "top_p": 1, "min_p": 0"#, r#""logprobs": 0"#, r#""logprobs": true, "top_logprobs": 0"#]
        {
            assert!(options(field).unwrap().beams.is_some(), "{field}");
        }
    }

    #[test]
    fn what_is_of_beams_alone_needs_them() {
        for (field, name) in
            [(r#""length_penalty": 0"#, "length_penalty"), (r#""early_stopping": true"#, "early_stopping")]
        {
            let without = parse_options(&fields(&format!("{{{field}}}"))).unwrap_err();
            assert_eq!(without.param(), Some(name), "{field}");
            let off = parse_options(&fields(&format!(r#"{{"use_beam_search": false, {field}}}"#))).unwrap_err();
            assert_eq!(off.param(), Some(name), "{field}");
            let with = parse_options(&fields(&format!(r#"{{"use_beam_search": true, "n": 2, {field}}}"#)));
            assert!(with.unwrap().beams.is_some(), "{field}");
        }
        assert_eq!(parse_options(&fields(r#"{"length_penalty": 1, "early_stopping": false}"#)).unwrap().beams, None);
    }

    #[test]
    fn stream_options_need_a_stream() {
        assert!(Delivery::parse(&fields(r#"{"stream_options": {"include_usage": true}}"#)).is_err());
        let streamed =
            |options: &str| Delivery::parse(&fields(&format!(r#"{{"stream": true, "stream_options": {options}}}"#)));
        for (options, usage) in [
            ("null", StreamUsage::None),
            (r#"{"include_usage": null, "continuous_usage_stats": false}"#, StreamUsage::None),
            (r#"{"include_usage": true}"#, StreamUsage::Last),
            (r#"{"include_usage": true, "continuous_usage_stats": true}"#, StreamUsage::Every),
        ] {
            assert_eq!(streamed(options), Ok(Delivery::Stream(usage)), "{options}");
        }
        for options in
            [r#"{"continuous_usage_stats": true}"#, r#"{"include_usage": true, "continuous_usage_stats": 1}"#]
        {
            let error = streamed(options).unwrap_err();
            assert_eq!(error.param(), Some("stream_options.continuous_usage_stats"), "{options}");
        }
        let explicit_null = Delivery::parse(&fields(r#"{"stream": false, "stream_options": null}"#));
        assert_eq!(explicit_null, Ok(Delivery::Plain));
    }

    #[test]
    fn a_prediction_that_cannot_be_read_is_refused_by_name() {
        for (body, param) in [
            (r#"{"prediction": "x"}"#, "prediction"),
            (r#"{"prediction": {"content": "x"}}"#, "prediction.type"),
            (r#"{"prediction": {"type": "content"}}"#, "prediction.content"),
            (r#"{"prediction": {"type": "content", "content": [{"type": "image_url"}]}}"#, "prediction.content"),
            (r#"{"prediction": {"type": "content", "content": "x"}, "use_beam_search": true, "n": 2}"#, "prediction"),
        ] {
            let refusal = parse_options(&Fields::parse(body.as_bytes()).unwrap()).unwrap_err().into_envelope();
            let refusal = serde_json::to_string(&refusal).unwrap();
            assert!(refusal.contains(&format!(r#""param":"{param}""#)), "{body}: {refusal}");
        }
    }
}
