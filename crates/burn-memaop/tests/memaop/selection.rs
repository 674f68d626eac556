//! The random policies draw with the right probabilities.

use burn::tensor::{DType, Device};
use burn_memaop::{
    Memory,
    op::{AopStep, weight_gradient},
};

use crate::oracle::Policy;
use crate::support::Matrix;

const DRAWS: u64 = 6000;

/// The rows drawn in one step, read off the memory: those that are zero.
fn draw(policy: Policy, sizes: &[f64], k: usize, step: u64) -> Vec<usize> {
    let device = Device::flex();
    let input = Matrix(sizes.iter().map(|&size| vec![size]).collect());
    let grad = Matrix(vec![vec![1.0]; sizes.len()]);
    let gradient = weight_gradient(
        input.tensor(&device, DType::F32),
        grad.tensor(&device, DType::F32),
        None,
        AopStep {
            k,
            method: policy.method(Memory::Published { decay: 1.0 }),
            seed: 99,
            step,
        },
    );
    let kept = Matrix::from_tensor(gradient.memory.expect("rows are left out").grad);
    (0..sizes.len())
        .filter(|&row| kept.0[row][0] == 0.0)
        .collect()
}

/// Pearson's statistic of the pairs drawn, for probabilities of unordered pairs.
fn chi_square(policy: Policy, sizes: &[f64], pair: impl Fn(usize, usize) -> f64) -> (f64, usize) {
    let m = sizes.len();
    let mut counts = vec![vec![0.0; m]; m];
    for step in 0..DRAWS {
        let rows = draw(policy, sizes, 2, step);
        assert_eq!(rows.len(), 2, "without replacement");
        counts[rows[0]][rows[1]] += 1.0;
    }
    let mut statistic = 0.0;
    let mut cells = 0;
    for a in 0..m {
        for b in a + 1..m {
            let expected = DRAWS as f64 * pair(a, b);
            assert!(expected > 5.0, "enough draws for the test");
            statistic += f64::powi(counts[a][b] - expected, 2) / expected;
            cells += 1;
        }
    }
    (statistic, cells - 1)
}

#[test]
fn rand_k_draws_every_pair_alike() {
    let sizes = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
    let (statistic, degrees) = chi_square(Policy::RandK, &sizes, |_, _| 1.0 / 15.0);
    // The 99.9 % point of chi-square with 14 degrees of freedom.
    assert_eq!(degrees, 14);
    assert!(statistic < 36.12, "{statistic}");
}

#[test]
fn weighted_k_draws_in_proportion_to_the_squared_score_and_without_replacement() {
    let sizes: [f64; 5] = [1.0, 1.2, 1.5, 1.8, 2.2];
    let weights = sizes.map(|size| size * size);
    let total: f64 = weights.iter().sum();
    let pair = |a: usize, b: usize| {
        let first = |row: usize| weights[row] / total;
        let second = |row: usize, taken: usize| weights[row] / (total - weights[taken]);
        first(a) * second(b, a) + first(b) * second(a, b)
    };
    let (statistic, degrees) = chi_square(Policy::WeightedK, &sizes, pair);
    // The 99.9 % point of chi-square with 9 degrees of freedom.
    assert_eq!(degrees, 9);
    assert!(statistic < 27.88, "{statistic}");
}

#[test]
fn the_tests_would_notice_other_probabilities() {
    let sizes: [f64; 5] = [1.0, 1.2, 1.5, 1.8, 2.2];
    let (statistic, _) = chi_square(Policy::WeightedK, &sizes, |_, _| 0.1);
    assert!(statistic > 27.88, "{statistic}");
}
