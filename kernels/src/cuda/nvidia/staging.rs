//! Memory of the host that the card reads and writes by itself: on the way to the card and back.

use std::ffi::c_uint;
use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUresult};

use super::card::{Card, Lane, check};
use crate::cuda::driver::DriverError;

/// Of one part: large enough for the bus to be busy, small beside what a host has.
const PART_BYTES: usize = 4 << 20;
const NUM_PARTS: usize = 4;

/// Bytes in page-locked memory.
#[derive(Debug)]
struct Pinned {
    start: *mut u8,
    card: Arc<Card>,
}

// SAFETY: memory of the process, which only its owner reads and writes.
unsafe impl Send for Pinned {}

impl Pinned {
    fn new(card: &Arc<Card>) -> Result<Self, DriverError> {
        card.bind()?;
        let mut start = null_mut();
        // SAFETY: writes one address, of memory that `drop` gives back.
        check("cuMemHostAlloc", unsafe { sys::cuMemHostAlloc(&mut start, PART_BYTES, 0) })?;
        Ok(Self { start: start.cast(), card: card.clone() })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.card.bind().is_ok() {
            // SAFETY: from `cuMemHostAlloc`, and whoever copied has waited. Nothing can be done about an error.
            unsafe { sys::cuMemFreeHost(self.start.cast()) };
        }
    }
}

/// A place in a stream.
#[derive(Debug)]
pub(super) struct Event {
    raw: sys::CUevent,
    card: Arc<Card>,
}

// SAFETY: a handle, which any thread may use that has the context.
unsafe impl Send for Event {}

impl Event {
    pub fn new(card: &Arc<Card>) -> Result<Self, DriverError> {
        card.bind()?;
        let mut raw = null_mut();
        // SAFETY: writes one handle, which `drop` gives back.
        let result = unsafe { sys::cuEventCreate(&mut raw, sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as c_uint) };
        check("cuEventCreate", result).map(|()| Self { raw, card: card.clone() })
    }

    /// Puts it behind all that was asked of a stream.
    fn record(&self, lane: Lane) -> Result<(), DriverError> {
        self.card.bind()?;
        // SAFETY: both live.
        check("cuEventRecord", unsafe { sys::cuEventRecord(self.raw, self.card.stream(lane)) })
    }

    /// Waits until it is reached; at once if it was never recorded.
    fn wait(&self) -> Result<(), DriverError> {
        self.card.bind()?;
        // SAFETY: it lives.
        check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(self.raw) })
    }

    pub fn is_reached(&self) -> Result<bool, DriverError> {
        self.card.bind()?;
        // SAFETY: it lives.
        match unsafe { sys::cuEventQuery(self.raw) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => check("cuEventQuery", result).map(|()| true),
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.card.bind().is_ok() {
            // SAFETY: made by `new`. Nothing can be done about an error.
            unsafe { sys::cuEventDestroy_v2(self.raw) };
        }
    }
}

#[derive(Debug)]
struct Part {
    bytes: Pinned,
    /// Behind the last copy out of it.
    copied: Event,
}

/// What is written waits here for its copy by one stream, in parts that take turns.
#[derive(Debug)]
pub(super) struct Outgoing {
    card: Arc<Card>,
    lane: Lane,
    parts: Vec<Part>,
    current: usize,
    /// Bytes of the current part.
    used: usize,
}

impl Outgoing {
    pub fn new(card: &Arc<Card>, lane: Lane) -> Result<Self, DriverError> {
        let part = |_| Ok(Part { bytes: Pinned::new(card)?, copied: Event::new(card)? });
        let parts = (0..NUM_PARTS).map(part).collect::<Result<_, DriverError>>()?;
        Ok(Self { card: card.clone(), lane, parts, current: 0, used: 0 })
    }

    /// Where `len` bytes have room whose last copy is done. `len` is at most a part.
    fn room_for(&mut self, len: usize) -> Result<*mut u8, DriverError> {
        if self.used + len > PART_BYTES {
            let next = (self.current + 1) % NUM_PARTS;
            self.parts[self.current].copied.record(self.lane)?;
            self.parts[next].copied.wait()?;
            // Only now: after an error, whoever comes next waits again.
            (self.current, self.used) = (next, 0);
        }
        // SAFETY: with `len` it is within the part.
        let start = unsafe { self.parts[self.current].bytes.start.add(self.used) };
        self.used += len;
        Ok(start)
    }

    /// Copies `bytes` to the card, in the order of the stream. They may be changed at once.
    ///
    /// # Safety
    /// `address` is of as much device memory.
    pub unsafe fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), DriverError> {
        let mut to = address;
        for chunk in bytes.chunks(PART_BYTES) {
            let start = self.room_for(chunk.len())?;
            self.card.bind()?;
            // SAFETY: pinned memory that no copy reads any more; it is left alone until its part's event is reached.
            let result = unsafe {
                start.copy_from_nonoverlapping(chunk.as_ptr(), chunk.len());
                sys::cuMemcpyHtoDAsync_v2(to, start.cast(), chunk.len(), self.card.stream(self.lane))
            };
            check("cuMemcpyHtoDAsync", result)?;
            to += chunk.len() as u64;
        }
        Ok(())
    }

    /// An event behind all that was written.
    pub fn mark(&self) -> Result<Event, DriverError> {
        let event = Event::new(&self.card)?;
        event.record(self.lane).map(|()| event)
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        // The page-locked memory goes with it: no copy may be under way. Nothing can be done about an error.
        let _ = self.card.wait_for(self.lane);
    }
}

/// What is read passes through here.
#[derive(Debug)]
pub(super) struct Incoming {
    card: Arc<Card>,
    bytes: Pinned,
}

impl Incoming {
    pub fn new(card: &Arc<Card>) -> Result<Self, DriverError> {
        Ok(Self { card: card.clone(), bytes: Pinned::new(card)? })
    }

    /// Waits for the compute stream and copies from the card.
    ///
    /// # Safety
    /// `address` is of as much device memory.
    pub unsafe fn read(&mut self, address: u64, bytes: &mut [u8]) -> Result<(), DriverError> {
        let mut from = address;
        for chunk in bytes.chunks_mut(PART_BYTES) {
            self.card.bind()?;
            let (start, stream) = (self.bytes.start, self.card.stream(Lane::Compute));
            // SAFETY: pinned memory for a whole part, which is left alone until the stream has come so far.
            let result = unsafe { sys::cuMemcpyDtoHAsync_v2(start.cast(), from, chunk.len(), stream) };
            check("cuMemcpyDtoHAsync", result)?;
            self.card.wait_for(Lane::Compute)?;
            // SAFETY: the copy is done.
            unsafe { chunk.as_mut_ptr().copy_from_nonoverlapping(start, chunk.len()) };
            from += chunk.len() as u64;
        }
        Ok(())
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        // As of `Outgoing`: a read that failed may be under way.
        let _ = self.card.wait_for(Lane::Compute);
    }
}
