//! The rules of the memory: when it changes, who shares it, how many rows it has.

use burn::{
    module::{Module, Param},
    nn::{Linear, LinearConfig},
    optim::{GradientsParams, SgdConfig},
    tensor::{DType, Device, Tensor},
};
use burn_memaop::{
    AopConfig, AopObserver, MemAopLinear, MemAopLinearConfig, Memory, Method, OuterProducts,
    baseline::Baseline, reset, with_aop,
};

use crate::{
    oracle::{Oracle, Policy},
    support::{Matrix, Random, bits, published},
};

pub const N: usize = 6;
const P: usize = 4;
pub const K: usize = 3;

pub fn device() -> Device {
    Device::flex().autodiff()
}

fn aop() -> AopConfig {
    published().with_outer_products(OuterProducts::Count(K))
}

pub fn layer() -> MemAopLinear {
    MemAopLinearConfig::new(N, P)
        .init(&device())
        .with_aop(aop())
}

pub fn oracle() -> Oracle {
    Oracle::new(Policy::TopK, aop().method.memory(), 0, N, P)
}

/// One backward pass with the upstream gradient `g`; the gradient of the weight.
pub fn step(layer: &MemAopLinear, x: &Matrix, g: &Matrix) -> Matrix {
    let output = layer.forward(x.tensor(&device(), DType::F32));
    let grads = (output * g.tensor(&device(), DType::F32)).sum().backward();
    Matrix::from_tensor(layer.weight.grad(&grads).unwrap())
}

pub fn batch(random: &mut Random, m: usize) -> (Matrix, Matrix) {
    (random.matrix(m, N), random.matrix(m, P))
}

pub fn assert_close(gradient: &Matrix, expected: &Matrix) {
    let error = gradient.relative_error(expected);
    assert!(error < 1e-5, "{error:e}");
}

#[test]
fn stats_describe_the_memory() {
    let mut random = Random(20);
    let (layer, mut oracle) = (layer(), oracle());
    assert_eq!(layer.memory_stats().rows, 0);
    let (x, g) = batch(&mut random, 10);
    step(&layer, &x, &g);
    oracle.step(&x, &g, K);

    let stats = layer.memory_stats();
    let norm = |matrix: &Matrix| matrix.relative_error(&Matrix::zeros(10, matrix.columns()));
    assert_eq!((stats.step, stats.rows, stats.pending), (1, 10, 10 - K));
    assert_eq!(stats.oldest, 1);
    assert!((stats.input_norm - norm(&oracle.input)).abs() < 1e-5);
    assert!((stats.grad_norm - norm(&oracle.grad)).abs() < 1e-5);

    let stats = reset(layer).memory_stats();
    assert_eq!((stats.step, stats.rows, stats.pending), (0, 0, 0));
}

#[test]
fn without_a_memory_nothing_is_kept() {
    let mut random = Random(21);
    let layer = MemAopLinearConfig::new(N, P)
        .init(&device())
        .with_aop(aop().with_method(Method::TopK(Memory::None)));
    let (x, g) = batch(&mut random, 10);
    step(&layer, &x, &g);
    let stats = layer.memory_stats();
    assert_eq!((stats.step, stats.rows), (1, 0));
}

#[test]
fn smaller_and_larger_batches_keep_and_grow_the_rows() {
    let mut random = Random(22);
    let (layer, mut oracle) = (layer(), oracle());
    for m in [10, 6, 10, 17, 4, 17] {
        let (x, g) = batch(&mut random, m);
        assert_close(&step(&layer, &x, &g), &oracle.step(&x, &g, K));
    }
    assert_eq!(layer.memory_stats().rows, 17);

    // A batch of at most K rows is exact and leaves the memory alone.
    let before = layer.memory_stats();
    let (x, g) = batch(&mut random, K);
    step(&layer, &x, &g);
    assert_eq!(layer.memory_stats(), before);
}

#[test]
fn inference_and_valid_leave_the_memory_alone() {
    let mut random = Random(23);
    let layer = layer();
    let (x, g) = batch(&mut random, 10);
    step(&layer, &x, &g);
    let before = layer.memory_stats();

    let _forward_alone = layer.forward(x.tensor(&device(), DType::F32));
    let valid = layer.valid();
    let _inference = valid.forward(x.tensor(&Device::flex(), DType::F32));
    assert_eq!(layer.memory_stats(), before);

    // Back in training, it goes on with the same.
    let again = valid.train();
    let (x, g) = batch(&mut random, 10);
    step(&again, &x, &g);
    assert_eq!(layer.memory_stats().step, 2);
}

