//! The life of a server that is loaded: it serves until it is told to stop or its engine fails, and lets every reply have
//! an end that its client can read.

use std::io;
use std::pin::pin;
use std::time::Duration;

use futures::{Stream, StreamExt};
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};
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
    let (stop, stopped) = oneshot::channel();
    let served = server.serve(state, async { stopped.await.unwrap_or_default() });
    async move {
        let (mut served, mut signals) = (pin!(served), pin!(signals));
        tokio::select! {
            ended = &mut served => return Ok(ended?),
            () = engine.ended() => {}
            _ = signals.next() => {}
        }
        // An error means that it has ended.
        let _ = stop.send(());
        if engine.is_alive() {
            info!("stopping: requests under way have {} s to finish", GRACE.as_secs());
            tokio::select! {
                ended = &mut served => return Ok(ended?),
                () = engine.ended() => {}
                () = sleep(GRACE) => warn!("some requests did not finish in time and are cut off"),
                _ = signals.next() => warn!("told again to stop: what is under way is cut off"),
            }
        }
        let has_failed = !engine.is_alive();
        engine.stop();
        // Whoever does not read by then is left.
        let _ = timeout(LAST_WORDS, served).await;
        if has_failed { Err(ServiceError::EngineFailed) } else { Ok(()) }
    }
}
