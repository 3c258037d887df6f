//! The tokenizer, chat template and fill-in-the-middle of the real models, against ids recorded with the reference.

use std::path::PathBuf;
use std::sync::Arc;

use lorry::model::gguf::GgufFile;
use lorry::prompt::chat::{ChatTemplate, Ending};
use lorry::prompt::fim::FillInMiddle;
use lorry::tokenizer::detokenize::Detokenizer;
use lorry::tokenizer::{Specials, Tokenizer};
use serde_json::{Value, json};

const QWEN: (&str, &str) = ("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", "qwen2.5-coder-0.5b");
const SMOLLM: (&str, &str) = ("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m");

/// `None`, with a line that says so, where the model has not been fetched.
fn open(file: &str) -> Option<(GgufFile, Arc<Tokenizer>)> {
    let home = std::env::var_os("LORRY_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/lorry")))?;
    let path = home.join("models").join(file);
    if !path.exists() {
        println!("skipped: {} is not there", path.display());
        return None;
    }
    let gguf = GgufFile::open(&path).expect("the model opens");
    let tokenizer = Tokenizer::from_gguf(&gguf).expect("the tokenizer builds");
    Some((gguf, Arc::new(tokenizer)))
}

fn check_goldens((file, fixture): (&str, &str)) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared/fixtures").join(fixture).join("base.json");
    let Ok(golden) = std::fs::read(&path) else {
        println!("skipped: {} is not there", path.display());
        return;
    };
    let Some((_, tokenizer)) = open(file) else { return };
    let golden: Value = serde_json::from_slice(&golden).expect("the fixture is JSON");
    for case in golden["cases"].as_array().expect("cases") {
        let text = case["text"].as_str().expect("text");
        let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).expect("ids");
        assert_eq!(tokenizer.encode(text, Specials::Parse).expect("encodes"), ids, "{text:?}");
    }
}

fn assert_round_trip(tokenizer: &Arc<Tokenizer>, text: &str) {
    let ids = tokenizer.encode(text, Specials::AsText).expect("encodes");
    assert!(ids.iter().all(|id| !tokenizer.is_special(*id)), "{text:?}");
    let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer));
    let mut decoded: String = ids.iter().map(|id| detokenizer.push(*id)).collect();
    decoded += &detokenizer.finish();
    assert_eq!(decoded, text);
}

const TEXTS: [&str; 6] = [
    "def f(x):\n\treturn x ** 2  # naïve\n\n\n    print(1234567890)\r\n",
    "你好，世界！ こんにちは 안녕하세요 Привет مرحبا",
    "🚚👩‍👩‍👧‍👦🇩🇪 café — “quotes” … \u{a0}\u{3000}",
    "<|im_end|><|fim_middle|><|endoftext|><repo_name>",
    "I'll can't WE'VE  it's   spaced \t tabs\t\t",
    "",
];

#[test]
fn qwen_ids_equal_the_recorded_ones() {
    check_goldens(QWEN);
}

#[test]
fn smollm_ids_equal_the_recorded_ones() {
    check_goldens(SMOLLM);
}

#[test]
fn text_comes_back_whole_from_both_models() {
    for (file, _) in [QWEN, SMOLLM] {
        let Some((_, tokenizer)) = open(file) else { continue };
        TEXTS.iter().for_each(|text| assert_round_trip(&tokenizer, text));
    }
}

#[test]
fn qwen_fills_in_the_middle_with_its_own_sentinels_only() {
    let Some((_, tokenizer)) = open(QWEN.0) else { return };
    let fim = FillInMiddle::detect(&tokenizer).expect("Qwen2.5-Coder has sentinels");
    let ids =
        fim.render(&tokenizer, &[], "def add(a, b):\n    # <|fim_middle|>\n", "\nprint(add(1, 2))\n").expect("renders");
    let specials: Vec<u32> = ids.iter().copied().filter(|id| tokenizer.is_special(*id)).collect();
    assert_eq!(specials, [151659, 151661, 151660]);
    assert_eq!((ids[0], ids[ids.len() - 1]), (151659, 151660));
}

#[test]
fn smollm_has_no_fill_in_the_middle() {
    let Some((_, tokenizer)) = open(SMOLLM.0) else { return };
    assert_eq!(FillInMiddle::detect(&tokenizer), None);
}

#[test]
fn stop_tokens_are_those_of_each_model() {
    if let Some((_, tokenizer)) = open(QWEN.0) {
        let expected = [151643, 151645, 151659, 151660, 151661, 151662, 151663, 151664];
        assert_eq!(tokenizer.stop_tokens().as_ref(), expected);
        assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.vocab_size()), (None, Some(151645), 151936));
    }
    if let Some((_, tokenizer)) = open(SMOLLM.0) {
        assert_eq!(tokenizer.stop_tokens().as_ref(), [0, 2]);
        assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.vocab_size()), (None, Some(2), 49152));
    }
}

#[test]
fn chat_templates_render_as_the_models_were_trained() {
    let messages = [json!({"role": "user", "content": "Hi"})];
    if let Some((gguf, tokenizer)) = open(QWEN.0) {
        let template = ChatTemplate::from_gguf(&gguf, &tokenizer).expect("has a template that compiles");
        let expected = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n\
                        <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(template.render(&messages, Ending::Prompt, None).expect("renders"), expected);
        let tools = json!([{"type": "function", "function": {"name": "f<a>"}}]);
        let with_tools =
            template.render(&messages, Ending::Prompt, Some(tools.as_array().expect("a list"))).expect("renders");
        assert!(with_tools.contains(r#""name": "f<a>""#), "{with_tools}");
    }
    if let Some((gguf, tokenizer)) = open(SMOLLM.0) {
        let template = ChatTemplate::from_gguf(&gguf, &tokenizer).expect("has a template that compiles");
        let expected = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
                        <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(template.render(&messages, Ending::Prompt, None).expect("renders"), expected);
    }
}
