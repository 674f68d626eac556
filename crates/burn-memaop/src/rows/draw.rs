//! The rules by which rows are drawn, on the host. The kernels of `cube/select` draw the same rows.

use std::cmp::Ordering;

use super::{random::Random, tensors::Draw};
use crate::config::{Baseline, Method};

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Sample {
    /// As many as [`Draw::count`] says, in ascending order where no row can come twice. Rows that
    /// are added without weight come last.
    pub(super) rows: Vec<usize>,
    /// The weight of each: 0 for rows that fill up, and NaN if a score is not finite.
    pub(super) weights: Vec<f64>,
}

impl Sample {
    fn unweighted(rows: Vec<usize>) -> Self {
        let weights = vec![1.0; rows.len()];
        Self { rows, weights }
    }
}

/// Draws among the rows with these scores, `|x^| |g^|`.
pub(super) fn draw(scores: &[f64], draw: &Draw) -> Sample {
    let (k, rows, random) = (draw.k, scores.len(), &draw.random);
    if scores.iter().any(|score| !score.is_finite()) {
        let count = draw.count(rows);
        return Sample {
            rows: (0..count).collect(),
            weights: vec![f64::NAN; count],
        };
    }
    match draw.method {
        Method::Systematic => systematic(scores, k, random.uniform(0), random),
        Method::TopK(_) => Sample::unweighted(largest(scores, k)),
        Method::Baseline(Baseline::WeightedK(_)) => {
            let keys = per_row(rows, |row| 2.0 * scores[row].ln() + random.gumbel(row));
            Sample::unweighted(largest(&keys, k))
        }
        Method::Baseline(Baseline::RandK(_)) => Sample::unweighted(uniform(rows, k, random)),
        Method::Baseline(Baseline::ScaledRandK) => Sample {
            rows: uniform(rows, k, random),
            weights: vec![rows as f64 / k as f64; k],
        },
        Method::Baseline(Baseline::Bernoulli) => bernoulli(scores, k, draw.count(rows), random),
        Method::Baseline(Baseline::ColumnRow) => column_row(scores, Vec::new(), k, random),
        Method::Baseline(Baseline::WinnerTakeAll) => {
            column_row(scores, winners(scores, k), k, random)
        }
    }
}

/// A value for each row, computed on all cores.
fn per_row<T: Send>(rows: usize, value: impl Fn(usize) -> T + Sync + Send) -> Vec<T> {
    #[cfg(feature = "rayon")]
    {
        use rayon::prelude::*;
        // The random bits of a row take only some ten nanoseconds.
        let rows = (0..rows).into_par_iter().with_min_len(2048);
        rows.map(value).collect()
    }
    #[cfg(not(feature = "rayon"))]
    (0..rows).map(value).collect()
}

/// The K rows with the largest keys. Among equal keys the lower row comes first.
fn largest(keys: &[f64], k: usize) -> Vec<usize> {
    first(keys.len(), k, |&a, &b| {
        keys[b].total_cmp(&keys[a]).then(a.cmp(&b))
    })
}

/// K rows, drawn uniformly and without replacement: those with the largest random words.
fn uniform(rows: usize, k: usize, random: &Random) -> Vec<usize> {
    let words = per_row(rows, |row| random.word(row));
    first(rows, k, |&a, &b| words[b].cmp(&words[a]).then(a.cmp(&b)))
}

/// The first K rows by an order. They are returned in ascending order.
fn first(rows: usize, k: usize, order: impl FnMut(&usize, &usize) -> Ordering) -> Vec<usize> {
    let mut chosen: Vec<_> = (0..rows).collect();
    if k < rows {
        chosen.select_nth_unstable_by(k, order);
        chosen.truncate(k);
    }
    chosen.sort_unstable();
    chosen
}

/// The c for which the `min(1, c score)` sum to K, or with which all that are positive are 1.
fn inclusion(scores: &[f64], k: usize) -> f64 {
    // Rows that are certain to be drawn take one of the K each. The others share what is left.
    let mut c = 0.0;
    loop {
        let (mut certain, mut rest) = (0, 0.0);
        for &score in scores {
            match c * score >= 1.0 {
                true => certain += 1,
                false => rest += score,
            }
        }
        if certain >= k || rest == 0.0 {
            return c;
        }
        let next = (k - certain) as f64 / rest;
        // c grows until no row is added to the certain ones.
        if next <= c {
            return c;
        }
        c = next;
    }
}

/// The variance that systematic sampling of K rows adds to the gradient, `sum (1 / p_m - 1) s_m^2`.
fn added_variance(scores: &[f64], k: usize) -> f64 {
    if k >= scores.len() {
        return 0.0;
    }
    let c = inclusion(scores, k);
    let added = scores.iter().map(|&score| match probability(c, score) {
        0.0 => 0.0,
        p => (1.0 / p - 1.0) * score * score,
    });
    added.sum()
}

/// The root of the sum of the squares of the scores, and for each K the root of the variance that
/// sampling adds. All are NaN if a score is not finite.
pub(super) fn variances(scores: &[f64], ks: &[usize]) -> Vec<f64> {
    if scores.iter().any(|score| !score.is_finite()) {
        return vec![f64::NAN; 1 + ks.len()];
    }
    let batch: f64 = scores.iter().map(|score| score * score).sum();
    let added = ks.iter().map(|&k| added_variance(scores, k));
    std::iter::once(batch).chain(added).map(f64::sqrt).collect()
}

/// `min(1, c score)`, also where c is infinite.
fn probability(c: f64, score: f64) -> f64 {
    match score > 0.0 {
        true => (c * score).min(1.0),
        false => 0.0,
    }
}

