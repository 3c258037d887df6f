//! What a fine-tuning job is asked for with, read field by field.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::fine_tuning::{DEFAULT_RANK, DEFAULT_VIRTUAL_TOKENS, Hyperparameters, Method, NewJob};
use crate::http::error::ApiError;
use crate::http::fields::{Fields, two_values};

pub const METHODS: [&str; 5] = ["supervised", "lora", "ia3", "prompt", "prefix"];
pub const MAX_SUFFIX_LEN: usize = 40;
pub const MAX_SEED: i64 = i32::MAX as i64;
pub const MAX_EPOCHS: u32 = 50;
pub const MAX_BATCH_SIZE: u32 = 256;
pub const MIN_MULTIPLIER: f64 = 0.001;
pub const MAX_MULTIPLIER: f64 = 1000.0;
pub const MAX_RANK: u32 = 256;
pub const MAX_VIRTUAL_TOKENS: u32 = 256;
const MAX_METADATA: usize = 16;
const KNOWN: [&str; 9] = [
    "model",
    "training_file",
    "validation_file",
    "suffix",
    "seed",
    "method",
    "hyperparameters",
    "metadata",
    "integrations",
];

/// The job, and the model it names.
///
/// # Errors
/// 400, naming the field.
pub fn read(fields: &Fields) -> Result<(NewJob, &str), ApiError> {
    // What is asked for and not trained with would be a job of something else.
    fields.refuse_others(&KNOWN)?;
    let (method, of_method) = method(fields)?;
    let of_job = nested(fields, "hyperparameters")?;
    let of_job = of_job.map(|found| hyperparameters(&found).map_err(within("hyperparameters"))).transpose()?;
    let hyperparameters = match (of_job, of_method) {
        (Some(one), Some(other)) if one != other => return Err(two_values("hyperparameters", "method")),
        (one, other) => one.or(other).unwrap_or_default(),
    };
    if fields.array("integrations")?.is_some_and(|integrations| !integrations.is_empty()) {
        return Err(ApiError::invalid("integrations", "`integrations`: no service is told of jobs here: leave it out"));
    }
    let new = NewJob {
        suffix: suffix(fields)?,
        seed: match fields.integer("seed", 0..=MAX_SEED)? {
            Some(seed) => u32::try_from(seed).unwrap_or_default(),
            None => rand::random::<u32>() >> 1,
        },
        metadata: metadata(fields)?,
        method,
        hyperparameters,
        validation_file: fields.string("validation_file")?.map(str::to_owned),
        training_file: required(fields, "training_file")?.to_owned(),
    };
    Ok((new, required(fields, "model")?))
}

fn required<'a>(fields: &'a Fields, name: &str) -> Result<&'a str, ApiError> {
    fields.string(name)?.ok_or_else(|| ApiError::invalid(name, format!("`{name}` is required")))
}

fn suffix(fields: &Fields) -> Result<Option<String>, ApiError> {
    let Some(suffix) = fields.string("suffix")? else { return Ok(None) };
    let is_sane = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if !(1..=MAX_SUFFIX_LEN).contains(&suffix.len()) || !suffix.chars().all(is_sane) {
        let message = format!(
            "`suffix` must be 1 to {MAX_SUFFIX_LEN} letters, digits, dots, dashes and underscores: it is a part of the adapter's name"
        );
        return Err(ApiError::invalid("suffix", message));
    }
    Ok(Some(suffix.to_owned()))
}

fn metadata(fields: &Fields) -> Result<Option<BTreeMap<String, String>>, ApiError> {
    let Some(metadata) = fields.object("metadata")? else { return Ok(None) };
    if metadata.len() > MAX_METADATA {
        return Err(ApiError::invalid("metadata", format!("`metadata` may have {MAX_METADATA} entries at most")));
    }
    let entry = |(name, value): (&String, &Value)| Some((name.clone(), value.as_str()?.to_owned()));
    let metadata = metadata.iter().map(entry).collect::<Option<_>>();
    metadata.map(Some).ok_or_else(|| ApiError::invalid("metadata", "`metadata` must have strings as its values"))
}

