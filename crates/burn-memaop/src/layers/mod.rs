//! The layers.

pub mod activation;
pub(crate) mod conv2d;
pub(crate) mod dropout;
pub(crate) mod linear;
mod module;
pub(crate) mod norm;
pub mod transformer;

use crate::config::AopConfig;

/// The configuration of the layer that comes `count` layers after that of `aop`.
fn later(aop: AopConfig, count: u64) -> AopConfig {
    aop.with_seed(aop.seed.wrapping_add(count))
}
