//! `lorry feedback`: what users accepted, or edited outputs to, as files that an adapter is trained with. It reads the
//! experiments' database, beside a server or without one. What such files hold out is what a server checks an adapter on.

mod held_out;
mod pairs;
mod secrets;

use std::fs;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use tempfile::NamedTempFile;

use crate::experiments::{FileError, judged_replies};
pub use held_out::{HeldOut, count_trained_on, held_out};
use pairs::{Line, Pairs, Plan, Split};

/// What to write, and where.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// The experiment whose feedback it is.
    name: String,
    /// Folder for train.jsonl, dev.jsonl and test.jsonl, which are replaced; feedback-NAME when absent.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    #[command(flatten)]
    plan: Plan,
}

#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    #[error(transparent)]
    Read(#[from] FileError),
    #[error("{} cannot be written: {cause}", .path.display())]
    Write { path: PathBuf, cause: io::Error },
}

/// Writes the files, and says what is in them and what is not. `database` is where the experiments are recorded.
///
/// # Errors
/// The database has nothing of the experiment or cannot be read, or the files cannot be written.
pub fn export(database: &Path, args: &ExportArgs) -> Result<String, ExportError> {
    let pairs = Pairs::new(&judged_replies(database, &args.name)?, &args.plan);
    let dir = args.out.clone().unwrap_or_else(|| PathBuf::from(format!("feedback-{}", args.name)));
    write_files(&dir, &pairs).map_err(|cause| ExportError::Write { path: dir.clone(), cause })?;
    Ok(format!("{pairs}written to {}\n", dir.display()))
}

/// All of them, also the empty ones: none is to be left of an export before.
fn write_files(dir: &Path, pairs: &Pairs) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let write = |split| {
        // Nobody else may read it, and it is whole or not there.
        let file = NamedTempFile::new_in(dir)?;
        write_lines(file.as_file(), pairs.lines.get(&split).map_or(&[], Vec::as_slice))?;
        Ok((split, file))
    };
    let files: Vec<(Split, NamedTempFile)> = Split::ALL.into_iter().map(write).collect::<io::Result<_>>()?;
    for (split, file) in files {
        file.persist(dir.join(split.file_name()))?;
    }
    Ok(())
}

fn write_lines(file: &fs::File, lines: &[Line]) -> io::Result<()> {
    let mut out = BufWriter::new(file);
    for line in lines {
        serde_json::to_writer(&mut out, line)?;
        out.write_all(b"\n")?;
    }
    out.flush()
}
