//! What the catalogue says of models, against the files that are at hand.

use std::path::PathBuf;

use lorry::model::catalogue::{Chat, models};
use lorry::model::gguf::GgufFile;
use lorry::model::memory::Memory;
use lorry::prompt::chat::ChatTemplate;
use lorry::prompt::fim::FillInMiddle;
use lorry::tokenizer::Tokenizer;
use serde_json::Value;

#[test]
fn what_the_catalogue_says_of_a_model_is_what_its_file_says() {
    let home = std::env::var_os("LORRY_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/lorry")));
    for model in models() {
        let id = &model.id;
        let fetched = home.as_ref().and_then(|home| model.fetched(home)).filter(|path| path.is_file());
        let Some(path) = fetched else {
            println!("skipped: {id} has not been fetched");
            continue;
        };
        let file = GgufFile::open(&path).unwrap();
        let (said, spec) = (model.spec(), file.spec().unwrap());
        let sizes = |spec: &lorry::model::spec::ModelSpec| {
            let heads = (spec.num_heads, spec.num_kv_heads, spec.head_dim);
            (spec.architecture, spec.num_layers, spec.hidden_size, spec.intermediate_size, heads, spec.context_length)
        };
        assert_eq!(sizes(&said), sizes(&spec), "{id}");
        assert_eq!(said.vocab_size, spec.vocab_size, "{id}");
        assert_eq!(model.memory(), Memory::of_file(&file).unwrap(), "{id}");

        let tokenizer = Tokenizer::from_gguf(&file).unwrap();
        assert_eq!(model.fill_in_middle, FillInMiddle::detect(&tokenizer).is_some(), "{id}");
        let chat = match ChatTemplate::from_gguf(&file, &tokenizer) {
            Err(_) => Chat::None,
            Ok(template) if template.call_format().is_some() => Chat::Tools,
            Ok(_) => Chat::Plain,
        };
        assert_eq!(model.chat, chat, "{id}");
    }
}

/// Of models that have not been fetched, too: the templates of `templates/` have what those of their families have.
#[test]
fn what_the_catalogue_says_of_chats_is_what_templates_of_the_families_show() {
    let reference: Value = serde_json::from_str(include_str!("templates/reference.json")).unwrap();
    let of_family = |id: &str| {
        let family = id.split([':', '.']).next().unwrap_or(id);
        Some(match family {
            "qwen2" | "qwen3" => "hermes",
            "qwen3-coder" => "xml-calls",
            "deepseek-coder" => "deepseek-coder",
            "codellama" => "llama2",
            "codestral" => "mistral-v1",
            "granite3" => "granite",
            "codegemma" => "gemma",
            "phi4-mini" => "phi3",
            "smollm3" => "smollm3",
            "smollm2" => "chatml",
            _ => return None,
        })
    };
    for model in models() {
        let chat = match of_family(&model.id) {
            None => Chat::None,
            Some(name) => {
                let source = reference["templates"][name]["source"].as_str().unwrap();
                let template = ChatTemplate::new(source, String::new(), String::new()).unwrap();
                if template.call_format().is_some() { Chat::Tools } else { Chat::Plain }
            }
        };
        assert_eq!(model.chat, chat, "{}", model.id);
    }
}
