//! Log-probabilities that the CUDA kernels, run by the CPU or a card (`make test-gpu`), give `smollm2:135m` and its adapters over HTTP, against those of
//! transformers and PEFT in float32.

mod tiny;

use std::path::{Path, PathBuf};
use std::process::Command;

use lorry::app::App;
use lorry::config::{self, Config, DeviceChoice, EngineConfig, Overrides};
use lorry::http;
use lorry::model::resident;
use serde_json::Value;
use tiny::Place;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

const MODEL: &str = "smollm2:135m";
/// A method each that takes another way through the kernels.
const KINDS: [&str; 4] = ["lora_all", "dora", "ia3_wide", "prefix"];

fn shared() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared")
}

/// The mean difference that `fidelity.py` finds.
fn difference(url: &str, model: &str, reference: &Path) -> f64 {
    let mut command = Command::new("python3");
    command.arg(shared().join("tools/fidelity.py")).args([url, model]).arg(reference);
    let output = command.output().expect("python3 runs");
    let said: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{model}: {output:?}"));
    said["mean_abs_dlogp"].as_f64().expect("a number")
}

#[tokio::test(flavor = "multi_thread")]
async fn log_probabilities_are_within_their_bounds_of_those_of_peft() {
    let fixtures = shared().join("fixtures/smollm2-135m");
    let model = config::lorry_home().unwrap().join("models/SmolLM2-135M-Instruct.Q4_1.gguf");
    if !fixtures.exists() || !model.exists() {
        return println!("skipped: the fixtures or {MODEL} are not there");
    }
    let adapters = tempfile::tempdir().unwrap();
    for kind in KINDS {
        let to = adapters.path().join(kind);
        std::fs::create_dir(&to).unwrap();
        for file in std::fs::read_dir(fixtures.join("adapters").join(kind)).unwrap() {
            let file = file.unwrap();
            std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
        }
    }
    let dir = adapters.path().to_string_lossy().into_owned();
    let overrides = Overrides { model: Some(MODEL.to_owned()), adapters: Some(dir), ..Overrides::default() };
    let mut config = Config::load(None, &overrides).unwrap();
    config.engine.context_length = 512;
    config.engine.kv_cache_mib = 64;
    let kv_type = config.engine.kv_cache_type;
    let app = App::load_with(config, |source, engine| {
        if matches!(tiny::gpu(kv_type), Place::Gpu(_)) {
            resident::load(source, &EngineConfig { device: DeviceChoice::Cuda(0), ..engine.clone() })
        } else {
            resident::load_onto(source, tiny::emulated_gpu(kv_type), engine, 64)
        }
    })
    .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (stop, stopped) = oneshot::channel::<()>();
    let server = http::Server::start(listener, &app.state.config.server).unwrap();
    let served = tokio::spawn(server.serve(app.state, async move { drop(stopped.await) }));
    let bounds: Value = serde_json::from_slice(&std::fs::read(fixtures.join("bounds.json")).unwrap()).unwrap();
    for kind in std::iter::once("base").chain(KINDS) {
        let (name, reference) = match kind {
            "base" => (MODEL.to_owned(), fixtures.join("base.json")),
            kind => (format!("{MODEL}-{kind}"), fixtures.join(format!("adapters/{kind}.json"))),
        };
        let bound = bounds[kind]["bound"].as_f64().expect("a bound");
        let url = url.clone();
        let found = tokio::task::spawn_blocking(move || difference(&url, &name, &reference)).await.unwrap();
        println!("{kind}: {found} of {bound}");
        assert!(found < bound, "{kind}: {found}, the bound is {bound}");
    }
    stop.send(()).unwrap();
    served.await.unwrap().unwrap();
}
