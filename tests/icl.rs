//! In-context examples as requests use them: from files to the chosen examples and the prompt.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::post;
use axum::{Json, Router};
use lorry::config::{Config, Overrides};
use lorry::icl::{Chosen, Example, IclError, IclStores, MAX_K, OpenError, Select, Selection, TokenBudget};
use lorry::prompt::formats::{PromptFormats, Reader, Rendered};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::runtime::Runtime;

fn config(icl: &str) -> Config {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("lorry.toml");
    fs::write(&file, format!("[icl]\n{icl}")).unwrap();
    Config::load(Some(&file), &Overrides::default()).unwrap()
}

/// The stores of `dir`, with more keys of `[icl]`.
fn open(dir: &Path, more: &str) -> Result<IclStores, OpenError> {
    IclStores::open(&config(&format!("dir = {dir:?}\n{more}")).icl)
}

fn with_store(examples: Vec<Example>, more: &str) -> (TempDir, IclStores) {
    let dir = tempfile::tempdir().unwrap();
    let stores = open(dir.path(), more).unwrap();
    stores.put("s", examples).unwrap();
    (dir, stores)
}

fn examples(instructions: &[&str]) -> Vec<Example> {
    let example = |instruction: &&str| Example { instruction: instruction.to_string(), code: "pass".to_owned() };
    instructions.iter().map(example).collect()
}

fn selection(k: usize, select: Select) -> Selection {
    Selection { store: "s".to_owned(), k, select, seed: None, budget: None }
}

/// With all the room there is.
fn select(stores: &IclStores, selection: &Selection, instruction: &str) -> Result<Chosen, IclError> {
    stores.select(selection, instruction, &TokenBudget { max_prompt_tokens: usize::MAX, count: &|_| Ok(1) })
}

fn conala(file: &str) -> Option<Value> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared/data/conala").join(file);
    let Ok(text) = fs::read_to_string(&path) else {
        println!("skipped: {file} is not there");
        return None;
    };
    Some(serde_json::from_str(&text).unwrap())
}

fn conala_train() -> Option<Vec<Example>> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let train = conala("cmd_train.oracle_man.full.json")?;
    let pairs = train.as_array().unwrap().iter();
    Some(pairs.map(|pair| Example { instruction: text(&pair["nl"]), code: text(&pair["cmd"]) }).collect())
}

#[test]
fn the_papers_seeds_draw_the_papers_examples() {
    let (Some(train), Some(paper)) = (conala_train(), conala("icl_indices_paper_seeds.json")) else { return };
    let (_dir, stores) = with_store(train, "");
    for (seed, draws) in paper["seeds"].as_object().unwrap() {
        for (k, ids) in draws.as_object().unwrap() {
            let seed = Some(seed.parse().unwrap());
            let selection = Selection { seed, ..selection(k.parse().unwrap(), Select::Random) };
            let chosen = select(&stores, &selection, "anything").unwrap();
            assert_eq!(json!(chosen.ids), *ids, "seed {seed:?}, k {k}");
            assert_eq!(chosen.seed, seed);
        }
    }
}

#[test]
fn every_golden_prompt_of_the_paper_comes_out_byte_for_byte() {
    let (Some(train), Some(golden)) = (conala_train(), conala("golden_prompts.json")) else { return };
    let instruction = "divide the values with same keys of two dictionary `d1` and `d2`";
    let code = "{k: (float(d2[k]) / d1[k]) for k in d2}";
    let (_dir, stores) = with_store(train, "");
    let formats = PromptFormats::new(&BTreeMap::new()).unwrap();
    for golden in golden.as_array().unwrap() {
        let version = golden["version"].as_str().unwrap();
        let mode = golden["mode"].as_str().unwrap();
        let format = formats.get(if version.contains("revision") { "paper-rev" } else { "paper-v2" }).unwrap();
        if mode == "peft_train" {
            let pair = Example { instruction: instruction.to_owned(), code: code.to_owned() };
            let trained = format.training_text(&pair).unwrap();
            if let Some(text) = golden["text"].as_str() {
                assert_eq!(trained.prompt + &trained.response, text, "{version} {mode}");
            } else {
                assert_eq!(json!(trained.prompt), golden["prompt"], "{version} {mode}");
                assert_eq!(json!(trained.response + "<eos>"), golden["target"], "{version} {mode}");
            }
            continue;
        }
        let chosen = mode.strip_prefix("icl_").map(|k| {
            let selection =
                Selection { seed: golden["seed"].as_u64(), ..selection(k.parse().unwrap(), Select::Random) };
            select(&stores, &selection, instruction).unwrap()
        });
        let shots = chosen.as_ref().map(Chosen::examples).unwrap_or_default();
        let reader = if mode.starts_with("peft") { Reader::Adapter } else { Reader::Base };
        let rendered = format.render(instruction, &shots, reader).unwrap();
        assert_eq!(rendered, Rendered::Text(golden["prompt"].as_str().unwrap().to_owned()), "{version} {mode}");
    }
}

