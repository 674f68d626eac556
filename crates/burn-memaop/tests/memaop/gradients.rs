//! Gradients and memory against the oracle and against Burn's own layer.

use burn::{
    backend::Dispatch,
    module::{Module, Param},
    nn::{Linear, LinearConfig},
    tensor::{DType, Device, Tensor, activation::relu},
};
use burn_memaop::{
    AopConfig, AopStep, Bias, MemAopLinear, MemAopOps, Memory, MemoryPrecision, OuterProducts, Policy, RowMemory,
};

use crate::{
    oracle::Oracle,
    support::{Matrix, Random, bits, published},
};

const BIASED: [Policy; 3] = [Policy::TopK, Policy::RandK, Policy::WeightedK];
const UNBIASED: [Policy; 5] = [
    Policy::ScaledRandK,
    Policy::Systematic,
    Policy::Bernoulli,
    Policy::ColumnRow,
    Policy::WinnerTakeAll,
];
const MEMORIES: [Memory; 5] = [
    Memory::None,
    Memory::Published { decay: 1.0 },
    Memory::Published { decay: 0.7 },
    Memory::Balanced { decay: 1.0 },
    Memory::Balanced { decay: 0.9 },
];

/// Every policy with every memory that it takes.
fn methods() -> impl Iterator<Item = (Policy, Memory)> {
    let biased = BIASED
        .into_iter()
        .flat_map(|policy| MEMORIES.map(|memory| (policy, memory)));
    biased.chain(UNBIASED.map(|policy| (policy, Memory::None)))
}

/// The operation of the crate, called on plain tensors, with its memory between steps.
struct Operation {
    policy: Policy,
    memory: Memory,
    precision: MemoryPrecision,
    seed: u64,
    step: u64,
    rows: Option<(Tensor<2>, Tensor<2>)>,
    /// The gradient of the bias from the last step.
    bias: Option<Tensor<1>>,
}

impl Operation {
    fn new(policy: Policy, memory: Memory, seed: u64) -> Self {
        Self {
            policy,
            memory,
            precision: MemoryPrecision::Full,
            seed,
            step: 0,
            rows: None,
            bias: None,
        }
    }

    fn step(&mut self, input: Tensor<2>, grad: Tensor<2>, k: usize) -> Tensor<2> {
        let memory = match self.rows.take() {
            None => RowMemory::<Dispatch>::Empty,
            Some((input, grad)) => RowMemory::Rows {
                input: input.into_dispatch(),
                grad: grad.into_dispatch(),
            },
        };
        let step = AopStep {
            k,
            policy: self.policy,
            memory: self.memory,
            memory_precision: self.precision,
            seed: self.seed,
            step: self.step,
            bias: true,
            measure: false,
        };
        let gradient = Dispatch::memaop_weight_gradient(
            input.into_dispatch(),
            grad.into_dispatch(),
            memory,
            step,
        );
        self.step += 1;
        if let RowMemory::Rows { input, grad } = gradient.memory {
            self.rows = Some((Tensor::from_dispatch(input), Tensor::from_dispatch(grad)));
        }
        if let Bias::Some(bias) = gradient.bias {
            self.bias = Some(Tensor::from_dispatch(bias));
        }
        Tensor::from_dispatch(gradient.weight)
    }

    fn memory(&self) -> Option<(Matrix, Matrix)> {
        let (input, grad) = self.rows.clone()?;
        Some((Matrix::from_tensor(input), Matrix::from_tensor(grad)))
    }
}

/// The operation and the oracle, step by step.
struct Comparison<'a> {
    device: &'a Device,
    dtype: DType,
    tolerance: f64,
    operation: Operation,
    oracle: Oracle,
}

impl Comparison<'_> {
    fn step(&mut self, x: &Matrix, g: &Matrix, k: usize) {
        let (device, dtype) = (self.device, self.dtype);
        let (m, n, p) = (x.rows(), x.columns(), g.columns());
        let Operation {
            policy,
            memory,
            step,
            ..
        } = self.operation;
        let context = format!("{policy:?} {memory:?} {dtype:?} step {step}: {m} {n} {p}, {k}");

        let (input, grad) = (x.tensor(device, dtype), g.tensor(device, dtype));
        let gradient = self.operation.step(input, grad, k);
        assert_eq!(gradient.dtype(), dtype);
        let error = Matrix::from_tensor(gradient).relative_error(&self.oracle.step(x, g, k));
        assert!(error < self.tolerance, "gradient {error:e}: {context}");

        let sums = (0..p).map(|j| g.0.iter().map(|row| row[j]).sum::<f64>());
        let bias = self.operation.bias.take().expect("it was asked for");
        assert_eq!(bias.dtype(), dtype);
        let bias = Matrix::from_tensor(bias.unsqueeze());
        let error = bias.relative_error(&Matrix(vec![sums.collect()]));
        assert!(error < 10.0 * self.tolerance, "bias {error:e}: {context}");

        match self.operation.memory() {
            None => assert_eq!(memory, Memory::None, "{context}"),
            Some((input, grad)) => {
                let errors = [
                    input.relative_error(&self.oracle.input),
                    grad.relative_error(&self.oracle.grad),
                ];
                // The memory is kept in single precision at least.
                let tolerance = if dtype == DType::F64 { 1e-13 } else { 1e-6 };
                assert!(
                    errors.iter().all(|&error| error < tolerance),
                    "memory {errors:?}: {context}"
                );
            }
        }
    }
}

