//! Values that are no numbers, and values whose squares are none: on every backend, in linear layers and convolutions,
//! with inputs as they are and in few bits.

use burn::{
    module::Param,
    nn::{Linear, conv::Conv2d},
    tensor::{DType, Device, Tensor},
};
use burn_memaop::{
    AopConfig, MemAopConv2d, MemAopLinear, Memory, OuterProducts, StoredInput,
    op::{AopStep, Rows, parts::input_gradient, weight_gradient},
};

use crate::{
    images::{Images, Sizes},
    oracle::Policy,
    support::{Matrix, Random, count, linear},
};

const INPUTS: usize = 5;
const OUTPUTS: usize = 3;

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.into_data().iter::<f64>().collect()
}

/// The gradients of weight and input.
fn backward(layer: &MemAopLinear, x: Tensor<2>, g: Tensor<2>) -> [Vec<f64>; 2] {
    let x = x.require_grad();
    let grads = (layer.forward(x.clone()) * g).sum().backward();
    let weight = layer.weight.val().grad(&grads).unwrap();
    [values(weight), values(x.grad(&grads).unwrap())]
}

fn exact(linear: &Linear, x: Tensor<2>, g: Tensor<2>) -> [Vec<f64>; 2] {
    backward(
        &MemAopLinear::from_linear(linear.clone(), count(1 << 20)),
        x,
        g,
    )
}

/// Whether the first is not finite wherever the second is not.
fn covers(found: &[f64], exact: &[f64]) -> bool {
    let mut pairs = found.iter().zip(exact);
    pairs.all(|(found, exact)| exact.is_finite() || !found.is_finite())
}

/// Whoever scales the loss, or skips a step, looks for them. The step leaves the memory as it was.
pub fn broken_values_are_in_the_gradients(device: &Device) {
    let mut random = Random(92);
    let linear = linear(&mut random, INPUTS, OUTPUTS, device);
    let balanced = Memory::Balanced { decay: 0.9 };
    let methods = [
        (Policy::Systematic, Memory::None),
        (Policy::TopK, Memory::None),
        (Policy::TopK, balanced),
        (Policy::RandK, Memory::Published { decay: 1.0 }),
        (Policy::WeightedK, Memory::None),
        (Policy::ScaledRandK, Memory::None),
        (Policy::Bernoulli, Memory::None),
        (Policy::WinnerTakeAll, Memory::None),
    ];
    for (policy, memory) in methods {
        for (m, k) in [(40, 1), (40, 7), (2500, 300)] {
            let aop = count(k)
                .with_method(policy.method(memory))
                .with_input_gradient(OuterProducts::Ratio(0.25));
            let (x, g) = (random.matrix(m, INPUTS), random.matrix(m, OUTPUTS));
            for stored in [StoredInput::Full, StoredInput::Int8] {
                let layer =
                    MemAopLinear::from_linear(linear.clone(), aop.with_stored_input(stored));
                let tensor = |matrix: &Matrix| matrix.tensor(device, DType::F32);
                backward(&layer, tensor(&x), tensor(&g));
                let before = layer.memory_stats();
                for (in_input, value) in [
                    (true, f64::NAN),
                    (false, f64::NAN),
                    (true, f64::INFINITY),
                    (false, f64::NEG_INFINITY),
                ] {
                    let (mut x, mut g) = (x.clone(), g.clone());
                    match in_input {
                        true => x.0[m / 3][1] = value,
                        false => g.0[m / 3][1] = value,
                    }
                    let found = backward(&layer, tensor(&x), tensor(&g));
                    let expected = exact(&linear, tensor(&x), tensor(&g));
                    let context = format!("{policy:?} {memory:?} {m} {k} {stored:?} {value}");
                    assert!(!expected[0].iter().all(|value| value.is_finite()));
                    assert!(covers(&found[0], &expected[0]), "weight: {context}");
                    assert!(covers(&found[1], &expected[1]), "input: {context}");
                }
                let after = layer.memory_stats();
                assert_eq!(after.step, before.step + 4);
                assert_eq!((after.rows, after.pending), (before.rows, before.pending));
                assert_eq!(
                    (after.input_norm, after.grad_norm, after.oldest),
                    (before.input_norm, before.grad_norm, before.oldest),
                    "{policy:?} {memory:?} {m} {k} {stored:?}"
                );
                // The next step is as sound as any.
                let [weight, _] = backward(&layer, tensor(&x), tensor(&g));
                assert!(weight.iter().all(|value| value.is_finite()));
            }
        }
    }
    let sizes = sizes(3, [6, 7], [3, 3]);
    for stored in [StoredInput::Full, StoredInput::Int8] {
        let (conv, [x, g]) = (
            conv(&sizes, &mut random, device),
            batch(&sizes, &mut random),
        );
        for in_input in [true, false] {
            let (mut x, mut g) = (x.clone(), g.clone());
            match in_input {
                true => x.values[17] = f64::NAN,
                false => g.values[17] = f64::INFINITY,
            }
            let aop = count(9).with_stored_input(stored);
            let found = convolve(conv.clone(), aop, [&x, &g], device, DType::F32);
            let expected = convolve(conv.clone(), count(1 << 20), [&x, &g], device, DType::F32);
            assert!(covers(&found, &expected), "{stored:?} {in_input}");
        }
    }
}

