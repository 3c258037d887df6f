//! The prefix cache on disk: what is read back has the bits of what is computed, and nothing that happens to the files changes
//! a reply.

mod events;
mod tiny;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use candle_core::quantized::GgmlDType;
use events::Reply;
use kernels::Isa;
use kernels::attention::KvType;
use lorry::adapter::canonical::Adapter;
use lorry::config::{self, Config, Overrides};
use lorry::engine::fairness::Account;
use lorry::engine::prefix_disk::{BlockFiles, Folder};
use lorry::engine::request::{Event, PromptOutput, Request, SamplingParams};
use lorry::engine::{EngineConfig, EngineHandle, EngineState};
use lorry::metrics::Metrics;
use lorry::model::resident::{self, Source};
use lorry::model::spec::Architecture;
use tempfile::TempDir;
use tiny::{Loaded, Lora, Place, TinyModel, random_tokens};
use tokio::sync::mpsc::{self, UnboundedReceiver};

const MIB: u64 = 1 << 20;

/// A model, and a folder for its blocks.
struct Bench {
    model: TinyModel,
    place: Place,
    dir: TempDir,
    max_bytes: u64,
    num_blocks: usize,
}

/// An engine and what it counts.
struct Server {
    engine: EngineHandle,
    metrics: Arc<Metrics>,
}

impl Bench {
    fn new(place: Place) -> Self {
        let model = TinyModel::new(Architecture::Qwen2, GgmlDType::Q4K, 1);
        Self { model, place, dir: tempfile::tempdir().unwrap(), max_bytes: 64 * MIB, num_blocks: 64 }
    }

    fn on_host() -> Self {
        Self::new(Place::Host(Isa::detect(), 2))
    }

    fn folder(&self) -> PathBuf {
        self.dir.path().join("identity")
    }

    /// The files of blocks.
    fn files(&self) -> Vec<PathBuf> {
        let files = fs::read_dir(self.folder()).unwrap().map(|entry| entry.unwrap().path());
        files.filter(|path| path.extension().is_some_and(|extension| extension == "kv")).collect()
    }

    fn serve(&self) -> Server {
        self.serve_with(|block_bytes, metrics| {
            let folder = Folder::open(self.dir.path(), "identity", block_bytes, self.max_bytes).unwrap();
            Some(BlockFiles::start(folder, metrics.disk_blocks()))
        })
    }

    fn serve_without(&self) -> Server {
        self.serve_with(|_, _| None)
    }

    fn serve_with(&self, open: impl FnOnce(usize, &Metrics) -> Option<BlockFiles>) -> Server {
        let config = EngineConfig {
            max_batch_rows: 64,
            max_sequences: 8,
            max_queued: 64,
            context_length: 256,
            max_draft_tokens: 0,
            max_inter_token: None,
        };
        let mut decoder: Box<dyn Loaded> = self.model.load(self.place);
        decoder.reserve(self.num_blocks);
        let metrics = Arc::new(Metrics::new("base"));
        let block_bytes = decoder.host_kv().expect("it is on the host").bytes_of_block();
        let files = open(block_bytes, &metrics);
        Server { engine: EngineHandle::start_with_files(decoder, config, files, metrics.clone()), metrics }
    }
}

impl Server {
    fn submit(&self, ask: &Ask) -> UnboundedReceiver<Event> {
        let (request, receiver) = self.request(ask);
        self.engine.submit(request).unwrap();
        receiver
    }

    fn request(&self, ask: &Ask) -> (Request, UnboundedReceiver<Event>) {
        let (events, receiver) = mpsc::unbounded_channel();
        let request = Request {
            prompt_tokens: ask.prompt.clone(),
            num_pinned_tokens: 0,
            adapter: ask.adapter.clone(),
            account: Account::default(),
            sampling: SamplingParams { temperature: ask.temperature, seed: 7, ..SamplingParams::GREEDY },
            max_tokens: 24,
            stop_tokens: Arc::from([]),
            top_logprobs: Some(3),
            grammar: None,
            prediction: None,
            prompt_output: PromptOutput::Nothing,
            deadline: None,
            events,
            permit: self.engine.try_permit().unwrap(),
        };
        (request, receiver)
    }

    fn run(&self, ask: &Ask) -> Reply {
        Reply::of(self.submit(ask))
    }

    fn count(&self, event: &str) -> u64 {
        let line = format!("lorry_prefix_cache_disk_blocks_total{{event=\"{event}\"}} ");
        let text = self.metrics.render(|_| true);
        text.lines().find_map(|found| found.strip_prefix(&line)).map_or(0, |count| count.parse().unwrap())
    }
}

