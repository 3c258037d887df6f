use proptest::prelude::*;

use super::*;

fn params() -> SamplingParams {
    SamplingParams { temperature: 1.0, seed: 1, ..SamplingParams::GREEDY }
}

fn greedy() -> SamplingParams {
    SamplingParams { temperature: 0.0, ..params() }
}

fn sample_all(params: SamplingParams, prompt: &[u32], logits: &[f32], num_tokens: usize) -> Vec<u32> {
    let mut sampler = Sampler::new(params, prompt);
    let mut scratch = Scratch::default();
    (0..num_tokens).map(|_| sampler.sample(&mut logits.to_vec(), &mut scratch).unwrap()).collect()
}

/// Which tokens 500 draws reach.
fn reached(params: SamplingParams, logits: &[f32]) -> Vec<u32> {
    let mut tokens = sample_all(params, &[], logits, 500);
    tokens.sort_unstable();
    tokens.dedup();
    tokens
}

/// Logits of these probabilities.
fn ln(probabilities: &[f32]) -> Vec<f32> {
    probabilities.iter().map(|p| p.ln()).collect()
}

#[test]
fn greedy_takes_the_greatest_logit_and_the_lowest_id_of_equal_ones() {
    let mut logits = vec![0.0; 100];
    for id in [41, 17, 99] {
        logits[id] = 3.0;
    }
    assert_eq!(sample_all(greedy(), &[], &logits, 1), [17]);
}

#[test]
fn draws_follow_the_softmax() {
    let tokens = sample_all(params(), &[], &ln(&[0.1, 0.6, 0.3]), 20_000);
    for (token, expected) in [0.1, 0.6, 0.3].into_iter().enumerate() {
        let share = tokens.iter().filter(|&&t| t == token as u32).count() as f64 / tokens.len() as f64;
        assert!((share - expected).abs() < 0.015, "token {token}: {share}");
    }
}

#[test]
fn top_k_keeps_the_k_most_likely() {
    let logits = ln(&[0.1, 0.3, 0.2, 0.25, 0.15]);
    assert_eq!(reached(SamplingParams { top_k: 2, ..params() }, &logits), [1, 3]);
    assert_eq!(reached(SamplingParams { top_k: 1, ..params() }, &[2.0, 5.0, 5.0]), [1]);
    assert_eq!(reached(SamplingParams { top_k: 9, ..params() }, &logits), [0, 1, 2, 3, 4]);
}

#[test]
fn top_p_keeps_the_shortest_set_that_reaches_p() {
    let logits = ln(&[0.05, 0.5, 0.15, 0.3]);
    assert_eq!(reached(SamplingParams { top_p: 0.75, ..params() }, &logits), [1, 3]);
    assert_eq!(reached(SamplingParams { top_p: 0.85, ..params() }, &logits), [1, 2, 3]);
    assert_eq!(reached(SamplingParams { top_p: 0.0, ..params() }, &logits), [1]);
}

#[test]
fn top_p_counts_within_top_k() {
    // Of the two kept, the first has 0.5 / 0.8 = 0.625.
    let logits = ln(&[0.5, 0.3, 0.2]);
    assert_eq!(reached(SamplingParams { top_k: 2, top_p: 0.6, ..params() }, &logits), [0]);
    assert_eq!(reached(SamplingParams { top_k: 2, top_p: 0.65, ..params() }, &logits), [0, 1]);
}

#[test]
fn min_p_keeps_tokens_by_their_ratio_to_the_most_likely() {
    let logits = ln(&[0.5, 0.3, 0.15, 0.05]);
    assert_eq!(reached(SamplingParams { min_p: 0.29, ..params() }, &logits), [0, 1, 2]);
    assert_eq!(reached(SamplingParams { min_p: 1.0, ..params() }, &logits), [0]);
    assert_eq!(reached(SamplingParams { top_k: 3, min_p: 0.5, ..params() }, &logits), [0, 1]);
}

#[test]
fn a_low_temperature_approaches_greedy() {
    assert_eq!(reached(SamplingParams { temperature: 1e-6, ..params() }, &[1.0, 1.5, 1.4]), [1]);
}

#[test]
fn repetition_penalty_divides_positive_and_multiplies_negative_logits_of_prompt_and_output() {
    let params = SamplingParams { repetition_penalty: 2.0, ..greedy() };
    assert_eq!(sample_all(params.clone(), &[0], &[3.0, 2.0, 1.4], 3), [1, 0, 0]);
    assert_eq!(sample_all(params, &[0], &[-1.0, -1.5], 1), [1]);
}

