//! The driver of a real card: NVIDIA's, loaded when it is asked for. Nothing of CUDA is needed to build or to start lorry.
//!
//! One stream does all work in order, a second one copies what is sent beside it. What is written and read passes through
//! page-locked memory.

mod card;
mod staging;
mod transfers;

use std::cell::{Cell, RefCell};
use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUresult};

use self::card::{Card, Kernel, Lane, check};
use self::staging::{Incoming, Outgoing};
use self::transfers::Transfers;
use super::driver::{DeviceMemory, Driver, DriverError, Grid, MemorySize, Unset};
use super::ptx;

pub use self::card::OpenError;
pub use self::transfers::Sent;

/// An NVIDIA card of compute capability 8.0 or newer.
#[derive(Debug)]
pub struct Nvidia {
    card: Arc<Card>,
    outgoing: RefCell<Outgoing>,
    incoming: RefCell<Incoming>,
    transfers: Transfers,
    /// Whether launches are recorded.
    recording: Cell<bool>,
}

impl Nvidia {
    /// The first device that can be used.
    ///
    /// # Errors
    /// Why none can, in one sentence.
    pub fn first_usable() -> Result<usize, OpenError> {
        card::first_usable()
    }

    /// Opens device `index`, of those that CUDA counts, and has it compile the kernels.
    ///
    /// # Errors
    /// What is missing, in one sentence.
    pub fn open(index: usize) -> Result<Self, OpenError> {
        Self::with_program(index, &ptx::text())
    }

    /// [`Nvidia::open`] with other kernels, in PTX as NVRTC writes it.
    ///
    /// # Errors
    /// As there.
    pub fn with_program(index: usize, ptx: &str) -> Result<Self, OpenError> {
        let card = Arc::new(Card::open(index, ptx)?);
        let outgoing = RefCell::new(Outgoing::new(&card, Lane::Compute)?);
        let incoming = RefCell::new(Incoming::new(&card)?);
        let transfers = Transfers::start(&card);
        Ok(Self { card, outgoing, incoming, transfers, recording: Cell::new(false) })
    }

    /// Makes the card current, unless launches are recorded: they alone may be part of a graph.
    fn bind_to(&self, what: &str) -> Result<(), DriverError> {
        if self.recording.get() {
            return Err(DriverError::Failed(format!("{what} while a graph is recorded")));
        }
        self.card.bind()
    }

    fn kernel(&self, name: &str, args: &[u8]) -> Result<Kernel, DriverError> {
        let kernel =
            self.card.kernels.get(name).ok_or_else(|| DriverError::Failed(format!("there is no kernel {name}")))?;
        if kernel.entry.argument_bytes != args.len() {
            let (takes, given) = (kernel.entry.argument_bytes, args.len());
            return Err(DriverError::Failed(format!("kernel {name} takes {takes} bytes of arguments, not {given}")));
        }
        Ok(*kernel)
    }
}

impl Driver for Nvidia {
    type Memory = Memory;
    type Graph = Graph;
    type Transfer = Sent;

    fn name(&self) -> String {
        self.card.name.clone()
    }

    fn memory_size(&self) -> Result<MemorySize, DriverError> {
        self.card.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two numbers.
        check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        Ok(MemorySize { free, total })
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, DriverError> {
        let Unset(memory) = self.allocate_unset(bytes)?;
        if bytes > 0 {
            let stream = self.card.stream(Lane::Compute);
            // SAFETY: as long as it is said to be.
            check("cuMemsetD8Async", unsafe { sys::cuMemsetD8Async(memory.address, 0, bytes, stream) })?;
        }
        Ok(memory)
    }

    fn allocate_unset(&self, bytes: usize) -> Result<Unset<Memory>, DriverError> {
        self.bind_to("an allocation")?;
        let mut address = 0;
        // SAFETY: writes one address, of memory that `Memory` gives back; the driver aligns to 256 at least.
        match unsafe { sys::cuMemAlloc_v2(&mut address, bytes.max(1)) } {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let MemorySize { free, total } = self.memory_size()?;
                return Err(DriverError::OutOfMemory { wanted: bytes, free, total });
            }
            result => check("cuMemAlloc", result)?,
        }
        Ok(Unset(Memory { address, len: bytes, card: self.card.clone() }))
    }

    fn write(&self, memory: &Memory, offset: usize, bytes: &[u8]) -> Result<(), DriverError> {
        let address = memory.part(offset, bytes.len());
        self.bind_to("a write")?;
        // SAFETY: within the memory (checked), which goes only when the card has done what it was asked for.
        unsafe { self.outgoing.borrow_mut().write(address, bytes) }
    }