#[test]
fn two_layers_share_nothing() {
    let mut random = Random(24);
    let (first, second) = (layer(), layer());
    let (x, g) = batch(&mut random, 10);
    step(&first, &x, &g);
    assert_eq!(first.memory_stats().step, 1);
    assert_eq!(second.memory_stats().step, 0);
}

#[test]
fn a_layer_used_twice_folds_in_twice() {
    let mut random = Random(25);
    let (layer, mut oracle) = (layer(), oracle());
    for round in 1..=3 {
        let (x1, g1) = batch(&mut random, 8);
        let (x2, g2) = batch(&mut random, 8);
        let tensor = |matrix: &Matrix| matrix.tensor(&device(), DType::F32);
        // The second use depends on the first, so the backward pass takes it first.
        let first = layer.forward(tensor(&x1));
        let second = layer.forward(tensor(&x2) + first.clone().sum().unsqueeze() * 0.0);
        let loss = (first * tensor(&g1)).sum() + (second * tensor(&g2)).sum();
        let grads = loss.backward();
        let gradient = Matrix::from_tensor(layer.weight.grad(&grads).unwrap());

        let last = oracle.step(&x2, &g2, K);
        let mut expected = oracle.step(&x1, &g1, K);
        for (row, other) in expected.0.iter_mut().zip(&last.0) {
            for (value, other) in row.iter_mut().zip(other) {
                *value += other;
            }
        }
        assert_close(&gradient, &expected);
        assert_eq!(layer.memory_stats().step, 2 * round);
    }
}

#[test]
fn an_optimizer_step_keeps_the_memory() {
    let mut random = Random(27);
    let (mut moved, mut cloned) = (layer(), None);
    let mut optimizer = SgdConfig::new().init();
    let mut oracle = oracle();
    for _ in 0..4 {
        let (x, g) = batch(&mut random, 10);
        // The way of burn-train: the optimizer takes a clone, which replaces the layer.
        let current: &MemAopLinear = cloned.as_ref().unwrap_or(&moved);
        let output = current.forward(x.tensor(&device(), DType::F32));
        let grads = (output * g.tensor(&device(), DType::F32)).sum().backward();
        let gradient = Matrix::from_tensor(current.weight.grad(&grads).unwrap());
        assert_close(&gradient, &oracle.step(&x, &g, K));
        let grads = GradientsParams::from_grads(grads, current);
        let next = optimizer.step(0.01, current.clone(), grads);
        if cloned.is_none() {
            moved = layer();
        }
        cloned = Some(next);
    }
    assert_eq!(moved.memory_stats().step, 0);
    assert_eq!(cloned.unwrap().memory_stats().step, 4);
}

/// The memory of a layer whose weight has been exchanged for one of other widths does not fit it.
#[test]
fn a_memory_of_other_widths_is_dropped() {
    let mut random = Random(48);
    let mut layer = layer();
    let (x, g) = batch(&mut random, 10);
    step(&layer, &x, &g);
    for outputs in [P - 1, P + 2] {
        let smaller = LinearConfig::new(N, outputs).init(&device());
        layer.weight = smaller.weight;
        layer.bias = smaller.bias;
        let mut oracle = Oracle::new(Policy::TopK, aop().method.memory(), 0, N, outputs);
        let (x, g) = (random.matrix(10, N), random.matrix(10, outputs));
        assert_close(&step(&layer, &x, &g), &oracle.step(&x, &g, K));
    }
}

#[test]
fn moving_takes_the_memory_along() {
    let mut random = Random(31);
    let layer = layer();
    let (x, g) = batch(&mut random, 10);
    step(&layer, &x, &g);
    let before = layer.memory_stats();
    assert_eq!(layer.to_device(&Device::flex()).memory_stats(), before);
}

