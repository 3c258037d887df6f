//! The driver of a real card over a libcuda of the tests (`../libcuda.cpp`), which does everything as late as it may.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use kernels::cuda::driver::{DeviceMemory, Driver, DriverError, MemorySize, Transfer};
use kernels::cuda::nvidia::{Nvidia, OpenError, Sent};
use libloading::{Library, Symbol};

/// One kernel, `add`, in PTX as NVRTC writes it. What it does is below.
const PROGRAM: &str =
    ".visible .entry add(\n\t.param .align 8 .b8 add_param_0[16]\n)\n.maxntid 64, 1, 1\n{\n\tret;\n}\n";

/// Adds `number` to the byte at `address`, once for each block.
#[repr(C)]
struct AddArgs {
    address: u64,
    number: u64,
}

type Hook = extern "C" fn(*const c_char, *const c_uint, c_uint, *const c_void, usize);
type Set = unsafe extern "C" fn(c_int, c_int, c_int, c_int, *const c_char, Hook);

extern "C" fn add(name: *const c_char, grid: *const c_uint, threads: c_uint, args: *const c_void, bytes: usize) {
    // SAFETY: what the driver was given.
    let (name, [x, y, z], args) =
        unsafe { (CStr::from_ptr(name), grid.cast::<[c_uint; 3]>().read(), args.cast::<AddArgs>().read_unaligned()) };
    assert_eq!((name.to_str(), threads, bytes), (Ok("add"), 64, size_of::<AddArgs>()));
    // SAFETY: memory of the driver is memory of this process.
    unsafe {
        let byte = args.address as *mut u8;
        *byte = byte.read().wrapping_add((args.number as u32 * x * y * z) as u8);
    }
}

/// The machine under test: its driver is one for the whole process, so the tests take turns.
struct Machine {
    library: Library,
    version: c_int,
    num_devices: c_int,
    major: c_int,
    init: c_int,
    refusal: &'static str,
    _turn: MutexGuard<'static, ()>,
}

impl Machine {
    fn new() -> Self {
        static TURN: Mutex<()> = Mutex::new(());
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: a library of this crate. A second look for `libcuda.so` finds the one that is loaded.
        let library = unsafe { Library::new(env!("LORRY_TEST_DRIVER")) }.unwrap();
        Self { library, version: 12040, num_devices: 1, major: 9, init: 0, refusal: "", _turn }
    }

    fn open(&self, index: usize) -> Result<Nvidia, OpenError> {
        self.start();
        Nvidia::with_program(index, PROGRAM)
    }

    fn start(&self) {
        let refusal = CString::new(self.refusal).unwrap();
        // SAFETY: as it is declared there.
        unsafe {
            let set: Symbol<'_, Set> = self.library.get(b"libcuda_set").unwrap();
            set(self.version, self.num_devices, self.major, self.init, refusal.as_ptr(), add);
        }
    }

    /// Takes the page-locked memory that is left, or gives it back.
    fn set_no_pinned(&self, no_pinned: bool) {
        // SAFETY: as it is declared there.
        unsafe { self.library.get::<unsafe extern "C" fn(bool)>(b"libcuda_set_no_pinned").unwrap()(no_pinned) }
    }

    /// What was not given back to the driver.
    fn left(&self) -> c_int {
        // SAFETY: as it is declared there.
        unsafe { self.library.get::<unsafe extern "C" fn() -> c_int>(b"libcuda_left").unwrap()() }
    }
}

fn launch_add(nvidia: &Nvidia, address: u64, number: u64, grid: [u32; 3]) -> Result<(), DriverError> {
    let args = [address.to_ne_bytes(), number.to_ne_bytes()].concat();
    // SAFETY: an address of the driver's memory.
    unsafe { nvidia.launch("add", grid, &args) }
}

fn bytes_of<M>(nvidia: &Nvidia, memory: &M) -> Vec<u8>
where
    M: DeviceMemory,
    Nvidia: Driver<Memory = M>,
{
    let mut bytes = vec![1; memory.len()];
    nvidia.read(memory, 0, &mut bytes).unwrap();
    bytes
}

fn noise(len: usize) -> Vec<u8> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

