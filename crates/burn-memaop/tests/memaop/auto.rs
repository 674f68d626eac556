//! K chosen by the layer itself.

use burn::{
    module::Module,
    nn::LinearConfig,
    store::ModuleRecord,
    tensor::{DType, Device, Tensor},
};
use burn_memaop::{
    AopConfig, AopObserver, MemAopLinear, Memory, Method, OuterProducts, op::parts::gradient_noise,
};

use crate::{
    oracle::inclusion_probabilities,
    support::{Matrix, Random, bits, linear},
};

const M: usize = 128;
const N: usize = 9;
const P: usize = 6;
/// Of alike rows nu is `1 / (M - 1)`, and `(1 + nu M / K) (1 + K / M)` smallest here (the input asks for no gradient).
const QUIET: usize = M / 8;

fn auto() -> AopConfig {
    AopConfig::new().with_cost_rule(false)
}

fn layer(aop: AopConfig, device: &Device) -> MemAopLinear {
    MemAopLinear::from_linear(LinearConfig::new(N, P).init(device), aop)
}

/// A batch whose rows share a direction, with noise of a given size about it: the signal grows with the rows, the
/// noise with their root.
fn batch(random: &mut Random, noise: f64) -> (Matrix, Matrix) {
    let mut matrix = |columns| {
        let mut matrix = Matrix::zeros(M, columns);
        let values = matrix.0.iter_mut().flatten();
        values.for_each(|value| *value = f64::from((1.0 + noise * random.value()) as f32));
        matrix
    };
    (matrix(N), matrix(P))
}

fn step(layer: &MemAopLinear, x: &Matrix, g: &Matrix, device: &Device) -> Tensor<2> {
    let output = layer.forward(x.tensor(device, DType::F32));
    let grads = (output * g.tensor(device, DType::F32)).sum().backward();
    layer.weight.grad(&grads).unwrap()
}

fn exact(x: &Matrix, g: &Matrix) -> Matrix {
    let mut exact = Matrix::zeros(N, P);
    for (x, g) in x.0.iter().zip(&g.0) {
        for a in 0..N {
            for b in 0..P {
                exact.0[a][b] += x[a] * g[b];
            }
        }
    }
    exact
}

/// K of some steps on batches of so much noise.
fn ks(layer: &MemAopLinear, noise: f64, steps: usize, device: &Device) -> Vec<usize> {
    let mut random = Random(61);
    let mut k = || {
        let (x, g) = batch(&mut random, noise);
        let gradient = Matrix::from_tensor(step(layer, &x, &g, device));
        let stats = layer.memory_stats();
        let error = gradient.relative_error(&exact(&x, &g));
        assert_eq!(error < 1e-5, stats.k == M, "K {}: {error:e}", stats.k);
        stats.k
    };
    (0..steps).map(|_| k()).collect()
}

pub fn k_falls_where_there_is_no_noise(device: &Device) {
    let layer = layer(auto(), device);
    // A measurement is read at the next, and takes K down by two at the most.
    let ks = ks(&layer, 0.01, 40, device);
    assert_eq!(ks[0], M);
    assert!(
        ks.windows(2).all(|k| k[1] == k[0] || 2 * k[1] == k[0]),
        "{ks:?}"
    );
    assert!(ks[15..].iter().all(|&k| k == QUIET), "{ks:?}");
}

/// A device whose copies to the host were given up would hand out memory that is still being copied to.
pub fn a_layer_may_go_while_a_measurement_is_on_its_way(device: &Device) {
    let (x, g) = batch(&mut Random(63), 0.01);
    for _ in 0..3 {
        let layer = layer(auto(), device);
        // Enough work for the copy to wait for.
        let before = Tensor::<2>::ones([512, 512], device);
        let before = before.clone().matmul(before);
        let gradient = step(&layer, &x, &g, device);
        let copied = layer.clone();
        drop((layer, copied, before));
        // As many values as a measurement has.
        for value in [1.0, 2.0] {
            let values = Tensor::<1>::full([8], value, device);
            assert_eq!(values.into_data().try_to_vec::<f32>().unwrap(), [value; 8]);
        }
        let error = Matrix::from_tensor(gradient).relative_error(&exact(&x, &g));
        assert!(error < 1e-5, "{error:e}");
    }
}

