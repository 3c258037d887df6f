//! What a request says of the weights it wants, and which adapters its caller may know of.

use std::sync::Arc;

/// The weights a request wants.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Selection {
    /// A base or an adapter; `None` is the base.
    pub model: Option<String>,
    /// `None` when the request says nothing of adapters beside its model.
    pub adapters: Option<AdapterField>,
}

impl Selection {
    pub fn model(name: &str) -> Self {
        Self { model: Some(name.to_owned()), adapters: None }
    }
}

/// Adapters in a field of their own; none of them asks for the base alone.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterField {
    /// What the client calls the field.
    pub name: &'static str,
    pub entries: Vec<AdapterEntry>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct AdapterEntry {
    /// Where the request names it, e.g. `adapters[1].name`.
    pub param: String,
    pub adapter: AdapterRef,
    /// Strength: finite, 1 as trained, 0 without effect.
    pub scale: f32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AdapterRef {
    /// The bare name, or the id of the model `<base>-<name>`.
    Name(String),
    /// As the list of adapters numbers them.
    Id(usize),
}

/// The adapters a caller may know of. The others are to it as if they were not there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Access {
    #[default]
    All,
    /// Names; one that ends in `*` stands for all that begin so.
    Only(Arc<[String]>),
}

impl Access {
    pub fn allows(&self, adapter: &str) -> bool {
        match self {
            Self::All => true,
            Self::Only(patterns) => patterns.iter().any(|pattern| match pattern.strip_suffix('*') {
                Some(prefix) => adapter.starts_with(prefix),
                None => adapter == pattern,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_allows_its_own_name_or_every_ending_of_it() {
        let access = Access::Only(Arc::from(["conala".to_owned(), "team-*".to_owned()]));
        for allowed in ["conala", "team-", "team-a"] {
            assert!(access.allows(allowed), "{allowed}");
        }
        for hidden in ["conala2", "Conala", "team", "a-team-"] {
            assert!(!access.allows(hidden), "{hidden}");
        }
        assert!(Access::All.allows("anything") && !Access::Only(Arc::from([])).allows("anything"));
    }
}
