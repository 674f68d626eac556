//! Layer norm against Burn's own, and against the derivative as it is defined.

use burn::{
    module::{Module, Param},
    nn::{
        self,
        norm::{Normalization, NormalizationConfig},
    },
    store::ModuleRecord,
    tensor::{DType, Device, Tensor},
};
use burn_memaop::nn::{LayerNorm, LayerNormConfig};

use crate::{
    support::{Matrix, Random, bits},
    transformer::{TOLERANCE, assert_equal, backward, relative_error, tokens, values},
};

/// Burn's layer norm with parameters that are not 1 and 0.
fn burns(random: &mut Random, width: usize, bias: bool, device: &Device) -> nn::LayerNorm {
    let mut vector = |first| {
        let row = Tensor::cat(vec![random.matrix(1, width).tensor(device, DType::F32)], 0);
        Param::from_tensor(row.reshape([width]) + first)
    };
    let config = nn::LayerNormConfig::new(width).with_bias(bias);
    let mut norm = config.init(device);
    norm.gamma = vector(1.0);
    norm.beta = bias.then(|| vector(0.0));
    norm
}

pub fn norms_equal_burns(device: &Device) {
    let mut random = Random(61);
    for ([batch, length, width], bias) in [
        ([2, 3, 8], true),
        ([1, 1, 5], false),
        ([3, 40, 33], true),
        ([4, 300, 300], true),
    ] {
        let burns = burns(&mut random, width, bias, device);
        let ours = LayerNorm::from_layer_norm(burns.clone());
        let input = tokens(&mut random, [batch, length, width], device);
        let (found, expected) = (ours.forward(input.clone()), burns.forward(input.clone()));
        let error = relative_error(&values(found.clone()), &values(expected.clone()));
        assert!(error < TOLERANCE, "{error:e}");
        assert_equal(
            backward(&ours, &[&input], found),
            backward(&burns, &[&input], expected),
        );
        // An input that does not lie row by row.
        let input = tokens(&mut random, [length, batch, width], device);
        let turned = || input.clone().swap_dims(0, 1);
        let (found, expected) = (ours.forward(turned()), burns.forward(turned()));
        assert_equal(
            backward(&ours, &[&input], found),
            backward(&burns, &[&input], expected),
        );
    }
    // Without rows.
    let norm = LayerNormConfig::new(4).init(device);
    assert_eq!(
        norm.forward(Tensor::<2>::zeros([0, 4], device)).dims(),
        [0, 4]
    );
}

/// The gradients by the Jacobian of the norm, `(1 - 1/n - y_i y_j / n) / deviation`.
pub fn norms_equal_the_oracle(device: &Device) {
    let mut random = Random(62);
    // The mean of a row is far from zero.
    for (rows, width, mean) in [(1, 2, 0.0), (5, 3, 5.0), (40, 31, 3.0), (700, 64, 0.0)] {
        let epsilon = 1e-3;
        let mut x = random.matrix(rows, width);
        x.0.iter_mut().flatten().for_each(|value| *value += mean);
        let (x, g) = (x.rounded(DType::F32), random.matrix(rows, width));
        let burns = burns(&mut random, width, true, device);
        let gamma = values(burns.gamma.val());
        let config = LayerNormConfig::new(width).with_epsilon(epsilon);
        let mut norm = config.init(device);
        norm.gamma = burns.gamma;

        let [mut of_x, mut of_gamma, mut of_beta] = [
            Matrix::zeros(rows, width),
            Matrix::zeros(1, width),
            Matrix::zeros(1, width),
        ];
        let n = width as f64;
        for row in 0..rows {
            let (x, g) = (&x.0[row], &g.0[row]);
            let mean = x.iter().sum::<f64>() / n;
            let variance = x.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / n;
            let deviation = (variance + epsilon).sqrt();
            let y: Vec<f64> = x.iter().map(|value| (value - mean) / deviation).collect();
            for j in 0..width {
                of_gamma.0[0][j] += g[j] * y[j];
                of_beta.0[0][j] += g[j];
                for i in 0..width {
                    let same = if i == j { 1.0 } else { 0.0 };
                    let slope = (same - 1.0 / n - y[i] * y[j] / n) / deviation;
                    of_x.0[row][i] += g[j] * gamma[j] * slope;
                }
            }
        }

        let input = x.tensor(device, DType::F32).require_grad();
        let loss = (norm.forward(input.clone()) * g.tensor(device, DType::F32)).sum();
        let grads = loss.backward();
        let found = Matrix::from_tensor(input.grad(&grads).unwrap());
        let error = found.relative_error(&of_x);
        assert!(error < 2e-5, "{rows} x {width}: {error:e}");
        let beta = norm.beta.unwrap();
        for (parameter, expected) in [(norm.gamma, of_gamma), (beta, of_beta)] {
            let found = parameter.val().grad(&grads).unwrap();
            let error = relative_error(&values(found), &expected.0[0]);
            assert!(error < 2e-5, "{rows} x {width}: {error:e}");
        }
    }
}