/// Several consecutive steps, with batches that shrink and grow.
fn compare(
    device: &Device,
    dtype: DType,
    tolerance: f64,
    policy: Policy,
    memory: Memory,
    random: &mut Random,
    largest: usize,
) {
    let (n, p) = (2 * random.range(0, 16) + 1, 2 * random.range(0, 16) + 1);
    let seed = random.range(0, 1 << 40) as u64;
    let mut comparison = Comparison {
        device,
        dtype,
        tolerance,
        operation: Operation::new(policy, memory, seed),
        oracle: Oracle::new(policy, memory, seed, n, p),
    };
    for step in 0..4 {
        let m = random.range(2, largest);
        let k = match step {
            0 => m - 1,
            1 => 1,
            _ => random.range(1, m - 1),
        };
        let x = random.matrix(m, n).rounded(dtype);
        let g = random.matrix(m, p).rounded(dtype);
        comparison.step(&x, &g, k);
    }
}

/// As after a cast of the module: the memory of the steps before has the other dtype.
pub fn a_change_of_precision_keeps_the_memory(device: &Device) {
    if !device.supports_dtype(DType::F64) {
        eprintln!("skipped: {device:?} does not support F64");
        return;
    }
    let mut random = Random(12);
    let (m, n, p, k) = (20, 7, 5, 4);
    for memory in [
        Memory::Published { decay: 1.0 },
        Memory::Balanced { decay: 0.9 },
    ] {
        let mut operation = Operation::new(Policy::TopK, memory, 3);
        let mut oracle = Oracle::new(Policy::TopK, memory, 3, n, p);
        for dtype in [DType::F32, DType::F64, DType::F32] {
            let (x, g) = (random.matrix(m, n), random.matrix(m, p));
            let gradient = operation.step(x.tensor(device, dtype), g.tensor(device, dtype), k);
            assert_eq!(gradient.dtype(), dtype);
            let error = Matrix::from_tensor(gradient).relative_error(&oracle.step(&x, &g, k));
            assert!(error < 1e-5, "{memory:?} {dtype:?}: {error:e}");
        }
    }
}

/// Large enough to be split among cores.
pub fn large_batches_equal_the_oracle(device: &Device) {
    let mut random = Random(11);
    let (n, p) = (65, 33);
    for (policy, memory) in [
        (Policy::TopK, Memory::Balanced { decay: 0.9 }),
        (Policy::WeightedK, Memory::Published { decay: 1.0 }),
        (Policy::Systematic, Memory::None),
    ] {
        let mut comparison = Comparison {
            device,
            dtype: DType::F32,
            tolerance: 1e-5,
            operation: Operation::new(policy, memory, 3),
            oracle: Oracle::new(policy, memory, 3, n, p),
        };
        for (m, k) in [(4097, 513), (4000, 1), (4097, 4096)] {
            comparison.step(&random.matrix(m, n), &random.matrix(m, p), k);
        }
    }
}

pub fn operation_equals_the_oracle(device: &Device) {
    let mut random = Random(1);
    for (policy, memory) in methods() {
        for largest in [2, 3, 65, 257] {
            compare(
                device,
                DType::F32,
                1e-5,
                policy,
                memory,
                &mut random,
                largest,
            );
        }
    }
}

pub fn half_and_double_precision_equal_the_oracle(device: &Device) {
    let mut random = Random(2);
    for (dtype, tolerance) in [(DType::F64, 1e-13), (DType::F16, 2e-3), (DType::BF16, 2e-2)] {
        if !device.supports_dtype(dtype) {
            eprintln!("skipped: {device:?} does not support {dtype:?}");
            continue;
        }
        for (policy, memory) in methods() {
            compare(device, dtype, tolerance, policy, memory, &mut random, 65);
        }
    }
}

