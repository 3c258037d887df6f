//! The driver of a device that is not there: lorry's CUDA kernels, compiled as C++, run on the CPU.
//!
//! For tests. What it cannot show is speed, and races that only real memory has.

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_void};
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use kernels::cuda::driver::{DeviceMemory, Driver, DriverError, Grid, MemorySize, Transfer, Unset};

unsafe extern "C" {
    fn lorry_emulator_launch(
        name: *const c_char,
        grid: *const u32,
        first: usize,
        last: usize,
        args: *const c_void,
        argument_bytes: usize,
    ) -> *const c_char;
}

/// Bytes behind every allocation that nobody may write.
const GUARD: usize = 256;
const GUARD_BYTE: u8 = 0xA5;
/// What memory holds that is not set. As an f32 or f16 it is no number.
const UNSET_BYTE: u8 = 0xFF;
/// Blocks from which a launch is worth a second thread.
const BLOCKS_PER_THREAD: usize = 4;

/// A device with as much memory as it is told.
#[derive(Debug)]
pub struct Emulator {
    total: usize,
    used: Arc<AtomicUsize>,
    recording: RefCell<Option<Vec<Launch>>>,
    num_launches: AtomicUsize,
    num_graphs: AtomicUsize,
}

/// A recorded launch.
#[derive(Debug, Clone)]
struct Launch {
    kernel: &'static str,
    grid: Grid,
    args: Vec<u8>,
}

#[derive(Debug)]
pub struct Graph(Vec<Launch>);

#[repr(C, align(256))]
#[derive(Clone, Copy)]
struct Line([u8; 256]);

/// Memory of the emulated device: of the host. Bytes behind it are checked when it is given back.
pub struct Memory {
    lines: Vec<Line>,
    len: usize,
    used: Arc<AtomicUsize>,
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memory").field("len", &self.len).finish_non_exhaustive()
    }
}

impl Memory {
    fn start(&self) -> *mut u8 {
        self.lines.as_ptr().cast_mut().cast()
    }
}

impl DeviceMemory for Memory {
    fn address(&self) -> u64 {
        self.start() as u64
    }

    fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.used.fetch_sub(self.len, Ordering::Relaxed);
        // SAFETY: within the lines.
        let guard =
            unsafe { std::slice::from_raw_parts(self.start().add(self.len), self.lines.len() * 256 - self.len) };
        let is_whole = guard.iter().all(|byte| *byte == GUARD_BYTE);
        assert!(is_whole || thread::panicking(), "a kernel wrote behind an allocation of {} bytes", self.len);
    }
}

/// A copy that takes as many polls as it was told to.
#[derive(Debug)]
pub struct Sent {
    memory: Option<Memory>,
    polls_left: usize,
}

impl Transfer for Sent {
    type Memory = Memory;

    fn poll(&mut self) -> Result<Option<Memory>, DriverError> {
        if self.polls_left > 0 {
            self.polls_left -= 1;
            return Ok(None);
        }
        Ok(self.memory.take())
    }
}

impl Emulator {
    /// Polls that a transfer is under way for.
    const TRANSFER_POLLS: usize = 2;

    /// `total` bytes of memory.
    pub fn new(total: usize) -> Self {
        Self {
            total,
            used: Arc::default(),
            recording: RefCell::new(None),
            num_launches: AtomicUsize::new(0),
            num_graphs: AtomicUsize::new(0),
        }
    }

    /// Kernels run since the start, replayed ones among them.
    pub fn num_launches(&self) -> usize {
        self.num_launches.load(Ordering::Relaxed)
    }

    /// Graphs recorded since the start.
    pub fn num_graphs(&self) -> usize {
        self.num_graphs.load(Ordering::Relaxed)
    }

    /// Bytes allocated and not given back.
    pub fn used(&self) -> Arc<AtomicUsize> {
        self.used.clone()
    }

    /// Takes `bytes` of memory, each of them `value`.
    fn take(&self, bytes: usize, value: u8) -> Result<Memory, DriverError> {
        let MemorySize { free, total } = self.memory_size()?;
        if bytes > free {
            return Err(DriverError::OutOfMemory { wanted: bytes, free, total });
        }
        self.used.fetch_add(bytes, Ordering::Relaxed);
        let lines = vec![Line([value; 256]); (bytes + GUARD).div_ceil(256)];
        let memory = Memory { lines, len: bytes, used: self.used.clone() };
        // SAFETY: within the lines, which are this function's alone.
        unsafe { memory.start().add(bytes).write_bytes(GUARD_BYTE, memory.lines.len() * 256 - bytes) };
        Ok(memory)
    }