/// Each of the parameters and the input can be frozen.
#[test]
fn a_norm_gives_the_gradients_that_are_asked_for() {
    let device = Device::flex().autodiff();
    let mut random = Random(63);
    let whole = LayerNorm::from_layer_norm(burns(&mut random, 6, true, &device));
    let input = random.matrix(9, 6).tensor(&device, DType::F32);
    let gradients = |frozen: [bool; 3]| {
        let mut norm = whole.clone();
        norm.gamma = norm.gamma.set_require_grad(!frozen[1]);
        norm.beta = norm.beta.map(|beta| beta.set_require_grad(!frozen[2]));
        let input = input.clone().set_require_grad(!frozen[0]);
        let grads = norm.forward(input.clone()).exp().sum().backward();
        let of_input = input.grad(&grads).map(values);
        let of_gamma = norm.gamma.val().grad(&grads).map(values);
        let of_beta = norm.beta.unwrap().val().grad(&grads).map(values);
        [of_input, of_gamma, of_beta]
    };
    let expected = gradients([false; 3]);
    assert!(expected.iter().all(Option::is_some));
    for pattern in 1..7u32 {
        let frozen = [0, 1, 2].map(|bit| pattern >> bit & 1 == 1);
        let found = gradients(frozen);
        for index in 0..3 {
            let left = (!frozen[index]).then(|| expected[index].clone().unwrap());
            assert_eq!(found[index], left, "{frozen:?}");
        }
    }
}

/// Burn shows its epsilon as text. All digits of it come along, and go back.
#[test]
fn the_epsilon_of_burns_norm_comes_along() {
    let device = Device::flex();
    let x = Random(64).matrix(3, 4).tensor(&device, DType::F32);
    for epsilon in [1e-5, 1e-12, 0.1 + 0.2, 1.5, 1e-7 / 3.0] {
        for bias in [true, false] {
            let config = nn::LayerNormConfig::new(4).with_epsilon(epsilon);
            let burns = config.with_bias(bias).init(&device);
            let ours = LayerNorm::from_layer_norm(burns.clone());
            assert_eq!(ours.to_string(), burns.to_string());
            let expected = bits(burns.forward(x.clone()));
            assert_eq!(bits(ours.forward(x.clone())), expected);
            let record = ours.clone().into_record().into_bytes().unwrap();
            let empty = LayerNormConfig::new(4).with_epsilon(epsilon);
            let loaded = empty.with_bias(bias).init(&device);
            let loaded = loaded.load_record(ModuleRecord::from_bytes(record).unwrap());
            assert_eq!(bits(loaded.forward(x.clone())), expected);
            let back = ours.into_layer_norm();
            let record = back.clone().into_record().into_bytes().unwrap();
            loaded.load_record(ModuleRecord::from_bytes(record).unwrap());
            assert_eq!(bits(back.forward(x.clone())), expected);
            assert_eq!(back.gamma.id, burns.gamma.id);
            assert_eq!(back.beta.is_some(), bias);
        }
    }
}

/// The squares of half-precision values are added up in single precision, as in Burn.
#[test]
fn norms_in_half_precision_equal_burns() {
    let device = Device::flex().autodiff();
    for (dtype, tolerance) in [(DType::F16, 2e-3), (DType::BF16, 2e-2)] {
        let mut random = Random(65);
        let burns = burns(&mut random, 64, true, &device);
        let x = random.matrix(20, 64).tensor(&device, DType::F32) * 100.0;
        let gradient = |forward: &dyn Fn(Tensor<2>) -> Tensor<2>, dtype: DType| {
            let x = x.clone().cast(dtype).require_grad();
            let output = forward(x.clone());
            assert_eq!(output.dtype(), dtype);
            let grads = output.clone().sin().sum().backward();
            [values(output), values(x.grad(&grads).unwrap())]
        };
        let cast = |norm: &nn::LayerNorm, dtype: DType| {
            let mut norm = norm.clone();
            norm.gamma = norm.gamma.map(|gamma| gamma.cast(dtype));
            norm.beta = norm.beta.map(|beta| beta.map(|beta| beta.cast(dtype)));
            norm
        };
        let single = gradient(&|x| burns.forward(x), DType::F32);
        let ours = LayerNorm::from_layer_norm(cast(&burns, dtype));
        let found = gradient(&|x| ours.forward(x), dtype);
        let [output, of_input] = [0, 1].map(|i| relative_error(&found[i], &single[i]));
        assert!(output < tolerance, "{dtype:?}: {output:e}");
        // The sine is steep where the norm is large.
        assert!(of_input < 10.0 * tolerance, "{dtype:?}: {of_input:e}");
    }
}

/// Burn's list of norms takes this one as Burn's.
#[test]
fn a_norm_is_one_of_burns_list() {
    let device = Device::flex();
    let config = LayerNormConfig::new(4).with_epsilon(0.5);
    let listed = NormalizationConfig::from(config.clone()).init(&device);
    let given = Normalization::from(config.init(&device));
    assert_eq!(listed.to_string(), given.to_string());
}