fn send(nvidia: &Nvidia, bytes: Vec<u8>) -> Sent {
    let memory = nvidia.allocate_unset(bytes.len()).unwrap();
    nvidia.send(bytes, memory).unwrap()
}

/// Waits until the copy is there.
fn memory_of<T: Transfer>(mut transfer: T) -> T::Memory {
    loop {
        if let Some(memory) = transfer.poll().unwrap() {
            return memory;
        }
        thread::yield_now();
    }
}

#[test]
fn what_is_missing_is_said_in_one_sentence() {
    let mut machine = Machine::new();
    machine.version = 12020;
    let too_old = OpenError::DriverTooOld { has: "12.2".to_owned(), needed: "12.4".to_owned() };
    assert_eq!(machine.open(0).unwrap_err(), too_old);
    assert_eq!(Nvidia::first_usable(), Err(too_old));
    machine.version = 13000;

    machine.num_devices = 0;
    assert_eq!(machine.open(0).unwrap_err(), OpenError::NoSuchDevice { index: 0, count: 0 });
    assert_eq!(Nvidia::first_usable(), Err(OpenError::NoSuchDevice { index: 0, count: 0 }));
    machine.num_devices = 1;
    assert_eq!(machine.open(1).unwrap_err(), OpenError::NoSuchDevice { index: 1, count: 1 });

    machine.major = 7;
    let too_old = OpenError::CardTooOld { name: "Card 0".to_owned(), major: 7, minor: 0 };
    assert_eq!(machine.open(0).unwrap_err(), too_old);
    assert_eq!(Nvidia::first_usable(), Err(too_old));
    machine.major = 9;

    machine.refusal = "\n ptxas fatal: Unsupported .version 8.4\nptxas fatal: Ptx assembly aborted";
    let refused = OpenError::PtxRefused("ptxas fatal: Unsupported .version 8.4".to_owned());
    assert_eq!(machine.open(0).unwrap_err(), refused);
    machine.refusal = "";

    machine.init = 999;
    assert_eq!(machine.open(0).unwrap_err().to_string(), "cuInit: CUDA_ERROR: error 999");
    assert_eq!(machine.left(), 0);
}

#[test]
fn the_first_usable_device_is_not_always_the_first() {
    let mut machine = Machine::new();
    machine.num_devices = 3;
    machine.start();
    assert_eq!(Nvidia::first_usable(), Ok(2));
    assert_eq!(machine.open(2).unwrap().name(), "Card 2");
    assert_eq!(machine.left(), 0);
}

#[test]
fn the_kernels_of_the_binary_are_found_in_its_program() {
    let machine = Machine::new();
    machine.start();
    drop(Nvidia::open(0).unwrap());
    assert_eq!(machine.left(), 0);
}

#[test]
fn memory_is_zero_and_what_is_written_may_be_changed_at_once() {
    let machine = Machine::new();
    let nvidia = machine.open(0).unwrap();
    let memory = nvidia.allocate(30 << 20).unwrap();
    assert!(memory.address().is_multiple_of(256) && bytes_of(&nvidia, &memory).iter().all(|byte| *byte == 0));

    // More than the page-locked memory holds, and then many small pieces, each from the same bytes.
    let mut wanted = noise(memory.len());
    nvidia.write(&memory, 0, &wanted).unwrap();
    let mut piece = vec![0; 300_007];
    for round in 0..90 {
        piece.fill(round as u8 + 1);
        let offset = round * piece.len();
        nvidia.write(&memory, offset, &piece).unwrap();
        wanted[offset..offset + piece.len()].copy_from_slice(&piece);
    }
    piece.fill(0);
    assert!(bytes_of(&nvidia, &memory) == wanted);

    let mut part = [0; 5];
    nvidia.read(&memory, 1_000_003, &mut part).unwrap();
    assert_eq!(part, wanted[1_000_003..1_000_008]);
    drop((memory, nvidia));
    assert_eq!(machine.left(), 0);
}

