//! One store: its examples, checked, with their version and the index to search them.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest, Sha256};

use super::Example;
use super::bm25::Bm25;
use super::embedding::{EmbeddingEndpoint, UnitVector};
use super::error::{EmbeddingError, OpenError, StoreError};
use crate::hexadecimal::hexadecimal;

pub const MAX_EXAMPLES: usize = 10_000;
pub(super) const MAX_STORE_BYTES: usize = 16 << 20;
pub const MAX_INSTRUCTION_BYTES: usize = 8 << 10;
pub const MAX_CODE_BYTES: usize = 32 << 10;
const MAX_NAME_LEN: usize = 64;

type Embeddings = Result<Arc<[UnitVector]>, EmbeddingError>;

/// A named set of examples. Never changes: a replaced store is another one with another version.
#[derive(Debug)]
pub struct Store {
    name: String,
    version: String,
    examples: Vec<Example>,
    pub(super) bm25: Bm25,
    /// Of the examples' instructions, computed when first needed, or why they could not be.
    embeddings: Mutex<Option<Embeddings>>,
    /// How often they could not be.
    num_failures: AtomicUsize,
}

impl Store {
    /// # Errors
    /// A name or an example that breaks a limit, or no examples at all.
    pub fn new(name: &str, examples: Vec<Example>) -> Result<Self, StoreError> {
        check_name(name)?;
        if examples.is_empty() || examples.len() > MAX_EXAMPLES {
            return Err(StoreError::NumExamples { num_examples: examples.len(), max: MAX_EXAMPLES });
        }
        for (index, example) in examples.iter().enumerate() {
            check_text(index, "instruction", &example.instruction, MAX_INSTRUCTION_BYTES)?;
            check_text(index, "code", &example.code, MAX_CODE_BYTES)?;
        }
        let jsonl = to_jsonl(&examples);
        if jsonl.len() > MAX_STORE_BYTES {
            return Err(StoreError::TooLarge { num_bytes: jsonl.len(), max: MAX_STORE_BYTES });
        }
        let version = hexadecimal(Sha256::new_with_prefix(&jsonl));
        let bm25 = Bm25::new(examples.iter().map(|example| example.instruction.as_str()));
        let (name, embeddings, num_failures) = (name.to_owned(), Mutex::new(None), AtomicUsize::new(0));
        Ok(Self { name, version, examples, bm25, embeddings, num_failures })
    }

