//! Sends requests when they are to arrive, whatever became of those before.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, sleep_until};

use super::client::Client;
use super::report::{Frame, Load, Missed, Objective, Outcome, Report, Tally, Times};
use super::workload::{Ask, Destination};

/// Requests that arrive at times in order, none of them after `duration`.
pub struct Wave {
    pub load: Load,
    pub duration: Duration,
    pub times: Box<dyn Iterator<Item = Duration>>,
}

/// Waves of requests, one after the other, on one server.
#[derive(Debug)]
pub struct Attack {
    pub client: Client,
    pub destination: Destination,
    /// Sent in turn; at least one.
    pub asks: Vec<Ask>,
    pub objective: Objective,
    pub max_in_flight: u32,
    /// Of made-up prompts.
    pub seed: u64,
    /// So far.
    pub num_waves: usize,
    /// In all waves so far: each goes on behind the last request of the one before.
    pub num_arrived: u64,
}

impl Attack {
    /// Until every request has ended. `log` gets a JSON line for each.
    ///
    /// # Errors
    /// The log cannot be written.
    pub async fn run(&mut self, wave: Wave, log: &mut impl Write) -> io::Result<Report> {
        let Wave { load, duration, times } = wave;
        let permits = Arc::new(Semaphore::new(self.max_in_flight as usize));
        let mut fewest_permits = permits.available_permits();
        let (outcomes, mut ended) = mpsc::unbounded_channel();
        let mut num_repeated = 0;
        let start = Instant::now();
        let send_all = async {
            // Moved in, so that the channel is closed when all have ended.
            let outcomes = outcomes;
            for at in times {
                sleep_until(start + at).await;
                // From here to the request nothing waits.
                let number = self.num_arrived;
                self.num_arrived += 1;
                let outcomes = outcomes.clone();
                let lag = start.elapsed().saturating_sub(at);
                let Ok(permit) = permits.clone().try_acquire_owned() else {
                    let _ = outcomes.send(Outcome { at, lag, result: Err(Missed::Dropped) });
                    continue;
                };
                fewest_permits = fewest_permits.min(permits.available_permits());
                let ask = &self.asks[(number % self.asks.len() as u64) as usize];
                let is_repeated = number >= self.asks.len() as u64 && matches!(ask, Ask::Given(_));
                num_repeated += u64::from(is_repeated);
                let target = self.destination.make(ask, self.seed, number);
                let client = self.client.clone();
                tokio::spawn(async move {
                    let result = client.ask(target, start + at).await.map_err(Missed::Failed);
                    drop(permit);
                    // Nobody is there when the log has failed.
                    let _ = outcomes.send(Outcome { at, lag, result });
                });
            }
            io::Result::Ok(())
        };
        let mut tally = Tally::new(self.objective);
        let count_all = async {
            while let Some(outcome) = ended.recv().await {
                tally.add(&outcome);
                writeln!(log, "{}", serde_json::json!(LogLine::new(self.num_waves, &outcome)))?;
            }
            io::Result::Ok(())
        };
        tokio::try_join!(send_all, count_all)?;
        let elapsed = start.elapsed().max(duration);
        let max_in_flight = self.max_in_flight as usize - fewest_permits;
        self.num_waves += 1;
        Ok(tally.report(Frame { load, duration, elapsed, num_repeated, max_in_flight }))
    }
}

/// One request, in ms from its planned arrival.
#[derive(Debug, Serialize)]
struct LogLine {
    /// Which rate, from 0.
    wave: usize,
    /// When it was to arrive, from the start of the wave.
    at_s: f64,
    error: Option<String>,
    message: Option<String>,
    ttft_ms: Option<f64>,
    tpot_ms: Option<f64>,
    e2e_ms: Option<f64>,
    output_tokens: Option<u64>,
}

impl LogLine {
    fn new(wave: usize, outcome: &Outcome) -> Self {
        let (reply, error) = match &outcome.result {
            Ok(reply) => (Some(reply), None),
            Err(missed) => (None, Some(missed)),
        };
        let times = reply.map(Times::of);
        Self {
            wave,
            at_s: outcome.at.as_secs_f64(),
            error: error.map(Missed::kind),
            message: error.map(ToString::to_string),
            ttft_ms: times.map(|times| times.ttft),
            tpot_ms: times.and_then(|times| times.tpot),
            e2e_ms: times.map(|times| times.e2e),
            output_tokens: reply.map(|reply| reply.num_tokens),
        }
    }
}
