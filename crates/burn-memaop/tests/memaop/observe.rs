//! Reports of the layers of a model.

use burn::{
    module::{Module, ModuleMapper},
    nn::{Linear, LinearConfig},
    tensor::{DType, Device, Tensor},
};
use burn_memaop::{
    AopConfig, AopObserver, LayerReport, MemAopLinear, MemAopLinearConfig, Memory, OuterProducts,
};

use crate::{
    oracle::{Oracle, Policy},
    support::{Matrix, Random, published},
};

#[derive(Module, Debug)]
struct Block {
    linear: MemAopLinear,
    plain: Linear,
}

#[derive(Module, Debug)]
struct Model {
    blocks: Vec<Block>,
    head: Option<MemAopLinear>,
    exact: MemAopLinear,
}

impl Model {
    fn new(aop: AopConfig, device: &Device) -> Self {
        let layer = |p, aop| MemAopLinearConfig::new(6, p).init(device).with_aop(aop);
        let block = |_| Block {
            linear: layer(6, aop),
            plain: LinearConfig::new(6, 6).init(device),
        };
        Self {
            blocks: (0..2).map(block).collect(),
            head: Some(layer(4, aop)),
            exact: layer(3, aop.with_outer_products(OuterProducts::Count(100))),
        }
    }

    fn backward(&self, input: Tensor<2>) {
        let mut hidden = input;
        for block in &self.blocks {
            hidden = block.plain.forward(block.linear.forward(hidden));
        }
        let head = self.head.as_ref().unwrap().forward(hidden.clone());
        let loss = head.square().sum() + self.exact.forward(hidden).square().sum();
        loss.backward();
    }
}

#[test]
fn all_layers_are_found_by_their_fields() {
    let device = Device::flex().autodiff();
    let aop = published().with_outer_products(OuterProducts::Count(5));
    let model = Model::new(aop, &device);
    let observer = AopObserver::new().with_error(2);
    let input = || Random(1).matrix(20, 6).tensor(&device, DType::F32);

    assert!(observer.observe(&model).layers.is_empty(), "no step yet");
    model.backward(input());
    let report = observer.observe(&model);
    let names: Vec<_> = report
        .layers
        .iter()
        .map(|layer| layer.name.as_str())
        .collect();
    assert_eq!(
        names,
        ["blocks.0.linear", "blocks.1.linear", "head", "exact"]
    );
    let numbers = |layer: &LayerReport| {
        let LayerReport {
            outer_products,
            rows,
            d_input,
            d_output,
            ..
        } = *layer;
        (outer_products, rows, d_input, d_output)
    };
    assert_eq!(numbers(&report.layers[2]), (5, 20, 6, 4));
    assert_eq!(numbers(&report.layers[3]), (20, 20, 6, 3));
    assert_eq!(report.layers[2].exact_flops(), 4.0 * 20.0 * 24.0);
    assert_eq!(report.layers[2].saved_flops(), 2.0 * 15.0 * 24.0);
    assert_eq!(report.layers[3].saved_flops(), 0.0);
    let half = OuterProducts::Ratio(0.5);
    let sparse = Model::new(aop.with_input_gradient(half), &device);
    observer.observe(&sparse);
    sparse.backward(input());
    let report = observer.observe(&sparse);
    assert_eq!(report.layers[2].input_rows, Some(10));
    assert_eq!(report.layers[2].saved_flops(), 2.0 * (15.0 + 10.0) * 24.0);
    // Nothing asks for the gradient of the first layer's input.
    let first = &report.layers[0];
    assert_eq!(first.input_rows, None);
    assert_eq!(first.exact_flops(), 2.0 * 20.0 * 36.0);
    assert_eq!(first.saved_flops(), 2.0 * 15.0 * 36.0);
    assert!(observer.observe(&model).layers.is_empty(), "told already");

    // Steps 0, 2 and 4 are compared.
    let compared = |report: &LayerReport| report.error().is_some();
    assert!(
        compared(&report.layers[0]),
        "observed before the first step"
    );
    let mut found = Vec::new();
    for _ in 0..4 {
        model.backward(input());
        found.push(compared(&observer.observe(&model).layers[0]));
    }
    assert_eq!(found, [false, true, false, true]);
}

