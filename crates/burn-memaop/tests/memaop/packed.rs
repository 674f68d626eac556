//! Inputs that are kept in few bits, against their definition.

use burn::{
    nn::{LinearConfig, attention::MultiHeadAttentionConfig},
    tensor::{DType, Device, Tensor, activation},
};
use burn_memaop::{
    AopConfig, MemAopLinear, Memory, Method, OuterProducts, StoredInput, activation as compact,
    op::{
        AopStep,
        parts::{self, PackedRows, gradient_noise},
    },
    transformer::{MemAopMultiHeadAttention, MhaInput},
};

use crate::{
    oracle::{Oracle, Policy, word_of_value},
    support::{Matrix, Random, linear},
};

/// In how many bits rows are packed, and by which random bits they are rounded.
#[derive(Clone, Copy)]
struct PackStep {
    stored: StoredInput,
    seed: u64,
    step: u64,
}

fn pack(rows: Tensor<2>, step: PackStep) -> PackedRows {
    parts::pack(rows, step.stored, step.seed, step.step)
}

const STORED: [StoredInput; 2] = [StoredInput::Int8, StoredInput::Int4];

/// The noise of a value, in `(0, 1)`: the fourth word of its row's block, and its column, mixed.
fn noise(row: usize, column: usize, seed: u64, step: u64) -> f64 {
    let word = word_of_value([row, column], step, seed);
    ((word >> 16) as f64 + 0.5) / 65_536.0
}

/// The values as they are kept, and half a unit of each, in which the last bit of a sum may decide.
fn rounded(x: &Matrix, stored: StoredInput, seed: u64, step: u64) -> (Matrix, Matrix) {
    let (mut kept, mut units) = (x.clone(), x.clone());
    for row in 0..x.rows() {
        for column in 0..x.columns() {
            let group = &x.0[row][column / 64 * 64..x.columns().min(column / 64 * 64 + 64)];
            let largest = group
                .iter()
                .fold(0.0, |largest: f64, v| largest.max(v.abs()));
            let value = x.0[row][column];
            let unit = match stored {
                StoredInput::Full => unreachable!("nothing is rounded"),
                StoredInput::Int8 => largest / 127.0,
                StoredInput::Int4 => largest / 7.0,
            };
            let noise = noise(row, column, seed, step);
            let rounded = (value / unit + noise).floor();
            (kept.0[row][column], units.0[row][column]) = match unit {
                0.0 => (0.0, 0.0),
                unit => (rounded * unit, unit),
            };
        }
    }
    (kept, units)
}

/// Equal but for rounding, or for single values that stand between two.
fn assert_close(found: &Matrix, (kept, units): &(Matrix, Matrix), context: &str) {
    let mut apart = 0;
    for row in 0..kept.rows() {
        for column in 0..kept.columns() {
            let unit = units.0[row][column];
            let error = (found.0[row][column] - kept.0[row][column]).abs();
            assert!(error <= 1.001 * unit, "{context}: {row} {column}: {error}");
            apart += usize::from(error > 1e-3 * unit);
        }
    }
    let all = kept.rows() * kept.columns();
    assert!(apart <= 1 + all / 500, "{context}: {apart} of {all}");
}

pub fn packed_rows_equal_the_oracle(device: &Device) {
    let mut random = Random(41);
    let shapes = [
        (1, 1),
        (3, 7),
        (5, 31),
        (5, 33),
        (4, 63),
        (4, 64),
        (4, 65),
        (2, 100),
        (3, 130),
        (40, 784),
        (1100, 257),
    ];
    for (rows, width) in shapes {
        let x = random.matrix(rows, width);
        for stored in STORED {
            let step = PackStep {
                stored,
                seed: 7 << 33,
                step: 3,
            };
            let packed = pack(x.tensor(device, DType::F32), step);
            let context = format!("{stored:?} {rows} {width}");
            let found = Matrix::from_tensor(packed.clone().unpack());
            assert_close(&found, &rounded(&x, stored, step.seed, step.step), &context);
            if width >= 512 {
                let share = packed.bytes() as f64 / (4 * rows * width) as f64;
                let most = match stored {
                    StoredInput::Int8 => 0.27,
                    _ => 0.15,
                };
                assert!(share <= most, "{context}: {share}");
            }
        }
    }
    // A column of a larger matrix, and one that is turned.
    let x = random.matrix(70, 9);
    let step = PackStep {
        stored: StoredInput::Int8,
        seed: 1,
        step: 0,
    };
    let turned = x.tensor(device, DType::F32).transpose();
    let expected = Matrix::from_tensor(turned.clone());
    let found = Matrix::from_tensor(pack(turned, step).unpack());
    assert_close(&found, &rounded(&expected, step.stored, 1, 0), "turned");
    let column = x.tensor(device, DType::F32).narrow(1, 2, 3);
    let expected = Matrix::from_tensor(column.clone());
    let found = Matrix::from_tensor(pack(column, step).unpack());
    assert_close(&found, &rounded(&expected, step.stored, 1, 0), "a part");
}

