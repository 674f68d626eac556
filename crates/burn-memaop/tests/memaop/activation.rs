//! Activations whose backward pass keeps little, against Burn's own.

use burn::{
    nn::{activation::ActivationConfig, transformer::PositionWiseFeedForwardConfig},
    tensor::{DType, Device, Distribution, Tensor, TensorData, activation},
};
use burn_memaop::{
    OuterProducts, StoredInput, activation as compact, transformer::MemAopPositionWiseFeedForward,
};

use crate::{
    packed::config,
    support::{Matrix, Random, bits},
};

pub fn activations_equal_burns(device: &Device) {
    let inner = device.clone().inner();
    for shape in [
        [2, 3, 1],
        [4, 5, 31],
        [4, 5, 70],
        [1, 3, 300],
        [7, 10, 600],
        [2, 300, 520],
        [3, 67, 100],
    ] {
        let input = Tensor::<3>::random(shape, Distribution::Normal(0.0, 2.0), &inner);
        let upstream = Tensor::<3>::random(shape, Distribution::Normal(0.0, 1.0), &inner);
        let gradient = |function: fn(Tensor<3>) -> Tensor<3>| {
            let input = Tensor::from_inner(input.clone())
                .to_device(device)
                .require_grad();
            let output = function(input.clone());
            let grads = (output.clone() * Tensor::from_inner(upstream.clone()).to_device(device))
                .sum()
                .backward();
            (output.inner(), input.grad(&grads).unwrap())
        };
        let (ours, burns) = (gradient(compact::relu), gradient(activation::relu));
        assert_eq!(bits(ours.0), bits(burns.0), "{shape:?}");
        // A zero has a sign where Burn multiplies.
        ours.1.into_data().assert_eq(&burns.1.into_data(), true);

        let (ours, burns) = (gradient(compact::gelu), gradient(activation::gelu));
        if inner == Device::flex() {
            let of = |output: Tensor<3>| Matrix::from_tensor(output.flatten(0, 1));
            let error = of(ours.0).relative_error(&of(burns.0));
            assert!(error < 1e-6, "{shape:?}: {error:e}");
        } else {
            assert_eq!(bits(ours.0), bits(burns.0), "{shape:?}");
        }
        let difference = (ours.1 - burns.1) / upstream.clone();
        // A unit is 1.13 / 127.
        let largest = difference.clone().abs().max().into_scalar::<f32>();
        assert!(largest < 0.009, "{shape:?}: {largest}");
        // Up as often as down.
        if shape == [4, 5, 70] {
            let mean = difference.mean().into_scalar::<f32>();
            assert!(mean.abs() < 4.0 * 0.0045 / 1400f32.sqrt(), "{mean}");
        }
    }
    // NaN goes through, as in Burn, and what is infinite does where the output is not zero.
    let data = TensorData::from([[f32::NAN, 1.0, -1.0, 0.0]]);
    let input = Tensor::<2>::from_data(data, device).require_grad();
    let upstream = TensorData::from([[2.0, f32::INFINITY, f32::INFINITY, f32::NAN]]);
    let upstream = Tensor::<2>::from_data(upstream, device);
    let grads = (compact::relu(input.clone()) * upstream).backward();
    let found: Vec<f32> = input.grad(&grads).unwrap().into_data().iter().collect();
    assert_eq!(found, [2.0, f32::INFINITY, 0.0, 0.0]);
}

/// The feed-forward network keeps its activation in few bits where its layers do.
#[test]
fn a_feed_forward_network_in_few_bits_is_close_to_burns() {
    let device = Device::flex().autodiff();
    let x = Random(52).matrix(40, 64).tensor(&device, DType::F32);
    let x = x.reshape([4, 10, 64]);
    for (activation, coarse) in [
        (ActivationConfig::Gelu, true),
        (ActivationConfig::Relu, false),
    ] {
        let burns = PositionWiseFeedForwardConfig::new(64, 128)
            .with_dropout(0.0)
            .with_activation(activation)
            .init(&device);
        let gradients = |output: Tensor<3>, input: &Tensor<3>, inner: &Tensor<2>| {
            let grads = output.square().sum().backward();
            let of_input = input.grad(&grads).unwrap().flatten::<2>(0, 1);
            [of_input, inner.grad(&grads).unwrap()].map(Matrix::from_tensor)
        };
        let input = x.clone().require_grad();
        let exact = gradients(
            burns.forward(input.clone()),
            &input,
            &burns.linear_inner.weight.val(),
        );
        let aop = config(StoredInput::Int8, OuterProducts::Count(40));
        let ours = MemAopPositionWiseFeedForward::from_pwff(burns, aop);
        let input = x.clone().require_grad();
        let found = gradients(
            ours.forward(input.clone()),
            &input,
            &ours.linear_inner.weight.val(),
        );
        let of_input = found[0].relative_error(&exact[0]);
        // The gradient of a ReLU is exact; the derivative of a GELU is within 0.9 per cent of 1.
        assert_eq!(of_input > 1e-5, coarse, "{of_input}");
        assert!(of_input < 0.02, "{of_input}");
        let of_weight = found[1].relative_error(&exact[1]);
        assert!(of_weight > 1e-4 && of_weight < 0.03, "{of_weight}");
    }
}