/// What is asked for where, and with what hyperparameters, if any.
fn method(fields: &Fields) -> Result<(Method, Option<Hyperparameters>), ApiError> {
    let Some(method) = nested(fields, "method")? else { return Ok((Method::Supervised, None)) };
    let in_method = within("method");
    let kind = method.string("type").map_err(&in_method)?;
    let kind = kind.filter(|kind| METHODS.contains(kind)).ok_or_else(|| {
        let message = format!("`method.type` must be one of {}: nothing else is trained here", METHODS.join(", "));
        ApiError::invalid("method.type", message)
    })?;
    method.refuse_others(&["type", kind]).map_err(&in_method)?;
    let settings = nested(&method, kind).map_err(&in_method)?.unwrap_or_else(|| Fields::from(serde_json::Map::new()));
    let path = format!("method.{kind}");
    let in_settings = within(&path);
    let count = |name: &str, max, default| {
        let found = settings.count(name, 1..=max).map_err(&in_settings)?;
        Ok::<_, ApiError>(found.and_then(|count| u32::try_from(count).ok()).unwrap_or(default))
    };
    let virtual_tokens = || count("num_virtual_tokens", MAX_VIRTUAL_TOKENS, DEFAULT_VIRTUAL_TOKENS);
    let (method, own) = match kind {
        "lora" => (Method::Lora { rank: count("rank", MAX_RANK, DEFAULT_RANK)? }, Some("rank")),
        "ia3" => (Method::Ia3, None),
        "prompt" => (Method::Prompt { num_virtual_tokens: virtual_tokens()? }, Some("num_virtual_tokens")),
        "prefix" => (Method::Prefix { num_virtual_tokens: virtual_tokens()? }, Some("num_virtual_tokens")),
        _ => (Method::Supervised, None),
    };
    let known: Vec<&str> = own.into_iter().chain(["hyperparameters"]).collect();
    settings.refuse_others(&known).map_err(&in_settings)?;
    let found = nested(&settings, "hyperparameters").map_err(&in_settings)?;
    let path = format!("{path}.hyperparameters");
    let found = found.map(|found| hyperparameters(&found).map_err(within(&path))).transpose()?;
    Ok((method, found))
}

fn hyperparameters(fields: &Fields) -> Result<Hyperparameters, ApiError> {
    fields.refuse_others(&["n_epochs", "batch_size", "learning_rate_multiplier"])?;
    let auto = Hyperparameters::default();
    let is_auto = |name: &str| fields.get(name).is_some_and(|value| value == "auto");
    let count = |name: &str, max, auto| match is_auto(name) {
        true => Ok(auto),
        false => fields.count(name, 1..=max).map(|count| count.and_then(|n| u32::try_from(n).ok()).unwrap_or(auto)),
    };
    Ok(Hyperparameters {
        n_epochs: count("n_epochs", MAX_EPOCHS, auto.n_epochs)?,
        batch_size: count("batch_size", MAX_BATCH_SIZE, auto.batch_size)?,
        learning_rate_multiplier: match is_auto("learning_rate_multiplier") {
            true => auto.learning_rate_multiplier,
            false => {
                fields.number("learning_rate_multiplier", MIN_MULTIPLIER..=MAX_MULTIPLIER)?;
                // As it was sent, to the last digit.
                let multiplier = fields.get("learning_rate_multiplier").and_then(Value::as_f64);
                multiplier.unwrap_or(auto.learning_rate_multiplier)
            }
        },
    })
}

fn nested(fields: &Fields, name: &str) -> Result<Option<Fields>, ApiError> {
    Ok(fields.object(name)?.cloned().map(Fields::from))
}