pub fn packed_rows_of_every_type(device: &Device) {
    let mut random = Random(42);
    for (dtype, tolerance) in [(DType::F16, 1e-3), (DType::BF16, 1e-2), (DType::F64, 1e-6)] {
        if !device.supports_dtype(dtype) {
            eprintln!("skipped: {device:?} does not support {dtype:?}");
            continue;
        }
        let x = random.matrix(9, 70).rounded(dtype);
        let g = random.matrix(9, 3).rounded(dtype);
        for stored in STORED {
            let step = PackStep {
                stored,
                seed: 5,
                step: 1,
            };
            let unpacked = pack(x.tensor(device, dtype), step).unpack();
            assert_eq!(unpacked.dtype(), dtype);
            let unpacked = Matrix::from_tensor(unpacked);
            let (kept, units) = rounded(&x, stored, 5, 1);
            let expected = (kept.rounded(dtype), units);
            assert_close(&unpacked, &expected, &format!("{dtype:?} {stored:?}"));

            let packed = pack(x.tensor(device, dtype), step);
            let step = step_of(Policy::Systematic, Memory::None, 3, 0);
            let gradient = packed
                .weight_gradient(g.tensor(device, dtype), None, step)
                .weight;
            assert_eq!(gradient.dtype(), dtype);
            let mut oracle = Oracle::new(Policy::Systematic, Memory::None, 2, 70, 3);
            let expected = oracle.step_of_rounded(&x, &unpacked, &g, 3);
            let error = Matrix::from_tensor(gradient).relative_error(&expected);
            assert!(error < tolerance, "{dtype:?} {stored:?}: {error}");
        }
    }
}

fn step_of(policy: Policy, memory: Memory, k: usize, step: u64) -> AopStep {
    AopStep {
        k,
        method: policy.method(memory),
        seed: 2,
        step,
    }
}

pub fn gradients_of_packed_rows_equal_the_oracle(device: &Device) {
    let mut random = Random(43);
    let methods = [
        (Policy::Systematic, Memory::None),
        (Policy::TopK, Memory::None),
        (Policy::WinnerTakeAll, Memory::None),
        (Policy::TopK, Memory::Balanced { decay: 0.9 }),
    ];
    for (policy, memory) in methods {
        for stored in STORED {
            for (m, n, p, k) in [
                (13, 5, 3, 1),
                (20, 65, 7, 19),
                (70, 96, 33, 9),
                (600, 300, 20, 75),
            ] {
                let mut oracle = Oracle::new(policy, memory, 2, n, p);
                let mut rows = None;
                for number in 0..2 {
                    let (x, g) = (random.matrix(m, n), random.matrix(m, p));
                    let packing = PackStep {
                        stored,
                        seed: 9,
                        step: number,
                    };
                    let packed = pack(x.tensor(device, DType::F32), packing);
                    let unpacked = Matrix::from_tensor(packed.clone().unpack());
                    let step = step_of(policy, memory, k, number);
                    let g_tensor = g.tensor(device, DType::F32);
                    let found = packed.weight_gradient(g_tensor, rows.take(), step);
                    rows = found.memory;
                    let expected = oracle.step_of_rounded(&x, &unpacked, &g, k);
                    let error = Matrix::from_tensor(found.weight).relative_error(&expected);
                    assert!(
                        error < 1e-5,
                        "{policy:?} {memory:?} {stored:?} {m} {n} {p}: {error:e}"
                    );
                }
            }
        }
    }
}

pub fn the_noise_of_packed_rows_is_that_of_the_rows(device: &Device) {
    let mut random = Random(44);
    let [x, g, gradient] = [(50, 70), (50, 9), (70, 9)]
        .map(|(rows, columns)| random.matrix(rows, columns).tensor(device, DType::F32));
    let ks = [50, 25, 12, 6, 3, 1];
    let packing = PackStep {
        stored: StoredInput::Int4,
        seed: 9,
        step: 0,
    };
    let figures = |noise: Tensor<1>| Matrix::from_tensor(noise.unsqueeze());
    let packed = pack(x.clone(), packing).gradient_noise(g.clone(), gradient.clone(), ks);
    let full = gradient_noise(x, g, gradient, ks);
    let error = figures(packed).relative_error(&figures(full));
    assert!(error < 1e-5, "{error:e}");
}

