//! Grammars in GBNF, llama.cpp's notation (`grammars/README.md` there), said in the notation of the parser.
//!
//! GBNF describes characters, the parser lexemes, of which it reads the longest. So a grammar that is not recursive becomes
//! one regular expression; of any other, each character is a lexeme, which cannot be cut in two ways. Only what repeats one
//! of many characters, such as the inside of a string, is one lexeme, for there the parser would have to look at most of the
//! vocabulary. Such a repetition ends only where it cannot go on; an output is of the grammar in any case.

use std::collections::HashMap;
use std::fmt::Write;

use llguidance::api::TopLevelGrammar;

/// Of parentheses in each other.
const MAX_DEPTH: usize = 100;
/// Characters of a class whose repetition is one lexeme.
const MANY: usize = 16;
/// Of one part.
const MAX_REPEATS: usize = 3;
/// Of what is made of a grammar, whose rules are copied to where they are used.
const MAX_BYTES: usize = 1 << 20;
pub const ROOT: &str = "root";

#[derive(Debug, Clone, PartialEq)]
enum Expression {
    Class(Class),
    Literal(String),
    /// By its place in the grammar.
    Rule(usize),
    Sequence(Vec<Expression>),
    Alternatives(Vec<Expression>),
    Repeated {
        inner: Box<Expression>,
        min: u32,
        max: Option<u32>,
    },
}

/// Of characters.
#[derive(Debug, Clone, PartialEq)]
struct Class {
    regex: String,
    /// Whether it has more than [`MANY`].
    is_wide: bool,
}

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Name(String),
    /// `::=`
    Is,
    Literal(String),
    Class(Class),
    Open,
    Close,
    Or,
    Repeat(u32, Option<u32>),
}

/// What needs no recursion.
#[derive(Debug, Clone)]
struct Regular {
    regex: String,
    may_be_empty: bool,
    /// Whether it has a wide class.
    is_wide: bool,
    /// Whether each of its parts has one length.
    is_plain: bool,
}

/// # Errors
/// What is wrong, and in which line.
pub fn read(text: &str) -> Result<TopLevelGrammar, String> {
    Grammar::parse(text)?.translated()
}

/// What the grammar `text` calls the rule that its translation calls `name`.
pub fn own_name(text: &str, name: &str) -> Option<String> {
    let number = name.strip_prefix('r')?.parse().ok()?;
    let tokens = tokens(text).ok()?;
    let is_defined = |pair: &&[(Token, usize)]| matches!(pair, [(Token::Name(_), _), (Token::Is, _)]);
    let (defined, _) = &tokens.windows(2).filter(is_defined).nth(number)?[0];
    if let Token::Name(name) = defined { Some(name.clone()) } else { None }
}

/// The characters of a grammar with their line.
struct Characters<'a> {
    rest: std::iter::Peekable<std::str::Chars<'a>>,
    line: usize,
}

