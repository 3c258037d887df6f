//! Reading what the engine says to a request.

// Every test program uses a part of it.
#![allow(dead_code)]

use std::time::Duration;

use lorry::engine::request::Event;
use tokio::sync::mpsc::UnboundedReceiver;

/// The next event; a request that is never answered, for want of blocks that leaked say, fails the test.
pub fn next_event(receiver: &mut UnboundedReceiver<Event>) -> Option<Event> {
    let next = async { tokio::time::timeout(Duration::from_secs(120), receiver.recv()).await };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime starts");
    runtime.block_on(next).expect("a request is answered within two minutes")
}

/// What came back: every token with its log-probabilities, and how it ended.
#[derive(Debug, PartialEq)]
pub struct Reply {
    pub cached_tokens: usize,
    pub events: Vec<Event>,
}

impl Reply {
    /// Waits for the end.
    pub fn of(mut receiver: UnboundedReceiver<Event>) -> Self {
        let mut reply = Self { cached_tokens: 0, events: Vec::new() };
        while let Some(event) = next_event(&mut receiver) {
            match event {
                Event::Started { cached_tokens, .. } => reply.cached_tokens = cached_tokens,
                event => reply.events.push(event),
            }
        }
        reply
    }

    pub fn tokens(&self) -> Vec<u32> {
        let tokens = self.events.iter().filter_map(|event| match event {
            Event::Token { id, .. } => Some(*id),
            _ => None,
        });
        tokens.collect()
    }

    pub fn is_failed(&self) -> bool {
        matches!(self.events.last(), Some(Event::Failed(_)))
    }
}
