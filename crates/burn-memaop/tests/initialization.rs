//! Alone in its process, because the generator of a device is shared by all that draw from it.

#![cfg(feature = "flex")]

use burn::{
    nn::LinearConfig,
    tensor::{Device, Tensor},
};
use burn_memaop::MemAopLinearConfig;

fn bits<const D: usize>(tensor: Tensor<D>) -> Vec<u32> {
    tensor.into_data().iter::<f32>().map(f32::to_bits).collect()
}

#[test]
fn the_parameters_are_those_of_linear() {
    let device = Device::flex();
    device.seed(5);
    let linear = LinearConfig::new(7, 4).init(&device);
    let expected = [bits(linear.weight.val()), bits(linear.bias.unwrap().val())];
    device.seed(5);
    let ours = MemAopLinearConfig::new(7, 4).init(&device);
    let found = [bits(ours.weight.val()), bits(ours.bias.unwrap().val())];
    assert_eq!(found, expected);
}
