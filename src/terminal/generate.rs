//! `lorry generate`: one prompt, its output as it comes.

use std::io::{self, IsTerminal, Write, stdin, stdout};

use clap::Args;
use serde::Serialize;

use super::server::{RequestArgs, ServerArgs, TerminalError};

#[derive(Debug, Args)]
pub struct GenerateArgs {
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    request: RequestArgs,
    /// The text behind the gap, to fill in between.
    #[arg(long)]
    suffix: Option<String>,
    /// What is gone on with; standard input when absent.
    prompt: Option<String>,
}

#[derive(Serialize)]
struct Completion<'a> {
    #[serde(flatten)]
    request: &'a RequestArgs,
    prompt: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    suffix: Option<&'a str>,
    stream: bool,
}

/// Writes nothing but the output, byte for byte, but ends the line on a terminal.
///
/// # Errors
/// No server, or one that refuses the request; a prompt that is not UTF-8; nobody who reads the output.
pub fn run(args: &GenerateArgs) -> Result<(), TerminalError> {
    let read;
    let prompt = match &args.prompt {
        Some(prompt) => prompt,
        None => {
            read = io::read_to_string(stdin()).map_err(TerminalError::Input)?;
            &read
        }
    };
    let completion = Completion { request: &args.request, prompt, suffix: args.suffix.as_deref(), stream: true };
    let mut ends_line = true;
    for piece in args.server.stream("/v1/completions", &completion)? {
        let piece = piece?;
        print(&piece)?;
        ends_line = piece.ends_with('\n');
    }
    if stdout().is_terminal() && !ends_line {
        print("\n")?;
    }
    Ok(())
}

/// At once, where or not a line ends.
///
/// # Errors
/// Nobody reads it.
pub fn print(text: &str) -> Result<(), TerminalError> {
    let mut out = stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(TerminalError::Output)
}