#[derive(Clone)]
struct Ask {
    prompt: Vec<u32>,
    adapter: Option<Arc<Adapter>>,
    temperature: f32,
}

impl Ask {
    fn new(prompt: Vec<u32>) -> Self {
        Self { prompt, adapter: None, temperature: 0.0 }
    }
}

/// The base and an adapter, greedy and drawn.
fn asks(bench: &Bench) -> Vec<Ask> {
    let adapter = Lora::random(&bench.model.spec, 4, false, 1).adapter("a");
    let prompt = random_tokens(&bench.model.spec, 100, 3);
    let models = [None, Some(adapter)];
    let of = |adapter: &Option<Arc<Adapter>>| {
        [0.0, 0.8].map(|temperature| Ask { prompt: prompt.clone(), adapter: adapter.clone(), temperature })
    };
    models.iter().flat_map(of).collect()
}

#[test]
fn tokens_and_logprobs_after_a_restart_are_those_of_a_server_without_cache() {
    for place in [Place::Host(Isa::detect(), 2), Place::HostQ8(Isa::detect(), 1)] {
        let bench = Bench::new(place);
        for ask in asks(&bench) {
            let alone = bench.serve_without().run(&ask);
            assert_eq!(bench.serve().run(&ask), alone, "the first one computes all");
            let server = bench.serve();
            let again = server.run(&ask);
            assert_eq!((again.cached_tokens, &again.events), (96, &alone.events), "whole blocks come from the disk");
            // What went on from there is there too.
            let next = Ask { prompt: [ask.prompt, alone.tokens(), vec![5; 9]].concat(), ..ask };
            drop(server);
            let reply = bench.serve().run(&next);
            assert_eq!(reply.cached_tokens, 112, "100 and 23 tokens are computed");
            assert_eq!(reply.events, bench.serve_without().run(&next).events);
            fs::remove_dir_all(bench.folder()).unwrap();
        }
    }
}

#[test]
fn what_had_to_leave_the_memory_is_found_on_disk() {
    let bench = Bench { num_blocks: 10, ..Bench::on_host() };
    let server = bench.serve();
    let ask = Ask::new(random_tokens(&bench.model.spec, 100, 0));
    let first = server.run(&ask);
    // What has to leave before it is written would be computed again.
    while bench.files().len() < 6 {
        thread::sleep(Duration::from_millis(5));
    }
    (1..4).for_each(|seed| drop(server.run(&Ask::new(random_tokens(&bench.model.spec, 100, seed)))));
    let again = server.run(&ask);
    assert_eq!(again.events, first.events);
    assert!(again.cached_tokens >= 96, "{}", again.cached_tokens);
    let vllm = &server.metrics.vllm;
    assert!(vllm.external_prefix_cache_hits_total.get() >= 64);
    assert!(vllm.external_prefix_cache_queries_total.get() >= 400);
    assert_eq!(server.engine.state(), EngineState::default());
}

/// Changes every file, given those of all.
type Damage = fn(&[PathBuf]);

fn rewrite(files: &[PathBuf], change: fn(&mut Vec<u8>)) {
    for path in files {
        let mut bytes = fs::read(path).unwrap();
        change(&mut bytes);
        fs::write(path, bytes).unwrap();
    }
}

#[test]
fn blocks_that_are_damaged_cut_off_or_anothers_are_deleted_and_computed_again() {
    let damages: [Damage; 6] = [
        |files| rewrite(files, |bytes| bytes[1000] ^= 1),
        |files| rewrite(files, |bytes| bytes[3] ^= 1),
        |files| rewrite(files, |bytes| bytes.truncate(500)),
        |files| rewrite(files, Vec::clear),
        |files| rewrite(files, |bytes| bytes.push(0)),
        |files| {
            let contents: Vec<_> = files.iter().map(|path| fs::read(path).unwrap()).collect();
            let others = contents.iter().cycle().skip(1);
            files.iter().zip(others).for_each(|(path, bytes)| fs::write(path, bytes).unwrap());
        },
    ];
    let bench = Bench::on_host();
    let ask = Ask::new(random_tokens(&bench.model.spec, 100, 3));
    let alone = bench.serve().run(&ask);
    for damage in damages {
        damage(&bench.files());
        let server = bench.serve();
        assert_eq!(server.run(&ask), alone, "nothing is found");
        assert!(server.count("lost") > 0);
        drop(server);
        assert_eq!(bench.serve().run(&ask).cached_tokens, 96, "all is there again");
    }
}