/// A batch that is noise alone, and nothing like those before.
#[test]
fn much_more_noise_takes_all_rows_at_once() {
    let device = Device::flex().autodiff();
    let layer = layer(auto(), &device);
    ks(&layer, 0.01, 300, &device);
    let mut ks = ks(&layer, 1e3, 60, &device);
    ks.dedup();
    assert_eq!(ks, [QUIET, M]);
}

/// A layer that is used several times in a step is measured at each use, whatever their number is.
#[test]
fn every_use_of_a_layer_is_measured() {
    let device = Device::flex().autodiff();
    for uses in [3, 11, 22, 33] {
        let layer = layer(auto(), &device);
        // Noise in the last use of each step alone. Measured like the others, it keeps K up.
        let mut random = Random(71);
        let mut measured = false;
        for number in 0..60 * uses {
            let noisy = number % uses == uses - 1;
            let (x, g) = batch(&mut random, if noisy { 1e3 } else { 0.01 });
            step(&layer, &x, &g, &device);
            measured |= number > 20 * uses && layer.memory_stats().k == M;
        }
        assert!(measured, "{uses}");
    }
}

#[test]
fn k_follows_the_noise() {
    let device = Device::flex().autodiff();
    let layer = layer(auto(), &device);
    for (noise, k) in [(0.01, QUIET), (1e3, M), (0.01, QUIET)] {
        let ks = ks(&layer, noise, 800, &device);
        assert_eq!(ks.last(), Some(&k), "{noise}");
    }
}

/// How often `c` grows in the search for the p of K rows.
fn rounds(sizes: &[f64], k: usize) -> usize {
    let (mut c, mut rounds) = (0.0, 0);
    loop {
        let is_certain = |size: &&f64| c * **size >= 1.0;
        let left = k as f64 - sizes.iter().filter(is_certain).count() as f64;
        let others: f64 = sizes.iter().filter(|size| !is_certain(size)).sum();
        let next = if left > 0.0 { left / others } else { c };
        if next <= c {
            return rounds;
        }
        (c, rounds) = (next, rounds + 1);
    }
}

/// The figures that a choice of K goes by, by their definitions.
pub fn the_noise_of_a_gradient_equals_the_oracle(device: &Device) {
    let mut random = Random(16);
    for (m, n, p) in [
        (1, 3, 2),
        (2, 5, 3),
        (65, 8, 12),
        (1000, 9, 4),
        (2048, 3, 2),
        (2049, 3, 2),
        (5000, 3, 8),
        (40_000, 2, 1),
    ] {
        for dtype in [DType::F32, DType::F64, DType::F16] {
            if !device.supports_dtype(dtype) {
                continue;
            }
            let tolerance = if dtype == DType::F16 { 2e-3 } else { 2e-5 };
            let [mut x, g, w] = [(m, n), (m, p), (n, p)]
                .map(|(rows, columns)| random.matrix(rows, columns).rounded(dtype));
            // Of which some become certain after the others, again and again.
            let is_steep = m == 5000 && dtype != DType::F16;
            if is_steep {
                for (row, values) in x.0.iter_mut().enumerate() {
                    let size = (-(row as f64).sqrt()).exp();
                    values.iter_mut().for_each(|value| *value *= size);
                }
                x = x.rounded(dtype);
            }
            if m > 2 {
                x.0[1] = vec![0.0; n];
            }
            let ks = [
                m,
                m.div_ceil(2),
                m.div_ceil(3),
                m.div_ceil(8),
                m.div_ceil(32),
                1,
            ];
            let figures = |g: &Matrix| -> Vec<f64> {
                let tensors = [&x, g, &w].map(|matrix| matrix.tensor(device, dtype));
                let [input, grad, gradient] = tensors;
                let found = gradient_noise(input, grad, gradient, ks);
                found.into_data().iter::<f64>().collect()
            };
            let found = figures(&g);
            // A batch that is broken has no noise.
            let mut broken = g.clone();
            broken.0[m / 2][0] = f64::NAN;
            assert!(
                figures(&broken)[1..]
                    .iter()
                    .all(|figure| !figure.is_finite())
            );

            let square = |row: &[f64]| row.iter().map(|value| value * value).sum::<f64>();
            let sizes = (0..m).map(|row| (square(&x.0[row]) * square(&g.0[row])).sqrt());
            let sizes: Vec<_> = sizes.collect();
            if is_steep {
                let rounds = ks[1..].iter().filter(|&&k| rounds(&sizes, k) > 9);
                assert!(
                    rounds.count() >= 3,
                    "more than the launches of a search on GPUs"
                );
            }
            let mut expected = vec![square(&w.0.concat()), square(&sizes)];
            expected.extend(ks.map(|k| {
                let p = inclusion_probabilities(&sizes, k);
                let rows = (0..m).filter(|&row| k < m && p[row] > 0.0);
                rows.map(|row| (1.0 / p[row] - 1.0) * sizes[row] * sizes[row])
                    .sum::<f64>()
            }));
            assert_eq!(found.len(), expected.len());
            for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let expected = expected.sqrt();
                let error = (found - expected).abs();
                // A variance is a difference of terms of the size of S.
                let scale = expected.max(1e-2 * square(&sizes).sqrt());
                assert!(
                    error <= tolerance * scale,
                    "{dtype:?} {m} {index}: {found} {expected}"
                );
            }
        }
    }
}

