//! The fields that other servers and OpenAI's, Anthropic's and Mistral's own interfaces read of a request, gone through one
//! by one: each is in the document of the route, which is to say served or refused by its name, or changes no text.

use std::collections::BTreeSet;

use super::contract::documented;
use super::*;

/// An interface, the path on which its clients ask, and the fields that its source or reference has.
const REVIEWED: [(&str, &str, &str); 17] = [
    (
        "OpenAI",
        "/v1/chat/completions",
        "audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens max_tokens messages \
         metadata modalities model n parallel_tool_calls prediction presence_penalty prompt_cache_key \
         prompt_cache_retention reasoning_effort response_format safety_identifier seed service_tier stop store stream \
         stream_options temperature tool_choice tools top_logprobs top_p user verbosity web_search_options",
    ),
    (
        "OpenAI",
        "/v1/completions",
        "best_of echo frequency_penalty logit_bias logprobs max_tokens model n presence_penalty prompt seed stop stream \
         stream_options suffix temperature top_p user",
    ),
    (
        "OpenAI",
        "/v1/responses",
        "background context_management conversation include input instructions max_output_tokens max_tool_calls metadata \
         model parallel_tool_calls previous_response_id prompt prompt_cache_key prompt_cache_retention reasoning \
         safety_identifier service_tier store stream stream_options temperature text tool_choice tools top_logprobs top_p \
         truncation user client_metadata",
    ),
    (
        "Anthropic",
        "/v1/messages",
        "cache_control container context_management inference_geo max_tokens mcp_servers messages metadata model \
         output_config output_format service_tier speed stop_sequences stream system temperature thinking tool_choice tools \
         top_k top_p",
    ),
    (
        "Mistral",
        "/v1/chat/completions",
        "frequency_penalty guardrails max_tokens messages metadata model n parallel_tool_calls prediction presence_penalty \
         prompt_mode random_seed reasoning_effort response_format safe_prompt stop stream temperature tool_choice tools top_p",
    ),
    (
        "Mistral",
        "/v1/fim/completions",
        "max_tokens metadata min_tokens model prompt random_seed stop stream suffix temperature top_p",
    ),
    (
        "vLLM",
        "/v1/chat/completions",
        "add_generation_prompt add_special_tokens allowed_token_ids bad_words best_of cache_salt chat_template \
         chat_template_kwargs continue_final_message documents ec_transfer_params echo guided_choice guided_decoding_backend \
         guided_grammar guided_json guided_regex guided_whitespace_pattern ignore_eos include_reasoning \
         include_stop_str_in_output kv_transfer_params length_penalty logits_processors logprob_token_ids media_io_kwargs \
         min_p min_tokens mm_processor_kwargs priority prompt_logprobs reasoning_effort repetition_detection \
         repetition_penalty request_id return_prompt_text return_token_ids return_token_offsets \
         return_tokens_as_token_ids session_id skip_special_tokens spaces_between_special_tokens stop_token_ids \
         stream_interval structural_tag structured_outputs thinking_token_budget top_k truncate_prompt_tokens \
         truncation_side use_beam_search vllm_xargs watermarking",
    ),
    (
        "vLLM",
        "/v1/completions",
        "add_special_tokens allowed_token_ids bad_words cache_salt early_stopping guided_json ignore_eos \
         include_stop_str_in_output kv_transfer_params length_penalty logits_processors min_p min_tokens priority \
         prompt_embeds prompt_logprobs repetition_penalty request_id response_format return_token_ids \
         return_tokens_as_token_ids skip_special_tokens spaces_between_special_tokens stop_token_ids structured_outputs \
         top_k truncate_prompt_tokens use_beam_search vllm_xargs",
    ),
    (
        "SGLang",
        "/v1/chat/completions",
        "bootstrap_host bootstrap_port bootstrap_room cache_salt chat_template_kwargs continue_final_message \
         custom_logit_processor custom_params ebnf extra_key ignore_eos input_ids lora_path min_p min_tokens no_stop_trim \
         priority reasoning_effort regex repetition_penalty return_hidden_states return_meta_info \
         return_prompt_token_ids return_routed_experts rid separate_reasoning session_id session_params \
         skip_special_tokens stop_regex stop_token_ids stream_reasoning top_k",
    ),
    ("SGLang", "/v1/completions", "json_schema ebnf regex stop_regex session_params no_stop_trim return_hidden_states"),
    (
        "llama.cpp",
        "/completion",
        "adaptive_decay adaptive_target backend_sampling cache_prompt dry_allowed_length dry_base dry_multiplier \
         dry_penalty_last_n dry_sequence_breakers dynatemp_exponent dynatemp_range frequency_penalty grammar grammar_lazy \
         grammar_triggers id_slot ignore_eos json_schema logit_bias lora min_keep min_p mirostat mirostat_eta mirostat_tau \
         n_cache_reuse n_cmpl n_discard n_indent n_keep n_predict n_probs post_sampling_probs presence_penalty \
         preserved_tokens prompt reasoning_budget_tokens reasoning_format repeat_last_n repeat_penalty response_fields \
         return_progress return_tokens samplers seed stop stream t_max_predict_ms temperature thinking_forced_open \
         timings_per_token top_k top_n_sigma top_p typical_p xtc_probability xtc_threshold",
    ),
    ("llama.cpp", "/infill", "input_extra input_prefix input_suffix n_cmpl n_indent n_predict prompt samplers"),
    (
        "Ollama",
        "/api/generate",
        "context format images keep_alive logprobs model options prompt raw shift stream suffix system template think \
         top_logprobs truncate",
    ),
    (
        "Ollama",
        "/api/chat",
        "format keep_alive logprobs messages model options shift stream think tools top_logprobs truncate",
    ),
    (
        "TGI and LoRAX",
        "/v1/completions",
        "adapter_id adapter_parameters adapter_source api_token apply_chat_template best_of decoder_input_details details \
         do_sample frequency_penalty grammar inputs max_new_tokens merged_adapters parameters repetition_penalty \
         return_full_text return_k_alternatives schema seed stop temperature top_k top_n_tokens top_p truncate typical_p \
         watermark",
    ),
    ("TGI and LoRAX", "/v1/chat/completions", "guideline tool_prompt adapter_id adapter_source merged_adapters"),
    (
        "text-generation-webui",
        "/v1/chat/completions",
        "add_bos_token auto_max_new_tokens ban_eos_token character chat_template_str continue_ custom_system_message \
         custom_token_bans do_sample dry_multiplier dynamic_temperature early_stopping encoder_repetition_penalty \
         epsilon_cutoff eta_cutoff grammar_string guidance_scale instruction_template instruction_template_str \
         mirostat_mode negative_prompt no_repeat_ngram_size penalty_alpha preset repetition_penalty_range sampler_priority \
         skip_special_tokens smoothing_curve smoothing_factor temperature_last tfs top_a top_n_sigma truncation_length \
         typical_p xtc_probability xtc_threshold",
    ),
];