    fn run(&self, launch: &Launch) -> Result<(), DriverError> {
        self.num_launches.fetch_add(1, Ordering::Relaxed);
        let name = CString::new(launch.kernel).expect("a kernel's name holds no zero");
        let num_blocks: usize = launch.grid.iter().map(|n| *n as usize).product();
        let num_threads =
            thread::available_parallelism().map_or(1, usize::from).min(num_blocks / BLOCKS_PER_THREAD + 1);
        let fault = Mutex::new(None);
        let part = |index: usize| {
            let (first, last) = (num_blocks * index / num_threads, num_blocks * (index + 1) / num_threads);
            let (grid, args) = (launch.grid.as_ptr(), launch.args.as_ptr().cast());
            // SAFETY: the caller of `launch` or `replay` vouches for the arguments; name and grid live until it returns.
            let said = unsafe { lorry_emulator_launch(name.as_ptr(), grid, first, last, args, launch.args.len()) };
            if !said.is_null() {
                // SAFETY: a text that lives for ever.
                let said = unsafe { CStr::from_ptr(said) }.to_string_lossy().into_owned();
                *fault.lock().unwrap_or_else(|e| e.into_inner()) = Some(said);
            }
        };
        thread::scope(|scope| {
            (1..num_threads).for_each(|index| drop(scope.spawn(move || part(index))));
            part(0);
        });
        match fault.into_inner().unwrap_or_else(|e| e.into_inner()) {
            None => Ok(()),
            Some(fault) => Err(DriverError::Failed(format!("kernel {}: {fault}", launch.kernel))),
        }
    }
}

impl Driver for Emulator {
    type Memory = Memory;
    type Graph = Graph;
    type Transfer = Sent;

    fn name(&self) -> String {
        "emulated CUDA device".to_owned()
    }

    fn memory_size(&self) -> Result<MemorySize, DriverError> {
        Ok(MemorySize { free: self.total.saturating_sub(self.used.load(Ordering::Relaxed)), total: self.total })
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, DriverError> {
        self.take(bytes, 0)
    }

    fn allocate_unset(&self, bytes: usize) -> Result<Unset<Memory>, DriverError> {
        self.take(bytes, UNSET_BYTE).map(Unset)
    }

    fn write(&self, memory: &Memory, offset: usize, bytes: &[u8]) -> Result<(), DriverError> {
        assert!(offset + bytes.len() <= memory.len, "bytes outside device memory");
        // SAFETY: within the allocation (checked), which no kernel works on between launches.
        unsafe { memory.start().add(offset).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Ok(())
    }

    fn read(&self, memory: &Memory, offset: usize, bytes: &mut [u8]) -> Result<(), DriverError> {
        assert!(offset + bytes.len() <= memory.len, "bytes outside device memory");
        // SAFETY: as in `write`.
        unsafe { bytes.as_mut_ptr().copy_from_nonoverlapping(memory.start().add(offset), bytes.len()) };
        Ok(())
    }

    unsafe fn launch(&self, kernel: &'static str, grid: Grid, args: &[u8]) -> Result<(), DriverError> {
        let launch = Launch { kernel, grid, args: args.to_vec() };
        match &mut *self.recording.borrow_mut() {
            Some(launches) => launches.push(launch),
            None => return self.run(&launch),
        }
        Ok(())
    }

    fn begin_graph(&self) -> Result<(), DriverError> {
        *self.recording.borrow_mut() = Some(Vec::new());
        Ok(())
    }

    fn end_graph(&self) -> Result<Graph, DriverError> {
        let launches = self.recording.borrow_mut().take();
        self.num_graphs.fetch_add(1, Ordering::Relaxed);
        launches.map(Graph).ok_or_else(|| DriverError::Failed("no graph was begun".to_owned()))
    }

    unsafe fn replay(&self, graph: &Graph) -> Result<(), DriverError> {
        graph.0.iter().try_for_each(|launch| self.run(launch))
    }

    fn send(&self, bytes: Vec<u8>, Unset(memory): Unset<Memory>) -> Result<Sent, DriverError> {
        assert_eq!(bytes.len(), memory.len, "the bytes of a transfer");
        self.write(&memory, 0, &bytes)?;
        Ok(Sent { memory: Some(memory), polls_left: Self::TRANSFER_POLLS })
    }

    fn synchronize(&self) -> Result<(), DriverError> {
        Ok(())
    }
}
