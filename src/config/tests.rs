use super::*;

fn load(file: Option<&str>, environment: &[(&str, &str)], overrides: &Overrides) -> Result<Config, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lorry.toml");
    if let Some(text) = file {
        std::fs::write(&path, text).unwrap();
    }
    let environment = environment.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    Config::load_layers(file.map(|_| path.as_path()), Some(environment), overrides).map_err(|e| e.to_string())
}

#[test]
fn defaults_are_complete_and_valid() {
    let config = load(None, &[], &Overrides::default()).unwrap();
    assert_eq!(config.model.id, "qwen2.5-coder:0.5b");
    assert_eq!(config.server.max_body_bytes, 16 << 20);
    assert_eq!(config.adapters.dir(), Some(Path::new("adapters")));
}

#[test]
fn a_device_is_named_or_refused() {
    let device = |name: &str| {
        let overrides = Overrides { device: Some(name.to_owned()), ..Overrides::default() };
        load(None, &[], &overrides).map(|config| config.engine.device)
    };
    for (name, choice) in [
        ("auto", DeviceChoice::Auto),
        ("cpu", DeviceChoice::Cpu),
        ("cuda", DeviceChoice::Cuda(0)),
        ("cuda:3", DeviceChoice::Cuda(3)),
    ] {
        assert_eq!(device(name), Ok(choice));
    }
    for name in ["gpu", "cuda:", "cuda:-1", "cpu:0", ""] {
        let refusal = device(name).unwrap_err();
        assert!(refusal.contains(&format!("{name:?}")) && refusal.contains("cuda:N"), "{refusal}");
    }
}

#[test]
fn a_type_of_keys_and_values_is_named_or_refused() {
    let kv_type = |name: &str| {
        load(None, &[("LORRY__ENGINE__KV_CACHE_TYPE", name)], &Overrides::default())
            .map(|config| config.engine.kv_cache_type)
    };
    assert_eq!(load(None, &[], &Overrides::default()).unwrap().engine.kv_cache_type, KvType::F16);
    assert_eq!([kv_type("f16"), kv_type("q8_0")], [Ok(KvType::F16), Ok(KvType::Q8_0)]);
    for name in ["q8", "Q8_0", "q4_0", "bf16", "fp8"] {
        let refusal = kv_type(name).unwrap_err();
        assert!(
            ["kv_cache_type", &format!("{name:?}"), "(f16, q8_0)"].iter().all(|part| refusal.contains(part)),
            "{refusal}"
        );
    }
}

#[test]
fn a_later_layer_wins_over_an_earlier_one() {
    let file = "[server]\nport = 1\nhost = \"file\"\n[model]\nid = \"file\"\n[engine]\nthreads = 7";
    let environment = [("LORRY__SERVER__PORT", "2"), ("LORRY__MODEL__ID", "1.0"), ("LORRY__ADAPTERS__DIR", "")];
    let overrides = Overrides { port: Some(3), ..Overrides::default() };
    let config = load(Some(file), &environment, &overrides).unwrap();
    assert_eq!(config.server.port, 3);
    assert_eq!(config.model.id, "1.0");
    assert_eq!(config.server.host, "file");
    assert_eq!(config.engine.threads, 7);
    assert_eq!(config.engine.max_sequences, 64);
    assert_eq!(config.adapters.dir(), None);
}

#[test]
fn a_prompt_format_keeps_its_name_and_its_white_space() {
    let file = "[prompt_formats.My-Format_2]\ntemplate = \"\"\"\n  {{ instruction }}\n\"\"\"";
    let config = load(Some(file), &[], &Overrides::default()).unwrap();
    assert_eq!(config.prompt_formats["My-Format_2"].template, "  {{ instruction }}\n");
    assert_eq!(load(None, &[], &Overrides::default()).unwrap().prompt_formats.len(), 0);
}

