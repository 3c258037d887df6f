//! What the CUDA device asks of a driver: memory, copies, launches, and launches recorded to be replayed.
//!
//! Two things are one: the driver of a card (`nvidia.rs`), and the emulator that runs the same kernels on the CPU. All work
//! of one driver is done in the order it was asked for, except what [`Driver::send`] sends beside it.

use std::fmt;

/// Why the device cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DriverError {
    #[error("the device has no room for {wanted} bytes: {free} of {total} are free")]
    OutOfMemory { wanted: usize, free: usize, total: usize },
    #[error("{0}")]
    Failed(String),
}

/// Bytes of device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemorySize {
    pub free: usize,
    pub total: usize,
}

/// How often a kernel runs: blocks in x, y and z. The threads of a block are the kernel's own.
pub type Grid = [u32; 3];

/// The argument of a kernel: one `#[repr(C)]` structure that `args.cuh` has too.
///
/// # Safety
/// Every byte is initialised (no padding), and addresses in it are of this driver's memory and as long as the kernel reads.
pub unsafe trait KernelArgs: Copy {}

/// The bytes of an argument.
pub(crate) fn bytes_of<T: KernelArgs>(args: &T) -> &[u8] {
    // SAFETY: `KernelArgs` has no padding, and a byte no alignment.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(args).cast(), size_of::<T>()) }
}

pub trait Driver: fmt::Debug + Send + 'static {
    /// Device memory, given back when dropped.
    type Memory: DeviceMemory;
    /// Launches to be replayed.
    type Graph: fmt::Debug + Send;
    /// A copy under way beside everything else.
    type Transfer: Transfer<Memory = Self::Memory>;

    /// What the device is called, for people.
    fn name(&self) -> String;

    /// # Errors
    /// When the device does not answer.
    fn memory_size(&self) -> Result<MemorySize, DriverError>;

    /// Takes `bytes` of zeros, aligned to 256.
    ///
    /// # Errors
    /// When there is not so much.
    fn allocate(&self, bytes: usize) -> Result<Self::Memory, DriverError>;

    /// Takes `bytes` of whatever is in them, aligned to 256: for [`Driver::send`].
    ///
    /// # Errors
    /// When there is not so much.
    fn allocate_unset(&self, bytes: usize) -> Result<Unset<Self::Memory>, DriverError>;

    /// Copies `bytes` to `memory` from `offset` on; they may be changed at once.
    ///
    /// # Panics
    /// When they do not fit.
    fn write(&self, memory: &Self::Memory, offset: usize, bytes: &[u8]) -> Result<(), DriverError>;

    /// Takes memory that holds `bytes`.
    ///
    /// # Errors
    /// When there is not so much.
    fn upload(&self, bytes: &[u8]) -> Result<Self::Memory, DriverError> {
        let memory = self.allocate(bytes.len())?;
        self.write(&memory, 0, bytes)?;
        Ok(memory)
    }

    /// As [`Driver::upload`].
    fn upload_floats(&self, values: &[f32]) -> Result<Self::Memory, DriverError> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.upload(&bytes)
    }

    /// Waits for all that was asked for, and copies from `memory`.
    ///
    /// # Panics
    /// When so much is not there.
    fn read(&self, memory: &Self::Memory, offset: usize, bytes: &mut [u8]) -> Result<(), DriverError>;

    /// Starts `kernel` with `args`, the bytes of its argument.
    ///
    /// # Safety
    /// As in [`KernelArgs`]; and the kernel writes only where the caller may.
    unsafe fn launch(&self, kernel: &'static str, grid: Grid, args: &[u8]) -> Result<(), DriverError>;

    /// Launches from now on are recorded and not done.
    fn begin_graph(&self) -> Result<(), DriverError>;

    fn end_graph(&self) -> Result<Self::Graph, DriverError>;

    /// Does the launches of a graph again, with the arguments they were recorded with.
    ///
    /// # Safety
    /// What held for the launches when they were recorded must hold now.
    unsafe fn replay(&self, graph: &Self::Graph) -> Result<(), DriverError>;

    /// Copies `bytes` to `memory` beside what else is done, also what was asked for before.
    ///
    /// # Errors
    /// When it cannot begin.
    ///
    /// # Panics
    /// When they are not as many as the memory holds.
    fn send(&self, bytes: Vec<u8>, memory: Unset<Self::Memory>) -> Result<Self::Transfer, DriverError>;

    /// Waits for all that was asked for.
    fn synchronize(&self) -> Result<(), DriverError>;
}

pub trait DeviceMemory: fmt::Debug + Send {
    fn address(&self) -> u64;
    fn len(&self) -> usize;
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Device memory that is to be written whole before it is used. Nothing is under way in it.
#[derive(Debug)]
pub struct Unset<M>(pub M);

pub trait Transfer: fmt::Debug + Send {
    type Memory;

    /// The memory, once all is there.
    ///
    /// # Errors
    /// When the copy failed.
    fn poll(&mut self) -> Result<Option<Self::Memory>, DriverError>;
}
