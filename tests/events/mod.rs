//! Reading what the engine says to a request.

use std::time::Duration;

use lorry::engine::request::Event;
use tokio::sync::mpsc::UnboundedReceiver;

/// The next event; a request that is never answered, for want of blocks that leaked say, fails the test.
pub fn next_event(receiver: &mut UnboundedReceiver<Event>) -> Option<Event> {
    let next = async { tokio::time::timeout(Duration::from_secs(120), receiver.recv()).await };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime starts");
    runtime.block_on(next).expect("a request is answered within two minutes")
}
