//! `lorry models`: the models known by id, what each is served with, and what of this machine's memory it takes.

use std::fmt::Write;
use std::path::Path;

use super::catalogue::{CatalogueModel, Chat, models};
use super::gguf::GgufFile;
use super::host_memory::available_bytes;
use super::memory::{ADAPTER_RANK, Memory, kv_token_bytes, readable};
use crate::columns::columns;
use crate::config::EngineConfig;

const TITLES: [&str; 10] =
    ["id", "parameters", "context", "gaps", "chat", "weights", "1k tokens", "adapter", "needs", "fits"];

/// A table of all, with what is on disk below `home` read from its file.
pub fn table(home: &Path, config: &EngineConfig) -> String {
    table_for(available_bytes(), models().iter().map(|model| row(model, home, config)))
}

struct Row {
    cells: [String; 9],
    needed_bytes: usize,
    is_fetched: bool,
}

fn row(model: &CatalogueModel, home: &Path, config: &EngineConfig) -> Row {
    let fetched = model.fetched(home);
    // A checkpoint's own files are not those that are loaded.
    let file = fetched.as_ref().filter(|path| path.is_file()).and_then(|path| GgufFile::open(path).ok());
    let memory = file.and_then(|file| Memory::of_file(&file).ok()).unwrap_or_else(|| model.memory());
    let spec = model.spec();
    let needed_bytes = memory.needed_bytes(&spec, config);
    let cells = [
        model.id.clone(),
        parameters(model.parameters),
        format!("{}k", spec.context_length >> 10),
        if model.fill_in_middle { "yes" } else { "-" }.to_owned(),
        match model.chat {
            Chat::None => "-",
            Chat::Plain => "yes",
            Chat::Tools => "tools",
        }
        .to_owned(),
        readable(memory.weight_bytes),
        readable(kv_token_bytes(&spec, config) * 1000),
        readable(memory.adapter_bytes),
        readable(needed_bytes),
    ];
    Row { cells, needed_bytes, is_fetched: fetched.is_some() }
}

fn parameters(count: u64) -> String {
    match count as f64 {
        count if count >= 1e9 => format!("{:.1}B", count / 1e9),
        count => format!("{:.0}M", count / 1e6),
    }
}

fn table_for(available: Option<usize>, rows: impl Iterator<Item = Row>) -> String {
    let lines = rows.map(|Row { cells, needed_bytes, is_fetched }| {
        let fits = match available {
            None => "?",
            Some(available) if needed_bytes <= available => "yes",
            Some(_) => "no",
        };
        let fits = format!("{fits}{}", if is_fetched { ", fetched" } else { "" });
        cells.into_iter().chain([fits]).collect::<Vec<_>>()
    });
    let mut table = columns(&TITLES, &lines.collect::<Vec<_>>(), TITLES.len());
    let available = available.map_or_else(|| "an unknown part of".to_owned(), readable);
    // Writing to a string cannot fail.
    let _ = write!(
        table,
        "\n{available} of memory are available. `needs` is the weights, the KV store that engine.kv_cache_mib asks for, and a table of\n\
         all positions; an adapter has rank {ADAPTER_RANK} on every linear layer. Sizes are those of the CPU.\n"
    );
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_larger_than_the_memory_does_not_fit() {
        let row = |name: &str, needed_bytes, is_fetched| Row {
            cells: [(); 9].map(|()| name.to_owned()),
            needed_bytes,
            is_fetched,
        };
        let rows = || [row("small", 10, true), row("even", 20, false), row("large", 21, false)].into_iter();
        let last_words = |available| {
            let table = table_for(available, rows());
            let words = |line: &str| line.rsplit("  ").next().unwrap_or_default().trim().to_owned();
            table.lines().skip(1).take(3).map(words).collect::<Vec<_>>()
        };
        assert_eq!(last_words(Some(20)), ["yes, fetched", "yes", "no"]);
        assert_eq!(last_words(None), ["?, fetched", "?", "?"]);
    }

    #[test]
    fn a_file_that_is_there_is_read() {
        let home = tempfile::tempdir().unwrap();
        let config = crate::config::Config::load(None, &crate::config::Overrides::default()).unwrap().engine;
        let absent = table(home.path(), &config);
        assert_eq!(absent.matches("fetched").count(), 0);
        for model in models() {
            assert_eq!(absent.lines().filter(|line| line.split(' ').next() == Some(&model.id)).count(), 1, "{absent}");
        }
        std::fs::create_dir_all(home.path().join("models/bigcode/starcoder2-3b")).unwrap();
        std::fs::write(home.path().join("models/bigcode/starcoder2-3b/.complete"), "abc").unwrap();
        std::fs::write(home.path().join("models/qwen2.5-coder-7b-instruct-q4_k_m.gguf"), "not read").unwrap();
        let there = table(home.path(), &config);
        let fetched: Vec<_> = there.lines().filter(|line| line.ends_with("fetched")).collect();
        assert_eq!(fetched.len(), 2, "{there}");
        assert!(fetched[0].starts_with("qwen2.5-coder:7b ") && fetched[1].starts_with("starcoder2:3b "), "{there}");
    }
}