/// What cannot change the text, and why not.
const HARMLESS: [(&str, &str); 8] = [
    (
        "whom and what a request is for",
        "metadata client_metadata prompt_cache_key prompt_cache_retention safety_identifier \
        service_tier store priority request_id rid session_id extra_key api_token inference_geo speed",
    ),
    (
        "where it runs and what is kept of it",
        "cache_control cache_prompt cache_salt keep_alive id_slot n_cache_reuse \
        backend_sampling kv_transfer_params ec_transfer_params bootstrap_host bootstrap_port bootstrap_room",
    ),
    (
        "of contexts that are shifted or cut, which these are not",
        "n_keep n_discard truncation_side auto_max_new_tokens",
    ),
    ("of reasoning, of which there is none", "include_reasoning separate_reasoning stream_reasoning reasoning_format"),
    ("of images and sound, which are refused where they are", "media_io_kwargs mm_processor_kwargs"),
    (
        "of samplers that are refused when they are switched on",
        "adaptive_decay custom_params dry_allowed_length dry_base \
        dry_penalty_last_n dry_sequence_breakers dynatemp_exponent mirostat_eta mirostat_tau negative_prompt \
        smoothing_curve xtc_threshold",
    ),
    (
        "how and how often the reply tells of itself",
        "details return_progress return_token_offsets stream_interval \
        timings_per_token",
    ),
    ("of special tokens, which have no text", "preserved_tokens spaces_between_special_tokens guided_decoding_backend"),
];

#[tokio::test(flavor = "multi_thread")]
async fn every_field_of_other_servers_is_served_refused_or_changes_no_text() {
    let server = Server::able().await;
    let operations = documented(&server).await;
    let harmless: BTreeSet<&str> = HARMLESS.iter().flat_map(|(_, names)| names.split_whitespace()).collect();
    let (mut dropped, mut needless) = (Vec::new(), harmless.clone());
    for (name, path, fields) in REVIEWED {
        let operation = operations.iter().find(|operation| operation.path == path && operation.method == Method::POST);
        let known = &operation.unwrap_or_else(|| panic!("{path}")).properties;
        for field in fields.split_whitespace() {
            needless.remove(field);
            if !known.contains_key(field) && !harmless.contains(field) {
                dropped.push(format!("{field} of {name} on {path}"));
            }
        }
    }
    assert!(dropped.is_empty(), "neither known nor harmless: {dropped:#?}");
    assert!(needless.is_empty(), "of no interface: {needless:?}");
}
