//! Names of models in the one form that arms are compared by.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::generation::model_name::ModelName;

/// How names of models are read.
#[derive(Clone)]
pub struct ModelNames {
    base_id: String,
    /// `server.model_aliases`.
    aliases: BTreeMap<String, String>,
    /// Whether there is an adapter of exactly this name.
    is_adapter: Arc<dyn Fn(&str) -> bool + Send + Sync>,
}

impl ModelNames {
    pub fn new(
        base_id: &str,
        aliases: &BTreeMap<String, String>,
        is_adapter: impl Fn(&str) -> bool + Send + Sync + 'static,
    ) -> Self {
        Self { base_id: base_id.to_owned(), aliases: aliases.clone(), is_adapter: Arc::new(is_adapter) }
    }

    pub(super) fn base_id(&self) -> &str {
        &self.base_id
    }

    /// `<base>[-<adapter>][+icl:<store>@<k>]` of any name that a request may send. What is recorded goes by it, so that it
    /// must not change with the adapters that are there.
    pub(super) fn full_name(&self, name: &str) -> String {
        let ((model, examples), base_id) = (self.split(name), &self.base_id);
        match ModelName::parse(Some(model), base_id, |_| false) {
            ModelName::Base => format!("{base_id}{examples}"),
            ModelName::Adapter(adapter) => format!("{base_id}-{adapter}{examples}"),
        }
    }

    /// The adapter's name, unless `name` means the base.
    pub(super) fn adapter<'a>(&'a self, name: &'a str) -> Option<&'a str> {
        match ModelName::parse(Some(self.split(name).0), &self.base_id, &*self.is_adapter) {
            ModelName::Base => None,
            ModelName::Adapter(adapter) => Some(adapter),
        }
    }

    /// What stands for the weights, and the examples.
    fn split<'a>(&'a self, name: &'a str) -> (&'a str, &'a str) {
        let (model, examples) = name.split_at(name.find("+icl:").unwrap_or(name.len()));
        (self.aliases.get(model).map_or(model, String::as_str), examples)
    }
}

impl fmt::Debug for ModelNames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModelNames").field("base_id", &self.base_id).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_to_name_a_model_is_one_name() {
        let aliases = [("best", "conala"), ("claude", "Coder-1B")];
        let aliases = BTreeMap::from(aliases.map(|(alias, model)| (alias.to_owned(), model.to_owned())));
        let names = ModelNames::new("coder:1b", &aliases, |_| false);
        for (name, full, of) in [
            ("coder:1b", "coder:1b", None),
            ("Coder-1B", "coder:1b", None),
            ("conala", "coder:1b-conala", Some("conala")),
            ("coder:1b-conala", "coder:1b-conala", Some("conala")),
            ("coder:1b+icl:python@3", "coder:1b+icl:python@3", None),
            ("conala+icl:python@3", "coder:1b-conala+icl:python@3", Some("conala")),
            ("best", "coder:1b-conala", Some("conala")),
            ("best+icl:python@3", "coder:1b-conala+icl:python@3", Some("conala")),
            ("claude", "coder:1b", None),
            ("claude+icl:python@3", "coder:1b+icl:python@3", None),
            ("bestest", "coder:1b-bestest", Some("bestest")),
        ] {
            assert_eq!((names.full_name(name).as_str(), names.adapter(name)), (full, of), "{name}");
        }
    }

    #[test]
    fn an_adapter_that_is_there_by_this_very_name_is_meant() {
        let names = ModelNames::new("coder:1b", &BTreeMap::new(), |name| name == "coder-1b-sql");
        assert_eq!(names.adapter("coder-1b-sql+icl:python@3"), Some("coder-1b-sql"));
        assert_eq!(names.adapter("coder:1b-sql"), Some("sql"));
    }
}
