//! Convolutions against plain `f64` loops.

use burn::{
    module::{Module, Param},
    nn::{
        PaddingConfig2d,
        conv::{Conv2d, Conv2dConfig},
    },
    tensor::{DType, Device, Tensor, TensorData, Tolerance},
};
use burn_memaop::{
    AopConfig, AopObserver, MemAopConv2d, MemAopConv2dConfig, Memory, Method, OuterProducts,
    StoredInput, baseline::Baseline,
};

use crate::{
    images::{Gradients, Images, Sizes, gradients, row_sizes},
    oracle::{Policy, choose, inclusion_probabilities, permutation, philox},
    support::{Random, count},
};

/// The rows that a layer whose input is a leaf draws in its step `step`.
fn drawn(policy: Policy, sizes: &[f64], k: usize, seed: u64, step: u64) -> Vec<(usize, f64)> {
    let m = sizes.len();
    let words: Vec<_> = (0..m.max(k))
        .map(|row| philox([row as u64, 0, step], seed)[0])
        .collect();
    choose(policy, sizes, &words, &permutation(m, step, seed), k)
}

struct Found {
    output: Images,
    input: Images,
    weight: Images,
    bias: Vec<f64>,
}

fn run(layer: &MemAopConv2d, x: Tensor<4>, g: Tensor<4>) -> Found {
    let x = x.require_grad();
    let output = layer.forward(x.clone());
    let grads = (output.clone() * g).sum().backward();
    let bias = layer.bias.as_ref().unwrap().grad(&grads).unwrap();
    Found {
        output: Images::of(output.inner()),
        input: Images::of(x.grad(&grads).unwrap()),
        weight: Images::of(layer.weight.grad(&grads).unwrap()),
        bias: bias.into_data().iter::<f64>().collect(),
    }
}

fn assert_equal(found: &Found, expected: &Gradients, tolerance: f64, context: &str) {
    let distances = [
        found.output.distance(&expected.output),
        found.input.distance(&expected.input),
        found.weight.distance(&expected.weight),
    ];
    assert!(
        distances.iter().all(|distance| *distance < tolerance),
        "{context}: output, input, weight: {distances:?}"
    );
    let scale = expected.bias.iter().fold(1.0, |m: f64, b| m.max(b.abs()));
    for (found, expected) in found.bias.iter().zip(&expected.bias) {
        assert!(
            (found - expected).abs() < 10.0 * tolerance * scale,
            "{context}: bias"
        );
    }
}

const POLICIES: [Policy; 8] = [
    Policy::Systematic,
    Policy::TopK,
    Policy::RandK,
    Policy::WeightedK,
    Policy::ScaledRandK,
    Policy::Bernoulli,
    Policy::ColumnRow,
    Policy::WinnerTakeAll,
];

/// Larger than a tile, many small images in one, parts of rows, and what is scored on several cores.
fn large() -> [Sizes; 5] {
    let sizes = Sizes {
        images: 3,
        channels: [5, 6],
        size: [19, 23],
        kernel: [3, 3],
        stride: [1, 1],
        dilation: [1, 1],
        padding: [1, 1, 1, 1],
        groups: 1,
    };
    [
        Sizes {
            images: 41,
            channels: [4, 6],
            size: [5, 4],
            groups: 2,
            ..sizes.clone()
        },
        Sizes {
            images: 2,
            channels: [3, 2],
            size: [3, 700],
            kernel: [2, 9],
            stride: [1, 1],
            dilation: [2, 3],
            padding: [1, 30, 1, 2],
            ..sizes.clone()
        },
        Sizes {
            images: 4,
            channels: [16, 16],
            size: [48, 48],
            ..sizes.clone()
        },
        Sizes {
            size: [9, 301],
            kernel: [2, 5],
            stride: [2, 1],
            padding: [0, 2, 1, 3],
            ..sizes.clone()
        },
        sizes,
    ]
}

