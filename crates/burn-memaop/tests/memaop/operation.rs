//! The operation against the oracle.

use burn::tensor::{DType, Device, Tensor};
use burn_memaop::{
    Memory, Method,
    op::{AopStep, Rows, weight_gradient},
};

use crate::{
    oracle::{Oracle, Policy},
    support::{Matrix, Random},
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
pub fn methods() -> impl Iterator<Item = (Policy, Memory)> {
    let biased = BIASED
        .into_iter()
        .flat_map(|policy| MEMORIES.map(|memory| (policy, memory)));
    biased.chain(UNBIASED.map(|policy| (policy, Memory::None)))
}

/// The operation of the crate, called on plain tensors, with its memory between steps.
struct Operation {
    policy: Policy,
    memory: Memory,
    seed: u64,
    step: u64,
    rows: Option<Rows>,
}

impl Operation {
    fn new(policy: Policy, memory: Memory, seed: u64) -> Self {
        Self {
            policy,
            memory,
            seed,
            step: 0,
            rows: None,
        }
    }

    fn step(&mut self, input: Tensor<2>, grad: Tensor<2>, k: usize) -> Tensor<2> {
        let step = AopStep {
            k,
            method: self.policy.method(self.memory),
            seed: self.seed,
            step: self.step,
        };
        let gradient = weight_gradient(input, grad, self.rows.take(), step);
        self.step += 1;
        self.rows = gradient.memory;
        gradient.weight
    }

    fn memory(&self) -> Option<[Matrix; 3]> {
        let Rows { input, grad, age } = self.rows.clone()?;
        Some([input, grad, age].map(Matrix::from_tensor))
    }
}

/// The operation and the oracle, step by step.
struct Comparison<'a> {
    device: &'a Device,
    dtype: DType,
    tolerance: f64,
    memory_tolerance: f64,
    operation: Operation,
    oracle: Oracle,
}

impl<'a> Comparison<'a> {
    /// In single precision.
    fn new(device: &'a Device, policy: Policy, memory: Memory, n: usize, p: usize) -> Self {
        let seed = 3;
        Self {
            device,
            dtype: DType::F32,
            tolerance: 1e-5,
            memory_tolerance: 1e-6,
            operation: Operation::new(policy, memory, seed),
            oracle: Oracle::new(policy, memory, seed, n, p),
        }
    }

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