pub fn values_that_are_not_finite_stay_in_their_group(device: &Device) {
    let mut random = Random(45);
    let mut x = random.matrix(4, 150);
    for (row, value) in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY]
        .into_iter()
        .enumerate()
    {
        x.0[row][70] = value;
    }
    for stored in STORED {
        let step = PackStep {
            stored,
            seed: 1,
            step: 0,
        };
        let packed = pack(x.tensor(device, DType::F32), step);
        let found = Matrix::from_tensor(packed.clone().unpack());
        for row in 0..3 {
            for column in 0..150 {
                let value = found.0[row][column];
                let broken = column / 64 == 1;
                assert_eq!(
                    !value.is_finite(),
                    broken,
                    "{stored:?} {row} {column}: {value}"
                );
            }
        }
    }
    // Sizes whose squares are infinite.
    let largest = Matrix(vec![vec![3e38, -3e38, 1.0]]);
    for stored in STORED {
        let step = PackStep {
            stored,
            seed: 1,
            step: 0,
        };
        let found = Matrix::from_tensor(pack(largest.tensor(device, DType::F32), step).unpack());
        for column in 0..2 {
            let error = found.0[0][column] / largest.0[0][column] - 1.0;
            assert!(error.abs() < 0.01, "{stored:?}: {:?}", found.0);
        }
    }
}

pub fn zeros_and_tiny_values_are_kept_as_zeros(device: &Device) {
    let x = Matrix(vec![vec![0.0; 70], vec![-0.0; 70], vec![1e-37; 70]]);
    for stored in [StoredInput::Int8, StoredInput::Int4] {
        let step = PackStep {
            stored,
            seed: 1,
            step: 0,
        };
        let found = Matrix::from_tensor(pack(x.tensor(device, DType::F32), step).unpack());
        assert_eq!(found, Matrix::zeros(3, 70), "{stored:?}");
    }
}

/// One value that is much larger than the others costs precision in its group only.
#[test]
fn a_huge_value_leaves_the_other_groups_alone() {
    let device = Device::flex();
    let mut random = Random(46);
    let mut x = random.matrix(4, 256);
    x.0.iter_mut().for_each(|row| row[200] = 1e6);
    for stored in [StoredInput::Int8, StoredInput::Int4] {
        let step = PackStep {
            stored,
            seed: 1,
            step: 0,
        };
        let found = Matrix::from_tensor(pack(x.tensor(&device, DType::F32), step).unpack());
        let part = |matrix: &Matrix, columns: std::ops::Range<usize>| {
            Matrix(
                matrix
                    .0
                    .iter()
                    .map(|row| row[columns.clone()].to_vec())
                    .collect(),
            )
        };
        let error = part(&found, 0..192).relative_error(&part(&x, 0..192));
        let most = if stored == StoredInput::Int8 {
            0.02
        } else {
            0.3
        };
        assert!(error < most, "{stored:?}: {error}");
    }
}

/// On average over many seeds, and over many steps, what is unpacked is the input.
#[test]
fn rounding_is_unbiased() {
    let device = Device::flex();
    let x = Random(47).matrix(3, 70);
    for stored in STORED {
        for by_step in [false, true] {
            let draws = 4000;
            let mut sum = Matrix::zeros(3, 70);
            for draw in 0..draws {
                let (seed, step) = if by_step { (1, draw) } else { (draw, 1) };
                let packed = pack(
                    x.tensor(&device, DType::F32),
                    PackStep { stored, seed, step },
                );
                let found = Matrix::from_tensor(packed.unpack());
                for (sum, value) in sum.0.iter_mut().flatten().zip(found.0.concat()) {
                    *sum += value;
                }
            }
            let (_, units) = rounded(&x, stored, 0, 0);
            for ((sum, x), unit) in sum
                .0
                .concat()
                .iter()
                .zip(x.0.concat())
                .zip(units.0.concat())
            {
                let mean = sum / draws as f64;
                // A draw is off by half a unit at most, in the root of the mean square.
                let error = (mean - x) / (0.5 * unit / (draws as f64).sqrt());
                assert!(
                    error.abs() < 5.0,
                    "{stored:?} {by_step}: {mean} {x} {error}"
                );
            }
        }
    }
}

