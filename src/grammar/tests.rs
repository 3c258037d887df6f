use std::collections::BTreeSet;
use std::sync::Arc;

use prometheus::IntCounter;
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::tokenizer::{Specials, Tokenizer};

const STOP: u32 = 258;

fn compile(constraint: &Constraint) -> Result<Matcher, GrammarError> {
    compiler().compile(constraint)
}

fn compiler() -> GrammarCompiler {
    compiler_counting().0
}

fn compiler_counting() -> (GrammarCompiler, IntCounter) {
    let count = IntCounter::new("compiled", "Compiled.").unwrap();
    (GrammarCompiler::new(Arc::new(Tokenizer::tiny(&["<|end|>"])), count.clone()), count)
}

#[test]
fn what_was_used_lately_is_not_compiled_again() {
    let (compiler, count) = compiler_counting();
    let regex = |number: usize| Constraint::Regex(format!("a{{{}}}", number + 1));
    for _ in 0..3 {
        // Each is at the beginning, however far the one before has come.
        let mut matcher = compiler.compile(&regex(0)).unwrap();
        assert!(accepts(&matcher, "a") && !accepts(&matcher, "aa"));
        matcher.consume(u32::from(b'a')).unwrap();
    }
    assert_eq!(count.get(), 1);
    (1..32).for_each(|number| drop(compiler.compile(&regex(number)).unwrap()));
    drop(compiler.compile(&regex(0)).unwrap());
    assert_eq!(count.get(), 32);
    // The one that was not used for longest has made room.
    drop(compiler.compile(&regex(32)).unwrap());
    drop(compiler.compile(&regex(0)).unwrap());
    assert_eq!(count.get(), 33);
    drop(compiler.compile(&regex(1)).unwrap());
    assert_eq!(count.get(), 34);
    assert!(compiler.compile(&Constraint::Regex("(".to_owned())).is_err());
    assert_eq!(count.get(), 34);
    // The same properties in another order are another output.
    let schema = |text| Constraint::JsonSchema(serde_json::from_str(text).unwrap());
    for (text, good) in [
        (r#"{"properties": {"a": {"const": 1}, "b": {"const": 2}}, "required": ["a", "b"]}"#, r#"{"a": 1, "b": 2}"#),
        (r#"{"properties": {"b": {"const": 2}, "a": {"const": 1}}, "required": ["a", "b"]}"#, r#"{"b": 2, "a": 1}"#),
    ] {
        assert!(accepts(&compiler.compile(&schema(text)).unwrap(), good), "{text}");
    }
    assert_eq!(count.get(), 36);
}

/// Which of the tokens may come next: none where nothing can go on.
fn allowed(matcher: &mut Matcher) -> Vec<u32> {
    let mut logits = [0.0; 259];
    if matcher.mask(&mut logits, &[STOP]).is_err() {
        return Vec::new();
    }
    (0..).zip(logits).filter(|(_, logit)| *logit == 0.0).map(|(token, _)| token).collect()
}

/// Whether `text` is one of the grammar, told token by token.
fn accepts(matcher: &Matcher, text: &str) -> bool {
    let tokens = Tokenizer::tiny(&["<|end|>"]).encode(text, Specials::AsText).unwrap();
    let mut matcher = matcher.clone();
    let is_followed = tokens.iter().all(|token| {
        let is_allowed = !matcher.is_complete() && allowed(&mut matcher).contains(token);
        is_allowed && matcher.consume(*token).is_ok()
    });
    is_followed && allowed(&mut matcher).contains(&STOP)
}

fn assert_accepts(constraint: &Constraint, good: &[&str], bad: &[&str]) {
    let matcher = compile(constraint).unwrap_or_else(|error| panic!("{constraint:?}: {error}"));
    for text in good {
        assert!(accepts(&matcher, text), "{constraint:?} {text:?}");
    }
    for text in bad {
        assert!(!accepts(&matcher, text), "{constraint:?} {text:?}");
    }
}

#[test]
fn each_kind_of_constraint_accepts_what_it_says_and_nothing_else() {
    let schema = json!({"type": "object", "properties": {"the": {"type": "integer"}}, "required": ["the"], "additionalProperties": false});
    let cases = [
        (Constraint::Json, vec!["{}", r#"{"a": [1, null, "é"]}"#], vec!["[]", "1", "{", "{} "]),
        (Constraint::JsonSchema(schema), vec![r#"{"the": 12}"#, r#"{"the":-1}"#], vec!["{}", r#"{"the": 1.5}"#]),
        (Constraint::JsonSchema(json!({})), vec!["1", "[true]", r#""a""#], vec!["", "a"]),
        (Constraint::Regex("(th)+e?".to_owned()), vec!["th", "ththe"], vec!["", "the the", "e"]),
        (Constraint::Regex("[a/]b|\\d".to_owned()), vec!["ab", "/b", "7"], vec!["a", "ab7"]),
        (
            Constraint::Choice(vec!["yes".to_owned(), "no \"\\\n é".to_owned(), "not".to_owned()]),
            vec!["yes", "no \"\\\n é", "not"],
            vec!["no", "yesno", ""],
        ),
        (
            Constraint::Choice(["abc", "a", "ab", "ba"].map(str::to_owned).to_vec()),
            vec!["a", "ab", "abc", "ba"],
            vec!["", "b", "abcd", "aba"],
        ),
        (
            Constraint::Lark("start: A \" \" b?\nA: /t+h/\nb: \"e\" | \"f\"".to_owned()),
            vec!["tth ", "th f"],
            vec!["th"],
        ),
    ];
    for (constraint, good, bad) in cases {
        assert_accepts(&constraint, &good, &bad);
    }
}

#[test]
fn a_grammar_in_gbnf_accepts_what_it_says() {
    let arithmetic = "# sums\nroot  ::= (expr \"=\" ws term \"\\n\")+\nexpr ::= term ([-+*/] term)*\n\
        term  ::= ident | num | \"(\" ws expr \")\" ws\nident ::= [a-z] [a-z0-9_]* ws\nnum ::= [0-9]+ ws\nws ::= [ \\t\\n]*\n";
    let json = "root ::= object\nvalue ::= object | array | string | number | (\"true\" | \"false\" | \"null\") ws\n\
        object ::= \"{\" ws (\n  string \":\" ws value\n  (\",\" ws string \":\" ws value)*\n)? \"}\" ws\n\
        array ::= \"[\" ws (value (\",\" ws value)*)? \"]\" ws\n\
        string ::= \"\\\"\" ([^\"\\\\\\x7F\\x00-\\x1F] | \"\\\\\" ([\"\\\\bfnrt] | \"u\" [0-9a-fA-F]{4}))* \"\\\"\" ws\n\
        number ::= \"-\"? ([0-9] | [1-9] [0-9]{0,15}) (\".\" [0-9]+)? ws\nws ::= | \" \" | \"\\n\" [ \\t]{0,20}\n";
    let cases = [
        ("root ::= \"yes\" | \"no\"", vec!["yes", "no"], vec!["", "y", "yesno"]),
        (
            "root ::= item{2,3} .\nitem ::= \"- \" [^\\n]+ \"\\n\"",
            vec!["- a\n- é\n!", "- a\n- b\n- c\n\n"],
            vec!["- a\n!"],
        ),
        // What is regular is read by characters: the first "a" may be all of `as`.
        ("root ::= as \"ab\"\nas ::= \"a\"*", vec!["ab", "aaab"], vec!["a", "b"]),
        ("root ::= [a\\-\\]-]+ [^]? \"\\u00e9\\U0001F389\"", vec!["a-]é🎉", "a\né🎉"], vec!["bé🎉"]),
        ("root ::= \"\" \"x\"{2} (\"\" | \"y\"{,1})", vec!["xx", "xxy"], vec!["x", "xxyy"]),
        ("root ::= \"(\" root? \")\"", vec!["()", "((()))"], vec!["(", "())"]),
        ("root ::= a\na ::= \"x\" a | ws\nws ::= \"\"", vec!["", "xx"], vec!["y"]),
        ("root ::= a | \"z\"\na ::= a \"x\" | \"x\"", vec!["xxx", "z"], vec!["", "zx"]),
        (arithmetic, vec!["a=1\n", "(x +2) *y1 = 3\n\n4=b\n"], vec!["a=\n", "=1\n", "a=1"]),
        (json, vec![r#"{"a": [1, {"b": "é\n"}], "c": null}"#, "{}"], vec!["[1]", r#"{"a"}"#, "{\"a\": 01}"]),
    ];
    for (grammar, good, bad) in cases {
        assert_accepts(&Constraint::Gbnf(grammar.to_owned()), &good, &bad);
    }
}

#[test]
fn a_broken_grammar_in_gbnf_says_where() {
    for (grammar, error) in [
        ("rot ::= \"a\"", "the rule `root` is missing"),
        ("root ::= \"a\"\nroot ::= \"b\"", "line 2: the rule `root` is there already"),
        ("root ::= \"a\" b", "line 1: there is no rule `b`"),
        ("root ::= (\n\"a\" | \"b\"\n", "line 1: `)` is missing"),
        ("root ::= \"a\" )", "line 1: `)` was not expected"),
        ("root ::= \"a\nb\"", "`\"` is missing"),
        ("root ::= [a-", "`]` is missing"),
        ("root ::= []", "line 1: `[]` matches nothing"),
        ("root ::= [z-a]", "line 1: the range from 'z' to 'a' is empty"),
        ("root ::= * \"a\"", "line 1: there is nothing to repeat"),
        ("root ::= \"a\"{3,2}", "line 1: `{3,2}` is no number of repetitions"),
        ("root ::= \"a\"{x}", "line 1: `{` takes"),
        ("root ::= \"\\q\"", "line 1: `\\q` is no escape"),
        ("root ::= \"\\uD800\"", "line 1: U+D800 is no character"),
        ("root ::=\n<think>", "line 2: tokens of the model"),
        ("root ::= \"a\"\n\"b\" ::= \"c\"", "line 2: `::=` was not expected"),
        ("root : \"a\" ::=", "line 1: ':' was not expected"),
    ] {
        let refused = compile(&Constraint::Gbnf(grammar.to_owned())).expect_err(grammar).to_string();
        assert!(refused.contains(error), "{grammar}: {refused}");
    }
}

#[test]
fn what_was_prepared_holds_for_the_next_token_alone() {
    let mut matcher = compile(&Constraint::Regex("ab".to_owned())).unwrap();
    matcher.prepare();
    assert_eq!(allowed(&mut matcher), [97]);
    matcher.prepare();
    matcher.consume(97).unwrap();
    assert_eq!(allowed(&mut matcher), [98]);
    matcher.prepare();
    assert_eq!(allowed(&mut matcher.clone()), [98]);
}

#[test]
fn the_end_may_follow_what_is_complete_and_special_tokens_nothing() {
    let mut matcher = compile(&Constraint::Regex("a+".to_owned())).unwrap();
    assert_eq!(allowed(&mut matcher), [97]);
    matcher.consume(97).unwrap();
    assert_eq!(allowed(&mut matcher), [97, STOP]);
    let mut logits = [0.0; 259];
    // Without a stop token, the special one is like any other; a stop token that is text may come only at the end.
    matcher.mask(&mut logits, &[]).unwrap();
    assert_eq!(logits[STOP as usize], f32::NEG_INFINITY);
    let mut fresh = compile(&Constraint::Regex("ab".to_owned())).unwrap();
    let mut logits = [0.0; 259];
    fresh.mask(&mut logits, &[97]).unwrap();
    assert!(logits.iter().all(|logit| *logit == f32::NEG_INFINITY));
    fresh.consume(97).unwrap();
    assert!(!fresh.is_complete());
    fresh.consume(98).unwrap();
    assert!(fresh.is_complete());
}

#[test]
fn the_end_does_not_stand_for_a_part_that_something_must_follow() {
    for (rules, good, bad) in [
        ("start: text \"END\"\ntext[stop=\"\"]: /[a-z]*/", vec!["aEND", "END"], vec!["", "a", "ab", "aEN"]),
        ("start: text\ntext[stop=\"\"]: /[a-z]+/", vec!["a", "ab"], vec!["", "aEND"]),
        ("start: <[*]> \"x\"", vec!["ax", "xx"], vec!["", "a", "x"]),
        ("start: \"x\" (<[97-259]> \"y\")?", vec!["x", "xay"], vec!["", "xa"]),
    ] {
        assert_accepts(&Constraint::Lark(rules.to_owned()), &good, &bad);
    }
}

#[test]
fn what_cannot_be_compiled_is_an_error() {
    for constraint in [
        Constraint::JsonSchema(json!({"type": "no such type"})),
        Constraint::JsonSchema(json!({"$ref": "https://example.com/schema.json"})),
        Constraint::JsonSchema(json!({"type": "object", "unevaluatedProperties": false, "if": {}})),
        Constraint::JsonSchema(json!(1)),
        Constraint::Regex("(a".to_owned()),
        Constraint::Regex("(?=a)b".to_owned()),
        Constraint::Lark("start: nowhere".to_owned()),
        Constraint::Lark("begin: \"a\"".to_owned()),
        Constraint::Lark(String::new()),
    ] {
        assert!(matches!(compile(&constraint), Err(GrammarError::Invalid(_))), "{constraint:?}");
    }
    for (constraint, cause) in [
        (Constraint::Regex("(?=a)b".to_owned()), "look-around"),
        (Constraint::Regex("(a".to_owned()), "unclosed group"),
        (Constraint::JsonSchema(json!({"type": "string", "pattern": "^(?=a)b"})), "look-around"),
    ] {
        let refused = compile(&constraint).expect_err(cause).to_string();
        assert!(refused.contains(cause), "{constraint:?}: {refused}");
    }
    let large = Constraint::Regex("a".repeat(200_000));
    assert!(matches!(compile(&large), Err(GrammarError::TooLarge(200_000, _))));
}

#[test]
fn a_constraint_without_an_output_is_an_error() {
    for constraint in [
        Constraint::Gbnf("root ::= root".to_owned()),
        Constraint::Gbnf("root ::= a | root \"x\"\na ::= a \"y\"".to_owned()),
        Constraint::Gbnf("root ::= \"\"".to_owned()),
        Constraint::Gbnf("root ::= \"a\"{0}".to_owned()),
        Constraint::Regex("()".to_owned()),
        Constraint::Regex("a{0}".to_owned()),
        Constraint::Lark("start: start".to_owned()),
        Constraint::Lark("start: \"\"".to_owned()),
        Constraint::Lark("start: A\nA: /a/ & /b/".to_owned()),
        Constraint::JsonSchema(json!({"$ref": "#"})),
        Constraint::JsonSchema(json!({"enum": []})),
        Constraint::JsonSchema(json!({"type": "string", "minLength": 3, "maxLength": 2})),
        Constraint::JsonSchema(json!({"type": "integer", "minimum": 3, "maximum": 2})),
    ] {
        assert!(matches!(compile(&constraint), Err(GrammarError::Invalid(_))), "{constraint:?}");
    }
}

#[test]
fn a_rule_without_end_is_refused_by_name_wherever_it_is_come_to() {
    for (constraint, name) in [
        (Constraint::Lark("start: \"a\" x\nx: x \"b\"".to_owned()), "x"),
        (Constraint::Lark("start: \"a\" | \"c\" x\nx: \"b\" x".to_owned()), "x"),
        (Constraint::Lark("start: \"a\" | \"c\" p\np: \"b\" q\nq: p p".to_owned()), "p"),
        (Constraint::Lark("start: \"a\" x?\nx: \"b\" (x \"c\" | \"d\" x)".to_owned()), "x"),
        (Constraint::Gbnf("root ::= \"a\" x | \"c\"\nx ::= x \"b\"".to_owned()), "x"),
        (Constraint::Gbnf("root ::= \"a\" root".to_owned()), "root"),
        (Constraint::Gbnf("root ::= (\"a\" x)*\nx ::= \"[\" y \"]\"\ny ::= x | \"(\" y \")\"".to_owned()), "x"),
    ] {
        let refused = compile(&constraint).expect_err(name).to_string();
        assert!(refused.contains(&format!("rule `{name}` has no end")), "{constraint:?}: {refused}");
    }
    let node = json!({"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "required": ["next"]});
    for schema in [
        json!({"$ref": "#/$defs/node", "$defs": {"node": node}}),
        json!({"type": "object", "properties": {"a": {"$ref": "#/$defs/node"}}, "$defs": {"node": node}}),
        json!({"type": "array", "items": {"$ref": "#/$defs/node"}, "$defs": {"node": node}}),
    ] {
        let refused = compile(&Constraint::JsonSchema(schema.clone())).expect_err("it has no end").to_string();
        assert!(refused.contains("has no end"), "{schema}: {refused}");
    }
}

#[test]
fn a_rule_that_leads_to_itself_and_ends_is_none_without_end() {
    let node = json!({"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": false});
    let tree = json!({"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#"}}]});
    for (constraint, good) in [
        (Constraint::Lark("start: x\nx: x \"b\" | \"a\"".to_owned()), "abb"),
        (Constraint::Lark("start: \"a\" x\nx: \"b\" y |\ny: x \"c\"".to_owned()), "abbcc"),
        (Constraint::Gbnf("root ::= \"(\" root? \")\"".to_owned()), "(())"),
        (Constraint::JsonSchema(node), r#"{"next": {"next": {}}}"#),
        (Constraint::JsonSchema(tree), "[null, [[]]]"),
    ] {
        assert_accepts(&constraint, &[good], &[]);
    }
}

#[test]
fn keywords_of_schemas_that_are_not_followed_are_refused_by_name() {
    let named = json!({"type": "string"});
    for (keyword, schema) in [
        ("not", json!({"not": named})),
        ("if", json!({"if": named, "then": named})),
        ("oneOf", json!({"oneOf": [{"type": "integer"}, {"type": "number"}]})),
        ("contains", json!({"type": "array", "contains": named})),
        ("uniqueItems", json!({"type": "array", "uniqueItems": true})),
        ("propertyNames", json!({"type": "object", "propertyNames": {"pattern": "a"}})),
        ("dependentRequired", json!({"type": "object", "dependentRequired": {"a": ["b"]}})),
        ("unevaluatedProperties", json!({"type": "object", "unevaluatedProperties": false})),
        ("$dynamicRef", json!({"type": "object", "properties": {"a": {"$dynamicRef": "#a"}}})),
        ("format", json!({"type": "string", "format": "colour"})),
    ] {
        let refused = compile(&Constraint::JsonSchema(schema)).expect_err(keyword).to_string();
        assert!(refused.contains(keyword), "{keyword}: {refused}");
    }
}

#[test]
fn a_temperature_of_a_part_is_refused_by_name() {
    for rules in [
        "start[temperature=0.5]: /a+/",
        "start: \"x\" a | start a\na[temperature=1.5, max_tokens=3]: /a+/",
        "start: (\"x\" a)*\na[temperature=0.7, stop=\"b\"]: /a+/",
        "start: a \"x\"\na[temperature=0.5]: %json {\"type\": \"integer\"}",
    ] {
        let refused = compile(&Constraint::Lark(rules.to_owned())).expect_err(rules).to_string();
        assert!(refused.contains("`temperature`"), "{rules}: {refused}");
    }
    for rules in ["start: \"temperature=0.5\"", "start: a \"x\"\na[max_tokens=3]: %json {\"type\": \"integer\"}"] {
        compile(&Constraint::Lark(rules.to_owned())).unwrap();
    }
}

#[test]
fn blanks_in_json_come_to_an_end_whatever_the_schema() {
    let blanks = "[".to_owned() + &" \n".repeat(40);
    for schema in [json!(true), json!({}), json!({"type": "array"})] {
        assert_accepts(&Constraint::JsonSchema(schema), &["[]", "[ 1,\n\n  2]"], &[]);
    }
    for schema in [json!(true), json!({}), json!({"type": "array"})] {
        let mut matcher = compile(&Constraint::JsonSchema(schema)).unwrap();
        assert!(blanks.bytes().any(|blank| matcher.consume(u32::from(blank)).is_err()));
    }
}

/// One grammar, to be written in GBNF and to be read by the book.
#[derive(Debug, Clone)]
enum Tree {
    Literal(&'static str),
    /// Of the characters from the first to the last.
    Class(u8, u8),
    Rule(usize),
    Sequence(Vec<Tree>),
    Alternatives(Vec<Tree>),
    Repeated(Box<Tree>, usize, Option<usize>),
}

const RULE_NAMES: [&str; 3] = ["root", "b", "c"];

/// Where texts of each rule can end, by where they begin.
type RuleEnds = Vec<Vec<BTreeSet<usize>>>;

impl Tree {
    fn any() -> impl Strategy<Value = Self> {
        let leaf = prop_oneof![
            prop::sample::select(vec!["", "a", "b", "ab", "ba"]).prop_map(Self::Literal),
            prop::sample::select(vec![(b'a', b'a'), (b'a', b'b'), (b'a', b'z')]).prop_map(|(a, z)| Self::Class(a, z)),
            (0..RULE_NAMES.len()).prop_map(Self::Rule),
        ];
        leaf.prop_recursive(3, 12, 3, |inner| {
            let several = prop::collection::vec(inner.clone(), 1..4);
            prop_oneof![
                several.clone().prop_map(Self::Sequence),
                several.prop_map(Self::Alternatives),
                (inner, 0..3usize, prop::option::of(0..3usize)).prop_map(|(inner, min, more)| {
                    Self::Repeated(Box::new(inner), min, more.map(|more| min + more))
                }),
            ]
        })
    }

    fn written(&self) -> String {
        let join = |parts: &[Self], joint: &str| parts.iter().map(Self::written).collect::<Vec<_>>().join(joint);
        match self {
            Self::Literal(text) => format!("{text:?}"),
            Self::Class(first, last) => format!("[{}-{}]", char::from(*first), char::from(*last)),
            Self::Rule(number) => RULE_NAMES[*number].to_owned(),
            Self::Sequence(parts) => format!("({})", join(parts, " ")),
            Self::Alternatives(parts) => format!("({})", join(parts, " | ")),
            Self::Repeated(inner, 0, None) => format!("({})*", inner.written()),
            Self::Repeated(inner, min, None) => format!("({}){{{min},}}", inner.written()),
            Self::Repeated(inner, min, Some(max)) => format!("({}){{{min},{max}}}", inner.written()),
        }
    }

    /// Whether it has a class of many characters, whose repetitions end only where they cannot go on.
    fn is_wide(&self) -> bool {
        match self {
            Self::Class(_, last) => *last == b'z',
            Self::Literal(_) | Self::Rule(_) => false,
            Self::Sequence(parts) | Self::Alternatives(parts) => parts.iter().any(Self::is_wide),
            Self::Repeated(inner, ..) => inner.is_wide(),
        }
    }

    /// Whether any text is of it, as far as that is known of the rules.
    fn has_end(&self, rules: &[bool]) -> bool {
        match self {
            Self::Literal(_) | Self::Class(..) => true,
            Self::Rule(number) => rules[*number],
            Self::Sequence(parts) => parts.iter().all(|part| part.has_end(rules)),
            Self::Alternatives(parts) => parts.iter().any(|part| part.has_end(rules)),
            Self::Repeated(inner, min, _) => *min == 0 || inner.has_end(rules),
        }
    }

    fn add_rules(&self, rules: &mut Vec<usize>) {
        match self {
            Self::Literal(_) | Self::Class(..) => {}
            Self::Rule(number) => rules.push(*number),
            Self::Sequence(parts) | Self::Alternatives(parts) => parts.iter().for_each(|part| part.add_rules(rules)),
            Self::Repeated(inner, ..) => inner.add_rules(rules),
        }
    }

    /// Where its texts can end that begin at `from`, as far as `rules` are known.
    fn ends(&self, text: &str, from: usize, rules: &RuleEnds) -> BTreeSet<usize> {
        let after = |starts: &BTreeSet<usize>, part: &Self| -> BTreeSet<usize> {
            starts.iter().flat_map(|start| part.ends(text, *start, rules)).collect()
        };
        match self {
            Self::Literal(literal) => {
                text[from..].starts_with(literal).then_some(from + literal.len()).into_iter().collect()
            }
            Self::Class(first, last) => {
                let next = text.as_bytes().get(from).filter(|byte| (first..=last).contains(byte));
                next.map(|_| from + 1).into_iter().collect()
            }
            Self::Rule(number) => rules[*number][from].clone(),
            Self::Sequence(parts) => parts.iter().fold(BTreeSet::from([from]), |starts, part| after(&starts, part)),
            Self::Alternatives(parts) => parts.iter().flat_map(|part| part.ends(text, from, rules)).collect(),
            Self::Repeated(inner, min, max) => {
                let (mut starts, mut ends) = (BTreeSet::from([from]), BTreeSet::new());
                // Beyond the least, each repetition that matters has a character.
                for count in 0..=max.unwrap_or(min + text.len()) {
                    if count >= *min {
                        ends.extend(&starts);
                    }
                    starts = after(&starts, inner);
                }
                ends
            }
        }
    }
}

/// Whether the first of `rules` has the text.
fn is_text_of(rules: &[Tree], text: &str) -> bool {
    let mut known: RuleEnds = vec![vec![BTreeSet::new(); text.len() + 1]; rules.len()];
    loop {
        let of_rule = |rule: &Tree| (0..=text.len()).map(|from| rule.ends(text, from, &known)).collect();
        let next: RuleEnds = rules.iter().map(of_rule).collect();
        if next == known {
            return known[0][0].contains(&text.len());
        }
        known = next;
    }
}

/// Whether the first of `rules` leads to one that no text is of.
fn leads_nowhere(rules: &[Tree]) -> bool {
    let mut ending = vec![false; rules.len()];
    for _ in rules {
        ending = rules.iter().map(|rule| rule.has_end(&ending)).collect();
    }
    let (mut left, mut reached) = (vec![0], BTreeSet::new());
    while let Some(rule) = left.pop() {
        if reached.insert(rule) {
            rules[rule].add_rules(&mut left);
        }
    }
    reached.iter().any(|rule| !ending[*rule])
}

proptest! {
    #[test]
    fn a_grammar_in_gbnf_accepts_what_it_says_by_the_book(rules in prop::collection::vec(Tree::any(), RULE_NAMES.len())) {
        let written: String =
            rules.iter().zip(RULE_NAMES).map(|(rule, name)| format!("{name} ::= {}\n", rule.written())).collect();
        let compiled = compile(&Constraint::Gbnf(written.clone()));
        let is_wide = rules.iter().any(Tree::is_wide);
        let texts = (0..=4usize).flat_map(|len| (0..1 << len).map(move |bits: usize| {
            (0..len).map(|at| if bits >> at & 1 == 0 { 'a' } else { 'b' }).collect::<String>()
        }));
        for text in texts {
            let expected = is_text_of(&rules, &text);
            match &compiled {
                Ok(matcher) => {
                    let is_accepted = accepts(matcher, &text);
                    prop_assert!(is_accepted == expected || is_wide && expected, "{written}{text:?}: {expected}");
                }
                Err(error) => {
                    let has_none = !expected || text.is_empty() || leads_nowhere(&rules);
                    prop_assert!(has_none, "{written}{text:?}: {error}");
                }
            }
        }
    }
}

/// None of them may take the process down, or much time.
#[test]
fn hostile_constraints_end_in_an_error_or_a_grammar() {
    let deep = |open: &str, close: &str, num: usize| format!("{}a{}", open.repeat(num), close.repeat(num));
    // Rules that are two of the next.
    let doubling = |num: usize| {
        let rule = |number: usize| format!("r{number} ::= r{} r{}\n", number + 1, number + 1);
        format!("root ::= r0\n{}r{num} ::= \"a\"", (0..num).map(rule).collect::<String>())
    };
    let mut nested = json!({"type": "integer"});
    for _ in 0..120 {
        nested = json!({"anyOf": [nested, {"type": "array", "items": {"type": "string"}}]});
    }
    let compiler = compiler();
    for constraint in [
        Constraint::Lark(format!("start: {}", deep("(", ")", 20_000).replace('a', "\"a\""))),
        Constraint::Lark(format!("start: a\na: {}", "b ".repeat(50_000))),
        Constraint::Lark(format!("start: /{}/", deep("(", ")", 20_000))),
        Constraint::Lark("start: start".to_owned()),
        Constraint::Gbnf(format!("root ::= {}", deep("(", ")", 20_000).replace('a', "\"a\""))),
        Constraint::Gbnf("root ::= root".to_owned()),
        Constraint::Gbnf(format!("root ::= \"a\"{}", "+".repeat(50_000))),
        Constraint::Gbnf(doubling(60)),
        Constraint::Gbnf(format!("{}r60 ::= root", doubling(60).replace("r60 ::= \"a\"", ""))),
        Constraint::Regex(deep("(", ")", 20_000)),
        Constraint::Regex(deep("(?:", ")*", 10_000)),
        Constraint::Regex("((a{1,1000}){1,1000}){1,1000}".to_owned()),
        Constraint::Regex("(.*a.{200}b)|(.*c.{300}d)".to_owned()),
        Constraint::JsonSchema(nested),
        Constraint::JsonSchema(json!({"$ref": "#"})),
        Constraint::JsonSchema(json!({"allOf": [{"$ref": "#"}]})),
        Constraint::JsonSchema(json!({"type": "string", "minLength": 1_000_000})),
        Constraint::JsonSchema(json!({"type": "array", "minItems": 1_000_000, "items": {"type": "integer"}})),
        Constraint::JsonSchema(json!({"type": "string", "pattern": "^(a+)+$"})),
    ] {
        let start = std::time::Instant::now();
        if let Ok(mut matcher) = compiler.compile(&constraint) {
            let mut logits = [0.0; 259];
            let _ = matcher.mask(&mut logits, &[STOP]);
        }
        let seconds = start.elapsed().as_secs_f64();
        assert!(seconds < 10.0, "{seconds} s: {:.80}", format!("{constraint:?}"));
    }
}
