//! Text becomes the tokens that the library makes of it by a checkpoint's `tokenizer.json`, or that is refused.

mod tiny_checkpoint;

use lorry::model::gguf::GgufFile;
use lorry::prompt::chat::{ChatTemplate, Ending};
use lorry::prompt::literal::Literal;
use lorry::tokenizer::detokenize::Detokenizer;
use lorry::tokenizer::{Specials, Tokenizer};
use serde_json::{Value, json};
use tiny_checkpoint::{Checkpoint, HIDDEN, VOCAB, pieces_json, tensor, tokenizer_json};

/// Spaces and markers in all orders.
const TEXTS: [&str; 12] = [
    "ax a",
    " ax",
    "  ax  a",
    "<|user|>ax<|end|> ax",
    "<|user|>\n ax\t<|end|>\n\n<|user|>a",
    "<s><|user|> ax",
    "ax \n<|user|>",
    " <|user|> ",
    "a<mark>a <mark> a",
    "x ax a",
    "\u{a0}<|end|>\u{3000}a",
    "",
];

fn assert_alike(tokenizer: &Value, texts: &[&str]) {
    let (ours, theirs) = Checkpoint::new("llama").tokenizers(tokenizer);
    for text in texts {
        let expected = theirs.encode(*text, false).unwrap();
        assert_eq!(ours.encode(text, Specials::Parse).unwrap(), expected.get_ids(), "{text:?} by {tokenizer}");
        let literal = Literal::of_texts(&ours, &[]);
        assert_eq!(literal.encode(&format!("{text}\u{fdd0}")).unwrap(), expected.get_ids(), "{text:?} by {tokenizer}");
    }
}

fn refusal_of(tokenizer: &Value) -> String {
    let checkpoint = Checkpoint::new("llama");
    checkpoint.write("tokenizer.json", tokenizer.to_string());
    checkpoint.refusal()
}

/// With a field of the added token at `index` changed.
fn flagged(mut tokenizer: Value, index: usize, flag: &str) -> Value {
    tokenizer["added_tokens"][index][flag] = json!(true);
    tokenizer
}

/// The ways of [`pieces_json`] with spaces.
fn spacings() -> Vec<Value> {
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let prepend = json!({"type": "Prepend", "prepend": "▁"});
    let metaspace = |scheme: &str, split: bool| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split});
    let mut steps = vec![
        (json!({"type": "Sequence", "normalizers": [prepend, replace]}), Value::Null),
        (
            replace.clone(),
            json!({"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": false}),
        ),
    ];
    for scheme in ["always", "first", "never"] {
        steps.extend([true, false].map(|split| (Value::Null, metaspace(scheme, split))));
    }
    let with_steps = |(normalizer, pre_tokenizer): (Value, Value)| {
        let mut tokenizer = pieces_json();
        tokenizer["normalizer"] = normalizer;
        tokenizer["pre_tokenizer"] = pre_tokenizer;
        tokenizer
    };
    steps.into_iter().map(with_steps).collect()
}

#[test]
fn a_space_is_put_before_a_text_where_the_file_says_so() {
    for tokenizer in spacings() {
        assert_alike(&tokenizer, &TEXTS);
    }
    let first = &spacings()[5];
    let (tokenizer, _) = Checkpoint::new("llama").tokenizers(first);
    assert_eq!(first["pre_tokenizer"]["prepend_scheme"], "first");
    let piece = |text: &str| tokenizer.id_of(text).unwrap();
    assert_eq!(tokenizer.encode("ax<|end|> ax", Specials::Parse).unwrap(), [piece("▁ax"), 270, piece("▁ax")]);
    assert_eq!(tokenizer.encode_continuation("ax").unwrap(), [piece("ax")]);
}

#[test]
fn markers_take_in_the_whitespace_beside_them_where_the_file_says_so() {
    for tokenizer in spacings() {
        let behind = flagged(tokenizer, 3, "rstrip");
        assert_alike(&behind, &TEXTS);
        assert_alike(&flagged(flagged(behind, 4, "lstrip"), 5, "rstrip"), &TEXTS);
    }
    assert_alike(&flagged(tokenizer_json(), 0, "rstrip"), &["<|end|>\n the<|end|>", "12 <|end|>  <think> th"]);
    assert_alike(&flagged(tokenizer_json(), 1, "lstrip"), &["the \n<think> 12", "<|end|> <think>"]);
}

