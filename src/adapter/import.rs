//! `lorry adapters import`: adapters in llama.cpp's form, which Ollama's users have, turned into PEFT's.
//!
//! The form is that of llama.cpp's `convert_lora_to_gguf.py`: for a tensor T of the base `T.lora_a` `[rank, in]` and
//! `T.lora_b` `[out, rank]`, in the base file's order of rows, and one `adapter.lora.alpha`; on the embedding A is
//! `[vocabulary, rank]`.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::{Map, Value, json};

use super::check::Report;
use super::error::AdapterError;
use super::files::AdapterFiles;
use super::loader;
use super::root::{NAME_RULE, Root, is_valid_name};
use super::sites::{EMBEDDING_PATH, HEAD_PATH};
use crate::model::BaseWeights;
use crate::model::base_weights::{EMBEDDING_TENSOR, GgufWeights, HEAD_TENSOR};
use crate::model::gguf::{GgufError, GgufFile};
use crate::model::spec::Module;

const ALPHA_KEY: &str = "adapter.lora.alpha";

#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    #[error(transparent)]
    File(#[from] GgufError),
    #[error("{key} is {found}, expected {expected}")]
    Metadata { key: &'static str, found: String, expected: String },
    #[error("tensor {name}: {reason}")]
    Tensor { name: String, reason: String },
    #[error("the file holds no pair of matrices for this base")]
    Nothing,
    #[error("the name {name:?} {NAME_RULE}: say another with --name")]
    Name { name: String },
    #[error("there is an adapter {name:?} already: say another name with --name, or remove that one")]
    Taken { name: String },
    #[error("what comes out of it is refused: {0}")]
    Refused(#[from] AdapterError),
    #[error("the folder of adapters {path}: {source}")]
    Folder { path: PathBuf, source: io::Error },
}

/// One pair on its way: row-major, in PEFT's order.
struct Pair {
    path: String,
    rank: usize,
    /// Names of the two tensors, their shapes and values.
    tensors: [(String, [usize; 2], Vec<f32>); 2],
}

/// Puts the adapter in `file` into the folder `root` of adapters as `name`; nobody sees a part of it.
///
/// # Errors
/// As [`import`], and when the name is none or taken, the folder cannot be written, or a server would refuse the adapter.
pub fn install(file: &Path, name: &str, root: &Path, base: &GgufWeights) -> Result<Report, ImportError> {
    if !is_valid_name(name) {
        return Err(ImportError::Name { name: name.to_string() });
    }
    let files = import(file, base)?;
    let adapter = loader::load(name, &files, base)?;
    let write = || {
        let root = Root::open(root)?;
        if root.dir.symlink_metadata(name).is_ok() {
            return Ok(false);
        }
        let staging = root.staging()?;
        files.write(&staging.dir()?)?;
        match staging.add(name) {
            // Somebody has put one there meanwhile.
            Err(_) if root.dir.symlink_metadata(name).is_ok() => Ok(false),
            added => {
                added?;
                root.settle_name(name);
                Ok(true)
            }
        }
    };
    match write() {
        Ok(true) => Ok(Report(adapter)),
        Ok(false) => Err(ImportError::Taken { name: name.to_string() }),
        Err(source) => Err(ImportError::Folder { path: root.to_path_buf(), source }),
    }
}

/// Reads the adapter in `path`, which was made for `base`.
///
/// # Errors
/// When the file is no adapter, or one for another base or of a kind that cannot be written as PEFT's LoRA.
pub fn import(path: &Path, base: &GgufWeights) -> Result<AdapterFiles, ImportError> {
    let file = GgufFile::open(path)?;
    let texts = [("general.type", "adapter"), ("adapter.type", "lora"), ("general.architecture", base.architecture()?)];
    for (key, expected) in texts {
        let found = file.str(key)?;
        if found != expected {
            return Err(ImportError::Metadata { key, found: format!("{found:?}"), expected: format!("{expected:?}") });
        }
    }
    // An activated LoRA holds for what follows its words only.
    for key in ["adapter.alora.invocation_tokens", "adapter.lora.prompt_prefix"] {
        if let Some(found) = file.metadata(key) {
            let found = format!("{found:?}");
            return Err(ImportError::Metadata { key, found, expected: "an adapter without it".into() });
        }
    }
    let alpha = file.f32(ALPHA_KEY)?;
    if !alpha.is_finite() {
        return Err(ImportError::Metadata { key: ALPHA_KEY, found: alpha.to_string(), expected: "a number".into() });
    }
    let pairs = Reader::new(&file, base).pairs()?;
    let Some(first) = pairs.first() else { return Err(ImportError::Nothing) };

    let ranks: Map<String, Value> = pairs.iter().map(|pair| (pair.path.clone(), pair.rank.into())).collect();
    // llama.cpp takes an alpha of 0 for none: the product as it is.
    let is_unscaled = alpha == 0.0;
    let config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": first.rank,
        "lora_alpha": if is_unscaled { first.rank as f32 } else { alpha },
        "alpha_pattern": if is_unscaled { ranks.clone() } else { Map::new() },
        "rank_pattern": ranks,
        "target_modules": pairs.iter().map(|pair| pair.path.as_str()).collect::<Vec<_>>(),
    });
    let bytes = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    let tensors: Vec<(&String, [usize; 2], Vec<u8>)> = pairs
        .iter()
        .flat_map(|pair| &pair.tensors)
        .map(|(name, shape, values)| (name, *shape, bytes(values)))
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view = TensorView::new(Dtype::F32, shape.to_vec(), bytes).expect("as many bytes as the shape has elements");
        (name, view)
    });
    let weights = serialize(views, None).expect("every view was made from its own bytes");
    Ok(AdapterFiles { config: config.to_string().into_bytes(), manifest: None, weights })
}

