//! llama.cpp's routes: text with its timings.

use super::*;

const SENTINELS: [&str; 4] = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|end|>"];
const REPOSITORY: [&str; 6] =
    ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|end|>", "<|repo_name|>", "<|file_sep|>"];

async fn ask(server: &Server, path: &str, body: Value) -> (u16, String) {
    let response = server.request(Method::POST, path).body(body.to_string()).send().await.unwrap();
    (response.status().as_u16(), response.text().await.unwrap())
}

async fn reply(server: &Server, path: &str, body: Value) -> Value {
    let (status, reply) = ask(server, path, body).await;
    assert_eq!(status, 200, "{reply}");
    serde_json::from_str(&reply).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_infill_is_the_gap_of_a_completion_with_the_line_at_the_end_of_its_prefix() {
    let server = Server::start(&SENTINELS, Duration::ZERO).await;
    let body = json!({"id_slot": 0, "input_prefix": "x", "prompt": "y", "input_suffix": "s", "n_predict": 3,
        "temperature": 0, "t_max_prompt_ms": 500, "cache_prompt": true, "return_tokens": true});
    let filled = reply(&server, "/infill", body).await;
    assert_eq!((&filled["content"], &filled["tokens"]), (&json!("abc"), &json!([97, 98, 99])));
    assert_eq!(
        (&filled["stop"], &filled["stop_type"], &filled["truncated"]),
        (&json!(true), &json!("limit"), &json!(false))
    );
    assert_eq!((&filled["tokens_evaluated"], &filled["tokens_predicted"]), (&json!(3 + 3), &json!(3)));
    assert_eq!((&filled["model"], &filled["generation_settings"]["n_predict"]), (&json!(BASE), &json!(3)));
    assert_eq!(filled["prompt"], "<|fim_prefix|>xy<|fim_suffix|>s<|fim_middle|>");
    assert_eq!((&filled["has_new_line"], &filled["id_slot"]), (&json!(false), &json!(-1)));
    let timings = &filled["timings"];
    assert_eq!((&timings["prompt_n"], &timings["predicted_n"]), (&json!(6), &json!(3)));
    assert!(timings["prompt_ms"].as_f64().unwrap() > 0.0, "{timings}");

    let stopped = json!({"input_prefix": "x", "input_suffix": "", "temperature": 0, "stop": ["d"]});
    let stopped = reply(&server, "/infill", stopped).await;
    assert_eq!(
        (&stopped["content"], &stopped["stop_type"], &stopped["stopping_word"]),
        (&json!("abc"), &json!("word"), &json!("d"))
    );
    let named_otherwise = json!({"input_prefix": "x", "suffix": "s", "temperature": 0, "n_predict": 1});
    let filled = reply(&server, "/infill", named_otherwise).await;
    assert_eq!(filled["prompt"], "<|fim_prefix|>x<|fim_suffix|>s<|fim_middle|>");
    let ended = reply(&server, "/infill", json!({"input_prefix": "x", "temperature": 0})).await;
    assert_eq!(ended["stop_type"], "eos", "to the end where no length is given");
}

#[tokio::test(flavor = "multi_thread")]
async fn llama_vim_reads_what_it_asked_for_and_no_more() {
    let server = Server::start(&REPOSITORY, Duration::ZERO).await;
    let body = json!({"id_slot": 0, "input_prefix": "p", "input_suffix": "s", "prompt": "q", "n_predict": 4,
        "input_extra": [{"text": "t", "time": 1, "filename": "f"}], "stop": [], "n_indent": 0, "top_k": 40, "top_p": 0.90,
        "samplers": ["top_k", "top_p", "infill"], "stream": false, "cache_prompt": true, "t_max_prompt_ms": 500,
        "t_max_predict_ms": 1000, "response_fields": ["content", "timings/prompt_n", "timings/nothing", "truncated"]});
    let (status, text) = ask(&server, "/infill", body).await;
    assert_eq!(status, 200, "{text}");
    assert!(text.starts_with('{') && text.contains(r#""content":"abcd""#), "{text}");
    let keys = serde_json::from_str::<Value>(&text).unwrap();
    let keys: Vec<_> = keys.as_object().unwrap().keys().cloned().collect();
    assert_eq!(keys, ["content", "timings/prompt_n", "truncated"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_warm_up_leaves_the_other_files_in_the_cache() {
    let server = Server::start(&REPOSITORY, Duration::ZERO).await;
    let extra = json!([{"filename": "f", "text": "0123456789"}]);
    let warm_up = json!({"input_prefix": "", "input_suffix": "", "prompt": "", "input_extra": extra, "n_predict": 0,
        "samplers": [], "temperature": 0.0, "t_max_predict_ms": 1, "response_fields": [""]});
    assert_eq!(ask(&server, "/infill", warm_up).await, (200, "{}".to_owned()));
    let filled = json!({"input_prefix": "p", "input_extra": extra, "n_predict": 1});
    let filled = reply(&server, "/infill", filled).await;
    assert!(filled["tokens_cached"].as_u64().unwrap() >= 16, "{filled}");
    let num_tokens = filled["tokens_evaluated"].as_u64().unwrap();
    assert_eq!(num_tokens, 1 + 10 + 1 + 2 + 10 + 1 + 9 + 4, "a layout of the repository");

    let old = json!([{"text": "o".repeat(40)}, {"filename": "f", "text": "0123456789"}]);
    let cut = reply(&server, "/infill", json!({"input_prefix": "p", "input_extra": old, "n_predict": 4})).await;
    assert_eq!(cut["tokens_evaluated"], CONTEXT_LENGTH - 4, "the oldest goes first");
    let single = Server::start(&SENTINELS, Duration::ZERO).await;
    let filled = reply(&single, "/infill", json!({"input_prefix": "p", "input_extra": extra, "n_predict": 1})).await;
    assert_eq!(filled["tokens_evaluated"], 4, "a model of single files is given none");
}

#[tokio::test(flavor = "multi_thread")]
async fn several_choices_or_prompts_are_an_array() {
    let server = Server::start(&SENTINELS, Duration::ZERO).await;
    let body =
        json!({"input_prefix": "p", "n_cmpl": 3, "n_predict": 2, "temperature": 0, "response_fields": ["content"]});
    assert_eq!(reply(&server, "/infill", body.clone()).await, json!(vec![json!({"content": "ab"}); 3]));
    let mut absent = body.clone();
    (absent["n_cmpl"], absent["n"]) = (Value::Null, json!(2));
    assert_eq!(reply(&server, "/infill", absent).await, json!(vec![json!({"content": "ab"}); 2]));
    let mut refused = body;
    refused["n_cmpl"] = json!(0);
    assert!(ask(&server, "/infill", refused).await.1.contains(r#""param":"n_cmpl""#));
    let body =
        json!({"prompt": ["a", [98]], "max_tokens": 1, "temperature": 0, "response_fields": ["content", "index"]});
    let expected = json!([{"content": "b", "index": 0}, {"content": "c", "index": 1}]);
    assert_eq!(reply(&server, "/completion", body).await, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_event_has_its_content_and_the_last_one_the_timings() {
    let server = Server::quick().await;
    for length in ["n_predict", "max_tokens"] {
        let body = json!({"prompt": "w", length: 2, "temperature": 0, "stream": true});
        let (_, events) = ask(&server, "/completion", body).await;
        let data = events.split("\n\n").filter_map(|event| event.strip_prefix("data: "));
        let data: Vec<Value> = data.map(|data| serde_json::from_str(data).unwrap()).collect();
        let (last, parts) = data.split_last().unwrap();
        assert_eq!(parts.iter().map(|part| part["content"].as_str().unwrap()).collect::<String>(), "xy");
        assert!(parts.iter().all(|part| part["stop"] == false && part["tokens"] == json!([])));
        let counts = parts.iter().map(|part| (part["tokens_predicted"].as_u64(), part["tokens_evaluated"].as_u64()));
        assert!(counts.eq([(Some(1), Some(1)), (Some(2), Some(1))]), "{parts:?}");
        assert_eq!((&last["prompt"], &last["has_new_line"]), (&json!("w"), &json!(false)));
        assert_eq!(
            (&last["stop"], &last["content"], &last["timings"]["predicted_n"]),
            (&json!(true), &json!(""), &json!(2))
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_served_says_so() {
    let server = Server::quick().await;
    let (status, error) = ask(&server, "/infill", json!({"input_prefix": "a"})).await;
    assert_eq!(status, 501);
    assert_eq!(serde_json::from_str::<Value>(&error).unwrap()["error"]["type"], "not_supported_error");
    let server = Server::start(&SENTINELS, Duration::ZERO).await;
    for (path, body, param) in [
        ("/infill", json!({"input_extra": [{"text": 1}]}), "input_extra[0].text"),
        ("/infill", json!({"input_extra": ["x"]}), "input_extra[0]"),
        ("/infill", json!({"input_prefix": 1}), "input_prefix"),
        ("/infill", json!({"prompt": [1]}), "prompt"),
        ("/infill", json!({"n_cmpl": 9}), "n_cmpl"),
        ("/infill", json!({"n_cmpl": 2, "n": 1}), "n"),
        ("/infill", json!({"input_suffix": "a", "suffix": "b"}), "suffix"),
        ("/infill", json!({"samplers": ["top_p", "temperature"], "top_p": 0.5}), "samplers"),
        ("/infill", json!({"response_fields": "content"}), "response_fields"),
        ("/completion", json!({"prompt": "a", "mirostat": 2}), "mirostat"),
        ("/completion", json!({"prompt": "a", "logprobs": 1}), "logprobs"),
        ("/completion", json!({"prompt": ["a", "b"], "stream": true}), "prompt"),
        ("/completion", json!({}), "prompt"),
    ] {
        let (status, error) = ask(&server, path, body.clone()).await;
        assert_eq!(status, 400, "{body}: {error}");
        assert_eq!(serde_json::from_str::<Value>(&error).unwrap()["error"]["param"], param, "{body}");
    }
}
