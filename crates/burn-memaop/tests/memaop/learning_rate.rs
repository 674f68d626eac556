//! The published algorithm under a learning rate that changes, in its own units.

use burn::{
    module::Module,
    nn::LinearConfig,
    tensor::{DType, Device, Tensor},
};
use burn_memaop::{MemAopLinear, Memory, Method, OuterProducts, SharedLearningRate};

use crate::support::{Matrix, Random, published};

const M: usize = 12;
const N: usize = 5;
const P: usize = 3;
const K: usize = 4;

/// The algorithm as the paper writes it: memories of rows times the root of the learning rate.
struct Published {
    weight: Matrix,
    input: Matrix,
    grad: Matrix,
}

impl Published {
    fn step(&mut self, x: &Matrix, g: &Matrix, eta: f64) {
        let root = eta.sqrt();
        let mut sizes = Vec::new();
        for m in 0..M {
            for j in 0..N {
                self.input.0[m][j] += root * x.0[m][j];
            }
            for j in 0..P {
                self.grad.0[m][j] += root * g.0[m][j];
            }
            let square = |row: &[f64]| row.iter().map(|v| v * v).sum::<f64>();
            sizes.push((square(&self.input.0[m]) * square(&self.grad.0[m]), m));
        }
        sizes.sort_by(|a, b| b.0.total_cmp(&a.0));
        for &(_, m) in &sizes[..K] {
            for a in 0..N {
                for b in 0..P {
                    self.weight.0[a][b] -= self.input.0[m][a] * self.grad.0[m][b];
                }
            }
            self.input.0[m] = vec![0.0; N];
            self.grad.0[m] = vec![0.0; P];
        }
    }
}

/// The relative distance of the weights after some steps from those of the algorithm, with the
/// layer's gradient applied by plain SGD.
fn distance(follow: bool, decay: f64) -> f64 {
    let device = Device::flex().autodiff();
    let aop = published()
        .with_outer_products(OuterProducts::Count(K))
        .with_method(Method::TopK(Memory::Published { decay }));
    let linear = LinearConfig::new(N, P).with_bias(false).init(&device);
    let mut layer = MemAopLinear::from_linear(linear, aop);
    let rate = SharedLearningRate::new();
    if follow {
        rate.attach(&layer);
    }
    let mut reference = Published {
        weight: Matrix::from_tensor(layer.weight.val().inner()),
        input: Matrix::zeros(M, N),
        grad: Matrix::zeros(M, P),
    };
    let mut random = Random(41);
    for step in 0..20 {
        let eta = [0.1, 0.1, 0.03, 0.3, 0.01][step % 5];
        let (x, g) = (random.matrix(M, N), random.matrix(M, P));
        rate.set(eta).unwrap();
        let output = layer.forward(x.tensor(&device, DType::F32));
        let grads = (output * g.tensor(&device, DType::F32)).sum().backward();
        let gradient = layer.weight.grad(&grads).unwrap();
        let weight = layer.weight.val().inner() - gradient * eta;
        let weight = Tensor::from_inner(weight).require_grad();
        layer.weight = layer.weight.map(|_| weight);
        reference.step(&x, &g, eta);
    }
    Matrix::from_tensor(layer.weight.val().inner()).relative_error(&reference.weight)
}

#[test]
fn a_followed_rate_gives_the_published_algorithm_under_a_schedule() {
    let error = distance(true, 1.0);
    assert!(error < 1e-5, "{error:e}");
    // It makes a difference.
    let error = distance(false, 1.0);
    assert!(error > 1e-2, "{error:e}");
}

#[test]
fn rates_that_cannot_be_followed_change_nothing() {
    let rate = SharedLearningRate::new();
    assert_eq!(rate.get(), None);
    rate.set(0.1).unwrap();
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let message = rate.set(bad).unwrap_err().to_string();
        assert!(message.contains("must be positive and finite"), "{message}");
        assert_eq!(rate.get(), Some(0.1));
    }
}

#[test]
fn the_rate_of_a_memory_is_saved_with_it() {
    let device = Device::flex().autodiff();
    let aop = published().with_outer_products(OuterProducts::Count(K));
    let linear = LinearConfig::new(N, P).with_bias(false).init(&device);
    let layer = MemAopLinear::from_linear(linear, aop);
    let rate = SharedLearningRate::new();
    rate.attach(&layer);
    rate.set(0.4).unwrap();
    let mut random = Random(42);
    let (x, g) = (random.matrix(M, N), random.matrix(M, P));
    let gradient = |layer: &MemAopLinear| {
        let output = layer.forward(x.tensor(&device, DType::F32));
        let grads = (output * g.tensor(&device, DType::F32)).sum().backward();
        Matrix::from_tensor(layer.weight.grad(&grads).unwrap())
    };
    gradient(&layer);

    let fresh =
        MemAopLinear::from_linear(LinearConfig::new(N, P).with_bias(false).init(&device), aop);
    let resumed_rate = SharedLearningRate::new();
    resumed_rate.attach(&fresh);
    let resumed = fresh.load_record(layer.clone().into_record());
    // Loading leaves the layer with the rate that was attached before.
    rate.set(0.1).unwrap();
    resumed_rate.set(0.1).unwrap();
    let (continued, resumed) = (gradient(&layer), gradient(&resumed));
    assert_eq!(continued, resumed);
    let unscaled = {
        let other = layer.clone();
        other.reset_memory();
        gradient(&other);
        gradient(&other)
    };
    assert!(unscaled.relative_error(&continued) > 1e-3);
}