pub fn convolutions_equal_the_oracle(device: &Device) {
    let mut random = Random(71);
    let small = (0..40).map(|_| Sizes::random(&mut Random(random.range(0, 1 << 20) as u64)));
    let small: Vec<_> = small.collect();
    for (index, sizes) in small.into_iter().chain(large()).enumerate() {
        let conv = sizes.conv2d(&mut random, device, DType::F32);
        let (weight, bias) = parameters(&conv);
        let [height, width] = sizes.output();
        let x = [
            sizes.images,
            sizes.channels[0],
            sizes.size[0],
            sizes.size[1],
        ];
        let x = Images::random(&mut random, x);
        let g = [sizes.images, sizes.channels[1], height, width];
        let g = Images::random(&mut random, g);
        let (m, scores) = (sizes.rows(), row_sizes(&sizes, &x, &g));
        let policy = POLICIES[index % POLICIES.len()];
        let several = random.range(1, m);
        for k in [1, several, m.saturating_sub(1).max(1), m] {
            let aop = count(k)
                .with_method(policy.method(Memory::None))
                .with_seed(index as u64);
            let layer = MemAopConv2d::from_conv2d(conv.clone(), aop);
            let chosen = match k < m {
                true => drawn(policy, &scores, k, aop.seed, 0),
                false => (0..m).map(|row| (row, 1.0)).collect(),
            };
            let expected = gradients(&sizes, [&x, &weight, &g], &bias, &chosen);
            let tensors = [&x, &g].map(|images| images.tensor(device, DType::F32));
            let [x, g] = tensors;
            let context = format!("{policy:?} K = {k} {sizes:?}");
            assert_equal(&run(&layer, x, g), &expected, 2e-5, &context);
        }
    }
}

fn parameters(conv: &Conv2d) -> (Images, Vec<f64>) {
    let bias = conv.bias.as_ref().unwrap().val().inner();
    (
        Images::of(conv.weight.val().inner()),
        bias.into_data().iter::<f64>().collect(),
    )
}

pub fn batch(random: &mut Random, sizes: &Sizes) -> [Images; 2] {
    let [height, width] = sizes.output();
    let (x, g) = (
        [
            sizes.images,
            sizes.channels[0],
            sizes.size[0],
            sizes.size[1],
        ],
        [sizes.images, sizes.channels[1], height, width],
    );
    [Images::random(random, x), Images::random(random, g)]
}

/// 3 x 3, with everything else in it.
pub fn usual() -> Sizes {
    Sizes {
        images: 4,
        channels: [6, 4],
        size: [7, 9],
        kernel: [3, 3],
        stride: [1, 2],
        dilation: [2, 1],
        padding: [1, 0, 2, 1],
        groups: 2,
    }
}

/// Half precision takes the default body on CPUs.
pub fn convolutions_of_every_type_equal_the_oracle(device: &Device) {
    let mut random = Random(72);
    for (dtype, tolerance) in [(DType::F64, 1e-6), (DType::F16, 1e-2), (DType::BF16, 6e-2)] {
        if !device.supports_dtype(dtype) {
            eprintln!("skipped: {device:?} does not support {dtype:?}");
            continue;
        }
        for (index, policy) in POLICIES.into_iter().enumerate() {
            let sizes = match index % 2 {
                0 => usual(),
                _ => Sizes {
                    groups: 1,
                    ..usual()
                },
            };
            let conv = sizes.conv2d(&mut random, device, dtype);
            let (weight, bias) = parameters(&conv);
            let [x, g] = batch(&mut random, &sizes)
                .map(|images| images.tensor(device, dtype))
                .map(|images| (Images::of(images.clone().inner()), images));
            let scores = row_sizes(&sizes, &x.0, &g.0);
            let (m, aop) = (
                sizes.rows(),
                count(9).with_method(policy.method(Memory::None)),
            );
            for k in [9, m] {
                let layer = MemAopConv2d::from_conv2d(
                    conv.clone(),
                    AopConfig {
                        outer_products: OuterProducts::Count(k),
                        ..aop
                    },
                );
                let chosen = match k < m {
                    true => drawn(policy, &scores, k, 0, 0),
                    false => (0..m).map(|row| (row, 1.0)).collect(),
                };
                let expected = gradients(&sizes, [&x.0, &weight, &g.0], &bias, &chosen);
                let found = run(&layer, x.1.clone(), g.1.clone());
                assert_equal(
                    &found,
                    &expected,
                    tolerance,
                    &format!("{dtype:?} {policy:?} {k}"),
                );
            }
        }
    }
}

