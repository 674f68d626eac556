//! The gradient of the input for some of the rows.

use burn::{
    nn::LinearConfig,
    tensor::{DType, Device},
};
use burn_memaop::{AopConfig, MemAopLinear, OuterProducts, op::parts::input_gradient};

use crate::{
    oracle::{inclusion_probabilities, layer_seed, permutation, philox},
    support::{Matrix, Random, bits, published},
};

fn norm(row: &[f64]) -> f64 {
    row.iter().map(|value| value * value).sum::<f64>().sqrt()
}

/// The rows and their weights, from the definitions.
fn chosen(g: &Matrix, k: usize, seed: u64, step: u64) -> Vec<(usize, f64)> {
    let sizes: Vec<f64> = g.0.iter().map(|row| norm(row)).collect();
    let p = inclusion_probabilities(&sizes, k);
    let start = (philox([0, 0, step], seed)[0] as f64 + 0.5) / 4_294_967_296.0;
    let mut drawn = Vec::new();
    let mut reached = start;
    for row in permutation(sizes.len(), step, seed) {
        let before = reached;
        reached += p[row];
        if reached.floor() > before.floor() {
            drawn.push((row, 1.0 / p[row]));
        }
    }
    drawn
}

fn expected(g: &Matrix, w: &Matrix, rows: &[(usize, f64)]) -> Matrix {
    let mut gradient = Matrix::zeros(g.rows(), w.rows());
    for &(row, weight) in rows {
        for a in 0..w.rows() {
            for b in 0..w.columns() {
                gradient.0[row][a] += weight * g.0[row][b] * w.0[a][b];
            }
        }
    }
    gradient
}

/// How many rows, by which seed and step.
#[derive(Clone, Copy)]
struct Settings {
    k: usize,
    seed: u64,
    step: u64,
}

fn gradient(device: &Device, dtype: DType, g: &Matrix, w: &Matrix, settings: Settings) -> Matrix {
    let (g, w) = (g.tensor(device, dtype), w.tensor(device, dtype));
    let Settings { k, seed, step } = settings;
    let gradient = input_gradient(g, w, k, seed, step);
    assert_eq!(gradient.dtype(), dtype);
    Matrix::from_tensor(gradient)
}

pub fn input_gradients_equal_their_definition(device: &Device) {
    let mut random = Random(71);
    for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F64, 1e-13), (DType::F16, 5e-3)] {
        if !device.supports_dtype(dtype) {
            continue;
        }
        for (m, n, p) in [
            (2, 1, 1),
            (13, 5, 3),
            (64, 8, 12),
            (65, 7, 9),
            (1000, 3, 65),
        ] {
            let w = random.matrix(n, p).rounded(dtype);
            for k in [1, m / 4, m - 1] {
                let k = k.max(1);
                let (seed, step) = (9, 1 << 33 | 5);
                let g = random.matrix(m, p).rounded(dtype);
                let rows = chosen(&g, k, seed, step);
                let settings = Settings { k, seed, step };
                let found = gradient(device, dtype, &g, &w, settings);
                let error = found.relative_error(&expected(&g, &w, &rows));
                assert!(error < tolerance, "{dtype:?} {m} {n} {p} {k}: {error:e}");
                // What is left out is zero, not small.
                let zero = (0..m).filter(|&row| found.0[row].iter().all(|&v| v == 0.0));
                assert_eq!(zero.count(), m - rows.len(), "{m} {k}");
            }
        }
    }
}

pub fn rows_of_zeros_stay_zero(device: &Device) {
    let mut random = Random(72);
    let w = random.matrix(4, 3);
    let mut g = random.matrix(10, 3);
    for row in [0, 3, 4, 8, 9] {
        g.0[row] = vec![0.0; 3];
    }
    let settings = Settings {
        k: 8,
        seed: 1,
        step: 0,
    };
    let found = gradient(device, DType::F32, &g, &w, settings);
    let kept = [1, 2, 5, 6, 7].map(|row| (row, 1.0));
    let error = found.relative_error(&expected(&g, &w, &kept));
    assert!(error < 1e-5, "{error:e}");

    let zeros = gradient(device, DType::F32, &Matrix::zeros(10, 3), &w, settings);
    assert_eq!(zeros, Matrix::zeros(10, 4));
}

