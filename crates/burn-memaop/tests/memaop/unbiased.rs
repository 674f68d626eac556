//! Estimators: unbiased policies give the exact gradient on average, with the variance of theory;
//! the balanced memory gives back the sum of the outer products that it was given.

use burn::tensor::{DType, Device};
use burn_memaop::{
    Memory, Method,
    op::{AopStep, Rows, weight_gradient},
};

use crate::{
    oracle::{Policy, choose, inclusion_probabilities},
    support::{Matrix, Random},
};

const DRAWS: u64 = 4000;

fn gradient(
    x: &Matrix,
    g: &Matrix,
    memory: Option<(Matrix, Matrix)>,
    step: AopStep,
) -> (Matrix, Option<(Matrix, Matrix)>) {
    let device = Device::flex();
    let tensor = |matrix: &Matrix| matrix.tensor(&device, DType::F32);
    let memory = memory.map(|(input, grad)| Rows {
        input: tensor(&input),
        grad: tensor(&grad),
        // It decides nothing.
        age: tensor(&Matrix::zeros(input.rows(), 1)),
    });
    let gradient = weight_gradient(tensor(x), tensor(g), memory, step);
    let memory = gradient.memory;
    let memory = memory
        .map(|Rows { input, grad, .. }| (Matrix::from_tensor(input), Matrix::from_tensor(grad)));
    (Matrix::from_tensor(gradient.weight), memory)
}

fn outer(x: &[f64], g: &[f64], weight: f64) -> Vec<f64> {
    let products = x.iter().flat_map(|a| g.iter().map(move |b| weight * a * b));
    products.collect()
}

fn sum(products: impl Iterator<Item = Vec<f64>>) -> Vec<f64> {
    let add = |mut sum: Vec<f64>, product: Vec<f64>| {
        sum.iter_mut().zip(product).for_each(|(s, p)| *s += p);
        sum
    };
    products.reduce(add).expect("at least one product")
}

fn square(values: &[f64]) -> f64 {
    values.iter().map(|value| value * value).sum()
}

/// Draws of a policy: the mean gradient's distance from the exact one in units of its standard
/// error, and the variance (the expected squared distance from the exact gradient).
struct Measured {
    distance: f64,
    variance: f64,
    /// The standard error of the variance.
    error: f64,
}

const M: usize = 24;
const K: usize = 6;

/// Rows of different sizes that are not centred, as activations after a ReLU.
fn batch() -> (Matrix, Matrix) {
    let mut random = Random(31);
    let (mut x, g) = (random.matrix(M, 4), random.matrix(M, 3));
    x.0.iter_mut()
        .flatten()
        .for_each(|value| *value = value.abs());
    (x, g)
}

fn products(x: &Matrix, g: &Matrix) -> Vec<Vec<f64>> {
    (0..M).map(|i| outer(&x.0[i], &g.0[i], 1.0)).collect()
}

fn measure(policy: Policy) -> Measured {
    let (x, g) = batch();
    let exact = sum(products(&x, &g).into_iter());
    let mut mean = vec![0.0; exact.len()];
    let mut squares = Vec::new();
    for step in 0..DRAWS {
        let step = AopStep {
            k: K,
            method: policy.method(Memory::None),
            seed: 77,
            step,
        };
        let drawn = gradient(&x, &g, None, step).0.0.concat();
        let error: Vec<_> = drawn.iter().zip(&exact).map(|(a, b)| a - b).collect();
        mean.iter_mut()
            .zip(&error)
            .for_each(|(mean, error)| *mean += error / DRAWS as f64);
        squares.push(square(&error));
    }
    let variance = squares.iter().sum::<f64>() / DRAWS as f64;
    let spread = squares.iter().map(|s| (s - variance).powi(2)).sum::<f64>() / DRAWS as f64;
    Measured {
        distance: (square(&mean) / (variance / DRAWS as f64)).sqrt(),
        variance,
        error: (spread / DRAWS as f64).sqrt(),
    }
}

