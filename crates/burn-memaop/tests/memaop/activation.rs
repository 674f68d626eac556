//! Activations whose backward pass keeps little, against Burn's own.

use burn::{
    module::Module,
    nn::{activation::ActivationConfig, transformer::PositionWiseFeedForwardConfig},
    tensor::{DType, Device, Distribution, Tensor, TensorData, activation},
};
use burn_memaop::{
    AopConfig, OuterProducts, StoredInput,
    activation::{Gelu, relu},
    reset,
    transformer::MemAopPositionWiseFeedForward,
    with_aop,
};

use crate::{
    packed::config,
    support::{Matrix, Random, bits},
};

/// A GELU that keeps its derivative in 8 bits.
pub fn packed_gelu() -> Gelu {
    Gelu::new().with_aop(AopConfig::new().with_stored_input(StoredInput::Int8))
}

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
        // No width divides them.
        [1, 2003, 3],
        [1, 2, 5003],
    ] {
        let input = Tensor::<3>::random(shape, Distribution::Normal(0.0, 2.0), &inner);
        let upstream = Tensor::<3>::random(shape, Distribution::Normal(0.0, 1.0), &inner);
        let gradient = |function: fn(Tensor<3>) -> Tensor<3>| {
            let input = Tensor::from_data(input.to_data(), device).require_grad();
            let output = function(input.clone());
            let grads = (output.clone() * Tensor::from_data(upstream.to_data(), device))
                .sum()
                .backward();
            (output.inner(), input.grad(&grads).unwrap())
        };
        let (ours, burns) = (gradient(relu), gradient(activation::relu));
        assert_eq!(bits(ours.0), bits(burns.0), "{shape:?}");
        // A zero has a sign where Burn multiplies.
        ours.1.into_data().assert_eq(&burns.1.into_data(), true);

        let inferred = Gelu::new().forward(input.clone());
        let error = (inferred - activation::gelu(input.clone())).abs().max();
        assert!(error.into_scalar::<f32>() < 1e-5, "{shape:?}");

        let burns = gradient(activation::gelu);
        let exact = gradient(|x| Gelu::new().forward(x));
        let approximate = gradient(|x| Gelu::new_approximate().forward(x));
        let expected = gradient(activation::gelu_approximate);
        for (found, expected) in [(exact, burns.clone()), (approximate, expected)] {
            let distance = |a: Tensor<3>, b: Tensor<3>| (a - b).abs().max().into_scalar::<f32>();
            let output = distance(found.0, expected.0);
            let input = distance(found.1, expected.1);
            assert!(
                output < 1e-5 && input < 1e-5,
                "{shape:?}: {output:e} {input:e}"
            );
        }
        let ours = gradient(|x| packed_gelu().forward(x));
        if inner == Device::flex() {
            // Both round 1 + erf, which cancels where the input is far below zero. An error is
            // therefore relative to the input, not to the output.
            let error = ((ours.0 - burns.0) / input.clone()).abs().max();
            let error = error.into_scalar::<f32>();
            assert!(error < 5e-7, "{shape:?}: {error:e}");
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
    let grads = (relu(input.clone()) * upstream).backward();
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

/// `with_aop` sets the GELUs of a model, and each draws its own bits. Otherwise one above another
/// would round as that does.
#[test]
fn gelus_of_a_model_round_by_different_bits() {
    #[derive(Module, Debug)]
    struct Model {
        below: Gelu,
        above: Gelu,
        relu: burn_memaop::nn::Relu,
    }
    let device = Device::flex().autodiff();
    let model = Model {
        below: Gelu::new(),
        above: Gelu::new(),
        relu: burn_memaop::nn::Relu::new(),
    };
    let mut names = Vec::new();
    let model = with_aop(model, |name, aop| {
        names.push(name.to_string());
        aop.with_stored_input(StoredInput::Int8).with_seed(3)
    });
    assert_eq!(names, ["below", "above"]);
    let x = Random(54).matrix(4, 128).tensor(&device, DType::F32);
    let gradient = |gelu: &Gelu| {
        let x = x.clone().require_grad();
        bits(x.grad(&gelu.forward(x.clone()).sum().backward()).unwrap())
    };
    let (below, above) = (gradient(&model.below), gradient(&model.above));
    assert_ne!(below, above);
    // With the same seed, the first pass of a model that is set alike rounds alike.
    let again = with_aop(reset(model.clone()), |_, aop| aop);
    assert_eq!(gradient(&again.below), below);
    assert_eq!(model.below.to_string(), burn::nn::Gelu::new().to_string());
    assert_eq!(model.relu.to_string(), "Relu");
}

/// The same of feed-forward networks, whose GELU rounds by the bits of a layer with weights. The bits
/// go with a layer wherever it goes.
#[test]
fn feed_forward_networks_of_a_model_round_by_different_bits() {
    #[derive(Module, Debug)]
    struct Model {
        below: MemAopPositionWiseFeedForward,
        above: MemAopPositionWiseFeedForward,
    }
    let device = Device::flex().autodiff();
    let burns = PositionWiseFeedForwardConfig::new(64, 128)
        .with_dropout(0.0)
        .init(&device);
    let network = || {
        let aop = config(StoredInput::Full, OuterProducts::All);
        MemAopPositionWiseFeedForward::from_pwff(burns.clone(), aop)
    };
    let model = Model {
        below: network(),
        above: network(),
    };
    let int8 = config(StoredInput::Int8, OuterProducts::All).with_seed(5);
    let model = with_aop(model, |_, _| int8);
    let x = Random(55).matrix(8, 64).tensor(&device, DType::F32);
    let gradient = |network: MemAopPositionWiseFeedForward| {
        let x = x.clone().require_grad();
        let output = reset(network).forward(x.clone());
        bits(x.grad(&output.sum().backward()).unwrap())
    };
    let (below, above) = (gradient(model.below.clone()), gradient(model.above));
    assert_ne!(below, above);
    let record = model.below.clone().into_record();
    for again in [
        model.below.clone().fork(&device),
        model.below.clone().to_device(&device),
        model.below.clone().valid().train(),
        model.below.load_record(record),
    ] {
        assert_eq!(gradient(again), below);
    }
}

/// Each pass of the network rounds anew, and the mean of many is nearer to the exact gradient than one by as much as
/// independent errors are.
#[test]
fn passes_of_a_feed_forward_network_round_independently() {
    const PASSES: usize = 100;
    let device = Device::flex().autodiff();
    let input = Random(53)
        .matrix(8, 64)
        .tensor(&device, DType::F32)
        .require_grad();
    let burns = PositionWiseFeedForwardConfig::new(64, 128)
        .with_dropout(0.0)
        .init(&device);
    let gradient = |output: Tensor<2>| {
        let grads = output.sum().backward();
        Matrix::from_tensor(input.grad(&grads).unwrap())
    };
    let exact = gradient(burns.forward(input.clone()));
    let aop = config(StoredInput::Int8, OuterProducts::All);
    let ours = MemAopPositionWiseFeedForward::from_pwff(burns, aop);
    let mut mean = Matrix::zeros(8, 64);
    let mut squares = 0.0;
    for _ in 0..PASSES {
        let found = gradient(ours.forward(input.clone()));
        squares += found.relative_error(&exact).powi(2) / PASSES as f64;
        for (mean, found) in mean.0.iter_mut().flatten().zip(found.0.concat()) {
            *mean += found / PASSES as f64;
        }
    }
    let expected = (squares / PASSES as f64).sqrt();
    let error = mean.relative_error(&exact);
    assert!(
        squares > 0.0 && error < 1.5 * expected,
        "{error:e} {expected:e}"
    );
}

/// The mean over many passes is the derivative itself: a constant pattern of rounding would stay.
pub fn the_rounding_of_a_derivative_is_unbiased(device: &Device) {
    const PASSES: usize = 4000;
    let inner = device.clone().inner();
    let values: Vec<f32> = (0..96).map(|i| (i as f32 - 48.0) / 16.0).collect();
    let values = Tensor::<2>::from_data(TensorData::new(values, [4, 24]), &inner);
    let input = || Tensor::from_data(values.to_data(), device).require_grad();
    let derivative = |function: &dyn Fn(Tensor<2>) -> Tensor<2>| {
        let input = input();
        input
            .grad(&function(input.clone()).sum().backward())
            .unwrap()
    };
    let exact = derivative(&|x| activation::gelu(x));
    let gelu = packed_gelu();
    let mut sum = exact.zeros_like();
    let mut squares = exact.zeros_like();
    for _ in 0..PASSES {
        let error = derivative(&|x| gelu.forward(x)) - exact.clone();
        sum = sum + error.clone();
        squares = squares + error.square();
    }
    let [sum, squares] = [sum, squares].map(|tensor| Matrix::from_tensor(tensor).0.concat());
    for (index, (sum, squares)) in sum.into_iter().zip(squares).enumerate() {
        // Five standard errors; those that are exact but for rounding in single precision have none.
        let error = squares.sqrt().max(1e-7 * PASSES as f64);
        assert!(sum.abs() < 5.0 * error, "{index}: {sum} {error}");
    }
}
