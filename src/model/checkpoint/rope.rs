//! How a checkpoint says that heads turn with their position.
//!
//! Two layouts: `rope_theta` beside `rope_scaling`, and `rope_parameters` with both (transformers 5), which may be one for each
//! kind of layer. The formulas are those of transformers' `modeling_rope_utils.py`.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::CheckpointError;
use super::config::Metadata;
use super::family::Family;
use super::fields::{Fields, number, refuse};

/// What frequencies are divided by, one by one, as tensors of the file: `[rotary dimensions / 2]`.
pub type RopeFactors = Vec<(&'static str, Vec<f32>)>;

/// The parameters of one kind of layers, of which every one must be taken.
struct Parameters<'a> {
    field: String,
    values: Option<&'a Map<String, Value>>,
    taken: BTreeSet<&'static str>,
}

impl<'a> Parameters<'a> {
    fn new(field: &str, value: Option<&'a Value>) -> Result<Self, CheckpointError> {
        let map = |value: &'a Value| value.as_object().ok_or_else(|| refuse(field, "is no object"));
        Ok(Self { field: field.to_owned(), values: value.map(map).transpose()?, taken: BTreeSet::new() })
    }

    fn get(&mut self, name: &'static str) -> Option<&'a Value> {
        self.taken.insert(name);
        self.values?.get(name).filter(|value| !value.is_null())
    }

    fn number(&mut self, name: &'static str) -> Result<Option<f32>, CheckpointError> {
        let value = self.get(name);
        value.map(|value| number(&format!("{}.{name}", self.field), value)).transpose()
    }

    fn required(&mut self, name: &'static str) -> Result<f32, CheckpointError> {
        self.number(name)?.ok_or_else(|| refuse(&format!("{}.{name}", self.field), "is missing"))
    }

    fn numbers(&mut self, name: &'static str, count: usize) -> Result<Vec<f32>, CheckpointError> {
        let field = format!("{}.{name}", self.field);
        let values = self.get(name).and_then(Value::as_array).filter(|values| values.len() == count);
        let values = values.ok_or_else(|| refuse(&field, format!("is no list of {count} numbers")))?;
        values.iter().map(|value| number(&field, value)).collect()
    }

    fn kind(&mut self) -> Result<&'a str, CheckpointError> {
        let (new, old) = (self.get("rope_type"), self.get("type"));
        let Some(kind) = new.or(old) else { return Ok("default") };
        kind.as_str().ok_or_else(|| refuse(&format!("{}.rope_type", self.field), format!("{kind} is no name")))
    }

    /// The context that the model was trained for before it turned otherwise: said here, or beside.
    fn original_context(&mut self, fields: &Fields) -> Result<Option<f32>, CheckpointError> {
        const ORIGINAL: &str = "original_max_position_embeddings";
        match (self.number(ORIGINAL)?, fields.optional_number(ORIGINAL)?) {
            (Some(here), Some(beside)) if here != beside => {
                Err(refuse(ORIGINAL, format!("{beside}, and in {} {here}: they must be the same", self.field)))
            }
            (here, beside) => Ok(here.or(beside)),
        }
    }

    fn required_original_context(&mut self, fields: &Fields) -> Result<f32, CheckpointError> {
        let missing = format!("{}.original_max_position_embeddings", self.field);
        self.original_context(fields)?.ok_or_else(|| refuse(&missing, "is missing"))
    }

    fn refuse_the_rest(&self, kind: &str) -> Result<(), CheckpointError> {
        let mut left = self.values.into_iter().flatten();
        match left.find(|(name, value)| !value.is_null() && !self.taken.contains(name.as_str())) {
            Some((name, value)) => {
                Err(refuse(&format!("{}.{name}", self.field), format!("{value} is not served with {kind:?}")))
            }
            None => Ok(()),
        }
    }
}