    fn read(&self, memory: &Memory, offset: usize, bytes: &mut [u8]) -> Result<(), DriverError> {
        let address = memory.part(offset, bytes.len());
        self.bind_to("a read")?;
        // SAFETY: as in `write`.
        unsafe { self.incoming.borrow_mut().read(address, bytes) }
    }

    unsafe fn launch(&self, kernel: &'static str, grid: Grid, args: &[u8]) -> Result<(), DriverError> {
        let Kernel { function, entry } = self.kernel(kernel, args)?;
        let [x, y, z] = grid;
        if x == 0 || y == 0 || z == 0 {
            return Ok(());
        }
        self.card.bind()?;
        // One parameter: the structure, which is copied before the call returns.
        let mut parameters = [args.as_ptr().cast_mut().cast()];
        // SAFETY: the function is of this card's module and takes as many bytes (checked); the caller vouches for them.
        let result = unsafe {
            let (threads, stream) = (entry.threads, self.card.stream(Lane::Compute));
            sys::cuLaunchKernel(function, x, y, z, threads, 1, 1, 0, stream, parameters.as_mut_ptr(), null_mut())
        };
        check(kernel, result)
    }

    fn begin_graph(&self) -> Result<(), DriverError> {
        self.bind_to("a second graph is begun")?;
        // Other threads may allocate and free meanwhile.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives.
        check("cuStreamBeginCapture", unsafe { sys::cuStreamBeginCapture_v2(self.card.stream(Lane::Compute), mode) })?;
        self.recording.set(true);
        Ok(())
    }

    fn end_graph(&self) -> Result<Graph, DriverError> {
        if !self.recording.replace(false) {
            return Err(DriverError::Failed("no graph was begun".to_owned()));
        }
        self.card.bind()?;
        let (mut recorded, mut executable) = (null_mut(), null_mut());
        // SAFETY: writes one handle, of a graph that is destroyed below.
        check("cuStreamEndCapture", unsafe {
            sys::cuStreamEndCapture(self.card.stream(Lane::Compute), &mut recorded)
        })?;
        // SAFETY: the graph is whole, and its executable form needs it no more once it is made.
        let result = unsafe {
            let result = sys::cuGraphInstantiateWithFlags(&mut executable, recorded, 0);
            sys::cuGraphDestroy(recorded);
            result
        };
        check("cuGraphInstantiate", result)?;
        Ok(Graph { executable, card: self.card.clone() })
    }

    unsafe fn replay(&self, graph: &Graph) -> Result<(), DriverError> {
        self.bind_to("a replay")?;
        // SAFETY: the graph lives; what its launches write is the caller's word.
        check("cuGraphLaunch", unsafe { sys::cuGraphLaunch(graph.executable, self.card.stream(Lane::Compute)) })
    }

    fn send(&self, bytes: Vec<u8>, Unset(memory): Unset<Memory>) -> Result<Sent, DriverError> {
        assert_eq!(bytes.len(), memory.len, "the bytes of a transfer");
        Ok(self.transfers.send(bytes, memory))
    }

    fn synchronize(&self) -> Result<(), DriverError> {
        self.bind_to("a wait")?;
        self.card.wait_for(Lane::Compute)
    }
}

/// Memory of the card. It may be dropped by any thread: the driver waits for what uses it.
#[derive(Debug)]
pub struct Memory {
    address: u64,
    len: usize,
    card: Arc<Card>,
}

impl Memory {
    /// Where `len` bytes from `offset` on begin.
    ///
    /// # Panics
    /// When so much is not there.
    fn part(&self, offset: usize, len: usize) -> u64 {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len), "bytes outside device memory");
        self.address + offset as u64
    }
}

impl DeviceMemory for Memory {
    fn address(&self) -> u64 {
        self.address
    }

    fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.card.bind().is_ok() {
            // SAFETY: from `cuMemAlloc`, which is freed only after all that the card was asked for before. Nothing can be
            // done about an error.
            unsafe { sys::cuMemFree_v2(self.address) };
        }
    }
}

/// Recorded launches, ready to be replayed.
#[derive(Debug)]
pub struct Graph {
    executable: sys::CUgraphExec,
    card: Arc<Card>,
}

// SAFETY: a handle, which any thread may use that has the context.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.card.bind().is_ok() {
            // SAFETY: from `cuGraphInstantiate`; one that is under way is freed when it is done. Nothing can be done about
            // an error.
            unsafe { sys::cuGraphExecDestroy(self.executable) };
        }
    }
}
