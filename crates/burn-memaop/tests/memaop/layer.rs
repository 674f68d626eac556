//! The layer against the oracle and against Burn's own.

use burn::{
    module::{Module, Param},
    nn::{Linear, LinearConfig},
    tensor::{DType, Device, Tensor, activation::relu},
};
use burn_memaop::{AopConfig, MemAopLinear, OuterProducts};

use crate::{
    operation::methods,
    oracle::{Oracle, Policy},
    support::{Matrix, Random, bits, published},
};

/// Gradients of a layer for the upstream gradient `g`: of the input, the weight and the bias.
struct LayerGradients {
    input: Tensor<2>,
    weight: Tensor<2>,
    bias: Tensor<1>,
}

fn backward<const D: usize>(
    forward: impl Fn(Tensor<D>) -> Tensor<D>,
    weight: &Param<Tensor<2>>,
    bias: &Param<Tensor<1>>,
    shape: [usize; D],
    x: &Matrix,
    g: &Matrix,
) -> LayerGradients {
    let device = weight.device();
    let input = x.tensor(&device, DType::F32).require_grad();
    let output = forward(input.clone().reshape(shape));
    let output = output.reshape([g.rows(), g.columns()]);
    let grads = (output * g.tensor(&device, DType::F32)).sum().backward();
    LayerGradients {
        input: input.grad(&grads).unwrap(),
        weight: weight.grad(&grads).unwrap(),
        bias: bias.grad(&grads).unwrap(),
    }
}

fn layer(linear: &Linear, aop: AopConfig) -> MemAopLinear {
    MemAopLinear::from_linear(linear.clone(), aop)
}

pub fn layer_equals_the_oracle(device: &Device) {
    let mut random = Random(4);
    for (index, (policy, memory)) in methods().enumerate() {
        {
            let (n, p) = (7, 5);
            let linear = LinearConfig::new(n, p).init(device);
            let seed = index as u64;
            let aop = published()
                .with_outer_products(OuterProducts::Ratio(0.3))
                .with_method(policy.method(memory))
                .with_seed(seed);
            let layer = layer(&linear, aop);
            let mut oracle = Oracle::new(policy, memory, seed, n, p);

            macro_rules! step {
                ($shape:expr) => {{
                    let shape = $shape;
                    let m: usize = shape[..shape.len() - 1].iter().product();
                    let x = random.matrix(m, n);
                    let g = random.matrix(m, p);
                    let (weight, bias) = (&layer.weight, layer.bias.as_ref().unwrap());
                    let ours = backward(|x| layer.forward(x), weight, bias, shape, &x, &g);
                    let (weight, bias) = (&linear.weight, linear.bias.as_ref().unwrap());
                    let exact = backward(|x| linear.forward(x), weight, bias, shape, &x, &g);

                    let expected = match aop.outer_products.k(m).unwrap() {
                        k if k < m => oracle.step(&x, &g, k),
                        _ => Matrix::from_tensor(exact.weight),
                    };
                    let error = Matrix::from_tensor(ours.weight).relative_error(&expected);
                    assert!(error < 1e-5, "{policy:?} {memory:?} {shape:?}: {error:e}");

                    // At higher ranks the products are taken over all rows at once.
                    let error = Matrix::from_tensor(ours.input.clone())
                        .relative_error(&Matrix::from_tensor(exact.input.clone()));
                    assert!(error <= 1e-6, "{shape:?}: {error:e}");
                    if shape.len() <= 2 {
                        assert_eq!(bits(ours.input), bits(exact.input), "{shape:?}");
                    }
                    // The rows may be added up in another order.
                    let row = |bias: Tensor<1>| Matrix::from_tensor(bias.unsqueeze());
                    let error = row(ours.bias).relative_error(&row(exact.bias));
                    assert!(error <= 1e-6, "{shape:?}: {error:e}");
                }};
            }
            step!([13, n]);
            step!([4, 5, n]);
            step!([2, 3, 4, n]);
            step!([n]);
            step!([6, n]);
            step!([1, n]);
            assert_eq!(layer.memory_stats().step, oracle.step);
        }
    }
}

