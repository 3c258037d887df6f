//! The base's weights as an adapter's loader sees them: one row at a time, dequantized from the mapped file.

use std::path::Path;

use super::BaseWeights;
use super::decoder::{gguf_name, hugging_face_rows};
use super::gguf::{GgufError, GgufFile};
use super::spec::{ModelSpec, Module};

#[derive(Debug)]
pub struct GgufWeights {
    file: GgufFile,
    spec: ModelSpec,
}

impl GgufWeights {
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        let file = GgufFile::open(path)?;
        let spec = file.spec()?;
        Ok(Self { file, spec })
    }
}

impl BaseWeights for GgufWeights {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn dequantize_row(&self, layer: usize, module: Module, row: usize, values: &mut [f32]) -> Result<(), GgufError> {
        let (in_features, out_features) = self.spec.module_shape(module);
        let name = format!("blk.{layer}.{}.weight", gguf_name(module));
        let row = hugging_face_rows(&self.spec, module).map_or(row, |order| order[row]);
        self.file.matrix(&name, (out_features, in_features))?.dequantize_row(row, values);
        Ok(())
    }

    fn bias(&self, layer: usize, module: Module) -> Result<Option<Vec<f32>>, GgufError> {
        let (_, out_features) = self.spec.module_shape(module);
        let name = format!("blk.{layer}.{}.bias", gguf_name(module));
        if !self.file.has_tensor(&name) {
            return Ok(None);
        }
        let bias = self.file.vector(&name, out_features)?;
        Ok(Some(match hugging_face_rows(&self.spec, module) {
            Some(order) => order.iter().map(|&row| bias[row]).collect(),
            None => bias,
        }))
    }
}