pub fn equal_seeds_draw_the_rows_of_the_oracle(device: &Device) {
    // Equal factors: the scores are equal, and only the noise decides.
    let (m, k) = (100, 7);
    let ones = Matrix(vec![vec![1.0]; m]);
    let numbered = Matrix((0..m).map(|row| vec![(row + 1) as f64]).collect());
    let mut operation = Operation::new(Policy::RandK, Memory::Published { decay: 1.0 }, 11);
    let mut oracle = Oracle::new(Policy::RandK, Memory::Published { decay: 1.0 }, 11, 1, 1);
    for _ in 0..10 {
        operation.step(
            ones.tensor(device, DType::F32),
            numbered.tensor(device, DType::F32),
            k,
        );
        oracle.step(&ones, &numbered, k);
        let (input, grad) = operation.memory().unwrap();
        assert_eq!((input, grad), (oracle.input.clone(), oracle.grad.clone()));
    }
}

pub fn rows_that_are_not_finite_are_left_out(device: &Device) {
    let mut random = Random(3);
    let (m, n, p) = (12, 5, 3);
    let memories = [
        Memory::Published { decay: 1.0 },
        Memory::Balanced { decay: 1.0 },
    ];
    let methods = BIASED.map(|policy| memories.map(|memory| (policy, memory)));
    for (policy, memory) in methods.concat() {
        let mut operation = Operation::new(policy, memory, 5);
        let clean = |random: &mut Random| (random.matrix(m, n), random.matrix(m, p));

        let (mut x, mut g) = clean(&mut random);
        x.0[2][1] = f64::NAN;
        x.0[5][0] = f64::INFINITY;
        g.0[7][2] = f64::NEG_INFINITY;
        // All rows but one are asked for, so broken ones are among the chosen.
        let gradient = operation.step(
            x.tensor(device, DType::F32),
            g.tensor(device, DType::F32),
            m - 1,
        );
        let gradient = Matrix::from_tensor(gradient);
        assert!(
            gradient.0.iter().flatten().all(|value| value.is_finite()),
            "{policy:?}"
        );

        let (input, grad) = operation.memory().unwrap();
        let kept: Vec<_> = (0..m)
            .filter(|&row| input.0[row].iter().any(|&value| value != 0.0))
            .collect();
        let broken = [2, 5, 7];
        assert!(kept.iter().all(|row| !broken.contains(row)), "{policy:?}");
        assert!(
            input
                .0
                .iter()
                .chain(&grad.0)
                .flatten()
                .all(|v| v.is_finite())
        );

        // What the gradient lacks of the exact one over the sound rows is what was kept.
        let mut sound = Matrix::zeros(n, p);
        for row in (0..m).filter(|row| !broken.contains(row) && !kept.contains(row)) {
            for a in 0..n {
                for b in 0..p {
                    sound.0[a][b] += x.0[row][a] * g.0[row][b];
                }
            }
        }
        assert!(gradient.relative_error(&sound) < 1e-5, "{policy:?}");

        // The next step is as sound as any.
        let (x, g) = clean(&mut random);
        let gradient = operation.step(
            x.tensor(device, DType::F32),
            g.tensor(device, DType::F32),
            m / 2,
        );
        let gradient = Matrix::from_tensor(gradient);
        assert!(gradient.0.iter().flatten().all(|value| value.is_finite()));
    }
}

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
                .with_outer_products(OuterProducts::Ratio {
                    ratio: 0.3,
                    minimum: 2,
                })
                .with_policy(policy)
                .with_memory(memory)
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

                    let expected = match aop.outer_products.k(m) {
                        k if k < m => oracle.step(&x, &g, k),
                        _ => Matrix::from_tensor(exact.weight),
                    };
                    let error = Matrix::from_tensor(ours.weight).relative_error(&expected);
                    assert!(error < 1e-5, "{policy:?} {memory:?} {shape:?}: {error:e}");

                    assert_eq!(bits(ours.input), bits(exact.input), "{shape:?}");
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

pub fn k_equal_to_m_is_the_exact_gradient(device: &Device) {
    let mut random = Random(5);
    let (m, n, p) = (9, 6, 4);
    let linear = LinearConfig::new(n, p).init(device);
    for outer_products in [
        OuterProducts::Count(m),
        OuterProducts::Count(m + 1),
        OuterProducts::Ratio {
            ratio: 1.0,
            minimum: 1,
        },
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
    let mut oracle = Oracle::new(Policy::TopK, aop.memory, 0, n, p);
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