#[test]
fn rows_of_a_batch_that_are_noise_alone_are_all_taken() {
    let device = Device::flex().autodiff();
    let layer = layer(auto(), &device);
    let mut random = Random(62);
    for _ in 0..200 {
        let (x, g) = batch(&mut random, 1e3);
        step(&layer, &x, &g, &device);
        assert_eq!(layer.memory_stats().k, M);
    }
}

/// Wherever it is stopped: before the first choice, with a measurement that waits to be read, after a choice.
#[test]
fn a_training_goes_on_with_the_k_that_it_had() {
    let device = Device::flex().autodiff();
    let train = |layer: &MemAopLinear, range: std::ops::Range<u64>| -> Vec<[Vec<u32>; 2]> {
        let gradients = |number| {
            // Noise that rises, so that K changes.
            let noise = 0.02 * 1.05f64.powi(number as i32);
            let (x, g) = batch(&mut Random(70 + number), noise);
            step_with_input(layer, &x, &g, &device).map(bits)
        };
        range.map(gradients).collect()
    };
    let linear = LinearConfig::new(N, P).init(&device);
    for input_gradient in [OuterProducts::All, OuterProducts::Auto] {
        let aop = auto()
            .with_input_gradient(input_gradient)
            .with_saved_state(true);
        let new = || MemAopLinear::from_linear(linear.clone(), aop);
        let steps = 240;
        let whole = new();
        let mut expected = train(&whole, 0..60);
        assert!(whole.memory_stats().k < M, "K stayed");
        expected.extend(train(&whole, 60..steps));
        for stop in [1, 30, 75, 130, 239] {
            let first = new();
            train(&first, 0..stop);
            let bytes = first.into_record().into_bytes().unwrap();
            let second = new().load_record(ModuleRecord::from_bytes(bytes).unwrap());
            let found = train(&second, stop..steps);
            let same = found[..] == expected[stop as usize..];
            assert!(same, "{input_gradient:?} stopped at {stop}");
        }
    }
}

/// The gradients of the input and of the weight.
fn step_with_input(
    layer: &MemAopLinear,
    x: &Matrix,
    g: &Matrix,
    device: &Device,
) -> [Tensor<2>; 2] {
    let input = x.tensor(device, DType::F32).require_grad();
    let output = layer.forward(input.clone());
    let grads = (output * g.tensor(device, DType::F32)).sum().backward();
    [
        input.grad(&grads).unwrap(),
        layer.weight.grad(&grads).unwrap(),
    ]
}