impl Characters<'_> {
    fn peek(&mut self) -> Option<char> {
        self.rest.peek().copied()
    }

    fn next(&mut self) -> Option<char> {
        let next = self.rest.next();
        self.line += usize::from(next == Some('\n'));
        next
    }

    fn next_if(&mut self, wanted: char) -> bool {
        self.peek() == Some(wanted) && self.next().is_some()
    }

    fn wrong<T>(&self, message: impl std::fmt::Display) -> Result<T, String> {
        Err(format!("line {}: {message}", self.line))
    }

    /// A character of a literal or a class that ends in `end`, and whether it was escaped.
    fn character(&mut self, end: char) -> Result<(char, bool), String> {
        match self.next() {
            None | Some('\n') => self.wrong(format!("`{end}` is missing")),
            Some('\\') => Ok((self.escaped()?, true)),
            Some(plain) => Ok((plain, false)),
        }
    }

    fn escaped(&mut self) -> Result<char, String> {
        let num_digits = match self.next() {
            Some('n') => return Ok('\n'),
            Some('r') => return Ok('\r'),
            Some('t') => return Ok('\t'),
            Some('x') => 2,
            Some('u') => 4,
            Some('U') => 8,
            Some(punctuation) if punctuation.is_ascii_punctuation() => return Ok(punctuation),
            other => return self.wrong(format!("`\\{}` is no escape", other.unwrap_or_default())),
        };
        let mut code = 0;
        for _ in 0..num_digits {
            let Some(digit) = self.next().and_then(|digit| digit.to_digit(16)) else {
                return self.wrong(format!("an escape has {num_digits} hexadecimal digits"));
            };
            code = code << 4 | digit;
        }
        match char::from_u32(code) {
            Some(character) => Ok(character),
            None => self.wrong(format!("U+{code:X} is no character")),
        }
    }

    /// Behind `[`.
    fn class(&mut self) -> Result<Class, String> {
        let (mut class, mut num_characters) = (String::from("["), 0);
        if self.next_if('^') {
            class.push('^');
        }
        let is_negated = class.len() > 1;
        loop {
            let (first, is_escaped) = self.character(']')?;
            if first == ']' && !is_escaped {
                break;
            }
            num_characters += 1;
            push_character(&mut class, first);
            if self.peek() != Some('-') {
                continue;
            }
            self.next();
            if self.peek() == Some(']') {
                push_character(&mut class, '-');
                continue;
            }
            let (last, _) = self.character(']')?;
            if last < first {
                return self.wrong(format!("the range from {first:?} to {last:?} is empty"));
            }
            class.push('-');
            push_character(&mut class, last);
            num_characters += last as usize - first as usize;
        }
        match (num_characters, is_negated) {
            (0, true) => Ok(Class::any()),
            (0, false) => self.wrong("`[]` matches nothing"),
            _ => Ok(Class { regex: class + "]", is_wide: is_negated || num_characters > MANY }),
        }
    }

    /// Behind `{`.
    fn braces(&mut self) -> Result<Token, String> {
        let mut inside = String::new();
        loop {
            match self.next() {
                Some('}') => break,
                Some(part) if part.is_ascii_digit() || part == ',' => inside.push(part),
                Some(' ') => {}
                _ => return self.wrong("`{` takes `{2}`, `{2,}`, `{,3}` or `{2,3}`"),
            }
        }
        let number = |text: &str| text.parse::<u32>().ok();
        let bounds = match inside.split_once(',') {
            None => number(&inside).map(|count| (count, Some(count))),
            Some(("", max)) => number(max).map(|max| (0, Some(max))),
            Some((min, "")) => number(min).map(|min| (min, None)),
            Some((min, max)) => number(min).zip(number(max)).map(|(min, max)| (min, Some(max))),
        };
        match bounds {
            Some((min, max)) if max.is_none_or(|max| min <= max) => Ok(Token::Repeat(min, max)),
            _ => self.wrong(format!("`{{{inside}}}` is no number of repetitions")),
        }
    }
}

impl Class {
    fn any() -> Self {
        Self { regex: "(?s:.)".to_owned(), is_wide: true }
    }
}

/// For the inside and the outside of a class.
fn push_character(regex: &mut String, character: char) {
    if character.is_ascii_alphanumeric() {
        regex.push(character);
    } else {
        // Writing to a string does not fail.
        let _ = write!(regex, "\\u{{{:X}}}", u32::from(character));
    }
}

/// The tokens with their lines.
fn tokens(text: &str) -> Result<Vec<(Token, usize)>, String> {
    let mut characters = Characters { rest: text.chars().peekable(), line: 1 };
    let mut tokens = Vec::new();
    while let Some(next) = characters.next() {
        let line = characters.line;
        let token = match next {
            character if character.is_whitespace() => continue,
            '#' => {
                while characters.peek().is_some_and(|next| next != '\n') {
                    characters.next();
                }
                continue;
            }
            ':' if characters.next_if(':') && characters.next_if('=') => Token::Is,
            '"' => {
                let mut literal = String::new();
                loop {
                    match characters.character('"')? {
                        ('"', false) => break,
                        (character, _) => literal.push(character),
                    }
                }
                Token::Literal(literal)
            }
            '[' => Token::Class(characters.class()?),
            '.' => Token::Class(Class::any()),
            '(' => Token::Open,
            ')' => Token::Close,
            '|' => Token::Or,
            '*' => Token::Repeat(0, None),
            '+' => Token::Repeat(1, None),
            '?' => Token::Repeat(0, Some(1)),
            '{' => characters.braces()?,
            '<' | '!' => return characters.wrong("tokens of the model cannot be named in a grammar here: write text"),
            first if is_of_name(first) => {
                let mut name = String::from(first);
                while let Some(next) = characters.peek().filter(|next| is_of_name(*next)) {
                    name.push(next);
                    characters.next();
                }
                Token::Name(name)
            }
            other => return characters.wrong(format!("{other:?} was not expected")),
        };
        tokens.push((token, line));
    }
    Ok(tokens)
}

