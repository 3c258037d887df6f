//! The life of a server that is loaded: it serves until it is told to stop or its engine fails, and lets every reply have
//! an end that its client can read. What becomes of it, a service manager is told that asks for it, such as systemd.

use std::io;
use std::pin::pin;
use std::time::Duration;

use futures::{Stream, StreamExt};
use sd_notify::NotifyState;
use tokio::sync::oneshot;
use tokio::time::{interval, sleep, timeout};
use tracing::{info, warn};

use crate::engine::EngineHandle;
use crate::http::{AppState, Server};

/// How long requests under way may take to finish when the server is told to stop.
const GRACE: Duration = Duration::from_secs(30);
/// How long clients may take to read how replies end that are cut off.
const LAST_WORDS: Duration = Duration::from_secs(3);

#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    #[error("the engine has failed, the log says of what: start the server again")]
    EngineFailed,
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Serves `state`, whose engine is `engine`, from now on and, when the result is polled, until the first of `signals`; then
/// refuses what is new, and returns when what is under way has ended, for which it has half a minute, or until the second signal.
///
/// # Errors
/// The engine has failed, at any time: what was under way has been told.
pub fn run(
    server: Server,
    state: AppState,
    engine: EngineHandle,
    signals: impl Stream<Item = ()>,
) -> impl Future<Output = Result<(), ServiceError>> {
    let status = format!("serving {}", state.generation.base_id());
    let (stop, stopped) = oneshot::channel();
    let served = server.serve(state, async { stopped.await.unwrap_or_default() });
    tell(&[NotifyState::Ready, NotifyState::Status(&status)]);
    async move {
        let (mut served, mut signals) = (pin!(served), pin!(signals));
        tokio::spawn(show_life());
        tokio::select! {
            ended = &mut served => return Ok(ended?),
            () = engine.ended() => {}
            _ = signals.next() => {}
        }
        // An error means that it has ended.
        let _ = stop.send(());
        if engine.is_alive() {
            let status = format!("stopping: requests under way have {} s to finish", GRACE.as_secs());
            info!("{status}");
            tell(&[NotifyState::Stopping, NotifyState::Status(&status)]);
            tokio::select! {
                ended = &mut served => return Ok(ended?),
                () = engine.ended() => {}
                () = sleep(GRACE) => warn!("some requests did not finish in time and are cut off"),
                _ = signals.next() => warn!("told again to stop: what is under way is cut off"),
            }
        }
        let has_failed = !engine.is_alive();
        if has_failed {
            tell(&[NotifyState::Stopping, NotifyState::Status("the engine has failed")]);
        }
        engine.stop();
        // Whoever does not read by then is left.
        let _ = timeout(LAST_WORDS, served).await;
        if has_failed { Err(ServiceError::EngineFailed) } else { Ok(()) }
    }
}

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        warn!("the service manager cannot be told how the server is: {error}");
    }
}

/// Where the service manager watches, shows that connections are served, twice as often as it wants to see it.
async fn show_life() {
    let Some(patience) = sd_notify::watchdog_enabled().filter(|patience| !patience.is_zero()) else { return };
    let mut period = interval(patience / 2);
    loop {
        period.tick().await;
        tell(&[NotifyState::Watchdog]);
    }
}
