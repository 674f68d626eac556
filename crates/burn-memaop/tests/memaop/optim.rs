//! The layer under what Burn offers to train parameters: accumulation, clipping, groups, LoRA.

use burn::{
    grad_clipping::GradientClippingConfig,
    lr_scheduler::{constant::ConstantLr, module_lr_scheduler::ModuleLrScheduler},
    module::{Lora, Module, ModuleVisitor, Param, ParamGroup},
    nn::LinearConfig,
    optim::{AdamConfig, GradientsAccumulator, GradientsParams, SgdConfig},
    tensor::{DType, Device, Tensor},
};
use burn_memaop::{AopConfig, MemAopLinear, Memory, Method, OuterProducts};

use crate::{
    oracle::{Oracle, Policy},
    support::{Matrix, Random, published},
};

const M: usize = 14;
const N: usize = 6;
const P: usize = 4;
const K: usize = 5;
const MEMORY: Memory = Memory::Balanced { decay: 0.9 };

fn aop() -> AopConfig {
    published()
        .with_outer_products(OuterProducts::Count(K))
        .with_method(Method::TopK(MEMORY))
}

fn layer(device: &Device) -> MemAopLinear {
    let linear = LinearConfig::new(N, P).with_bias(false).init(device);
    MemAopLinear::from_linear(linear, aop())
}

/// A batch, and the gradients of `sum(g * layer(x))`.
fn backward(layer: &MemAopLinear, random: &mut Random) -> (Matrix, Matrix, GradientsParams) {
    let device = layer.weight.device();
    let (x, g) = (random.matrix(M, N), random.matrix(M, P));
    let output = layer.forward(x.tensor(&device, DType::F32));
    let loss = (output * g.tensor(&device, DType::F32)).sum();
    let grads = GradientsParams::from_grads(loss.backward(), layer);
    (x, g, grads)
}

fn weight(layer: &MemAopLinear) -> Matrix {
    Matrix::from_tensor(layer.weight.val().inner())
}

/// `a + factor b`.
fn plus(a: &Matrix, b: &Matrix, factor: f64) -> Matrix {
    let mut sum = a.clone();
    let pairs = sum.0.iter_mut().flatten().zip(b.0.iter().flatten());
    pairs.for_each(|(a, b)| *a += factor * b);
    sum
}

fn oracle() -> Oracle {
    Oracle::new(Policy::TopK, MEMORY, 0, N, P)
}

#[test]
fn accumulated_gradients_are_the_sum_of_consecutive_steps() {
    let device = Device::flex().autodiff();
    let (mut layer, mut oracle) = (layer(&device), oracle());
    let mut random = Random(61);
    let mut accumulator = GradientsAccumulator::new();
    let mut optimizer = SgdConfig::new().init();
    for _ in 0..2 {
        let mut expected = weight(&layer);
        for _ in 0..3 {
            let (x, g, grads) = backward(&layer, &mut random);
            accumulator.accumulate(&layer, grads);
            expected = plus(&expected, &oracle.step(&x, &g, K), -0.1);
        }
        layer = optimizer.step(0.1, layer, accumulator.grads());
        let error = weight(&layer).relative_error(&expected);
        assert!(error < 1e-5, "{error:e}");
    }
    assert_eq!(layer.memory_stats().step, 6);
}

#[test]
fn a_clipped_gradient_is_the_approximate_one_shortened() {
    let device = Device::flex().autodiff();
    let (mut layer, mut oracle) = (layer(&device), oracle());
    let mut random = Random(62);
    let clipping = GradientClippingConfig::Norm(0.5);
    let mut optimizer = SgdConfig::new()
        .with_gradient_clipping(Some(clipping))
        .init();
    for _ in 0..3 {
        let (x, g, grads) = backward(&layer, &mut random);
        let gradient = oracle.step(&x, &g, K);
        let norm = gradient
            .0
            .iter()
            .flatten()
            .map(|v| v * v)
            .sum::<f64>()
            .sqrt();
        assert!(norm > 0.5, "it is clipped");
        let expected = plus(&weight(&layer), &gradient, -0.1 * 0.5 / norm);
        layer = optimizer.step(0.1, layer, grads);
        let error = weight(&layer).relative_error(&expected);
        assert!(error < 1e-5, "{error:e}");
    }
}

#[derive(Module, Debug)]
struct Pair {
    first: MemAopLinear,
    second: MemAopLinear,
}