fn is_of_name(character: char) -> bool {
    character.is_ascii_alphanumeric() || character == '-' || character == '_'
}

struct Grammar {
    root: usize,
    rules: Vec<Expression>,
}

struct Parser<'a> {
    rest: &'a [(Token, usize)],
    numbers: HashMap<&'a str, usize>,
    depth: usize,
}

impl Grammar {
    fn parse(text: &str) -> Result<Self, String> {
        let tokens = tokens(text)?;
        let mut numbers = HashMap::new();
        for pair in tokens.windows(2) {
            if let [(Token::Name(name), line), (Token::Is, _)] = pair
                && numbers.insert(name.as_str(), numbers.len()).is_some()
            {
                return Err(format!("line {line}: the rule `{name}` is there already"));
            }
        }
        let Some(&root) = numbers.get(ROOT) else { return Err(format!("the rule `{ROOT}` is missing")) };
        let mut parser = Parser { rest: &tokens, numbers, depth: 0 };
        let mut rules = Vec::new();
        while let [(Token::Name(_), _), (Token::Is, _), rest @ ..] = parser.rest {
            parser.rest = rest;
            rules.push(parser.alternatives()?);
        }
        match parser.rest.first() {
            None => Ok(Self { root, rules }),
            Some((token, line)) => Err(format!("line {line}: {} was not expected", worded(token))),
        }
    }
}

fn worded(token: &Token) -> String {
    match token {
        Token::Name(name) => format!("`{name}`"),
        Token::Is => "`::=`".to_owned(),
        Token::Literal(text) => format!("{text:?}"),
        Token::Class(_) => "a class of characters".to_owned(),
        Token::Open => "`(`".to_owned(),
        Token::Close => "`)`".to_owned(),
        Token::Or => "`|`".to_owned(),
        Token::Repeat(..) => "a repetition".to_owned(),
    }
}

impl Parser<'_> {
    fn alternatives(&mut self) -> Result<Expression, String> {
        let mut alternatives = vec![self.sequence()?];
        while let [(Token::Or, _), rest @ ..] = self.rest {
            self.rest = rest;
            alternatives.push(self.sequence()?);
        }
        Ok(one_or(alternatives, Expression::Alternatives))
    }

    /// Ends before what is none of it, such as the next rule.
    fn sequence(&mut self) -> Result<Expression, String> {
        let (mut parts, mut num_repeats) = (Vec::new(), 0);
        loop {
            let part = match self.rest {
                [] | [(Token::Or | Token::Close | Token::Is, _), ..] => break,
                [(Token::Name(_), _), (Token::Is, _), ..] => break,
                [(Token::Name(name), line), rest @ ..] => {
                    self.rest = rest;
                    let number = self.numbers.get(name.as_str());
                    Expression::Rule(*number.ok_or_else(|| format!("line {line}: there is no rule `{name}`"))?)
                }
                [(Token::Literal(text), _), rest @ ..] => {
                    self.rest = rest;
                    Expression::Literal(text.clone())
                }
                [(Token::Class(class), _), rest @ ..] => {
                    self.rest = rest;
                    Expression::Class(class.clone())
                }
                [(Token::Open, line), rest @ ..] => {
                    self.rest = rest;
                    self.group(*line)?
                }
                [(Token::Repeat(min, max), line), rest @ ..] => {
                    self.rest = rest;
                    let Some(inner) = parts.pop() else {
                        return Err(format!("line {line}: there is nothing to repeat"));
                    };
                    num_repeats += 1;
                    if num_repeats > MAX_REPEATS {
                        return Err(format!("line {line}: more than {MAX_REPEATS} repetitions in a row"));
                    }
                    parts.push(Expression::Repeated { inner: Box::new(inner), min: *min, max: *max });
                    continue;
                }
            };
            num_repeats = 0;
            parts.push(part);
        }
        Ok(one_or(parts, Expression::Sequence))
    }

    /// Behind `(`.
    fn group(&mut self, line: usize) -> Result<Expression, String> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(format!("line {line}: more than {MAX_DEPTH} parentheses are open"));
        }
        let inner = self.alternatives()?;
        self.depth -= 1;
        let [(Token::Close, _), rest @ ..] = self.rest else { return Err(format!("line {line}: `)` is missing")) };
        self.rest = rest;
        Ok(inner)
    }
}

