//! Summaries of logits against a sort of them all.

mod arrays;

use emulator::Emulator;
use kernels::cuda::driver::{DeviceMemory, Driver};
use kernels::cuda::head::{HeadRows, NUM_CANDIDATES, RowSummary, cap, scratch_bytes, summarize};
use proptest::prelude::*;

use arrays::{Numbers, device, floats, read_floats};

fn summaries(device: &Emulator, logits: &[f32], vocab: usize) -> Vec<RowSummary> {
    let num_rows = logits.len() / vocab;
    let logits = floats(device, logits);
    let scratch = device.allocate(scratch_bytes(num_rows, vocab)).unwrap();
    let result = device.allocate(num_rows * RowSummary::BYTES).unwrap();
    // Nothing may depend on what was there.
    for memory in [&scratch, &result] {
        device.write(memory, 0, &vec![0xFF; memory.len()]).unwrap();
    }
    let rows =
        HeadRows { logits: logits.address(), scratch: scratch.address(), summaries: result.address(), num_rows, vocab };
    summarize(device, rows).unwrap();
    let mut bytes = vec![0; num_rows * RowSummary::BYTES];
    device.read(&result, 0, &mut bytes).unwrap();
    bytes.as_chunks().0.iter().map(RowSummary::from_bytes).collect()
}

fn check(summary: &RowSummary, logits: &[f32]) -> Result<(), TestCaseError> {
    let mut sorted: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
    sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    sorted.truncate(NUM_CANDIDATES);
    prop_assert_eq!(summary.num_candidates as usize, sorted.len());
    for (place, (found, expected)) in summary.candidates().zip(&sorted).enumerate() {
        prop_assert_eq!((found.0, found.1.to_bits()), (expected.0, expected.1.to_bits()), "place {}", place);
    }
    prop_assert!(summary.ids[sorted.len()..].iter().all(|id| *id == 0));
    prop_assert!(summary.logits[sorted.len()..].iter().all(|logit| *logit == f32::NEG_INFINITY));
    prop_assert_eq!(summary.has_nan != 0, logits.iter().any(|logit| logit.is_nan()));
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    prop_assert_eq!(summary.max, max);
    let sum: f64 = logits.iter().filter(|v| !v.is_nan()).map(|v| (f64::from(*v) - f64::from(max)).exp()).sum();
    let sum = if max.is_infinite() { 0.0 } else { sum };
    prop_assert!((f64::from(summary.sum) - sum).abs() <= 1e-6 * sum, "sum {}, expected {}", summary.sum, sum);
    Ok(())
}

/// What a row of logits is like.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Any,
    /// A few values, so that most are ties.
    Ties,
    AllEqual,
    /// Zeros of both signs.
    Zeros,
    Infinite,
    Rising,
    NotANumber,
}

fn row(kind: Kind, numbers: &mut Numbers, vocab: usize) -> Vec<f32> {
    let mut logits: Vec<f32> = numbers.any(vocab).iter().map(|v| v * 20.0).collect();
    match kind {
        Kind::Any => {}
        Kind::Ties => logits.iter_mut().for_each(|v| *v = (*v / 5.0).round()),
        Kind::AllEqual => logits.fill(-3.5),
        Kind::Zeros => logits.iter_mut().for_each(|v| *v = 0.0_f32.copysign(*v)),
        Kind::Infinite => logits.iter_mut().for_each(|v| *v = if *v < 19.9 { f32::NEG_INFINITY } else { *v }),
        Kind::Rising => (0..).zip(&mut logits).for_each(|(id, v)| *v = id as f32 / 1000.0),
        Kind::NotANumber => {
            for value in [f32::NAN, -f32::NAN, f32::from_bits(0xFFFF_FFFF)] {
                let at = numbers.below(vocab);
                logits[at] = value;
            }
        }
    }
    logits
}

