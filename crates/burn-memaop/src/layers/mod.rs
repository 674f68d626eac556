//! The layers.

pub(crate) mod linear;
pub mod transformer;