/// Rows of `dX` too, where there is no noise, whether K is chosen or not; with other methods all of them.
pub fn the_rows_of_the_gradient_of_the_input_are_chosen(device: &Device) {
    let chosen = auto().with_input_gradient(OuterProducts::Auto);
    let top = Method::TopK(Memory::Balanced { decay: 0.9 });
    for (aop, falls) in [
        (chosen, true),
        (chosen.with_outer_products(OuterProducts::Count(M)), true),
        (chosen.with_method(top), false),
    ] {
        let layer = layer(aop, device);
        let weight = Matrix::from_tensor(layer.weight.val().inner());
        let observer = AopObserver::new();
        observer.observe(&layer);
        let mut random = Random(65);
        for number in 0..25 {
            let (x, g) = batch(&mut random, 0.01);
            let [of_input, _] = step_with_input(&layer, &x, &g, device);
            let rows = observer.observe(&layer).layers[0].input_rows.unwrap();
            assert!(rows == M || falls && number > 0, "{aop:?} {number}: {rows}");
            assert!(
                rows < M || !falls || number < 15,
                "{aop:?} {number}: {rows}"
            );

            // The rows are alike, and so are their weights.
            let of_input = Matrix::from_tensor(of_input);
            let mut taken = 0;
            for (found, g) in of_input.0.iter().zip(&g.0) {
                if found.iter().all(|&value| value == 0.0) {
                    continue;
                }
                taken += 1;
                for (found, weight) in found.iter().zip(&weight.0) {
                    let exact: f64 = g.iter().zip(weight).map(|(g, w)| g * w).sum();
                    let size: f64 = g.iter().zip(weight).map(|(g, w)| (g * w).abs()).sum();
                    let expected = M as f64 / rows as f64 * exact;
                    let most = 0.05 * M as f64 / rows as f64 * size;
                    assert!((found - expected).abs() < most, "{found} {expected}");
                }
            }
            assert_eq!(taken, rows, "{aop:?} {number}");
        }
    }
}

/// The rows of `dX` of some steps without noise.
fn input_rows(layer: &MemAopLinear, steps: usize, device: &Device) -> Vec<usize> {
    let observer = AopObserver::new();
    observer.observe(layer);
    let mut random = Random(67);
    let rows = (0..steps).map(|_| {
        let (x, g) = batch(&mut random, 0.01);
        step_with_input(layer, &x, &g, device);
        observer.observe(layer).layers[0].input_rows.unwrap()
    });
    rows.collect()
}

#[test]
fn all_rows_of_the_gradient_of_the_input_are_taken_in_exact_steps() {
    let device = Device::flex().autodiff();
    let aop = auto()
        .with_input_gradient(OuterProducts::Auto)
        .with_exact_steps(40);
    let rows = input_rows(&layer(aop, &device), 60, &device);
    assert!(rows[..40].iter().all(|&rows| rows == M), "{rows:?}");
    assert!(rows[40..].iter().all(|&rows| rows < M), "{rows:?}");
}

/// K stays where only the rows of `dX` are to be found in another way, and the other way about.
#[test]
fn a_change_of_one_choice_leaves_the_other() {
    let device = Device::flex().autodiff();
    let chosen = auto().with_input_gradient(OuterProducts::Auto);
    let layer = layer(chosen, &device);
    let few = *input_rows(&layer, 30, &device).last().unwrap();
    let k = layer.memory_stats().k;
    assert!(few < M && k < M);
    let layer = layer.with_aop(chosen.with_outer_products(OuterProducts::Count(M)));
    assert_eq!(input_rows(&layer, 1, &device), [few]);
    let layer = layer.with_aop(chosen.with_input_gradient(OuterProducts::All));
    assert_eq!(input_rows(&layer, 1, &device), [M]);
    input_rows(&layer, 30, &device);
    let k = layer.memory_stats().k;
    let layer = layer.with_aop(chosen);
    assert_eq!(input_rows(&layer, 1, &device), [M]);
    assert_eq!(layer.memory_stats().k, k);
}