#[test]
fn an_embedding_endpoint_must_be_a_url() {
    let error = load(Some("[icl]\nembedding_url = \"localhost:8081\""), &[], &Overrides::default()).unwrap_err();
    assert!(error.contains("icl.embedding_url"), "{error}");
    assert!(load(Some("[icl]\nembedding_url = \"http://localhost:8081\""), &[], &Overrides::default()).is_ok());
}

#[test]
fn every_override_reaches_its_key() {
    let overrides = Overrides {
        model: Some("m".into()),
        adapters: Some("a".into()),
        host: Some("h".into()),
        port: Some(9),
        device: Some("cpu".into()),
    };
    let config = load(None, &[], &overrides).unwrap();
    assert_eq!(config.model.id, "m");
    assert_eq!(config.adapters.dir(), Some(Path::new("a")));
    assert_eq!((config.server.host.as_str(), config.server.port), ("h", 9));
    assert_eq!(config.engine.device, DeviceChoice::Cpu);
}

#[test]
fn an_unknown_key_is_refused_with_its_name_and_source() {
    let error = load(Some("[server]\nprot = 1"), &[], &Overrides::default()).unwrap_err();
    assert!(error.contains("`prot`") && error.contains("`server`") && error.contains("lorry.toml"), "{error}");
    let error = load(None, &[("LORRY__ENGIN__THREADS", "1")], &Overrides::default()).unwrap_err();
    assert!(error.contains("`engin`") && error.contains("environment"), "{error}");
}

#[test]
fn a_value_of_the_wrong_type_is_refused_with_its_key_and_source() {
    let error = load(Some("[server]\ncors = \"maybe\""), &[], &Overrides::default()).unwrap_err();
    assert!(error.contains("server.cors") && error.contains("lorry.toml"), "{error}");
    let error = load(None, &[("LORRY__SERVER__PORT", "70000")], &Overrides::default()).unwrap_err();
    assert!(error.contains("server.port") && error.contains("environment"), "{error}");
    let error = load(None, &[("LORRY__ENGINE__THREADS", "-1")], &Overrides::default()).unwrap_err();
    assert!(error.contains("engine.threads"), "{error}");
}

#[test]
fn a_value_out_of_range_is_refused_with_its_key_and_source() {
    let error = load(Some("[engine]\nmax_sequences = 0"), &[], &Overrides::default()).unwrap_err();
    assert!(error.contains("engine.max_sequences must be at least 1") && error.contains("lorry.toml"), "{error}");
    let error = load(Some("[server]\nheader_timeout_seconds = 0"), &[], &Overrides::default()).unwrap_err();
    assert!(error.contains("server.header_timeout_seconds must be at least 1"), "{error}");
    for (section, key) in [
        ("server", "header_timeout_seconds"),
        ("server", "body_timeout_seconds"),
        ("server", "keep_alive_seconds"),
        ("server", "write_timeout_seconds"),
        ("server", "sse_keep_alive_seconds"),
        ("server", "max_request_seconds"),
        ("server", "max_connections"),
        ("adapters", "max_wait_seconds"),
        ("adapters", "min_residency_seconds"),
        ("adapters", "rescan_seconds"),
        ("engine", "max_queued"),
        ("experiments", "max_queued"),
    ] {
        let set = |value: i64| load(Some(&format!("[{section}]\n{key} = {value}")), &[], &Overrides::default());
        for value in [i64::MAX, i64::from(u32::MAX)] {
            let error = set(value).unwrap_err();
            assert!(error.contains(&format!("{section}.{key} must be at most ")), "{error}");
        }
        assert!(set(86_400).is_ok(), "{key}");
    }
    for (key, most) in [
        ("device_adapters_mib", 1 << 40),
        ("threads", 1024),
        ("max_batch_rows", 65_536),
        ("max_sequences", 65_536),
        ("kv_cache_mib", 1 << 40),
        ("context_length", 1 << 24),
        ("max_draft_tokens", 65_536),
    ] {
        let set = |value: i64| load(Some(&format!("[engine]\n{key} = {value}")), &[], &Overrides::default());
        assert!(set(most).is_ok(), "{key}");
        let error = set(most + 1).unwrap_err();
        assert!(error.contains(&format!("engine.{key} must be at most {most}, not {}", most + 1)), "{error}");
    }
    let error = load(Some("[server]\nmax_body_bytes_in_flight = 9"), &[], &Overrides::default()).unwrap_err();
    assert!(error.contains("server.max_body_bytes_in_flight must be at least server.max_body_bytes"), "{error}");
    let error = load(None, &[("LORRY__GENERATION__FIM_TEMPERATURE", "NaN")], &Overrides::default()).unwrap_err();
    assert!(error.contains("generation.fim_temperature"), "{error}");
    let overrides = Overrides { model: Some(String::new()), ..Overrides::default() };
    let error = load(None, &[], &overrides).unwrap_err();
    assert!(error.contains("model.id must not be empty") && error.contains("command line"), "{error}");
}

