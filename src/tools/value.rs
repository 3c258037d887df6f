//! Where a JSON value ends that is still being written.

/// Follows an object or array, character by character.
#[derive(Debug, Clone, Default)]
pub struct ValueEnd {
    depth: usize,
    in_string: bool,
    is_escaped: bool,
}

impl ValueEnd {
    /// Bytes of `text` that belong to the value, and whether it ends there.
    pub fn push(&mut self, text: &str) -> (usize, bool) {
        for (at, byte) in text.bytes().enumerate() {
            if self.in_string {
                match byte {
                    _ if self.is_escaped => self.is_escaped = false,
                    b'\\' => self.is_escaped = true,
                    b'"' => self.in_string = false,
                    _ => {}
                }
                continue;
            }
            match byte {
                b'"' => self.in_string = true,
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.depth == 0 {
                        return (at + 1, true);
                    }
                }
                _ => {}
            }
        }
        (text.len(), false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_ends_at_its_own_bracket() {
        let text = r#"{"a": "}\"]", "b": [{}]} rest"#;
        assert_eq!(ValueEnd::default().push(text), (text.len() - 5, true));
        let mut end = ValueEnd::default();
        assert_eq!(end.push(r#"{"a": "\"#), (8, false));
        assert_eq!(end.push("\"}"), (2, false));
        assert_eq!(end.push("\"}"), (2, true));
    }
}