/// An error in the field at `path`, named from outside.
fn within(path: &str) -> impl Fn(ApiError) -> ApiError + use<> {
    let path = path.to_owned();
    move |error| {
        let param = format!("{path}.{}", error.param().unwrap_or_default());
        error.renamed(&param)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_of(more: &str) -> Result<NewJob, ApiError> {
        let body = format!(r#"{{"model": "m", "training_file": "file-1"{more}}}"#);
        read(&Fields::parse(body.as_bytes()).unwrap()).map(|(job, _)| job)
    }

    #[test]
    fn what_is_not_said_is_openais_way_and_auto() {
        let job = read_of("").unwrap();
        assert_eq!((job.method, job.hyperparameters), (Method::Supervised, Hyperparameters::default()));
        let auto = r#", "hyperparameters": {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"},
            "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": "auto"}}}, "integrations": []"#;
        assert_eq!(read_of(auto).unwrap().hyperparameters, Hyperparameters::default());
        let old =
            r#", "hyperparameters": {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5}, "seed": 7"#;
        let expected = Hyperparameters { n_epochs: 2, batch_size: 4, learning_rate_multiplier: 0.5 };
        assert_eq!((read_of(old).unwrap().hyperparameters, read_of(old).unwrap().seed), (expected, 7));
    }

    #[test]
    fn every_method_is_read_with_what_it_alone_has() {
        for (method, expected) in [
            (r#"{"type": "lora"}"#, Method::Lora { rank: DEFAULT_RANK }),
            (r#"{"type": "lora", "lora": {"rank": 4}}"#, Method::Lora { rank: 4 }),
            (r#"{"type": "ia3", "ia3": {"hyperparameters": {"batch_size": 2}}}"#, Method::Ia3),
            (r#"{"type": "prompt", "prompt": {"num_virtual_tokens": 3}}"#, Method::Prompt { num_virtual_tokens: 3 }),
            (r#"{"type": "prefix"}"#, Method::Prefix { num_virtual_tokens: DEFAULT_VIRTUAL_TOKENS }),
        ] {
            assert_eq!(read_of(&format!(r#", "method": {method}"#)).unwrap().method, expected, "{method}");
        }
    }

    #[test]
    fn what_is_wrong_or_not_done_here_is_refused_by_its_path() {
        for (more, param) in [
            (r#", "suffix": "a b""#, "suffix"),
            (r#", "n_epochs": 3"#, "n_epochs"),
            (r#", "validation": "file-2""#, "validation"),
            (r#", "suffix": """#, "suffix"),
            (r#", "seed": -1"#, "seed"),
            (r#", "metadata": {"a": 1}"#, "metadata"),
            (r#", "integrations": [{"type": "wandb"}]"#, "integrations"),
            (r#", "method": {}"#, "method.type"),
            (r#", "method": {"type": "dpo"}"#, "method.type"),
            (r#", "method": {"type": "reinforcement", "reinforcement": {}}"#, "method.type"),
            (r#", "method": {"type": "lora", "dpo": {}}"#, "method.dpo"),
            (r#", "method": {"type": "lora", "lora": {"rank": 0}}"#, "method.lora.rank"),
            (r#", "method": {"type": "ia3", "ia3": {"rank": 4}}"#, "method.ia3.rank"),
            (
                r#", "method": {"type": "supervised", "supervised": {"hyperparameters": {"beta": 1}}}"#,
                "method.supervised.hyperparameters.beta",
            ),
            (r#", "hyperparameters": {"n_epochs": "many"}"#, "hyperparameters.n_epochs"),
            (r#", "hyperparameters": {"learning_rate_multiplier": 0}"#, "hyperparameters.learning_rate_multiplier"),
            (
                r#", "hyperparameters": {"n_epochs": 1}, "method": {"type": "ia3", "ia3": {"hyperparameters": {}}}"#,
                "hyperparameters",
            ),
        ] {
            let error = read_of(more).unwrap_err();
            assert_eq!(error.param(), Some(param), "{more}");
            let message = serde_json::to_string(&error.into_envelope()).unwrap();
            assert!(message.contains(&format!("`{param}`")), "{message}");
        }
        for missing in [r#"{"model": "m"}"#, r#"{"training_file": "file-1"}"#] {
            assert!(read(&Fields::parse(missing.as_bytes()).unwrap()).is_err());
        }
    }
}