#[test]
fn too_much_memory_is_an_error_with_its_numbers() {
    let machine = Machine::new();
    let nvidia = machine.open(0).unwrap();
    let (total, taken) = (64 << 20, nvidia.allocate(1 << 20).unwrap());
    let free = total - (1 << 20);
    assert_eq!(nvidia.allocate(total).unwrap_err(), DriverError::OutOfMemory { wanted: total, free, total });
    drop(taken);
    assert_eq!(nvidia.memory_size().unwrap().free, total);
    assert_eq!(nvidia.allocate(0).unwrap().len(), 0);
}

#[test]
fn launches_and_writes_happen_in_order() {
    let machine = Machine::new();
    let nvidia = machine.open(0).unwrap();
    let memory = nvidia.allocate(2).unwrap();
    launch_add(&nvidia, memory.address(), 5, [2, 3, 1]).unwrap();
    nvidia.write(&memory, 1, &[7]).unwrap();
    launch_add(&nvidia, memory.address() + 1, 1, [1, 1, 1]).unwrap();
    launch_add(&nvidia, memory.address(), 100, [4, 0, 1]).unwrap();
    assert_eq!(bytes_of(&nvidia, &memory), [30, 8]);

    // SAFETY: neither is started.
    let unknown = unsafe { nvidia.launch("subtract", [1, 1, 1], &[0; 16]) };
    assert_eq!(unknown, Err(DriverError::Failed("there is no kernel subtract".to_owned())));
    // SAFETY: as above.
    let too_short = unsafe { nvidia.launch("add", [1, 1, 1], &[0; 12]) };
    assert_eq!(too_short.unwrap_err().to_string(), "kernel add takes 16 bytes of arguments, not 12");
    nvidia.synchronize().unwrap();
}

#[test]
fn a_graph_does_its_launches_again() {
    let machine = Machine::new();
    let nvidia = machine.open(0).unwrap();
    let memory = nvidia.allocate(1).unwrap();
    nvidia.begin_graph().unwrap();
    launch_add(&nvidia, memory.address(), 2, [1, 1, 1]).unwrap();
    launch_add(&nvidia, memory.address(), 3, [1, 1, 1]).unwrap();
    let graph = nvidia.end_graph().unwrap();
    assert_eq!(bytes_of(&nvidia, &memory), [0]);
    for _ in 0..3 {
        // SAFETY: the memory lives.
        unsafe { nvidia.replay(&graph) }.unwrap();
    }
    nvidia.write(&memory, 0, &[100]).unwrap();
    // SAFETY: as above.
    unsafe { nvidia.replay(&graph) }.unwrap();
    assert_eq!(bytes_of(&nvidia, &memory), [105]);
    // Dropped before what it was of.
    drop((nvidia, graph, memory));
    assert_eq!(machine.left(), 0);
}

#[test]
fn only_launches_are_recorded() {
    let machine = Machine::new();
    let nvidia = machine.open(0).unwrap();
    let memory = nvidia.allocate(4).unwrap();
    assert_eq!(nvidia.end_graph().unwrap_err().to_string(), "no graph was begun");
    nvidia.begin_graph().unwrap();
    let said = |result: Result<(), DriverError>| result.unwrap_err().to_string();
    assert_eq!(said(nvidia.write(&memory, 0, &[1])), "a write while a graph is recorded");
    assert_eq!(said(nvidia.read(&memory, 0, &mut [1])), "a read while a graph is recorded");
    assert_eq!(said(nvidia.synchronize()), "a wait while a graph is recorded");
    assert_eq!(said(nvidia.begin_graph()), "a second graph is begun while a graph is recorded");
    assert_eq!(said(nvidia.allocate(1).map(drop)), "an allocation while a graph is recorded");
    launch_add(&nvidia, memory.address(), 2, [1, 1, 1]).unwrap();
    // Another thread may free what it holds.
    let other = nvidia.end_graph().and_then(|_| nvidia.allocate(8)).unwrap();
    nvidia.begin_graph().unwrap();
    thread::spawn(move || drop(other)).join().unwrap();
    launch_add(&nvidia, memory.address(), 2, [1, 1, 1]).unwrap();
    let graph = nvidia.end_graph().unwrap();
    // SAFETY: the memory lives.
    unsafe { nvidia.replay(&graph) }.unwrap();
    assert_eq!(bytes_of(&nvidia, &memory), [2, 0, 0, 0]);
}

