//! `adapter_config.json`, read against an allow-list.
//!
//! A field is honoured, known to be without effect at inference, or must have its default value: an adapter whose
//! configuration says more than this server does would be served with the wrong arithmetic.

use std::collections::BTreeMap;
use std::fmt;

use regex::Regex;
use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::Value;

use super::error::AdapterError;
use super::sites::{PathMatch, SiteSelector, match_at_start};
use crate::model::spec::Module;

pub const FILE: &str = "adapter_config.json";
pub const MAX_FILE_BYTES: u64 = 1 << 20;
const MAX_RANK: usize = 1024;
/// Entries of one `*_pattern`: several per site of any base, and few enough to compile.
const MAX_PATTERN_ENTRIES: usize = 2048;

/// PEFT's defaults for fields a file may leave out.
const DEFAULT_RANK: usize = 8;
const DEFAULT_ALPHA: f64 = 8.0;

/// Fields that matter to training, provenance or other runtimes only.
const WITHOUT_EFFECT: &[&str] = &[
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "inference_mode",
    "lora_dropout",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
];

/// How the low-rank pairs of a LoRA adapter are to be applied.
#[derive(Debug)]
pub struct LoraConfig {
    pub selector: SiteSelector,
    /// Whether every site brings a `lora_B.bias`.
    pub lora_bias: bool,
    rank: usize,
    alpha: f64,
    rank_pattern: Vec<(Regex, usize)>,
    alpha_pattern: Vec<(Regex, f64)>,
    use_rslora: bool,
}

impl LoraConfig {
    /// # Errors
    /// When the text is not a JSON object, or a field is malformed or asks for what this server does not do; names it.
    pub fn parse(text: &[u8]) -> Result<Self, AdapterError> {
        let parse_error = |e: serde_json::Error| AdapterError::Parse { file: FILE, reason: e.to_string() };
        let entries: Entries = serde_json::from_slice(text).map_err(parse_error)?;
        let patterns: Patterns = serde_json::from_slice(text).map_err(parse_error)?;
        let mut fields = Fields(entries.0.into_iter().collect());

        fields.require_text("peft_type", &["LORA"])?;
        if !fields.is_null("task_type") {
            fields.require_text("task_type", &["CAUSAL_LM"])?;
        }
        if !fields.is_null("bias") {
            fields.require_text("bias", &["none"])?;
        }
        // The other initialisations subtracted the initial delta from the base weights, which the file does not hold.
        match fields.take("init_lora_weights") {
            Value::Null | Value::Bool(_) => {}
            Value::String(name) if ["gaussian", "eva", "orthogonal"].contains(&name.as_str()) => {}
            other => return Err(AdapterError::field("init_lora_weights", format!("{other} changed the base weights"))),
        }

        fields.take("rank_pattern");
        fields.take("alpha_pattern");
        let config = Self {
            rank: fields.take_as("r")?.map_or(Ok(DEFAULT_RANK), |r| checked_rank("r", r))?,
            alpha: fields.take_as("lora_alpha")?.unwrap_or(DEFAULT_ALPHA),
            rank_pattern: patterns.rank_pattern.unwrap_or_default().compile("rank_pattern", checked_rank)?,
            alpha_pattern: patterns.alpha_pattern.unwrap_or_default().compile("alpha_pattern", |_, alpha| Ok(alpha))?,
            use_rslora: fields.take_as("use_rslora")?.unwrap_or(false),
            lora_bias: fields.take_as("lora_bias")?.unwrap_or(false),
            selector: fields.take_selector()?,
        };
        fields.refuse_rest()?;
        Ok(config)
    }

    /// Rank of the pair at a module path.
    pub fn rank(&self, path: &str) -> usize {
        first_match(&self.rank_pattern, path).unwrap_or(self.rank)
    }