#[test]
fn files_that_go_or_cannot_be_written_while_it_runs_change_no_reply() {
    let bench = Bench::on_host();
    let ask = Ask::new(random_tokens(&bench.model.spec, 100, 3));
    let alone = bench.serve().run(&ask);
    let server = bench.serve();
    fs::remove_dir_all(bench.folder()).unwrap();
    fs::write(bench.folder(), "in the way").unwrap();
    assert_eq!(server.run(&ask), alone);
    for seed in 4..8 {
        let other = Ask::new(random_tokens(&bench.model.spec, 100, seed));
        assert_eq!(server.run(&other).events, bench.serve_without().run(&other).events);
    }
    assert_eq!(server.engine.state(), EngineState::default());
}

#[test]
fn a_disk_that_does_not_answer_keeps_nobody_from_a_reply() {
    let bench = Bench::on_host();
    let ask = Ask::new(random_tokens(&bench.model.spec, 100, 3));
    let alone = bench.serve().run(&ask);
    let server = bench.serve();
    let files = bench.files();
    files.iter().for_each(|path| put_pipe(path));
    let (waiting, left) = (server.submit(&ask), server.submit(&ask));
    let other = Ask::new(random_tokens(&bench.model.spec, 100, 4));
    assert_eq!(server.run(&other).events, bench.serve_without().run(&other).events);
    drop(left);
    assert_eq!(Reply::of(waiting).events, alone.events);
    assert_eq!(server.run(&ask).events, alone.events);
    assert_eq!(server.engine.state(), EngineState::default());
    // Ends the waiting, so that the server can end.
    end_pipes(&files);
}

/// Who opens a pipe to read waits for somebody to write.
fn put_pipe(path: &Path) {
    fs::remove_file(path).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
}

/// Has whoever waits for a pipe find nothing in it.
fn end_pipes(paths: &[PathBuf]) {
    let open = |path| fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let pipes: Vec<_> = paths.iter().map(open).collect();
    paths.iter().for_each(|path| fs::remove_file(path).unwrap());
    drop(pipes);
}

#[test]
fn one_request_that_leaves_or_finds_a_block_lost_keeps_no_other_from_the_disk() {
    for leaves in [true, false] {
        let bench = Bench::on_host();
        let asks: Vec<Ask> = (0..4).map(|seed| Ask::new(random_tokens(&bench.model.spec, 100, seed))).collect();
        bench.serve().run(&asks[0]);
        let mut pipes = bench.files();
        {
            let server = bench.serve();
            asks[1..].iter().for_each(|ask| drop(server.run(ask)));
        }
        pipes.iter().for_each(|path| put_pipe(path));
        let server = bench.serve();
        let (requests, mut receivers): (Vec<_>, Vec<_>) = asks.iter().map(|ask| server.request(ask)).unzip();
        server.engine.submit_together(requests).unwrap();
        let first = receivers.remove(0);
        if leaves {
            while server.engine.state().waiting < asks.len() {
                thread::yield_now();
            }
            drop(first);
            while server.engine.state().waiting == asks.len() {
                thread::yield_now();
            }
        } else {
            // The one that is being read can be written; it is deleted as what is no block.
            let flags = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::NONBLOCK;
            let being_read = |path: &PathBuf| rustix::fs::open(path, flags, rustix::fs::Mode::empty()).is_ok();
            let lost = loop {
                if let Some(index) = pipes.iter().position(being_read) {
                    break index;
                }
            };
            pipes.remove(lost);
            assert_eq!(Reply::of(first).cached_tokens, 0, "it is computed at once");
        }
        end_pipes(&pipes);
        for receiver in receivers {
            assert_eq!(Reply::of(receiver).cached_tokens, 96, "the others are read: {leaves}");
        }
    }
}

#[test]
fn the_folder_stays_within_its_bound_and_keeps_what_was_used_last() {
    let mut bench = Bench { max_bytes: 20 * 17_000, ..Bench::on_host() };
    let asks: Vec<Ask> = (0..6).map(|seed| Ask::new(random_tokens(&bench.model.spec, 100, seed))).collect();
    let num_bytes = |bench: &Bench| -> u64 { bench.files().iter().map(|path| path.metadata().unwrap().len()).sum() };
    let server = bench.serve();
    for ask in &asks {
        server.run(ask);
        // One that is used time and again, in memory.
        server.run(&asks[0]);
    }
    drop(server);
    assert!(num_bytes(&bench) <= bench.max_bytes && bench.files().len() > 10);
    let cached = |bench: &Bench, ask: &Ask| bench.serve().run(ask).cached_tokens;
    assert_eq!([0, 5, 1].map(|index| cached(&bench, &asks[index])), [96, 96, 0]);
    bench.max_bytes = 5 * 17_000;
    drop(bench.serve());
    assert!(num_bytes(&bench) <= bench.max_bytes, "what was allowed before is not any more");
}