#[test]
fn what_is_sent_is_there_when_the_transfer_says_so() {
    let machine = Machine::new();
    let nvidia = machine.open(0).unwrap();
    // More than the page-locked memory holds, each and all together; large and small ones in turn.
    let bytes: Vec<_> = (0..8).map(|i| noise(if i % 2 == 0 { 9_000_000 + i } else { 100 * (i - 1) })).collect();
    let sent: Vec<_> = bytes.iter().map(|bytes| send(&nvidia, bytes.clone())).collect();
    for (transfer, bytes) in sent.into_iter().zip(&bytes).rev() {
        assert!(bytes_of(&nvidia, &memory_of(transfer)) == *bytes, "{} bytes", bytes.len());
    }

    let mut again = send(&nvidia, vec![1]);
    while again.poll().unwrap().is_none() {}
    assert!(again.poll().unwrap().is_none(), "what was handed over is gone");
    // Nobody waits for these.
    drop((send(&nvidia, bytes[0].clone()), send(&nvidia, vec![2])));
    drop((again, nvidia));
    assert_eq!(machine.left(), 0);
}

#[test]
fn a_transfer_that_fails_says_so_and_the_next_one_does_not() {
    let machine = Machine::new();
    let nvidia = machine.open(0).unwrap();
    machine.set_no_pinned(true);
    let mut failed = send(&nvidia, vec![1; 1000]);
    let error = loop {
        match failed.poll() {
            Ok(None) => thread::yield_now(),
            Ok(Some(_)) => panic!("there is nothing to copy it through"),
            Err(error) => break error.to_string(),
        }
    };
    assert_eq!(error, "cuMemHostAlloc: CUDA_ERROR: error 2");
    let MemorySize { free, total } = nvidia.memory_size().unwrap();
    assert_eq!(free, total, "its memory is given back");
    machine.set_no_pinned(false);
    assert_eq!(bytes_of(&nvidia, &memory_of(send(&nvidia, vec![2; 3]))), [2; 3]);
    drop((failed, nvidia));
    assert_eq!(machine.left(), 0);
}

#[test]
fn a_transfer_does_not_wait_for_what_was_asked_for_before() {
    let machine = Machine::new();
    let nvidia = machine.open(0).unwrap();
    let memory = nvidia.allocate(1).unwrap();
    nvidia.synchronize().unwrap();
    launch_add(&nvidia, memory.address(), 4, [1, 1, 1]).unwrap();
    let sent = memory_of(send(&nvidia, vec![7; 5_000_000]));
    // SAFETY: memory of the driver is memory of this process, and nobody else is at it.
    assert_eq!(unsafe { (memory.address() as *const u8).read() }, 0, "the launch is still to be done");
    assert_eq!(bytes_of(&nvidia, &memory), [4]);
    assert!(bytes_of(&nvidia, &sent).iter().all(|byte| *byte == 7));
}

#[test]
fn the_thread_that_opens_is_not_the_one_that_works() {
    let machine = Machine::new();
    let nvidia = machine.open(0).unwrap();
    let left = thread::spawn(move || {
        let memory = nvidia.allocate(1).unwrap();
        launch_add(&nvidia, memory.address(), 4, [1, 1, 1]).unwrap();
        assert_eq!(bytes_of(&nvidia, &memory), [4]);
        // Memory and a copy that is under way outlive the driver.
        let sent = send(&nvidia, vec![9]);
        nvidia.write(&memory, 0, &[5]).unwrap();
        drop(nvidia);
        (memory, sent)
    });
    let (memory, sent) = left.join().unwrap();
    drop(memory_of(sent));
    drop(memory);
    assert_eq!(machine.left(), 0);
}

#[test]
#[should_panic(expected = "bytes outside device memory")]
fn a_write_behind_the_end_is_refused() {
    let machine = Machine::new();
    let nvidia = machine.open(0).unwrap();
    let memory = nvidia.allocate(8).unwrap();
    let _ = nvidia.write(&memory, usize::MAX, &[1, 2]);
}