fn one_or(mut parts: Vec<Expression>, several: impl FnOnce(Vec<Expression>) -> Expression) -> Expression {
    match parts.pop() {
        Some(only) if parts.is_empty() => only,
        last => {
            parts.extend(last);
            several(parts)
        }
    }
}

impl Grammar {
    fn translated(&self) -> Result<TopLevelGrammar, String> {
        let regular = self.regular_rules()?;
        if let Some(root) = &regular[self.root] {
            return Ok(TopLevelGrammar::from_regex(&root.regex));
        }
        let mut lark = Lark { regular: &regular, lexemes: HashMap::new(), text: format!("start: r{}\n", self.root) };
        for (number, rule) in self.rules.iter().enumerate() {
            let body = lark.expression(rule)?;
            lark.push(&format!("r{number}: {body}\n"))?;
        }
        Ok(TopLevelGrammar::from_lark(lark.text))
    }

    /// Of each rule that leads to no recursion, from those that use no other on.
    fn regular_rules(&self) -> Result<Vec<Option<Regular>>, String> {
        let mut users = vec![Vec::new(); self.rules.len()];
        let mut num_missing = vec![0; self.rules.len()];
        for (user, rule) in self.rules.iter().enumerate() {
            for_each_rule(rule, &mut |used| {
                users[used].push(user);
                num_missing[user] += 1;
            });
        }
        let mut ready: Vec<usize> = (0..self.rules.len()).filter(|rule| num_missing[*rule] == 0).collect();
        let (mut regular, mut num_bytes) = (vec![None; self.rules.len()], 0);
        while let Some(rule) = ready.pop() {
            let Some(made) = regular_of(&self.rules[rule], &regular)? else { continue };
            num_bytes += made.regex.len();
            if num_bytes > MAX_BYTES {
                return Err(too_large());
            }
            regular[rule] = Some(made);
            for &user in &users[rule] {
                num_missing[user] -= 1;
                if num_missing[user] == 0 {
                    ready.push(user);
                }
            }
        }
        Ok(regular)
    }
}

fn too_large() -> String {
    format!("with its rules written out it has more than {MAX_BYTES} bytes")
}

fn for_each_rule(expression: &Expression, visit: &mut impl FnMut(usize)) {
    match expression {
        Expression::Rule(number) => visit(*number),
        Expression::Class(_) | Expression::Literal(_) => {}
        Expression::Sequence(parts) | Expression::Alternatives(parts) => {
            parts.iter().for_each(|part| for_each_rule(part, visit));
        }
        Expression::Repeated { inner, .. } => for_each_rule(inner, visit),
    }
}

/// `None` for what uses a rule that is not regular.
fn regular_of(expression: &Expression, rules: &[Option<Regular>]) -> Result<Option<Regular>, String> {
    let joined = |parts: &[Expression], joint: Joint| {
        let mut all = None;
        for part in parts {
            let Some(part) = regular_of(part, rules)? else { return Ok(None) };
            Regular::join(&mut all, part, joint)?;
        }
        Ok(Some(all.unwrap_or_else(Regular::empty)))
    };
    Ok(Some(match expression {
        Expression::Class(Class { regex, is_wide }) => {
            Regular { regex: regex.clone(), may_be_empty: false, is_wide: *is_wide, is_plain: true }
        }
        Expression::Literal(literal) => {
            let mut regex = String::new();
            literal.chars().for_each(|character| push_character(&mut regex, character));
            Regular { regex, may_be_empty: literal.is_empty(), is_wide: false, is_plain: true }
        }
        Expression::Rule(number) => return Ok(rules[*number].clone()),
        Expression::Sequence(parts) => return joined(parts, Joint::Sequence),
        Expression::Alternatives(parts) => return joined(parts, Joint::Alternatives),
        Expression::Repeated { inner, min, max } => {
            let Some(inner) = regular_of(inner, rules)? else { return Ok(None) };
            Regular {
                regex: format!("(?:{}){}", inner.regex, bounds(*min, *max)),
                may_be_empty: *min == 0 || inner.may_be_empty,
                is_wide: inner.is_wide,
                is_plain: inner.is_plain && Some(*min) == *max,
            }
        }
    }))
}

