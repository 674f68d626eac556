//! Saving and loading: with the memory, without it, and what does not fit.

use burn::{
    module::Module,
    nn::{Linear, LinearConfig},
    optim::{AdamConfig, GradientsParams, ModuleOptimizer},
    store::ModuleRecord,
    tensor::{DType, Device, activation::relu},
};
use burn_memaop::{MemAopLinear, MemAopLinearConfig, Memory, OuterProducts, Policy, Schedule};

use crate::support::{Matrix, Random, bits, published};

#[derive(Module, Debug)]
struct Mlp {
    hidden: MemAopLinear,
    output: MemAopLinear,
}

fn device() -> Device {
    Device::flex().autodiff()
}

fn layer(d_input: usize, d_output: usize) -> MemAopLinear {
    let aop = published()
        .with_outer_products(OuterProducts::Count(4))
        .with_policy(Policy::WeightedK)
        .with_memory(Memory::Balanced { decay: 0.9 })
        // Measured before the stop, adjusted after it.
        .with_schedule(Schedule::Adaptive {
            share: 0.9,
            interval: 2,
        });
    MemAopLinearConfig::new(d_input, d_output)
        .with_aop(aop)
        .init(&device())
}

fn model() -> Mlp {
    Mlp {
        hidden: layer(6, 8),
        output: layer(8, 3),
    }
}

fn bytes(record: ModuleRecord) -> ModuleRecord {
    ModuleRecord::from_bytes(record.into_bytes().unwrap()).unwrap()
}

fn train(mut model: Mlp, optimizer: &mut ModuleOptimizer, batches: &[Matrix]) -> Mlp {
    for batch in batches {
        let hidden = relu(model.hidden.forward(batch.tensor(&device(), DType::F32)));
        let output = model.output.forward(hidden);
        let loss = (output.clone() * output - 1.0).square().mean();
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(0.01, model, grads);
    }
    model
}

fn weights(model: &Mlp) -> Vec<u32> {
    [&model.hidden, &model.output]
        .into_iter()
        .flat_map(|layer| bits(layer.weight.val()))
        .collect()
}

#[test]
fn a_stopped_training_goes_on_to_the_same_weights() {
    let mut random = Random(40);
    // The batches grow after the stop, so that rows saved and rows new meet.
    let batches: Vec<_> = [10, 10, 7, 10, 12, 10]
        .into_iter()
        .map(|rows| random.matrix(rows, 6))
        .collect();
    let start = model();
    let (first, second) = batches.split_at(3);

    let mut optimizer = AdamConfig::new().init();
    let middle = train(start.clone(), &mut optimizer, first);
    let straight = train(middle.clone(), &mut optimizer.clone(), second);

    let record = bytes(middle.clone().into_record());
    let resumed = model().load_record(record);
    assert_eq!(
        resumed.hidden.memory_stats(),
        middle.hidden.memory_stats(),
        "the memory is there"
    );
    assert_eq!(resumed.hidden.memory_stats().step, 3);
    let resumed = train(resumed, &mut optimizer, second);
    assert_eq!(weights(&resumed), weights(&straight));

    // Without its memory, the training goes elsewhere: the test would notice a lost one.
    let forgetful = middle.clone();
    forgetful.hidden.reset_memory();
    forgetful.output.reset_memory();
    let mut optimizer = AdamConfig::new().init();
    train(start, &mut optimizer, first);
    let forgetful = train(forgetful, &mut optimizer, second);
    assert_ne!(weights(&forgetful), weights(&straight));
}

#[test]
fn a_memory_in_double_precision_keeps_its_bits() {
    let device = device();
    let mut random = Random(41);
    let linear = LinearConfig::new(5, 3).with_bias(false).init(&device);
    let mut layer = MemAopLinear::from_linear(
        linear,
        published().with_outer_products(OuterProducts::Count(2)),
    );
    layer.weight = layer
        .weight
        .map(|weight| weight.cast(DType::F64).detach().require_grad());
    let input = random.matrix(7, 5).tensor(&device, DType::F64);
    layer.forward(input).square().sum().backward();
    let before = layer.memory_stats();
    assert_eq!((before.rows, before.pending), (7, 5));

    let mut target = layer.clone();
    target.reset_memory();
    target = target.load_record(bytes(layer.into_record()));
    assert_eq!(target.memory_stats(), before);
}

#[test]
fn an_empty_memory_is_saved_and_loaded() {
    let mut random = Random(42);
    let record = bytes(layer(6, 8).into_record());
    let target = layer(6, 8);
    let input = random.matrix(10, 6).tensor(&device(), DType::F32);
    target.forward(input).square().sum().backward();
    assert_eq!(target.memory_stats().step, 1);
    let target = target.load_record(record);
    assert_eq!(
        (target.memory_stats().step, target.memory_stats().rows),
        (0, 0)
    );
}

#[test]
fn records_of_linear_load_and_ours_load_into_linear() {
    let mut random = Random(43);
    let linear = LinearConfig::new(6, 8).init(&device());
    let weight = bits(linear.weight.val());
    let ours = layer(6, 8).load_record(bytes(linear.into_record()).allow_partial(true));
    assert_eq!(bits(ours.weight.val()), weight);
    assert_eq!(ours.memory_stats().rows, 0);

    let input = random.matrix(10, 6).tensor(&device(), DType::F32);
    ours.forward(input).square().sum().backward();
    let record = bytes(ours.into_record());
    let linear: Linear = LinearConfig::new(6, 8)
        .init(&device())
        .load_record(record.allow_unused(true));
    assert_eq!(bits(linear.weight.val()), weight);
}

#[test]
fn loading_leaves_clones_of_the_target_alone() {
    let mut random = Random(44);
    let target = layer(6, 8);
    let input = random.matrix(10, 6).tensor(&device(), DType::F32);
    target.forward(input).square().sum().backward();
    let other = target.clone();
    let before = other.memory_stats();
    let loaded = target.load_record(bytes(layer(6, 8).into_record()));
    assert_eq!(loaded.memory_stats().step, 0);
    assert_eq!(other.memory_stats(), before);
}

#[test]
fn a_record_of_other_widths_is_refused_and_changes_nothing() {
    let mut random = Random(45);
    let target = layer(6, 8);
    let input = random.matrix(10, 6).tensor(&device(), DType::F32);
    target.forward(input.clone()).square().sum().backward();
    let before = (bits(target.weight.val()), target.memory_stats());

    let other = layer(5, 8);
    other
        .forward(random.matrix(10, 5).tensor(&device(), DType::F32))
        .square()
        .sum()
        .backward();
    let error = target
        .clone()
        .try_load_record(bytes(other.into_record()))
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "Record validation error: Apply errors: [\"weight: shape mismatch, expected Shape { dims: \
         [6, 8] } but record has Shape { dims: [5, 8] }\", \"memory.input: shape mismatch, \
         expected Shape { dims: [10, 6] } but record has Shape { dims: [10, 5] }\"]"
    );
    assert_eq!((bits(target.weight.val()), target.memory_stats()), before);
}
