//! The emulator's tensor-core products against NVIDIA's tables: PTX ISA, "Matrix Fragments for mma.m16n8k16 with .u8/.s8",
//! "… mma.m16n8k32", and "… mma.m16n8k16 with floating point type". The tables stand here a second time, in the ISA's own
//! terms: what element register element `i` of a lane is, where `../mma.h` says where an element is.

use std::collections::HashSet;
use std::ffi::c_int;

use emulator::Emulator;
use half::f16;
use kernels::cuda::driver::{DeviceMemory, Driver};
use proptest::prelude::*;

unsafe extern "C" {
    fn lorry_emulator_fragment(matrix: c_int, row: c_int, column: c_int, lane: *mut c_int, index: *mut c_int);
}

/// Row and column of element `i` in a lane of `group` and `thread` (groupID and threadID_in_group).
type Table = fn(group: usize, thread: usize, i: usize) -> (usize, usize);

/// `.u8/.s8`, 16 × 16 and 16 × 32.
fn bytes_a(group: usize, thread: usize, i: usize) -> (usize, usize) {
    let row = if i < 4 || (8..12).contains(&i) { group } else { group + 8 };
    let column = if i < 8 { thread * 4 + (i & 3) } else { thread * 4 + (i & 3) + 16 };
    (row, column)
}

/// `.u8/.s8`, 16 × 8 and 32 × 8.
fn bytes_b(group: usize, thread: usize, i: usize) -> (usize, usize) {
    let row = if i < 4 { thread * 4 + (i & 3) } else { thread * 4 + (i & 3) + 16 };
    (row, group)
}

/// `.f16`, 16 × 16.
fn halves_a(group: usize, thread: usize, i: usize) -> (usize, usize) {
    let row = if i < 2 || (4..6).contains(&i) { group } else { group + 8 };
    let column = if i < 4 { thread * 2 + (i & 1) } else { thread * 2 + (i & 1) + 8 };
    (row, column)
}

/// `.f16`, 16 × 8.
fn halves_b(group: usize, thread: usize, i: usize) -> (usize, usize) {
    let row = if i < 2 { thread * 2 + (i & 1) } else { thread * 2 + (i & 1) + 8 };
    (row, group)
}

/// The sums of all three, 16 × 8.
fn sums(group: usize, thread: usize, i: usize) -> (usize, usize) {
    let row = if i < 2 { group } else { group + 8 };
    (row, thread * 2 + (i & 1))
}

/// Row and column of element `i` of `lane`.
fn element(table: Table, lane: usize, i: usize) -> (usize, usize) {
    table(lane >> 2, lane % 4, i)
}

#[test]
fn every_element_is_where_nvidia_says() {
    let matrices: [(c_int, Table, usize, [usize; 2]); 7] = [
        (0, bytes_a, 8, [16, 16]),
        (0, bytes_a, 16, [16, 32]),
        (1, bytes_b, 4, [16, 8]),
        (1, bytes_b, 8, [32, 8]),
        (2, halves_a, 8, [16, 16]),
        (3, halves_b, 4, [16, 8]),
        (4, sums, 4, [16, 8]),
    ];
    for (matrix, table, per_lane, [rows, columns]) in matrices {
        let mut seen = HashSet::new();
        for (lane, i) in (0..32).flat_map(|lane| (0..per_lane).map(move |i| (lane, i))) {
            let (row, column) = element(table, lane, i);
            let (mut found, mut index) = (0, 0);
            // SAFETY: writes two numbers.
            unsafe {
                lorry_emulator_fragment(matrix, row as c_int, column as c_int, &mut found, &mut index);
            }
            assert_eq!((found as usize, index as usize), (lane, i), "matrix {matrix}, row {row}, column {column}");
            assert!(row < rows && column < columns && seen.insert((row, column)));
        }
        assert_eq!(seen.len(), rows * columns, "matrix {matrix}");
    }
}

/// As in `../fragments.h`.
#[repr(C)]
struct ProductArgs {
    a: u64,
    b: u64,
    sums: u64,
    depth: i32,
    halves: i32,
}