    /// Reads JSONL, one example a line; keys other than `instruction` and `code` are ignored. `path` is for errors.
    pub(super) fn from_jsonl(name: &str, text: &str, path: &Path) -> Result<Self, OpenError> {
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let examples = lines.map(|(index, line)| {
            serde_json::from_str(line).map_err(|source| OpenError::Line {
                path: path.to_owned(),
                line: index + 1,
                source,
            })
        });
        let examples = examples.collect::<Result<Vec<Example>, _>>()?;
        Self::new(name, examples).map_err(|source| OpenError::Store { path: path.to_owned(), source })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// SHA-256 of the examples in order, hexadecimal; the name and the file's white space are not in it.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Not empty; an example's id is its place here.
    pub fn examples(&self) -> &[Example] {
        &self.examples
    }

    /// The file's content.
    pub(super) fn to_jsonl(&self) -> String {
        to_jsonl(&self.examples)
    }

    /// Unit vectors of all instructions. Whoever comes first asks the endpoint, the others wait for the same answer, be it
    /// that it failed: each of a hundred would have to wait for all the failures before its own.
    pub(super) fn embeddings(&self, endpoint: &EmbeddingEndpoint) -> Embeddings {
        let num_failures = self.num_failures.load(Ordering::SeqCst);
        let mut embeddings = self.embeddings.lock().unwrap_or_else(PoisonError::into_inner);
        match &*embeddings {
            Some(Ok(known)) => return Ok(known.clone()),
            Some(Err(error)) if self.num_failures.load(Ordering::SeqCst) != num_failures => return Err(error.clone()),
            _ => {}
        }
        let instructions: Vec<&str> = self.examples.iter().map(|example| example.instruction.as_str()).collect();
        let computed: Embeddings = endpoint.embed(&instructions).map(Arc::from);
        if computed.is_err() {
            self.num_failures.fetch_add(1, Ordering::SeqCst);
        }
        *embeddings = Some(computed.clone());
        computed
    }
}

/// Names are file names and parts of model names.
pub(super) fn check_name(name: &str) -> Result<(), StoreError> {
    let begins_well = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if begins_well && name.len() <= MAX_NAME_LEN && name.chars().all(is_allowed) {
        Ok(())
    } else {
        Err(StoreError::InvalidName(name.chars().take(MAX_NAME_LEN).collect()))
    }
}

fn check_text(index: usize, field: &'static str, text: &str, max_bytes: usize) -> Result<(), StoreError> {
    let reason = if text.trim().is_empty() {
        "must not be empty".to_owned()
    } else if text.len() > max_bytes {
        format!("must have at most {max_bytes} bytes, not {}", text.len())
    } else {
        return Ok(());
    };
    Err(StoreError::Example { index, field, reason })
}

/// The canonical form, which the version is the hash of.
fn to_jsonl(examples: &[Example]) -> String {
    examples
        .iter()
        .map(|Example { instruction, code }| {
            // `Value` displays as compact JSON and, unlike serializing a struct, cannot fail.
            let [instruction, code] = [instruction, code].map(|text| serde_json::Value::from(text.as_str()));
            format!("{{\"instruction\":{instruction},\"code\":{code}}}\n")
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn example(instruction: &str, code: &str) -> Example {
        Example { instruction: instruction.to_owned(), code: code.to_owned() }
    }

    fn refusal(name: &str, examples: Vec<Example>) -> String {
        Store::new(name, examples).expect_err("refused").to_string()
    }

    #[test]
    fn names_that_could_leave_the_folder_or_hide_in_it_are_refused() {
        let long = "a".repeat(65);
        for name in ["", ".hidden", "-x", "a/b", "..", "a b", "a@3", "é", "a+b", &long] {
            assert!(refusal(name, vec![example("a", "b")]).contains("cannot name a store"), "{name}");
        }
        for name in ["a", "A.b_c-9", &long[..64]] {
            assert!(check_name(name).is_ok(), "{name}");
        }
    }

    #[test]
    fn an_example_at_fault_is_named_with_its_field() {
        let good = example("add", "a + b");
        let error = refusal("s", vec![good.clone(), example("sub", " \n")]);
        assert!(error.starts_with("examples[1].code: must not be empty"), "{error}");
        let error = refusal("s", vec![example(&"x".repeat(MAX_INSTRUCTION_BYTES + 1), "y")]);
        assert!(error.starts_with("examples[0].instruction: must have at most 8192 bytes"), "{error}");
        assert!(refusal("s", vec![]).contains("1 to 10000 examples, not 0"));
        assert!(refusal("s", vec![good; MAX_EXAMPLES + 1]).contains("not 10001"));
        let large = vec![example("x", &"y".repeat(MAX_CODE_BYTES)); 600];
        assert!(refusal("s", large).contains("at most 16777216 bytes"));
    }

    #[test]
    fn the_version_is_of_the_examples_and_their_order_alone() {
        let (one, two) = (example("a", "1"), example("b", "2"));
        let version = |name, examples: &[&Example]| {
            let examples = examples.iter().map(|&example| example.clone()).collect();
            Store::new(name, examples).unwrap().version().to_owned()
        };
        assert_eq!(version("s", &[&one, &two]), version("t", &[&one, &two]));
        assert_ne!(version("s", &[&one, &two]), version("s", &[&two, &one]));
        // What belongs to which field is part of it.
        assert_ne!(version("s", &[&example("ab", "c")]), version("s", &[&example("a", "bc")]));
        let spaced = "\n { \"code\" : \"1\", \"note\": 7, \"instruction\": \"a\" } \n\n";
        let read = Store::from_jsonl("s", spaced, Path::new("s.jsonl")).unwrap();
        assert_eq!(read.version(), version("s", &[&one]));
    }

    #[test]
    fn a_broken_line_is_named_with_its_file() {
        let text = "{\"instruction\":\"a\",\"code\":\"b\"}\n\n{\"instruction\":\"a\"}\n";
        let error = Store::from_jsonl("s", text, Path::new("s.jsonl")).expect_err("refused").to_string();
        assert!(error.contains("s.jsonl, line 3: missing field `code`"), "{error}");
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back_the_same(pairs in prop::collection::vec(("\\PC*[a-z\\n\"\\\\]", "\\PC*[a-z\\n]x"), 1..9)) {
            let examples: Vec<Example> = pairs.iter().map(|(instruction, code)| example(&format!("i{instruction}"), code)).collect();
            let store = Store::new("s", examples).unwrap();
            let read = Store::from_jsonl("s", &store.to_jsonl(), Path::new("s.jsonl")).unwrap();
            prop_assert_eq!(read.examples(), store.examples());
            prop_assert_eq!(read.version(), store.version());
        }
    }
}
