//! Where a decoder's weights come from.

use kernels::mapped_file::MappedRows;

use super::gguf::{GgufError, GgufFile, RawTensor};

/// Tensors under GGUF's names.
pub trait Tensors {
    fn has_tensor(&self, name: &str) -> bool;

    /// A matrix `[out, in]`, or several `[matrices, out, in]`, of exactly this shape.
    ///
    /// # Errors
    /// When there is none, or one of another shape or of a type that this server does not know.
    fn matrix(&self, name: &str, shape: &[usize]) -> Result<RawTensor<'_>, GgufError>;

    /// The rows of such a tensor, to be kept.
    ///
    /// # Errors
    /// As [`Tensors::matrix`].
    fn matrix_rows(&self, name: &str, shape: &[usize]) -> Result<MappedRows, GgufError>;

    /// A vector of exactly this length, as f32.
    ///
    /// # Errors
    /// As [`Tensors::matrix`].
    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, GgufError>;

    /// What was read so far will not be read again soon.
    fn release_pages(&mut self);
}

impl Tensors for GgufFile {
    fn has_tensor(&self, name: &str) -> bool {
        self.has_tensor(name)
    }

    fn matrix(&self, name: &str, shape: &[usize]) -> Result<RawTensor<'_>, GgufError> {
        self.matrix(name, shape)
    }

    fn matrix_rows(&self, name: &str, shape: &[usize]) -> Result<MappedRows, GgufError> {
        self.matrix_rows(name, shape)
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, GgufError> {
        self.vector(name, len)
    }

    fn release_pages(&mut self) {
        self.release_pages();
    }
}