#[test]
fn presence_and_frequency_penalties_count_the_output_alone() {
    let presence = SamplingParams { presence_penalty: 1.0, ..greedy() };
    assert_eq!(sample_all(presence, &[0, 0], &[3.0, 2.5], 4), [0, 1, 0, 0]);
    let frequency = SamplingParams { frequency_penalty: 0.6, ..greedy() };
    assert_eq!(sample_all(frequency, &[0, 0], &[3.0, 2.0], 4), [0, 0, 1, 0]);
}

#[test]
fn logit_bias_comes_first_and_ignores_unknown_ids() {
    let params = SamplingParams { logit_bias: vec![(1, 10.0), (999, 100.0)], ..greedy() };
    assert_eq!(sample_all(params, &[], &[3.0, 0.0], 1), [1]);
}

#[test]
fn the_seed_decides_the_draws() {
    let logits = vec![0.0; 1000];
    let draws = |seed| sample_all(SamplingParams { seed, ..params() }, &[], &logits, 20);
    assert_eq!(draws(1), draws(1));
    assert_ne!(draws(1), draws(2));
}

#[test]
fn logits_that_are_not_numbers_are_an_error() {
    let mut scratch = Scratch::default();
    for position in [0, 15, 16, 20] {
        let mut logits = vec![0.0; 21];
        logits[position] = f32::NAN;
        assert_eq!(log_softmax(&logits, 0, 0, &mut scratch), Err(SamplingError::NotANumber));
        for params in [greedy(), params()] {
            let result = Sampler::new(params, &[]).sample(&mut logits.clone(), &mut scratch);
            assert_eq!(result, Err(SamplingError::NotANumber));
        }
    }
    let result = Sampler::new(greedy(), &[]).sample(&mut [f32::NEG_INFINITY; 3], &mut scratch);
    assert_eq!(result, Err(SamplingError::NoCandidate));
}

#[test]
fn log_softmax_names_the_most_likely_tokens_in_falling_order() {
    let logprob = log_softmax(&ln(&[0.1, 0.6, 0.3]), 2, 2, &mut Scratch::default()).unwrap();
    assert!((logprob.logprob - 0.3f32.ln()).abs() < 1e-6);
    assert_eq!(logprob.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(logprob.top[1].1, logprob.logprob);
}

#[test]
fn log_softmax_survives_large_logits() {
    let logprob = log_softmax(&[1000.0, 1000.0, -1000.0], 0, 0, &mut Scratch::default()).unwrap();
    assert!((logprob.logprob - 0.5f32.ln()).abs() < 1e-6);
}

/// What the parameters keep, by sorting everything: the tokens in falling order, and their weights.
fn reference(params: &SamplingParams, logits: &[f32]) -> Vec<u32> {
    let mut kept: Vec<(u32, f64)> =
        (0..).zip(logits.iter().map(|&l| f64::from(l / params.temperature).exp())).collect();
    kept.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if params.top_k > 0 {
        kept.truncate(params.top_k);
    }
    let total: f64 = kept.iter().map(|(_, weight)| weight).sum();
    let mut before = 0.0;
    let best = kept[0].1;
    let mut tokens = Vec::new();
    for (index, (id, weight)) in kept.into_iter().enumerate() {
        if index > 0 && before >= f64::from(params.top_p) * total || weight < f64::from(params.min_p) * best {
            break;
        }
        before += weight;
        tokens.push(id);
    }
    tokens
}

proptest! {
    #[test]
    fn a_drawn_token_is_one_that_sorting_the_vocabulary_would_keep(
        logits in prop::collection::vec(-8.0f32..8.0, 1..200),
        (top_k, top_p, min_p, temperature, seed) in (0..40usize, 0.05f32..1.0, 0.0f32..0.5, 0.2f32..2.0, any::<u64>()),
    ) {
        let params = SamplingParams { top_k, top_p, min_p, temperature, seed, ..params() };
        let kept = reference(&params, &logits);
        for token in sample_all(params, &[], &logits, 20) {
            prop_assert!(kept.contains(&token), "{token} is not in {kept:?}");
        }
    }

    #[test]
    fn the_top_k_are_those_of_a_full_sort(logits in prop::collection::vec(-3i8..3, 1..300), k in 0..50usize) {
        let logits: Vec<f32> = logits.into_iter().map(f32::from).collect();
        let mut sorted: Vec<Candidate> = (0..).zip(logits.iter().copied()).collect();
        sorted.sort_by(by_falling_value);
        sorted.truncate(k);
        let mut selected = Vec::new();
        select_top(&logits, k, &mut selected);
        prop_assert_eq!(selected, sorted);
    }
}

#[test]
fn of_zeros_the_positive_one_is_greater() {
    assert_eq!(sample_all(greedy(), &[], &[-0.0, -1.0, 0.0, 0.0], 1), [2]);
    assert_eq!(sample_all(greedy(), &[], &[-1.0, -0.0, -0.0], 1), [1]);
    let top = log_softmax(&[-0.0, -0.0, -0.0, 0.0, 0.0], 0, 1, &mut Scratch::default()).unwrap().top;
    assert_eq!(top[0].0, 3);
}

/// A summary as a device makes it: ids, logits and the logarithm of the sum.
fn summarized(logits: &[f32]) -> (Vec<u32>, Vec<f32>, f64) {
    let mut sorted: Vec<Candidate> = (0..).zip(logits.iter().copied()).collect();
    sorted.sort_by(by_falling_value);
    sorted.truncate(64);
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - max).exp()).sum();
    let log_sum = match () {
        () if logits.iter().any(|logit| logit.is_nan()) => f64::NAN,
        () if max.is_infinite() => max,
        () => max + sum.ln(),
    };
    let (ids, values) = sorted.into_iter().unzip();
    (ids, values, log_sum)
}