#[test]
fn keys_come_from_a_file_and_the_admin_key_also_from_the_environment() {
    let file = "[server]\nadmin_key = 'a'\n[[server.keys]]\nname = 'team'\nkey = 'k'\nadapters = ['conala', 'team-*']";
    let config = load(Some(file), &[("LORRY__SERVER__ADMIN_KEY", "1234")], &Overrides::default()).unwrap();
    assert!(config.server.admin_key.matches("1234") && config.server.keys[0].key.matches("k"));
    assert_eq!(config.server.keys[0].adapters, ["conala", "team-*"]);
    let defaults = load(None, &[], &Overrides::default()).unwrap().server;
    assert!(defaults.admin_key.is_empty() && defaults.keys.is_empty());
}

#[test]
fn a_key_that_says_nothing_clashes_or_has_a_bad_pattern_is_refused_by_its_place() {
    let key = |name: &str, key: &str, pattern: &str| {
        format!("[[server.keys]]\nname = '{name}'\nkey = '{key}'\nadapters = ['{pattern}']\n")
    };
    for (keys, word) in [
        (key("a", "", "*"), "server.keys[0]"),
        (key("", "a", "*"), "server.keys[0]"),
        (key("a", "1", "*") + &key("a", "2", "*"), "server.keys[1].name"),
        (key("a", "1", "*") + &key("b", "1", "*"), "server.keys[1].key"),
        (key("a", "admin", "*"), "server.keys[0].key"),
        (key("a", "1", "a*b"), "server.keys[0].adapters"),
        (key("a", "1", "a**"), "server.keys[0].adapters"),
        ("[[server.keys]]\nname = 'a'\nkey = '1'".to_owned(), "adapters"),
    ] {
        let file = format!("[server]\nadmin_key = 'admin'\n{keys}");
        let error = load(Some(&file), &[], &Overrides::default()).unwrap_err();
        assert!(error.contains(word), "{keys}: {error}");
    }
}

#[test]
fn experiments_come_from_a_file_and_are_checked_with_it() {
    let run = |weight: &str| {
        let arms = format!("arms = [{{name = 'Base', model = 'm', weight = {weight}}}]");
        format!("[experiments]\nmax_mib = 7\n[[experiments.run]]\nname = 'One'\nalias = 'Coder'\n{arms}")
    };
    let experiments = load(Some(&run("0.5")), &[], &Overrides::default()).unwrap().experiments;
    assert_eq!((experiments.max_mib, experiments.run[0].alias.as_str()), (7, "Coder"));
    assert_eq!(experiments.run[0].arms[0].weight, 0.5);
    let error = load(Some(&run("-1")), &[], &Overrides::default()).unwrap_err();
    assert!(error.contains("experiments.run[0].arms[0].weight") && error.contains("lorry.toml"), "{error}");
}

