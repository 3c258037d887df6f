//! `lorry chat`: a conversation, line by line.

use std::io::{self, IsTerminal, stdin};
use std::thread;

use clap::Args;
use rustyline::error::ReadlineError;
use rustyline::{Behavior, DefaultEditor};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::runtime;
use tokio::signal::ctrl_c;
use tokio::sync::mpsc::{self, Receiver};

use super::generate::print;
use super::server::{RequestArgs, ServerArgs, TerminalError};

const PROMPT: &str = "> ";

#[derive(Debug, Args)]
pub struct ChatArgs {
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    request: RequestArgs,
    /// What the model is told before the first message.
    #[arg(long)]
    system: Option<String>,
}

#[derive(Serialize)]
struct Chat<'a> {
    #[serde(flatten)]
    request: &'a RequestArgs,
    messages: &'a [Value],
    stream: bool,
}

/// Until the end of the input. On a terminal Ctrl-C ends a reply, and what the server refuses is said; elsewhere a refusal
/// ends the conversation.
///
/// # Errors
/// No server, or one that refuses a message; a message that is not UTF-8; nobody who reads the replies.
pub fn run(args: &ChatArgs) -> Result<(), TerminalError> {
    let mut input = Input::open()?;
    let runtime = runtime::Builder::new_current_thread().enable_all().build().map_err(TerminalError::Input)?;
    let mut messages: Vec<Value> = args.system.iter().map(|text| message("system", text)).collect();
    while let Some(line) = input.read()? {
        if line.trim().is_empty() {
            continue;
        }
        messages.push(message("user", &line));
        let mut reply = String::new();
        let outcome = runtime.block_on(answer(args, &messages, input.is_terminal(), &mut reply));
        match outcome {
            Err(error @ TerminalError::Output(_)) => return Err(error),
            Err(error) if input.is_terminal() => eprintln!("lorry: {error}"),
            outcome => outcome?,
        }
        // Templates want the turns to alternate: what was not answered was not asked.
        match reply.as_str() {
            "" => _ = messages.pop(),
            reply => messages.push(message("assistant", reply)),
        }
    }
    Ok(())
}

fn message(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

/// Prints the reply and adds it to `reply`, as far as it comes.
async fn answer(
    args: &ChatArgs,
    messages: &[Value],
    is_interruptible: bool,
    reply: &mut String,
) -> Result<(), TerminalError> {
    let chat = Chat { request: &args.request, messages, stream: true };
    let mut pieces = ask(args.server.clone(), serde_json::to_value(&chat)?);
    let mut interrupt = std::pin::pin!(async {
        if !is_interruptible || ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    });
    let outcome = loop {
        let piece = tokio::select! {
            piece = pieces.recv() => piece,
            () = &mut interrupt => None,
        };
        match piece {
            Some(Ok(piece)) => {
                print(&piece)?;
                reply.push_str(&piece);
            }
            Some(Err(error)) => break Err(error),
            None => break Ok(()),
        }
    };
    // The next prompt, or reply, begins a line.
    if !reply.is_empty() || outcome.is_ok() {
        print("\n")?;
    }
    outcome
}

/// Asks on a thread of its own, which reads until the result is dropped: then it leaves the server, which cancels.
fn ask(server: ServerArgs, chat: Value) -> Receiver<Result<String, TerminalError>> {
    let (sender, pieces) = mpsc::channel(1);
    thread::spawn(move || match server.stream("/v1/chat/completions", &chat) {
        Ok(mut pieces) => _ = pieces.all(|piece| sender.blocking_send(piece).is_ok()),
        Err(error) => _ = sender.blocking_send(Err(error)),
    });
    pieces
}

/// Where messages come from.
enum Input {
    /// With a line that can be edited, and in which pasted lines stay together as one message.
    Terminal(Box<DefaultEditor>),
    Lines(io::Lines<io::StdinLock<'static>>),
}

impl Input {
    fn open() -> Result<Self, TerminalError> {
        if !stdin().is_terminal() {
            return Ok(Self::Lines(stdin().lines()));
        }
        // Of the terminal itself, so that no prompt gets into replies that go to a file.
        let config = rustyline::Config::builder().auto_add_history(true).behavior(Behavior::PreferTerm).build();
        DefaultEditor::with_config(config).map(|editor| Self::Terminal(Box::new(editor))).map_err(unreadable)
    }

    fn is_terminal(&self) -> bool {
        matches!(self, Self::Terminal(_))
    }

    /// `None` at the end: Ctrl-D on a terminal, where Ctrl-C takes back what is typed.
    fn read(&mut self) -> Result<Option<String>, TerminalError> {
        match self {
            Self::Lines(lines) => lines.next().transpose().map_err(TerminalError::Input),
            Self::Terminal(editor) => match editor.readline(PROMPT) {
                Ok(line) => Ok(Some(line)),
                Err(ReadlineError::Interrupted) => Ok(Some(String::new())),
                Err(ReadlineError::Eof) => Ok(None),
                Err(error) => Err(unreadable(error)),
            },
        }
    }
}

fn unreadable(error: ReadlineError) -> TerminalError {
    TerminalError::Input(io::Error::other(error))
}