/// Systematic sampling, which takes the rows in a random order. In their own order, nearly equal
/// probabilities would draw rows at nearly equal distances: the same patch of every image, say.
fn systematic(scores: &[f64], k: usize, start: f64, random: &Random) -> Sample {
    let c = inclusion(scores, k);
    let order = random.permutation(scores.len());
    let order = per_row(scores.len(), |place| order.row(place));
    let mut chosen = Vec::with_capacity(k);
    let mut sum = start;
    for row in order {
        let p = probability(c, scores[row]);
        let next = sum + p;
        if next.floor() > sum.floor() && chosen.len() < k {
            chosen.push((row, 1.0 / p));
        }
        sum = next;
    }
    chosen.sort_unstable_by_key(|&(row, _)| row);
    let (rows, weights) = chosen.into_iter().unzip();
    fill(scores, k, rows, weights)
}

/// Fills a sample up to exactly K rows, where rounding or a lack of rows that are not zero gave
/// fewer. The added rows have no weight.
fn fill(scores: &[f64], k: usize, mut rows: Vec<usize>, mut weights: Vec<f64>) -> Sample {
    if rows.len() < k {
        let mut chosen = vec![false; scores.len()];
        rows.iter().for_each(|&row| chosen[row] = true);
        let others = (0..scores.len()).filter(|&row| !chosen[row]);
        rows.extend(others.take(k - rows.len()));
        weights.resize(k, 0.0);
    }
    Sample { rows, weights }
}

fn bernoulli(scores: &[f64], k: usize, count: usize, random: &Random) -> Sample {
    let c = inclusion(scores, k);
    let drawn = scores.iter().enumerate().filter_map(|(row, &score)| {
        let p = probability(c, score);
        (random.uniform(row) < p).then_some((row, 1.0 / p))
    });
    let (rows, weights) = drawn.take(count).unzip();
    fill(scores, count, rows, weights)
}

/// As many of the largest scores as make `(1 - their share) / (K - their number)` smallest.
fn winners(scores: &[f64], k: usize) -> Vec<usize> {
    let mut best = largest(scores, k);
    best.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    let mut rest: f64 = scores.iter().sum();
    let mut least = (rest / k as f64, 0);
    for count in 1..k {
        // Rounding below zero would make winners of rows that add nothing.
        rest = (rest - scores[best[count - 1]]).max(0.0);
        let factor = rest / (k - count) as f64;
        if factor < least.0 {
            least = (factor, count);
        }
    }
    best.truncate(least.1);
    best
}

/// The winners as they are, and draws with replacement from the other rows up to K.
fn column_row(scores: &[f64], winners: Vec<usize>, k: usize, random: &Random) -> Sample {
    let mut others = scores.to_vec();
    winners.iter().for_each(|&row| others[row] = 0.0);
    let sums: Vec<_> = others
        .iter()
        .scan(0.0, |sum, &score| {
            *sum += score;
            Some(*sum)
        })
        .collect();
    let total = sums.last().copied().unwrap_or(0.0);

    let mut rows = winners;
    let mut weights = vec![1.0; rows.len()];
    if total > 0.0 {
        let draws = k - rows.len();
        for draw in 0..draws {
            let at = random.uniform(draw) * total;
            let row = sums.partition_point(|&sum| sum <= at);
            rows.push(row);
            weights.push(total / (draws as f64 * others[row]));
        }
    }
    fill(scores, k, rows, weights)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inclusion_probabilities_sum_to_k() {
        let scores: Vec<_> = (1..200).map(|i| f64::from(i % 17).powi(4)).collect();
        for k in [1, 2, 10, 50, 100, 150] {
            let c = inclusion(&scores, k);
            let sum: f64 = scores.iter().map(|&score| probability(c, score)).sum();
            assert!((sum - k as f64).abs() < 1e-9 * k as f64, "{k}: {sum}");
        }
    }

    #[test]
    fn few_positive_scores_are_all_chosen_with_weight_1() {
        let scores = [0.0, 2.0, 0.0, 0.0, 1e-30, 0.0];
        let sample = systematic(&scores, 4, 0.3, &Random { seed: 1, step: 0 });
        assert_eq!(sample.rows, [1, 4, 0, 2]);
        assert_eq!(sample.weights, [1.0, 1.0, 0.0, 0.0]);
    }

    #[test]
    fn equal_keys_are_taken_in_the_order_of_the_rows() {
        let keys = [1.0, 2.0, 1.0, f64::NEG_INFINITY, 1.0, 0.0];
        assert_eq!(largest(&keys, 3), [0, 1, 2]);
        assert_eq!(largest(&keys, 5), [0, 1, 2, 4, 5]);
    }

    #[test]
    fn a_score_that_is_not_finite_is_in_the_weight_of_every_row() {
        for method in [Method::Systematic, Method::Baseline(Baseline::Bernoulli)] {
            let settings = Draw {
                k: 2,
                method,
                random: Random { seed: 1, step: 0 },
            };
            let sample = draw(&[1.0, f64::INFINITY, 2.0, 1.0], &settings);
            assert_eq!(sample.rows.len(), settings.count(4));
            assert!(sample.weights.iter().all(|weight| weight.is_nan()));
        }
    }

    #[test]
    fn as_many_winners_as_make_the_variance_smallest() {
        // The rest by the draws that are left: 100/4, 10/3, 6/2, 3/1.
        assert_eq!(winners(&[3.0, 90.0, 4.0, 3.0], 4), [1, 2]);
        assert!(winners(&[1.0; 8], 4).is_empty());
    }
}