/// As below a masked loss: exact layers multiply rows of zeros too, as `Linear` does.
#[test]
fn exact_layers_are_linear_bit_for_bit_with_rows_of_zeros() {
    let device = Device::flex().autodiff();
    let mut random = Random(6);
    let (m, n, p) = (40, 30, 600);
    let linear = LinearConfig::new(n, p).init(&device);
    let all = published().with_outer_products(OuterProducts::Count(m));
    let layer = layer(&linear, all);
    let (x, mut g) = (random.matrix(m, n), random.matrix(m, p));
    (0..m)
        .filter(|row| row % 8 > 0)
        .for_each(|row| g.0[row] = vec![0.0; p]);
    let (weight, bias) = (&layer.weight, layer.bias.as_ref().unwrap());
    let ours = backward(|x| layer.forward(x), weight, bias, [m, n], &x, &g);
    let (weight, bias) = (&linear.weight, linear.bias.as_ref().unwrap());
    let exact = backward(|x| linear.forward(x), weight, bias, [m, n], &x, &g);
    assert_eq!(bits(ours.weight), bits(exact.weight));
    assert_eq!(bits(ours.input), bits(exact.input));
    assert_eq!(bits(ours.bias), bits(exact.bias));
}

pub fn k_equal_to_m_is_the_exact_gradient(device: &Device) {
    let mut random = Random(5);
    let (m, n, p) = (9, 6, 4);
    let linear = LinearConfig::new(n, p).init(device);
    for outer_products in [
        OuterProducts::Count(m),
        OuterProducts::Count(m + 1),
        OuterProducts::All,
    ] {
        let layer = layer(&linear, published().with_outer_products(outer_products));
        let (x, g) = (random.matrix(m, n), random.matrix(m, p));
        let (weight, bias) = (&layer.weight, layer.bias.as_ref().unwrap());
        let ours = backward(|x| layer.forward(x), weight, bias, [m, n], &x, &g);
        let (weight, bias) = (&linear.weight, linear.bias.as_ref().unwrap());
        let exact = backward(|x| linear.forward(x), weight, bias, [m, n], &x, &g);

        assert_eq!(bits(ours.weight), bits(exact.weight));
        assert_eq!(bits(ours.input), bits(exact.input));
        assert_eq!(bits(ours.bias), bits(exact.bias));
        let input = x.tensor(device, DType::F32);
        assert_eq!(
            bits(layer.forward(input.clone())),
            bits(linear.forward(input))
        );
        let stats = layer.memory_stats();
        assert_eq!(
            (stats.step, stats.rows),
            (0, 0),
            "the memory is not touched"
        );
    }
}

pub fn non_contiguous_input_is_handled(device: &Device) {
    let mut random = Random(6);
    let (m, n, p, k) = (10, 7, 3, 4);
    let aop = published().with_outer_products(OuterProducts::Count(k));
    let linear = LinearConfig::new(n, p).with_bias(false).init(device);
    let layer = layer(&linear, aop);
    let mut oracle = Oracle::new(Policy::TopK, aop.method.memory(), 0, n, p);
    for _ in 0..3 {
        let (x, g) = (random.matrix(m, n), random.matrix(m, p));
        let transpose = |matrix: &Matrix| {
            let mut other = Matrix::zeros(matrix.columns(), matrix.rows());
            for i in 0..matrix.rows() {
                for j in 0..matrix.columns() {
                    other.0[j][i] = matrix.0[i][j];
                }
            }
            other.tensor(device, DType::F32).transpose()
        };
        let grads = (layer.forward(transpose(&x)) * transpose(&g))
            .sum()
            .backward();
        let gradient = Matrix::from_tensor(layer.weight.grad(&grads).unwrap());
        let error = gradient.relative_error(&oracle.step(&x, &g, k));
        assert!(error < 1e-5, "{error:e}");
    }
}

pub fn frozen_weight_takes_no_step(device: &Device) {
    let mut random = Random(7);
    let (m, n, p) = (8, 4, 3);
    let linear = LinearConfig::new(n, p).init(device);
    let exact = linear.clone();
    let mut layer = layer(&linear, published());
    layer.weight = layer.weight.set_require_grad(false);

    let (x, g) = (random.matrix(m, n), random.matrix(m, p));
    let gradients = |forward: &dyn Fn(Tensor<2>) -> Tensor<2>, bias: &Param<Tensor<1>>| {
        let input = x.tensor(device, DType::F32).require_grad();
        let output = forward(input.clone());
        let grads = (output * g.tensor(device, DType::F32)).sum().backward();
        (
            bits(input.grad(&grads).unwrap()),
            bits(bias.grad(&grads).unwrap()),
        )
    };
    let ours = gradients(&|x| layer.forward(x), layer.bias.as_ref().unwrap());
    let expected = gradients(&|x| exact.forward(x), exact.bias.as_ref().unwrap());
    assert_eq!(ours, expected);
    assert_eq!(layer.memory_stats().step, 0);

    let frozen = layer.clone().no_grad();
    let input = x.tensor(device, DType::F32).require_grad();
    let grads = frozen.forward(input.clone()).sum().backward();
    assert!(input.grad(&grads).is_some());
    assert!(frozen.weight.grad(&grads).is_none());
    assert_eq!(frozen.memory_stats().step, 0);
}

