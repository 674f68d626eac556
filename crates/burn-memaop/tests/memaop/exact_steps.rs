//! The first steps of a layer, which are exact.

use burn::{
    module::Module,
    nn::LinearConfig,
    store::ModuleRecord,
    tensor::{DType, Device, Tensor},
};
use burn_memaop::{MemAopLinear, Memory, Method, OuterProducts, reset};

use crate::support::{Random, bits, published};

const M: usize = 40;
const N: usize = 6;
const P: usize = 4;

fn device() -> Device {
    Device::flex().autodiff()
}

#[test]
fn exact_steps_are_those_of_linear() {
    let linear = LinearConfig::new(N, P).init(&device());
    let method = Method::TopK(Memory::Balanced { decay: 1.0 });
    let aop = published()
        .with_outer_products(OuterProducts::Ratio(0.1))
        .with_method(method)
        .with_saved_state(true)
        .with_exact_steps(4);
    let layer = MemAopLinear::from_linear(linear.clone(), aop);
    let mut random = Random(50);
    let mut step = |layer: &MemAopLinear| {
        let (x, g) = (random.matrix(M, N), random.matrix(M, P));
        let backward = |forward: &dyn Fn(Tensor<2>) -> Tensor<2>| {
            let output = forward(x.tensor(&device(), DType::F32));
            (output * g.tensor(&device(), DType::F32)).sum().backward()
        };
        let ours = backward(&|x| layer.forward(x));
        let exact = backward(&|x| linear.forward(x));
        let (ours, exact) = (layer.weight.grad(&ours), linear.weight.grad(&exact));
        bits(ours.unwrap()) == bits(exact.unwrap())
    };
    for (number, k) in [M, M, M, M, 4, 4].into_iter().enumerate() {
        assert_eq!(step(&layer), k == M, "step {number}");
        let stats = layer.memory_stats();
        assert_eq!((stats.step, stats.k), (number as u64 + 1, k));
        assert_eq!(stats.rows == 0, k == M, "an exact step needs no memory");
    }

    // The steps are counted on from where they were saved, and from 0 after a reset.
    let bytes = layer.clone().into_record().into_bytes().unwrap();
    let other = MemAopLinear::from_linear(linear.clone(), aop);
    let other = other.load_record(ModuleRecord::from_bytes(bytes).unwrap());
    step(&other);
    assert_eq!((other.memory_stats().step, other.memory_stats().k), (7, 4));
    let other = reset(other);
    assert!(step(&other));
    assert_eq!((other.memory_stats().step, other.memory_stats().k), (1, M));
}
