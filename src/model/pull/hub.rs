//! Model files from the hub, through its own client.

use std::panic;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::Duration;

use hf_hub::api::Progress;
use hf_hub::api::sync::ApiBuilder;
use indicatif::ProgressBar;

use super::SourceError;
use crate::model::catalogue::HubFile;

/// The client sets no bound on a silent server, so this one ends a download: the longest wait for the next byte.
const MAX_SILENCE: Duration = Duration::from_secs(20);

/// What the download thread reports.
enum Report {
    Size(u64),
    Received(u64),
    Ended(Result<PathBuf, String>),
}

/// Downloads `file` into `dir`. The client reads `HF_ENDPOINT` and `HF_HOME`; `HF_TOKEN` is passed to it here.
pub(super) fn fetch(file: &HubFile, dir: &Path, bar: &ProgressBar) -> Result<PathBuf, SourceError> {
    let (reports, received) = mpsc::channel();
    let (file, dir) = (file.clone(), dir.to_path_buf());
    thread::Builder::new().name("lorry-hub".to_string()).spawn(move || {
        let result = download(&file, dir, Reporter(reports.clone()));
        // Nobody listens when the wait was given up.
        let _ = reports.send(Report::Ended(result));
    })?;
    let mut size_bytes = None;
    loop {
        match received.recv_timeout(MAX_SILENCE) {
            Ok(Report::Size(size)) => {
                size_bytes = Some(size);
                bar.set_length(size);
            }
            Ok(Report::Received(len)) => bar.inc(len),
            Ok(Report::Ended(Ok(path))) => {
                let got = path.metadata()?.len();
                return match size_bytes {
                    Some(expected) if expected != got => Err(SourceError::Size { got, expected }),
                    _ => Ok(path),
                };
            }
            Ok(Report::Ended(Err(reason))) => return Err(SourceError::Hub(reason)),
            Err(RecvTimeoutError::Timeout) => {
                return Err(SourceError::Hub(format!("no answer for {} seconds", MAX_SILENCE.as_secs())));
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err(SourceError::Hub("its client ended without a result".to_string()));
            }
        }
    }
}

fn download(file: &HubFile, cache_dir: PathBuf, reporter: Reporter) -> Result<PathBuf, String> {
    let mut builder = ApiBuilder::from_env().with_progress(false).with_cache_dir(cache_dir);
    let token = std::env::var("HF_TOKEN").ok().filter(|token| !token.is_empty());
    if token.is_some() {
        builder = builder.with_token(token);
    }
    let repo = builder.build().map_err(|e| e.to_string())?.model(file.repo.clone());
    repo.download_with_progress(&file.file, reporter).map_err(|e| e.to_string())
}

struct Reporter(Sender<Report>);

impl Reporter {
    fn report(&self, report: Report) {
        if self.0.send(report).is_err() {
            // The wait was given up. The client cannot be cancelled, so its thread is unwound, without a message.
            panic::resume_unwind(Box::new(()));
        }
    }
}

impl Progress for Reporter {
    fn init(&mut self, size: usize, _filename: &str) {
        self.report(Report::Size(size as u64));
    }

    fn update(&mut self, size: usize) {
        self.report(Report::Received(size as u64));
    }

    fn finish(&mut self) {}
}