    /// What the delta at a module path is multiplied by.
    ///
    /// # Errors
    /// When it is no finite 32-bit number.
    pub fn scale(&self, path: &str) -> Result<f32, AdapterError> {
        let rank = self.rank(path) as f64;
        let alpha = first_match(&self.alpha_pattern, path).unwrap_or(self.alpha);
        let scale = (alpha / if self.use_rslora { rank.sqrt() } else { rank }) as f32;
        if scale.is_finite() {
            Ok(scale)
        } else {
            Err(AdapterError::field("lora_alpha", format!("{alpha} gives no finite scale at {path}")))
        }
    }
}

fn first_match<T: Copy>(patterns: &[(Regex, T)], path: &str) -> Option<T> {
    patterns.iter().find(|(pattern, _)| pattern.is_match(path)).map(|(_, value)| *value)
}

fn checked_rank(field: &str, rank: i64) -> Result<usize, AdapterError> {
    match usize::try_from(rank) {
        Ok(rank @ 1..=MAX_RANK) => Ok(rank),
        _ => Err(AdapterError::field(field, format!("{rank} is not a rank between 1 and {MAX_RANK}"))),
    }
}

/// A JSON object in the order of the file: of several patterns that match, PEFT takes the first.
#[derive(Default)]
struct Entries(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EntriesVisitor;

        impl<'de> Visitor<'de> for EntriesVisitor {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Entries, M::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    let value = map.next_value().map_err(|e| M::Error::custom(format!("field {name:?}: {e}")))?;
                    entries.push((name, value));
                }
                Ok(Entries(entries))
            }
        }

        deserializer.deserialize_map(EntriesVisitor)
    }
}

impl Entries {
    fn compile<T: DeserializeOwned, U>(
        self,
        field: &str,
        check: impl Fn(&str, T) -> Result<U, AdapterError>,
    ) -> Result<Vec<(Regex, U)>, AdapterError> {
        if self.0.len() > MAX_PATTERN_ENTRIES {
            return Err(AdapterError::field(field, format!("more than {MAX_PATTERN_ENTRIES} entries")));
        }
        let compile_entry = |(key, value)| {
            let field = format!("{field}[{key}]");
            let value = serde_json::from_value(value).map_err(|e| AdapterError::field(&field, e))?;
            Ok((match_at_start(&field, &format!(r"(?:.*\.)?(?:{key})\z"))?, check(&field, value)?))
        };
        self.0.into_iter().map(compile_entry).collect()
    }
}

#[derive(Deserialize)]
struct Patterns {
    rank_pattern: Option<Entries>,
    alpha_pattern: Option<Entries>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "neither a value of the right type nor a list of them")]
enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    fn into_vec(self) -> Vec<T> {
        match self {
            Self::One(value) => vec![value],
            Self::Many(values) => values,
        }
    }
}

impl OneOrMany<String> {
    /// PEFT reads a single text as a pattern for the whole path, a list as names.
    fn into_path_match(self, field: &str) -> Result<PathMatch, AdapterError> {
        match self {
            Self::One(pattern) => PathMatch::pattern(field, &pattern),
            Self::Many(names) => Ok(PathMatch::Names(names)),
        }
    }
}

/// The fields not yet interpreted.
struct Fields(BTreeMap<String, Value>);

impl Fields {
    fn is_null(&self, name: &str) -> bool {
        self.0.get(name).is_none_or(Value::is_null)
    }

    fn take(&mut self, name: &str) -> Value {
        self.0.remove(name).unwrap_or(Value::Null)
    }

    fn take_as<T: DeserializeOwned>(&mut self, name: &str) -> Result<Option<T>, AdapterError> {
        serde_json::from_value(self.take(name)).map_err(|e| AdapterError::field(name, e))
    }

    fn require_text(&mut self, name: &str, supported: &[&str]) -> Result<(), AdapterError> {
        match self.take(name) {
            Value::String(text) if supported.contains(&text.as_str()) => Ok(()),
            Value::Null => Err(AdapterError::field(name, format!("missing (supported: {})", supported.join(", ")))),
            other => Err(AdapterError::field(
                name,
                format!("{other} is not supported (supported: {})", supported.join(", ")),
            )),
        }
    }

