//! The kernel `shrink` against the formula, and the weights it reads against the matrices they come from.

mod arrays;

use emulator::{Emulator, Memory};
use half::f16;
use kernels::cuda::args::{AdapterTable, Site};
use kernels::cuda::driver::DeviceMemory;
use kernels::cuda::low_rank::{ShrinkArgs, row_major, row_stride, shrink};
use kernels::half_matrix::HalfMatrix;
use kernels::low_rank::LowRank;
use proptest::prelude::*;

use arrays::{Numbers, adapter, addresses, device, floats, halves, read_floats, same_bits};

/// What stands in `t` where nothing is written.
const UNTOUCHED: f32 = 12345.0;
const NUM_SITES: usize = 4;

fn half_values(values: &[f32]) -> Vec<f16> {
    values.iter().map(|v| f16::from_f32(*v)).collect()
}

/// A pair as the kernels read it.
#[derive(Debug, Clone, PartialEq)]
struct PairRows {
    rank: usize,
    /// Bits of f16, `[rank, a_stride]`.
    a: Vec<u16>,
    a_stride: usize,
    b_stride: usize,
    /// `[rank]`
    scales: Vec<f32>,
}

impl PairRows {
    fn new(pair: &LowRank) -> Self {
        let (rank, a_stride) = (pair.rank(), row_stride(pair.in_features()));
        let mut a = Vec::new();
        row_major(pair.a(), a_stride, &mut a);
        Self { rank, a, a_stride, b_stride: row_stride(rank), scales: pair.scales()[..rank].to_vec() }
    }
}

/// An adapter with pairs at some of its sites, on the host and on the device.
struct Adapter {
    pairs: Vec<Option<PairRows>>,
    table: Memory,
    _weights: Vec<Memory>,
}

impl Adapter {
    fn new(device: &Emulator, pairs: Vec<Option<PairRows>>) -> Self {
        let mut weights = Vec::new();
        let sites: Vec<Site> = pairs
            .iter()
            .map(|pair| {
                let Some(pair) = pair else { return Site { rank: 9, ..Site::default() } };
                let (a, scales) = (halves(device, &pair.a), floats(device, &pair.scales));
                let site = Site {
                    a: a.address(),
                    scales: scales.address(),
                    rank: pair.rank as i32,
                    a_stride: pair.a_stride as i32,
                    b_stride: pair.b_stride as i32,
                    ..Site::default()
                };
                weights.extend([a, scales]);
                site
            })
            .collect();
        Self { pairs, table: adapter(device, &AdapterTable::default(), &sites), _weights: weights }
    }

    fn random(device: &Emulator, numbers: &mut Numbers, max_rank: usize, in_features: usize, is_exact: bool) -> Self {
        let mut values = |n| if is_exact { numbers.eighths(n) } else { numbers.any(n) };
        let mut pair = |scale| {
            let rank = (values(1)[0].abs() * (max_rank - 1) as f32) as usize + 1;
            let (a, b) = (half_values(&values(rank * in_features)), half_values(&values(8 * rank)));
            PairRows::new(&LowRank::pack(rank, in_features, 8, scale, &a, &b))
        };
        // Site 2 has no pair.
        let pairs = vec![Some(pair(0.5)), Some(pair(2.0)), None, Some(pair(0.25))];
        Self::new(device, pairs)
    }
}

/// Inputs of a step: rows, and which of the adapters each has.
struct Step<'a> {
    x: &'a [f32],
    in_features: usize,
    owners: Vec<Option<&'a Adapter>>,
    sites: &'a [i32],
    t_stride: usize,
}

impl Step<'_> {
    /// `[product, row, t_stride]`
    fn run(&self, device: &Emulator) -> Vec<f32> {
        let num_rows = self.owners.len();
        let x = floats(device, self.x);
        let t = floats(device, &vec![UNTOUCHED; self.sites.len() * num_rows * self.t_stride]);
        let owners: Vec<u64> = self.owners.iter().map(|owner| owner.map_or(0, |a| a.table.address())).collect();
        let owners = addresses(device, &owners);
        let mut sites = [0; 3];
        sites[..self.sites.len()].copy_from_slice(self.sites);
        let args = ShrinkArgs {
            x: x.address(),
            adapters: owners.address(),
            t: t.address(),
            x_stride: self.in_features as i32,
            num_rows: num_rows as i32,
            in_features: self.in_features as i32,
            t_stride: self.t_stride as i32,
            sites,
            tile_rows: 0,
        };
        shrink(device, args, self.sites.len()).unwrap();
        read_floats(device, &t)
    }

    fn expected(&self) -> Vec<f32> {
        let mut t = vec![UNTOUCHED; self.sites.len() * self.owners.len() * self.t_stride];
        let mut rows = t.chunks_exact_mut(self.t_stride);
        for site in self.sites {
            for (owner, x) in self.owners.iter().zip(self.x.chunks_exact(self.in_features)) {
                let row = rows.next().unwrap();
                let Some(pair) = owner.and_then(|adapter| adapter.pairs[*site as usize].as_ref()) else { continue };
                row[..row_stride(pair.rank)].fill(0.0);
                for (r, a) in pair.a.chunks_exact(pair.a_stride).enumerate() {
                    let products = a.iter().zip(x).map(|(a, x)| f64::from(f16::from_bits(*a)) * f64::from(*x));
                    row[r] = (f64::from(pair.scales[r]) * products.sum::<f64>()) as f32;
                }
            }
        }
        t
    }
}