#[cfg(feature = "ndarray")]
#[test]
#[allow(deprecated)]
fn the_memory_moves_between_backends() {
    let mut random = Random(32);
    let layer = layer();
    let (x, g) = batch(&mut random, 10);
    step(&layer, &x, &g);
    let before = layer.memory_stats();
    let expected = {
        let (x, g) = batch(&mut Random(33), 10);
        step(&with_aop(layer.clone(), |_, aop| aop), &x, &g)
    };

    let device = Device::ndarray();
    let moved = layer.valid().to_device(&device).train();
    let stats = moved.memory_stats();
    assert_eq!((stats.step, stats.rows, stats.pending), (1, 10, 10 - K));
    assert!((stats.input_norm - before.input_norm).abs() < 1e-6);

    let (x, g) = batch(&mut Random(33), 10);
    let autodiff = device.autodiff();
    let output = moved.forward(x.tensor(&autodiff, DType::F32));
    let grads = (output * g.tensor(&autodiff, DType::F32)).sum().backward();
    let gradient = Matrix::from_tensor(moved.weight.grad(&grads).unwrap());
    assert_close(&gradient, &expected);
    // Rows that have been applied on one device are not applied again on the other.
    assert_eq!(moved.memory_stats().step, 2);
    assert_eq!(
        (layer.memory_stats().step, layer.memory_stats().rows),
        (1, 0)
    );
}

#[test]
fn a_linear_layer_goes_in_and_comes_out() {
    let linear = LinearConfig::new(N, P).init(&device());
    let (weight, ids) = (
        bits(linear.weight.val()),
        (linear.weight.id, linear.bias.as_ref().unwrap().id),
    );
    let layer = MemAopLinear::from_linear(linear, aop());
    let back = layer.into_linear();
    assert_eq!(bits(back.weight.val()), weight);
    assert_eq!((back.weight.id, back.bias.as_ref().unwrap().id), ids);
}

#[test]
fn the_memory_is_no_parameter() {
    let mut random = Random(33);
    let layer = layer();
    let count = layer.num_params();
    assert_eq!(count, N * P + P);
    let (x, g) = batch(&mut random, 10);
    step(&layer, &x, &g);
    assert_eq!(layer.num_params(), count);
}

#[test]
fn display_names_the_settings() {
    let layer = MemAopLinearConfig::new(3, 5).init(&Device::flex());
    assert_eq!(
        format!("{layer}"),
        "MemAopLinear {d_input: 3, d_output: 5, bias: true, outer_products: Auto, method: Systematic, exact_steps: 0, \
         stored_input: Full, params: 20}"
    );
}

#[test]
fn column_layout_trains() {
    let mut random = Random(34);
    let layer = MemAopLinearConfig::new(N, P)
        .with_layout(burn::nn::LinearLayout::Col)
        .init(&device())
        .with_aop(aop());
    let mut oracle = oracle();
    for _ in 0..2 {
        let (x, g) = batch(&mut random, 9);
        assert_close(&step(&layer, &x, &g), &oracle.step(&x, &g, K));
    }
    let _: Tensor<2> = layer.into_linear().weight.val();
}

/// Widths are those of the weight, however it is stored.
#[test]
fn column_layout_has_its_widths_in_order() {
    let config = MemAopLinearConfig::new(N, P).with_layout(burn::nn::LinearLayout::Col);
    let new = || config.init(&device()).with_aop(aop());
    assert!(format!("{}", new()).contains("d_input: 6, d_output: 4"));

    let layer = new();
    let observer = AopObserver::new();
    observer.observe(&layer);
    let mut random = Random(39);
    let (x, g) = batch(&mut random, 10);
    step(&layer, &x, &g);
    let report = &observer.observe(&layer).layers[0];
    assert_eq!((report.d_input, report.d_output), (N, P));

    let record = layer.clone().into_record();
    let loaded = new().load_record(record);
    assert_eq!(loaded.memory_stats(), layer.memory_stats());
    let (x, g) = batch(&mut random, 10);
    assert_eq!(step(&loaded, &x, &g), step(&layer, &x, &g));
}

#[test]
fn another_configuration_keeps_the_memory() {
    let mut random = Random(40);
    let (mut layer, mut oracle) = (layer(), oracle());
    for k in [K, 5, 2] {
        layer = layer.with_aop(aop().with_outer_products(OuterProducts::Count(k)));
        let (x, g) = batch(&mut random, 10);
        assert_close(&step(&layer, &x, &g), &oracle.step(&x, &g, k));
    }
    let kept = layer.memory_stats();
    let random = Method::Baseline(Baseline::RandK(aop().method.memory()));
    let layer = layer.with_aop(aop().with_method(random));
    assert_eq!(layer.memory_stats(), kept);
    let layer = layer.with_aop(aop().with_method(Method::TopK(Memory::None)));
    assert_eq!(
        (layer.memory_stats().step, layer.memory_stats().rows),
        (3, 0)
    );
}