pub fn images_in_other_orders_are_handled(device: &Device) {
    let mut random = Random(73);
    let sizes = usual();
    let conv = sizes.conv2d(&mut random, device, DType::F32);
    let (weight, bias) = parameters(&conv);
    let [x, g] = batch(&mut random, &sizes);
    let scores = row_sizes(&sizes, &x, &g);
    let tensors = || [&x, &g].map(|images| images.tensor(device, DType::F32));
    let last = |images: Tensor<4>| {
        // As convolutions of some backends leave them.
        let channels_last = images.permute([0, 2, 3, 1]).mul_scalar(1.0);
        channels_last.permute([0, 3, 1, 2])
    };
    let part = |images: Tensor<4>| {
        let [n, c, ..] = images.dims();
        let wider = Tensor::cat(vec![images.zeros_like(), images.clone(), images], 1);
        wider.narrow(1, c, c).narrow(0, 0, n)
    };
    for k in [7, sizes.rows()] {
        let chosen = match k < sizes.rows() {
            true => drawn(Policy::Systematic, &scores, k, 0, 0),
            false => (0..k).map(|row| (row, 1.0)).collect(),
        };
        let expected = gradients(&sizes, [&x, &weight, &g], &bias, &chosen);
        let [a, b] = tensors().map(last);
        let layer = || MemAopConv2d::from_conv2d(conv.clone(), count(k));
        assert_equal(
            &run(&layer(), a.detach(), b),
            &expected,
            2e-5,
            "channels last",
        );
        let [a, b] = tensors().map(part);
        assert_equal(
            &run(&layer(), a.detach(), b),
            &expected,
            2e-5,
            "some channels",
        );
    }
}

pub fn idle_positions_add_nothing(device: &Device) {
    let mut random = Random(74);
    for groups in [1, 2] {
        let sizes = Sizes { groups, ..usual() };
        let conv = sizes.conv2d(&mut random, device, DType::F32);
        let (weight, bias) = parameters(&conv);
        let [x, mut g] = batch(&mut random, &sizes);
        let [height, width] = sizes.output();
        // An image without a gradient, and some positions where one group has none.
        for i in 0..height {
            for channel in 0..sizes.channels[1] {
                (0..width).for_each(|j| *g.at([1, channel, i, j]) = 0.0);
            }
            for channel in 0..sizes.channels[1] / groups {
                *g.at([2, channel, i, 2]) = 0.0;
            }
        }
        let scores = row_sizes(&sizes, &x, &g);
        for policy in [Policy::Systematic, Policy::TopK, Policy::ColumnRow] {
            let aop = count(9).with_method(policy.method(Memory::None));
            let layer = MemAopConv2d::from_conv2d(conv.clone(), aop);
            let chosen = drawn(policy, &scores, 9, 0, 0);
            let expected = gradients(&sizes, [&x, &weight, &g], &bias, &chosen);
            let [x, g] = [&x, &g].map(|images| images.tensor(device, DType::F32));
            let distance = run(&layer, x, g).weight.distance(&expected.weight);
            assert!(distance < 2e-5, "{policy:?}: {distance}");
        }
        // Nothing to draw.
        let [x, g] = [&x, &g].map(|images| images.tensor(device, DType::F32));
        let layer = MemAopConv2d::from_conv2d(conv, count(9));
        let found = run(&layer, x, g.zeros_like());
        assert!(found.weight.values.iter().all(|value| *value == 0.0));
    }
}