/// Runs of rows with the same adapter, or with none.
fn owners<'a>(numbers: &mut Numbers, adapters: &'a [Adapter], num_rows: usize) -> Vec<Option<&'a Adapter>> {
    let mut owners = Vec::new();
    while owners.len() < num_rows {
        let owner = adapters.get(numbers.below(adapters.len() + 1));
        let run = 1 + numbers.below(12);
        owners.extend(std::iter::repeat_n(owner, run.min(num_rows - owners.len())));
    }
    owners
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn unpacked_rows_are_those_that_were_packed(num_rows in 1usize..40, columns in 1usize..40, beyond in 0usize..9, seed: u64) {
        let values = half_values(&Numbers::new(seed).any(num_rows * columns));
        let stride = columns + beyond;
        let mut rows = vec![7];
        row_major(&HalfMatrix::pack(num_rows, columns, &values), stride, &mut rows);
        prop_assert_eq!(rows.len(), 1 + num_rows * stride);
        prop_assert_eq!(rows[0], 7);
        for (row, values) in rows[1..].chunks_exact(stride).zip(values.chunks_exact(columns)) {
            prop_assert!(row[..columns].iter().zip(values).all(|(row, value)| *row == value.to_bits()));
            prop_assert!(row[columns..].iter().all(|row| *row == 0));
        }
    }

    #[test]
    fn sums_that_are_exact_are_those_of_the_formula_and_nothing_else_is_written(
        num_rows in prop_oneof![1usize..20, 60usize..80],
        quads in prop_oneof![1usize..20, 500usize..560],
        max_rank in 1usize..40,
        num_products in 1usize..4,
        seed: u64,
    ) {
        let (device, in_features, mut numbers) = (device(), quads * 4, Numbers::new(seed));
        let adapters: Vec<_> = (0..3).map(|_| Adapter::random(&device, &mut numbers, max_rank, in_features, true)).collect();
        let x = numbers.eighths(num_rows * in_features);
        let sites: Vec<i32> = (0..num_products).map(|_| numbers.below(NUM_SITES) as i32).collect();
        let owners = owners(&mut numbers, &adapters, num_rows);
        let step = Step { x: &x, in_features, owners, sites: &sites, t_stride: row_stride(max_rank) + 8 };
        prop_assert_eq!(step.run(&device), step.expected());
    }

    #[test]
    fn a_row_alone_and_in_any_company_has_the_same_bits(
        num_rows in prop_oneof![2usize..20, 66usize..80], quads in 1usize..300, max_rank in 1usize..40, seed: u64,
    ) {
        let (device, in_features, mut numbers) = (device(), quads * 4, Numbers::new(seed));
        let adapters: Vec<_> = (0..2).map(|_| Adapter::random(&device, &mut numbers, max_rank, in_features, false)).collect();
        let mut x = numbers.any(num_rows * in_features);
        let bad = numbers.below(num_rows);
        x[bad * in_features..][..in_features].fill(f32::NAN);
        let t_stride = row_stride(max_rank);
        let owners = owners(&mut numbers, &adapters, num_rows);
        let together = Step { x: &x, in_features, owners: owners.clone(), sites: &[1], t_stride }.run(&device);
        for row in (0..num_rows).filter(|row| *row != bad) {
            let x = &x[row * in_features..][..in_features];
            let step = Step { x, in_features, owners: vec![owners[row]], sites: &[1], t_stride };
            let alone = step.run(&device);
            prop_assert!(same_bits(&alone, &together[row * t_stride..][..t_stride]), "row {row}");
            for (alone, expected) in alone.iter().zip(step.expected()) {
                prop_assert!((alone - expected).abs() < 1e-4, "{alone}, expected {expected}");
            }
        }
    }
}

#[test]
fn a_stack_of_hundreds_of_ranks_is_summed_like_its_members() {
    let (device, mut numbers, in_features) = (device(), Numbers::new(7), 256);
    let members: Vec<LowRank> = [100, 1, 131]
        .iter()
        .map(|&rank| {
            let (a, b) = (half_values(&numbers.any(rank * in_features)), half_values(&numbers.any(8 * rank)));
            LowRank::pack(rank, in_features, 8, 0.7, &a, &b).scaled(1.5)
        })
        .collect();
    let stack = PairRows::new(&LowRank::stack(&members.iter().collect::<Vec<_>>()));
    assert_eq!((stack.rank, stack.b_stride), (232, 232));
    let x = numbers.any(3 * in_features);
    let run = |pair: PairRows| {
        let adapter = &Adapter::new(&device, vec![Some(pair)]);
        Step { x: &x, in_features, owners: vec![Some(adapter); 3], sites: &[0], t_stride: 232 }.run(&device)
    };
    let together = run(stack);
    let mut first = 0;
    for member in &members {
        let rank = member.rank();
        let one = run(PairRows::new(member));
        for row in 0..3 {
            assert!(same_bits(&together[row * 232 + first..][..rank], &one[row * 232..][..rank]));
        }
        first += rank;
    }
}
