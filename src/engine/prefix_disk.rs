//! The prefix cache's second tier: KV blocks in a folder, which outlive evictions and restarts.
//!
//! Blocks are copied out when they have been computed, as many after a step as a step fills, and written by a thread of their
//! own. A request whose prompt goes on on the disk where the memory has no more of it waits until that is read, as one does
//! whose adapter is cold; all others go past it. What is read goes into the prefix cache, and the scheduler finds it there.

mod block_files;
mod folder;

use std::collections::VecDeque;
use std::thread;
use std::time::{Duration, Instant};

use kernels::attention::{BLOCK_SIZE, KvStore};

pub use block_files::BlockFiles;
pub use folder::{Folder, OpenError};

use super::scheduler::Scheduler;
use super::sequence::{PrefixBlock, Sequence, SequenceId};

/// How long a sequence waits for the next block; then what is left is computed.
const MAX_WAIT: Duration = Duration::from_secs(2);
/// How often the end of the engine looks whether the disk takes more.
const SAVE_POLL: Duration = Duration::from_millis(1);

/// The blocks on disk, and who waits for some of them.
pub(super) struct PrefixDisk {
    files: BlockFiles,
    /// In the order in which they came.
    waiting: VecDeque<Sequence>,
    /// For the first of them.
    reading: Option<Reading>,
    /// Nothing came for so long that a reading was given up, and answers are still owed.
    is_silent: bool,
    max_saved_per_step: usize,
}

impl PrefixDisk {
    /// `max_batch_rows` are those of a step.
    pub fn new(files: BlockFiles, max_batch_rows: usize) -> Self {
        let max_saved_per_step = max_batch_rows.div_ceil(BLOCK_SIZE);
        Self { files, waiting: VecDeque::new(), reading: None, is_silent: false, max_saved_per_step }
    }

    pub fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Hands a sequence to the scheduler, now or when what the disk has of it is in memory.
    pub fn enqueue(&mut self, sequence: Sequence, scheduler: &mut Scheduler) {
        self.receive();
        if self.to_read(&sequence, scheduler).is_empty() {
            self.start(sequence, 0, scheduler);
        } else {
            self.waiting.push_back(sequence);
        }
    }

    /// Ends a sequence that waits.
    pub fn remove(&mut self, id: SequenceId) {
        let Some(index) = self.waiting.iter().position(|sequence| sequence.id() == id) else { return };
        self.waiting.remove(index);
        if index == 0 {
            // What it has asked for comes before what the next one asks for.
            self.reading = None;
        }
    }

    /// Between two steps: puts what has been read into the cache, and starts the sequences that have waited for it.
    pub fn restore(&mut self, scheduler: &mut Scheduler, kv: &mut KvStore) {
        while let Some(first) = self.waiting.front() {
            let mut reading = match self.reading.take() {
                Some(reading) => reading,
                None => {
                    // What was asked for others, who have left.
                    while self.files.next_read().is_some() {}
                    // What comes should not take the place of what is there.
                    first.prefix_blocks().iter().rev().for_each(|block| scheduler.touch(&block.chain));
                    Reading {
                        left: self.to_read(first, scheduler),
                        asked: VecDeque::new(),
                        num_restored: 0,
                        last: Instant::now(),
                    }
                }
            };
            match reading.go_on(&mut self.files, scheduler, kv) {
                Progress::Waits => {
                    self.reading = Some(reading);
                    return;
                }
                Progress::Ended => {}
                Progress::GivenUp => self.is_silent = true,
            }
            // Computed again, they are to be written again if they turn out to be lost.
            reading.asked.iter().for_each(|block| self.files.forget(&block.chain));
            if let Some(sequence) = self.waiting.pop_front() {
                self.start(sequence, reading.num_restored * BLOCK_SIZE, scheduler);
            }
        }
    }

    /// Between two steps: has blocks written that have been computed.
    pub fn save(&mut self, scheduler: &mut Scheduler, kv: &KvStore) {
        self.receive();
        for _ in 0..self.max_saved_per_step {
            if !self.files.can_write() {
                return;
            }
            let Some((chain, block)) = scheduler.next_unsaved() else { return };
            if !self.files.has(&chain) {
                self.files.write(chain, kv.read_block(block));
            }
        }
    }

    /// Before the end: has all blocks written that have been computed, for as long as the disk takes them.
    pub fn save_all(&mut self, scheduler: &mut Scheduler, kv: &KvStore) {
        let mut last = Instant::now();
        while scheduler.has_unsaved() && last.elapsed() < MAX_WAIT {
            if self.files.can_write() {
                last = Instant::now();
            } else {
                thread::sleep(SAVE_POLL);
            }
            self.save(scheduler, kv);
        }
    }

    fn receive(&mut self) {
        self.files.receive();
        self.is_silent &= self.files.num_reading() > 0;
    }

    fn start(&mut self, mut sequence: Sequence, num_restored_tokens: usize, scheduler: &mut Scheduler) {
        // Without its start, a chain is of no use.
        self.files.touch(sequence.prefix_blocks().into_iter().map(|block| block.chain).rev().collect());
        sequence.set_restored(num_restored_tokens);
        scheduler.enqueue(sequence);
    }

