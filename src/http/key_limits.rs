//! What a key may use in a minute: requests and tokens. Every reply to it says in OpenAI's headers what is left, and what
//! comes above that is refused with 429.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Extension;
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::auth::Caller;
use super::error::ApiError;
use crate::config::KeyConfig;
use crate::rate_limit::{RateLimit, Standing};

/// Of one key; `None` where nothing is limited.
#[derive(Debug, Clone)]
pub struct KeyLimits {
    /// Of the key.
    name: Arc<str>,
    requests: Option<Arc<RateLimit>>,
    /// Of prompts and outputs. What a request takes is known as it takes it, so one that begins within the limit is
    /// served to its end, and those after it wait.
    pub tokens: Option<Arc<RateLimit>>,
}

/// What is limited, and the headers that say how it stands.
struct Limited {
    what: &'static str,
    limit: HeaderName,
    remaining: HeaderName,
    reset: HeaderName,
}

const REQUESTS: Limited = Limited {
    what: "requests",
    limit: HeaderName::from_static("x-ratelimit-limit-requests"),
    remaining: HeaderName::from_static("x-ratelimit-remaining-requests"),
    reset: HeaderName::from_static("x-ratelimit-reset-requests"),
};
const TOKENS: Limited = Limited {
    what: "tokens",
    limit: HeaderName::from_static("x-ratelimit-limit-tokens"),
    remaining: HeaderName::from_static("x-ratelimit-remaining-tokens"),
    reset: HeaderName::from_static("x-ratelimit-reset-tokens"),
};

impl KeyLimits {
    pub fn new(key: &KeyConfig) -> Self {
        let limit = |per_minute: u32| Some(Arc::new(RateLimit::new(NonZeroU32::new(per_minute)?, Instant::now())));
        Self {
            name: Arc::from(key.name.as_str()),
            requests: limit(key.requests_per_minute),
            tokens: limit(key.tokens_per_minute),
        }
    }

    /// Counts a request, or refuses it.
    fn admit(&self, now: Instant) -> Result<(), (Duration, ApiError)> {
        let refused = |limited: &Limited, standing: Standing| {
            let (what, limit, wait) = (limited.what, standing.limit, standing.until_next);
            let seconds = whole_seconds(wait);
            let message =
                format!("the key {:?} has used its {limit} {what} per minute: try again in {seconds} s", self.name);
            (wait, ApiError::rate_limited(what, message))
        };
        if let Some(standing) = self.tokens.as_ref().map(|tokens| tokens.standing(now))
            && standing.remaining == 0
        {
            return Err(refused(&TOKENS, standing));
        }
        match self.requests.as_ref().map(|requests| requests.try_spend_one(now)) {
            Some(Err(standing)) => Err(refused(&REQUESTS, standing)),
            _ => Ok(()),
        }
    }

    fn say(&self, headers: &mut HeaderMap, now: Instant) {
        for (limited, limit) in [(REQUESTS, &self.requests), (TOKENS, &self.tokens)] {
            let Some(standing) = limit.as_ref().map(|limit| limit.standing(now)) else { continue };
            headers.insert(limited.limit, standing.limit.into());
            headers.insert(limited.remaining, standing.remaining.into());
            if let Ok(reset) = HeaderValue::try_from(in_words(standing.until_full)) {
                headers.insert(limited.reset, reset);
            }
        }
    }
}

/// Lets a request through that its key has room for, or answers 429.
pub async fn limit(Extension(caller): Extension<Caller>, request: Request, next: Next) -> Response {
    let Some(limits) = caller.limits else { return next.run(request).await };
    let mut response = match limits.admit(Instant::now()) {
        Ok(()) => next.run(request).await,
        Err((wait, refusal)) => {
            let mut response = refusal.into_response();
            response.headers_mut().insert(header::RETRY_AFTER, whole_seconds(wait).into());
            response
        }
    };
    limits.say(response.headers_mut(), Instant::now());
    response
}

/// Rounded up, so that waiting for so long is enough.
fn whole_seconds(time: Duration) -> u64 {
    time.as_secs() + u64::from(time.subsec_nanos() > 0)
}

/// As OpenAI words it: `20ms`, `7s`, `6m0s`.
fn in_words(time: Duration) -> String {
    let seconds = whole_seconds(time);
    match seconds / 60 {
        0 if time < Duration::from_secs(1) => format!("{}ms", time.as_millis()),
        0 => format!("{seconds}s"),
        minutes => format!("{minutes}m{}s", seconds % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_worded_as_openai_words_them() {
        let words = |milliseconds| in_words(Duration::from_millis(milliseconds));
        assert_eq!([0, 20, 999, 1000, 6001].map(words), ["0ms", "20ms", "999ms", "1s", "7s"]);
        assert_eq!([59_001, 60_000, 119_500, 3_600_000].map(words), ["1m0s", "1m0s", "2m0s", "60m0s"]);
    }
}