/// Logits with ties, zeros of both signs, and now and then a value that is not finite.
fn any_logits() -> impl Strategy<Value = Vec<f32>> {
    let usual = prop_oneof![-20.0f32..20.0, (-3i8..3).prop_map(f32::from), Just(-0.0), Just(f32::NEG_INFINITY)];
    let rare = prop_oneof![30 => Just(0.0), 1 => Just(f32::NAN), 1 => Just(-f32::NAN), 2 => Just(f32::INFINITY)];
    let ties = prop::collection::vec((-2i8..1).prop_map(f32::from), 1..300);
    let nothing = prop::collection::vec(Just(f32::NEG_INFINITY), 1..80);
    let any =
        (prop::collection::vec(usual, 1..300), rare, any::<prop::sample::Index>()).prop_map(|(mut logits, v, at)| {
            let at = at.index(logits.len());
            logits[at] = v;
            logits
        });
    prop_oneof![10 => any, 3 => ties, 1 => nothing]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn a_summary_gives_the_token_that_all_logits_give(
        logits in any_logits(),
        (top_k, top_p, min_p) in (0..70usize, prop_oneof![Just(1.0), 0.0f32..1.0], prop_oneof![Just(0.0), 0.0f32..1.0]),
        (temperature, seed) in (prop_oneof![1 => Just(0.0), 3 => 0.1f32..2.0], any::<u64>()),
    ) {
        let params = SamplingParams { temperature, top_k, top_p, min_p, seed, ..params() };
        let (ids, values, log_sum) = summarized(&logits);
        let summary = Summary { ids: &ids, logits: &values, log_sum };
        let is_enough = temperature == 0.0 || (1..ids.len()).contains(&top_k);
        let (mut by_summary, mut by_all) = (Sampler::new(params.clone(), &[]), Sampler::new(params, &[]));
        let scratch = &mut Scratch::default();
        for _ in 0..5 {
            let token = by_summary.sample_likeliest(&summary, scratch);
            prop_assert_eq!(token.is_some(), is_enough);
            if let Some(token) = token {
                prop_assert_eq!(token, by_all.sample(&mut logits.clone(), scratch));
            }
        }
    }

    #[test]
    fn a_summary_gives_the_log_probabilities_that_all_logits_give(logits in any_logits(), num_top in 0..70usize) {
        let (ids, values, log_sum) = summarized(&logits);
        let summary = Summary { ids: &ids, logits: &values, log_sum };
        for token in 0..logits.len() as u32 {
            let known = log_softmax_of_likeliest(&summary, token, num_top);
            let all = log_softmax(&logits, token, num_top, &mut Scratch::default());
            prop_assert_eq!(known.is_some(), all.is_ok() && ids.contains(&token) && num_top <= ids.len());
            let (Some(known), Ok(all)) = (known, all) else { continue };
            let is_near = |a: f32, b: f32| a == b || (a - b).abs() <= 1e-6 * b.abs().max(1.0);
            prop_assert!(is_near(known.logprob, all.logprob), "{} {}", known.logprob, all.logprob);
            prop_assert_eq!(known.top.len(), all.top.len());
            for ((id, logprob), (expected_id, expected)) in known.top.into_iter().zip(all.top) {
                prop_assert!(id == expected_id && is_near(logprob, expected), "{} {} {}", id, logprob, expected);
            }
        }
    }

    #[test]
    fn the_draw_of_a_biased_or_penalized_request_takes_all_logits(bias in any::<bool>(), penalty in 1.1f32..2.0) {
        let params = match bias {
            true => SamplingParams { logit_bias: vec![(0, penalty)], ..greedy() },
            false => SamplingParams { repetition_penalty: penalty, ..greedy() },
        };
        let summary = Summary { ids: &[1, 0], logits: &[1.0, 0.5], log_sum: 1.5 };
        prop_assert_eq!(Sampler::new(params, &[]).sample_likeliest(&summary, &mut Scratch::default()), None);
    }
}
