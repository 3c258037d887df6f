//! Ends an output where its code leaves the block that it began in.

/// Lets text through until a line after the first is indented less than asked for. That line is cut, and the line ends
/// before it; blank lines are in any block.
#[derive(Debug)]
pub struct IndentedBlock {
    /// In spaces or tabs, each counting one.
    min_indent: usize,
    /// Line ends and indentation with no code behind them yet.
    held: String,
    /// Of the line that began in `held`.
    indent: Option<usize>,
}

impl IndentedBlock {
    pub fn new(min_indent: usize) -> Self {
        Self { min_indent, held: String::new(), indent: None }
    }

    /// What of the text is certainly in the block, and whether the block has ended.
    pub fn push(&mut self, text: &str) -> (String, bool) {
        let mut inside = String::with_capacity(text.len());
        for character in text.chars() {
            match (character, &mut self.indent) {
                ('\n', indent) => {
                    *indent = Some(0);
                    self.held.push(character);
                }
                (' ' | '\t', Some(indent)) => {
                    *indent += 1;
                    self.held.push(character);
                }
                ('\r', Some(_)) => self.held.push(character),
                (_, indent) => {
                    if indent.take().is_some_and(|indent| indent < self.min_indent) {
                        self.held.clear();
                        return (inside, true);
                    }
                    inside.push_str(&std::mem::take(&mut self.held));
                    inside.push(character);
                }
            }
        }
        (inside, false)
    }

    /// What was held back, the output having ended.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In one piece and character by character.
    fn cut(min_indent: usize, text: &str) -> (String, bool) {
        let mut whole = IndentedBlock::new(min_indent);
        let (mut inside, left) = whole.push(text);
        inside.push_str(&whole.finish());
        let mut single = IndentedBlock::new(min_indent);
        let mut text_of = String::new();
        let left_too = text.chars().any(|character| {
            let (inside, left) = single.push(&character.to_string());
            text_of.push_str(&inside);
            left
        });
        text_of.push_str(&single.finish());
        assert_eq!((&text_of, left_too), (&inside, left), "{text:?}");
        (inside, left)
    }

    #[test]
    fn a_line_indented_less_ends_the_block_and_is_cut() {
        assert_eq!(cut(4, "a\n    b\n\n    c\n\ndef d():"), ("a\n    b\n\n    c".to_owned(), true));
        assert_eq!(cut(2, "a\n\t\tb\n c"), ("a\n\t\tb".to_owned(), true));
    }

    #[test]
    fn the_first_line_and_blank_ends_are_in_it() {
        assert_eq!(cut(4, "a b"), ("a b".to_owned(), false));
        assert_eq!(cut(4, "a\n      b\n  \n"), ("a\n      b\n  \n".to_owned(), false));
    }
}