#[test]
fn the_stores_that_come_with_lorry_load_and_have_what_sixteen_shots_need() {
    let stores = open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("config/icl"), "").unwrap();
    let names: Vec<String> = stores.list().iter().map(|store| store.name().to_owned()).collect();
    assert_eq!(names, ["bash", "docstring", "python"]);
    for name in names {
        let selection = Selection { store: name.clone(), ..selection(16, Select::Fixed) };
        assert_eq!(select(&stores, &selection, "").unwrap().ids, Vec::from_iter(0..16), "{name}");
    }
    let sort = Selection { store: "python".to_owned(), ..selection(1, Select::Bm25) };
    let chosen = select(&stores, &sort, "sort a list of dicts by price").unwrap();
    assert!(chosen.examples()[0].code.starts_with("sorted("), "{:?}", chosen.examples());
}

#[test]
fn the_nearest_stands_last_or_first_as_configured() {
    let instructions = ["sort words", "read a file", "sort a list of words"];
    let ids = |more| {
        let (_dir, stores) = with_store(examples(&instructions), more);
        select(&stores, &selection(2, Select::Bm25), "how to sort a list").unwrap().ids
    };
    assert_eq!(ids(""), [0, 2]);
    assert_eq!(ids("nearest_last = false"), [2, 0]);
}

#[test]
fn a_budget_leaves_out_the_farthest_examples_and_those_drawn_last() {
    let (_dir, stores) = with_store(examples(&["a", "b", "b c", "b c d"]), "");
    let budget = TokenBudget { max_prompt_tokens: 100, count: &|examples| Ok(10 + 5 * examples.len()) };
    let near = Selection { budget: Some(12), ..selection(4, Select::Bm25) };
    assert_eq!(stores.select(&near, "b c d", &budget).unwrap().ids, [2, 3]);
    let drawn = selection(4, Select::Random);
    let all = select(&stores, &drawn, "").unwrap();
    let cut = stores.select(&Selection { budget: Some(12), ..drawn }, "", &budget).unwrap();
    assert_eq!(cut.ids, all.ids[..2]);
    assert_eq!(all.seed, Some(42));
}

#[test]
fn what_cannot_be_chosen_is_an_error_that_names_the_field_and_both_numbers() {
    let (_dir, stores) = with_store(examples(&["a", "b"]), "");
    let refusal = |selection: Selection| select(&stores, &selection, "a").unwrap_err();
    let unknown = refusal(Selection { store: "t".to_owned(), ..selection(1, Select::Fixed) });
    assert!(unknown.field() == Some("icl.store") && unknown.to_string().contains("there are: s"), "{unknown}");
    let too_many = refusal(selection(3, Select::Random));
    assert_eq!(too_many.field(), Some("icl.k"));
    assert_eq!(too_many.to_string(), "`icl.k` is 3, but the store `s` has only 2 examples");
    for k in [0, MAX_K + 1, usize::MAX] {
        assert!(matches!(refusal(selection(k, Select::Fixed)), IclError::K(refused) if refused == k));
    }
    let no_endpoint = refusal(selection(1, Select::Hybrid));
    assert!(no_endpoint.to_string().contains("icl.embedding_url"), "{no_endpoint}");

    let budget = TokenBudget { max_prompt_tokens: 14, count: &|examples| Ok(10 + 3 * examples.len()) };
    let too_long = stores.select(&selection(2, Select::Fixed), "a", &budget).unwrap_err().to_string();
    assert!(too_long.contains("2 examples") && too_long.contains("1 would fit"), "{too_long}");
}

