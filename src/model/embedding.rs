//! The first step of a pass: each row's token, real or virtual, becomes its hidden state.

use super::gguf::{GgufError, GgufFile, MatrixRows};
use super::spec::ModelSpec;
use super::{AdapterGroup, FIRST_VIRTUAL_TOKEN, ForwardBatch, StepError};
use crate::adapter::canonical::Prelude;

/// The embedding stays in the mapped file: a token reads one row of it.
#[derive(Debug)]
pub struct Embedding {
    file: GgufFile,
    rows: MatrixRows,
    vocab_size: usize,
    hidden_size: usize,
}

/// A row of a batch that is a position of its adapter's prelude.
#[derive(Debug, Clone, Copy)]
pub struct VirtualRow {
    pub row: usize,
    /// Index into the batch's groups.
    pub group: usize,
    /// Position in the prelude.
    pub position: usize,
}

impl Embedding {
    pub fn new(file: GgufFile, name: &str, spec: &ModelSpec) -> Result<Self, GgufError> {
        let (vocab_size, hidden_size) = (spec.vocab_size, spec.hidden_size);
        let rows = file.matrix_rows(name, (vocab_size, hidden_size))?;
        Ok(Self { file, rows, vocab_size, hidden_size })
    }

    /// Writes the hidden state of every row, `[rows, hidden_size]`, and lists the virtual rows.
    pub fn look_up(
        &self,
        batch: &ForwardBatch<'_>,
        hidden: &mut [f32],
        virtual_rows: &mut Vec<VirtualRow>,
    ) -> Result<(), StepError> {
        virtual_rows.clear();
        let mut groups = batch.groups.iter().enumerate().peekable();
        for (row, (&token, hidden)) in batch.tokens.iter().zip(hidden.chunks_exact_mut(self.hidden_size)).enumerate() {
            while groups.next_if(|(_, group)| group.rows.end <= row).is_some() {}
            let group = groups.peek().filter(|(_, group)| group.rows.contains(&row));
            match (token.checked_sub(FIRST_VIRTUAL_TOKEN), group) {
                (Some(position), Some(&(index, group))) => {
                    let position = position as usize;
                    fill_virtual(group, position, hidden).ok_or(StepError::Token(token))?;
                    virtual_rows.push(VirtualRow { row, group: index, position });
                }
                (None, group) if (token as usize) < self.vocab_size => {
                    self.file.dequantize_row(&self.rows, token as usize, hidden);
                    if let Some(delta) = group.and_then(|(_, group)| group.adapter.embedding.as_ref()) {
                        delta.add_to(token as usize, hidden);
                    }
                }
                _ => return Err(StepError::Token(token)),
            }
        }
        Ok(())
    }
}

/// `None` when the group's adapter has no such position.
fn fill_virtual(group: &AdapterGroup, position: usize, hidden: &mut [f32]) -> Option<()> {
    match group.adapter.prelude.as_ref().filter(|prelude| position < prelude.num_tokens())? {
        Prelude::Embeddings { rows, .. } => hidden.copy_from_slice(&rows[position * hidden.len()..][..hidden.len()]),
        // Keys and values are replaced in every layer, and nothing else of this row is read by another.
        Prelude::KeyValues { .. } => hidden.fill(0.0),
    }
    Some(())
}