/// As below a layer that left rows of zeros behind: the same gradient, with and without the choice of
/// rows, from few rows and from most of them.
pub fn rows_of_zeros_change_nothing(device: &Device) {
    let mut random = Random(75);
    let (m, n, p) = (40, 7, 5);
    let w = random.matrix(n, p);
    for kept in [0, 1, 9, 30, 39] {
        let mut g = random.matrix(m, p);
        let start = random.range(0, m - 1);
        let rows: Vec<_> = (0..kept).map(|row| (row * 7 + start) % m).collect();
        for row in (0..m).filter(|row| !rows.contains(row)) {
            g.0[row] = vec![0.0; p];
        }
        let rows: Vec<_> = rows.into_iter().map(|row| (row, 1.0)).collect();
        let expected = expected(&g, &w, &rows);
        for k in [m, m - 1, kept.max(1)] {
            let settings = Settings {
                k,
                seed: 3,
                step: 0,
            };
            let found = gradient(device, DType::F32, &g, &w, settings);
            let error = found.relative_error(&expected);
            assert!(error < 1e-5, "{kept} {k}: {error:e}");
        }
    }
}

#[test]
fn sampled_rows_are_the_exact_gradient_on_average() {
    let device = Device::flex();
    let mut random = Random(73);
    let (m, k, draws) = (20, 5, 4000);
    let (g, w) = (random.matrix(m, 3), random.matrix(2, 3));
    let all: Vec<_> = (0..m).map(|row| (row, 1.0)).collect();
    let exact = expected(&g, &w, &all);
    let mut mean = Matrix::zeros(m, 2);
    let mut square = Matrix::zeros(m, 2);
    for step in 0..draws {
        let settings = Settings { k, seed: 4, step };
        let found = gradient(&device, DType::F32, &g, &w, settings);
        for i in 0..m {
            for j in 0..2 {
                mean.0[i][j] += found.0[i][j] / draws as f64;
                square.0[i][j] += found.0[i][j].powi(2) / draws as f64;
            }
        }
    }
    for i in 0..m {
        for j in 0..2 {
            let deviation = (square.0[i][j] - mean.0[i][j].powi(2)).max(0.0).sqrt();
            let error = deviation / (draws as f64).sqrt();
            let distance = (mean.0[i][j] - exact.0[i][j]).abs();
            assert!(distance < 5.0 * error + 1e-5, "{i} {j}: {distance} {error}");
        }
    }
}

/// In a layer: some rows of the gradient of the input, and all else as it was.
pub fn only_the_gradient_of_the_input_changes(device: &Device) {
    let (m, n, p) = (12, 6, 4);
    let linear = LinearConfig::new(n, p).init(device);
    let exact = published().with_outer_products(OuterProducts::Count(5));
    let some = |ratio| OuterProducts::Ratio(ratio);
    let mut random = Random(74);
    let (x, g) = (random.matrix(m, n), random.matrix(m, p));
    let w = Matrix::from_tensor(linear.weight.val().inner());
    let backward = |aop: AopConfig| {
        let layer = MemAopLinear::from_linear(linear.clone(), aop);
        let input = x.tensor(device, DType::F32).require_grad();
        let output = layer.forward(input.clone());
        let grads = (output * g.tensor(device, DType::F32)).sum().backward();
        let weight = bits(layer.weight.grad(&grads).unwrap());
        let bias = bits(layer.bias.as_ref().unwrap().grad(&grads).unwrap());
        (
            Matrix::from_tensor(input.grad(&grads).unwrap()),
            weight,
            bias,
        )
    };
    let (all, weight, bias) = backward(exact);
    let (quarter, same_weight, same_bias) = backward(exact.with_input_gradient(some(0.25)));
    assert_eq!((weight, bias), (same_weight, same_bias));
    // The input is a leaf.
    let rows = chosen(&g, 3, layer_seed(0, 1), 0);
    assert!(quarter.relative_error(&expected(&g, &w, &rows)) < 1e-5);
    assert_eq!(backward(exact.with_input_gradient(some(1.0))).0, all);

    // With exact gradients of the weight, and in exact steps.
    let every_product = exact.with_outer_products(OuterProducts::Count(m));
    let (quarter, _, _) = backward(every_product.with_input_gradient(some(0.25)));
    assert!(quarter.relative_error(&expected(&g, &w, &rows)) < 1e-5);
    let scheduled = exact.with_input_gradient(some(0.25)).with_exact_steps(1);
    assert_eq!(backward(scheduled).0, all);
    // Also where the gradient of the weight is exact all along.
    let scheduled = scheduled.with_outer_products(OuterProducts::Count(m));
    assert_eq!(backward(scheduled).0, all);
}

#[test]
fn bad_values_are_named() {
    let config = |ratio| AopConfig::new().with_input_gradient(OuterProducts::Ratio(ratio));
    let message = |config: AopConfig| config.validate().unwrap_err().to_string();
    assert_eq!(
        message(config(1.5)),
        "AopConfig.input_gradient: the ratio must be in (0, 1], but got 1.5"
    );
    assert!(message(config(f64::NAN)).contains("NaN"));
    assert!(config(0.25).validate().is_ok());
    assert_eq!(
        message(AopConfig::new().with_input_gradient(OuterProducts::Count(0))),
        "AopConfig.input_gradient: the count must be at least 1, but got 0"
    );
}