fn shuffled(random: &mut Random, count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    for place in (1..count).rev() {
        order.swap(place, random.range(0, place));
    }
    order
}

/// Patches of images, of which those of a column are alike: in the order of the rows, every seventh would be
/// of one column.
#[test]
fn systematic_sampling_is_not_misled_by_a_period() {
    let (images, patches) = (16, 49);
    let (m, k) = (images * patches, images * patches / 7);
    let mut random = Random(33);
    let columns: Vec<Vec<f64>> = (0..7).map(|_| random.matrix(1, 4).0.remove(0)).collect();
    let mut x = Matrix::zeros(m, 4);
    for row in 0..m {
        // Of one size, as after a norm.
        let column = &columns[row % 7];
        let size = square(column).sqrt();
        x.0[row] = column.iter().map(|value| value / size).collect();
    }
    let g = Matrix(vec![vec![1.0]; m]);
    let exact = sum((0..m).map(|i| outer(&x.0[i], &g.0[i], 1.0)));
    let variance = |policy: Policy| {
        let draws = 400;
        let error = |step| {
            let step = AopStep {
                k,
                method: policy.method(Memory::None),
                seed: 78,
                step,
            };
            let drawn = gradient(&x, &g, None, step).0.0.concat();
            drawn
                .iter()
                .zip(&exact)
                .map(|(a, b)| (a - b).powi(2))
                .sum::<f64>()
        };
        (0..draws).map(error).sum::<f64>() / draws as f64
    };
    let ratio = variance(Policy::Systematic) / variance(Policy::Bernoulli);
    assert!(ratio < 1.1, "{ratio}");
}

/// The variance of each policy by its formula.
fn theory(policy: Policy) -> f64 {
    let (x, g) = batch();
    let products = products(&x, &g);
    let exact = sum(products.iter().cloned());
    let sizes: Vec<_> = products
        .iter()
        .map(|product| square(product).sqrt())
        .collect();
    let total: f64 = sizes.iter().sum();
    match policy {
        Policy::ScaledRandK => {
            // Cochran, "Sampling Techniques": M^2 (1 - K / M) S^2 / K.
            let (m, k) = (M as f64, K as f64);
            let mean: Vec<_> = exact.iter().map(|value| value / m).collect();
            let spread = products.iter().map(|product| {
                let offset: Vec<_> = product.iter().zip(&mean).map(|(a, b)| a - b).collect();
                square(&offset)
            });
            m * m * (1.0 - k / m) / k * spread.sum::<f64>() / (m - 1.0)
        }
        Policy::Bernoulli => {
            let p = inclusion_probabilities(&sizes, K);
            (0..M)
                .map(|i| (1.0 / p[i] - 1.0) * sizes[i] * sizes[i])
                .sum()
        }
        Policy::ColumnRow => (total * total - square(&exact)) / K as f64,
        Policy::WinnerTakeAll => {
            // The winners do not vary; the rest is column-row sampling.
            let chosen = choose(policy, &sizes, &[0; M], &[], K);
            let winners: Vec<_> = chosen.iter().filter(|&&(_, w)| w == 1.0).collect();
            let rest: Vec<_> = (0..M)
                .filter(|i| winners.iter().all(|(row, _)| row != i))
                .collect();
            let total: f64 = rest.iter().map(|&i| sizes[i]).sum();
            let sum = sum(rest.iter().map(|&i| products[i].clone()));
            (total * total - square(&sum)) / (K - winners.len()) as f64
        }
        Policy::Systematic => {
            // The mean over the one random number, on a grid, and over orders of the rows.
            let (grid, orders) = (50, 2000);
            let error = |index: u64, order: &[usize]| {
                let mut words = vec![0; M];
                words[0] = (index << 32) / grid;
                let chosen = choose(policy, &sizes, &words, order, K).into_iter();
                let drawn = sum(chosen.map(|(i, weight)| outer(&x.0[i], &g.0[i], weight)));
                drawn
                    .iter()
                    .zip(&exact)
                    .map(|(a, b)| (a - b).powi(2))
                    .sum::<f64>()
            };
            let mut random = Random(32);
            let total: f64 = (0..orders)
                .map(|_| {
                    let order = shuffled(&mut random, M);
                    (0..grid).map(|index| error(index, &order)).sum::<f64>()
                })
                .sum();
            total / (grid * orders) as f64
        }
        Policy::TopK | Policy::RandK | Policy::WeightedK => unreachable!("biased"),
    }
}

