//! Bases as Hugging Face has them: a folder with `config.json`, safetensors and `tokenizer.json`.
//!
//! A checkpoint is quantized once, into a GGUF file that is kept; everything else of the server knows that one form. So
//! the next start is quick, adapters, devices and the tokenizer are the same for every base, and memory is mapped from the
//! file instead of held.

mod bitsandbytes;
mod config;
mod converter;
mod family;
mod fields;
mod generation;
mod integers;
mod language_model;
mod matrix;
mod post_processor;
mod prequantized;
mod quantize;
mod rope;
mod shards;
pub(super) mod templates;
mod tokenizer;

use std::fs;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use candle_core::quantized::gguf_file::{self, Value as Gguf};
use candle_core::{Device, Tensor};
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use tracing::info;

use config::Config;
use converter::Converter;
use prequantized::Prequantized;
pub use quantize::Quantization;
use shards::{Shards, UQFF};

use super::gguf::GgufFile;
use super::pull;
use crate::hexadecimal::hexadecimal;

/// Of the way that a checkpoint is converted: a file of another one is made anew.
const VERSION: &str = "5";
/// What a converted file was made of, in its metadata.
const SOURCE: &str = "lorry.checkpoint.fingerprint";
const MAX_TEXT_BYTES: u64 = 256 << 20;

#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("{file} {reason}")]
    File { file: String, reason: String },
    #[error("tensor {name} {reason}")]
    Tensor { name: String, reason: String },
    #[error("{path}: {source}")]
    Write { path: PathBuf, source: io::Error },
    #[error("the quantized file cannot be written: {0}")]
    Gguf(candle_core::Error),
}

impl CheckpointError {
    fn file(file: &str, reason: impl ToString) -> Self {
        Self::File { file: file.to_owned(), reason: reason.to_string() }
    }

    fn tensor(name: &str, reason: impl ToString) -> Self {
        Self::Tensor { name: name.to_owned(), reason: reason.to_string() }
    }
}

/// Whether a path is of a file within a checkpoint, or the folder of one.
pub fn is_of_checkpoint(path: &Path) -> bool {
    path.is_dir() || path.extension().is_some_and(|extension| extension == "safetensors" || extension == "uqff")
}

/// The GGUF file that `folder` becomes, made below `home` unless it is there. Blocks; safe to call from many processes.
///
/// # Errors
/// What of the checkpoint cannot be served, by file and field or by tensor; nothing is left then.
pub fn quantized(folder: &Path, quantization: Quantization, home: &Path) -> Result<PathBuf, CheckpointError> {
    if folder.is_file() {
        let reason = if folder.extension().is_some_and(|extension| extension == "uqff") {
            UQFF
        } else {
            "is one file of a checkpoint: name its folder"
        };
        return Err(CheckpointError::file(&folder.display().to_string(), reason));
    }
    let unreadable = |e: io::Error| CheckpointError::file(&folder.display().to_string(), e);
    let folder = fs::canonicalize(folder).map_err(unreadable)?;
    let fingerprint = fingerprint(&folder, quantization).map_err(unreadable)?;
    let target = home.join("models/quantized").join(format!("{}.gguf", target_stem(&folder, quantization)));
    let in_target = |source| CheckpointError::Write { path: target.clone(), source };
    let dir = target.parent().unwrap_or(home);
    fs::create_dir_all(dir).map_err(in_target)?;
    let _lock = pull::lock(&target).map_err(in_target)?;
    if is_of(&target, &fingerprint) {
        return Ok(target);
    }
    info!("{}: quantizing to {} once, into {}", folder.display(), quantization.name(), target.display());
    let readable = fs::Permissions::from_mode(0o644);
    let whole = tempfile::Builder::new().permissions(readable).tempfile_in(dir).map_err(in_target)?;
    let mut writer = BufWriter::with_capacity(1 << 20, whole);
    convert(&folder, quantization, fingerprint, &mut writer)?;
    writer.flush().map_err(in_target)?;
    let whole = writer.into_inner().map_err(|e| in_target(e.into_error()))?;
    whole.as_file().sync_all().map_err(in_target)?;
    whole.persist(&target).map_err(|e| in_target(e.error))?;
    Ok(target)
}

