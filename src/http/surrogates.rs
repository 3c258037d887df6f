//! JSON that was cut between the halves of a character: editors count in UTF-16, and what they cut at their cursor may end
//! in `\ud83d` without its other half. That is no valid JSON string; here it becomes U+FFFD, as it would in any decoder
//! that does not fail.

use std::borrow::Cow;

const ESCAPE_LEN: usize = "\\uXXXX".len();
const REPLACEMENT: &[u8; ESCAPE_LEN] = b"\\ufffd";

/// `json` with every escaped surrogate that has no partner replaced; unchanged where there is none.
pub fn without_lone_surrogates(json: &[u8]) -> Cow<'_, [u8]> {
    let mut repaired = Cow::Borrowed(json);
    let mut index = 0;
    // Outside of strings there is no backslash in what can be parsed at all.
    while let Some(backslash) = json.get(index..).and_then(|rest| rest.iter().position(|byte| *byte == b'\\')) {
        let start = index + backslash;
        index = match (unit(json, start), unit(json, start + ESCAPE_LEN)) {
            (Some(0xd800..=0xdbff), Some(0xdc00..=0xdfff)) => start + 2 * ESCAPE_LEN,
            (Some(0xd800..=0xdfff), _) => {
                repaired.to_mut()[start..start + ESCAPE_LEN].copy_from_slice(REPLACEMENT);
                start + ESCAPE_LEN
            }
            // Another escape, of which the second byte may be a backslash.
            _ => start + 2,
        };
    }
    repaired
}

/// The UTF-16 unit whose escape begins at `start`.
fn unit(json: &[u8], start: usize) -> Option<u16> {
    let digits = json.get(start..start + ESCAPE_LEN)?.strip_prefix(b"\\u")?;
    // `from_str_radix` would take a sign.
    if !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    u16::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn repaired(json: &str) -> String {
        String::from_utf8(without_lone_surrogates(json.as_bytes()).into_owned()).unwrap()
    }

    #[test]
    fn a_half_alone_is_replaced_and_a_pair_is_kept() {
        assert_eq!(repaired(r#""\ud83d""#), r#""\ufffd""#);
        assert_eq!(repaired(r#""\ude00x""#), r#""\ufffdx""#);
        assert_eq!(repaired(r#""\uD83D\uDE00\ud83d""#), r#""\uD83D\uDE00\ufffd""#);
        assert_eq!(repaired(r#""\ud83d\ud83d\ude00""#), r#""\ufffd\ud83d\ude00""#);
        assert_eq!(repaired(r#""\ud83d\n""#), r#""\ufffd\n""#);
    }

    #[test]
    fn an_escaped_backslash_begins_no_escape() {
        for json in [r#""\\ud83d""#, r#""\\\\ud83d""#, r#""\u00e9\\ud83d""#, r#""\u+d83""#, r#""\ud8"#, "\\"] {
            assert_eq!(repaired(json), json);
        }
        assert_eq!(repaired(r#""\\\ud83d""#), r#""\\\ufffd""#);
    }

    fn json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<String>().prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::vec((any::<String>(), inner), 0..4)
                    .prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        })
    }

    /// Everything but ASCII as escapes, as Python's `json.dumps` writes it.
    fn ascii(json: &str) -> String {
        let mut ascii = String::new();
        for character in json.chars() {
            if character.is_ascii() {
                ascii.push(character);
            } else {
                let mut units = [0; 2];
                ascii.extend(character.encode_utf16(&mut units).iter().map(|unit| format!("\\u{unit:04x}")));
            }
        }
        ascii
    }

    proptest! {
        #[test]
        fn valid_json_is_not_touched(value in json()) {
            for json in [value.to_string(), ascii(&value.to_string())] {
                prop_assert!(matches!(without_lone_surrogates(json.as_bytes()), Cow::Borrowed(_)), "{}", json);
            }
        }

        #[test]
        fn any_utf_16_is_read_as_javascript_decodes_it(units in prop::collection::vec(
            prop_oneof![any::<u16>(), 0xd7ff_u16..0xe001, Just(u16::from(b'\\'))], 0..12)) {
            let json = format!("\"{}\"", units.iter().map(|unit| format!("\\u{unit:04X}")).collect::<String>());
            let text: String = serde_json::from_slice(&without_lone_surrogates(json.as_bytes())).unwrap();
            prop_assert_eq!(text, String::from_utf16_lossy(&units));
        }

        #[test]
        fn any_bytes_keep_their_length(bytes in any::<Vec<u8>>()) {
            prop_assert_eq!(without_lone_surrogates(&bytes).len(), bytes.len());
        }
    }
}
