//! `[fine_tuning]` of the configuration.

use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Where files and jobs lie below the folder for models, unless the configuration says otherwise.
const DEFAULT_DIR: &str = "state/fine_tuning";
const MAX_NICE: i32 = 19;

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FineTuningConfig {
    pub enabled: bool,
    dir: PathBuf,
    /// The trainer and its first arguments.
    pub command: Vec<String>,
    /// 0 for no limit.
    pub max_memory_mib: u64,
    pub nice: i32,
    pub max_file_mib: u64,
    pub max_files_mib: u64,
}

impl FineTuningConfig {
    /// The folder with files and jobs; `home` is the folder for models.
    pub fn dir(&self, home: &Path) -> PathBuf {
        if self.dir.as_os_str().is_empty() { home.join(DEFAULT_DIR) } else { self.dir.clone() }
    }

    /// # Errors
    /// Names the key at fault.
    pub fn validate(&self) -> Result<(), String> {
        if self.command.first().is_none_or(String::is_empty) {
            return Err("fine_tuning.command must begin with a program".to_owned());
        }
        if !(0..=MAX_NICE).contains(&self.nice) {
            return Err(format!("fine_tuning.nice must be from 0 to {MAX_NICE}, not {}", self.nice));
        }
        if self.max_file_mib == 0 || self.max_files_mib < self.max_file_mib {
            return Err("fine_tuning.max_file_mib must be at least 1, and at most fine_tuning.max_files_mib".to_owned());
        }
        Ok(())
    }

    /// Of one file.
    pub fn max_file_bytes(&self) -> u64 {
        self.max_file_mib.saturating_mul(1 << 20)
    }

    /// Of all files together.
    pub fn max_files_bytes(&self) -> u64 {
        self.max_files_mib.saturating_mul(1 << 20)
    }
}
