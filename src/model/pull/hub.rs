//! Model files from the hub, through its own client.

use std::panic;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::Duration;

use hf_hub::Repo;
use hf_hub::api::sync::{Api, ApiBuilder};
use hf_hub::api::{Progress, RepoInfo};
use indicatif::ProgressBar;

use super::{SourceError, verified};

/// The client sets no bound on a silent server, so this one ends a download: the longest wait for the next byte.
const MAX_SILENCE: Duration = Duration::from_secs(20);
/// How often a download that breaks off goes on from there.
const MAX_RETRIES: usize = 3;

/// What the download thread reports.
enum Report {
    Size(u64),
    Received(u64),
    Ended(Result<PathBuf, String>),
}

/// What is in a repository.
pub(crate) fn info(repo: &Repo) -> Result<RepoInfo, String> {
    client(None).and_then(|client| client.repo(repo.clone()).info().map_err(|e| e.to_string()))
}

/// Downloads a file of at most `max_bytes` into `dir`, from where a download into it broke off. It is what the hub says it is.
pub(crate) fn fetch(
    repo: &Repo,
    file: &str,
    max_bytes: u64,
    dir: &Path,
    bar: &ProgressBar,
) -> Result<PathBuf, SourceError> {
    let (reports, received) = mpsc::channel();
    let (repo, file, dir) = (repo.clone(), file.to_owned(), dir.to_path_buf());
    thread::Builder::new().name("lorry-hub".to_string()).spawn(move || {
        let reporter = Reporter(reports.clone());
        let result = client(Some(dir))
            .and_then(|client| client.repo(repo).download_with_progress(&file, reporter).map_err(|e| e.to_string()));
        // Nobody listens when the wait was given up.
        let _ = reports.send(Report::Ended(result));
    })?;
    let mut size_bytes = None;
    loop {
        match received.recv_timeout(MAX_SILENCE) {
            Ok(Report::Size(size)) if size > max_bytes => {
                return Err(SourceError::Hub(format!("it has {size} bytes, {max_bytes} are allowed")));
            }
            Ok(Report::Size(size)) => {
                size_bytes = Some(size);
                bar.set_length(size);
                // What is there already comes as received.
                bar.set_position(0);
            }
            Ok(Report::Received(len)) => bar.inc(len),
            Ok(Report::Ended(Ok(path))) => {
                let got = path.metadata()?.len();
                return match size_bytes {
                    Some(expected) if expected != got => Err(SourceError::Size { got, expected }),
                    _ => verified::check_by_name(&path).map(|()| path),
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

/// The client reads `HF_ENDPOINT` and `HF_HOME`; `HF_TOKEN` is passed to it here.
fn client(cache_dir: Option<PathBuf>) -> Result<Api, String> {
    let mut builder = ApiBuilder::from_env().with_progress(false).with_retries(MAX_RETRIES);
    if let Some(dir) = cache_dir {
        builder = builder.with_cache_dir(dir);
    }
    let token = std::env::var("HF_TOKEN").ok().filter(|token| !token.is_empty());
    if token.is_some() {
        builder = builder.with_token(token);
    }
    builder.build().map_err(|e| e.to_string())
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
