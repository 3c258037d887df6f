//! Chat templates of a checkpoint, by their names.

use std::fs;
use std::io;
use std::path::Path;

use candle_core::quantized::gguf_file::Value as Gguf;
use serde::Deserialize;

use super::{CheckpointError, read_text};
use crate::prompt::chat;

/// The default, in a file of its own.
pub const FILE: &str = "chat_template.jinja";
/// Those beside it: a file for each, by its name.
pub const FOLDER: &str = "additional_chat_templates";
const ENDING: &str = ".jinja";
const DEFAULT: &str = "default";

/// As `tokenizer_config.json` has them.
#[derive(Deserialize)]
#[serde(untagged)]
pub enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
pub struct NamedTemplate {
    name: String,
    template: String,
}

/// Under the keys of GGUF. Where there are files, they count, and nothing of what the configuration has.
pub fn metadata(folder: &Path, said: Option<Templates>) -> Result<Vec<(String, Gguf)>, CheckpointError> {
    let of_files = of_files(folder)?;
    let named = match said {
        _ if !of_files.is_empty() => of_files,
        None => Vec::new(),
        Some(Templates::One(template)) => vec![(DEFAULT.to_owned(), template)],
        Some(Templates::Named(list)) => list.into_iter().map(|named| (named.name, named.template)).collect(),
    };
    let key = |name: String| if name == DEFAULT { chat::KEY.to_owned() } else { format!("{}{name}", chat::NAMED) };
    Ok(named.into_iter().map(|(name, template)| (key(name), Gguf::String(template))).collect())
}

fn of_files(folder: &Path) -> Result<Vec<(String, String)>, CheckpointError> {
    let default = read_text(folder, FILE)?;
    let mut named: Vec<_> = default.map(|template| (DEFAULT.to_owned(), template)).into_iter().collect();
    let unreadable = |e: io::Error| CheckpointError::file(FOLDER, e);
    let entries = match fs::read_dir(folder.join(FOLDER)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(named),
        entries => entries.map_err(unreadable)?,
    };
    for entry in entries {
        let file = entry.map_err(unreadable)?.file_name();
        let file = file.to_string_lossy();
        let Some(name) = file.strip_suffix(ENDING) else { continue };
        let template = read_text(folder, &format!("{FOLDER}/{file}"))?;
        named.extend(template.map(|template| (name.to_owned(), template)));
    }
    named.sort_unstable();
    Ok(named)
}

/// Whether a file of a repository is one of these.
pub fn is_one(file: &str) -> bool {
    let named = file.strip_prefix(FOLDER).and_then(|file| file.strip_prefix('/'));
    file == FILE || named.is_some_and(|name| name.ends_with(ENDING) && !name.contains('/'))
}