/// Burn's layer and its gradients, with K = M, and with paddings that Burn works out.
pub fn exact_convolutions_equal_burns(device: &Device) {
    let paddings = [
        PaddingConfig2d::Same,
        PaddingConfig2d::Valid,
        PaddingConfig2d::Explicit(2, 1, 0, 3),
    ];
    for (index, padding) in paddings.into_iter().enumerate() {
        for (kernel, stride, groups) in [
            ([2, 3], [1, 1], 1),
            ([3, 4], [2, 3], 2),
            ([1, 1], [1, 1], 4),
        ] {
            let mut random = Random(75);
            let mut conv = Conv2dConfig::new([8, 12], kernel)
                .with_stride(stride)
                .with_groups(groups)
                .with_padding(padding.clone())
                .with_bias(index != 1)
                .init(device);
            let weight = Images::random(&mut random, conv.weight.dims());
            conv.weight = Param::from_tensor(weight.tensor(device, DType::F32));
            let layer = MemAopConv2d::from_conv2d(conv.clone(), count(1 << 20));
            let x = Images::random(&mut random, [3, 8, 9, 10]);
            let x = || x.tensor(device, DType::F32).require_grad();
            let (a, b) = (x(), x());
            let (expected, found) = (conv.forward(a.clone()), layer.forward(b.clone()));
            let close = |found: Tensor<4>, expected: Tensor<4>| {
                let distance = Images::of(found).distance(&Images::of(expected));
                assert!(distance < 1e-5, "{distance:e}");
            };
            close(found.clone().inner(), expected.clone().inner());
            let (expected, found) = (
                expected.square().sum().backward(),
                found.square().sum().backward(),
            );
            close(b.grad(&found).unwrap(), a.grad(&expected).unwrap());
            close(
                layer.weight.grad(&found).unwrap(),
                conv.weight.grad(&expected).unwrap(),
            );
            // In inference too.
            let x = x().inner();
            close(layer.valid().forward(x.clone()), conv.valid().forward(x));
            assert_eq!(layer.weight.id, conv.weight.id);
        }
    }
}

pub fn convolutions_without_images_have_gradients_of_zeros(device: &Device) {
    let layer = MemAopConv2dConfig::new([2, 3], [3, 3]).init(device);
    let observer = AopObserver::new();
    observer.observe(&layer);
    let output = layer.forward(Tensor::zeros([0, 2, 5, 6], device));
    assert_eq!(output.dims(), [0, 3, 3, 4]);
    assert_eq!(observer.observe(&layer).layers[0].rows, 0);
}

/// With a weight of 1 x 1 and images of one value it is a linear layer, in what it measures too.
pub fn a_pointwise_convolution_is_a_linear_layer(device: &Device) {
    let (m, inputs, outputs) = (128, 9, 6);
    let linear = crate::support::linear(&mut Random(3), inputs, outputs, device);
    let mut conv = Conv2dConfig::new([inputs, outputs], [1, 1]).init(device);
    let weight = linear.weight.val().transpose();
    let weight = weight.reshape([outputs, inputs, 1, 1]).detach();
    conv.weight = Param::from_tensor(weight);
    conv.bias = Some(Param::from_tensor(Tensor::zeros([outputs], device)));
    let aop = count(16);
    let conv = MemAopConv2d::from_conv2d(conv, aop);
    let linear = burn_memaop::MemAopLinear::from_linear(linear, aop);
    let mut random = Random(76);
    let observer = AopObserver::new().with_error(1);
    for step in 0..6 {
        let mut values = |columns: usize| {
            let values = (0..m * columns).map(|_| 1.0 + 0.2 * random.value());
            TensorData::new(values.collect::<Vec<f64>>(), [m, columns]).convert::<f32>()
        };
        let (x, g) = (values(inputs), values(outputs));
        let flat = |data: &TensorData| Tensor::<2>::from_data(data.clone(), device);
        let flat = (linear.forward(flat(&x)) * flat(&g)).sum().backward();
        let deep = |data: TensorData| {
            let shape = [m, data.shape()[1], 1, 1];
            Tensor::<4>::from_data(
                TensorData::new(data.try_into_vec::<f32>().unwrap(), shape),
                device,
            )
        };
        let deep = (conv.forward(deep(x)) * deep(g)).sum().backward();
        let expected = linear.weight.grad(&flat).unwrap().transpose();
        let found = conv.weight.grad(&deep).unwrap().reshape([outputs, inputs]);
        let tolerance = Tolerance::<f32>::relative(1e-4).set_absolute(1e-3);
        found
            .into_data()
            .assert_approx_eq(&expected.into_data(), tolerance);

        let [expected, found] = [observer.observe(&linear), observer.observe(&conv)]
            .map(|report| report.layers.into_iter().next().unwrap());
        assert_eq!(
            (
                found.outer_products,
                found.rows,
                found.input_rows,
                found.d_input,
                found.d_output
            ),
            (expected.outer_products, m, None, inputs, outputs)
        );
        let [found, expected] = [found, expected].map(|report| report.error());
        // The first step is before the first observation.
        if step > 0 {
            let (found, expected) = (found.unwrap(), expected.unwrap());
            assert!((found - expected).abs() < 1e-3, "{found} {expected}");
        }
    }
}

