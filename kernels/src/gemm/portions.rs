//! How the tiles of a product are cut into tasks. Whoever takes a portion asks memory for its next tiles while it multiplies the
//! ones at hand; at the end of a portion it asks for what another thread may take. So the first portions are large, and
//! the last ones small, for all threads to end at once ("Guided self-scheduling", Polychronopoulos and Kuck 1987).

use std::ops::Range;

/// Portions of `0..total`, in order.
#[derive(Debug, Clone, Copy)]
pub(super) struct Portions {
    pub total: usize,
    /// Half of what is left is given out in so many equal portions, then half of the rest, and so on.
    pub num_threads: usize,
    /// Every portion but the last is a multiple of it.
    pub unit: usize,
    /// The size of the last ones, a multiple of `unit`.
    pub least: usize,
}

impl Portions {
    pub fn count(&self) -> usize {
        let (mut start, mut count) = (0, 0);
        loop {
            let size = self.size_at(start);
            if size == self.least {
                return count + (self.total - start).div_ceil(size);
            }
            start += size * self.num_threads;
            count += self.num_threads;
        }
    }

    pub fn get(&self, mut index: usize) -> Range<usize> {
        let mut start = 0;
        let mut size = self.size_at(start);
        while size > self.least && index >= self.num_threads {
            start += size * self.num_threads;
            index -= self.num_threads;
            size = self.size_at(start);
        }
        start += index * size;
        start..(start + size).min(self.total)
    }

    /// Of the portions that begin to be given out there.
    fn size_at(&self, start: usize) -> usize {
        let half = (self.total - start) / (2 * self.num_threads);
        (half - half % self.unit).max(self.least)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn each_tile_is_in_one_portion(
            total in 1usize..3000, num_threads in 1usize..70, unit in 1usize..3, least in 1usize..20,
        ) {
            let least = least.next_multiple_of(unit);
            let portions = Portions { total, num_threads, unit, least };
            let (mut end, mut left) = (0, portions.count());
            for index in 0..portions.count() {
                let portion = portions.get(index);
                prop_assert_eq!(portion.start, end);
                prop_assert!(portion.end > end && portion.start.is_multiple_of(unit));
                left -= 1;
                prop_assert!(portion.len() >= least || left == 0);
                prop_assert!(portion.len() <= least.max(total / (2 * num_threads)));
                end = portion.end;
            }
            prop_assert_eq!(end, total);
        }
    }
}