fn any_kind() -> impl Strategy<Value = Kind> {
    use Kind::*;
    prop_oneof![Just(Any), Just(Ties), Just(AllEqual), Just(Zeros), Just(Infinite), Just(Rising), Just(NotANumber)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_summary_is_what_a_sort_finds(
        kinds in prop::collection::vec(any_kind(), 1..4),
        vocab in prop_oneof![1usize..130, 320usize..5000, 8190usize..8260, 12000usize..20000],
        seed: u64,
    ) {
        let (device, mut numbers) = (device(), Numbers::new(seed));
        let rows: Vec<Vec<f32>> = kinds.iter().map(|kind| row(*kind, &mut numbers, vocab)).collect();
        let together = summaries(&device, &rows.concat(), vocab);
        for (summary, logits) in together.iter().zip(&rows) {
            check(summary, logits)?;
            let alone = summaries(&device, logits, vocab)[0];
            prop_assert_eq!(alone.sum.to_bits(), summary.sum.to_bits());
        }
    }
}

#[test]
fn the_largest_vocabularies_are_summarized() {
    let (device, mut numbers) = (device(), Numbers::new(1));
    for (vocab, kind) in [(151_936, Kind::Any), (262_144, Kind::Ties), (kernels::cuda::head::MAX_VOCAB, Kind::AllEqual)]
    {
        let logits = row(kind, &mut numbers, vocab);
        check(&summaries(&device, &logits, vocab)[0], &logits).unwrap();
    }
}

#[test]
fn a_row_without_a_finite_logit_says_so() {
    let device = device();
    for value in [f32::NEG_INFINITY, f32::INFINITY] {
        let summary = summaries(&device, &[value; 100], 100)[0];
        assert_eq!((summary.max, summary.sum, summary.has_nan), (value, 0.0, 0));
    }
    // The last has the least key of all.
    for value in [f32::NAN, -f32::NAN, f32::from_bits(0xFFFF_FFFF)] {
        let summary = summaries(&device, &[value; 100], 100)[0];
        assert_eq!((summary.max, summary.sum, summary.has_nan), (f32::NEG_INFINITY, 0.0, 1));
        assert!(summary.candidates().map(|(id, _)| id).eq(0..NUM_CANDIDATES as u32));
    }
}

#[test]
fn log_probabilities_are_those_of_the_softmax() {
    let (device, mut numbers) = (device(), Numbers::new(9));
    let logits = row(Kind::Any, &mut numbers, 32_000);
    let summary = summaries(&device, &logits, logits.len())[0];
    let log_sum = logits.iter().map(|v| f64::from(*v).exp()).sum::<f64>().ln();
    assert!((summary.log_sum() - log_sum).abs() < 1e-6, "{}, expected {log_sum}", summary.log_sum());
}

#[test]
fn the_sum_of_a_row_with_an_infinite_logit_is_infinite() {
    for infinite in [f32::INFINITY, f32::NEG_INFINITY] {
        let summary = summaries(&device(), &[infinite; 100], 100).remove(0);
        assert_eq!((summary.has_nan, summary.log_sum()), (0, f64::from(infinite)));
    }
    let summary = summaries(&device(), &[0.0, f32::INFINITY, -3.0], 3).remove(0);
    assert_eq!((summary.candidates().next(), summary.log_sum()), (Some((1, f32::INFINITY)), f64::INFINITY));
}

#[test]
fn capped_logits_follow_their_formula_to_the_last() {
    let (device, mut numbers) = (device(), Numbers::new(2));
    let logits: Vec<f32> = numbers.any(300_001).into_iter().map(|x| x * 100.0).collect();
    let memory = floats(&device, &logits);
    cap(&device, memory.address(), logits.len(), 30.0).unwrap();
    for (capped, logit) in read_floats(&device, &memory).iter().zip(&logits) {
        let expected = 30.0 * (f64::from(*logit) / 30.0).tanh();
        assert!((f64::from(*capped) - expected).abs() < 2e-5, "{capped} is not {expected}");
    }
}
