use std::sync::Arc;

use serde_json::json;

use super::*;
use crate::tokenizer::{Specials, Tokenizer};

const STOP: u32 = 258;

fn compile(constraint: &Constraint) -> Result<Matcher, GrammarError> {
    compiler().compile(constraint)
}

fn compiler() -> GrammarCompiler {
    GrammarCompiler::new(Arc::new(Tokenizer::tiny(&["<|end|>"])))
}

/// Which of the tokens may come next.
fn allowed(matcher: &mut Matcher) -> Vec<u32> {
    let mut logits = [0.0; 259];
    matcher.mask(&mut logits, &[STOP]).unwrap();
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
            Constraint::Lark("start: A \" \" b?\nA: /t+h/\nb: \"e\" | \"f\"".to_owned()),
            vec!["tth ", "th f"],
            vec!["th"],
        ),
    ];
    for (constraint, good, bad) in cases {
        let matcher = compile(&constraint).unwrap();
        for text in good {
            assert!(accepts(&matcher, text), "{constraint:?} {text:?}");
        }
        for text in bad {
            assert!(!accepts(&matcher, text), "{constraint:?} {text:?}");
        }
    }
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
    let large = Constraint::Regex("a".repeat(200_000));
    assert!(matches!(compile(&large), Err(GrammarError::TooLarge(200_000, _))));
}

/// None of them may take the process down, or much time.
#[test]
fn hostile_constraints_end_in_an_error_or_a_grammar() {
    let deep = |open: &str, close: &str, num: usize| format!("{}a{}", open.repeat(num), close.repeat(num));
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
