//! The log of the process, on standard error.

use std::env;
use std::io::{IsTerminal, stderr};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;

use crate::config::LogFormat;

/// What operators need.
const DEFAULT: &str = "info,notify=warn";

#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("RUST_LOG {directives:?}: {source}; write a level, or `TARGET=LEVEL`, with commas between several")]
    Directives { directives: String, source: ParseError },
    #[error("RUST_LOG is not UTF-8")]
    NotUnicode,
}

/// Begins to write what `RUST_LOG` asks for, or else what operators need.
///
/// # Errors
/// `RUST_LOG` cannot be read.
///
/// # Panics
/// When it is called twice.
pub fn start(format: LogFormat) -> Result<(), LogError> {
    let directives = env::var_os(EnvFilter::DEFAULT_ENV).unwrap_or_default();
    let filter = filter(directives.to_str().ok_or(LogError::NotUnicode)?)?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(stderr);
    match format {
        LogFormat::Text => log.with_ansi(stderr().is_terminal()).init(),
        LogFormat::Json => log.json().flatten_event(true).with_span_list(false).init(),
    }
    Ok(())
}

fn filter(directives: &str) -> Result<EnvFilter, LogError> {
    let asked = if directives.trim().is_empty() { DEFAULT } else { directives };
    EnvFilter::try_new(asked).map_err(|source| LogError::Directives { directives: directives.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_read_is_refused_and_nothing_is_the_default() {
        for directives in ["info,lorry::request=wran", "=info", "info,lorry=6x"] {
            let error = filter(directives).unwrap_err().to_string();
            assert!(error.contains("RUST_LOG") && error.contains(directives), "{error}");
        }
        let written = |directives: &str| filter(directives).unwrap().to_string();
        assert_eq!((written(""), written(" ")), (written(DEFAULT), written(DEFAULT)));
        assert_ne!(written("info,lorry::request=warn"), written(DEFAULT));
    }
}
