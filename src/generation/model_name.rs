//! What the `model` field of a request may say.

/// A model name, split into base and adapter. Whether the adapter exists is for the registry to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelName<'a> {
    Base,
    Adapter(&'a str),
}

impl<'a> ModelName<'a> {
    /// Reads `name` against the id of the base and the names of adapters: absent or empty, the base's id, the exact name
    /// of an adapter, an alias of the base (any case, `-` for `:`), `<base>-<adapter>`, or a bare adapter name.
    ///
    /// An adapter's own name comes before anything that is read into it, as it may begin like the base's.
    pub fn parse(name: Option<&'a str>, base_id: &str, is_adapter: impl Fn(&str) -> bool) -> Self {
        let Some(name) = name.filter(|name| !name.is_empty() && *name != base_id) else { return Self::Base };
        if is_adapter(name) {
            return Self::Adapter(name);
        }
        let Some(rest) = strip_base(name, base_id) else { return Self::Adapter(name) };
        match rest.strip_prefix('-') {
            _ if rest.is_empty() => Self::Base,
            Some(adapter) if !adapter.is_empty() => Self::Adapter(adapter),
            _ => Self::Adapter(name),
        }
    }
}

fn strip_base<'a>(name: &'a str, base_id: &str) -> Option<&'a str> {
    let (head, rest) = name.split_at_checked(base_id.len())?;
    let is_base = head.bytes().map(canonical).eq(base_id.bytes().map(canonical));
    is_base.then_some(rest)
}

fn canonical(byte: u8) -> u8 {
    if byte == b':' { b'-' } else { byte.to_ascii_lowercase() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: &str = "qwen2.5-coder:0.5b";

    #[test]
    fn absent_and_empty_names_and_aliases_mean_the_base() {
        for name in [None, Some(""), Some(BASE), Some("Qwen2.5-Coder:0.5B"), Some("qwen2.5-coder-0.5b")] {
            assert_eq!(ModelName::parse(name, BASE, |_| false), ModelName::Base, "{name:?}");
        }
    }

    #[test]
    fn an_adapter_is_named_with_or_without_its_base() {
        for name in ["qwen2.5-coder:0.5b-Conala", "QWEN2.5-coder-0.5b-Conala", "Conala"] {
            assert_eq!(ModelName::parse(Some(name), BASE, |_| false), ModelName::Adapter("Conala"), "{name}");
        }
    }

    #[test]
    fn a_longer_or_cut_base_name_is_not_the_base() {
        for name in ["qwen2.5-coder:0.5bx", "qwen2.5-coder:0.5b-", "qwen2.5-coder", "é", "qwen2.5-coder:0.5é"] {
            assert_eq!(ModelName::parse(Some(name), BASE, |_| false), ModelName::Adapter(name), "{name}");
        }
    }

    #[test]
    fn the_exact_name_of_an_adapter_comes_before_the_base_in_it() {
        let parse = |name| ModelName::parse(Some(name), BASE, |name| name.starts_with("qwen2.5-coder-0.5b"));
        assert_eq!(parse("qwen2.5-coder-0.5b-sql"), ModelName::Adapter("qwen2.5-coder-0.5b-sql"));
        assert_eq!(parse("qwen2.5-coder-0.5b"), ModelName::Adapter("qwen2.5-coder-0.5b"));
        // Other spellings of the base's name stay the base's.
        assert_eq!(parse(BASE), ModelName::Base);
        assert_eq!(parse("qwen2.5-coder:0.5b-sql"), ModelName::Adapter("sql"));
        let full = "qwen2.5-coder:0.5b-qwen2.5-coder-0.5b-sql";
        assert_eq!(parse(full), ModelName::Adapter("qwen2.5-coder-0.5b-sql"));
    }
}