#[test]
fn groups_have_learning_rates_of_their_own() {
    let device = Device::flex().autodiff();
    let square = || {
        let linear = LinearConfig::new(N, N).with_bias(false).init(&device);
        MemAopLinear::from_linear(linear, aop())
    };
    let pair = Pair {
        first: square(),
        second: square(),
    };
    let groups = ParamGroup::from_path("second.weight");
    let mut rates =
        ModuleLrScheduler::new(ConstantLr::new(0.1)).with_group(groups, ConstantLr::new(0.0));
    let x = Random(63).matrix(M, N).tensor(&device, DType::F32);
    let loss = pair.second.forward(pair.first.forward(x)).square().sum();
    let grads = GradientsParams::from_grads(loss.backward(), &pair);
    let before = [weight(&pair.first), weight(&pair.second)];
    let pair = SgdConfig::new().init().step(rates.step(), pair, grads);
    let after = [weight(&pair.first), weight(&pair.second)];
    assert_ne!(before[0], after[0]);
    assert_eq!(before[1], after[1]);
}

#[test]
fn a_frozen_layer_takes_no_step_until_it_is_thawed() {
    let device = Device::flex().autodiff();
    let frozen = layer(&device).freeze();
    let input = || {
        Random(64)
            .matrix(M, N)
            .tensor(&device, DType::F32)
            .require_grad()
    };
    frozen.forward(input()).sum().backward();
    assert_eq!(frozen.memory_stats().step, 0);
    let thawed = frozen.unfreeze();
    thawed.forward(input()).sum().backward();
    assert_eq!(thawed.memory_stats().step, 1);
}

/// The factors of the adapter, by their paths.
#[derive(Default)]
struct Factors {
    path: Vec<String>,
    a: Option<Param<Tensor<2>>>,
    b: Option<Param<Tensor<2>>>,
}

impl ModuleVisitor for Factors {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let values = param.val().into_data();
        let keep = || {
            let shape: [usize; 2] = param.dims()[..].try_into().expect("a matrix");
            let tensor = Tensor::<2>::from_data(values.clone(), &param.device()).reshape(shape);
            Some(Param::initialized(param.id, tensor))
        };
        match self.path.last().map(String::as_str) {
            Some("a") => self.a = keep(),
            Some("b") => self.b = keep(),
            _ => {}
        }
    }

    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }
}

fn factors(layer: &MemAopLinear) -> [Param<Tensor<2>>; 2] {
    let mut factors = Factors::default();
    layer.visit(&mut factors);
    [factors.a.expect("adapted"), factors.b.expect("adapted")]
}

fn product(a: &Matrix, b: &Matrix, transpose_a: bool, transpose_b: bool) -> Matrix {
    let at = |m: &Matrix, t: bool, i: usize, j: usize| if t { m.0[j][i] } else { m.0[i][j] };
    let rows = if transpose_a { a.columns() } else { a.rows() };
    let inner = if transpose_a { a.rows() } else { a.columns() };
    let columns = if transpose_b { b.rows() } else { b.columns() };
    let mut product = Matrix::zeros(rows, columns);
    for i in 0..rows {
        for j in 0..columns {
            product.0[i][j] = (0..inner)
                .map(|k| at(a, transpose_a, i, k) * at(b, transpose_b, k, j))
                .sum();
        }
    }
    product
}

#[test]
fn lora_factors_get_the_approximate_gradient_of_the_adapted_weight() {
    let device = Device::flex().autodiff();
    let (rank, alpha) = (2, 4.0);
    let mut layer = layer(&device).apply_lora(Lora::new(rank, alpha));
    let scale = alpha / rank as f64;
    let mut oracle = oracle();
    let mut random = Random(65);
    let mut optimizer = AdamConfig::new().init();
    for step in 0..3 {
        let [a, b] = factors(&layer);
        let (x, g, grads) = backward(&layer, &mut random);
        let gradient = oracle.step(&x, &g, K);
        let values = [&a, &b].map(|factor| Matrix::from_tensor(factor.val()));
        let expected = [
            product(&gradient, &values[1], false, true),
            product(&values[0], &gradient, true, false),
        ];
        for (factor, expected) in [a, b].iter().zip(expected) {
            let found = Matrix::from_tensor(grads.get::<2>(factor.id).expect("it is trained"));
            let expected = plus(
                &Matrix::zeros(expected.rows(), expected.columns()),
                &expected,
                scale,
            );
            let error = found.relative_error(&expected);
            assert!(error < 1e-5, "step {step}: {error:e}");
        }
        assert!(
            grads.get::<2>(layer.weight.id).is_none(),
            "the base is frozen"
        );
        layer = optimizer.step(0.01, layer, grads);
    }
    assert_eq!(layer.memory_stats().step, 3);
}
