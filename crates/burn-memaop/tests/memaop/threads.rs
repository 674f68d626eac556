//! Results do not depend on the number of threads.

use burn::{
    nn::{
        PaddingConfig2d,
        conv::{Conv2d, Conv2dConfig},
    },
    tensor::{DType, Device, Tensor, TensorData},
};
use burn_memaop::{
    AopConfig, MemAopConv2d, MemAopLinear, Memory, Method, OuterProducts, StoredInput, nn,
};

use crate::{
    activation::packed_gelu,
    support::{Random, bits, linear},
};

/// The bits of some tensors.
type Bits = Vec<Vec<u32>>;

/// What a function gives on 1, 2 and 4 threads.
fn assert_same(name: &str, run: impl Fn() -> Bits + Sync) {
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(&run)
    };
    let expected = on(1);
    assert!(expected.iter().flatten().any(|&bits| bits != 0), "{name}");
    for threads in [2, 4] {
        assert!(on(threads) == expected, "{name}: {threads} threads");
    }
}

fn images(random: &mut Random, shape: [usize; 4], device: &Device) -> Tensor<4> {
    let values = (0..shape.iter().product()).map(|_| random.value() as f32);
    let data = TensorData::new(values.collect::<Vec<_>>(), shape);
    Tensor::from_data(data, (device, DType::F32))
}

#[test]
fn convolutions_do_not_depend_on_the_number_of_threads() {
    let device = Device::flex().autodiff();
    let mut random = Random(90);
    let same = |channels: [usize; 2], kernel: usize| {
        Conv2dConfig::new(channels, [kernel; 2]).with_padding(PaddingConfig2d::Same)
    };
    // The images, their size, and the layer: one image and several, small and large ones, with groups and strides, and
    // those that are left to Burn.
    let cases: [(usize, usize, Conv2dConfig); 9] = [
        (1, 32, same([16, 24], 3)),
        (1, 200, same([3, 8], 5)),
        (2, 28, same([8, 16], 3)),
        (3, 28, same([8, 16], 3)),
        (7, 12, same([12, 18], 3).with_groups(3)),
        (
            5,
            33,
            Conv2dConfig::new([6, 10], [3, 3]).with_stride([2, 2]),
        ),
        (64, 14, same([16, 16], 3)),
        (4, 24, same([32, 48], 1)),
        (4, 24, same([32, 32], 3).with_groups(32)),
    ];
    for (count, size, config) in cases {
        let conv = config.init(&device);
        let input = images(
            &mut random,
            [count, config.channels[0], size, size],
            &device,
        )
        .inner();
        for k in [OuterProducts::All, OuterProducts::Ratio(0.25)] {
            let aop = AopConfig::new()
                .with_outer_products(k)
                .with_cost_rule(false);
            let name = format!("{count} images of {size} x {size}, {k:?}, {config}");
            assert_same(&name, || convolve(&conv, aop, &input));
        }
    }
}

/// Output and gradients.
fn convolve(conv: &Conv2d, aop: AopConfig, input: &Tensor<4>) -> Bits {
    let layer = MemAopConv2d::from_conv2d(conv.clone(), aop);
    let input = Tensor::from_inner(input.clone()).require_grad();
    let output = layer.forward(input.clone());
    let grads = (output.clone().sin() * output.clone()).sum().backward();
    vec![
        bits(output),
        bits(input.grad(&grads).unwrap()),
        bits(layer.weight.grad(&grads).unwrap()),
        bits(layer.bias.unwrap().grad(&grads).unwrap()),
    ]
}

#[test]
fn linear_layers_do_not_depend_on_the_number_of_threads() {
    let device = Device::flex().autodiff();
    let mut random = Random(91);
    let balanced = Memory::Balanced { decay: 0.9 };
    let some = AopConfig::new()
        .with_outer_products(OuterProducts::Ratio(0.125))
        .with_cost_rule(false);
    let configs = [
        some.with_outer_products(OuterProducts::All),
        some,
        some.with_method(Method::TopK(balanced)),
        some.with_input_gradient(OuterProducts::Ratio(0.25)),
        some.with_stored_input(StoredInput::Int8),
    ];
    for (m, n, p) in [(33, 70, 10), (1000, 300, 257), (4096, 96, 512)] {
        let linear = linear(&mut random, n, p, &device);
        let x = random.matrix(m, n).tensor(&Device::flex(), DType::F32);
        for aop in configs {
            assert_same(&format!("{m} {n} {p} {aop:?}"), || {
                let layer = MemAopLinear::from_linear(linear.clone(), aop);
                let gelu = packed_gelu();
                let input = Tensor::from_inner(x.clone()).require_grad();
                let mut all = Vec::new();
                for _ in 0..2 {
                    let output = gelu.forward(layer.forward(input.clone()));
                    let grads = (output.clone().sin() * output.clone()).sum().backward();
                    all.extend([
                        bits(output),
                        bits(input.grad(&grads).unwrap()),
                        bits(layer.weight.grad(&grads).unwrap()),
                    ]);
                }
                all
            });
        }
    }
}

#[test]
fn attention_and_norms_do_not_depend_on_the_number_of_threads() {
    let device = Device::flex().autodiff();
    let mut random = Random(94);
    for (batch, length) in [(5, 300), (1, 520), (40, 30)] {
        let config = nn::attention::MultiHeadAttentionConfig::new(16, 2).with_dropout(0.0);
        let mha = config.init(&device);
        let norm = nn::LayerNormConfig::new(16).init(&device);
        let input = random
            .matrix(batch * length, 16)
            .tensor(&device, DType::F32);
        let input = input.inner().reshape([batch, length, 16]);
        assert_same(&format!("{batch} x {length}"), || {
            let input = Tensor::from_inner(input.clone()).require_grad();
            let attended = nn::attention::MhaInput::self_attn(norm.forward(input.clone()));
            let output = mha.forward_context(attended);
            let grads = output.clone().square().sum().backward();
            let of_gamma = norm.gamma.val().grad(&grads).unwrap();
            vec![
                bits(output),
                bits(input.grad(&grads).unwrap()),
                bits(of_gamma),
            ]
        });
    }
}