pub fn config(stored: StoredInput, outer_products: OuterProducts) -> AopConfig {
    AopConfig::new()
        .with_outer_products(outer_products)
        .with_stored_input(stored)
        .with_cost_rule(false)
        .with_seed(4)
}

pub fn layers_with_packed_inputs_equal_the_oracle(device: &Device) {
    let mut random = Random(48);
    let (m, n, p) = (12, 70, 5);
    let linear = LinearConfig::new(n, p).init(device);
    for stored in STORED {
        for k in [m, 4] {
            let layer =
                MemAopLinear::from_linear(linear.clone(), config(stored, OuterProducts::Count(k)));
            let mut oracle = Oracle::new(Policy::Systematic, Memory::None, 4, n, p);
            for step in 0..3 {
                let (x, g) = (random.matrix(m, n), random.matrix(m, p));
                let input = x.tensor(device, DType::F32).require_grad();
                let output = layer
                    .forward(input.clone().reshape([3, 4, n]))
                    .reshape([m, p]);
                let exact = linear.forward(input.clone());
                assert!(
                    Matrix::from_tensor(output.clone())
                        .relative_error(&Matrix::from_tensor(exact.clone()))
                        < 1e-6
                );
                let g_tensor = g.tensor(device, DType::F32);
                let grads = (output * g_tensor.clone()).sum().backward();
                let exact = (exact * g_tensor).sum().backward();
                let of_input =
                    [&grads, &exact].map(|grads| Matrix::from_tensor(input.grad(grads).unwrap()));
                assert!(of_input[0].relative_error(&of_input[1]) < 1e-6);

                let packing = PackStep {
                    stored,
                    seed: 4,
                    step,
                };
                let unpacked = pack(input.inner(), packing).unpack();
                let unpacked = Matrix::from_tensor(unpacked);
                let expected = match k == m {
                    true => product(&unpacked, &g),
                    false => oracle.step_of_rounded(&x, &unpacked, &g, k),
                };
                let found = Matrix::from_tensor(layer.weight.grad(&grads).unwrap());
                let error = found.relative_error(&expected);
                assert!(error < 1e-5, "{stored:?} {k} {step}: {error:e}");
            }
            assert_eq!(layer.memory_stats().step, 3, "the noise goes by the steps");
        }
    }
}

fn product(x: &Matrix, g: &Matrix) -> Matrix {
    let mut product = Matrix::zeros(x.columns(), g.columns());
    for row in 0..x.rows() {
        for a in 0..x.columns() {
            for b in 0..g.columns() {
                product.0[a][b] += x.0[row][a] * g.0[row][b];
            }
        }
    }
    product
}

/// The gradients of the three projections are of one rounding.
pub fn attention_packs_its_input_once(device: &Device) {
    let (batch, length, width) = (2, 5, 64);
    let aop = config(StoredInput::Int4, OuterProducts::Count(batch * length));
    let mha = MultiHeadAttentionConfig::new(width, 4)
        .with_dropout(0.0)
        .init(device);
    let ours = MemAopMultiHeadAttention::from_mha(mha, aop);
    let x = Random(49)
        .matrix(batch * length, width)
        .tensor(device, DType::F32);
    let x = x.reshape([batch, length, width]);
    let gradients = |input: MhaInput, attention: &MemAopMultiHeadAttention| {
        let grads = attention.forward(input).context.square().sum().backward();
        [&attention.query, &attention.key, &attention.value]
            .map(|layer| Matrix::from_tensor(layer.weight.grad(&grads).unwrap()))
    };
    let shared = gradients(MhaInput::self_attn(x.clone()), &ours);

    // The first packs for all, so that the others round as if they had its seed.
    let mut apart = ours.clone();
    let layers = [&apart.query, &apart.key, &apart.value].map(Clone::clone);
    [apart.query, apart.key, apart.value] =
        layers.map(|layer| burn_memaop::reset(layer).with_aop(aop));
    let input = MhaInput::new(x.clone(), x.clone(), x.clone());
    for (shared, apart) in shared.iter().zip(gradients(input, &apart)) {
        let error = shared.relative_error(&apart);
        assert!(error < 1e-5, "{error:e}");
    }

    // One that keeps its input in another way does so by itself.
    apart.key = apart.key.with_aop(aop.with_stored_input(StoredInput::Full));
    let apart = burn_memaop::reset(apart);
    let mixed = gradients(MhaInput::self_attn(x), &apart);
    assert!(mixed[0].relative_error(&shared[0]) < 1e-5);
    assert!(mixed[2].relative_error(&shared[2]) < 1e-5);
    let rounding = mixed[1].relative_error(&shared[1]);
    assert!((1e-3..0.3).contains(&rounding), "{rounding}");
}

