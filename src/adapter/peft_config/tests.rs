use proptest::prelude::*;

use super::*;

const V_PROJ_3: &str = "model.layers.3.self_attn.v_proj";

fn lora(text: &str) -> Result<LoraConfig, AdapterError> {
    match PeftConfig::parse(text.as_bytes())? {
        PeftConfig::Lora(config) => Ok(config),
        other => panic!("{other:?}"),
    }
}

fn config(fields: &str) -> Result<LoraConfig, AdapterError> {
    lora(&format!(r#"{{"peft_type": "LORA", "target_modules": ["q_proj"]{fields}}}"#))
}

fn refusal(fields: &str) -> String {
    config(fields).unwrap_err().to_string()
}

#[test]
fn scale_is_alpha_over_rank_or_over_its_root() {
    assert_eq!(config("").unwrap().scale(V_PROJ_3).unwrap(), 1.0);
    assert_eq!(config(r#","r": 16, "lora_alpha": 32"#).unwrap().scale(V_PROJ_3).unwrap(), 2.0);
    assert_eq!(config(r#","r": 16, "lora_alpha": 32, "use_rslora": true"#).unwrap().scale(V_PROJ_3).unwrap(), 8.0);
}

#[test]
fn the_first_pattern_in_file_order_wins_and_matches_whole_components() {
    let c = config(
        r#","r": 4, "lora_alpha": 16, "alpha_pattern": {"self_attn.v_proj": 4},
           "rank_pattern": {"v_proj": 2, "layers.3.self_attn.v_proj": 8, "a_proj": 1, "roj": 1}"#,
    )
    .unwrap();
    assert_eq!(c.rank(V_PROJ_3).unwrap(), 2);
    assert_eq!(c.rank("model.layers.3.self_attn.q_proj").unwrap(), 4);
    assert_eq!(c.scale(V_PROJ_3).unwrap(), 2.0);
    let c = config(r#","rank_pattern": {"layers.3.self_attn.v_proj": 8, "a": 1, "v_proj": 2}"#).unwrap();
    assert_eq!((c.rank(V_PROJ_3).unwrap(), c.rank("model.layers.13.self_attn.v_proj").unwrap()), (8, 2));
}

#[test]
fn of_a_key_that_stands_there_twice_the_last_value_counts_at_the_first_place() {
    let c = config(
        r#","r": 2, "rank_pattern": {"v_proj": 5}, "rank_pattern": {"v_proj": 2, "self_attn.v_proj": 3, "v_proj": 4},
           "r": 16, "lora_alpha": 32"#,
    )
    .unwrap();
    assert_eq!((c.rank(V_PROJ_3).unwrap(), c.scale(V_PROJ_3).unwrap()), (4, 8.0));
    assert_eq!(c.rank("model.layers.3.self_attn.q_proj").unwrap(), 16);
}

#[test]
fn a_pattern_may_name_a_module_as_it_was_called_beside_images() {
    let v = "layers.3.self_attn.v_proj";
    for key in [
        format!("model.{v}"),
        format!("model.language_model.{v}"),
        format!("language_model.model.{v}"),
        format!("^model.language_model.{v}"),
        r"language_model.*\.v_proj".to_string(),
    ] {
        let key = key.replace('\\', r"\\");
        let c = config(&format!(r#","rank_pattern": {{"{key}": 2}}, "alpha_pattern": {{"{key}": 6}}"#)).unwrap();
        assert_eq!((c.rank(V_PROJ_3).unwrap(), c.scale(V_PROJ_3).unwrap()), (2, 3.0), "{key}");
        assert_eq!(c.rank("model.layers.13.self_attn.q_proj").unwrap(), 8, "{key}");
    }
}

#[test]
fn as_many_patterns_as_memory_is_lent_for_are_read() {
    let entries =
        |count: usize, key: &str| (0..count).map(|i| format!(r#""layers.{i}{key}": 4"#)).collect::<Vec<_>>().join(",");
    for (count, key, is_read) in
        [(2048, ".q_proj", true), (2049, ".q_proj", false), (128, ".*", true), (129, ".*", false)]
    {
        let parsed = config(&format!(r#","rank_pattern": {{{}}}"#, entries(count, key)));
        match parsed {
            Ok(_) => assert!(is_read, "{count} {key}"),
            Err(e) => assert!(!is_read && e.to_string().contains("rank_pattern"), "{count} {key}: {e}"),
        }
    }
}

#[test]
fn a_field_that_changes_the_arithmetic_is_refused_by_name() {
    for (name, value) in [
        ("fan_in_fan_out", "true"),
        ("modules_to_save", r#"["lm_head", "embed_tokens"]"#),
        ("modules_to_save", r#"["score"]"#),
        ("modules_to_save", "true"),
        ("use_dora", r#"true, "lora_bias": true"#),
        ("use_dora", r#"true, "target_parameters": ["mlp.gate.weight"]"#),
        ("lora_bias", r#"true, "target_parameters": ["mlp.gate.weight"]"#),
        ("target_parameters", r#""mlp.gate.weight""#),
        ("ensure_weight_tying", "true"),
        ("layer_replication", "[[0, 4]]"),
        ("trainable_token_indices", "[1]"),
        ("arrow_config", r#"{"top_k": 3}"#),
        ("arrow_config", "{}"),
        ("kasa_config", "{}"),
        ("monteclora_config", "{}"),
        ("use_bdlora", "{}"),
        ("velora_config", "{}"),
        ("field_of_the_future", "0.5"),
        ("bias", r#""all""#),
        ("init_lora_weights", r#""olora""#),
        ("init_lora_weights", r#""pissa_niter_4""#),
        ("task_type", r#""SEQ_CLS""#),
        ("r", "0"),
        ("r", "1025"),
        ("r", "8.5"),
        ("lora_alpha", "1e999"),
        ("lora_alpha", "1e300"),
        ("lora_alpha", "NaN"),
        ("lora_alpha", r#""16""#),
        ("rank_pattern", r#"{"q_proj": -1}"#),
        ("rank_pattern", r#"{"(q_proj": 1}"#),
        ("alpha_pattern", "[1]"),
        ("layers_to_transform", "[-1]"),
    ] {
        let parsed = config(&format!(r#","{name}": {value}"#));
        let refusal = match parsed.and_then(|c| c.scale(V_PROJ_3)) {
            Ok(_) => panic!("{name} = {value} was accepted"),
            Err(e) => e.to_string(),
        };
        assert!(refusal.contains(name), "{name} = {value}: {refusal}");
    }
}

#[test]
fn a_refusal_says_the_value_and_what_to_do() {
    for (field, value) in [
        ("bias", r#""all""#),
        ("init_lora_weights", r#""olora""#),
        ("field_of_the_future", "0.5"),
        ("arrow_config", r#"{"top_k":3}"#),
        ("fan_in_fan_out", "true"),
    ] {
        let refusal = refusal(&format!(r#","{field}": {value}"#));
        assert!(refusal.contains(&format!("{field}: {value} ")) && refusal.contains("merge"), "{refusal}");
    }
}

#[test]
fn defaults_and_fields_without_effect_are_accepted() {
    config(
        r#","use_dora": false, "modules_to_save": null, "loftq_config": {}, "layer_replication": [],
           "field_of_another_future": {}, "arrow_config": null, "kasa_config": null, "use_bdlora": null,
           "lora_dropout": 0.05, "megatron_core": "megatron.core", "qalora_group_size": 16, "revision": "main",
           "init_lora_weights": "gaussian", "field_of_the_future": false, "task_type": null, "layers_pattern": """#,
    )
    .unwrap();
}

#[test]
fn an_initialisation_that_leaves_the_base_as_it_is_has_no_effect() {
    for name in ["gaussian", "Gaussian", "eva", "orthogonal", "mica", "MiCA"] {
        config(&format!(r#","init_lora_weights": "{name}""#)).unwrap();
    }
}

#[test]
fn what_was_trained_of_the_base_itself_is_refused_with_what_to_do() {
    for field in [r#""modules_to_save": ["embed_tokens"]"#, r#""trainable_token_indices": {"embed_tokens": [5]}"#] {
        let refusal = config(&format!(",{field}")).unwrap_err().to_string();
        assert!(refusal.contains("merge the adapter into its base"), "{refusal}");
    }
    config(r#","trainable_token_indices": []"#).unwrap();
}

#[test]
fn a_refusal_quotes_the_beginning_of_what_is_too_long() {
    let long = "x".repeat(100_000);
    for fields in [
        format!(r#","init_lora_weights": "{long}""#),
        format!(r#","use_dora": "{long}""#),
        format!(r#","field_of_the_future": ["{long}"]"#),
        format!(r#","modules_to_save": ["{long}"]"#),
        format!(r#","{long}": 1e999"#),
        format!(r#","rank_pattern": {{"{long}": "{long}"}}"#),
        format!(r#","rank_pattern": "{long}""#),
    ] {
        let num_chars = refusal(&fields).chars().count();
        assert!(num_chars < 1500, "{num_chars}: {:.40}", fields);
    }
}

#[test]
fn another_method_is_refused_by_its_type_before_its_fields() {
    for text in [r#"{"block_size": 4, "peft_type": "LOHA"}"#, r#"{"peft_type": 3}"#, "{}"] {
        assert!(PeftConfig::parse(text.as_bytes()).unwrap_err().to_string().contains("peft_type"), "{text}");
    }
}

#[test]
fn layers_with_a_pattern_are_refused() {
    let refusal = lora(r#"{"peft_type": "LORA", "target_modules": ".*q_proj", "layers_to_transform": 1}"#).unwrap_err();
    assert!(refusal.to_string().contains("layers_to_transform"));
}

#[test]
fn a_head_saved_whole_is_known_by_its_field() {
    assert!(config(r#","modules_to_save": ["lm_head"]"#).unwrap().replaces_head);
    assert!(!config(r#","modules_to_save": []"#).unwrap().replaces_head);
}

fn adalora(fields: &str) -> Result<AdaLoraConfig, AdapterError> {
    let text = format!(r#"{{"peft_type": "ADALORA", "target_modules": ["q_proj", "v_proj"]{fields}}}"#);
    match PeftConfig::parse(text.as_bytes())? {
        PeftConfig::AdaLora(config) => Ok(config),
        other => panic!("{other:?}"),
    }
}

#[test]
fn adalora_keeps_of_its_first_rank_what_its_masks_say_and_is_divided_by_the_first() {
    let c = adalora(
        r#","r": 8, "init_r": 4, "target_r": 2, "lora_alpha": 32, "total_step": 10, "tinit": 1, "tfinal": 2, "deltaT": 1,
           "beta1": 0.85, "beta2": 0.85, "orth_reg_weight": 0.5, "bias": "none", "use_dora": false, "rank_pattern": {
             "model.layers.3.self_attn.v_proj.lora_E": [true, false, true, true],
             "model.language_model.layers.4.self_attn.v_proj.lora_E.default": [false, false, false, false]}"#,
    )
    .unwrap();
    assert_eq!((c.rank(V_PROJ_3), c.rank("model.layers.4.self_attn.v_proj")), (3, 0));
    assert_eq!(c.rank("model.layers.3.self_attn.q_proj"), 4);
    assert!((c.scale(3).unwrap() - 32.0 / 4.000_01).abs() < 1e-6);
    assert!(c.check_patterns([V_PROJ_3, "model.layers.4.self_attn.v_proj"].into_iter()).is_ok());
    let refusal = c.check_patterns([V_PROJ_3].into_iter()).unwrap_err().to_string();
    assert!(refusal.contains("rank_pattern") && refusal.contains("layers.4"), "{refusal}");
    // Where alpha is not positive, PEFT takes the rank that is left.
    assert!((adalora(r#","init_r": 4, "lora_alpha": 0"#).unwrap().scale(3).unwrap() - 3.0 / 4.000_01).abs() < 1e-6);
    assert_eq!(adalora("").unwrap().rank(V_PROJ_3), 12);
}

#[test]
fn a_field_that_changes_adalora_is_refused_by_name() {
    for (name, value) in [
        ("init_r", "0"),
        ("init_r", "-3"),
        ("lora_alpha", "1e300"),
        ("lora_alpha", r#""8""#),
        ("rank_pattern", r#"{"model.layers.3.self_attn.v_proj.lora_E": [true]}"#),
        ("rank_pattern", r#"{"model.layers.3.self_attn.v_proj": [true]}"#),
        ("rank_pattern", r#"{"q_proj": 3}"#),
        ("alpha_pattern", r#"{"q_proj": 3}"#),
        ("use_rslora", "true"),
        ("use_dora", "true"),
        ("lora_bias", "true"),
        ("bias", r#""all""#),
        ("fan_in_fan_out", "true"),
        ("modules_to_save", r#"["lm_head"]"#),
        ("target_parameters", r#"["mlp.gate.weight"]"#),
        ("target_modules", "3"),
    ] {
        let parsed = adalora(&format!(r#","{name}": {value}"#));
        let refusal = parsed.and_then(|c| c.scale(8)).unwrap_err().to_string();
        assert!(refusal.contains(name), "{name} = {value}: {refusal}");
    }
}

fn vera(fields: &str) -> Result<VeraConfig, AdapterError> {
    let text = format!(r#"{{"peft_type": "VERA", "target_modules": ["q_proj"]{fields}}}"#);
    match PeftConfig::parse(text.as_bytes())? {
        PeftConfig::Vera(config) => Ok(config),
        other => panic!("{other:?}"),
    }
}

#[test]
fn vera_has_one_rank_and_its_matrices_in_the_file() {
    assert_eq!(vera("").unwrap().rank, 256);
    let fields = r#","r": 9, "save_projection": true, "projection_prng_key": 5, "vera_dropout": 0.1, "d_initial": 0.2,
        "init_weights": true, "bias": "none", "fan_in_fan_out": false, "modules_to_save": null, "layers_to_transform": [1]"#;
    assert_eq!(vera(fields).unwrap().rank, 9);
    for (name, value) in [
        ("r", "0"),
        ("r", "2000"),
        ("save_projection", "false"),
        ("bias", r#""vera_only""#),
        ("fan_in_fan_out", "true"),
        ("modules_to_save", r#"["lm_head"]"#),
        ("rank_pattern", r#"{"q_proj": 2}"#),
        ("layers_to_transform", "[-1]"),
    ] {
        let refusal = vera(&format!(r#","{name}": {value}"#)).map(|_| ()).unwrap_err().to_string();
        assert!(refusal.contains(name), "{name} = {value}: {refusal}");
    }
}

fn ia3(fields: &str) -> Result<Ia3Config, AdapterError> {
    let text = format!(r#"{{"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"]{fields}}}"#);
    match PeftConfig::parse(text.as_bytes())? {
        PeftConfig::Ia3(config) => Ok(config),
        other => panic!("{other:?}"),
    }
}

#[test]
fn feedforward_modules_match_the_end_of_a_path_or_the_whole_of_it() {
    let path = "model.layers.3.mlp.down_proj";
    assert!(ia3(r#","feedforward_modules": ["down_proj"]"#).unwrap().is_feedforward(path).unwrap());
    assert!(ia3(r#","feedforward_modules": ["n_proj"]"#).unwrap().is_feedforward(path).unwrap());
    assert!(ia3(r#","feedforward_modules": ".*down_proj""#).unwrap().is_feedforward(path).unwrap());
    assert!(!ia3(r#","feedforward_modules": "down_proj""#).unwrap().is_feedforward(path).unwrap());
    assert!(!ia3("").unwrap().is_feedforward(path).unwrap());
    // Within a model that sees images too.
    for modules in [r#"["language_model.layers.3.mlp.down_proj"]"#, r#""language_model\\..*down_proj""#] {
        assert!(
            ia3(&format!(r#","feedforward_modules": {modules}"#)).unwrap().is_feedforward(path).unwrap(),
            "{modules}"
        );
    }
}

#[test]
fn a_field_that_changes_ia3_is_refused_by_name() {
    ia3(r#","init_ia3_weights": true, "fan_in_fan_out": false, "modules_to_save": null, "task_type": "CAUSAL_LM""#)
        .unwrap();
    for (name, value) in [
        ("fan_in_fan_out", "true"),
        ("modules_to_save", r#"["lm_head"]"#),
        ("layers_to_transform", "[1]"),
        ("r", "8"),
        ("use_dora", "true"),
        ("feedforward_modules", "3"),
        ("feedforward_modules", r#""(""#),
        ("exclude_modules", "3"),
        ("task_type", r#""SEQ_2_SEQ_LM""#),
    ] {
        let refusal = ia3(&format!(r#","{name}": {value}"#)).map(|_| ()).unwrap_err().to_string();
        assert!(refusal.contains(name), "{name} = {value}: {refusal}");
    }
}

fn prelude(kind: &str, fields: &str) -> Result<PreludeConfig, AdapterError> {
    match PeftConfig::parse(format!(r#"{{"peft_type": "{kind}"{fields}}}"#).as_bytes())? {
        PeftConfig::Prelude(config) => Ok(config),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_made_a_prompt_in_training_has_no_effect() {
    for (kind, fields) in [
        (
            "PROMPT_TUNING",
            r#","prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x", "tokenizer_kwargs": {"a": 1}"#,
        ),
        ("P_TUNING", r#","encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 9, "encoder_dropout": 0.1"#),
        ("PREFIX_TUNING", r#","prefix_projection": true, "encoder_hidden_size": 128, "init_weights": null"#),
        ("PREFIX_TUNING", r#","init_weights": "zero""#),
    ] {
        let config = prelude(kind, &format!(r#","num_virtual_tokens": 20, "num_transformer_submodules": 1{fields}"#));
        assert_eq!(config.unwrap().num_virtual_tokens, 20);
    }
}

#[test]
fn a_field_that_changes_a_prompt_is_refused_by_name() {
    for kind in ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"] {
        assert!(prelude(kind, "").unwrap_err().to_string().contains("num_virtual_tokens"));
        for (name, value) in [
            ("num_virtual_tokens", "0"),
            ("num_virtual_tokens", "1025"),
            ("num_virtual_tokens", "-1"),
            ("num_virtual_tokens", "1e3"),
            ("num_transformer_submodules", "2"),
            ("token_dim", r#""wide""#),
            ("modules_to_save", r#"["lm_head"]"#),
            ("target_modules", r#"["q_proj"]"#),
            ("init_weights", r#""x""#),
        ] {
            let number = if name == "num_virtual_tokens" { "" } else { r#","num_virtual_tokens": 4"# };
            let refusal = prelude(kind, &format!(r#"{number},"{name}": {value}"#)).unwrap_err().to_string();
            assert!(refusal.contains(name), "{kind} {name} = {value}: {refusal}");
        }
    }
    assert!(prelude("PROMPT_TUNING", r#","num_virtual_tokens": 4, "prefix_projection": true"#).is_err());
}

#[test]
fn text_that_is_no_object_is_refused_naming_the_file() {
    for text in ["", "{ r: 8,", "[]", "null", "\u{0}", "{}{}"] {
        assert!(PeftConfig::parse(text.as_bytes()).unwrap_err().to_string().contains(FILE), "{text:?}");
    }
    assert!(refusal(r#","r": 1e999"#).contains('r'));
}

proptest! {
    #[test]
    fn damaged_text_never_panics(at in any::<prop::sample::Index>(), byte: u8, cut in any::<prop::sample::Index>()) {
        let mut text = br#"{"peft_type": "LORA", "r": 8, "rank_pattern": {"q_proj": 2}, "target_modules": ["q_proj"],
            "lora_alpha": 16, "layers_to_transform": [0, 1], "layers_pattern": "layers"}"#.to_vec();
        let at = at.index(text.len());
        text[at] = byte;
        if let Ok(PeftConfig::Lora(config)) = PeftConfig::parse(&text) {
            prop_assert!((1..=1024).contains(&config.rank(V_PROJ_3).unwrap()));
        }
        let _ = PeftConfig::parse(&text[..cut.index(text.len())]);
    }
}
