//! The first step of a pass: each row's token, real or virtual, becomes its hidden state.

use crate::canonical::{AdapterWeights, Prelude};
use crate::device::DeviceError;
use crate::mapped_file::MappedRows;
use crate::shape::DecoderShape;
use crate::step::{RowToken, Step};

/// A row of a batch that is a position of its adapter's prelude.
#[derive(Debug, Clone, Copy)]
pub struct VirtualRow {
    pub row: usize,
    /// Index into the step's groups.
    pub group: usize,
    /// Position in the prelude.
    pub position: usize,
}

/// Writes the hidden state of every row, `[rows, hidden_size]`, and lists the virtual rows.
pub fn look_up(
    embedding: &MappedRows,
    step: &Step<'_>,
    shape: DecoderShape,
    hidden: &mut [f32],
    virtual_rows: &mut Vec<VirtualRow>,
) -> Result<(), DeviceError> {
    virtual_rows.clear();
    let rows = step.rows(shape.vocab_size).zip(hidden.chunks_exact_mut(shape.hidden_size));
    for (row, (token, hidden)) in rows.enumerate() {
        let (token, group) = token.map_err(DeviceError::Token)?;
        let weights = group.map(|group| (step.groups.get)(group).weights);
        match (token, group, weights) {
            (RowToken::Virtual(position), Some(group), Some(weights)) => {
                fill_virtual(weights, position, hidden);
                scale(hidden, shape.prompt_scale);
                virtual_rows.push(VirtualRow { row, group, position });
            }
            (RowToken::Virtual(_), ..) => unreachable!("a virtual token is of its group's prelude"),
            (RowToken::Real(token), _, weights) => {
                embedding.dequantize_row(token, hidden);
                if let Some(delta) = weights.and_then(|weights| weights.embedding.as_ref()) {
                    delta.add_to(token, hidden);
                }
                scale(hidden, shape.embedding_scale);
            }
        }
    }
    Ok(())
}

fn scale(row: &mut [f32], factor: f32) {
    if factor != 1.0 {
        row.iter_mut().for_each(|value| *value *= factor);
    }
}

fn fill_virtual(weights: &AdapterWeights, position: usize, hidden: &mut [f32]) {
    match &weights.prelude {
        Some(Prelude::Embeddings { rows, .. }) => {
            hidden.copy_from_slice(&rows[position * hidden.len()..][..hidden.len()]);
        }
        // Keys and values are replaced in every layer, and nothing else of this row is read by another.
        Some(Prelude::KeyValues { .. }) | None => hidden.fill(0.0),
    }
}