struct Reader<'a> {
    file: &'a GgufFile,
    base: &'a GgufWeights,
    /// Names of the tensors that have found no place yet.
    left: BTreeSet<&'a str>,
}

impl<'a> Reader<'a> {
    fn new(file: &'a GgufFile, base: &'a GgufWeights) -> Self {
        Self { file, base, left: file.tensor_names().collect() }
    }

    /// Every pair of the file.
    fn pairs(mut self) -> Result<Vec<Pair>, ImportError> {
        let spec = self.base.spec();
        // Where several modules are one layer, its pair is theirs: the first of them stands for all.
        let is_matrix =
            |module: &Module| !matches!(module, Module::Expert(..)) && spec.file_rows(*module).first_row == 0;
        let sites =
            (0..spec.num_layers).flat_map(|layer| spec.modules().filter(is_matrix).map(move |module| (layer, module)));
        let base = self.base;
        let sites = sites.map(|(layer, module)| {
            let rows = spec.file_rows(module);
            let (in_features, _) = spec.module_shape(module);
            let tensor = format!("blk.{layer}.{}.weight", rows.part);
            (tensor, spec.module_path(layer, module), (in_features, rows.num_rows), base.row_order(module))
        });
        let head = (HEAD_TENSOR.to_string(), HEAD_PATH.to_string(), (spec.hidden_size, spec.vocab_size), None);
        let mut pairs = Vec::new();
        for (tensor, path, (in_features, out_features), rows) in sites.chain([head]) {
            let Some((rank, a, b)) = self.pair(&tensor, out_features, |rank| [rank, in_features])? else { continue };
            let b = match rows {
                Some(rows) => rows.iter().flat_map(|&row| b[row * rank..][..rank].iter().copied()).collect(),
                None => b,
            };
            let name = |part| format!("base_model.model.{path}.{part}.weight");
            let tensors = [(name("lora_A"), [rank, in_features], a), (name("lora_B"), [out_features, rank], b)];
            pairs.push(Pair { path, rank, tensors });
        }
        if let Some((rank, a, b)) = self.pair(EMBEDDING_TENSOR, spec.hidden_size, |rank| [spec.vocab_size, rank])? {
            let a = (0..rank).flat_map(|r| a[r..].iter().step_by(rank).copied()).collect();
            let name = |part| format!("base_model.model.{EMBEDDING_PATH}.{part}");
            let (a_name, b_name) = (name("lora_embedding_A"), name("lora_embedding_B"));
            let tensors = [(a_name, [rank, spec.vocab_size], a), (b_name, [spec.hidden_size, rank], b)];
            pairs.push(Pair { path: EMBEDDING_PATH.to_string(), rank, tensors });
        }
        match self.left.first() {
            Some(name) => {
                Err(tensor(name, "finds no place in the base: pairs lora_a and lora_b of its matrices are read"))
            }
            None => Ok(pairs),
        }
    }

    /// Rank, A of `a_shape` and B `[out, rank]` of the base's tensor `base_tensor`, row-major; `None` if the file has neither.
    #[expect(clippy::type_complexity, reason = "three values that are named where they are taken")]
    fn pair(
        &mut self,
        base_tensor: &str,
        out_features: usize,
        a_shape: impl Fn(usize) -> [usize; 2],
    ) -> Result<Option<(usize, Vec<f32>, Vec<f32>)>, ImportError> {
        let names = [format!("{base_tensor}.lora_a"), format!("{base_tensor}.lora_b")];
        let is_there = names.each_ref().map(|name| self.left.remove(name.as_str()));
        match is_there {
            [false, false] => return Ok(None),
            [true, true] => {}
            [has_a, _] => return Err(tensor(&names[usize::from(has_a)], "is missing: A and B come in pairs")),
        }
        let b = self.file.tensor(&names[1])?;
        let &[_, rank] = b.shape.as_slice() else { return Err(tensor(&names[1], "is no matrix")) };
        let a = self.values(&names[0], a_shape(rank))?;
        Ok(Some((rank, a, self.values(&names[1], [out_features, rank])?)))
    }

    fn values(&self, name: &str, shape: [usize; 2]) -> Result<Vec<f32>, ImportError> {
        let matrix = self.file.matrix(name, &shape)?;
        let mut values = vec![0.0; shape[0] * shape[1]];
        matrix.weight_type.dequantize_row(matrix.bytes, &mut values);
        Ok(values)
    }
}

fn tensor(name: &str, reason: &str) -> ImportError {
    ImportError::Tensor { name: name.to_string(), reason: reason.to_string() }
}
