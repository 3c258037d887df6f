//! The base's weights as an adapter's loader sees them: one row at a time, dequantized from the mapped file.

use std::path::Path;

use kernels::mapped_file::MappedRows;

use super::decoder::{hugging_face_rows, load_bias};
use super::gguf::{GgufError, GgufFile};
use super::spec::{ModelSpec, Module};
use super::{BaseWeights, VocabularyMatrix};

/// The matrix of the embedding, `[vocab_size, hidden_size]`.
pub const EMBEDDING_TENSOR: &str = "token_embd.weight";
/// That of the head, where the base does not tie the two.
pub const HEAD_TENSOR: &str = "output.weight";

#[derive(Debug)]
pub struct GgufWeights {
    file: GgufFile,
    spec: ModelSpec,
    /// `[num_layers][Module::index]`: a loader reads every row of a layer, so each is found without a look-up.
    layers: Vec<Vec<Option<MappedRows>>>,
    /// `[Module::index]` of attention, where the file has the rows in another order than Hugging Face.
    row_orders: [Option<Vec<usize>>; Module::ATTENTION.len()],
    embedding: MappedRows,
    head: MappedRows,
}

impl GgufWeights {
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        let file = GgufFile::open(path)?;
        let spec = file.spec()?;
        let mut layers = Vec::new();
        for layer in 0..spec.num_layers {
            let mut matrices = Vec::new();
            for module in spec.modules() {
                let rows = spec.file_rows(module);
                let (in_features, _) = spec.module_shape(module);
                let name = format!("blk.{layer}.{}.weight", rows.part);
                matrices.resize(matrices.len().max(module.index() + 1), None);
                matrices[module.index()] = Some(file.matrix_rows(&name, &rows.shape(in_features))?);
            }
            layers.push(matrices);
        }
        let row_orders = Module::ATTENTION.map(|module| hugging_face_rows(&spec, module));
        let vocabulary = |name| file.matrix_rows(name, &[spec.vocab_size, spec.hidden_size]);
        let embedding = vocabulary(EMBEDDING_TENSOR)?;
        let head = if file.has_tensor(HEAD_TENSOR) { vocabulary(HEAD_TENSOR)? } else { embedding.clone() };
        Ok(Self { file, spec, layers, row_orders, embedding, head })
    }

    fn vocabulary(&self, matrix: VocabularyMatrix) -> &MappedRows {
        match matrix {
            VocabularyMatrix::Embedding => &self.embedding,
            VocabularyMatrix::Head => &self.head,
        }
    }

    /// GGUF's name of the architecture.
    ///
    /// # Errors
    /// When the file does not say it.
    pub fn architecture(&self) -> Result<&str, GgufError> {
        self.file.str("general.architecture")
    }

    /// Which row of the file holds each row of the Hugging Face model, where the two differ.
    pub fn row_order(&self, module: Module) -> Option<&[usize]> {
        self.row_orders.get(module.index())?.as_deref()
    }
}

impl BaseWeights for GgufWeights {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn dequantize_row(&self, layer: usize, module: Module, row: usize, values: &mut [f32]) -> Result<(), GgufError> {
        let row = self.row_order(module).map_or(row, |order| order[row]);
        let name = || GgufError::MissingTensor(format!("blk.{layer}.{}.weight", self.spec.file_rows(module).part));
        let matrix = self.layers[layer].get(module.index()).and_then(Option::as_ref).ok_or_else(name)?;
        matrix.dequantize_row(self.spec.file_rows(module).first_row + row, values);
        Ok(())
    }

    fn dequantize_token(&self, matrix: VocabularyMatrix, token: usize, values: &mut [f32]) {
        self.vocabulary(matrix).dequantize_row(token, values);
    }

    fn bits_per_weight(&self, matrix: VocabularyMatrix) -> f64 {
        let rows = self.vocabulary(matrix);
        8.0 * rows.place.len() as f64 / (rows.num_rows * self.spec.hidden_size) as f64
    }

    fn bias(&self, layer: usize, module: Module) -> Result<Option<Vec<f32>>, GgufError> {
        let (_, out_features) = self.spec.module_shape(module);
        let rows = self.spec.file_rows(module);
        let name = format!("blk.{layer}.{}", rows.part);
        let Some(bias) = load_bias(&self.file, &name, &rows, out_features)? else { return Ok(None) };
        Ok(Some(match self.row_order(module) {
            Some(order) => order.iter().map(|&row| bias[row]).collect(),
            None => bias,
        }))
    }
}