/// Their squares underflow, or overflow, in single precision.
pub fn tiny_rows_count_as_others_do(device: &Device) {
    let mut random = Random(93);
    let linear = linear(&mut random, INPUTS, OUTPUTS, device);
    let (x, g) = (random.matrix(64, INPUTS), random.matrix(64, OUTPUTS));
    let sizes = sizes(3, [6, 7], [3, 3]);
    let conv = conv(&sizes, &mut random, device);
    let [images, of_images] = batch(&sizes, &mut random);
    // Powers of two change no other bit.
    for scale in [2f64.powi(-83), 2f64.powi(70)] {
        let scaled = Matrix(
            g.0.iter()
                .map(|row| row.iter().map(|v| v * scale).collect())
                .collect(),
        );
        let mut scaled_of_images = of_images.clone();
        scaled_of_images
            .values
            .iter_mut()
            .for_each(|value| *value *= scale);
        for stored in [StoredInput::Full, StoredInput::Int8] {
            for memory in [Memory::None, Memory::Balanced { decay: 0.9 }] {
                let policy = match memory {
                    Memory::None => Policy::Systematic,
                    _ => Policy::TopK,
                };
                let aop = count(8)
                    .with_method(policy.method(memory))
                    .with_input_gradient(OuterProducts::Count(8))
                    .with_stored_input(stored);
                let gradients = |g: &Matrix| {
                    let layer = MemAopLinear::from_linear(linear.clone(), aop);
                    let [x, g] = [&x, g].map(|matrix| matrix.tensor(device, DType::F32));
                    backward(&layer, x, g)
                };
                for (found, expected) in gradients(&scaled).iter().zip(gradients(&g)) {
                    let found = found.iter().map(|value| value / scale).collect();
                    let error = Matrix(vec![found]).relative_error(&Matrix(vec![expected]));
                    assert!(error < 1e-4, "{scale:e} {stored:?} {memory:?}: {error:e}");
                }
            }
            let aop = count(9).with_stored_input(stored);
            let gradient =
                |g: &Images| convolve(conv.clone(), aop, [&images, g], device, DType::F32);
            let found = gradient(&scaled_of_images)
                .iter()
                .map(|value| value / scale)
                .collect();
            let expected = gradient(&of_images);
            let error = Matrix(vec![found]).relative_error(&Matrix(vec![expected]));
            assert!(error < 1e-4, "convolution {scale:e} {stored:?}: {error:e}");
        }
    }
}

/// Each value of the gradient is 1,024 · 3000 · 0.001, which half precision holds.
pub fn a_row_that_stands_for_many_does_not_overflow(device: &Device) {
    let mut random = Random(94);
    let one = |value: f64| (value / 3072.0 - 1.0).abs() < 2e-2;
    for dtype in [DType::F16, DType::BF16] {
        if !device.supports_dtype(dtype) {
            eprintln!("skipped: {device:?} does not support {dtype:?}");
            continue;
        }
        for stored in [StoredInput::Full, StoredInput::Int8] {
            let x = Matrix(vec![vec![3000.0; INPUTS]; 1024]).tensor(device, dtype);
            let g = Matrix(vec![vec![1e-3; OUTPUTS]; 1024]).tensor(device, dtype);
            let mut linear = linear(&mut random, INPUTS, OUTPUTS, device);
            linear.weight = Param::from_tensor(linear.weight.val().cast(dtype).detach());
            linear.bias = None;
            let layer = MemAopLinear::from_linear(linear, count(1).with_stored_input(stored));
            let [weight, _] = backward(&layer, x, g);
            assert!(
                weight.iter().all(|&value| one(value)),
                "{dtype:?} {stored:?}: {weight:?}"
            );

            let sizes = sizes(1, [32, 32], [1, 1]);
            let conv = conv(&sizes, &mut random, device);
            let [mut x, mut g] = batch(&sizes, &mut random);
            x.values.fill(3000.0);
            g.values.fill(1e-3);
            let weight = convolve(
                conv,
                count(1).with_stored_input(stored),
                [&x, &g],
                device,
                dtype,
            );
            assert!(
                weight.iter().all(|&value| one(value)),
                "{dtype:?} {stored:?}: {weight:?}"
            );
        }
        // Of the gradient of the input too: 1,024 · 100 · 0.001.
        let device = device.clone().inner();
        let g = Matrix(vec![vec![100.0]; 1024]).tensor(&device, dtype);
        let weight = Matrix(vec![vec![1e-3]; 2]).tensor(&device, dtype);
        let found = values(input_gradient(g, weight, 1, 0, 0));
        let most = found.iter().fold(0.0, |most: f64, value| most.max(*value));
        assert!((most / 102.4 - 1.0).abs() < 2e-2, "{dtype:?}: {most}");
    }
}

