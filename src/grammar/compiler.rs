//! Constraints compiled for one vocabulary.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use llguidance::ParserFactory;
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::earley::{CGrammar, CSymIdx};
use prometheus::IntCounter;
use serde_json::{Value, json};
use toktrie::{TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};

use super::{Constraint, GrammarError, Matcher, gbnf};
use crate::tokenizer::Tokenizer;

/// The most of a constraint, as JSON or text.
const MAX_BYTES: usize = 128 * 1024;
/// Constraints that are kept compiled: clients send the same schemas again and again.
const MAX_KEPT: usize = 32;
/// The most of an error that goes on to the client.
const MAX_ERROR_CHARS: usize = 400;
/// Between the parts of JSON: enough to be indented, and an end to blanks without end.
const JSON_WHITESPACE: &str = r"[\x20]|\x0A{1,2}[\x20\x09]{0,20}";

/// Compiles constraints for the vocabulary of one tokenizer, whose tokens are sorted when the first constraint comes.
#[derive(Debug)]
pub struct GrammarCompiler {
    tokenizer: Arc<Tokenizer>,
    parsers: OnceLock<Result<Parsers, GrammarError>>,
    /// The last used ones first, each at the beginning of an output, with their constraints as text: the order of a schema's
    /// properties is that of the output, and equality of JSON does not see it.
    kept: Mutex<Vec<(String, Matcher)>>,
    num_compiled: IntCounter,
}

struct Parsers(ParserFactory);

impl std::fmt::Debug for Parsers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Parsers")
    }
}

impl GrammarCompiler {
    /// Counts in `num_compiled` what was not kept.
    pub fn new(tokenizer: Arc<Tokenizer>, num_compiled: IntCounter) -> Self {
        Self { tokenizer, parsers: OnceLock::new(), kept: Mutex::default(), num_compiled }
    }

    /// A matcher at the beginning of an output. What is not kept takes milliseconds, the first of all a second.
    ///
    /// # Errors
    /// What is wrong with the constraint, or goes beyond the limits.
    pub fn compile(&self, constraint: &Constraint) -> Result<Matcher, GrammarError> {
        let text = format!("{constraint:?}");
        if let Some(kept) = self.kept(&text) {
            return Ok(kept);
        }
        let matcher = self.compile_anew(constraint)?;
        self.num_compiled.inc();
        let mut kept = self.lock();
        // Another request may have compiled it meanwhile.
        kept.retain(|(of, _)| *of != text);
        kept.truncate(MAX_KEPT - 1);
        kept.insert(0, (text, matcher.clone()));
        Ok(matcher)
    }

    fn kept(&self, constraint: &str) -> Option<Matcher> {
        let mut kept = self.lock();
        let place = kept.iter().position(|(of, _)| of == constraint)?;
        kept[..=place].rotate_right(1);
        Some(kept[0].1.clone())
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(String, Matcher)>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn compile_anew(&self, constraint: &Constraint) -> Result<Matcher, GrammarError> {
        let grammar = grammar(constraint)?;
        let parsers = self.parsers.get_or_init(|| Parsers::new(&self.tokenizer)).as_ref().map_err(Clone::clone)?;
        let parser = parsers.0.create_parser(grammar).map_err(|error| GrammarError::Invalid(worded(&error)))?;
        if has_temperature(parser.parser.grammar()) {
            let message = "the `temperature` of a rule is not served: send one for the whole output";
            return Err(GrammarError::Invalid(message.to_owned()));
        }
        if let Some(rule) = endless_rule(parser.parser.grammar()) {
            let rule = own_name(constraint, rule);
            let message = format!("its rule `{rule}` has no end: every way through it leads into it again");
            return Err(GrammarError::Invalid(message));
        }
        Matcher::new(parser, end_of(&self.tokenizer))
    }
}

impl Parsers {
    fn new(tokenizer: &Tokenizer) -> Result<Self, GrammarError> {
        let environment: TokEnv = Arc::new(Vocabulary::new(tokenizer));
        let mut parsers = ParserFactory::new_simple(&environment).map_err(|e| GrammarError::Invalid(worded(&e)))?;
        parsers.quiet();
        *parsers.limits_mut() = ParserLimits {
            // Of up to 2 KB each, in every sequence.
            max_lexer_states: 20_000,
            max_grammar_size: 200_000,
            verbose_errors: false,
            ..ParserLimits::default()
        };
        Ok(Self(parsers))
    }
}

/// A token behind the vocabulary that stands for the end of the output, whichever token a sequence ends with.
fn end_of(tokenizer: &Tokenizer) -> TokenId {
    tokenizer.vocab_size() as TokenId
}

/// The texts of the tokens, as the parser wants them. A special token has none, so that no grammar allows it.
struct Vocabulary(TokTrie);

impl Vocabulary {
    fn new(tokenizer: &Tokenizer) -> Self {
        let end = end_of(tokenizer);
        let text =
            |id| if id == end || tokenizer.is_special(id) { Vec::new() } else { tokenizer.token_bytes(id).to_vec() };
        let texts: Vec<_> = (0..=end).map(text).collect();
        Self(TokTrie::from(&TokRxInfo::new(end + 1, end), &texts))
    }
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.0
    }

    fn tokenize_bytes(&self, text: &[u8]) -> Vec<TokenId> {
        self.0.greedy_tokenize(text)
    }

    /// The model chooses the tokens of a text that the grammar leaves no choice of.
    fn tokenize_is_canonical(&self) -> bool {
        false
    }
}

