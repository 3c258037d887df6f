//! So much a minute: a bucket that fills steadily and may be overdrawn, as what a request takes is known only at its end.

use std::num::NonZeroU32;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Of one: what is missing of it is there, but for how numbers are rounded.
const ROUNDING: f64 = 1e-6;

#[derive(Debug)]
pub struct RateLimit {
    per_minute: NonZeroU32,
    bucket: Mutex<Bucket>,
}

#[derive(Debug)]
struct Bucket {
    /// At `since`; above the limit where it is overdrawn.
    missing: f64,
    since: Instant,
}

/// How a limit stands at one time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    pub limit: u32,
    pub remaining: u32,
    /// Until all of it is there again.
    pub until_full: Duration,
    /// Until there is one; zero where there is.
    pub until_next: Duration,
}

impl RateLimit {
    /// Begins full.
    pub fn new(per_minute: NonZeroU32, now: Instant) -> Self {
        Self { per_minute, bucket: Mutex::new(Bucket { missing: 0.0, since: now }) }
    }

    pub fn standing(&self, now: Instant) -> Standing {
        self.standing_at(self.bucket(now).missing)
    }

    /// Spends one if it is there.
    ///
    /// # Errors
    /// How it stands, where there is none.
    pub fn try_spend_one(&self, now: Instant) -> Result<(), Standing> {
        let mut bucket = self.bucket(now);
        let standing = self.standing_at(bucket.missing);
        if standing.remaining == 0 {
            return Err(standing);
        }
        bucket.missing += 1.0;
        Ok(())
    }

    /// Spends `amount`, be it there or not.
    pub fn spend(&self, amount: usize, now: Instant) {
        self.bucket(now).missing += amount as f64;
    }

    /// As it is by now.
    fn bucket(&self, now: Instant) -> MutexGuard<'_, Bucket> {
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        let elapsed = now.saturating_duration_since(bucket.since).as_secs_f64();
        bucket.missing = (bucket.missing - elapsed * self.per_second()).max(0.0);
        bucket.since = bucket.since.max(now);
        bucket
    }

    fn per_second(&self) -> f64 {
        f64::from(self.per_minute.get()) / 60.0
    }

    fn standing_at(&self, missing: f64) -> Standing {
        let limit = self.per_minute.get();
        let time_for = |amount: f64| Duration::from_secs_f64(amount.max(0.0) / self.per_second());
        let remaining = (f64::from(limit) - missing + ROUNDING) as u32;
        let until_next = if remaining > 0 { Duration::ZERO } else { time_for(missing + 1.0 - f64::from(limit)) };
        Standing { limit, remaining, until_full: time_for(missing), until_next }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const MINUTE: Duration = Duration::from_secs(60);

    fn limit(per_minute: u32) -> (RateLimit, Instant) {
        let now = Instant::now();
        (RateLimit::new(NonZeroU32::new(per_minute).unwrap(), now), now)
    }

    #[test]
    fn a_minutes_worth_may_be_spent_at_once_and_comes_back_steadily() {
        for per_minute in [1, 3, 7, 60, 1000] {
            let (limit, begin) = limit(per_minute);
            for spent in 0..per_minute {
                assert_eq!(limit.standing(begin).remaining, per_minute - spent);
                limit.try_spend_one(begin).unwrap();
            }
            let refused = limit.try_spend_one(begin).unwrap_err();
            assert_eq!((refused.limit, refused.remaining), (per_minute, 0));
            assert!(refused.until_full <= MINUTE && refused.until_full > MINUTE - SECOND / 1000);
            let next = begin + refused.until_next;
            assert!(limit.try_spend_one(next - SECOND / 1000).is_err());
            limit.try_spend_one(next).unwrap();
            assert!(limit.try_spend_one(next).is_err());
            let standing = limit.standing(begin + 3 * MINUTE);
            assert_eq!((standing.remaining, standing.until_full), (per_minute, Duration::ZERO));
        }
    }

    #[test]
    fn what_is_overdrawn_is_waited_for() {
        let (limit, begin) = limit(60);
        limit.spend(90, begin);
        let standing = limit.standing(begin);
        assert_eq!((standing.remaining, standing.until_full, standing.until_next), (0, 90 * SECOND, 31 * SECOND));
        assert!(limit.try_spend_one(begin + 30 * SECOND).is_err());
        limit.try_spend_one(begin + 31 * SECOND).unwrap();
    }
}
