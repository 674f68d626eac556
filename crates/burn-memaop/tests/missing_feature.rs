//! A device whose backend is in Burn, but not in this crate:
//! `cargo test -p burn-memaop --no-default-features --features autodiff --test missing_feature`.

#![cfg(not(feature = "flex"))]

use burn::tensor::{Device, Tensor};
use burn_memaop::MemAopLinearConfig;

#[test]
#[should_panic(
    expected = "burn-memaop does not support the device Flex(Cpu) in this build: enable the feature of \
                burn-memaop that has the name of its backend (flex, "
)]
fn the_message_names_the_device_and_the_features() {
    let device = Device::flex();
    let layer = MemAopLinearConfig::new(4, 2).init(&device);
    layer.forward(Tensor::<2>::zeros([3, 4], &device));
}

#[test]
#[should_panic(expected = "enable the feature of burn-memaop that has the name of its backend")]
#[cfg(feature = "autodiff")]
fn under_autodiff_too() {
    let device = Device::flex().autodiff();
    let layer = MemAopLinearConfig::new(4, 2).init(&device);
    layer.forward(Tensor::<2>::zeros([3, 4], &device));
}
