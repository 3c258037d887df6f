//! The thread that reads and writes the files of KV blocks, and the engine's end of it: nothing here waits for the disk.

use std::collections::{HashSet, VecDeque};
use std::mem;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tracing::warn;

use super::folder::Folder;
use crate::background::lower_priority;
use crate::engine::prefix_cache::ChainHash;
use crate::metrics::DiskBlocks;

/// Memory for blocks on their way to the disk, and for those on their way back; one block of each is always allowed.
const MAX_BYTES_UNDER_WAY: usize = 16 << 20;
/// After a block could not be written, for so long none is.
const WRITE_PAUSE: Duration = Duration::from_secs(60);
/// How long the end of the server waits for the last blocks to be written.
const MAX_LAST_WRITES: Duration = Duration::from_secs(10);

/// Blocks of which the disk is yet to hear or to note that they have been of use, each.
const MAX_TOUCHED: usize = 4096;

enum Command {
    Write(ChainHash, Vec<u8>),
    Read(ChainHash),
    /// Of use, the most important last.
    Touch(Vec<ChainHash>),
}

enum Answer {
    /// Whether the block is there now, and what is not there any more.
    Written {
        chain: ChainHash,
        is_there: bool,
        evicted: Vec<ChainHash>,
    },
    Read(ChainHash, Option<Vec<u8>>),
    /// So many.
    Touched(usize),
}

#[derive(Debug)]
pub struct BlockFiles {
    /// `None` once the thread is to end.
    commands: Option<Sender<Command>>,
    answers: Receiver<Answer>,
    thread: JoinHandle<()>,
    /// On disk, as far as the thread has told.
    known: HashSet<ChainHash>,
    /// Answers to reads that have come, in the order of the reads.
    read: VecDeque<(ChainHash, Option<Vec<u8>>)>,
    /// Of use, and not told yet.
    touched: Vec<ChainHash>,
    num_reading: usize,
    num_writing: usize,
    num_touching: usize,
    max_under_way: usize,
}

impl BlockFiles {
    /// Starts the thread.
    ///
    /// # Panics
    /// When the system cannot start a thread.
    pub fn start(folder: Folder, metrics: Arc<DiskBlocks>) -> Self {
        let (known, block_bytes) = (folder.chains().collect(), folder.block_bytes());
        let (commands, receiver) = mpsc::channel();
        let (sender, answers) = mpsc::channel();
        let worker = Worker {
            folder,
            metrics,
            answers: sender,
            reads: VecDeque::new(),
            later: VecDeque::new(),
            paused_until: None,
        };
        let thread = thread::Builder::new()
            .name("lorry-blocks".to_owned())
            .spawn(move || worker.run(&receiver))
            .expect("the system can start a thread");
        Self {
            commands: Some(commands),
            answers,
            thread,
            known,
            read: VecDeque::new(),
            touched: Vec::new(),
            num_reading: 0,
            num_writing: 0,
            num_touching: 0,
            max_under_way: (MAX_BYTES_UNDER_WAY / block_bytes.max(1)).max(1),
        }
    }

    pub fn has(&self, chain: &ChainHash) -> bool {
        self.known.contains(chain)
    }

    /// Takes it that a block is not on disk, until a read says that it is.
    pub fn forget(&mut self, chain: &ChainHash) {
        self.known.remove(chain);
    }

    /// Whether one more may be read now.
    pub fn can_read(&self) -> bool {
        self.num_reading + self.read.len() < self.max_under_way
    }

    /// Reads that are not answered yet.
    pub fn num_reading(&self) -> usize {
        self.num_reading
    }

    /// Whether one more may be written now.
    pub fn can_write(&self) -> bool {
        self.num_writing < self.max_under_way
    }

    pub fn read(&mut self, chain: ChainHash) {
        self.num_reading += 1;
        self.send(Command::Read(chain));
    }

    pub fn write(&mut self, chain: ChainHash, block: Vec<u8>) {
        self.num_writing += 1;
        self.send(Command::Write(chain, block));
    }

    /// These have been of use, the most important last. Those that are still to be written are written first, and those that
    /// are not there do not matter. A disk that is behind is told later.
    pub fn touch(&mut self, chains: Vec<ChainHash>) {
        self.touched.extend(chains);
        // Those of long ago matter least.
        let num_forgotten = self.touched.len().saturating_sub(MAX_TOUCHED);
        self.touched.drain(..num_forgotten);
        self.tell_touched();
    }