fn grammar(constraint: &Constraint) -> Result<TopLevelGrammar, GrammarError> {
    let bounded = |num_bytes: usize| match num_bytes {
        0..=MAX_BYTES => Ok(()),
        _ => Err(GrammarError::TooLarge(num_bytes, MAX_BYTES)),
    };
    match constraint {
        Constraint::Json => Ok(of_schema(json!({"type": "object"}))),
        Constraint::JsonSchema(schema) => {
            bounded(schema.to_string().len())?;
            Ok(of_schema(schema.clone()))
        }
        Constraint::Regex(pattern) => {
            bounded(pattern.len())?;
            Ok(TopLevelGrammar::from_regex(pattern))
        }
        Constraint::Choice(texts) => {
            bounded(texts.iter().map(String::len).sum())?;
            let texts: Vec<_> = texts.iter().map(|text| Value::from(text.as_str()).to_string()).collect();
            Ok(TopLevelGrammar::from_lark(format!("start: {}", texts.join(" | "))))
        }
        Constraint::Lark(grammar) => {
            bounded(grammar.len())?;
            Ok(TopLevelGrammar::from_lark(grammar.clone()))
        }
        Constraint::Gbnf(grammar) => {
            bounded(grammar.len())?;
            gbnf::read(grammar).map_err(GrammarError::Invalid)
        }
    }
}

/// Whether a part of it is to be drawn at a temperature of its own, as Lark's notation can say here.
fn has_temperature(grammar: &CGrammar) -> bool {
    reachable(grammar).iter().any(|symbol| grammar.sym_data(*symbol).props.temperature != 0.0)
}

/// The name of a rule that an output may come to and never leave: it would fail in the middle, or go on until it is cut.
fn endless_rule(grammar: &CGrammar) -> Option<&str> {
    let reachable = reachable(grammar);
    // Of every rule, whose it is and how many of its parts are not known to end.
    let mut rules = Vec::new();
    let mut used_in: HashMap<CSymIdx, Vec<usize>> = HashMap::new();
    for &symbol in &reachable {
        for parts in parts_of(grammar, symbol) {
            parts.iter().for_each(|part| used_in.entry(*part).or_default().push(rules.len()));
            rules.push((symbol, parts.len()));
        }
    }
    let ends_by_itself = |symbol: &CSymIdx| {
        let symbol = grammar.sym_data(*symbol);
        symbol.is_terminal || symbol.is_nullable || !symbol.cond_nullable.is_empty()
    };
    let mut left: Vec<CSymIdx> = reachable.iter().copied().filter(ends_by_itself).collect();
    let mut ending: HashSet<CSymIdx> = left.iter().copied().collect();
    while let Some(symbol) = left.pop() {
        for &rule in used_in.get(&symbol).into_iter().flatten() {
            let (of, num_open) = &mut rules[rule];
            *num_open -= 1;
            if *num_open == 0 && ending.insert(*of) {
                left.push(*of);
            }
        }
    }
    let is_endless = |symbol: &CSymIdx| !ending.contains(symbol);
    let mut symbol = reachable.into_iter().find(is_endless)?;
    // What leads there is as endless: down to one that leads to itself.
    let mut seen = HashSet::new();
    while seen.insert(symbol)
        && let Some(&part) = parts_of(grammar, symbol).flatten().find(|part| is_endless(part))
    {
        symbol = part;
    }
    Some(grammar.sym_name(symbol))
}

/// What `constraint` calls the rule that is `name` to the parser.
fn own_name(constraint: &Constraint, name: &str) -> String {
    // What has the name of another gets a number behind it.
    let name = name.split('#').next().unwrap_or(name);
    let own = match constraint {
        Constraint::Gbnf(_) if name == "start" => Some(gbnf::ROOT.to_owned()),
        Constraint::Gbnf(text) => gbnf::own_name(text, name),
        _ => None,
    };
    own.unwrap_or_else(|| name.to_owned())
}

/// Every symbol that an output may come to.
fn reachable(grammar: &CGrammar) -> Vec<CSymIdx> {
    let (mut reachable, mut seen) = (vec![grammar.start()], HashSet::from([grammar.start()]));
    let mut num_followed = 0;
    while let Some(&symbol) = reachable.get(num_followed) {
        num_followed += 1;
        reachable.extend(parts_of(grammar, symbol).flatten().filter(|part| seen.insert(**part)));
    }
    reachable
}

/// Of each rule of `symbol`, what it is made of.
fn parts_of(grammar: &CGrammar, symbol: CSymIdx) -> impl Iterator<Item = &[CSymIdx]> {
    grammar.rules_of(symbol).iter().map(|rule| grammar.rule_rhs(*rule).0)
}

fn of_schema(schema: Value) -> TopLevelGrammar {
    TopLevelGrammar::from_json_schema(with_bounded_space(schema))
}

/// `schema` for JSON without blanks that go on and on.
pub fn with_bounded_space(schema: Value) -> Value {
    // Both allow any value.
    let mut schema = if schema == true { json!({}) } else { schema };
    if let Some(fields) = schema.as_object_mut() {
        fields.entry("x-guidance").or_insert_with(|| json!({"whitespace_pattern": JSON_WHITESPACE}));
    }
    schema
}

/// The first line of an error, cut, with the cause that a regular expression's has in a line further down.
pub(super) fn worded(error: &dyn std::fmt::Display) -> String {
    let error = error.to_string();
    let mut lines = error.lines();
    let mut text = lines.next().unwrap_or_default().to_owned();
    if let Some(cause) = lines.find_map(|line| line.strip_prefix("error: ")) {
        text.extend([" ", cause]);
    }
    text.chars().take(MAX_ERROR_CHARS).collect()
}