/// Two layers that choose, one above the other: on average the gradients are exact.
#[test]
fn stacked_choices_are_unbiased() {
    let device = Device::flex().autodiff();
    let mut random = Random(69);
    let linears = [
        linear(&mut random, N, 12, &device),
        linear(&mut random, 12, P, &device),
    ];
    let (x, g) = batch(&mut Random(68), 0.3);
    let gradient = |layers: &[MemAopLinear; 2]| {
        let [first, second] = layers;
        let input = x.tensor(&device, DType::F32).require_grad();
        let output = second.forward(first.forward(input));
        let grads = (output * g.tensor(&device, DType::F32)).sum().backward();
        Matrix::from_tensor(first.weight.grad(&grads).unwrap())
    };
    let of = |aop: AopConfig| {
        linears
            .clone()
            .map(|linear| MemAopLinear::from_linear(linear, aop))
    };
    let all = auto().with_outer_products(OuterProducts::Count(M));
    let exact = gradient(&of(all));
    let chosen = of(auto().with_input_gradient(OuterProducts::Auto));
    let (mut sum, mut variance, steps) = (Matrix::zeros(N, 12), 0.0, 2000);
    for number in 0..steps + 60 {
        let found = gradient(&chosen);
        if number < 60 {
            continue;
        }
        variance += found.relative_error(&exact).powi(2);
        let values = sum.0.iter_mut().flatten().zip(found.0.concat());
        values.for_each(|(sum, value)| *sum += value / steps as f64);
    }
    // The distance of the mean, in units of its standard error.
    let distance = sum.relative_error(&exact) / (variance / steps as f64 / steps as f64).sqrt();
    assert!(variance > 0.0 && distance < 2.0, "{distance} {variance}");
}

#[test]
fn rows_of_the_gradient_of_the_input_stay_where_there_is_noise_alone() {
    let device = Device::flex().autodiff();
    let layer = layer(auto().with_input_gradient(OuterProducts::Auto), &device);
    let observer = AopObserver::new();
    observer.observe(&layer);
    let mut random = Random(66);
    for _ in 0..100 {
        let (x, g) = batch(&mut random, 1e3);
        step_with_input(&layer, &x, &g, &device);
        assert_eq!(observer.observe(&layer).layers[0].input_rows, Some(M));
    }
}

#[test]
fn the_observer_tells_the_noise() {
    let device = Device::flex().autodiff();
    let layer = layer(auto(), &device);
    let observer = AopObserver::new();
    let noise = |noise| {
        ks(&layer, noise, 800, &device);
        observer.observe(&layer).layers[0].noise
    };
    let (quiet, noisy) = (noise(0.01).unwrap(), noise(100.0).unwrap());
    // Equal rows: S is M s^2 and F is M^2 s^2. Systematic sampling of such rows varies less than V says.
    assert!((quiet * (M as f64 - 1.0) - 1.0).abs() < 0.07, "{quiet}");
    assert!(noisy > 1.0, "{noisy}");

    let fixed = MemAopLinear::from_linear(
        LinearConfig::new(N, P).init(&device),
        auto().with_outer_products(OuterProducts::Count(8)),
    );
    observer.observe(&fixed);
    let (x, g) = batch(&mut Random(63), 1.0);
    step(&fixed, &x, &g, &device);
    assert_eq!(observer.observe(&fixed).layers[0].noise, None);
}

/// Another way to find K begins anew; another seed does not.
#[test]
fn a_change_of_the_configuration_forgets_the_choice() {
    let device = Device::flex().autodiff();
    let half = OuterProducts::Ratio(0.5);
    let layer = layer(auto(), &device);
    ks(&layer, 0.01, 30, &device);
    let layer = layer.with_aop(auto().with_seed(3));
    assert_eq!(ks(&layer, 0.01, 1, &device), [QUIET]);
    let layer = layer.with_aop(auto().with_outer_products(half));
    assert_eq!(ks(&layer, 0.01, 1, &device), [M / 2]);
    let layer = layer.with_aop(auto());
    assert_eq!(ks(&layer, 0.01, 1, &device), [M]);
}

/// Batches that grow and shrink, to one row and none.
#[test]
fn k_is_a_share_of_any_batch() {
    let device = Device::flex().autodiff();
    let layer = layer(auto(), &device);
    ks(&layer, 0.01, 30, &device);
    let mut random = Random(64);
    for (rows, k) in [(1024, 128), (64, 8), (33, 4), (5, 1)] {
        let (x, g) = (random.matrix(rows, N), random.matrix(rows, P));
        step(&layer, &x, &g, &device);
        assert_eq!(layer.memory_stats().k, k);
    }
    for rows in [1, 0] {
        let x = Tensor::<2>::ones([rows, N], &device);
        let grads = layer.forward(x).sum().backward();
        let gradient = Matrix::from_tensor(layer.weight.grad(&grads).unwrap());
        assert!(
            gradient
                .0
                .iter()
                .flatten()
                .all(|&value| value == rows as f64)
        );
    }
}