    fn tell_touched(&mut self) {
        if !self.touched.is_empty() && self.num_reading == 0 && self.num_touching < MAX_TOUCHED {
            let touched = mem::take(&mut self.touched);
            self.num_touching += touched.len();
            self.send(Command::Touch(touched));
        }
    }

    /// The next answer to a read; `None` while there is none. A block that cannot be had is `None` too.
    pub fn next_read(&mut self) -> Option<(ChainHash, Option<Vec<u8>>)> {
        self.receive();
        self.read.pop_front()
    }

    /// Takes in what the thread has told.
    pub fn receive(&mut self) {
        self.take_answers();
        self.tell_touched();
    }

    fn take_answers(&mut self) {
        loop {
            match self.answers.try_recv() {
                Ok(Answer::Read(chain, block)) => {
                    self.num_reading -= 1;
                    if block.is_some() {
                        self.known.insert(chain);
                    } else {
                        self.known.remove(&chain);
                    }
                    self.read.push_back((chain, block));
                }
                Ok(Answer::Written { chain, is_there, evicted }) => {
                    self.num_writing -= 1;
                    for chain in evicted {
                        self.known.remove(&chain);
                    }
                    if is_there {
                        self.known.insert(chain);
                    }
                }
                Ok(Answer::Touched(num)) => self.num_touching -= num,
                Err(TryRecvError::Empty) => return,
                // It has panicked: what is asked of it from now on is never answered, and nobody asks.
                Err(TryRecvError::Disconnected) => return self.known.clear(),
            }
        }
    }

    fn send(&self, command: Command) {
        // A thread that has gone takes no commands.
        let _ = self.commands.as_ref().map(|commands| commands.send(command));
    }
}

impl Drop for BlockFiles {
    /// Waits until what was handed over is written, unless the disk does not answer.
    fn drop(&mut self) {
        let touched = mem::take(&mut self.touched);
        self.send(Command::Touch(touched));
        drop(self.commands.take());
        let deadline = Instant::now() + MAX_LAST_WRITES;
        while !self.thread.is_finished() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

struct Worker {
    folder: Folder,
    metrics: Arc<DiskBlocks>,
    answers: Sender<Answer>,
    /// Somebody waits for them: they come before the others.
    reads: VecDeque<ChainHash>,
    later: VecDeque<Command>,
    paused_until: Option<Instant>,
}

impl Worker {
    fn run(mut self, commands: &Receiver<Command>) {
        lower_priority("blocks of the prefix cache are read and written");
        self.metrics.bytes.set(self.folder.bytes() as i64);
        loop {
            commands.try_iter().for_each(|command| self.sort(command));
            if let Some(chain) = self.reads.pop_front() {
                self.read(chain);
            } else if let Some(command) = self.later.pop_front() {
                match command {
                    Command::Write(chain, block) => self.write(chain, &block),
                    Command::Touch(chains) => {
                        chains.iter().for_each(|chain| self.folder.touch(chain));
                        self.answer(Answer::Touched(chains.len()));
                    }
                    Command::Read(chain) => self.read(chain),
                }
            } else {
                let Ok(command) = commands.recv() else { return };
                self.sort(command);
            }
            self.metrics.bytes.set(self.folder.bytes() as i64);
        }
    }

    fn sort(&mut self, command: Command) {
        match command {
            Command::Read(chain) => self.reads.push_back(chain),
            command => self.later.push_back(command),
        }
    }

    fn read(&mut self, chain: ChainHash) {
        let block = self.folder.read(&chain);
        self.metrics.count(if block.is_some() { "read" } else { "lost" });
        self.answer(Answer::Read(chain, block));
    }

    fn write(&mut self, chain: ChainHash, block: &[u8]) {
        let mut evicted = Vec::new();
        let is_paused = self.paused_until.is_some_and(|until| Instant::now() < until);
        let written = if is_paused { None } else { Some(self.folder.write(chain, block, &mut evicted)) };
        if let Some(Err(error)) = &written {
            warn!("{}: {error}; no block is written for {} s", self.folder.path().display(), WRITE_PAUSE.as_secs());
            self.paused_until = Some(Instant::now() + WRITE_PAUSE);
        }
        let is_there = matches!(written, Some(Ok(())));
        self.metrics.count(if is_there { "written" } else { "unwritten" });
        evicted.iter().for_each(|_| self.metrics.count("evicted"));
        self.answer(Answer::Written { chain, is_there, evicted });
    }

    fn answer(&self, answer: Answer) {
        // Nobody is left to hear it where the engine ends.
        let _ = self.answers.send(answer);
    }
}
