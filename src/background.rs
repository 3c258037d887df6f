//! Threads that work beside the engine and should not slow it down.

/// Of a thread, in steps of `nice`: about a tenth of a core that the engine wants too.
#[cfg(target_os = "linux")]
const NICE: i32 = 10;

/// Lowers the priority of the calling thread; `work` says what it does, for the log.
#[cfg(target_os = "linux")]
pub fn lower_priority(work: &str) {
    // On Linux a thread has a priority of its own.
    if let Err(e) = rustix::process::setpriority_process(Some(rustix::thread::gettid()), NICE) {
        tracing::warn!("{work} at full priority: {e}");
    }
}

#[cfg(not(target_os = "linux"))]
pub fn lower_priority(_work: &str) {}