/// Registers of a warp, laid out by `table`: `per_lane` elements of `width` bytes in `registers` words a lane.
fn registers(table: Table, per_lane: usize, words: usize, element_bytes: impl Fn(usize, usize) -> Vec<u8>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for lane in 0..32 {
        let start = bytes.len();
        for i in 0..per_lane {
            let (row, column) = element(table, lane, i);
            bytes.extend(element_bytes(row, column));
        }
        bytes.resize(start + words * 4, 0);
    }
    bytes
}

/// `c + a · b` by a warp of the emulator, given and returned as registers.
fn multiply(a: &[u8], b: &[u8], c: &[u8], depth: usize, halves: bool) -> Vec<u8> {
    let device = Emulator::new(1 << 20);
    let [a, b, sums] = [a, b, c].map(|bytes| {
        let memory = device.allocate(bytes.len()).unwrap();
        device.write(&memory, 0, bytes).unwrap();
        memory
    });
    let args = ProductArgs {
        a: a.address(),
        b: b.address(),
        sums: sums.address(),
        depth: depth as i32,
        halves: halves.into(),
    };
    // SAFETY: no padding; the addresses are of this device, and as long as a warp's registers.
    unsafe {
        let args = std::slice::from_raw_parts(std::ptr::from_ref(&args).cast(), size_of::<ProductArgs>());
        device.launch("test_product", [1, 1, 1], args).unwrap();
    }
    let mut bytes = vec![0; c.len()];
    device.read(&sums, 0, &mut bytes).unwrap();
    bytes
}

fn bytes_are_multiplied(depth: usize, a: &[u8], b: &[i8], c: &[i32]) {
    let a_registers = registers(bytes_a, depth / 2, 4, |row, k| vec![a[row * depth + k]]);
    let b_registers = registers(bytes_b, depth / 4, 2, |k, column| vec![b[k * 8 + column] as u8]);
    let wanted = |row: usize, column: usize| {
        let products = (0..depth).map(|k| i32::from(a[row * depth + k]) * i32::from(b[k * 8 + column]));
        c[row * 8 + column] + products.sum::<i32>()
    };
    let c_registers = registers(sums, 4, 4, |row, column| c[row * 8 + column].to_ne_bytes().to_vec());
    let d_registers = registers(sums, 4, 4, |row, column| wanted(row, column).to_ne_bytes().to_vec());
    assert_eq!(multiply(&a_registers, &b_registers, &c_registers, depth, false), d_registers);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_product_of_bytes_is_the_product(
        a in prop::collection::vec(any::<u8>(), 16 * 32),
        b in prop::collection::vec(any::<i8>(), 32 * 8),
        c in prop::collection::vec(-1_000_000..1_000_000, 16 * 8),
    ) {
        bytes_are_multiplied(16, &a, &b, &c);
        bytes_are_multiplied(32, &a, &b, &c);
    }

    /// Of whole numbers, whose sums are exact in any order.
    #[test]
    fn a_product_of_halves_is_the_product(
        a in prop::collection::vec(-64i16..64, 16 * 16),
        b in prop::collection::vec(-64i16..64, 16 * 8),
        c in prop::collection::vec(-1000i16..1000, 16 * 8),
    ) {
        let half = |number: i16| f16::from_f32(f32::from(number)).to_ne_bytes().to_vec();
        let a_registers = registers(halves_a, 8, 4, |row, k| half(a[row * 16 + k]));
        let b_registers = registers(halves_b, 4, 2, |k, column| half(b[k * 8 + column]));
        let wanted = |row: usize, column: usize| {
            let products = (0..16).map(|k| f32::from(a[row * 16 + k]) * f32::from(b[k * 8 + column]));
            f32::from(c[row * 8 + column]) + products.sum::<f32>()
        };
        let c_registers = registers(sums, 4, 4, |row, column| f32::from(c[row * 8 + column]).to_ne_bytes().to_vec());
        let d_registers = registers(sums, 4, 4, |row, column| wanted(row, column).to_ne_bytes().to_vec());
        prop_assert_eq!(multiply(&a_registers, &b_registers, &c_registers, 16, true), d_registers);
    }
}