#[test]
fn a_model_alias_stands_for_the_base_or_an_adapter_and_for_nothing_else() {
    let check = |aliases: &str| {
        let run = "[[experiments.run]]\nname = 'e'\nalias = 'coder'\narms = [{ name = 'a', model = 'm', weight = 1 }]";
        load(Some(&format!("[server.model_aliases]\n{aliases}\n{run}")), &[], &Overrides::default())
    };
    for (aliases, key) in [
        ("a = 'b'\nb = 'conala'", "server.model_aliases.\"a\""),
        ("a = 'coder'", "server.model_aliases.\"a\""),
        ("a = 'conala+icl:python@3'", "server.model_aliases.\"a\""),
        ("coder = 'conala'", "server.model_aliases.\"coder\""),
    ] {
        let error = check(aliases).unwrap_err();
        assert!(error.contains(key), "{aliases}: {error}");
    }
    let config = check("a = 'conala'\n'claude-3.5' = 'qwen2.5-coder:0.5b'").unwrap();
    assert_eq!(config.server.model_aliases.len(), 2);
}

#[test]
fn a_promotion_needs_more_places_than_its_check_leaves_free() {
    let check = |max_queued: usize, promotion: &str| {
        let arms = "{name = 'a', model = 'y', weight = 1}, {name = 'b', model = 'x', weight = 1, canary = true}";
        let run = format!("[[experiments.run]]\nname = 'e'\nalias = 'coder'\narms = [{arms}]\nkeep_prompts_mib = 1");
        let rest = format!("bounds = {{min_samples = 9}}\n{promotion}");
        load(Some(&format!("[engine]\nmax_queued = {max_queued}\n{run}\n{rest}")), &[], &Overrides::default())
    };
    let promotion = "promotion = {min_pairs = 6, min_shown = 9}";
    let error = check(2, promotion).unwrap_err();
    assert!(error.contains("engine.max_queued must be more than 2"), "{error}");
    check(3, promotion).unwrap();
    check(2, "").unwrap();
}

#[test]
fn a_file_that_is_missing_or_not_toml_is_refused_by_name() {
    let error = Config::load(Some(Path::new("/nowhere/lorry.toml")), &Overrides::default()).unwrap_err();
    assert!(error.to_string().contains("/nowhere/lorry.toml"), "{error}");
    let error = load(Some("port: 1"), &[], &Overrides::default()).unwrap_err();
    assert!(error.contains("lorry.toml"), "{error}");
}

#[test]
fn home_is_lorry_home_then_the_cache_folder_then_the_user_home() {
    let home = |lorry: &str, cache: &str| {
        let variables = HashMap::from([("LORRY_HOME", lorry.to_string()), ("XDG_CACHE_HOME", cache.to_string())]);
        lorry_home_from(|name| variables.get(name).map(PathBuf::from), Some("/u".into())).unwrap()
    };
    assert_eq!(home("/l", "/c"), Path::new("/l"));
    assert_eq!(home("", "/c"), Path::new("/c/lorry"));
    assert_eq!(home("", "relative"), Path::new("/u/.cache/lorry"));
    assert!(matches!(lorry_home_from(|_| None, None), Err(ConfigError::NoHome)));
}

#[test]
fn fine_tuning_that_cannot_be_is_refused_with_its_key() {
    for (text, key) in [
        ("[fine_tuning]\ncommand = []", "fine_tuning.command"),
        ("[fine_tuning]\nnice = 20", "fine_tuning.nice"),
        ("[fine_tuning]\nmax_file_mib = 0", "fine_tuning.max_file_mib"),
        ("[fine_tuning]\nmax_files_mib = 1", "fine_tuning.max_files_mib"),
        ("[fine_tuning]\nenabled = true\n[adapters]\ndir = ''", "adapters.dir"),
    ] {
        let error = load(Some(text), &[], &Overrides::default()).unwrap_err();
        assert!(error.contains(key), "{text}: {error}");
    }
    assert!(!load(None, &[], &Overrides::default()).unwrap().fine_tuning.enabled);
}
