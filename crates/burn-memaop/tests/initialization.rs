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

// One test, because its parts share the generator.
#[test]
fn the_seed_of_a_device_decides_on_parameters_and_dropouts() {
    the_parameters_are_those_of_linear();
    #[cfg(feature = "autodiff")]
    dropouts_are_drawn_by_the_seed_of_the_device();
}

#[cfg(feature = "autodiff")]
fn dropouts_are_drawn_by_the_seed_of_the_device() {
    let device = Device::flex().autodiff();
    let passes = |seed| {
        device.seed(seed);
        let dropout = burn_memaop::nn::DropoutConfig::new(0.5).init();
        let pass = || bits(dropout.forward(Tensor::<2>::ones([4, 64], &device)));
        [pass(), pass()]
    };
    assert_eq!(passes(5), passes(5));
    assert_ne!(passes(5)[0], passes(6)[0]);
}

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
