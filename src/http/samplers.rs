//! llama.cpp's `samplers`: which steps narrow the draw down, and in what order. The order here is fixed: penalties,
//! temperature, `top_k`, `top_p`, `min_p`. A list that comes to the same is served, any other refused.

use super::error::ApiError;
use super::fields::{Fields, wrong_type};
use crate::generation::GenerationOptions;

/// Those that do nothing here, being refused by their own fields when they are switched on, or (`infill`) standing for
/// the low temperature at which gaps are filled.
const IDLE: [&str; 7] = ["dry", "top_n_sigma", "typ_p", "typical_p", "xtc", "adaptive_p", "infill"];

/// Puts the options in force that the list asks for.
///
/// # Errors
/// 400 when the list would draw from other tokens, or from these with other probabilities.
pub fn apply_order(fields: &Fields, options: &mut GenerationOptions) -> Result<(), ApiError> {
    let Some(samplers) = fields.array("samplers")? else { return Ok(()) };
    let names =
        samplers.iter().map(|name| name.as_str().ok_or_else(|| wrong_type("samplers", "an array of names", name)));
    let names = names.collect::<Result<Vec<_>, _>>()?;
    // Where nothing is drawn there is nothing to order.
    if options.max_tokens == Some(0) || options.temperature == Some(0.0) || options.top_k == Some(1) {
        return Ok(());
    }
    let is_on = |name: &str| match name {
        "penalties" => has_penalty(options),
        "temperature" => options.temperature.is_some_and(|temperature| temperature != 1.0),
        "top_k" => options.top_k.is_some_and(|top_k| top_k > 0),
        "top_p" => options.top_p.is_some_and(|top_p| top_p < 1.0),
        _ => options.min_p.is_some_and(|min_p| min_p > 0.0),
    };
    const OURS: [&str; 5] = ["penalties", "temperature", "top_k", "top_p", "min_p"];
    if let Some(other) = names.iter().find(|name| !OURS.contains(name) && !IDLE.contains(name)) {
        return Err(refused(format!("there is no `{other}`")));
    }
    let place = |name: &str| names.iter().position(|listed| *listed == name);
    if let Some(missing) = OURS.into_iter().find(|name| is_on(name) && place(name).is_none()) {
        return Err(refused(format!("`{missing}` is set and not in the list: leave one of the two out")));
    }
    let is_before = |first: &str, second: &str| place(first).is_some() && place(first) < place(second);
    // Temperature alone counts in a list that has it even where the request does not set it: the default is not 1.
    let counts = |name: &str| is_on(name) || name == "temperature" && options.temperature.is_none();
    let misplaced = [
        ("temperature", "penalties"),
        ("top_k", "penalties"),
        ("top_p", "penalties"),
        ("min_p", "penalties"),
        ("top_p", "temperature"),
        ("top_p", "top_k"),
        ("min_p", "top_p"),
    ]
    .into_iter()
    .find(|(first, second)| counts(first) && counts(second) && is_before(first, second));
    if let Some((first, second)) = misplaced {
        return Err(refused(format!("`{first}` comes after `{second}` here")));
    }
    if is_on("min_p") && counts("temperature") && is_before("min_p", "temperature") {
        let Some(temperature) = options.temperature else {
            return Err(refused("`min_p` before an unknown temperature: send `temperature`".to_owned()));
        };
        // Probabilities relative to the likeliest are raised to 1 / temperature, and the bound with them.
        options.min_p = options.min_p.map(|min_p| min_p.powf(1.0 / temperature));
    }
    Ok(())
}

fn has_penalty(options: &GenerationOptions) -> bool {
    let GenerationOptions { repetition_penalty, presence_penalty, frequency_penalty, .. } = options;
    repetition_penalty.is_some_and(|penalty| penalty != 1.0)
        || [presence_penalty, frequency_penalty]
            .into_iter()
            .any(|penalty| penalty.is_some_and(|penalty| penalty != 0.0))
}

fn refused(cause: String) -> ApiError {
    ApiError::invalid("samplers", format!("`samplers` would change the reply and is not served as asked here: {cause}"))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::http::sampling::parse_options;

    fn min_p(body: Value) -> Result<Option<f32>, ApiError> {
        parse_options(&Fields::parse(body.to_string().as_bytes()).unwrap()).map(|options| options.min_p)
    }

    #[test]
    fn an_order_that_comes_to_the_same_is_served() {
        for body in [
            json!({"samplers": ["top_k", "top_p", "infill"], "top_k": 40, "top_p": 0.9}),
            json!({"samplers": [], "temperature": 0, "top_p": 0.5}),
            json!({"samplers": [], "n_predict": 0}),
            json!({"samplers": ["penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"],
                "temperature": 0.7, "top_k": 20}),
            json!({"samplers": ["penalties", "temperature", "top_k", "top_p"], "temperature": 0.7, "top_p": 0.9,
                "repeat_penalty": 1.1}),
        ] {
            assert_eq!(min_p(body.clone()), Ok(None), "{body}");
        }
    }

    #[test]
    fn a_bound_before_the_temperature_is_the_same_bound_behind_it() {
        let behind = min_p(json!({"samplers": ["min_p", "temperature"], "min_p": 0.25, "temperature": 0.5}));
        assert_eq!(behind, Ok(Some(0.0625)));
        let there = min_p(json!({"samplers": ["temperature", "min_p"], "min_p": 0.25, "temperature": 0.5}));
        assert_eq!(there, Ok(Some(0.25)));
    }

    #[test]
    fn any_other_order_is_refused() {
        for body in [
            json!({"samplers": ["top_p", "temperature"], "temperature": 0.5, "top_p": 0.9}),
            json!({"samplers": ["top_p", "temperature"], "top_p": 0.9}),
            json!({"samplers": ["temperature", "penalties"], "temperature": 0.5, "repeat_penalty": 1.1}),
            json!({"samplers": ["min_p", "top_p"], "min_p": 0.1, "top_p": 0.9}),
            json!({"samplers": ["min_p", "temperature"], "min_p": 0.1}),
            json!({"samplers": ["top_p"], "top_k": 40}),
            json!({"samplers": ["top_k"], "temperature": 0.5}),
            json!({"samplers": ["mystery"]}),
            json!({"samplers": "kp"}),
            json!({"samplers": [1]}),
        ] {
            assert_eq!(min_p(body.clone()).unwrap_err().param(), Some("samplers"), "{body}");
        }
    }
}