#[test]
fn unbiased_policies_have_the_exact_mean_and_the_variance_of_theory() {
    let policies = [
        Policy::Systematic,
        Policy::Bernoulli,
        Policy::WinnerTakeAll,
        Policy::ColumnRow,
        Policy::ScaledRandK,
    ];
    let measured = policies.map(measure);
    for (policy, measured) in policies.iter().zip(&measured) {
        // The squared distance has mean 1 and, over 12 elements, less than 12 even if all of
        // them move as one; 4 standard errors.
        assert!(measured.distance < 4.0, "{policy:?}: {}", measured.distance);
        let deviation = (measured.variance - theory(*policy)) / measured.error;
        assert!(deviation.abs() < 4.0, "{policy:?}: {deviation}");
    }
    let variances = measured.map(|measured| measured.variance);
    assert!(variances.is_sorted(), "{variances:?}");
}

#[test]
fn the_test_would_notice_a_bias() {
    for policy in [Policy::RandK, Policy::TopK, Policy::WeightedK] {
        let measured = measure(policy);
        assert!(
            measured.distance > 10.0,
            "{policy:?}: {}",
            measured.distance
        );
    }
}

/// Rows of several batches folded in with nothing applied: only one position is ever chosen, which
/// is not looked at.
fn balanced(batches: &[(Matrix, Matrix)], decay: f64, seed: u64) -> (Matrix, Matrix) {
    let mut memory = None;
    for (step, (x, g)) in batches.iter().enumerate() {
        let step = AopStep {
            k: 1,
            method: Method::TopK(Memory::Balanced { decay }),
            seed,
            step: step as u64,
        };
        memory = gradient(x, g, memory, step).1;
    }
    memory.expect("a memory is kept")
}

/// Batches of two positions, the second of which is always the one that is chosen.
fn batches(random: &mut Random, count: usize) -> Vec<(Matrix, Matrix)> {
    let batch = |random: &mut Random| {
        let (mut x, mut g) = (random.matrix(2, 3), random.matrix(2, 2));
        x.0[1] = vec![1e3; 3];
        g.0[1] = vec![1e3; 2];
        (x, g)
    };
    (0..count).map(|_| batch(random)).collect()
}

#[test]
fn the_balanced_memory_holds_the_sum_of_the_outer_products_on_average() {
    let mut random = Random(32);
    for decay in [1.0f64, 0.8] {
        let batches = batches(&mut random, 4);
        let expected = sum(batches.iter().rev().enumerate().map(|(age, (x, g))| {
            // Each step begins with the decay of what it finds.
            outer(&x.0[0], &g.0[0], decay.powi(age as i32))
        }));
        let mut mean = vec![0.0; expected.len()];
        let mut variance = 0.0;
        for seed in 0..DRAWS {
            let (a, b) = balanced(&batches, decay, seed);
            let kept = outer(&a.0[0], &b.0[0], 1.0);
            let error: Vec<_> = kept.iter().zip(&expected).map(|(a, b)| a - b).collect();
            variance += square(&error) / DRAWS as f64;
            mean.iter_mut()
                .zip(&error)
                .for_each(|(mean, error)| *mean += error / DRAWS as f64);
        }
        assert!(variance > 0.0, "the sign is random");
        let distance = (square(&mean) / (variance / DRAWS as f64)).sqrt();
        assert!(distance < 4.0, "decay {decay}: {distance}");
    }
}

