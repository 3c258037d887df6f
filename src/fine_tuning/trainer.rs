//! One process of the trainer: started with its limits, read line by line, and ended with all that it started.

use std::collections::VecDeque;
use std::env;
use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};

use super::job::Progress;
use super::settings::FineTuningConfig;

/// Of standard error, for the cause of a failure.
const TAIL_BYTES: usize = 4096;
const TAIL_LINES: usize = 5;
/// A longer line of standard output is no progress.
const MAX_LINE_BYTES: u64 = 1 << 16;
/// These may hold keys.
const OWN_VARIABLES: &str = "LORRY__";

/// A trainer that runs, the leader of its own process group.
#[derive(Debug)]
pub struct Trainer {
    child: Child,
    group: Pid,
}

impl Trainer {
    /// `lorry` is this program. The result must be waited for on the thread that has started it: the process ends with
    /// that thread.
    pub fn start(lorry: &Path, config: &FineTuningConfig, recipe: &Path, out: &Path) -> io::Result<Self> {
        let mut command = Command::new(lorry);
        command.arg("trainer").args(["--server", &std::process::id().to_string()]);
        command.args(["--max-memory-mib", &config.max_memory_mib.to_string(), "--nice", &config.nice.to_string()]);
        command.arg("--").args(&config.command).arg(recipe).arg("--out").arg(out).arg("--progress");
        let own = env::vars_os().map(|(name, _)| name);
        let own: Vec<OsString> = own.filter(|name| name.to_string_lossy().starts_with(OWN_VARIABLES)).collect();
        own.iter().for_each(|name| _ = command.env_remove(name));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let child = command.spawn()?;
        let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let group = group.ok_or_else(|| io::Error::other("a process without an id"))?;
        Ok(Self { child, group })
    }

    /// What [`kill`] ends, until [`Trainer::wait`] has called `ended`.
    pub fn group(&self) -> Pid {
        self.group
    }

    /// Hands on its progress until it ends by itself. `ended` is called when it has ended and its id is not yet anyone
    /// else's.
    ///
    /// # Errors
    /// How it failed, with the last it said.
    pub fn wait(mut self, mut on_progress: impl FnMut(Progress) + Send, ended: impl FnOnce()) -> Result<(), String> {
        let (stdout, stderr) = (self.child.stdout.take(), self.child.stderr.take());
        let (status, tail) = thread::scope(|scope| {
            let progress = scope.spawn(move || stdout.map_or(Ok(()), |stdout| read_progress(stdout, &mut on_progress)));
            let tail = scope.spawn(move || stderr.map_or_else(VecDeque::new, read_tail));
            // Left as it is, so that its id stays its own.
            let exited = waitid(WaitId::Pid(self.group), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
            // Whatever it has left behind holds its output open.
            kill(self.group);
            ended();
            let status = exited.map_err(io::Error::from).and_then(|_| self.child.wait());
            if let Ok(Err(e)) = progress.join() {
                tracing::warn!("the trainer's output cannot be read: {e}");
            }
            (status, tail.join().unwrap_or_default())
        });
        let status = status.map_err(|e| format!("the trainer cannot be waited for: {e}"))?;
        if status.success() { Ok(()) } else { Err(cause(status, &tail)) }
    }
}

/// Kills a group of processes; one that has ended is as good as killed.
pub fn kill(group: Pid) {
    if let Err(e) = kill_process_group(group, Signal::KILL)
        && e != rustix::io::Errno::SRCH
    {
        tracing::error!("a trainer cannot be killed: {e}");
    }
}

/// This program, also where its file was replaced meanwhile.
pub fn this_program() -> io::Result<PathBuf> {
    if cfg!(target_os = "linux") { Ok(PathBuf::from("/proc/self/exe")) } else { env::current_exe() }
}

fn read_progress(stdout: impl Read, on_progress: &mut impl FnMut(Progress)) -> io::Result<()> {
    let mut stdout = BufReader::new(stdout);
    let mut line = Vec::new();
    loop {
        line.clear();
        if stdout.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        match serde_json::from_slice(&line) {
            Ok(progress) => on_progress(progress),
            Err(_) => tracing::info!(target: "lorry::trainer", "{}", String::from_utf8_lossy(&line).trim_end()),
        }
    }
}

fn read_tail(mut stderr: impl Read) -> VecDeque<u8> {
    let (mut tail, mut buffer) = (VecDeque::new(), [0; 1024]);
    // A pipe that breaks has ended.
    while let Ok(num_read @ 1..) = stderr.read(&mut buffer) {
        tail.extend(&buffer[..num_read]);
        tail.drain(..tail.len().saturating_sub(TAIL_BYTES));
    }
    tail
}

fn cause(status: ExitStatus, tail: &VecDeque<u8>) -> String {
    let how = match (status.signal(), status.code()) {
        (Some(signal), _) => format!("the trainer was killed by signal {signal}"),
        (None, code) => format!("the trainer ended with status {}", code.unwrap_or_default()),
    };
    let bytes: Vec<u8> = tail.iter().copied().collect();
    let text = String::from_utf8_lossy(&bytes);
    // Progress bars end their lines with a carriage return.
    let lines: Vec<&str> = text.split(['\n', '\r']).map(str::trim_end).filter(|line| !line.is_empty()).collect();
    match &lines[lines.len().saturating_sub(TAIL_LINES)..] {
        [] => how,
        last => format!("{how}: {}", last.join("\n")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_read_among_what_is_for_people() {
        let output =
            "dequantising\n{\"type\": \"step\", \"step\": 2, \"loss\": 1.5, \"tokens\": 7}\n{\"type\": \"other\"}\n";
        let mut read = Vec::new();
        read_progress(output.as_bytes(), &mut |progress| read.push(progress)).unwrap();
        assert_eq!(read, [Progress::Step { step: 2, loss: 1.5, tokens: 7 }]);
    }

    #[test]
    fn a_cause_has_the_last_lines_without_those_that_were_written_over() {
        let tail = read_tail([&b"old\n".repeat(5000)[..], b"10%\r20%\r30%\nerror: no memory\n\n"].concat().as_slice());
        assert_eq!(tail.len(), TAIL_BYTES);
        let failure = cause(ExitStatus::from_raw(3 << 8), &tail);
        assert_eq!(failure, "the trainer ended with status 3: old\n10%\n20%\n30%\nerror: no memory");
        assert_eq!(cause(ExitStatus::from_raw(9), &VecDeque::new()), "the trainer was killed by signal 9");
    }
}
