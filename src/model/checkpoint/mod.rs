//! Bases as Hugging Face has them: a folder with `config.json`, safetensors and `tokenizer.json`.
//!
//! A checkpoint is quantized once, into a GGUF file that is kept; everything else of the server knows that one form. So
//! the next start is quick, adapters, devices and the tokenizer are the same for every base, and memory is mapped from the
//! file instead of held.

mod config;
mod family;
mod quantize;
mod rope;
mod shards;
mod tokenizer;

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::UNIX_EPOCH;

use candle_core::quantized::QTensor;
use candle_core::quantized::gguf_file::{self, Value as Gguf};
use candle_core::{DType, Device, Tensor};
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use tracing::info;

use config::Config;
use family::{ROUTER, expert_number};
use quantize::Prequantized;
pub use quantize::Quantization;
use shards::Shards;

use super::gguf::GgufFile;
use super::pull;
use crate::hexadecimal::hexadecimal;

/// Of the way that a checkpoint is converted: a file of another one is made anew.
const VERSION: &str = "1";
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

/// The GGUF file that `folder` becomes, made below `home` unless it is there. Blocks; safe to call from many processes.
///
/// # Errors
/// What of the checkpoint cannot be served, by file and field or by tensor; nothing is left then.
pub fn quantized(folder: &Path, quantization: Quantization, home: &Path) -> Result<PathBuf, CheckpointError> {
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
    for entry in fs::read_dir(folder)? {
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
    let shards = Shards::open(folder)?;
    let prequantized = Prequantized::new(config.quantization.as_ref(), shards.clone())?;
    let mut metadata = config.metadata.clone();
    metadata.push(("general.quantization_version".to_owned(), Gguf::U32(2)));
    metadata.push((SOURCE.to_owned(), Gguf::String(fingerprint)));
    metadata.extend(quantization.file_type().map(|number| ("general.file_type".to_owned(), Gguf::U32(number))));
    metadata.extend(tokenizer::metadata(folder, &config)?);

    let mut tensors =
        Converter { config: &config, shards: &shards, prequantized: &prequantized, quantization }.all()?;
    for (name, factors) in &config.rope_factors {
        let packed = Tensor::new(factors.as_slice(), &Device::Cpu).and_then(|t| quantize::keep(&t));
        tensors.push(((*name).to_owned(), packed.map_err(CheckpointError::Gguf)?));
    }
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    gguf_file::write(writer, &metadata, &tensors).map_err(CheckpointError::Gguf)
}

struct Converter<'a> {
    config: &'a Config,
    shards: &'a Shards,
    prequantized: &'a Prequantized,
    quantization: Quantization,
}