#[test]
fn the_scale_of_the_balanced_memory_has_the_smallest_error() {
    let difference =
        |a: &[f64], b: &[f64]| -> Vec<f64> { a.iter().zip(b).map(|(a, b)| a - b).collect() };
    let mut random = Random(33);
    for seed in 0..20 {
        let batches = batches(&mut random, 2);
        let (before, after) = (
            balanced(&batches[..1], 1.0, seed),
            balanced(&batches, 1.0, seed),
        );
        let (a, b) = (&before.0.0[0], &before.1.0[0]);
        let (x, g) = (&batches[1].0.0[0], &batches[1].1.0[0]);
        let expected = sum([outer(a, b, 1.0), outer(x, g, 1.0)].into_iter());
        // The mean squared error over both signs, with another scale.
        let error = |r: f64| {
            let of_sign = |sign: f64| {
                let add = |kept: &[f64], new: &[f64], scale: f64| -> Vec<f64> {
                    kept.iter().zip(new).map(|(a, b)| a + scale * b).collect()
                };
                let kept = outer(&add(a, x, sign * r), &add(b, g, sign / r), 1.0);
                square(&difference(&kept, &expected))
            };
            0.5 * (of_sign(1.0) + of_sign(-1.0))
        };
        let r = (square(&difference(&after.0.0[0], a)) / square(x)).sqrt();
        for factor in [0.5, 0.9, 0.99, 1.01, 1.1, 2.0] {
            assert!(error(r) < error(factor * r), "{factor}");
        }
    }
}

#[test]
fn zero_rows_and_extreme_norms_are_folded_in_without_harm() {
    let row = |size: f64, width: usize| vec![size; width];
    let pair = |x: f64, g: f64| {
        let x = Matrix(vec![row(x, 3), row(1e3, 3)]);
        let g = Matrix(vec![row(g, 2), row(1e3, 2)]);
        (x, g)
    };
    let kept = |pairs: &[(f64, f64)]| {
        let batches: Vec<_> = pairs.iter().map(|&(x, g)| pair(x, g)).collect();
        let (a, b) = balanced(&batches, 1.0, 3);
        (a.0[0].clone(), b.0[0].clone())
    };
    let product = |(a, b): (Vec<f64>, Vec<f64>)| a[0] * b[0];

    // A pair with a factor of zeros adds nothing, and a memory of zeros takes a pair as it is.
    let alone = kept(&[(2.0, 3.0)]);
    assert_eq!(product(alone.clone()), 6.0);
    assert_eq!(
        kept(&[(2.0, 3.0), (0.0, 5.0), (7.0, 0.0), (0.0, 0.0)]),
        alone
    );
    assert_eq!(product(kept(&[(0.0, 5.0)])), 0.0);
    let (a, b) = kept(&[(0.0, 5.0), (2.0, 3.0)]);
    assert_eq!((a[0].abs(), b[0].abs()), (2.0, 3.0));

    // Of directions of their own, so that they cannot cancel.
    let along = |axis: usize, size: f64, width: usize| {
        let mut row = vec![0.0; width];
        row[axis] = size;
        row
    };
    for (first, second) in [
        ((1e-15, 1e15), (1e15, 1e-15)),
        ((1e15, 1e-15), (1e-15, 1e15)),
        ((1e-15, 1e-15), (1e15, 1e-12)),
        ((1e2, 1e-2), (1e-15, 1e-15)),
    ] {
        let mut batches = [pair(first.0, first.1), pair(second.0, second.1)];
        for (axis, (x, g)) in batches.iter_mut().enumerate() {
            x.0[0] = along(axis, x.0[0][0], 3);
            g.0[0] = along(axis, g.0[0][0], 2);
        }
        let (a, b) = balanced(&batches, 1.0, 3);
        for axis in 0..2 {
            let product = (a.0[0][axis] * b.0[0][axis]).abs();
            let (x, g) = [first, second][axis];
            assert!((product / (x * g) - 1.0).abs() < 1e-5, "{a:?} {b:?}");
        }
    }
}
