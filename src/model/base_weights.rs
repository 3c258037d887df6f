//! The base's weights as an adapter's loader sees them: one row at a time, dequantized from the mapped file.

use std::path::Path;

use kernels::mapped_file::MappedRows;

use super::BaseWeights;
use super::decoder::{gguf_name, hugging_face_rows};
use super::gguf::{GgufError, GgufFile};
use super::spec::{ModelSpec, Module};

#[derive(Debug)]
pub struct GgufWeights {
    file: GgufFile,
    spec: ModelSpec,
    /// `[num_layers][Module as usize]`: a loader reads every row of a layer, so each is found without a look-up.
    layers: Vec<[MappedRows; Module::ALL.len()]>,
    /// `[Module as usize]`, where the file has its rows in another order than Hugging Face.
    row_orders: [Option<Vec<usize>>; Module::ALL.len()],
}

impl GgufWeights {
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        let file = GgufFile::open(path)?;
        let spec = file.spec()?;
        let rows = |layer: usize, module: Module| {
            let (in_features, out_features) = spec.module_shape(module);
            file.matrix_rows(&format!("blk.{layer}.{}.weight", gguf_name(module)), (out_features, in_features))
        };
        let mut layers = Vec::new();
        for layer in 0..spec.num_layers {
            let [q, k, v, o, gate, up, down] = Module::ALL.map(|module| rows(layer, module));
            layers.push([q?, k?, v?, o?, gate?, up?, down?]);
        }
        let row_orders = Module::ALL.map(|module| hugging_face_rows(&spec, module));
        Ok(Self { file, spec, layers, row_orders })
    }
}

impl BaseWeights for GgufWeights {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn dequantize_row(&self, layer: usize, module: Module, row: usize, values: &mut [f32]) -> Result<(), GgufError> {
        let row = self.row_orders[module as usize].as_ref().map_or(row, |order| order[row]);
        self.layers[layer][module as usize].dequantize_row(row, values);
        Ok(())
    }

    fn bias(&self, layer: usize, module: Module) -> Result<Option<Vec<f32>>, GgufError> {
        let (_, out_features) = self.spec.module_shape(module);
        let name = format!("blk.{layer}.{}.bias", gguf_name(module));
        if !self.file.has_tensor(&name) {
            return Ok(None);
        }
        let bias = self.file.vector(&name, out_features)?;
        Ok(Some(match &self.row_orders[module as usize] {
            Some(order) => order.iter().map(|&row| bias[row]).collect(),
            None => bias,
        }))
    }
}
