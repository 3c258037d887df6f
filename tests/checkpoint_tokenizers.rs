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

/// Pairs as a training made them: a token is not made of every two tokens that it could be made of.
#[test]
fn pieces_merge_by_pairs_and_in_their_order() {
    for mut tokenizer in spacings() {
        let pieces = ["b", "c", "bc", "ab", "abc", "xb", "axb", "bb"];
        let vocab = tokenizer["model"]["vocab"].as_object_mut().unwrap();
        vocab.extend(pieces.iter().zip(269..).map(|(piece, id)| (piece.to_string(), json!(id))));
        // The library counts added tokens on from the vocabulary.
        (3..6).zip(277..).for_each(|(at, id)| tokenizer["added_tokens"][at]["id"] = json!(id));
        // "ab c" makes what "a bc" does not, and "ax b" early what "a xb" makes late.
        let merges = ["b c", "a b", "ab c", "ax b", "b b", "x b", "a xb"].map(|merge| json!(merge));
        tokenizer["model"]["merges"].as_array_mut().unwrap().extend(merges);
        assert_alike(
            &tokenizer,
            &["abc", "abcabc", "aabc ab cc", "axbc axb", "xbb bxb", "bbb axbb<|end|>abc", "  abbc"],
        );
    }
}

#[test]
fn what_the_configuration_says_of_added_tokens_counts() {
    let token = |content: &str, special: bool, flag: &str| {
        let mut token = json!({"content": content, "lstrip": false, "normalized": false, "rstrip": false,
            "single_word": false, "special": special});
        token[flag] = json!(true);
        token
    };
    for plain in spacings() {
        let checkpoint = Checkpoint::new("llama");
        let anew = json!({"269": token("<|user|>", true, "rstrip"), "272": token("<new>", false, "lstrip")});
        checkpoint.write("tokenizer_config.json", json!({"added_tokens_decoder": anew}).to_string());
        let (ours, before) = checkpoint.tokenizers(&plain);
        let mut whole = flagged(plain, 3, "rstrip");
        let mut new = token("<new>", false, "lstrip");
        new["id"] = json!(272);
        whole["added_tokens"].as_array_mut().unwrap().push(new);
        let after = tokenizers::Tokenizer::from_bytes(whole.to_string()).unwrap();
        let texts = ["<|user|>\n ax", "a <new> x", " <new><|user|>  <new>"];
        for text in texts {
            let expected = after.encode(text, false).unwrap();
            assert_eq!(ours.encode(text, Specials::Parse).unwrap(), expected.get_ids(), "{text:?} by {whole}");
        }
        assert!(texts.iter().any(
            |text| before.encode(*text, false).unwrap().get_ids() != after.encode(*text, false).unwrap().get_ids()
        ));
    }
}