/// Of many draws the mean is the exact gradient, and the variance that of theory: at most that of independent draws.
#[test]
fn sampled_positions_are_unbiased() {
    let device = Device::flex().autodiff();
    let sizes = Sizes {
        images: 2,
        channels: [2, 2],
        size: [4, 3],
        padding: [1, 1, 1, 1],
        stride: [1, 1],
        dilation: [1, 1],
        groups: 1,
        ..usual()
    };
    let mut random = Random(77);
    let conv = sizes.conv2d(&mut random, &device, DType::F32);
    let (weight, bias) = parameters(&conv);
    let [x, g] = batch(&mut random, &sizes);
    let all: Vec<_> = (0..sizes.rows()).map(|row| (row, 1.0)).collect();
    let exact = gradients(&sizes, [&x, &weight, &g], &bias, &all).weight;
    let (k, draws) = (6, 4000);
    let scores = row_sizes(&sizes, &x, &g);
    let bound: f64 = inclusion_probabilities(&scores, k)
        .iter()
        .zip(&scores)
        .map(|(p, score)| (1.0 / p - 1.0) * score * score)
        .sum();
    for method in [
        Method::Systematic,
        Method::Baseline(Baseline::Bernoulli),
        Method::Baseline(Baseline::ColumnRow),
    ] {
        let layer = MemAopConv2d::from_conv2d(conv.clone(), count(k).with_method(method));
        let [x, g] = [&x, &g].map(|images| images.tensor(&device, DType::F32));
        let (mut mean, mut variance) = (vec![0.0; exact.values.len()], 0.0);
        for _ in 0..draws {
            let found = run(&layer, x.clone(), g.clone()).weight;
            for (mean, (found, exact)) in
                mean.iter_mut().zip(found.values.iter().zip(&exact.values))
            {
                *mean += (found - exact) / draws as f64;
                variance += (found - exact).powi(2) / draws as f64;
            }
        }
        let distance: f64 = mean.iter().map(|mean| mean * mean).sum();
        let distance = (distance / (variance / draws as f64)).sqrt();
        assert!(distance < 2.0, "{method:?}: {distance} standard errors");
        if method != Method::Baseline(Baseline::ColumnRow) {
            let ratio = variance / bound;
            assert!(
                (0.5..1.1).contains(&ratio),
                "{method:?}: {ratio} of independent draws"
            );
        }
    }
}

/// What is kept in few bits changes the gradient of the weight alone, and not its mean.
pub fn images_in_few_bits_are_unbiased(device: &Device) {
    let mut random = Random(78);
    let sizes = usual();
    let conv = sizes.conv2d(&mut random, device, DType::F32);
    let (weight, bias) = parameters(&conv);
    let [x, g] = batch(&mut random, &sizes);
    let all: Vec<_> = (0..sizes.rows()).map(|row| (row, 1.0)).collect();
    let expected = gradients(&sizes, [&x, &weight, &g], &bias, &all);
    let layer =
        |k| MemAopConv2d::from_conv2d(conv.clone(), count(k).with_stored_input(StoredInput::Int4));
    let tensors = || [&x, &g].map(|images| images.tensor(device, DType::F32));
    for k in [8, sizes.rows()] {
        let layer = layer(k);
        let draws = 60;
        let mut mean = Images::zeros(expected.weight.shape);
        let mut one = 0.0;
        for _ in 0..draws {
            let [x, g] = tensors();
            let found = run(&layer, x, g);
            assert!(found.output.distance(&expected.output) < 2e-5);
            assert!(found.input.distance(&expected.input) < 2e-5);
            one += found.weight.distance(&expected.weight).powi(2) / draws as f64;
            let values = mean.values.iter_mut().zip(found.weight.values);
            values.for_each(|(mean, value)| *mean += value / draws as f64);
        }
        let (one, mean) = (one.sqrt(), mean.distance(&expected.weight));
        assert!(one > 1e-3, "nothing was rounded: {one}");
        assert!(
            mean < 2.0 * one / f64::sqrt(draws as f64),
            "{k}: {mean} of {one}"
        );
    }
}
