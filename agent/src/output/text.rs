//! Numbers for people. JSON has them exact.

use std::time::Duration;

use jiff::Timestamp;

const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

/// `512 B`, `64.0 KiB`, `1.2 GiB`.
#[must_use]
pub fn human_size(bytes: u64) -> String {
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    // 1023.95 and more would be shown as 1024.0 of the smaller unit.
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// So much of `total`, in tenths of a percent, rounded down: 1000 only where it is all.
#[must_use]
pub fn tenths_of_percent(part: u64, total: u64) -> u64 {
    if part >= total {
        return 1000;
    }
    u64::try_from(u128::from(part) * 1000 / u128::from(total)).unwrap_or(1000)
}

/// `1 chunk`, `2 chunks`.
#[must_use]
pub fn human_count(count: u64, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

/// `0.8 s`, `42 s`, `3 min 20 s`, `2 h 5 min`.
#[must_use]
pub fn human_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..10 => format!("{:.1} s", duration.as_secs_f64()),
        10..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

/// `2026-11-21 00:33:12Z`: snapshots are named in UTC, so they are listed in it.
#[must_use]
pub fn human_time(time: Timestamp) -> String {
    time.strftime("%Y-%m-%d %H:%M:%SZ").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_keep_three_or_four_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (65536, "64.0 KiB"),
            ((1 << 20) - 1, "1.0 MiB"),
            (8 << 30, "8.0 GiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(human_size(bytes), text);
        }
    }

    #[test]
    fn only_all_of_it_is_a_hundred_percent() {
        for total in [1, 999, 1000, 1 << 30, 1 << 54, u64::MAX] {
            assert_eq!(tenths_of_percent(total, total), 1000);
            assert!(tenths_of_percent(total - 1, total) < 1000, "{total}");
        }
        assert_eq!(tenths_of_percent(1, 3), 333);
        assert_eq!(tenths_of_percent(0, 0), 1000);
    }

    #[test]
    fn durations_grow_coarser() {
        for (ms, text) in
            [(812, "0.8 s"), (42_000, "42 s"), (200_000, "3 min 20 s"), (7_500_000, "2 h 5 min")]
        {
            assert_eq!(human_duration(Duration::from_millis(ms)), text);
        }
    }
}
