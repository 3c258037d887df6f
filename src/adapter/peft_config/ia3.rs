//! The configuration of (IA)³.

use super::fields::{Fields, OneOrMany};
use crate::adapter::error::AdapterError;
use crate::adapter::path_pattern::PathPattern;
use crate::adapter::sites::{SiteSelector, paths_in_training};

/// Which layers are scaled, and at which end.
#[derive(Debug)]
pub struct Ia3Config {
    pub selector: SiteSelector,
    feedforward: Feedforward,
}

#[derive(Debug)]
enum Feedforward {
    /// A path matches by its ending, with no regard to its dots.
    Endings(Vec<String>),
    /// Matches whole paths.
    Pattern(PathPattern),
}

impl Ia3Config {
    /// # Errors
    /// When a field is malformed or asks for what this server does not do; names it.
    pub(super) fn read(mut fields: Fields) -> Result<Self, AdapterError> {
        let field = "feedforward_modules";
        let feedforward = match fields.take_as::<OneOrMany<String>>(field)? {
            None => Feedforward::Endings(Vec::new()),
            Some(OneOrMany::Many(endings)) => Feedforward::Endings(endings),
            Some(OneOrMany::One(pattern)) => Feedforward::Pattern(PathPattern::whole(field, &pattern)?),
        };
        let selector = fields.take_selector(Vec::new())?;
        fields.refuse_rest(&["init_ia3_weights"])?;
        Ok(Self { selector, feedforward })
    }

    /// Whether the vector of the layer at a module path scales its inputs, not its outputs.
    ///
    /// # Errors
    /// When a pattern takes too many steps; names its field.
    pub fn is_feedforward(&self, path: &str) -> Result<bool, AdapterError> {
        let paths = paths_in_training(path);
        match &self.feedforward {
            Feedforward::Endings(endings) => {
                Ok(endings.iter().any(|ending| paths.iter().any(|path| path.ends_with(ending.as_str()))))
            }
            Feedforward::Pattern(pattern) => pattern.matches_any(&paths),
        }
    }
}
