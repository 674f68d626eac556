//! A device whose backend is in Burn, but not in this crate: layers are Burn's own there.
//! `cargo test -p burn-memaop --no-default-features --features autodiff --test missing_feature`.

#![cfg(all(not(feature = "flex"), feature = "autodiff"))]

use burn::{
    nn::{Gelu, LinearConfig, Relu, conv::Conv2dConfig, transformer},
    tensor::{Device, Distribution, Tensor},
};
use burn_memaop::{
    AopConfig, MemAopConv2d, MemAopLinear, OuterProducts, StoredInput, activation, summary,
    transformer::{MemAopTransformerEncoder, TransformerEncoderInput},
};

/// Layers that approximate and pack wherever they can.
fn aop() -> AopConfig {
    AopConfig::new()
        .with_outer_products(OuterProducts::Count(2))
        .with_stored_input(StoredInput::Int8)
        .with_cost_rule(false)
}

fn device() -> Device {
    let device = Device::flex().autodiff();
    device.seed(1);
    device
}

/// Output and gradient of the input.
fn passes<const D: usize, const O: usize>(
    input: &Tensor<D>,
    forward: impl FnOnce(Tensor<D>) -> Tensor<O>,
) -> [Vec<f32>; 2] {
    let input = input.clone().detach().require_grad();
    let output = forward(input.clone());
    let grads = (output.clone() * output.clone()).sum().backward();
    let gradient = input.grad(&grads).expect("the input is tracked");
    [
        output.into_data().iter().collect(),
        gradient.into_data().iter().collect(),
    ]
}

#[test]
fn a_linear_layer_is_burns() {
    let device = device();
    let burns = LinearConfig::new(4, 70).init(&device);
    let ours = MemAopLinear::from_linear(burns.clone(), aop());
    let input = Tensor::<2>::random([9, 4], Distribution::Default, &device);
    assert_eq!(
        passes(&input, |x| ours.forward(x)),
        passes(&input, |x| burns.forward(x))
    );
    let gradient = |output: Tensor<2>, weight: Tensor<2>| -> Vec<f32> {
        let grads = output.powi_scalar(2).sum().backward();
        weight.grad(&grads).unwrap().into_data().iter().collect()
    };
    assert_eq!(
        gradient(ours.forward(input.clone()), ours.weight.val()),
        gradient(burns.forward(input), burns.weight.val())
    );
    assert!(ours.is_exact(9, &device));
    assert_eq!(ours.memory_stats().step, 0);
    let text = summary(&ours).to_string();
    assert!(text.contains("exact: no code for this device"), "{text}");
}

#[test]
fn a_convolution_is_burns() {
    let device = device();
    let burns = Conv2dConfig::new([2, 3], [3, 3]).init(&device);
    let ours = MemAopConv2d::from_conv2d(burns.clone(), aop());
    let images = Tensor::<4>::random([2, 2, 6, 5], Distribution::Default, &device);
    assert_eq!(
        passes(&images, |x| ours.forward(x)),
        passes(&images, |x| burns.forward(x))
    );
    assert!(ours.is_exact([2, 2, 6, 5], &device));
    // Without a gradient, too.
    let inner = images.inner();
    let found = burn::module::Module::valid(&ours).forward(inner.clone());
    let expected = burn::module::Module::valid(&burns).forward(inner);
    found.into_data().assert_eq(&expected.into_data(), true);
}

#[test]
fn activations_are_burns() {
    let device = device();
    let input = Tensor::<2>::random([9, 80], Distribution::Normal(0.0, 1.0), &device);
    let gelu = activation::Gelu::new().with_aop(aop());
    assert_eq!(
        passes(&input, |x| gelu.forward(x)),
        passes(&input, |x| Gelu::new().forward(x))
    );
    assert_eq!(
        passes(&input, |x| activation::Relu::new().forward(x)),
        passes(&input, |x| Relu::new().forward(x))
    );
}

#[test]
fn an_encoder_is_burns() {
    let device = device();
    let config = transformer::TransformerEncoderConfig::new(8, 12, 2, 1).with_dropout(0.0);
    let burns = config.init(&device);
    let ours = MemAopTransformerEncoder::from_encoder(burns.clone(), aop());
    let tokens = Tensor::<3>::random([2, 5, 8], Distribution::Default, &device);
    let input = TransformerEncoderInput::new;
    let found = passes(&tokens, |x| ours.forward(input(x)));
    let expected = passes(&tokens, |x| burns.forward(input(x).into()));
    for (found, expected) in found.iter().flatten().zip(expected.iter().flatten()) {
        assert!((found - expected).abs() < 1e-5, "{found} {expected}");
    }
}
