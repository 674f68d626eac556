//! The rules of the memory: when it changes, who shares it, how many rows it has.

use burn::{
    module::Module,
    nn::LinearConfig,
    optim::{GradientsParams, SgdConfig},
    tensor::{DType, Device, Tensor},
};
use burn_memaop::{AopConfig, MemAopLinear, MemAopLinearConfig, Memory, OuterProducts, Policy};

use crate::{
    oracle::Oracle,
    support::{Matrix, Random, bits, published},
};

const N: usize = 6;
const P: usize = 4;
const K: usize = 3;

fn device() -> Device {
    Device::flex().autodiff()
}

fn aop() -> AopConfig {
    published().with_outer_products(OuterProducts::Count(K))
}

fn layer() -> MemAopLinear {
    MemAopLinearConfig::new(N, P)
        .with_aop(aop())
        .init(&device())
}

fn oracle() -> Oracle {
    Oracle::new(Policy::TopK, aop().memory, 0, N, P)
}

/// One backward pass with the upstream gradient `g`; the gradient of the weight.
fn step(layer: &MemAopLinear, x: &Matrix, g: &Matrix) -> Matrix {
    let output = layer.forward(x.tensor(&device(), DType::F32));
    let grads = (output * g.tensor(&device(), DType::F32)).sum().backward();
    Matrix::from_tensor(layer.weight.grad(&grads).unwrap())
}

fn batch(random: &mut Random, m: usize) -> (Matrix, Matrix) {
    (random.matrix(m, N), random.matrix(m, P))
}

fn assert_close(gradient: &Matrix, expected: &Matrix) {
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

    layer.reset_memory();
    let stats = layer.memory_stats();
    assert_eq!((stats.step, stats.rows, stats.pending), (0, 0, 0));
}

#[test]
fn without_a_memory_nothing_is_kept() {
    let mut random = Random(21);
    let layer = MemAopLinearConfig::new(N, P)
        .with_aop(aop().with_memory(Memory::None))
        .init(&device());
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
    assert_eq!(valid.memory_stats(), before, "the snapshot has it too");

    // Back in training, it goes on from the snapshot.
    let again = valid.train();
    let (x, g) = batch(&mut random, 10);
    assert_eq!(step(&again, &x, &g), step(&layer, &x, &g));
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
fn clones_train_apart() {
    let mut random = Random(26);
    let original = layer();
    let (x, g) = batch(&mut random, 10);
    step(&original, &x, &g);

    let clone = original.clone();
    let before = original.memory_stats();
    assert_eq!(clone.memory_stats(), before, "a clone starts from the same");
    let (x, g) = batch(&mut random, 10);
    let from_clone = step(&clone, &x, &g);
    step(&clone, &x, &g);
    assert_eq!(original.memory_stats(), before);
    assert_eq!(step(&original, &x, &g), from_clone);
    assert_eq!(clone.memory_stats().step, 3);
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

/// What burn-train's multi-device strategy does: each step, each worker forks a clone.
#[test]
fn forks_of_a_worker_find_the_memory_of_the_step_before() {
    let mut random = Random(28);
    let (model, mut oracle) = (layer(), oracle());
    for _ in 0..4 {
        let fork = model.clone().fork(&Device::flex());
        let (x, g) = batch(&mut random, 10);
        assert_close(&step(&fork, &x, &g), &oracle.step(&x, &g, K));
    }
    assert_eq!(
        model.memory_stats().step,
        0,
        "the model itself has not trained"
    );
}

#[test]
fn workers_on_one_device_do_not_disturb_each_other() {
    let model = layer();
    // Both live until both are done: a worker may take over from one that has ended.
    let barrier = std::sync::Arc::new(std::sync::Barrier::new(2));
    let workers: Vec<_> = (0..2)
        .map(|worker| {
            let (model, barrier) = (model.clone(), barrier.clone());
            std::thread::spawn(move || {
                let mut random = Random(30 + worker);
                let mut oracle = oracle();
                for _ in 0..20 {
                    let fork = model.clone().fork(&Device::flex());
                    let (x, g) = batch(&mut random, 10);
                    assert_close(&step(&fork, &x, &g), &oracle.step(&x, &g, K));
                }
                barrier.wait();
            })
        })
        .collect();
    for worker in workers {
        worker.join().unwrap();
    }
}

#[test]
fn forks_in_use_at_the_same_time_train_apart() {
    let mut random = Random(29);
    let model = layer();
    let (x, g) = batch(&mut random, 10);
    step(&model, &x, &g);
    let (first, second) = (
        model.clone().fork(&Device::flex()),
        model.clone().fork(&Device::flex()),
    );
    assert_eq!(first.memory_stats(), model.memory_stats());
    assert_eq!(second.memory_stats(), model.memory_stats());
    step(&first, &x, &g);
    assert_eq!(second.memory_stats(), model.memory_stats());

    // A fork of what has trained on since takes that along.
    drop((first, second));
    step(&model, &x, &g);
    step(&model, &x, &g);
    let fork = model.clone().fork(&Device::flex());
    assert_eq!(fork.memory_stats(), model.memory_stats());
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

    let device = Device::ndarray();
    let moved = layer.clone().fork(&device);
    let stats = moved.memory_stats();
    assert_eq!((stats.step, stats.rows, stats.pending), (1, 10, 10 - K));
    assert!((stats.input_norm - before.input_norm).abs() < 1e-6);

    let (x, g) = batch(&mut random, 10);
    let autodiff = device.autodiff();
    let output = moved.forward(x.tensor(&autodiff, DType::F32));
    let grads = (output * g.tensor(&autodiff, DType::F32)).sum().backward();
    let gradient = Matrix::from_tensor(moved.weight.grad(&grads).unwrap());
    assert_close(&gradient, &step(&layer, &x, &g));
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
        "MemAopLinear {d_input: 3, d_output: 5, bias: true, outer_products: Ratio { ratio: 0.25, \
         minimum: 1 }, policy: Systematic, memory: None, schedule: Constant { exact_steps: 0 }, \
         params: 20}"
    );
}

#[test]
fn column_layout_trains() {
    let mut random = Random(34);
    let layer = MemAopLinearConfig::new(N, P)
        .with_layout(burn::nn::LinearLayout::Col)
        .with_aop(aop())
        .init(&device());
    let mut oracle = oracle();
    for _ in 0..2 {
        let (x, g) = batch(&mut random, 9);
        assert_close(&step(&layer, &x, &g), &oracle.step(&x, &g, K));
    }
    let _: Tensor<2> = layer.into_linear().weight.val();
}
