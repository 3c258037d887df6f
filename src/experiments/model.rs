//! Names of models in the one form that arms are compared by.

use crate::generation::model_name::ModelName;

/// `<base>[-<adapter>][+icl:<store>@<k>]` of any name that a request may send.
pub fn full_name(base_id: &str, name: &str) -> String {
    let (model, examples) = split(name);
    match ModelName::parse(Some(model), base_id) {
        ModelName::Base => format!("{base_id}{examples}"),
        ModelName::Adapter(adapter) => format!("{base_id}-{adapter}{examples}"),
    }
}

/// The adapter's name, unless `name` means the base.
pub fn adapter<'a>(base_id: &str, name: &'a str) -> Option<&'a str> {
    match ModelName::parse(Some(split(name).0), base_id) {
        ModelName::Base => None,
        ModelName::Adapter(adapter) => Some(adapter),
    }
}

fn split(name: &str) -> (&str, &str) {
    name.split_at(name.find("+icl:").unwrap_or(name.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_to_name_a_model_is_one_name() {
        for (name, full, of) in [
            ("coder:1b", "coder:1b", None),
            ("Coder-1B", "coder:1b", None),
            ("conala", "coder:1b-conala", Some("conala")),
            ("coder:1b-conala", "coder:1b-conala", Some("conala")),
            ("coder:1b+icl:python@3", "coder:1b+icl:python@3", None),
            ("conala+icl:python@3", "coder:1b-conala+icl:python@3", Some("conala")),
        ] {
            assert_eq!((full_name("coder:1b", name).as_str(), adapter("coder:1b", name)), (full, of), "{name}");
        }
    }
}