#[test]
fn what_was_put_is_there_after_a_restart_and_what_was_deleted_is_not() {
    let (dir, stores) = with_store(examples(&["a\nb", "\"c\" é"]), "");
    let version = stores.get("s").unwrap().version().to_owned();
    stores.put("gone", examples(&["a"])).unwrap();
    stores.delete("gone").unwrap();
    // What a crash while writing leaves behind, and what is none of our business.
    fs::write(dir.path().join(".s8x2.part"), "{\"instr").unwrap();
    fs::write(dir.path().join("README.md"), "notes").unwrap();
    let reopened = open(dir.path(), "").unwrap();
    assert_eq!(reopened.list().len(), 1);
    assert_eq!(reopened.get("s").unwrap().version(), version);
    assert_eq!(reopened.get("s").unwrap().examples(), stores.get("s").unwrap().examples());
}

#[test]
fn a_request_keeps_the_version_it_began_with() {
    let (_dir, stores) = with_store(examples(&["old"]), "");
    let chosen = select(&stores, &selection(1, Select::Fixed), "").unwrap();
    stores.put("s", examples(&["new"])).unwrap();
    assert_eq!(chosen.examples()[0].instruction, "old");
    stores.delete("s").unwrap();
    assert_eq!(chosen.examples()[0].instruction, "old");
}

#[test]
fn writers_side_by_side_leave_the_file_that_is_served() {
    let (dir, stores) = with_store(examples(&["first"]), "");
    let writers = ["one", "two", "three", "four"];
    for _ in 0..50 {
        let together = Barrier::new(writers.len());
        std::thread::scope(|scope| {
            for writer in writers {
                let (stores, together) = (&stores, &together);
                scope.spawn(move || {
                    together.wait();
                    stores.put("s", examples(&[writer])).unwrap();
                });
            }
        });
        let served = stores.get("s").unwrap();
        assert_eq!(open(dir.path(), "").unwrap().get("s").unwrap().version(), served.version());
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_folder_that_is_missing_or_a_file_that_is_broken_stops_the_start_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let missing = open(&dir.path().join("nowhere"), "").unwrap_err().to_string();
    assert!(missing.contains("nowhere") && missing.contains("icl.dir"), "{missing}");
    for (name, content, reason) in [
        ("broken.jsonl", "{\"instruction\": \"a\", \"code\": \"b\"}\n{\"instruction\"", "line 2"),
        ("empty.jsonl", "\n", "1 to 10000 examples"),
        ("a b.jsonl", "{\"instruction\": \"a\", \"code\": \"b\"}", "cannot name a store"),
    ] {
        let path = dir.path().join(name);
        fs::write(&path, content).unwrap();
        let error = open(dir.path(), "").unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(reason), "{error}");
        fs::remove_file(path).unwrap();
    }
}

#[test]
fn without_a_folder_there_are_no_stores_and_none_can_be_put() {
    let stores = IclStores::open(&config("dir = \"\"").icl).unwrap();
    assert!(stores.list().is_empty());
    assert!(stores.put("s", examples(&["a"])).unwrap_err().to_string().contains("icl.dir"));
}

/// An embedding endpoint that knows colours: one axis each for red and blue. It counts the texts it embeds.
fn colour_endpoint(runtime: &Runtime) -> (SocketAddr, Arc<AtomicUsize>) {
    async fn embed(State(num_texts): State<Arc<AtomicUsize>>, Json(request): Json<Value>) -> Json<Value> {
        let texts = request["input"].as_array().unwrap();
        num_texts.fetch_add(texts.len(), Ordering::SeqCst);
        let vector = |text: &Value| {
            let has = |words: &[&str]| words.iter().any(|word| text.as_str().unwrap().contains(word));
            [f64::from(u8::from(has(&["red", "crimson"]))), f64::from(u8::from(has(&["blue", "navy"])))]
        };
        let data = texts.iter().enumerate().map(|(index, text)| json!({"index": index, "embedding": vector(text)}));
        // In another order than asked.
        Json(json!({"model": request["model"], "data": data.rev().collect::<Vec<_>>()}))
    }
    let num_texts = Arc::new(AtomicUsize::new(0));
    let routes = Router::new().route("/v1/embeddings", post(embed)).with_state(num_texts.clone());
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap();
    runtime.spawn(async move { axum::serve(listener, routes).await });
    (address, num_texts)
}

