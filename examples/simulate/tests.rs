//! Whole runs.

use super::*;
use crate::replica::Refusal;

pub const CONFIG: EngineConfig = EngineConfig {
    max_batch_rows: 128,
    max_sequences: 64,
    max_queued: 256,
    context_length: 65_536,
    max_draft_tokens: 0,
    max_inter_token: None,
};
pub const TRUE_COST: [f64; TERMS.len()] = [14e-3, 3.4e-3, 1.8e-3, 5e-7, 1e-4, 1e-4];

fn hardware_with(num_adapters_in_memory: u64, max_queued: usize) -> Hardware {
    Hardware {
        engine: EngineConfig { max_queued, ..CONFIG },
        cost: Cost(TRUE_COST),
        num_blocks: 4096,
        adapter_bytes: 1000,
        adapters_budget_bytes: 1000 * num_adapters_in_memory,
        min_residency: Duration::ZERO,
        max_wait: Duration::from_secs(30),
        load_seconds: 0.035,
    }
}

fn arrivals(options: &str) -> Vec<Arrival> {
    let cli = Cli::parse_from(["simulate"].into_iter().chain(options.split_whitespace()));
    cli.traffic.check().unwrap();
    cli.traffic.arrivals()
}

fn check(arrivals: &[Arrival], run: &Run) {
    assert!(run.is_clean, "blocks, leases and places are given back");
    for (arrival, outcome) in arrivals.iter().zip(&run.outcomes) {
        match outcome.refused {
            Some(_) => assert_eq!(outcome.num_tokens, 0),
            None => {
                let room = CONFIG.context_length - arrival.prompt_tokens;
                assert_eq!(outcome.num_tokens, arrival.max_tokens.min(room), "every token once");
                assert!(arrival.at < outcome.first_token && outcome.first_token <= outcome.end);
            }
        }
    }
}

#[test]
fn every_request_is_answered_in_full_or_refused_and_everything_is_given_back() {
    let arrivals = arrivals("--rate 40 --seconds 20 --adapters 300 --chats 0.1 --batches 0.1 --shared-tokens 20");
    for router in [Router::Hash, Router::LeastBusy] {
        let run = fleet::run(&arrivals, &hardware_with(20, 30), 5, router);
        check(&arrivals, &run);
        let refused = run.outcomes.iter().filter(|outcome| outcome.refused == Some(Refusal::Overloaded)).count();
        assert!(refused > 0 && run.totals.unwrap().num_evictions > 0, "{refused} {:?}", run.totals);
        let report = Report::new(&arrivals, &run);
        let inside = report.inside.clone().unwrap();
        assert_eq!(report.groups[0].requests + report.groups[0].refused, arrivals.len());
        assert!(report.cached > 0.0 && inside.busy <= 1.0 && inside.cold > 0.0, "{report:?}");
    }
}

#[test]
fn a_seed_repeats_its_run() {
    let report = |seed: usize| {
        let arrivals = arrivals(&format!("--rate 20 --seconds 10 --adapters 50 --seed {seed}"));
        Report::new(&arrivals, &fleet::run(&arrivals, &hardware_with(10, 256), 3, Router::Hash))
    };
    assert_eq!(report(1), report(1));
    assert_ne!(report(1), report(2));
}

#[test]
fn a_request_alone_takes_what_its_steps_cost() {
    let arrival = trace::read(r#"{"at": 5, "prompt_tokens": 100, "max_tokens": 3}"#.as_bytes()).unwrap();
    let run = fleet::run(&arrival, &hardware_with(1, 256), 1, Router::Hash);
    let [step, drawn, other, position, ..] = TRUE_COST;
    let first = step + drawn + 99.0 * other + 5050.0 * position;
    assert!((run.outcomes[0].first_token - 5.0 - first).abs() < 1e-9);
    let rest = 2.0 * (step + drawn) + (101.0 + 102.0) * position;
    assert!((run.outcomes[0].end - run.outcomes[0].first_token - rest).abs() < 1e-9);
}

#[test]
fn an_adapter_that_does_not_fit_is_refused_and_so_is_what_is_too_long() {
    let lines = "{\"at\": 0, \"prompt_tokens\": 9, \"max_tokens\": 3, \"adapter\": \"x\"}\n\
        {\"at\": 0, \"prompt_tokens\": 70000, \"max_tokens\": 3}";
    let arrivals = trace::read(lines.as_bytes()).unwrap();
    let run = fleet::run(&arrivals, &hardware_with(0, 256), 1, Router::Hash);
    let refused: Vec<_> = run.outcomes.iter().map(|outcome| outcome.refused).collect();
    assert_eq!(refused, [Some(Refusal::OutOfMemory), Some(Refusal::TooLong)]);
    check(&arrivals, &run);
}

#[test]
fn a_reply_ends_where_the_context_does() {
    let line = format!("{{\"at\": 0, \"prompt_tokens\": 65000, \"max_tokens\": {}}}", usize::MAX);
    let arrivals = trace::read(line.as_bytes()).unwrap();
    let run = fleet::run(&arrivals, &hardware_with(0, 256), 1, Router::Hash);
    assert_eq!((run.outcomes[0].refused, run.outcomes[0].num_tokens), (None, 536));
    check(&arrivals, &run);
}

#[test]
fn the_router_is_as_it_is_deployed() {
    let haproxy = include_str!("../../deploy/haproxy/haproxy.cfg");
    let percent = 100.0 * fleet::BALANCE_FACTOR;
    assert!(haproxy.lines().any(|line| line.trim() == format!("hash-balance-factor {percent}")));
}

#[test]
fn the_measured_cost_is_one_that_steps_can_have() {
    let reports: Vec<bench::Report> = DEFAULT_BENCH.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let (cost, miss) = Cost::fit(&reports, &CONFIG).unwrap();
    assert!(cost.0[0] > 0.0 && cost.0[1] > cost.0[2] && miss < 0.5, "{cost:?} {miss}");
}
