//! A card that is opened: whether it can be used, its context, its two streams, and the kernels it has compiled.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::fmt;
use std::ptr::null_mut;

use cudarc::driver::sys::{self, CUresult};

use crate::cuda::driver::DriverError;
use crate::cuda::ptx::{self, Entry};

/// CUDA 12.4 (drivers from 550), as `cuDriverGetVersion` says it: the first that takes PTX 8.4.
const NEEDED_VERSION: c_int = 12040;
/// Of the compute capability: the kernels copy in the background, which began there.
const NEEDED_MAJOR: c_int = 8;
const LOG_BYTES: usize = 8 << 10;

/// Why a card cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    #[error("there is no NVIDIA driver: libcuda was not found")]
    NoDriver,
    #[error("the NVIDIA driver is too old: it has CUDA {has}, and {needed} is needed (driver 550 or newer)")]
    DriverTooOld { has: String, needed: String },
    #[error("there is no CUDA device {index}: the driver sees {count} of them, counted from 0")]
    NoSuchDevice { index: usize, count: usize },
    #[error("the compute capability of {name} is {major}.{minor}, and 8.0 is needed")]
    CardTooOld { name: String, major: i32, minor: i32 },
    #[error("the driver refuses the kernels: {0}")]
    PtxRefused(String),
    #[error(transparent)]
    Driver(#[from] DriverError),
}

/// The first device that can be used.
///
/// # Errors
/// Why none can: of several devices, why not the first.
pub(super) fn first_usable() -> Result<usize, OpenError> {
    let count = start_driver()?;
    let first = usable_device(0, count);
    match (1..count).find(|index| first.is_err() && usable_device(*index, count).is_ok()) {
        Some(index) => Ok(index),
        None => first.map(|_| 0),
    }
}

/// Loads the driver's library and returns how many devices it sees.
fn start_driver() -> Result<usize, OpenError> {
    // SAFETY: NVIDIA's library may be loaded anywhere. From here on it can be found, and all that is called of it is as old
    // as the version that is asked for first.
    if !unsafe { sys::is_culib_present() } {
        return Err(OpenError::NoDriver);
    }
    let mut version = 0;
    // SAFETY: writes one number, before anything is initialised too.
    check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&mut version) })?;
    if version < NEEDED_VERSION {
        let text = |version| format!("{}.{}", version / 1000, version % 1000 / 10);
        return Err(OpenError::DriverTooOld { has: text(version), needed: text(NEEDED_VERSION) });
    }
    // SAFETY: may be called again and from any thread.
    match unsafe { sys::cuInit(0) } {
        CUresult::CUDA_ERROR_NO_DEVICE => return Ok(0),
        result => check("cuInit", result)?,
    }
    let mut count = 0;
    // SAFETY: writes one number.
    check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&mut count) })?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// The device, and its name.