#[test]
fn embeddings_find_what_words_do_not_and_a_store_is_embedded_once() {
    let runtime = Runtime::new().unwrap();
    let (address, num_texts) = colour_endpoint(&runtime);
    let endpoint = format!("embedding_url = \"http://{address}/v1/embeddings\"\nembedding_model = \"colours\"");
    let instructions = ["a crimson shirt", "a navy shirt", "a navy hat"];
    let (_dir, stores) = with_store(examples(&instructions), &endpoint);
    let hybrid = selection(1, Select::Hybrid);
    assert_eq!(select(&stores, &selection(1, Select::Bm25), "a blue shirt").unwrap().ids, [0]);
    assert_eq!(select(&stores, &hybrid, "a blue shirt").unwrap().ids, [1]);
    assert_eq!(num_texts.load(Ordering::SeqCst), 3 + 1);
    select(&stores, &hybrid, "something red").unwrap();
    assert_eq!(num_texts.load(Ordering::SeqCst), 3 + 2);
    stores.put("s", examples(&["crimson"])).unwrap();
    select(&stores, &hybrid, "something red").unwrap();
    assert_eq!(num_texts.load(Ordering::SeqCst), 3 + 2 + 2);
}

/// An embedding endpoint that takes its time and then fails, until it is mended. It counts how often it is asked.
fn failing_endpoint(runtime: &Runtime) -> (SocketAddr, Arc<AtomicUsize>, Arc<AtomicBool>) {
    async fn embed(
        State((num_calls, is_mended)): State<(Arc<AtomicUsize>, Arc<AtomicBool>)>,
        Json(request): Json<Value>,
    ) -> Result<Json<Value>, StatusCode> {
        num_calls.fetch_add(1, Ordering::SeqCst);
        if is_mended.load(Ordering::SeqCst) {
            let texts = request["input"].as_array().unwrap().iter().enumerate();
            let data = texts.map(|(index, _)| json!({"index": index, "embedding": [1.0]}));
            return Ok(Json(json!({"data": data.collect::<Vec<_>>()})));
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
        Err(StatusCode::SERVICE_UNAVAILABLE)
    }
    let (num_calls, is_mended) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let routes = Router::new().route("/v1/embeddings", post(embed)).with_state((num_calls.clone(), is_mended.clone()));
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap();
    runtime.spawn(async move { axum::serve(listener, routes).await });
    (address, num_calls, is_mended)
}

#[test]
fn who_waits_for_embeddings_that_fail_does_not_ask_for_them_again_and_who_comes_later_does() {
    const REQUESTS: usize = 8;
    let runtime = Runtime::new().unwrap();
    let (address, num_calls, is_mended) = failing_endpoint(&runtime);
    let (_dir, stores) =
        with_store(examples(&["a", "b"]), &format!("embedding_url = \"http://{address}/v1/embeddings\""));
    let hybrid = selection(1, Select::Hybrid);
    let together = Barrier::new(REQUESTS);
    std::thread::scope(|scope| {
        let request = || {
            together.wait();
            select(&stores, &hybrid, "a").unwrap_err().to_string()
        };
        let requests: Vec<_> = (0..REQUESTS).map(|_| scope.spawn(request)).collect();
        for request in requests {
            assert_eq!(request.join().unwrap(), "the embedding endpoint failed: it answered with status 503");
        }
    });
    // One, unless a thread of this test was held up for a second.
    let of_all = num_calls.load(Ordering::SeqCst);
    assert!((1..=REQUESTS / 2).contains(&of_all), "{of_all} calls");
    select(&stores, &hybrid, "a").unwrap_err();
    assert_eq!(num_calls.load(Ordering::SeqCst), of_all + 1);
    is_mended.store(true, Ordering::SeqCst);
    assert_eq!(select(&stores, &hybrid, "a").unwrap().ids, [0]);
}

#[test]
fn an_embedding_endpoint_that_fails_is_said_so_and_not_got_around() {
    let runtime = Runtime::new().unwrap();
    let (address, _) = colour_endpoint(&runtime);
    let endpoint = format!("embedding_url = \"http://{address}/nowhere\"");
    let (_dir, stores) = with_store(examples(&["a"]), &endpoint);
    let error = select(&stores, &selection(1, Select::Hybrid), "a").unwrap_err();
    assert_eq!(error.field(), None);
    assert_eq!(error.to_string(), "the embedding endpoint failed: it answered with status 404");
}