pub fn recomputation_takes_no_step_of_its_own(device: &Device) {
    let mut random = Random(8);
    let (m, n, k) = (10, 6, 3);
    let aop = published().with_outer_products(OuterProducts::Count(k));
    let first = layer(&LinearConfig::new(n, n).init(device), aop);
    let second = layer(&LinearConfig::new(n, n).init(device), aop);
    for step in 1..=3 {
        let input = random.matrix(m, n).tensor(device, DType::F32);
        // Activations between the layers are memory bound, so they are computed again.
        let hidden = relu(first.forward(input)) * 2.0;
        let grads = relu(second.forward(hidden.clone() + 1.0)).sum().backward();
        assert!(first.weight.grad(&grads).is_some());
        assert_eq!(first.memory_stats().step, step);
        assert_eq!(second.memory_stats().step, step);
    }
}

#[test]
fn input_gradient_equals_finite_differences() {
    let device = Device::flex().autodiff();
    let mut random = Random(9);
    let (m, n, p) = (5, 4, 3);
    let aop = published().with_outer_products(OuterProducts::Count(1));
    let layer = layer(&LinearConfig::new(n, p).init(&device), aop);
    let x = random.matrix(m, n);
    let loss = |x: &Matrix| {
        let output = layer.forward(x.tensor(&device, DType::F32));
        (output.clone() * output).sum()
    };

    let input = x.tensor(&device, DType::F32).require_grad();
    let output = layer.forward(input.clone());
    let grads = (output.clone() * output).sum().backward();
    let analytic = Matrix::from_tensor(input.grad(&grads).unwrap());

    let mut numeric = Matrix::zeros(m, n);
    let h = 1.0 / 128.0;
    for i in 0..m {
        for j in 0..n {
            let at = |offset: f64| {
                let mut moved = x.clone();
                moved.0[i][j] += offset;
                f64::from(loss(&moved).into_scalar::<f32>())
            };
            numeric.0[i][j] = (at(h) - at(-h)) / (2.0 * h);
        }
    }
    // The loss is quadratic, so only rounding separates the two.
    let error = analytic.relative_error(&numeric);
    assert!(error < 1e-2, "{error:e}");
}

#[test]
fn the_layer_is_linear_in_inference() {
    let device = Device::flex();
    let linear = LinearConfig::new(6, 4).init(&device);
    let layer = layer(&linear, published());
    let mut random = Random(10);
    let input = random.matrix(12, 6).tensor(&device, DType::F32);
    assert_eq!(
        bits(layer.forward(input.clone())),
        bits(linear.forward(input))
    );
    assert_eq!(layer.memory_stats().step, 0);
}

/// As `Linear`, forward and backward. (On NdArray that divides by zero.)
#[test]
fn an_empty_batch_is_taken() {
    let device = &Device::flex().autodiff();
    let linear = LinearConfig::new(6, 4).init(device);
    let layer = layer(&linear, published());
    assert_eq!(
        layer
            .valid()
            .forward(Tensor::<2>::zeros([0, 6], &device.clone().inner()))
            .dims(),
        [0, 4]
    );
    let (x, g) = (
        Tensor::<2>::zeros([0, 6], device),
        Tensor::<2>::zeros([0, 4], device),
    );
    let gradients = |output: Tensor<2>, weight: &Param<Tensor<2>>, bias: &Param<Tensor<1>>| {
        let grads = (output * g.clone()).sum().backward();
        (
            bits(weight.grad(&grads).unwrap()),
            bits(bias.grad(&grads).unwrap()),
        )
    };
    let ours = gradients(
        layer.forward(x.clone()),
        &layer.weight,
        layer.bias.as_ref().unwrap(),
    );
    let exact = gradients(
        linear.forward(x),
        &linear.weight,
        linear.bias.as_ref().unwrap(),
    );
    assert_eq!(ours, exact);
    assert!(ours.0.iter().chain(&ours.1).all(|&bits| bits == 0));
    assert_eq!(layer.memory_stats().step, 0);
}

#[test]
fn an_empty_batch_of_a_higher_rank_is_taken() {
    let device = Device::flex().autodiff();
    let layer = layer(&LinearConfig::new(6, 4).init(&device), published());
    let output = layer.forward(Tensor::<3>::zeros([2, 0, 6], &device));
    assert_eq!(output.dims(), [2, 0, 4]);
}