fn usable_device(index: usize, count: usize) -> Result<(sys::CUdevice, String), OpenError> {
    let ordinal =
        c_int::try_from(index).ok().filter(|_| index < count).ok_or(OpenError::NoSuchDevice { index, count })?;
    let mut device = 0;
    // SAFETY: writes one handle.
    check("cuDeviceGet", unsafe { sys::cuDeviceGet(&mut device, ordinal) })?;
    let mut name = [0 as c_char; 256];
    // SAFETY: as long as it is said to be; ends with a zero.
    check("cuDeviceGetName", unsafe { sys::cuDeviceGetName(name.as_mut_ptr(), 256, device) })?;
    // SAFETY: as above.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
    let capability = |attribute| {
        let mut number = 0;
        // SAFETY: writes one number.
        check("cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&mut number, attribute, device) })
            .map(|()| number)
    };
    let major = capability(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = capability(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    if major < NEEDED_MAJOR {
        return Err(OpenError::CardTooOld { name, major, minor });
    }
    Ok((device, name))
}

/// Success, or what CUDA says about `call`.
pub(super) fn check(call: &str, result: CUresult) -> Result<(), DriverError> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let (mut name, mut description) = (std::ptr::null(), std::ptr::null());
    // SAFETY: each writes the address of a text that lives for ever, or null.
    let known = unsafe { (sys::cuGetErrorName(result, &mut name), sys::cuGetErrorString(result, &mut description)) };
    if known != (CUresult::CUDA_SUCCESS, CUresult::CUDA_SUCCESS) || name.is_null() || description.is_null() {
        return Err(DriverError::Failed(format!("{call}: CUDA error {}", result as u32)));
    }
    // SAFETY: as above.
    let (name, description) = unsafe { (CStr::from_ptr(name), CStr::from_ptr(description)) };
    Err(DriverError::Failed(format!("{call}: {}: {}", name.to_string_lossy(), description.to_string_lossy())))
}

/// The context of a device that everything in this process shares; what is in it goes when nobody holds it any more.
struct Context {
    device: sys::CUdevice,
    raw: sys::CUcontext,
}

impl Context {
    fn retain(device: sys::CUdevice) -> Result<Self, DriverError> {
        let mut raw = null_mut();
        // SAFETY: writes one handle, which `drop` gives back.
        check("cuDevicePrimaryCtxRetain", unsafe { sys::cuDevicePrimaryCtxRetain(&mut raw, device) })?;
        Ok(Self { device, raw })
    }

    fn bind(&self) -> Result<(), DriverError> {
        // SAFETY: retained until drop.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.raw) })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: once for `retain`. Nothing can be done about an error.
        unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// A kernel that the card has compiled.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kernel {
    pub function: sys::CUfunction,
    pub entry: Entry,
}

/// One of the streams of a card.
#[derive(Debug, Clone, Copy)]
pub(super) enum Lane {
    /// All work, in order.
    Compute,
    /// What is sent beside it.
    Transfer,
}

/// An opened card. What it holds is released with the last of its memory, graphs and copies.
pub(super) struct Card {
    context: Context,
    module: sys::CUmodule,
    pub name: String,
    pub kernels: HashMap<String, Kernel>,
    /// `[Lane]`
    streams: [sys::CUstream; 2],
}

// SAFETY: handles of the driver, which any thread may use that has the context; every use begins with `bind`. The driver's
// functions may be called from several threads at once.
unsafe impl Send for Card {}
// SAFETY: as above; nothing here changes after it is opened.
unsafe impl Sync for Card {}

impl fmt::Debug for Card {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Card").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Card {
    pub fn open(index: usize, program: &str) -> Result<Self, OpenError> {
        let (device, name) = usable_device(index, start_driver()?)?;
        // From here on an error releases the context, and with it what was made in it.
        let context = Context::retain(device)?;
        context.bind()?;
        let module = load_module(program)?;
        let kernels = ptx::entries(program).into_iter().map(|(name, entry)| {
            let function = load_kernel(module, &name)?;
            Ok((name, Kernel { function, entry }))
        });
        let kernels = kernels.collect::<Result<_, OpenError>>()?;
        Ok(Self { context, module, name, kernels, streams: [stream()?, stream()?] })
    }

    /// Makes the card the one that this thread's calls are about.
    pub fn bind(&self) -> Result<(), DriverError> {
        self.context.bind()
    }

    pub fn stream(&self, lane: Lane) -> sys::CUstream {
        self.streams[lane as usize]
    }

    /// Waits for all that was asked of a stream.
    pub fn wait_for(&self, lane: Lane) -> Result<(), DriverError> {
        self.bind()?;
        // SAFETY: streams live as long as their card.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.stream(lane)) })
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        if self.bind().is_ok() {
            // SAFETY: made by `open`, and nothing is left that uses them. Nothing can be done about errors.
            unsafe {
                for stream in self.streams {
                    sys::cuStreamDestroy_v2(stream);
                }
                sys::cuModuleUnload(self.module);
            }
        }
    }
}

/// A stream of its own: it does not wait for the default one, which others in this process may use.
fn stream() -> Result<sys::CUstream, DriverError> {
    let mut raw = null_mut();
    // SAFETY: writes one handle.
    let result = unsafe { sys::cuStreamCreate(&mut raw, sys::CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint) };
    check("cuStreamCreate", result).map(|()| raw)
}

/// Has the driver compile `program` for the card (it keeps what it has compiled, for the next start).
fn load_module(program: &str) -> Result<sys::CUmodule, OpenError> {
    let program =
        CString::new(program).map_err(|_| OpenError::PtxRefused("there is a zero byte in them".to_owned()))?;
    let mut log = vec![0u8; LOG_BYTES];
    let mut options =
        [sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER, sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    // The size is passed where an address would be.
    let mut values = [log.as_mut_ptr().cast::<c_void>(), std::ptr::without_provenance_mut(LOG_BYTES)];
    let mut module = null_mut();
    // SAFETY: the text ends with a zero; as many options as values, and the log is as long as they say.
    let result = unsafe {
        sys::cuModuleLoadDataEx(&mut module, program.as_ptr().cast(), 2, options.as_mut_ptr(), values.as_mut_ptr())
    };
    check("cuModuleLoadDataEx", result).map(|()| module).map_err(|error| {
        let log = CStr::from_bytes_until_nul(&log).unwrap_or_default().to_string_lossy();
        let line = log.lines().map(str::trim).find(|line| !line.is_empty());
        OpenError::PtxRefused(line.map_or_else(|| error.to_string(), str::to_owned))
    })
}

fn load_kernel(module: sys::CUmodule, name: &str) -> Result<sys::CUfunction, OpenError> {
    let c_name = CString::new(name).map_err(|_| OpenError::PtxRefused(format!("there is a zero byte in {name}")))?;
    let mut function = null_mut();
    // SAFETY: the module is loaded, the name ends with a zero.
    check("cuModuleGetFunction", unsafe { sys::cuModuleGetFunction(&mut function, module, c_name.as_ptr()) })?;
    // Now and not at the first launch, which may be one that is recorded.
    // SAFETY: of this module.
    check("cuFuncLoad", unsafe { sys::cuFuncLoad(function) })?;
    Ok(function)
}
