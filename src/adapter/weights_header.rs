//! The header of a safetensors file: what is in it, known before any weight is read.

use safetensors::tensor::Metadata;

use super::error::AdapterError;
use super::files::WEIGHTS_FILE;

pub const MAX_HEADER_BYTES: u64 = 16 << 20;
/// Bytes at the beginning that say how long the header is.
pub const PREFIX_BYTES: usize = 8;

/// The bytes that the header takes after the prefix; `start` is the beginning of a file of `file_len` bytes.
///
/// # Errors
/// When this is no safetensors file, or the length is above the limit or beyond the end of the file.
pub fn length(start: &[u8], file_len: u64) -> Result<usize, AdapterError> {
    if file_len == 0 {
        return Err(AdapterError::Empty { file: WEIGHTS_FILE });
    }
    if start.starts_with(b"version ") {
        return Err(AdapterError::LfsPointer { file: WEIGHTS_FILE });
    }
    let Some((length, _)) = start.split_first_chunk::<PREFIX_BYTES>() else {
        return Err(AdapterError::header(format!("the file has {file_len} bytes only")));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        return Err(AdapterError::header(format!(
            "its length of {length} bytes is above the {MAX_HEADER_BYTES} allowed"
        )));
    }
    if length > file_len.saturating_sub(PREFIX_BYTES as u64) {
        return Err(AdapterError::header(format!("its length of {length} bytes reaches beyond the end of the file")));
    }
    Ok(usize::try_from(length).unwrap_or(usize::MAX))
}

/// Reads `header`, the bytes after the prefix, of a file of `file_len` bytes.
///
/// # Errors
/// When it is malformed, or describes more bytes than the file has.
pub fn parse(header: &[u8], file_len: u64) -> Result<Metadata, AdapterError> {
    let metadata: Metadata = serde_json::from_slice(header).map_err(AdapterError::header)?;
    let found = usize::try_from(file_len).unwrap_or(usize::MAX).saturating_sub(PREFIX_BYTES + header.len());
    if metadata.data_len() > found {
        return Err(AdapterError::Truncated { file: WEIGHTS_FILE, expected: metadata.data_len(), found });
    }
    Ok(metadata)
}

/// About what the weights will take in memory, in bytes: matrices as f16 with their rows padded as the kernels want
/// them, all else as f32. What the layers of a VeRA share in the file, each has of its own in memory.
pub fn resident_bytes(metadata: &Metadata) -> u64 {
    let count = |shape: &[usize]| shape.iter().fold(1, |count: u64, n| count.saturating_mul(*n as u64));
    let tensors = metadata.tensors();
    let most_inputs = tensors.iter().find(|(key, _)| key.contains("vera_A")).and_then(|(_, info)| info.shape.get(1));
    let rank = tensors.iter().find(|(key, _)| key.contains("vera_B")).and_then(|(_, info)| info.shape.get(1));
    let bytes = |key: &str, shape: &[usize]| match *shape {
        _ if key.contains("vera_A") || key.contains("vera_B") => 0,
        [rank] if key.contains("vera_lambda_d") => count(&[rank, *most_inputs.unwrap_or(&0)]).saturating_mul(2),
        [outputs] if key.contains("vera_lambda_b") => count(&[outputs, *rank.unwrap_or(&0)]).saturating_mul(2),
        [rows, columns] if rows.min(columns) > 1 && !key.ends_with("prompt_embeddings") => {
            count(&[rows.saturating_add(7) / 8 * 8, columns]).saturating_mul(2)
        }
        _ => count(shape).saturating_mul(4),
    };
    tensors.iter().map(|(key, info)| bytes(key, &info.shape)).fold(0, u64::saturating_add)
}
