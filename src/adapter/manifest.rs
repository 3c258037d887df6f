//! `adapter.toml`: what an adapter is for, and the defaults its requests start from. Optional, beside the PEFT files.

use serde::Deserialize;

use super::error::AdapterError;
use crate::prompt::instruction;

pub const FILE: &str = "adapter.toml";
pub const MAX_FILE_BYTES: u64 = 64 << 10;

/// Every key is optional; an unknown one is refused.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdapterManifest {
    /// The coding task it was trained for.
    pub task: Option<String>,
    pub description: Option<String>,
    /// The base it was trained on.
    pub base: Option<String>,
    pub licence: Option<String>,
    /// Loaded first and never evicted.
    pub pin: bool,
    /// SHA-256 of `adapter_model.safetensors`, hexadecimal.
    pub sha256: Option<String>,
    /// Template over `instruction` that renders the prompt it was trained with.
    pub prompt: Option<String>,
    /// Texts that end its output.
    pub stop: Vec<String>,
    pub sampling: SamplingDefaults,
}

/// Used where a request does not say otherwise.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SamplingDefaults {
    /// 0 is greedy.
    pub temperature: Option<f32>,
    /// Above 0, at most 1.
    pub top_p: Option<f32>,
    /// At least 1.
    pub max_tokens: Option<usize>,
}

impl AdapterManifest {
    /// # Errors
    /// When the text is not TOML, or a key is unknown, of the wrong type or out of range; names it.
    pub fn parse(text: &[u8]) -> Result<Self, AdapterError> {
        let manifest: Self = toml::from_slice(text).map_err(|e| AdapterError::parse(FILE, e.to_string().trim_end()))?;
        let refuse = |key, reason: &str| Err(AdapterError::manifest(key, reason));
        let SamplingDefaults { temperature, top_p, max_tokens } = manifest.sampling;
        if temperature.is_some_and(|t| !(t.is_finite() && t >= 0.0)) {
            return refuse("sampling.temperature", "must be 0 or more");
        }
        if top_p.is_some_and(|p| !(p > 0.0 && p <= 1.0)) {
            return refuse("sampling.top_p", "must be above 0 and at most 1");
        }
        if max_tokens == Some(0) {
            return refuse("sampling.max_tokens", "must be at least 1");
        }
        if manifest.sha256.as_deref().is_some_and(|sha256| !is_sha256(sha256)) {
            return refuse("sha256", "must be 64 hexadecimal digits");
        }
        if manifest.stop.iter().any(String::is_empty) {
            return refuse("stop", "an empty text would end every output at once");
        }
        if let Some(Err(e)) = manifest.prompt.as_deref().map(instruction::check) {
            return refuse("prompt", &e.to_string());
        }
        Ok(manifest)
    }
}

fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_read() {
        let manifest = AdapterManifest::parse(
            br#"
            task = "python-one-liner"
            description = "Intent to code"
            base = "qwen2.5-coder:0.5b"
            licence = "MIT"
            pin = true
            sha256 = "00112233445566778899aabbccddeeff00112233445566778899AABBCCDDEEFF"
            prompt = "{{ instruction }}\n"
            stop = ["\n", "```"]
            [sampling]
            temperature = 0
            top_p = 0.95
            max_tokens = 64
            "#,
        )
        .unwrap();
        assert_eq!(manifest.prompt.as_deref(), Some("{{ instruction }}\n"));
        assert!(manifest.pin && manifest.sha256.is_some());
        assert_eq!(manifest.stop, ["\n", "```"]);
        let sampling = SamplingDefaults { temperature: Some(0.0), top_p: Some(0.95), max_tokens: Some(64) };
        assert_eq!(manifest.sampling, sampling);
    }

    #[test]
    fn an_empty_file_says_nothing() {
        assert_eq!(AdapterManifest::parse(b"").unwrap(), AdapterManifest::default());
    }

    #[test]
    fn a_bad_key_is_refused_by_name() {
        for (text, name) in [
            ("promt = 'x'", "promt"),
            ("stop = 'x'", "stop"),
            ("pin = 1", "pin"),
            ("sha256 = '00'", "sha256"),
            ("stop = ['']", "stop"),
            ("[sampling]\ntop_k = 3", "top_k"),
            ("[sampling]\ntemperature = -0.1", "temperature"),
            ("[sampling]\ntemperature = nan", "temperature"),
            ("[sampling]\ntop_p = 0.0", "top_p"),
            ("[sampling]\nmax_tokens = 0", "max_tokens"),
            ("[sampling]\nmax_tokens = -1", "max_tokens"),
        ] {
            let refusal = AdapterManifest::parse(text.as_bytes()).unwrap_err().to_string();
            assert!(refusal.contains(FILE) && refusal.contains(name), "{text}: {refusal}");
        }
    }
}
