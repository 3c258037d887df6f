//! What the kernels do that a card's most is measured with: all of it, and nothing twice.

mod arrays;

use emulator::Emulator;
use kernels::cuda::driver::{DeviceMemory, Driver};
use kernels::cuda::peak::{Kernel, PeakArgs, THREADS, launch, measure};
use proptest::prelude::*;

use arrays::{Numbers, device};

/// What each thread of so many blocks gives.
fn outputs(device: &Emulator, kernel: Kernel, blocks: usize, words: &[u8], rounds: usize) -> Vec<u32> {
    let memory = device.allocate(words.len()).unwrap();
    device.write(&memory, 0, words).unwrap();
    let out = device.allocate(blocks * THREADS * 4).unwrap();
    device.write(&out, 0, &vec![0xFF; out.len()]).unwrap();
    let args = PeakArgs {
        memory: memory.address(),
        out: out.address(),
        num_words: (words.len() / 16) as i64,
        rounds: rounds as i32,
        unused: 0,
    };
    launch(device, kernel, blocks, &args).unwrap();
    let mut bytes = vec![0; out.len()];
    device.read(&out, 0, &mut bytes).unwrap();
    bytes.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_word_of_the_memory_is_read_once(num_words in 0usize..5000, blocks in 1usize..4, seed in any::<u64>()) {
        let mut numbers = Numbers::new(seed);
        let words: Vec<u8> = (0..num_words * 16).map(|_| numbers.below(256) as u8).collect();
        let mut expected = vec![0; blocks * THREADS];
        for (number, word) in words.chunks_exact(16).enumerate() {
            let parts = word.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes));
            expected[number % (blocks * THREADS)] ^= parts.fold(0, |mixed, part| mixed ^ part);
        }
        prop_assert_eq!(outputs(&device(), Kernel::ReadMemory, blocks, &words, 0), expected);
    }
}

#[test]
fn every_round_makes_eight_products_in_each_warp() {
    // A row of A is the numbers 0 to 3, eight times each; B is ones. The eight sums begin at their numbers, four to a thread.
    let (row, begin) = (8 * (1 + 2 + 3), 4 * (1 + 2 + 3 + 4 + 5 + 6 + 7));
    for rounds in [0, 1, 2, 5] {
        let expected = vec![(begin + rounds * 8 * 4 * row) as u32; 2 * THREADS];
        assert_eq!(outputs(&device(), Kernel::MultiplyRegisters, 2, &[0; 16], rounds), expected, "{rounds} rounds");
    }
}

#[test]
fn both_are_measured_and_give_their_memory_back() {
    let device = device();
    let peaks = measure(&device, 1 << 20, 1).unwrap();
    assert!(peaks.bytes_per_second > 0.0 && peaks.int8_operations_per_second > 0.0);
    assert_eq!(device.used().load(std::sync::atomic::Ordering::Relaxed), 0);
    assert!(measure(&Emulator::new(1 << 20), 1 << 20, 1).is_err());
}