    fn take_selector(&mut self) -> Result<SiteSelector, AdapterError> {
        let targets = match self.take_as::<OneOrMany<String>>("target_modules")? {
            Some(OneOrMany::One(text)) if text.eq_ignore_ascii_case("all-linear") => {
                PathMatch::Names(Module::ALL.map(|module| module.name().to_string()).to_vec())
            }
            Some(targets) => targets.into_path_match("target_modules")?,
            None => return Err(AdapterError::field("target_modules", "missing: it must name the adapted modules")),
        };
        let excluded = self
            .take_as::<OneOrMany<String>>("exclude_modules")?
            .map(|excluded| excluded.into_path_match("exclude_modules"))
            .transpose()?;
        let layers: Vec<usize> = self.take_as("layers_to_transform")?.map(OneOrMany::into_vec).unwrap_or_default();
        if !layers.is_empty() && matches!(targets, PathMatch::Pattern(_)) {
            let reason = "has no meaning when target_modules is a pattern: put the layers into the pattern";
            return Err(AdapterError::field("layers_to_transform", reason));
        }
        let layer_patterns: Vec<String> = self.take_as("layers_pattern")?.map(OneOrMany::into_vec).unwrap_or_default();
        let layer_patterns = layer_patterns
            .iter()
            .filter(|pattern| !pattern.is_empty())
            .map(|pattern| match_at_start("layers_pattern", &format!(r".*\.{pattern}\.(\d+)\.")))
            .collect::<Result<_, _>>()?;
        let layers = (!layers.is_empty()).then(|| layers.into_iter().collect());
        Ok(SiteSelector { targets, excluded, layers, layer_patterns })
    }

