//! The layers.

pub mod activation;
pub(crate) mod conv2d;
pub(crate) mod linear;
mod module;
pub mod transformer;
