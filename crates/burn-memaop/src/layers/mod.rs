//! The layers.

pub mod activation;
pub(crate) mod linear;
pub mod transformer;
