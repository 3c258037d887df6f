//! Python's `random.Random(seed).sample(range(n), k)`, draw for draw: the paper's in-context examples were drawn with it.

use std::collections::HashSet;

const STATE_LEN: usize = 624;
const SHIFT: usize = 397;

/// `k` different numbers below `num_items`, in the order drawn.
///
/// # Panics
/// When `k` is larger than `num_items`, or that larger than `u32::MAX`.
pub(super) fn sample(seed: u64, num_items: usize, k: usize) -> Vec<usize> {
    assert!(k <= num_items, "cannot draw {k} of {num_items}");
    let mut random = MersenneTwister::new(seed);
    if num_items > set_threshold(k) {
        let mut drawn = HashSet::with_capacity(k);
        return (0..k)
            .map(|_| {
                loop {
                    let item = random.below(num_items);
                    if drawn.insert(item) {
                        break item;
                    }
                }
            })
            .collect();
    }
    let mut pool: Vec<usize> = (0..num_items).collect();
    (0..k).map(|_| pool.swap_remove(random.below(pool.len()))).collect()
}

/// Up to this many items Python takes them out of a list, beyond it remembers what it drew; the draws differ.
fn set_threshold(k: usize) -> usize {
    let mut threshold = 21;
    if k > 5 {
        let mut power_of_four = 1;
        while power_of_four < 3 * k {
            power_of_four *= 4;
        }
        threshold += power_of_four;
    }
    threshold
}

/// MT19937, seeded from an array of words as Python seeds it from an integer.
struct MersenneTwister {
    state: [u32; STATE_LEN],
    next_index: usize,
}

impl MersenneTwister {
    fn new(seed: u64) -> Self {
        let words = [seed as u32, (seed >> 32) as u32];
        let key = if words[1] == 0 { &words[..1] } else { &words[..] };
        let mut state = [0u32; STATE_LEN];
        state[0] = 19_650_218;
        for i in 1..STATE_LEN {
            state[i] = mix(state[i - 1]).wrapping_mul(1_812_433_253).wrapping_add(i as u32);
        }
        let mut i = 1;
        // Index 0 is the last in each round, and its neighbour again.
        let advance = |state: &mut [u32; STATE_LEN], i: &mut usize| {
            *i += 1;
            if *i == STATE_LEN {
                state[0] = state[STATE_LEN - 1];
                *i = 1;
            }
        };
        for round in 0..STATE_LEN {
            let j = round % key.len();
            let mixed = state[i] ^ mix(state[i - 1]).wrapping_mul(1_664_525);
            state[i] = mixed.wrapping_add(key[j]).wrapping_add(j as u32);
            advance(&mut state, &mut i);
        }
        for _ in 1..STATE_LEN {
            let mixed = state[i] ^ mix(state[i - 1]).wrapping_mul(1_566_083_941);
            state[i] = mixed.wrapping_sub(i as u32);
            advance(&mut state, &mut i);
        }
        state[0] = 1 << 31;
        Self { state, next_index: STATE_LEN }
    }

    fn twist(&mut self) {
        for i in 0..STATE_LEN {
            let joined = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % STATE_LEN] & 0x7fff_ffff);
            let odd = if joined & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + SHIFT) % STATE_LEN] ^ (joined >> 1) ^ odd;
        }
        self.next_index = 0;
    }

    fn next_u32(&mut self) -> u32 {
        if self.next_index == STATE_LEN {
            self.twist();
        }
        let mut word = self.state[self.next_index];
        self.next_index += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c_5680;
        word ^= (word << 15) & 0xefc6_0000;
        word ^ (word >> 18)
    }

    /// Uniform below `bound`, which is at least 1: as many bits as `bound` has, until they are below it.
    fn below(&mut self, bound: usize) -> usize {
        let num_bits = usize::BITS - bound.leading_zeros();
        assert!((1..=u32::BITS).contains(&num_bits), "{bound} is no bound for 32 bits");
        loop {
            let drawn = (self.next_u32() >> (u32::BITS - num_bits)) as usize;
            if drawn < bound {
                return drawn;
            }
        }
    }
}

fn mix(word: u32) -> u32 {
    word ^ (word >> 30)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Made with CPython 3.11: `random.Random(seed).sample(range(n), k)`.
    #[test]
    fn the_draws_are_those_of_python_from_a_list_from_a_set_and_with_a_wide_seed() {
        assert_eq!(sample(0, 10, 10), [6, 9, 0, 2, 4, 3, 5, 1, 8, 7]);
        assert_eq!(sample(42, 24, 16), [20, 3, 0, 8, 7, 19, 4, 22, 2, 9, 6, 21, 12, 1, 16, 14]);
        assert_eq!(sample((1 << 40) + 7, 100, 8), [78, 95, 81, 73, 90, 60, 32, 16]);
        assert_eq!(sample(7, 300, 16), [165, 77, 202, 24, 37, 274, 48, 187, 298, 29, 259, 109, 19, 44, 222, 214]);
        assert_eq!(sample(u64::MAX, 5000, 3), [178, 2037, 2769]);
        assert_eq!(sample(1, 1, 1), [0]);
        assert_eq!(sample(42, 2135, 3), [456, 102, 1126]);
        assert!(sample(42, 5, 0).is_empty());
    }

    proptest! {
        #[test]
        fn a_sample_has_k_different_items_all_in_range(seed: u64, num_items in 1usize..400, part in 0.0..=1.0) {
            let k = (num_items as f64 * part) as usize;
            let drawn = sample(seed, num_items, k);
            prop_assert_eq!(drawn.len(), k);
            prop_assert!(drawn.iter().all(|&item| item < num_items));
            prop_assert_eq!(drawn.iter().collect::<HashSet<_>>().len(), k);
        }
    }
}
