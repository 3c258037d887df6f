//! Patterns over module paths, as Python's `re` reads them: what configurations name layers with.

use fancy_regex::{Captures, Regex, RegexBuilder};

use super::error::AdapterError;

/// Compiled size of one pattern, bytes. Module patterns need a few kilobytes; `.{9999}{9999}` would need gigabytes.
const MAX_PATTERN_BYTES: usize = 256 << 10;
/// Steps of one match of a pattern that looks around itself. A path has some sixty characters; a hostile pattern would
/// take one step for every way to cut them.
const MAX_STEPS: usize = 10_000;

/// A pattern and the field that it comes from.
#[derive(Debug)]
pub struct PathPattern {
    field: String,
    regex: Regex,
}

impl PathPattern {
    /// As `re.match` takes it: anchored at the start.
    ///
    /// # Errors
    /// When the pattern is invalid or too large; names `field`.
    pub fn at_start(field: &str, pattern: &str) -> Result<Self, AdapterError> {
        RegexBuilder::new(&format!(r"\A(?:{pattern})"))
            .delegate_size_limit(MAX_PATTERN_BYTES)
            .backtrack_limit(MAX_STEPS)
            .build()
            .map(|regex| Self { field: field.to_string(), regex })
            .map_err(|e| AdapterError::field(field, format!("not a pattern this server can use: {e}")))
    }

    /// As `re.fullmatch` takes it.
    ///
    /// # Errors
    /// As [`PathPattern::at_start`].
    pub fn whole(field: &str, pattern: &str) -> Result<Self, AdapterError> {
        Self::at_start(field, &format!(r"(?:{pattern})\z"))
    }

    fn is_match(&self, path: &str) -> Result<bool, AdapterError> {
        self.regex.is_match(path).map_err(|e| self.refusal(&e))
    }

    /// Whether it matches one of the paths.
    ///
    /// # Errors
    /// When the pattern takes too many steps; names its field.
    pub fn matches_any(&self, paths: &[String]) -> Result<bool, AdapterError> {
        for path in paths {
            if self.is_match(path)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// # Errors
    /// As [`PathPattern::matches_any`].
    pub fn captures<'a>(&self, path: &'a str) -> Result<Option<Captures<'a, str>>, AdapterError> {
        self.regex.captures(path).map_err(|e| self.refusal(&e))
    }

    fn refusal(&self, error: &fancy_regex::Error) -> AdapterError {
        AdapterError::field(&self.field, format!("the pattern cannot be matched: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: &str = "model.layers.3.self_attn.q_proj";

    #[test]
    fn a_pattern_may_look_around_itself() {
        for (pattern, expected) in [
            (r"^(?!.*(lm_head|visual)).*\.(q_proj|v_proj)$", true),
            (r"^(model(?=\.).*(?<=self_attn)\.(k_proj|v_proj))$", false),
            (r"(?P<stem>.*)\.q_proj\Z", true),
            (r".*\.layers\.([0-9])\.(?!mlp).*", true),
        ] {
            assert_eq!(PathPattern::whole("target_modules", pattern).unwrap().is_match(PATH).unwrap(), expected);
        }
    }

    #[test]
    fn a_pattern_that_cannot_be_used_is_refused_naming_its_field() {
        for bad in ["(", "*", &"(.{999}){999}".repeat(9)] {
            let refusal = PathPattern::whole("exclude_modules", bad).unwrap_err().to_string();
            assert!(refusal.contains("exclude_modules"), "{refusal}");
        }
    }

    #[test]
    fn a_pattern_that_would_match_for_hours_is_refused_naming_its_field() {
        let hostile = PathPattern::whole("rank_pattern", r"(?=x|.)((.*)*)*\2y").unwrap();
        assert!(hostile.is_match(&"a.".repeat(30)).unwrap_err().to_string().contains("rank_pattern"));
    }
}
