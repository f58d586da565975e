//! Medians, spreads and ratios, and who goes first in which round. Pure.

use serde::{Deserialize, Serialize};

/// What a set of samples comes to.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct Summary {
    /// How many samples there are.
    pub(crate) count: usize,
    /// The middle one, or the mean of the middle two.
    pub(crate) median: f64,
    /// The least.
    pub(crate) min: f64,
    /// The greatest.
    pub(crate) max: f64,
}

impl Summary {
    /// The summary of samples that are all finite; `None` where there are none.
    pub(crate) fn of(samples: &[f64]) -> Option<Self> {
        let sorted = sorted(samples);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[middle]
        } else {
            f64::midpoint(sorted[middle - 1], sorted[middle])
        };
        Some(Self { count: sorted.len(), median, min, max })
    }
}

/// The ratio of ours to theirs, round by round, so that what slowed a whole round cancels out.
/// `None` unless both have the same rounds and no sample of theirs is zero.
pub(crate) fn ratio(ours: &[f64], theirs: &[f64]) -> Option<Summary> {
    if ours.len() != theirs.len() || theirs.contains(&0.0) {
        return None;
    }
    let ratios: Vec<f64> = ours.iter().zip(theirs).map(|(a, b)| a / b).collect();
    Summary::of(&ratios)
}

/// The order in which `contenders` take their turns in a round: each round begins with the next one.
pub(crate) fn turns(contenders: usize, round: usize) -> impl Iterator<Item = usize> {
    (0..contenders).map(move |turn| (turn + round) % contenders)
}

/// The value that `percent` of the samples do not exceed (nearest rank); `None` where there are none.
pub(crate) fn percentile(samples: &[f64], percent: f64) -> Option<f64> {
    let sorted = sorted(samples);
    let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied()
}

fn sorted(samples: &[f64]) -> Vec<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_is_the_middle_sample_whatever_their_order() {
        let summary = Summary::of(&[9.0, 1.0, 5.0]).unwrap();
        assert_eq!(summary, Summary { count: 3, median: 5.0, min: 1.0, max: 9.0 });
    }

    #[test]
    fn median_of_an_even_count_lies_between_the_middle_two() {
        assert_eq!(Summary::of(&[4.0, 1.0, 2.0, 8.0]).unwrap().median, 3.0);
    }

    #[test]
    fn no_samples_have_no_summary() {
        assert_eq!(Summary::of(&[]), None);
        assert_eq!(percentile(&[], 50.0), None);
    }

    #[test]
    fn ratio_pairs_samples_of_the_same_round() {
        // The machine was half as fast in the second round; the ratio does not show it.
        let ratio = ratio(&[1.0, 2.0, 1.0], &[2.0, 4.0, 2.0]).unwrap();
        assert_eq!((ratio.min, ratio.median, ratio.max), (0.5, 0.5, 0.5));
    }

    #[test]
    fn ratio_of_unequal_rounds_or_to_zero_does_not_exist() {
        assert_eq!(ratio(&[1.0], &[1.0, 2.0]), None);
        assert_eq!(ratio(&[1.0, 1.0], &[1.0, 0.0]), None);
    }

    #[test]
    fn everyone_goes_first_equally_often_and_once_a_round() {
        let mut first = [0; 3];
        for round in 0..6 {
            let order: Vec<_> = turns(3, round).collect();
            first[order[0]] += 1;
            let mut all = order.clone();
            all.sort_unstable();
            assert_eq!(all, [0, 1, 2]);
        }
        assert_eq!(first, [2, 2, 2]);
    }

    #[test]
    fn percentile_is_a_sample_by_nearest_rank() {
        let samples: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(percentile(&samples, 50.0), Some(50.0));
        assert_eq!(percentile(&samples, 99.0), Some(99.0));
        assert_eq!(percentile(&samples, 100.0), Some(100.0));
        assert_eq!(percentile(&[7.0], 1.0), Some(7.0));
    }
}