#[test]
fn spaces_of_an_added_token_are_spaces() {
    // As in Gemma's file: text has the token by its merges there, and here because it is looked for.
    let mut tokenizer = spacings().remove(1);
    let id = tokenizer["model"]["vocab"]["▁▁▁▁"].clone();
    let indentation = json!({"id": id, "content": "▁▁▁▁", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": false});
    tokenizer["added_tokens"].as_array_mut().unwrap().push(indentation);
    assert_alike(&tokenizer, &["    x", "a    ", "        "]);
    let (ours, _) = Checkpoint::new("llama").tokenizers(&tokenizer);
    let ids = ours.encode("    x", Specials::AsText).unwrap();
    assert_eq!(u64::from(ids[0]), id.as_u64().unwrap());
    let mut detokenizer = Detokenizer::new(ours);
    assert_eq!(ids.iter().map(|id| detokenizer.push(*id)).collect::<String>(), "    x");
}

#[test]
fn what_of_a_tokenizer_would_change_its_tokens_is_refused_by_name() {
    let with = |mut tokenizer: Value, pointer: &str, value: Value| {
        *tokenizer.pointer_mut(pointer).unwrap() = value;
        tokenizer
    };
    let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": false});
    let ends =
        |pieces: Value| json!({"type": "TemplateProcessing", "single": pieces, "pair": [], "special_tokens": {}});
    let (special, text) =
        (json!({"SpecialToken": {"id": "<|end|>", "type_id": 0}}), json!({"Sequence": {"id": "A", "type_id": 0}}));
    let lowercased = with(flagged(tokenizer_json(), 1, "normalized"), "/normalizer", json!({"type": "Lowercase"}));
    let mut ignoring = pieces_json();
    ignoring["model"]["ignore_merges"] = json!(true);
    for (words, tokenizer) in [
        (["added_tokens", "single_word"], flagged(tokenizer_json(), 0, "single_word")),
        (["added_tokens", "normalized"], with(lowercased, "/added_tokens/1/content", json!("<THINK>"))),
        (["pre_tokenizer", "ByteLevel"], with(tokenizer_json(), "/pre_tokenizer", metaspace.clone())),
        (["pre_tokenizer", "ByteLevel"], with(tokenizer_json(), "/pre_tokenizer", Value::Null)),
        (["replacement", "_"], with(pieces_json(), "/pre_tokenizer", with(metaspace, "/replacement", json!("_")))),
        (["post_processor", "behind"], with(tokenizer_json(), "/post_processor", ends(json!([text, special])))),
        (
            ["post_processor", "before"],
            with(tokenizer_json(), "/post_processor", ends(json!([special, special, text]))),
        ),
        (["model.dropout", "0.1"], with(tokenizer_json(), "/model/dropout", json!(0.1))),
        (["model.ignore_merges", "byte_fallback"], ignoring),
    ] {
        let refusal = refusal_of(&tokenizer);
        assert!(words.iter().all(|word| refusal.contains(word)), "{words:?}: {refusal}");
    }
    let checkpoint = Checkpoint::new("llama");
    checkpoint.write("tokenizer_config.json", json!({"add_eos_token": true}).to_string());
    let refusal = checkpoint.refusal();
    assert!(refusal.contains("tokenizer_config.json") && refusal.contains("add_eos_token"), "{refusal}");
}

#[test]
fn what_changes_nothing_is_not_refused() {
    let (ours, _) = Checkpoint::new("llama").tokenizers(&flagged(tokenizer_json(), 1, "normalized"));
    assert_eq!(ours.bos(), None);
    let mut tokenizer = tokenizer_json();
    let pieces = json!([{"SpecialToken": {"id": "<|end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]);
    let special = json!({"<|end|>": {"id": "<|end|>", "ids": [259], "tokens": ["<|end|>"]}});
    let template = json!({"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": special});
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true});
    tokenizer["post_processor"] = json!({"type": "Sequence", "processors": [byte_level, template]});
    let (ours, _) = Checkpoint::new("llama").tokenizers(&tokenizer);
    assert_eq!(ours.bos(), Some(259));
    let checkpoint = Checkpoint::new("llama");
    let configuration = json!({"add_bos_token": false, "add_eos_token": false});
    checkpoint.write("tokenizer_config.json", configuration.to_string());
    assert_eq!(checkpoint.tokenizers(&tokenizer).0.bos(), None);
}

#[test]
fn a_head_that_the_configuration_promises_must_be_there() {
    let mut checkpoint = Checkpoint::new("llama");
    checkpoint.config["tie_word_embeddings"] = json!(false);
    let refusal = checkpoint.refusal();
    assert!(refusal.contains("tie_word_embeddings") && refusal.contains("lm_head.weight"), "{refusal}");
    checkpoint.tensors.insert("lm_head.weight".to_owned(), tensor("lm_head.weight", &[VOCAB, HIDDEN]));
    checkpoint.convert("q8_0").unwrap();
}

/// What `hi` is rendered to, or why there is no template.
fn rendered(templates: Value, file: Option<&str>) -> Result<String, String> {
    let checkpoint = Checkpoint::new("llama");
    checkpoint.write("tokenizer_config.json", json!({"chat_template": templates}).to_string());
    file.into_iter().for_each(|template| checkpoint.write("chat_template.jinja", template));
    let gguf = GgufFile::open(&checkpoint.convert("q8_0").unwrap()).unwrap();
    let template = ChatTemplate::from_gguf(&gguf, &Tokenizer::from_gguf(&gguf).unwrap()).map_err(|e| e.to_string())?;
    template.render(&[json!({"role": "user", "content": "hi"})], Ending::LastMessage, None).map_err(|e| e.to_string())
}

#[test]
fn of_several_chat_templates_the_one_that_is_meant_is_taken() {
    let named = |names: &[&str]| -> Value {
        names
            .iter()
            .map(|name| json!({"name": name, "template": format!("{name} {{{{ messages[0].content }}}}")}))
            .collect()
    };
    assert_eq!(rendered(named(&["tool_use", "default"]), None).unwrap(), "default hi");
    assert_eq!(rendered(named(&["tool_use", "default"]), Some("file")).unwrap(), "file");
    assert_eq!(rendered(named(&["rag"]), None).unwrap(), "rag hi");
    assert_eq!(rendered(json!("one"), None).unwrap(), "one");
    let refusal = rendered(named(&["tool_use", "rag"]), None).unwrap_err();
    assert!(refusal.contains("chat_template.rag, tokenizer.chat_template.tool_use"), "{refusal}");
    assert!(rendered(json!([]), None).unwrap_err().contains("no chat template"));
}
