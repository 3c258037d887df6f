//! What a GGUF file says about itself, for clients that show it.

use std::path::Path;
use std::time::SystemTime;

use super::gguf::{GgufError, GgufFile};

/// The file of the resident base.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelFile {
    /// As `general.architecture` names it.
    pub architecture: String,
    /// Of all tensors.
    pub num_parameters: u64,
    /// As llama.cpp names the mix of weight types, e.g. `Q4_K_M`.
    pub quantization: &'static str,
    pub size_bytes: u64,
    pub modified: SystemTime,
    /// Tokens that the model was trained to see at once.
    pub trained_context_length: usize,
    pub hidden_size: usize,
}

/// `general.file_type` of GGUF.
const FILE_TYPES: [(usize, &str); 20] = [
    (0, "F32"),
    (1, "F16"),
    (2, "Q4_0"),
    (3, "Q4_1"),
    (7, "Q8_0"),
    (8, "Q5_0"),
    (9, "Q5_1"),
    (10, "Q2_K"),
    (11, "Q3_K_S"),
    (12, "Q3_K_M"),
    (13, "Q3_K_L"),
    (14, "Q4_K_S"),
    (15, "Q4_K_M"),
    (16, "Q5_K_S"),
    (17, "Q5_K_M"),
    (18, "Q6_K"),
    (21, "Q2_K_S"),
    (25, "IQ4_NL"),
    (30, "IQ4_XS"),
    (32, "BF16"),
];

impl ModelFile {
    /// # Errors
    /// The file names no architecture, or is gone.
    pub fn read(path: &Path, gguf: &GgufFile) -> Result<Self, GgufError> {
        let open = |source| GgufError::Open { path: path.to_path_buf(), source };
        let metadata = path.metadata().map_err(open)?;
        let file_type = gguf.usize("general.file_type").ok();
        let named = FILE_TYPES.iter().find(|(number, _)| Some(*number) == file_type);
        let architecture = gguf.str("general.architecture")?.to_owned();
        Ok(Self {
            trained_context_length: gguf.usize(&format!("{architecture}.context_length"))?,
            hidden_size: gguf.usize(&format!("{architecture}.embedding_length"))?,
            architecture,
            num_parameters: gguf.num_parameters(),
            quantization: named.map_or("unknown", |(_, name)| name),
            size_bytes: metadata.len(),
            modified: metadata.modified().map_err(open)?,
        })
    }

    /// The number of parameters as people write it: `494.03M`, `7.62B`.
    pub fn parameter_size(&self) -> String {
        match self.num_parameters as f64 {
            count if count >= 1e9 => format!("{:.2}B", count / 1e9),
            count if count >= 1e6 => format!("{:.2}M", count / 1e6),
            count => format!("{:.2}K", count / 1e3),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_of_parameters_is_written_in_its_own_unit() {
        let size = |num_parameters| {
            let file = ModelFile {
                architecture: "llama".to_owned(),
                num_parameters,
                quantization: "F16",
                size_bytes: 0,
                modified: SystemTime::UNIX_EPOCH,
                trained_context_length: 64,
                hidden_size: 2,
            };
            file.parameter_size()
        };
        assert_eq!([size(512), size(494_032_768), size(7_615_616_512)], ["0.51K", "494.03M", "7.62B"]);
    }
}
