//! Matrices that are not quantized (F16, BF16, F32), on the host: the library's layers, held in f32.

use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use kernels::device::MatrixSource;
use kernels::host::RowProduct;
use mistralrs_quant::{GgufMatMul, QuantMethod, QuantMethodConfig};

#[derive(Debug)]
struct Unquantized(GgufMatMul);

impl RowProduct for Unquantized {
    fn multiply_row(&self, x: &[f32], y: &mut [f32]) -> Result<(), String> {
        let product = || {
            let y = self.0.forward(&Tensor::from_slice(x, (1, x.len()), &Device::Cpu)?)?;
            y.flatten_all()?.to_vec1::<f32>()
        };
        y.copy_from_slice(&product().map_err(|e| e.to_string())?);
        Ok(())
    }
}

/// # Errors
/// When the library refuses the matrix, in words.
pub fn load(source: &MatrixSource<'_>) -> Result<Arc<dyn RowProduct>, String> {
    let (out_features, in_features) = source.shape;
    let row_bytes = source.weight_type.row_bytes(in_features).ok_or("its rows do not divide into blocks")?;
    let mut rows = vec![0.0; out_features * in_features];
    for (i, row) in rows.chunks_exact_mut(in_features).enumerate() {
        let index = source.row_order.map_or(i, |order| order[i]);
        source.weight_type.dequantize_row(&source.bytes[index * row_bytes..][..row_bytes], row);
    }
    let build = || -> candle_core::Result<GgufMatMul> {
        let rows = Tensor::from_vec(rows, (out_features, in_features), &Device::Cpu)?;
        let q_weight = Arc::new(QTensor::quantize(&rows, GgmlDType::F32)?);
        GgufMatMul::new(QuantMethodConfig::Gguf { q_weight, b: None })
    };
    Ok(Arc::new(Unquantized(build().map_err(|e| e.to_string())?)))
}
