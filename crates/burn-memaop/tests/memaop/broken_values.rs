//! Faults that are known and not mended yet. Each test asserts what is right and is marked as failing; who mends the
//! fault removes the mark, and the tests elsewhere that say the opposite.

use burn::{
    module::Param,
    tensor::{DType, Device, Tensor},
};
use burn_memaop::{AopConfig, MemAopLinear, OuterProducts};

use crate::support::{Matrix, Random, linear};

const INPUTS: usize = 5;
const OUTPUTS: usize = 3;

/// The gradient of the weights of a layer that takes `k` rows of `x` and `g`.
fn weight_gradient(x: &Matrix, g: &Matrix, k: usize, dtype: DType) -> Vec<f64> {
    let device = Device::flex().autodiff();
    let aop = AopConfig::new()
        .with_outer_products(OuterProducts::Count(k))
        .with_cost_rule(false);
    let mut linear = linear(&mut Random(91), INPUTS, OUTPUTS, &device);
    linear.weight = Param::from_tensor(linear.weight.val().cast(dtype).detach());
    linear.bias = None;
    let layer = MemAopLinear::from_linear(linear, aop);
    let output = layer.forward(x.tensor(&device, dtype));
    let grads = (output * g.tensor(&device, dtype)).sum().backward();
    let gradient: Tensor<2> = layer.weight.val().grad(&grads).unwrap();
    gradient.into_data().iter::<f64>().collect()
}

/// `Linear` gives NaN here, and who scales the loss, or skips a step, looks for it.
#[test]
#[should_panic(expected = "a NaN of the batch is not in its gradient")]
fn a_nan_is_in_the_gradient() {
    let mut random = Random(92);
    let (x, mut g) = (random.matrix(64, INPUTS), random.matrix(64, OUTPUTS));
    g.0[17][1] = f64::NAN;
    let gradient = weight_gradient(&x, &g, 8, DType::F32);
    assert!(
        gradient.iter().any(|value| !value.is_finite()),
        "a NaN of the batch is not in its gradient: {gradient:?}"
    );
}

#[test]
#[should_panic(expected = "rows whose squares underflow are dropped")]
fn rows_whose_squares_underflow_count() {
    let mut random = Random(93);
    let (x, mut g) = (random.matrix(64, INPUTS), random.matrix(64, OUTPUTS));
    g.0.iter_mut().flatten().for_each(|value| *value *= 1e-25);
    let gradient = weight_gradient(&x, &g, 8, DType::F32);
    assert!(
        gradient.iter().any(|value| *value != 0.0),
        "rows whose squares underflow are dropped"
    );
}

/// Each value of the gradient is 1,024 · 3000 · 0.001, which half precision holds.
#[test]
#[should_panic(expected = "a row that stands for many overflows")]
fn a_row_that_stands_for_many_does_not_overflow() {
    let x = Matrix(vec![vec![3000.0; INPUTS]; 1024]);
    let g = Matrix(vec![vec![1e-3; OUTPUTS]; 1024]);
    let gradient = weight_gradient(&x, &g, 1, DType::F16);
    assert!(
        gradient
            .iter()
            .all(|value| (value / 3072.0 - 1.0).abs() < 1e-2),
        "a row that stands for many overflows: {gradient:?}"
    );
}