        match self.operation.memory() {
            None => assert_eq!(memory, Memory::None, "{context}"),
            Some([input, grad, age]) => {
                let ages: Vec<f64> = self.oracle.age.clone();
                assert_eq!(age.0.concat(), ages, "{context}");
                let errors = [
                    input.relative_error(&self.oracle.input),
                    grad.relative_error(&self.oracle.grad),
                ];
                assert!(
                    errors.iter().all(|&error| error < self.memory_tolerance),
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
    let mut comparison = Comparison::new(device, policy, memory, n, p);
    comparison.dtype = dtype;
    comparison.tolerance = tolerance;
    // The memory is kept in single precision at least.
    if dtype == DType::F64 {
        comparison.memory_tolerance = 1e-13;
    }
    comparison.operation.seed = seed;
    comparison.oracle.seed = seed;
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

/// As below a layer that computes some rows of the gradient of its input: fewer rows hold something
/// than are asked for.
pub fn rows_of_zeros_add_nothing(device: &Device) {
    let mut random = Random(13);
    let (m, n, p) = (48, 9, 5);
    for (policy, memory) in methods() {
        let mut comparison = Comparison::new(device, policy, memory, n, p);
        let zeroed = |g: &mut Matrix, step: usize| {
            let zero = (0..m).filter(|row| !(row + step).is_multiple_of(5));
            zero.for_each(|row| g.0[row] = vec![0.0; p]);
        };
        for step in 0..3 {
            let (x, mut g) = (random.matrix(m, n), random.matrix(m, p));
            zeroed(&mut g, step);
            comparison.step(&x, &g, m / 2);
        }
    }
}

/// Sizes around those at which kernels work in another way, K from 1 to M - 1.
pub fn batches_of_every_size_equal_the_oracle(device: &Device) {
    let mut random = Random(11);
    for m in [1, 2, 63, 64, 65, 1000, 4097usize] {
        // Odd widths, and widths that fit wide registers.
        for (n, p) in [(5, 3), (8, 12)] {
            for (policy, memory) in methods() {
                let mut comparison = Comparison::new(device, policy, memory, n, p);
                for k in [m.div_ceil(8), 1, (m - 1).max(1)] {
                    // The oracle takes K M steps to choose rows with weights.
                    if k * m > 1 << 20 && UNBIASED.contains(&policy) && policy != Policy::Systematic
                    {
                        continue;
                    }
                    comparison.step(&random.matrix(m, n), &random.matrix(m, p), k);
                }
            }
        }
    }
}

/// As the gradient of `sum(x * linear(x))` has it: one buffer holds both factors.
pub fn one_tensor_as_both_factors(device: &Device) {
    let mut random = Random(15);
    let (m, n, k) = (40, 8, 9);
    for (policy, memory) in methods() {
        let mut operation = Operation::new(policy, memory, 3);
        let mut oracle = Oracle::new(policy, memory, 3, n, n);
        for _ in 0..2 {
            let x = random.matrix(m, n);
            let tensor = x.tensor(device, DType::F32);
            let gradient = Matrix::from_tensor(operation.step(tensor.clone(), tensor, k));
            let error = gradient.relative_error(&oracle.step(&x, &x, k));
            assert!(error < 1e-5, "{policy:?} {memory:?}: {error:e}");
        }
    }
}

/// Large enough to be split among cores, wide enough for units to take turns.
pub fn large_batches_equal_the_oracle(device: &Device) {
    let mut random = Random(11);
    let methods = [
        (Policy::TopK, Memory::Balanced { decay: 0.9 }),
        (Policy::RandK, Memory::Published { decay: 1.0 }),
        (Policy::WeightedK, Memory::Published { decay: 1.0 }),
        (Policy::Systematic, Memory::None),
    ];
    for (policy, memory) in methods {
        for (m, k, n, p, steps) in [
            (2000, 250, 65, 33, 2),
            (40, 9, 600, 1100, 2),
            (100_000, 200, 3, 2, 1),
        ] {
            let mut comparison = Comparison::new(device, policy, memory, n, p);
            for _ in 0..steps {
                comparison.step(&random.matrix(m, n), &random.matrix(m, p), k);
            }
        }
    }
}

/// Scores of many kinds, of as many rows as one block of units takes and of more: some with places left over.
pub fn draws_of_many_rows_equal_the_oracle(device: &Device) {
    let mut random = Random(17);
    let even = |_: usize| 1.0;
    // Of which rows become certain one after the other, so that the search for the probabilities takes many rounds.
    let steep = |row: usize| match row % 50 {
        7 => 0.8f64.powi((row / 50) as i32),
        _ => 1e-4,
    };
    let few = |row: usize| f64::from(row % 300 == 11);
    let one = |row: usize| if row == 1234 { 1e4 } else { 1.0 };
    let kinds: [(&str, &dyn Fn(usize) -> f64); 4] = [
        ("even", &even),
        ("steep", &steep),
        ("few", &few),
        ("one", &one),
    ];
    for (name, size) in kinds {
        for (m, k) in [
            (2000, 60),
            (2048, 301),
            (2049, 300),
            (5000, 80),
            (20_000, 500),
        ] {
            let (mut x, mut g) = (random.matrix(m, 2), Matrix::zeros(m, 1));
            for row in 0..m {
                let scale = size(row) / x.0[row].iter().map(|v| v * v).sum::<f64>().sqrt();
                x.0[row]
                    .iter_mut()
                    .for_each(|v| *v = f64::from((*v * scale) as f32));
                g.0[row][0] = 1.0 + 0.5 * random.value();
            }
            let seed = random.range(0, 1 << 40) as u64;
            let mut oracle = Oracle::new(Policy::Systematic, Memory::None, seed, 2, 1);
            let expected = oracle.step(&x, &g, k);
            let step = AopStep {
                k,
                method: Method::Systematic,
                seed,
                step: 0,
            };
            let [x, g] = [&x, &g].map(|matrix| matrix.tensor(device, DType::F32));
            let found = weight_gradient(x, g, None, step);
            let error = Matrix::from_tensor(found.weight).relative_error(&expected);
            assert!(error < 1e-4, "{name} {m} {k}: {error:e}");
        }
    }
}

/// Of many rows.
pub fn the_largest_of_many_rows_equal_the_oracle(device: &Device) {
    let mut random = Random(18);
    for (m, k) in [(2048, 300), (2049, 300), (20_000, 2500)] {
        for policy in [Policy::TopK, Policy::RandK, Policy::WeightedK] {
            let (x, g) = (random.matrix(m, 3), random.matrix(m, 2));
            let mut oracle = Oracle::new(policy, Memory::None, 5, 3, 2);
            let expected = oracle.step(&x, &g, k);
            let step = AopStep {
                k,
                method: policy.method(Memory::None),
                seed: 5,
                step: 0,
            };
            let [x, g] = [&x, &g].map(|matrix| matrix.tensor(device, DType::F32));
            let found = weight_gradient(x, g, None, step);
            let error = Matrix::from_tensor(found.weight).relative_error(&expected);
            assert!(error < 1e-4, "{policy:?} {m} {k}: {error:e}");
        }
    }
}

pub fn ten_steps_leave_the_memory_of_the_oracle(device: &Device) {
    let mut random = Random(13);
    let (m, n, p, k) = (130, 33, 20, 17);
    for (policy, memory) in methods() {
        let mut comparison = Comparison::new(device, policy, memory, n, p);
        for _ in 0..10 {
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
        let [input, grad, _] = operation.memory().unwrap();
        assert_eq!((input, grad), (oracle.input.clone(), oracle.grad.clone()));
    }
}