impl Converter<'_> {
    /// Every tensor of the checkpoint under GGUF's name, on all cores.
    fn all(&self) -> Result<Vec<(String, QTensor)>, CheckpointError> {
        let mut named: BTreeMap<String, Vec<&str>> = BTreeMap::new();
        for name in self.shards.names() {
            if let Some(gguf) = self.gguf_name(name)? {
                named.entry(gguf).or_default().push(name);
            }
        }
        let (left, done) = (Mutex::new(named.into_iter()), Mutex::new(Ok(Vec::new())));
        std::thread::scope(|scope| {
            for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
                scope.spawn(|| {
                    loop {
                        let Some((gguf, names)) = lock(&left).next() else { return };
                        let packed = self.convert(&names).map(|tensor| (gguf, tensor));
                        let mut done = lock(&done);
                        match (&mut *done, packed) {
                            (Ok(tensors), Ok(packed)) => tensors.push(packed),
                            (Ok(_), Err(e)) => *done = Err(e),
                            (Err(_), _) => return,
                        }
                    }
                });
            }
        });
        let mut tensors = done.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)?;
        tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
        Ok(tensors)
    }

    /// `None` for what a decoder does not need.
    fn gguf_name(&self, name: &str) -> Result<Option<String>, CheckpointError> {
        let has_place = || CheckpointError::tensor(name, "has no place in this family of models");
        if name.ends_with(".rotary_emb.inv_freq") {
            return Ok(None);
        }
        let (module, part) = name.rsplit_once('.').ok_or_else(has_place)?;
        if module == "lm_head" && self.config.ties_embedding == Some(true) {
            return Ok(None);
        }
        // Scales of a quantized matrix belong to it.
        if !matches!(part, "weight" | "bias") {
            let is_part =
                self.prequantized.is_quantized() && self.config.family.gguf_module(module_of_part(name)).is_some();
            return if is_part { Ok(None) } else { Err(has_place()) };
        }
        let gguf = self.config.family.gguf_module(module).ok_or_else(has_place)?;
        Ok(Some(format!("{gguf}.{part}")))
    }

    /// The tensor that these become: one, or as many as there are experts.
    fn convert(&self, names: &[&str]) -> Result<QTensor, CheckpointError> {
        let [name, rest @ ..] = names else { return Err(CheckpointError::tensor("", "has no source")) };
        let module = |name: &str| name.rsplit_once('.').map_or(name, |(module, _)| module).to_owned();
        if expert_number(&module(name)).is_some() {
            return self.convert_experts(names);
        }
        if let Some(other) = rest.first() {
            return Err(CheckpointError::tensor(other, format!("belongs where {name} does")));
        }
        let in_tensor = |e: candle_core::Error| CheckpointError::tensor(name, e);
        let tensor = self.shards.tensor(name)?;
        let module = module(name);
        let is_vocabulary = matches!(module.as_str(), "model.embed_tokens" | "lm_head");
        if tensor.rank() == 1 {
            let vector = if self.config.family.adds_one(name) {
                tensor.to_dtype(DType::F32).and_then(|weight| weight + 1.0)
            } else {
                self.in_gguf_order(&module, tensor)
            };
            return vector.and_then(|vector| quantize::keep(&vector)).map_err(in_tensor);
        }
        let matrix =
            self.matrix(&module, tensor).and_then(|matrix| self.in_gguf_order(&module, matrix)).map_err(in_tensor)?;
        // What is small and decides is kept whole.
        if self.config.family.gguf_module(&module).is_some_and(|gguf| gguf.ends_with(ROUTER)) {
            return matrix.to_dtype(DType::F32).and_then(|matrix| quantize::keep(&matrix)).map_err(in_tensor);
        }
        let quantization = if is_vocabulary { self.quantization.of_vocabulary() } else { self.quantization };
        quantize::pack(matrix, quantization).map_err(in_tensor)
    }

    /// One projection of all experts of a layer, in the order of their numbers: `[experts, out, in]`.
    fn convert_experts(&self, names: &[&str]) -> Result<QTensor, CheckpointError> {
        let mut matrices: BTreeMap<usize, Tensor> = BTreeMap::new();
        for name in names {
            let in_tensor = |e: candle_core::Error| CheckpointError::tensor(name, e);
            let module = name.rsplit_once('.').map_or(*name, |(module, _)| module);
            let matrix = self.matrix(module, self.shards.tensor(name)?).map_err(in_tensor)?;
            matrices.extend(expert_number(module).map(|number| (number, matrix)));
        }
        let count = self.config.num_experts.unwrap_or(0);
        if !matrices.keys().copied().eq(0..count) {
            let reason = format!("is one of {}, and the configuration says {count} experts", matrices.len());
            return Err(CheckpointError::tensor(names[0], reason));
        }
        let matrices: Vec<Tensor> = matrices.into_values().collect();
        let stack = Tensor::stack(&matrices, 0).and_then(|stack| quantize::pack(stack, self.quantization));
        stack.map_err(|e| CheckpointError::tensor(names[0], e))
    }

    /// The matrix of a module, dequantized if another program has quantized it.
    fn matrix(&self, module: &str, tensor: Tensor) -> candle_core::Result<Tensor> {
        if tensor.dtype().is_float() && tensor.dtype() != DType::F8E4M3 {
            return Ok(tensor);
        }
        match self.config.matrix_shape(module) {
            Some(shape) if self.prequantized.is_quantized() => self.prequantized.dequantize(module, shape),
            _ => candle_core::bail!("has the type {:?}, which is not that of weights", tensor.dtype()),
        }
    }

    /// The rows in GGUF's order. Files of some architectures interleave the two halves of every query and key head: row
    /// `2i + j` of a head there is row `j·head_dim/2 + i` here (llama.cpp's `convert_hf_to_gguf.py`, `permute`).
    fn in_gguf_order(&self, module: &str, tensor: Tensor) -> candle_core::Result<Tensor> {
        if !self.config.family.interleaves(module) {
            return Ok(tensor);
        }
        let (shape, half) = (tensor.shape().clone(), self.config.head_dim / 2);
        let heads = shape.dims()[0] / (2 * half).max(1);
        tensor.reshape((heads, 2, half, ()))?.transpose(1, 2)?.contiguous()?.reshape(shape)
    }
}

/// The name of the matrix that a part of its quantized form belongs to: `….weight.absmax` and `….scales` of `….weight`.
fn module_of_part(name: &str) -> &str {
    let whole = name.split_once(".weight.").map(|(module, _)| module);
    whole.unwrap_or_else(|| name.rsplit_once('.').map_or(name, |(module, _)| module))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
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