    /// Refuses what changes the arithmetic in a way this server does not know.
    fn refuse_rest(self) -> Result<(), AdapterError> {
        for (name, value) in self.0 {
            let is_default = match &value {
                Value::Null | Value::Bool(false) => true,
                Value::Array(items) => items.is_empty(),
                Value::Object(entries) => entries.is_empty(),
                Value::Bool(true) | Value::Number(_) | Value::String(_) => false,
            };
            if !is_default && !WITHOUT_EFFECT.contains(&name.as_str()) {
                return Err(AdapterError::field(&name, "set to a value that this server does not support"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const V_PROJ_3: &str = "model.layers.3.self_attn.v_proj";

    fn config(fields: &str) -> Result<LoraConfig, AdapterError> {
        LoraConfig::parse(format!(r#"{{"peft_type": "LORA", "target_modules": ["q_proj"]{fields}}}"#).as_bytes())
    }

    fn refusal(fields: &str) -> String {
        config(fields).unwrap_err().to_string()
    }

    #[test]
    fn scale_is_alpha_over_rank_or_over_its_root() {
        assert_eq!(config("").unwrap().scale(V_PROJ_3).unwrap(), 1.0);
        assert_eq!(config(r#","r": 16, "lora_alpha": 32"#).unwrap().scale(V_PROJ_3).unwrap(), 2.0);
        assert_eq!(config(r#","r": 16, "lora_alpha": 32, "use_rslora": true"#).unwrap().scale(V_PROJ_3).unwrap(), 8.0);
    }

    #[test]
    fn the_first_pattern_in_file_order_wins_and_matches_whole_components() {
        let c = config(
            r#","r": 4, "lora_alpha": 16, "alpha_pattern": {"self_attn.v_proj": 4},
               "rank_pattern": {"v_proj": 2, "layers.3.self_attn.v_proj": 8, "a_proj": 1, "roj": 1}"#,
        )
        .unwrap();
        assert_eq!(c.rank(V_PROJ_3), 2);
        assert_eq!(c.rank("model.layers.3.self_attn.q_proj"), 4);
        assert_eq!(c.scale(V_PROJ_3).unwrap(), 2.0);
        let c = config(r#","rank_pattern": {"layers.3.self_attn.v_proj": 8, "a": 1, "v_proj": 2}"#).unwrap();
        assert_eq!((c.rank(V_PROJ_3), c.rank("model.layers.13.self_attn.v_proj")), (8, 2));
    }

    #[test]
    fn a_field_that_changes_the_arithmetic_is_refused_by_name() {
        for (name, value) in [
            ("use_dora", "true"),
            ("fan_in_fan_out", "true"),
            ("modules_to_save", r#"["lm_head"]"#),
            ("layer_replication", "[[0, 4]]"),
            ("trainable_token_indices", "[1]"),
            ("arrow_config", r#"{"top_k": 3}"#),
            ("field_of_the_future", "0.5"),
            ("bias", r#""all""#),
            ("init_lora_weights", r#""olora""#),
            ("init_lora_weights", r#""pissa_niter_4""#),
            ("task_type", r#""SEQ_CLS""#),
            ("r", "0"),
            ("r", "1025"),
            ("r", "8.5"),
            ("lora_alpha", "1e999"),
            ("lora_alpha", "1e300"),
            ("lora_alpha", "NaN"),
            ("lora_alpha", r#""16""#),
            ("rank_pattern", r#"{"q_proj": -1}"#),
            ("rank_pattern", r#"{"(?=q)q_proj": 1}"#),
            ("alpha_pattern", "[1]"),
            ("layers_to_transform", "[-1]"),
        ] {
            let parsed = config(&format!(r#","{name}": {value}"#));
            let refusal = match parsed.and_then(|c| c.scale(V_PROJ_3)) {
                Ok(_) => panic!("{name} = {value} was accepted"),
                Err(e) => e.to_string(),
            };
            let named = refusal.contains(name) || name == "alpha_pattern" && refusal.contains(FILE);
            assert!(named, "{name} = {value}: {refusal}");
        }
    }

    #[test]
    fn defaults_and_fields_without_effect_are_accepted() {
        config(
            r#","use_dora": false, "modules_to_save": null, "loftq_config": {}, "layer_replication": [],
               "lora_dropout": 0.05, "megatron_core": "megatron.core", "qalora_group_size": 16, "revision": "main",
               "init_lora_weights": "gaussian", "field_of_the_future": false, "task_type": null, "layers_pattern": """#,
        )
        .unwrap();
    }

    #[test]
    fn another_method_is_refused_by_its_type_before_its_fields() {
        let refusal = LoraConfig::parse(br#"{"feedforward_modules": ["x"], "peft_type": "IA3"}"#).unwrap_err();
        assert!(refusal.to_string().contains("peft_type"));
    }

    #[test]
    fn layers_with_a_pattern_are_refused() {
        let refusal =
            LoraConfig::parse(br#"{"peft_type": "LORA", "target_modules": ".*q_proj", "layers_to_transform": 1}"#);
        assert!(refusal.unwrap_err().to_string().contains("layers_to_transform"));
    }

    #[test]
    fn text_that_is_no_object_is_refused_naming_the_file() {
        for text in ["", "{ r: 8,", "[]", "null", "\u{0}", "{}{}"] {
            assert!(LoraConfig::parse(text.as_bytes()).unwrap_err().to_string().contains(FILE), "{text:?}");
        }
        assert!(refusal(r#","r": 1e999"#).contains('r'));
    }

    proptest! {
        #[test]
        fn damaged_text_never_panics(at in any::<prop::sample::Index>(), byte: u8, cut in any::<prop::sample::Index>()) {
            let mut text = br#"{"peft_type": "LORA", "r": 8, "rank_pattern": {"q_proj": 2}, "target_modules": ["q_proj"],
                "lora_alpha": 16, "layers_to_transform": [0, 1], "layers_pattern": "layers"}"#.to_vec();
            let at = at.index(text.len());
            text[at] = byte;
            if let Ok(config) = LoraConfig::parse(&text) {
                prop_assert!((1..=MAX_RANK).contains(&config.rank(V_PROJ_3)));
            }
            let _ = LoraConfig::parse(&text[..cut.index(text.len())]);
        }
    }
}
