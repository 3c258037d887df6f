//! `lorry adapters check`: what an adapter would change, without serving it.

use std::fmt;
use std::path::Path;

use super::canonical::Adapter;
use super::error::AdapterError;
use super::files::AdapterFiles;
use super::loader;
use crate::model::BaseWeights;

/// What is known of an adapter that fits its base. Displayed with one line for each fact.
#[derive(Debug)]
pub struct Report(pub Adapter);

/// Loads the adapter in `dir`, as a server would.
///
/// # Errors
/// Why a server would refuse it.
pub fn check(dir: &Path, base: &dyn BaseWeights) -> Result<Report, AdapterError> {
    let files = AdapterFiles::read(dir)?;
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    loader::load(&name, &files, base).map(Report)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Adapter { method, generation, coverage, manifest, .. } = &self.0;
        writeln!(f, "method          {method}")?;
        writeln!(f, "sites           {} of {}", coverage.num_sites, coverage.num_expected_sites)?;
        writeln!(f, "largest rank    {}", coverage.max_rank)?;
        writeln!(f, "virtual tokens  {}", self.0.num_virtual_tokens())?;
        writeln!(f, "memory          {} bytes", coverage.resident_bytes)?;
        writeln!(f, "generation      {generation}")?;
        let facts = [
            ("task", &manifest.task),
            ("description", &manifest.description),
            ("base", &manifest.base),
            ("licence", &manifest.licence),
            ("prompt", &manifest.prompt),
        ];
        for (key, fact) in facts {
            if let Some(fact) = fact {
                writeln!(f, "{key:15} {fact:?}")?;
            }
        }
        if !manifest.stop.is_empty() {
            writeln!(f, "stop            {:?}", manifest.stop)?;
        }
        write!(f, "pinned          {}", if manifest.pin { "yes" } else { "no" })
    }
}