#[test]
fn every_token_that_ends_an_output_is_read() {
    let ends = |generation: Value| {
        let checkpoint = Checkpoint::new("llama");
        checkpoint.write("generation_config.json", generation.to_string());
        let (ours, _) = checkpoint.tokenizers(&tokenizer_json());
        ours.stop_tokens().to_vec()
    };
    let left = json!({"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1, "do_sample": true});
    for (mut generation, expected) in [
        (json!({}), vec![259]),
        (json!({"eos_token_id": null, "suppress_tokens": null}), vec![259]),
        // The last is one by its text.
        (json!({"eos_token_id": 258, "guidance_scale": 1.0, "min_length": 0}), vec![258, 259]),
        (json!({"eos_token_id": [258, 259, 258], "bad_words_ids": []}), vec![258, 259]),
        (json!({"eos_token_id": [256, 9, 257, 258, 259, 8]}), vec![8, 9, 256, 257, 258, 259]),
    ] {
        assert_eq!(ends(generation.clone()), expected, "{generation}");
        generation.as_object_mut().unwrap().extend(left.as_object().unwrap().clone());
        assert_eq!(ends(generation.clone()), expected, "{generation}");
    }
}

#[test]
fn what_would_forbid_or_force_tokens_is_refused_by_name() {
    for (field, value) in [
        ("suppress_tokens", json!([5])),
        ("begin_suppress_tokens", json!([220, 259])),
        ("bad_words_ids", json!([[5, 6]])),
        ("forced_bos_token_id", json!(7)),
        ("no_repeat_ngram_size", json!(3)),
        ("min_new_tokens", json!(2)),
        ("guidance_scale", json!(1.5)),
        ("stop_strings", json!("END")),
        ("token_healing", json!(true)),
        ("eos_token_id", json!([259, 300])),
        ("eos_token_id", json!("<|end|>")),
    ] {
        let checkpoint = Checkpoint::new("llama");
        checkpoint.write("generation_config.json", json!({field: value.clone()}).to_string());
        let refusal = checkpoint.refusal();
        assert!(refusal.contains("generation_config.json") && refusal.contains(field), "{field} = {value}: {refusal}");
    }
    let mut checkpoint = Checkpoint::new("llama");
    checkpoint.config["eos_token_id"] = json!([259, 301]);
    let refusal = checkpoint.refusal();
    assert!(refusal.starts_with("config.json") && refusal.contains("301"), "{refusal}");
    for field in ["bos_token", "eos_token"] {
        let checkpoint = Checkpoint::new("llama");
        checkpoint.write("tokenizer_config.json", json!({field: "<nowhere>"}).to_string());
        let refusal = checkpoint.refusal();
        assert!(["tokenizer_config.json", field, "<nowhere>"].iter().all(|word| refusal.contains(word)), "{refusal}");
    }
}

#[test]
fn a_vocabulary_that_says_two_things_and_other_models_are_refused_by_name() {
    let mut same_id = tokenizer_json();
    same_id["model"]["vocab"]["another"] = json!(257);
    let mut same_text = tokenizer_json();
    same_text["added_tokens"][0]["content"] = json!("the");
    let mut in_place_of_text = tokenizer_json();
    in_place_of_text["added_tokens"][1]["id"] = json!(258);
    let mut unigram = tokenizer_json();
    unigram["model"] = json!({"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.5]]});
    let mut word_piece = tokenizer_json();
    word_piece["model"] = json!({"type": "WordPiece", "unk_token": "[UNK]", "vocab": {"[UNK]": 0, "a": 1}});
    for (tokenizer, words) in [
        (same_id, ["another", "257"]),
        (same_text, ["the", "259"]),
        (in_place_of_text, ["<think>", "258"]),
        (unigram, ["model.type", "Unigram"]),
        (word_piece, ["model.type", "WordPiece"]),
    ] {
        let refusal = refusal_of(&tokenizer);
        let has_all = words.iter().all(|word| refusal.contains(word));
        assert!(has_all && refusal.starts_with("tokenizer.json"), "{words:?}: {refusal}");
    }
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
fn two_files_that_disagree_on_a_space_before_a_text_are_refused() {
    let with = |asked: Value, said: bool| {
        let checkpoint = Checkpoint::new("llama");
        let mut tokenizer = tokenizer_json();
        tokenizer["pre_tokenizer"] = json!({"type": "ByteLevel", "add_prefix_space": said, "trim_offsets": true,
            "use_regex": true});
        checkpoint.write("tokenizer.json", tokenizer.to_string());
        checkpoint.write("tokenizer_config.json", json!({"add_prefix_space": asked}).to_string());
        checkpoint.convert("q8_0").map(|_| ())
    };
    for said in [true, false] {
        with(json!(said), said).unwrap();
        with(Value::Null, said).unwrap();
        let refusal = with(json!(!said), said).unwrap_err();
        assert!(refusal.contains("tokenizer_config.json") && refusal.contains("add_prefix_space"), "{refusal}");
    }
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

fn rendered(templates: Value, file: Option<&str>) -> Result<String, String> {
    rendered_with(templates, file, None)
}

/// What `hi` is rendered to, or why there is no template.
fn rendered_with(templates: Value, file: Option<&str>, tools: Option<&[Value]>) -> Result<String, String> {
    let checkpoint = Checkpoint::new("llama");
    checkpoint.write("tokenizer_config.json", json!({"chat_template": templates}).to_string());
    file.into_iter().for_each(|template| checkpoint.write("chat_template.jinja", template));
    let gguf = GgufFile::open(&checkpoint.convert("q8_0").unwrap()).unwrap();
    let template = ChatTemplate::from_gguf(&gguf, &Tokenizer::from_gguf(&gguf).unwrap()).map_err(|e| e.to_string())?;
    template.render(&[json!({"role": "user", "content": "hi"})], Ending::LastMessage, tools).map_err(|e| e.to_string())
}

#[test]
fn where_tools_are_offered_the_template_for_them_is_taken() {
    let template = |name: &str, template: &str| json!({"name": name, "template": template});
    let (plain, with_tools) =
        ("plain {{ messages[0].content }}", "{{ tools[0].function.name }} {{ messages[0].content }}");
    let tools = [json!({"type": "function", "function": {"name": "look_up", "parameters": {}}})];
    for (templates, file, offered, alone) in [
        (json!([template("default", plain), template("tool_use", with_tools)]), None, "look_up hi", "plain hi"),
        // A file takes the place of all that the configuration has.
        (json!([template("tool_use", with_tools)]), Some("file {{ messages[0].content }}"), "file hi", "file hi"),
        (json!([template("default", plain), template("rag", with_tools)]), None, "plain hi", "plain hi"),
        (json!(plain), None, "plain hi", "plain hi"),
    ] {
        assert_eq!(rendered_with(templates.clone(), file, Some(&tools)).unwrap(), offered, "{templates}");
        assert_eq!(rendered_with(templates.clone(), file, None).unwrap(), alone, "{templates}");
    }
}

#[test]
fn templates_beside_the_default_have_files_of_their_own() {
    const FOLDER: &str = "additional_chat_templates";
    let checkpoint = Checkpoint::new("llama");
    checkpoint.write("tokenizer_config.json", json!({"chat_template": "not this"}).to_string());
    checkpoint.write("chat_template.jinja", "plain {{ messages[0].content }}");
    std::fs::create_dir(checkpoint.path().join(FOLDER)).unwrap();
    let tools = [json!({"type": "function", "function": {"name": "look_up", "parameters": {}}})];
    let render = |tools: Option<&[Value]>| {
        let gguf = GgufFile::open(&checkpoint.convert("q8_0").unwrap()).unwrap();
        let template = ChatTemplate::from_gguf(&gguf, &Tokenizer::from_gguf(&gguf).unwrap()).unwrap();
        template.render(&[json!({"role": "user", "content": "hi"})], Ending::LastMessage, tools).unwrap()
    };
    assert_eq!(render(Some(&tools)), "plain hi");
    // The checkpoint has changed then.
    checkpoint.write(&format!("{FOLDER}/tool_use.jinja"), "{{ tools[0].function.name }} {{ messages[0].content }}");
    checkpoint.write(&format!("{FOLDER}/notes.txt"), "no template");
    assert_eq!((render(Some(&tools)), render(None)), ("look_up hi".to_owned(), "plain hi".to_owned()));
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
    assert_eq!(rendered(named(&["tool_use", "rag", "default"]), None).unwrap(), "default hi");
    assert_eq!(rendered(named(&["tool_use", "default"]), Some("file")).unwrap(), "file");
    assert_eq!(rendered(named(&["rag"]), None).unwrap(), "rag hi");
    assert_eq!(rendered(json!("one"), None).unwrap(), "one");
    let refusal = rendered(named(&["tool_use", "rag"]), None).unwrap_err();
    assert!(refusal.contains("chat_template.rag, tokenizer.chat_template.tool_use"), "{refusal}");
    assert!(rendered(json!([]), None).unwrap_err().contains("no chat template"));
}
