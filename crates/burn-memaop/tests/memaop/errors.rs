//! Bad input, each with its exact message.

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::{
    config::Config,
    nn::LinearConfig,
    tensor::{DType, Device, Tensor},
};
use burn_memaop::{
    AopConfig, MemAopLinear, MemAopLinearConfig, Memory, Method, OuterProducts,
    op::{AopStep, Rows, weight_gradient},
};

use crate::support::published;

fn init(aop: AopConfig) -> MemAopLinear {
    MemAopLinearConfig::new(4, 2)
        .init(&Device::flex())
        .with_aop(aop)
}

fn ratio(ratio: f64) -> AopConfig {
    AopConfig::new().with_outer_products(OuterProducts::Ratio(ratio))
}

#[test]
#[should_panic(expected = "AopConfig.outer_products: the count must be at least 1, but got 0")]
fn count_of_zero() {
    init(AopConfig::new().with_outer_products(OuterProducts::Count(0)));
}

#[test]
#[should_panic(expected = "AopConfig.outer_products: the ratio must be in (0, 1], but got 0")]
fn ratio_of_zero() {
    init(ratio(0.0));
}

#[test]
#[should_panic(expected = "AopConfig.outer_products: the ratio must be in (0, 1], but got 1.5")]
fn ratio_above_one() {
    init(ratio(1.5));
}

#[test]
#[should_panic(expected = "AopConfig.outer_products: the ratio must be in (0, 1], but got NaN")]
fn ratio_not_a_number() {
    init(ratio(f64::NAN));
}

#[test]
#[should_panic(expected = "AopConfig.method: the decay must be in [0, 1], but got -0.1")]
fn negative_decay() {
    init(published().with_method(Method::TopK(Memory::Published { decay: -0.1 })));
}

#[test]
#[should_panic(expected = "AopConfig.method: the decay must be in [0, 1], but got 1.1")]
fn decay_above_one() {
    init(published().with_method(Method::TopK(Memory::Balanced { decay: 1.1 })));
}

#[test]
#[should_panic(expected = "assert_shape!(input, [.., d_input]): axis 1 expected 4, got 3")]
fn wrong_input_width() {
    init(AopConfig::new()).forward(Tensor::<2>::zeros([1, 3], &Device::flex()));
}

#[test]
fn bad_input_loses_no_memory() {
    let device = Device::flex().autodiff();
    let layer = MemAopLinearConfig::new(4, 2)
        .init(&device)
        .with_aop(published());
    layer
        .forward(Tensor::<2>::ones([8, 4], &device))
        .sum()
        .backward();
    let before = layer.memory_stats();
    assert_eq!(before.rows, 8);
    let forward = AssertUnwindSafe(|| {
        layer.forward(Tensor::<2>::zeros([8, 3], &device));
    });
    assert!(catch_unwind(forward).is_err());
    assert_eq!(layer.memory_stats(), before);
}

#[test]
fn the_configuration_survives_serialization() {
    let config = AopConfig::new()
        .with_outer_products(OuterProducts::Ratio(0.3))
        .with_exact_steps(7)
        .with_method(Method::TopK(Memory::Balanced { decay: 0.5 }))
        .with_seed(u64::MAX);
    let json = config.to_string();
    assert_eq!(AopConfig::load_binary(json.as_bytes()).unwrap(), config);
    // That of a layer is written as Burn's.
    let ours = MemAopLinearConfig::new(4, 2).to_string();
    assert_eq!(ours, LinearConfig::new(4, 2).to_string());
}

/// What the operations refuse, in release builds too: kernels behind them read without checks.
#[test]
fn arguments_that_do_not_fit_are_named() {
    let device = Device::flex();
    let zeros = |shape: [usize; 2]| Tensor::<2>::zeros(shape, &device);
    let rows = |input, grad, age| Rows {
        input: zeros(input),
        grad: zeros(grad),
        age: zeros(age),
    };
    let step = AopStep {
        k: 2,
        method: Method::TopK(Memory::Published { decay: 1.0 }),
        seed: 0,
        step: 0,
    };
    let (x, g) = (|| zeros([4, 3]), || zeros([4, 2]));
    type Call<'a> = Box<dyn Fn() + 'a>;
    let calls: Vec<(Call, &str)> = vec![
        (
            Box::new(|| drop(weight_gradient(x(), zeros([5, 2]), None, step))),
            "the rows of grad must be 4",
        ),
        (
            Box::new(|| drop(weight_gradient(x(), g().cast(DType::F64), None, step))),
            "the dtype of grad must be F32",
        ),
        (
            Box::new(|| drop(weight_gradient(x(), g(), None, AopStep { k: 5, ..step }))),
            "step.k must be in 1..=4, the rows of the batch, but is 5",
        ),
        (
            Box::new(|| drop(weight_gradient(x(), g(), None, AopStep { k: 0, ..step }))),
            "but is 0",
        ),
        (
            Box::new(|| {
                let memory = rows([4, 2], [4, 2], [4, 1]);
                drop(weight_gradient(x(), g(), Some(memory), step));
            }),
            "the width of memory.input must be 3",
        ),
        (
            Box::new(|| {
                let memory = rows([6, 3], [5, 2], [6, 1]);
                drop(weight_gradient(x(), g(), Some(memory), step));
            }),
            "the shape of memory.grad must be [6, 2]",
        ),
        (
            Box::new(|| {
                let memory = rows([6, 3], [6, 2], [4, 1]);
                drop(weight_gradient(x(), g(), Some(memory), step));
            }),
            "the shape of memory.age must be [6, 1]",
        ),
        (
            Box::new(|| drop(weight_gradient(Tensor::from_inner(x()), g(), None, step))),
            "without autodiff",
        ),
    ];
    for (call, expected) in calls {
        let panic = catch_unwind(AssertUnwindSafe(call)).unwrap_err();
        let message = panic.downcast_ref::<String>().expect("a message");
        assert!(message.contains(expected), "{message}");
    }
}