#[test]
fn a_folder_that_cannot_be_used_is_refused_with_its_path() {
    let bench = Bench::on_host();
    let file = bench.dir.path().join("file");
    fs::write(&file, "").unwrap();
    let open =
        |dir: &Path, max_bytes| Folder::open(dir, "identity", 1000, max_bytes).map(drop).map_err(|e| e.to_string());
    let error = open(&file, MIB).unwrap_err();
    assert!(error.contains(file.to_str().unwrap()) && error.contains("engine.prefix_cache_dir"), "{error}");
    let error = open(bench.dir.path(), 999).unwrap_err();
    assert!(error.contains("engine.prefix_cache_dir_mib"), "{error}");
    let server = bench.serve();
    let error = open(bench.dir.path(), MIB).unwrap_err();
    assert!(error.contains("another server") && error.contains(bench.dir.path().to_str().unwrap()), "{error}");
    drop(server);
    open(bench.dir.path(), MIB).unwrap();
}

#[test]
fn what_another_base_computed_is_not_read_and_files_that_are_no_blocks_are_left_alone() {
    let bench = Bench::on_host();
    let ask = Ask::new(random_tokens(&bench.model.spec, 100, 3));
    bench.serve().run(&ask);
    let notes = bench.folder().join("notes.txt");
    fs::write(&notes, "mine").unwrap();
    let serve_another = || {
        bench.serve_with(|block_bytes, metrics| {
            let folder = Folder::open(bench.dir.path(), "another", block_bytes, bench.max_bytes).unwrap();
            Some(BlockFiles::start(folder, metrics.disk_blocks()))
        })
    };
    let server = serve_another();
    assert_eq!(server.run(&ask).cached_tokens, 0);
    drop(server);
    // Nor where somebody puts them in its place.
    let another = bench.dir.path().join("another");
    fs::remove_dir_all(&another).unwrap();
    fs::rename(bench.folder(), &another).unwrap();
    let server = serve_another();
    assert_eq!(server.run(&ask).cached_tokens, 0);
    assert!(server.count("lost") > 0);
    assert_eq!(fs::read_to_string(another.join("notes.txt")).unwrap(), "mine");
}

#[test]
fn the_same_prompt_sent_several_times_at_once_is_read_once() {
    let bench = Bench::on_host();
    let ask = Ask::new(random_tokens(&bench.model.spec, 100, 3));
    let alone = bench.serve().run(&ask);
    let server = bench.serve();
    let receivers = [(); 4].map(|()| server.submit(&ask));
    for receiver in receivers {
        let reply = Reply::of(receiver);
        assert_eq!(reply.events, alone.events);
        assert!(reply.cached_tokens >= 96);
    }
    assert_eq!(server.count("read"), 6);
}

#[test]
fn whatever_keys_and_values_depend_on_has_a_folder_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let [one, other] = [1, 2].map(|seed| {
        let path = dir.path().join(format!("{seed}.gguf"));
        TinyModel::new(Architecture::Qwen2, GgmlDType::Q4K, seed).write(&path);
        path
    });
    let blocks = dir.path().join("blocks");
    let overrides = Overrides { device: Some("cpu".to_owned()), ..Overrides::default() };
    let config = Config::load(None, &overrides).unwrap().engine;
    let config = config::EngineConfig { prefix_cache_dir: blocks.clone(), kv_cache_mib: 1, ..config };
    let q8_0 = config::EngineConfig { kv_cache_type: KvType::Q8_0, ..config.clone() };
    let portable = config::EngineConfig { instruction_set: Some(Isa::Portable), ..config.clone() };
    let short = config::EngineConfig { context_length: 128, ..config.clone() };
    let cases = [(&one, &config), (&one, &config), (&other, &config), (&one, &q8_0), (&one, &portable), (&one, &short)];
    let num_folders = cases.map(|(file, config)| {
        let mut resident = resident::load(Source::File(file), config).unwrap();
        assert!(resident.open_block_files(config, file, &Metrics::default()).unwrap().is_some());
        fs::read_dir(&blocks).unwrap().filter(|entry| entry.as_ref().unwrap().path().is_dir()).count()
    });
    assert_eq!(num_folders, [1, 1, 2, 3, 4, 5]);
}
