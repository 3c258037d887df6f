//! Names of files and jobs, in the order in which they were made.

use std::time::{SystemTime, UNIX_EPOCH};

/// Hexadecimal digits of a time in Unix milliseconds; enough for 500 years.
const TIME_DIGITS: usize = 11;

/// A name that begins with `prefix` and sorts after `last`, another of that prefix.
pub fn next_id(prefix: &str, last: Option<&str>) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
    let time = last.and_then(|last| u64::from_str_radix(last.get(prefix.len()..prefix.len() + TIME_DIGITS)?, 16).ok());
    let time = time.map_or(now, |last| now.max(last + 1));
    // Servers that share a folder of adapters make no two of one name.
    format!("{prefix}{time:0TIME_DIGITS$x}{:04x}", rand::random::<u16>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_sorts_after_the_last_one_also_where_the_clock_was_set_back() {
        let mut last = "file-fffffff00000000".to_owned();
        for _ in 0..100 {
            let next = next_id("file-", Some(&last));
            assert!(next > last && next.len() == last.len(), "{next} {last}");
            last = next;
        }
        assert!(next_id("file-", None) < last);
    }
}