#[derive(Module, Debug)]
struct Pair {
    first: MemAopLinear,
    other: Vec<MemAopLinear>,
}

#[test]
fn a_whole_model_is_configured_in_one_call() {
    let mut random = Random(41);
    let model = Pair {
        first: layer(),
        other: vec![layer(), layer()],
    };
    let (x, g) = batch(&mut random, 10);
    step(&model.other[1], &x, &g);
    let before = model.other[1].memory_stats();

    let mut names = Vec::new();
    let model = with_aop(model, |name, aop| {
        names.push(name.to_string());
        match name {
            "first" => aop,
            _ => aop.with_outer_products(OuterProducts::Count(names.len())),
        }
    });
    assert_eq!(names, ["first", "other.0", "other.1"]);
    assert_eq!(model.first.aop(), aop());
    let count = |layer: &MemAopLinear| layer.aop().outer_products.k(10).unwrap();
    assert_eq!((count(&model.other[0]), count(&model.other[1])), (2, 3));
    assert_eq!(model.other[1].memory_stats(), before);
}

#[test]
#[should_panic(expected = "AopConfig.outer_products: the count must be at least 1, but got 0")]
fn a_bad_configuration_for_a_model_is_named() {
    with_aop(layer(), |_, aop| {
        aop.with_outer_products(OuterProducts::Count(0))
    });
}

/// Where one layer's draw decides which rows of the gradient the other sees, the draws must not go by the
/// same numbers. With equal seeds, the default.
#[test]
fn stacked_samples_are_unbiased() {
    let (m, draws) = (16, 16_000u64);
    let sampled = |ratio| OuterProducts::Ratio(ratio);
    let config = |ratio: f64, outer: f64| {
        AopConfig::new()
            .with_outer_products(OuterProducts::Ratio(outer))
            .with_input_gradient(sampled(ratio))
            .with_cost_rule(false)
    };
    let device = device();
    let mut random = Random(42);
    let mut make = |n, p| Linear {
        weight: Param::from_tensor(random.matrix(n, p).tensor(&device, DType::F32)),
        bias: None,
    };
    let linears = [make(4, 5), make(5, 3)];
    let lower = MemAopLinear::from_linear(linears[0].clone(), config(0.125, 0.25));
    let upper = MemAopLinear::from_linear(linears[1].clone(), config(0.5, 0.5));
    let (x, g) = (random.matrix(m, 4), random.matrix(m, 3));
    let (x, g) = (x.tensor(&device, DType::F32), g.tensor(&device, DType::F32));
    // The gradients of the lowest input and of the lower weight.
    let gradients = |output: &dyn Fn(Tensor<2>) -> Tensor<2>, weight: &Param<Tensor<2>>| {
        let input = x.clone().require_grad();
        let grads = (output(input.clone()) * g.clone()).sum().backward();
        let values = |tensor: Tensor<2>| Matrix::from_tensor(tensor).0.concat();
        [
            values(input.grad(&grads).unwrap()),
            values(weight.grad(&grads).unwrap()),
        ]
    };
    let exact = gradients(
        &|x| linears[1].forward(linears[0].forward(x)),
        &linears[0].weight,
    );
    let mut sums = exact.clone().map(|values| vec![0.0; values.len()]);
    let mut squares = [0.0, 0.0];
    for _ in 0..draws {
        let drawn = gradients(&|x| upper.forward(lower.forward(x)), &lower.weight);
        for (index, drawn) in drawn.iter().enumerate() {
            for (value, (sum, exact)) in drawn.iter().zip(sums[index].iter_mut().zip(&exact[index]))
            {
                *sum += value - exact;
                squares[index] += (value - exact).powi(2);
            }
        }
    }
    for (sums, squares) in sums.iter().zip(squares) {
        // The squared distance of the mean in units of its expectation; with one stream of numbers for both
        // layers that of the input is 31. Below 10 in all but 2 of 1000 cases even if all values move as one.
        let distance = sums.iter().map(|sum| sum * sum).sum::<f64>() / squares;
        assert!(distance < 10.0, "{distance}");
    }
}
