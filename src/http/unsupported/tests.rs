use serde_json::json;

use super::*;

fn refused(body: Value, route: Route) -> Option<Value> {
    let fields = Fields::parse(body.to_string().as_bytes()).unwrap();
    let error = refuse_unsupported(&fields, route).err()?;
    Some(serde_json::to_value(error.into_envelope()).unwrap()["error"].clone())
}

/// Each with a value that asks for something, and one that asks for nothing.
fn cases() -> Vec<(&'static str, Value, Value)> {
    vec![
        ("structural_tag", json!({"a": 1}), json!({})),
        ("regex", json!("a+"), json!(null)),
        ("format", json!("json"), json!("")),
        ("functions", json!([{}]), json!([])),
        ("function_call", json!({"name": "f"}), json!("auto")),
        ("functions", json!([{}]), json!([])),
        ("function_call", json!({"name": "f"}), json!("none")),
        ("adapter_source", json!("s3"), json!("local")),
        ("merged_adapters", json!({"ids": ["a"]}), json!({})),
        ("lora_request", json!({"lora_name": "a"}), json!(null)),
        ("add_generation_prompt", json!(false), json!(true)),
        ("chat_template", json!("x"), json!("")),
        ("chat_template_kwargs", json!({"a": 1}), json!({})),
        ("prompt_template", json!("x"), json!(null)),
        ("min_tokens", json!(1), json!(0)),
        ("bad_words", json!(["a"]), json!([])),
        ("allowed_token_ids", json!([1]), json!(null)),
        ("truncate_prompt_tokens", json!(5), json!(null)),
        ("prompt_logprobs", json!(0), json!(null)),
        ("dry_multiplier", json!(0.8), json!(0.0)),
        ("xtc_probability", json!(0.5), json!(0)),
        ("mirostat", json!(2), json!(0)),
        ("typical_p", json!(0.9), json!(1)),
        ("tfs_z", json!(0.9), json!(1.0)),
        ("top_n_sigma", json!(1.0), json!(-1.0)),
        ("n_probs", json!(5), json!(0)),
        ("sampler_seq", json!("kp"), json!(null)),
        ("skip_special_tokens", json!(false), json!(true)),
        ("do_sample", json!(false), json!(true)),
        ("include_stop_str_in_output", json!(true), json!(false)),
        ("reasoning_effort", json!("high"), json!("none")),
        ("extra_body", json!({"top_k": 1}), json!({})),
        ("options", json!({"temperature": 0}), json!({})),
        ("input_prefix", json!("a"), json!("")),
        ("input_ids", json!([1]), json!([])),
        ("stop_regex", json!("a+"), json!("")),
        ("repetition_detection", json!({"max_pattern_size": 3}), json!(null)),
        ("logprob_token_ids", json!([1]), json!([])),
        ("thinking_token_budget", json!(64), json!(null)),
        ("reasoning_budget_tokens", json!(64), json!(-1)),
        ("grammar_lazy", json!(true), json!(false)),
        ("session_params", json!({"id": "x"}), json!({})),
        ("return_prompt_text", json!(true), json!(false)),
        ("shift", json!(true), json!(false)),
        ("character", json!("Assistant"), json!("")),
        ("num_return_sequences", json!(2), json!(1)),
        ("max_time", json!(250), json!(0)),
    ]
}

#[test]
fn what_would_change_the_text_is_refused_by_name_on_every_route_and_its_neutral_form_is_not() {
    for route in [Route::Completions, Route::Chat] {
        for (name, asking, neutral) in cases() {
            let error = refused(json!({name: asking}), route).unwrap_or_else(|| panic!("{name} {asking}"));
            assert_eq!(error["param"], name);
            assert!(error["message"].as_str().unwrap().starts_with(&format!("`{name}` is not served")), "{error}");
            assert_eq!(refused(json!({name: neutral}), route), None, "{name} {neutral}");
            assert_eq!(refused(json!({name: null}), route), None, "{name}");
        }
    }
}

