//! Commands that ask a running server, over HTTP as any client does: its model, adapters and cached prefixes are in memory
//! already, where a model loaded for one command would take seconds and as much memory again.

pub mod chat;
pub mod compare;
pub mod events;
pub mod generate;
mod server;

pub use server::{ServerArgs, TerminalError};