/// Workers fork the model anew at each step, and only the forks are observed.
#[test]
fn exact_layers_of_workers_are_reported() {
    let device = Device::flex().autodiff();
    let aop = published().with_outer_products(OuterProducts::Count(5));
    struct Optimizer;
    impl ModuleMapper for Optimizer {}
    let mut model = Model::new(aop, &device);
    let observer = AopObserver::new();
    let mut names: Vec<Vec<String>> = Vec::new();
    for _ in 0..2 {
        let fork = model.clone().fork(&device);
        fork.backward(Random(1).matrix(20, 6).tensor(&device, DType::F32));
        let report = observer.observe(&fork);
        names.push(report.layers.into_iter().map(|layer| layer.name).collect());
        model = model.map(&mut Optimizer);
    }
    let all: Vec<String> = ["blocks.0.linear", "blocks.1.linear", "head", "exact"]
        .map(String::from)
        .to_vec();
    // The first observation of an exact layer is what makes it report.
    assert_eq!(names[1], all);
}

fn outer(x: &Matrix, g: &Matrix) -> Matrix {
    let mut product = Matrix::zeros(x.columns(), g.columns());
    for m in 0..x.rows() {
        for a in 0..x.columns() {
            for b in 0..g.columns() {
                product.0[a][b] += x.0[m][a] * g.0[m][b];
            }
        }
    }
    product
}

/// The error of three steps from its definition, on a backend.
pub fn errors_equal_their_definition(device: &Device) {
    let (m, n, p, k) = (30, 7, 5, 6);
    for (policy, memory) in [
        (Policy::TopK, Memory::Published { decay: 0.9 }),
        (Policy::WeightedK, Memory::Balanced { decay: 1.0 }),
        (Policy::TopK, Memory::None),
        (Policy::Systematic, Memory::None),
    ] {
        let aop = published()
            .with_outer_products(OuterProducts::Count(k))
            .with_method(policy.method(memory))
            .with_seed(9);
        let layer = MemAopLinearConfig::new(n, p).init(device).with_aop(aop);
        let mut oracle = Oracle::new(policy, memory, 9, n, p);
        let observer = AopObserver::new().with_error(2);
        observer.observe(&layer);
        let mut random = Random(51);
        for step in 0..3 {
            let (x, g) = (random.matrix(m, n), random.matrix(m, p));
            let output = layer.forward(x.tensor(device, DType::F32));
            (output * g.tensor(device, DType::F32)).sum().backward();
            let report = observer.observe(&layer);
            let [report] = &report.layers[..] else {
                panic!("one layer");
            };
            let gradient = oracle.step(&x, &g, k);
            if step % 2 == 1 {
                assert_eq!(report.error(), None);
                continue;
            }
            let expected = gradient.relative_error(&outer(&x, &g));
            let found = report.error().unwrap();
            assert!(
                (found - expected).abs() < 1e-4,
                "{policy:?} {memory:?} step {step}: {found} {expected}"
            );
        }
    }
}

#[test]
fn a_batch_of_zeros_or_of_no_numbers_has_no_error() {
    let device = Device::flex().autodiff();
    let aop = published().with_outer_products(OuterProducts::Count(2));
    let layer = MemAopLinearConfig::new(3, 2).init(&device).with_aop(aop);
    let observer = AopObserver::new().with_error(1);
    observer.observe(&layer);
    for value in [0.0, f32::NAN] {
        let input = Tensor::<2>::full([5, 3], value, &device);
        layer.forward(input).sum().backward();
        assert_eq!(observer.observe(&layer).layers[0].error(), None);
    }
}