/// One file for each folder and quantization, so that what a changed folder was before does not stay.
fn target_stem(folder: &Path, quantization: Quantization) -> String {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let hash = hexadecimal(Sha256::new_with_prefix(folder.as_os_str().as_encoded_bytes()));
    format!("{name}-{}-{}", &hash[..8], quantization.name())
}

/// Names, sizes and times of the files: reading gigabytes again at every start would cost more than it is worth.
fn fingerprint(folder: &Path, quantization: Quantization) -> io::Result<String> {
    let mut lines = vec![VERSION.to_owned(), quantization.name().to_owned()];
    let templates = match fs::read_dir(folder.join(templates::FOLDER)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        entries => Some(entries?),
    };
    for entry in fs::read_dir(folder)?.chain(templates.into_iter().flatten()) {
        let entry = entry?;
        // Of what a link leads to: caches of the hub are full of links.
        let metadata = fs::metadata(entry.path())?;
        if metadata.is_file() {
            let modified = metadata.modified()?.duration_since(UNIX_EPOCH).map_err(io::Error::other)?.as_nanos();
            lines.push(format!("{} {} {modified}", entry.file_name().to_string_lossy(), metadata.len()));
        }
    }
    lines[2..].sort_unstable();
    Ok(hexadecimal(Sha256::new_with_prefix(lines.join("\n"))))
}

fn is_of(target: &Path, fingerprint: &str) -> bool {
    GgufFile::open(target).is_ok_and(|file| file.str(SOURCE).is_ok_and(|found| found == fingerprint))
}

fn convert(
    folder: &Path,
    quantization: Quantization,
    fingerprint: String,
    writer: &mut (impl Write + io::Seek),
) -> Result<(), CheckpointError> {
    let config = Config::read(folder)?;
    if config.is_of_part {
        info!("{}: of this model, what reads text is served; what sees is left out", folder.display());
    }
    let shards = Shards::open(folder, config.is_of_part)?;
    let prequantized = Prequantized::new(config.method.as_ref(), &shards);
    let mut metadata = config.metadata.clone();
    metadata.push(("general.quantization_version".to_owned(), Gguf::U32(2)));
    metadata.push((SOURCE.to_owned(), Gguf::String(fingerprint)));
    metadata.extend(tokenizer::metadata(folder, &config)?);

    let converter = Converter::new(&config, &shards, &prequantized, quantization);
    let mut tensors = converter.all()?;
    if let Some(fates) = converter.fates() {
        info!("{}: of the matrices that were quantized before, {fates}", folder.display());
    }
    let file_type = if prequantized.is_quantized() {
        quantize::file_type_of_most(tensors.iter().map(|(_, tensor)| tensor))
    } else {
        quantization.file_type()
    };
    metadata.extend(file_type.map(|number| ("general.file_type".to_owned(), Gguf::U32(number))));
    for (name, factors) in &config.rope_factors {
        let packed = Tensor::new(factors.as_slice(), &Device::Cpu).and_then(|t| quantize::keep(&t));
        tensors.push(((*name).to_owned(), packed.map_err(CheckpointError::Gguf)?));
    }
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    gguf_file::write(writer, &metadata, &tensors).map_err(CheckpointError::Gguf)
}

/// The text of a file in `folder`; `None` if it is not there.
fn read_text(folder: &Path, file: &str) -> Result<Option<String>, CheckpointError> {
    let path = folder.join(file);
    match path.metadata() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Ok(metadata) if metadata.len() > MAX_TEXT_BYTES => {
            return Err(CheckpointError::file(file, format!("has more than {MAX_TEXT_BYTES} bytes")));
        }
        _ => {}
    }
    fs::read_to_string(path).map(Some).map_err(|e| CheckpointError::file(file, e))
}

fn read_json<T: DeserializeOwned>(folder: &Path, file: &str) -> Result<Option<T>, CheckpointError> {
    let text = read_text(folder, file)?;
    text.map(|text| serde_json::from_str(&text).map_err(|e| CheckpointError::file(file, e))).transpose()
}