#[test]
fn tools_are_of_chats() {
    for (name, asking) in [("tools", json!([{}])), ("tool_choice", json!("required"))] {
        assert_eq!(refused(json!({name: asking}), Route::Completions).unwrap()["param"], name);
        assert_eq!(refused(json!({name: asking}), Route::Chat), None, "{name}");
    }
}

#[test]
fn no_field_is_listed_twice() {
    let lists = TRUE_ALONE.iter().chain(&OF_ADAPTERS).map(|(name, _)| *name);
    let mut names: Vec<_> = UNSUPPORTED.iter().flat_map(|all| all.names.iter().copied()).chain(lists).collect();
    let num_names = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), num_names);
}

#[test]
fn what_cannot_change_the_text_is_accepted() {
    let body = json!({"user": "u", "metadata": {"a": "b"}, "store": true, "service_tier": "auto", "stream_options": {},
        "cache_prompt": false, "id_slot": 3, "priority": 1, "request_id": "x", "timings_per_token": true,
        "parallel_tool_calls": true, "safety_identifier": "s",
        "prompt_cache_key": "k", "dry_base": 1.75, "xtc_threshold": 0.1, "mirostat_tau": 5, "guided_decoding_backend": "x",
        "keep_alive": "5m", "n_keep": 4, "a_field_of_tomorrow": [1, 2]});
    for route in [Route::Completions, Route::Chat] {
        assert_eq!(refused(body.clone(), route), None);
    }
}

#[test]
fn what_one_interface_alone_has_is_refused_there_and_all_else_is_left_to_its_chat() {
    for (route, name, asking, neutral) in [
        (Route::Responses, "background", json!(true), json!(false)),
        (Route::Responses, "response_format", json!({"type": "json_object"}), json!({"type": "text"})),
        (Route::Messages, "thinking", json!({"type": "enabled"}), json!({"type": "adaptive"})),
        (Route::Messages, "mcp_servers", json!([{"url": "x"}]), json!([])),
        (Route::Ollama, "context", json!([1]), json!([])),
        (Route::LlamaCpp, "logprobs", json!(1), json!(false)),
        (Route::Responses, "prediction", json!({"type": "content", "content": "x"}), json!(null)),
        (Route::Messages, "prediction", json!({"type": "content", "content": "x"}), json!(null)),
        (Route::Ollama, "prediction", json!({"type": "content", "content": "x"}), json!(null)),
        (Route::LlamaCpp, "prediction", json!({"type": "content", "content": "x"}), json!(null)),
    ] {
        assert_eq!(refused(json!({name: asking}), route).unwrap()["param"], name);
        assert_eq!(refused(json!({name: neutral}), route), None, "{name}");
        assert_eq!(refused(json!({"mirostat": 2}), route), None);
    }
}

#[test]
fn some_fields_are_harmless_only_beside_others() {
    let param = |body| refused(body, Route::Chat).map(|error| error["param"].clone());
    assert_eq!(param(json!({"samplers": ["top_k"], "temperature": 0})), None);
    assert_eq!(param(json!({"repeat_last_n": 64, "repeat_penalty": 1.0})), None);
    assert_eq!(param(json!({"repeat_last_n": 64, "repeat_penalty": 1.1})), Some(json!("repeat_last_n")));
    assert_eq!(param(json!({"repeat_last_n": -1, "repeat_penalty": 1.1})), None);
    assert_eq!(param(json!({"penalize_nl": false, "repeat_penalty": 1.0})), None);
    assert_eq!(param(json!({"penalize_nl": false, "repeat_penalty": 1.1})), Some(json!("penalize_nl")));
    assert_eq!(param(json!({"penalize_nl": true, "repeat_penalty": 1.1})), None);
}

#[test]
fn fields_of_one_route_are_refused_on_the_other() {
    for (body, name) in
        [(json!({"suffix": "x"}), "suffix"), (json!({"echo": true}), "echo"), (json!({"prefix": "x"}), "prefix")]
    {
        assert_eq!(refused(body.clone(), Route::Completions), None);
        assert_eq!(refused(body, Route::Chat).unwrap()["param"], name);
    }
    let special = json!({"add_special_tokens": true});
    assert_eq!(refused(special.clone(), Route::Completions), None);
    assert!(refused(special, Route::Chat).is_some());
}