/// Carries the rotary embedding over.
pub fn carry_over(
    fields: &Fields,
    family: &Family,
    metadata: &mut Metadata,
    head_dim: usize,
) -> Result<RopeFactors, CheckpointError> {
    let mut rope = match (fields.take("rope_parameters"), fields.take("rope_scaling")) {
        (Some(by_kind), None) if by_kind.get("full_attention").is_some() => of_layers(by_kind, metadata)?,
        (Some(parameters), None) => Parameters::new("rope_parameters", Some(parameters))?,
        (None, scaling) => Parameters::new("rope_scaling", scaling)?,
        (Some(_), Some(_)) => return Err(refuse("rope_scaling", "is not served beside rope_parameters")),
    };
    let beside = fields.optional_number("rope_theta")?;
    let theta = rope.number("rope_theta")?.or(beside).unwrap_or(family.rope_theta);
    metadata.number("rope.freq_base", theta);
    let beside = fields.optional_number("partial_rotary_factor")?;
    let share = rope.number("partial_rotary_factor")?.or(beside).unwrap_or(1.0);
    let dims = (head_dim as f32 * share) as usize;
    metadata.count("rope.dimension_count", dims)?;

    let kind = rope.kind()?;
    let factors = match kind {
        "default" => Vec::new(),
        "linear" => {
            metadata.text("rope.scaling.type", "linear");
            metadata.number("rope.scaling.factor", rope.required("factor")?);
            Vec::new()
        }
        "yarn" => {
            metadata.text("rope.scaling.type", "yarn");
            metadata.number("rope.scaling.factor", rope.required("factor")?);
            let original = match rope.original_context(fields)? {
                Some(original) => original,
                None => fields.number("max_position_embeddings")?,
            };
            metadata.count("rope.scaling.original_context_length", original as usize)?;
            metadata.number("rope.scaling.yarn_beta_fast", rope.number("beta_fast")?.unwrap_or(32.0));
            metadata.number("rope.scaling.yarn_beta_slow", rope.number("beta_slow")?.unwrap_or(1.0));
            Vec::new()
        }
        "llama3" => vec![("rope_freqs.weight", llama3_factors(fields, &mut rope, theta, dims)?)],
        "longrope" | "su" => long_rope(fields, &mut rope, metadata, dims)?,
        other => return Err(refuse(&rope.field, format!("rope_type {other:?} is not served"))),
    };
    rope.refuse_the_rest(kind)?;
    Ok(factors)
}

/// Of layers that see all; those with a window turn by another base, unscaled.
fn of_layers<'a>(by_kind: &'a Value, metadata: &mut Metadata) -> Result<Parameters<'a>, CheckpointError> {
    const KINDS: [&str; 2] = ["full_attention", "sliding_attention"];
    let mut names = by_kind.as_object().into_iter().flat_map(Map::keys);
    if let Some(other) = names.find(|name| !KINDS.contains(&name.as_str())) {
        return Err(refuse(
            &format!("rope_parameters.{other}"),
            format!("is not served beside {}", KINDS.join(" and ")),
        ));
    }
    let said = |kind: &str| by_kind.get(kind).filter(|parameters| !parameters.is_null());
    let of = |kind: &str| Parameters::new(&format!("rope_parameters.{kind}"), said(kind));
    let mut with_window = of("sliding_attention")?;
    if let Some(theta) = with_window.number("rope_theta")? {
        metadata.number("rope.freq_base_swa", theta);
    }
    match with_window.kind()? {
        "default" => with_window.refuse_the_rest("default")?,
        kind => return Err(refuse(&with_window.field, format!("rope_type {kind:?} is not served"))),
    }
    of("full_attention")
}

/// Llama 3.1's: long wavelengths are divided by `factor`, short ones not, those between in proportion.
fn llama3_factors(
    fields: &Fields,
    rope: &mut Parameters<'_>,
    theta: f32,
    dims: usize,
) -> Result<Vec<f32>, CheckpointError> {
    let (factor, original) = (rope.required("factor")?, rope.required_original_context(fields)?);
    let (low, high) = (rope.required("low_freq_factor")?, rope.required("high_freq_factor")?);
    let of_frequency = |frequency: f32| {
        let turns = original * frequency / (2.0 * std::f32::consts::PI);
        if turns > high {
            1.0
        } else if turns < low {
            factor
        } else {
            let smooth = (turns - low) / (high - low);
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    };
    Ok((0..dims / 2).map(|i| of_frequency(theta.powf(-((2 * i) as f32) / dims as f32))).collect())
}

/// LongRoPE's two tables. Unless said otherwise, cosines and sines grow by `sqrt(1 + ln(factor) / ln(original context))`.
fn long_rope(
    fields: &Fields,
    rope: &mut Parameters<'_>,
    metadata: &mut Metadata,
    dims: usize,
) -> Result<RopeFactors, CheckpointError> {
    let original = rope.required_original_context(fields)?;
    let longest = fields.number("max_position_embeddings")?;
    let factor = rope.number("factor")?.unwrap_or(longest / original);
    let default = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() };
    metadata.text("rope.scaling.type", "longrope");
    metadata.count("rope.scaling.original_context_length", original as usize)?;
    metadata.number("rope.scaling.attn_factor", rope.number("attention_factor")?.unwrap_or(default));
    Ok(vec![
        ("rope_factors_short.weight", rope.numbers("short_factor", dims / 2)?),
        ("rope_factors_long.weight", rope.numbers("long_factor", dims / 2)?),
    ])
}