/// Selection and rounding together, in two layers one above the other: on average the gradients are exact.
#[test]
fn gradients_of_packed_layers_are_unbiased() {
    let device = Device::flex().autodiff();
    let mut random = Random(50);
    let (m, n, h, p) = (16, 70, 6, 3);
    let linears = [
        linear(&mut random, n, h, &device),
        linear(&mut random, h, p, &device),
    ];
    let x = random.matrix(m, n).tensor(&device, DType::F32);
    let target = random.matrix(m, p).tensor(&device, DType::F32);
    let loss = |output: Tensor<2>| (output - target.clone()).square().sum();
    let exact = {
        let [first, second] = &linears;
        let grads = loss(second.forward(activation::relu(first.forward(x.clone())))).backward();
        linears
            .each_ref()
            .map(|layer| Matrix::from_tensor(layer.weight.grad(&grads).unwrap()))
    };
    let draws = 3000;
    let mut sums = exact
        .each_ref()
        .map(|exact| (Matrix::zeros(exact.rows(), exact.columns()), 0.0));
    for seed in 0..draws {
        let aop = config(StoredInput::Int4, OuterProducts::Count(5)).with_seed(seed);
        let [first, second] = linears
            .clone()
            .map(|linear| MemAopLinear::from_linear(linear, aop));
        let grads = loss(second.forward(compact::relu(first.forward(x.clone())))).backward();
        for ((layer, (sum, variance)), exact) in [first, second].iter().zip(&mut sums).zip(&exact) {
            let found = Matrix::from_tensor(layer.weight.grad(&grads).unwrap());
            for ((sum, found), exact) in sum
                .0
                .iter_mut()
                .flatten()
                .zip(found.0.concat())
                .zip(exact.0.concat())
            {
                *sum += found;
                *variance += (found - exact).powi(2);
            }
        }
    }
    for ((sum, variance), exact) in sums.into_iter().zip(&exact) {
        let mut mean = sum;
        mean.0
            .iter_mut()
            .flatten()
            .for_each(|value| *value /= draws as f64);
        let distance = mean.relative_error(exact)
            * exact.relative_error(&Matrix::zeros(exact.rows(), exact.columns()));
        // The distance of the mean, in the root of its expected square.
        let expected = (variance / draws as f64 / draws as f64).sqrt();
        assert!(distance < 1.5 * expected, "{distance} {expected}");
    }
}

/// Passes of one step, of tied layers or before one backward pass, round by noise of their own.
#[test]
fn passes_of_one_step_round_differently() {
    let device = Device::flex().autodiff();
    let linear = LinearConfig::new(64, 4).init(&device);
    let x = Random(51).matrix(8, 64).tensor(&device, DType::F32);
    let error = |passes: usize| {
        let layer = MemAopLinear::from_linear(
            linear.clone(),
            config(StoredInput::Int4, OuterProducts::Count(8)),
        );
        let exact = linear.forward(x.clone()).sum().backward();
        let exact = Matrix::from_tensor(linear.weight.grad(&exact).unwrap() * passes as f32);
        let sum = (0..passes)
            .map(|_| layer.forward(x.clone()).sum())
            .reduce(|a, b| a + b);
        let grads = sum.unwrap().backward();
        Matrix::from_tensor(layer.weight.grad(&grads).unwrap()).relative_error(&exact)
    };
    // Independent errors of 16 passes are a quarter of that of one; equal ones would be as large.
    let (one, many) = (error(1), error(16));
    assert!(one > 1e-3 && many < 0.5 * one, "{one} {many}");
}

#[test]
fn a_method_with_a_memory_takes_packed_inputs() {
    let device = Device::flex().autodiff();
    let aop = config(StoredInput::Int8, OuterProducts::Count(3))
        .with_method(Method::TopK(Memory::Balanced { decay: 0.9 }));
    let layer = MemAopLinear::from_linear(LinearConfig::new(8, 4).init(&device), aop);
    let grads = layer
        .forward(Tensor::<2>::ones([9, 8], &device))
        .sum()
        .backward();
    assert!(layer.weight.grad(&grads).is_some());
    assert_eq!(layer.memory_stats().rows, 9);
}