    /// What the disk has and the memory has not, as far as there is room for it beside what the memory has of the sequence.
    /// Nothing while the disk is silent: one at a time would wait for it in vain.
    fn to_read(&self, sequence: &Sequence, scheduler: &Scheduler) -> VecDeque<PrefixBlock> {
        if self.is_silent {
            return VecDeque::new();
        }
        let (mut to_read, mut num_spare) = (VecDeque::new(), scheduler.blocks_to_spare());
        for block in sequence.prefix_blocks() {
            let is_cached = scheduler.is_cached(&block.chain);
            if !is_cached && !self.files.has(&block.chain) {
                break;
            }
            // An idle block of its own is one of those to spare, and must not make room for what is behind it.
            if !is_cached || scheduler.is_idle(&block.chain) {
                let Some(num_left) = num_spare.checked_sub(1) else { break };
                num_spare = num_left;
            }
            if !is_cached {
                to_read.push_back(block);
            }
        }
        to_read
    }
}

enum Progress {
    Waits,
    /// All is there, or the rest is not to be had.
    Ended,
    /// Nothing has come for as long as is waited.
    GivenUp,
}

/// Blocks on their way from the disk to the cache.
struct Reading {
    /// Not asked for yet.
    left: VecDeque<PrefixBlock>,
    asked: VecDeque<PrefixBlock>,
    num_restored: usize,
    /// When the last answer came; at first, when it began.
    last: Instant,
}

impl Reading {
    /// Takes what has come and asks for more.
    fn go_on(&mut self, files: &mut BlockFiles, scheduler: &mut Scheduler, kv: &mut KvStore) -> Progress {
        loop {
            while files.can_read()
                && let Some(block) = self.left.pop_front()
            {
                files.read(block.chain);
                self.asked.push_back(block);
            }
            if self.asked.is_empty() && self.left.is_empty() {
                return Progress::Ended;
            }
            let Some((chain, bytes)) = files.next_read() else {
                return if self.last.elapsed() > MAX_WAIT { Progress::GivenUp } else { Progress::Waits };
            };
            self.last = Instant::now();
            // Where none is asked for yet, what comes was asked for others, as there is no room for more.
            let Some(next) = self.asked.front() else { continue };
            match bytes {
                // It was asked for another, who has left.
                _ if chain != next.chain => {}
                None => return Progress::Ended,
                Some(bytes) => {
                    match scheduler.restore(next) {
                        Some(block) => kv.write_block(block, &bytes),
                        None if scheduler.is_cached(&next.chain) => {}
                        None => return Progress::Ended,
                    }
                    self.num_restored += 1;
                    self.asked.pop_front();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::request::PromptOutput;
    use crate::metrics::Metrics;

    const NUM_BLOCKS: usize = 10;

    /// Which begins with so many blocks of the numbers from `first`.
    fn sequence(id: u64, first: u32, num_blocks: usize) -> Sequence {
        let prompt: Vec<u32> = (first..).take(num_blocks * BLOCK_SIZE + 1).collect();
        Sequence::new(SequenceId(id), &prompt, 100, None, PromptOutput::Nothing)
    }

    fn compute(scheduler: &mut Scheduler, sequence: Sequence) {
        let id = sequence.id();
        scheduler.enqueue(sequence);
        scheduler.schedule();
        scheduler.commit();
        scheduler.get_mut(id).unwrap().push(7);
    }

    #[test]
    fn what_is_read_takes_no_place_of_what_it_goes_on_from() {
        const NUM_WHOLE: usize = 6;
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open(dir.path(), "identity", 1, 1 << 20).unwrap();
        let mut disk = PrefixDisk::new(BlockFiles::start(folder, Metrics::new("base").disk_blocks()), 256);
        let whole = sequence(9, 0, NUM_WHOLE);
        let blocks = whole.prefix_blocks();
        blocks.iter().for_each(|block| disk.files.write(block.chain, vec![0]));
        while !blocks.iter().all(|block| disk.files.has(&block.chain)) {
            disk.receive();
        }
        // So many of its blocks in memory, held or idle; and so many in which another runs, with one more to come.
        for (num_cached, is_held, num_others, num_to_read) in [
            (0, false, 0, 6),
            (3, false, 0, 3),
            (3, false, 4, 1),
            (3, false, 5, 0),
            (3, true, 4, 0),
            (2, true, 3, 1),
            (0, false, 4, 4),
        ] {
            let mut scheduler = Scheduler::new(256, 8, NUM_BLOCKS);
            if num_cached > 0 {
                compute(&mut scheduler, sequence(0, 0, num_cached));
                if !is_held {
                    scheduler.remove(SequenceId(0));
                }
            }
            if num_others > 0 {
                compute(&mut scheduler, sequence(1, 1000, num_others));
            }
            let to_read = disk.to_read(&whole, &scheduler);
            let case = format!("{num_cached} {is_held} {num_others}");
            assert_eq!(to_read.len(), num_to_read, "{case}");
            to_read.iter().for_each(|block| assert!(scheduler.restore(block).is_some(), "{case}"));
            let num_there = blocks.iter().take_while(|block| scheduler.is_cached(&block.chain)).count();
            assert_eq!(num_there, num_cached + num_to_read, "{case}");
        }
    }
}
