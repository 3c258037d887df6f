//! One process of the trainer: started with its limits, read line by line, and ended with all that it started.

use std::collections::VecDeque;
use std::env;
use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, PipeReader, PipeWriter, Read};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::{self, ScopedJoinHandle};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};

use super::job::Progress;
use super::settings::FineTuningConfig;

/// Of standard error, for the cause of a failure.
const TAIL_BYTES: usize = 4096;
const TAIL_LINES: usize = 5;
/// A longer line of standard output is no progress.
const MAX_LINE_BYTES: u64 = 1 << 16;
/// A pipe holds no more, so that all that a process has written is within the next bytes of it.
const MAX_PIPE_BYTES: usize = 1 << 20;
/// These may hold keys.
const OWN_VARIABLES: &str = "LORRY__";

/// A trainer that runs, the leader of its own process group.
#[derive(Debug)]
pub struct Trainer {
    child: Child,
    group: Pid,
    /// Whoever reads its output hears by this that it has ended: the other end is dropped then.
    ended: PipeReader,
    running: PipeWriter,
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
        let (ended, running) = io::pipe()?;
        let child = command.spawn()?;
        let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let group = group.ok_or_else(|| io::Error::other("a process without an id"))?;
        Ok(Self { child, group, ended, running })
    }

    /// What [`kill`] ends, until [`Trainer::wait`] has called `ended`.
    pub fn group(&self) -> Pid {
        self.group
    }

    /// Hands on its progress until it ends by itself. `ended` is called when it has ended and its id is not yet anyone
    /// else's. What it has started and nobody could kill, as that has left its group, is not waited for.
    ///
    /// # Errors
    /// How it failed, with the last it said.
    pub fn wait(self, mut on_progress: impl FnMut(Progress) + Send, ended: impl FnOnce()) -> Result<(), String> {
        let Self { mut child, group, ended: end, running } = self;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let (stdout, stderr) = (stdout.map(|pipe| Output::new(pipe, &end)), stderr.map(|pipe| Output::new(pipe, &end)));
        let (status, tail) = thread::scope(|scope| {
            let reader = || thread::Builder::new().name("lorry-trainer-output".to_owned());
            let progress = move || stdout.map_or(Ok(()), |stdout| read_progress(stdout, &mut on_progress));
            let progress = reader().spawn_scoped(scope, progress);
            let tail = reader().spawn_scoped(scope, move || stderr.map_or_else(VecDeque::new, read_tail));
            let unread = progress.as_ref().err().or(tail.as_ref().err());
            let unread = unread.map(|e| format!("no thread can be started that reads the trainer's output: {e}"));
            if unread.is_some() {
                kill(group);
            }
            // Left as it is, so that its id stays its own.
            let exited = waitid(WaitId::Pid(group), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
            // Whatever it has left behind holds its output open.
            kill(group);
            ended();
            let status = exited.map_err(io::Error::from).and_then(|_| child.wait());
            drop(running);
            if let Ok(Ok(Err(e))) = progress.map(ScopedJoinHandle::join) {
                tracing::warn!("the trainer's output cannot be read: {e}");
            }
            let tail = tail.map_or_else(|_| VecDeque::new(), |tail| tail.join().unwrap_or_default());
            let status = status.map_err(|e| format!("the trainer cannot be waited for: {e}"));
            (unread.map_or(status, Err), tail)
        });
        let status = status?;
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

/// A pipe that ends where its writers have left it, or with the process that it is read for: others who hold it open may
/// run for ever.
struct Output<'a, R> {
    pipe: R,
    ended: &'a PipeReader,
    /// To be read when it has ended.
    num_left: usize,
}

impl<'a, R> Output<'a, R> {
    fn new(pipe: R, ended: &'a PipeReader) -> Self {
        Self { pipe, ended, num_left: MAX_PIPE_BYTES }
    }
}

impl<R: Read + AsFd> Read for Output<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let (is_ready, has_ended) = loop {
            let mut both = [PollFd::new(&self.pipe, PollFlags::IN), PollFd::new(self.ended, PollFlags::IN)];
            match poll(&mut both, None) {
                Ok(_) => break (!both[0].revents().is_empty(), !both[1].revents().is_empty()),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        };
        if !is_ready {
            return Ok(0);
        }
        let max = if has_ended { self.num_left.min(buffer.len()) } else { buffer.len() };
        let num_read = self.pipe.read(&mut buffer[..max])?;
        if has_ended {
            self.num_left -= num_read;
        }
        Ok(num_read)
    }
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
    use std::io::Write;

    use super::*;

    #[test]
    fn output_ends_with_its_process_whoever_else_holds_or_fills_it() {
        let (end, running) = io::pipe().unwrap();
        let (pipe, mut held) = io::pipe().unwrap();
        held.write_all(b"last words").unwrap();
        drop(running);
        assert_eq!(read_tail(Output::new(pipe, &end)), b"last words");
        drop(held);

        let (pipe, mut filled) = io::pipe().unwrap();
        // More than is read at once, so that it is not empty before the other thread runs.
        filled.write_all(&[b'y'; 2 * TAIL_BYTES]).unwrap();
        let filling = thread::spawn(move || while filled.write_all(&[b'y'; 1000]).is_ok() {});
        assert_eq!(read_tail(Output::new(pipe, &end)).len(), TAIL_BYTES);
        filling.join().unwrap();
    }

    #[test]
    fn output_ends_with_its_last_writer_while_the_process_runs() {
        let (end, _running) = io::pipe().unwrap();
        let (pipe, mut writer) = io::pipe().unwrap();
        let writing = thread::spawn(move || writer.write_all(b"closed"));
        assert_eq!(read_tail(Output::new(pipe, &end)), b"closed");
        writing.join().unwrap().unwrap();
    }

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
