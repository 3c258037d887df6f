//! `lorry trainer`: the first moments of a trainer's process, in which it takes on its limits. Then it becomes the trainer.
//!
//! What a process may only do to itself is done here, before anything of the trainer's runs: it ends with the server,
//! however that ends, and no second one is started beside it after a restart.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use clap::Args;
use rustix::process::{Resource, Rlimit, getppid, nice, setrlimit};

#[derive(Debug, Args)]
pub struct LaunchArgs {
    /// Process id of the server.
    #[arg(long)]
    pub server: u32,
    /// Memory that it may allocate, in MiB; 0 for no limit.
    #[arg(long)]
    pub max_memory_mib: u64,
    /// Steps down in priority.
    #[arg(long)]
    pub nice: i32,
    /// The trainer and its arguments.
    #[arg(last = true, required = true)]
    pub command: Vec<OsString>,
}

/// Becomes the trainer.
///
/// # Errors
/// A limit cannot be taken on, or the trainer not started: nothing of it has run.
pub fn launch(args: &LaunchArgs) -> Result<(), String> {
    let (program, arguments) = args.command.split_first().ok_or("no trainer is named")?;
    take_on_limits(args).map_err(|e| format!("the trainer's limits cannot be set: {e}"))?;
    let failure = Command::new(program).args(arguments).exec();
    Err(format!("the trainer {} (fine_tuning.command) cannot be started: {failure}", program.display()))
}

fn take_on_limits(args: &LaunchArgs) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    // It may have ended before that.
    if getppid().is_none_or(|parent| parent.as_raw_pid().cast_unsigned() != args.server) {
        return Err(io::Error::other("the server has ended"));
    }
    if args.max_memory_mib > 0 {
        let limit = Some(args.max_memory_mib.saturating_mul(1 << 20));
        // What it allocates, and not its address space, of which a GPU's driver takes as much as it likes.
        setrlimit(Resource::Data, Rlimit { current: limit, maximum: limit })?;
    }
    nice(args.nice)?;
    Ok(())
}
