//! How much of two outputs is the same.

use std::collections::HashMap;

/// `2·L / (|a| + |b|)` with L the length of the longest common subsequence, in tokens: 1 for equal outputs, 0 for
/// outputs that share no token.
pub fn agreement(a: &[u32], b: &[u32]) -> f64 {
    if a.is_empty() && b.is_empty() {
        return 1.0;
    }
    2.0 * longest_common_subsequence(a, b) as f64 / (a.len() + b.len()) as f64
}

/// A row of the usual table as a bit vector, 64 cells at once (Hyyrö, "Bit-parallel LCS-length computation revisited",
/// 2004): a cell that is one more than its left neighbour is a 0.
fn longest_common_subsequence(a: &[u32], b: &[u32]) -> usize {
    let num_words = a.len().div_ceil(64);
    let mut places: HashMap<u32, Vec<u64>> = HashMap::new();
    for (index, token) in a.iter().enumerate() {
        places.entry(*token).or_insert_with(|| vec![0; num_words])[index / 64] |= 1 << (index % 64);
    }
    let mut row = vec![u64::MAX; num_words];
    for matches in b.iter().filter_map(|token| places.get(token)) {
        let mut carry = false;
        for (word, matches) in row.iter_mut().zip(matches) {
            let matched = *word & matches;
            let (sum, overflow) = word.overflowing_add(matched);
            let (sum, carried) = sum.overflowing_add(u64::from(carry));
            carry = overflow || carried;
            *word = sum | (*word - matched);
        }
    }
    let cell = |index: &usize| row[index / 64] >> (index % 64) & 1 == 0;
    (0..a.len()).filter(cell).count()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn by_table(a: &[u32], b: &[u32]) -> usize {
        let mut row = vec![0; a.len() + 1];
        for y in b {
            let mut diagonal = 0;
            for (i, x) in a.iter().enumerate() {
                let above = row[i + 1];
                row[i + 1] = if x == y { diagonal + 1 } else { above.max(row[i]) };
                diagonal = above;
            }
        }
        row[a.len()]
    }

    #[test]
    fn equal_outputs_agree_wholly_and_foreign_ones_not_at_all() {
        assert_eq!(agreement(&[], &[]), 1.0);
        assert_eq!(agreement(&[1, 2, 3], &[1, 2, 3]), 1.0);
        assert_eq!(agreement(&[1, 2], &[3, 4, 5]), 0.0);
        assert_eq!(agreement(&[], &[1]), 0.0);
    }

    #[test]
    fn one_token_more_costs_its_share() {
        assert_eq!(agreement(&[1, 2, 3], &[1, 2, 9, 3, 4]), 0.75);
    }

    proptest! {
        #[test]
        fn bits_count_as_the_table_does(a in prop::collection::vec(0u32..4, 0..200), b in prop::collection::vec(0u32..4, 0..200)) {
            prop_assert_eq!(longest_common_subsequence(&a, &b), by_table(&a, &b));
        }
    }
}
