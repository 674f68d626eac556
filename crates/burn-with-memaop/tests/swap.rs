//! The programs train alike with Burn and with this crate under Burn's name. They are built twice
//! from the same sources.

mod programs;

use burn::{
    memaop,
    nn::{self, Linear},
    prelude::*,
};

/// The first losses are those of the same weights, and the last ones are near to each other.
#[test]
fn programs_train_alike_both_ways() {
    let pairs = [
        (
            "guide",
            programs::guide::losses as fn() -> Vec<f32>,
            memaop_programs::guide::losses as fn() -> _,
        ),
        (
            "mnist",
            programs::mnist::losses,
            memaop_programs::mnist::losses,
        ),
        (
            "recurrent",
            programs::recurrent::losses,
            memaop_programs::recurrent::losses,
        ),
        (
            "regression",
            programs::regression::losses,
            memaop_programs::regression::losses,
        ),
        (
            "text_classification",
            programs::text_classification::losses,
            memaop_programs::text_classification::losses,
        ),
        (
            "text_generation",
            programs::text_generation::losses,
            memaop_programs::text_generation::losses,
        ),
    ];
    for (name, ours, burns) in pairs {
        let (ours, burns) = (ours(), burns());
        assert_eq!(ours.len(), burns.len(), "{name}");
        for (step, (ours, burns)) in ours.iter().zip(&burns).enumerate() {
            let tolerance = if step == 0 { 1e-5 } else { 0.02 } * burns.abs().max(0.05);
            assert!(
                (ours - burns).abs() < tolerance,
                "{name}, step {step}: {ours} {burns}"
            );
        }
    }
}

/// The names of Burn lead to the layers of burn-memaop.
#[test]
fn names_lead_to_the_swapped_layers() {
    let _turn = programs::turn();
    let device = Device::flex().autodiff();
    let layer: memaop::MemAopLinear = nn::LinearConfig::new(3, 4).init(&device);
    let same: &Linear = &layer;
    assert_eq!(same.weight.dims(), [3, 4]);
    let _: memaop::MemAopConv2d = nn::conv::Conv2dConfig::new([1, 2], [3, 3]).init(&device);
    let _: memaop::activation::Gelu = nn::Gelu::new();
    let _: memaop::activation::SwiGlu = nn::activation::SwiGluConfig::new(3, 4).init(&device);
    let attention = nn::attention::MultiHeadAttentionConfig::new(4, 2).init(&device);
    let _: memaop::transformer::MemAopMultiHeadAttention = attention;
}

/// What is documented for literals.
#[test]
fn literals_have_a_substitute() {
    let _turn = programs::turn();
    let device = Device::flex();
    let burns = memaop::burn::nn::LinearConfig::new(3, 4).init(&device);
    let (weight, bias) = (burns.weight, burns.bias);
    let layer = Linear::from_linear(
        memaop::burn::nn::Linear { weight, bias },
        memaop::AopConfig::new(),
    );
    assert_eq!(
        layer.forward(Tensor::<2>::ones([2, 3], &device)).dims(),
        [2, 4]
    );
}

/// A record of Burn's layers loads as it is, and one of the swapped layers loads into Burn's.
#[test]
fn records_load_both_ways() {
    let _turn = programs::turn();
    let device = Device::flex().autodiff();
    let burns = memaop::burn::nn::LinearConfig::new(3, 4);
    let ours = nn::LinearConfig::new(3, 4);
    let saved = burns.init(&device);
    let loaded = ours.init(&device).load_record(saved.clone().into_record());
    let values = |tensor: Tensor<2>| tensor.into_data();
    values(loaded.weight.val()).assert_eq(&values(saved.weight.val()), true);
    let back = burns.init(&device).load_record(loaded.into_record());
    values(back.weight.val()).assert_eq(&values(saved.weight.val()), true);
}