/// In a regular expression and in the parser's notation.
fn bounds(min: u32, max: Option<u32>) -> String {
    match (min, max) {
        (0, None) => "*".to_owned(),
        (1, None) => "+".to_owned(),
        (0, Some(1)) => "?".to_owned(),
        (min, None) => format!("{{{min},}}"),
        (min, Some(max)) => format!("{{{min},{max}}}"),
    }
}

#[derive(Debug, Clone, Copy)]
enum Joint {
    Sequence,
    Alternatives,
}

impl Regular {
    fn empty() -> Self {
        Self { regex: String::new(), may_be_empty: true, is_wide: false, is_plain: true }
    }

    /// Adds `part` to `all`.
    fn join(all: &mut Option<Self>, part: Self, joint: Joint) -> Result<(), String> {
        let part = Self { regex: format!("(?:{})", part.regex), ..part };
        let Some(all) = all else {
            *all = Some(part);
            return Ok(());
        };
        if all.regex.len() + part.regex.len() > MAX_BYTES {
            return Err(too_large());
        }
        match joint {
            Joint::Sequence => all.may_be_empty &= part.may_be_empty,
            Joint::Alternatives => {
                all.regex.push('|');
                all.may_be_empty |= part.may_be_empty;
            }
        }
        all.regex.push_str(&part.regex);
        all.is_wide |= part.is_wide;
        all.is_plain &= part.is_plain;
        Ok(())
    }
}

/// In the parser's notation.
const EMPTY: &str = "\"\"";

/// A grammar in the parser's variant of Lark's notation.
struct Lark<'a> {
    regular: &'a [Option<Regular>],
    /// Their names, by what they match.
    lexemes: HashMap<String, String>,
    text: String,
}

impl Lark<'_> {
    fn push(&mut self, line: &str) -> Result<(), String> {
        self.text.push_str(line);
        if self.text.len() > MAX_BYTES { Err(too_large()) } else { Ok(()) }
    }

    fn expression(&mut self, expression: &Expression) -> Result<String, String> {
        match expression {
            Expression::Rule(number) => Ok(format!("r{number}")),
            Expression::Class(class) => self.lexeme(&class.regex),
            Expression::Literal(text) if text.is_empty() => Ok(EMPTY.to_owned()),
            Expression::Literal(text) => {
                let mut lexemes = Vec::new();
                for character in text.chars() {
                    let mut regex = String::new();
                    push_character(&mut regex, character);
                    lexemes.push(self.lexeme(&regex)?);
                }
                Ok(lexemes.join(" "))
            }
            Expression::Sequence(parts) if parts.is_empty() => Ok(EMPTY.to_owned()),
            Expression::Sequence(parts) => Ok(self.all(parts)?.join(" ")),
            Expression::Alternatives(parts) => Ok(format!("({})", self.all(parts)?.join(" | "))),
            Expression::Repeated { max: Some(0), .. } => Ok(EMPTY.to_owned()),
            Expression::Repeated { inner, min, max } => match regular_of(inner, self.regular)? {
                Some(inner) if inner.is_wide && inner.is_plain && !inner.may_be_empty => {
                    // No lexeme is empty.
                    let lexeme = self.lexeme(&format!("(?:{}){}", inner.regex, bounds(1.max(*min), *max)))?;
                    Ok(if *min == 0 { format!("({lexeme})?") } else { lexeme })
                }
                _ => Ok(format!("({}){}", self.expression(inner)?, bounds(*min, *max))),
            },
        }
    }

    fn all(&mut self, parts: &[Expression]) -> Result<Vec<String>, String> {
        parts.iter().map(|part| self.expression(part)).collect()
    }

    fn lexeme(&mut self, regex: &str) -> Result<String, String> {
        if let Some(name) = self.lexemes.get(regex) {
            return Ok(name.clone());
        }
        let name = format!("T{}", self.lexemes.len());
        self.push(&format!("{name}: /{regex}/\n"))?;
        self.lexemes.insert(regex.to_owned(), name.clone());
        Ok(name)
    }
}