fn sizes(images: usize, size: [usize; 2], kernel: [usize; 2]) -> Sizes {
    Sizes {
        images,
        channels: [4, 6],
        size,
        kernel,
        stride: [1, 1],
        dilation: [1, 1],
        padding: [kernel[0] / 2; 4],
        groups: 1,
    }
}

fn conv(sizes: &Sizes, random: &mut Random, device: &Device) -> Conv2d {
    sizes.conv2d(random, device, DType::F32)
}

/// Images and a gradient of the output.
fn batch(sizes: &Sizes, random: &mut Random) -> [Images; 2] {
    let [height, width] = sizes.output();
    let [inputs, outputs] = sizes.channels;
    [
        Images::random(random, [sizes.images, inputs, sizes.size[0], sizes.size[1]]),
        Images::random(random, [sizes.images, outputs, height, width]),
    ]
}

/// The gradient of the weight.
fn convolve(
    mut conv: Conv2d,
    aop: AopConfig,
    [x, g]: [&Images; 2],
    device: &Device,
    dtype: DType,
) -> Vec<f64> {
    conv.weight = Param::from_tensor(conv.weight.val().cast(dtype).detach());
    conv.bias = None;
    let layer = MemAopConv2d::from_conv2d(conv, aop);
    let [x, g] = [x, g].map(|images| images.tensor(device, dtype));
    let grads = (layer.forward(x) * g).sum().backward();
    values(layer.weight.val().grad(&grads).unwrap())
}

/// The smallest numbers of all, whose reciprocals are infinite, are numbers too.
#[test]
fn the_smallest_gradients_of_a_convolution_are_finite() {
    let device = Device::flex().autodiff();
    let mut random = Random(95);
    let sizes = sizes(2, [6, 7], [3, 3]);
    let conv = conv(&sizes, &mut random, &device);
    let [x, mut g] = batch(&sizes, &mut random);
    g.values.fill(0.0);
    (g.values[3], g.values[17]) = (1e-40, 2e-39);
    let gradient = convolve(conv, count(9), [&x, &g], &device, DType::F32);
    assert!(
        gradient.iter().all(|value| value.is_finite()),
        "{gradient:?}"
    );
}

/// Also where the memory does not lie row by row.
#[test]
fn a_broken_batch_leaves_a_turned_memory_alone() {
    let device = Device::flex();
    let mut random = Random(96);
    let turned = |random: &mut Random, columns: usize| {
        let matrix = random.matrix(columns, 9);
        matrix.tensor(&device, DType::F32).transpose()
    };
    let memory = Rows {
        input: turned(&mut random, INPUTS),
        grad: turned(&mut random, OUTPUTS),
        age: turned(&mut random, 1),
    };
    let (mut x, g) = (random.matrix(8, INPUTS), random.matrix(8, OUTPUTS));
    x.0[3][1] = f64::NAN;
    let step = AopStep {
        k: 3,
        method: Policy::TopK.method(Memory::Published { decay: 0.9 }),
        seed: 1,
        step: 0,
    };
    let [x, g] = [&x, &g].map(|matrix| matrix.tensor(&device, DType::F32));
    let gradient = weight_gradient(x, g, Some(memory.clone()), step);
    assert!(values(gradient.weight).iter().all(|value| value.is_nan()));
    assert_eq!(values(gradient.memory.unwrap().input), values(memory.input));
}
