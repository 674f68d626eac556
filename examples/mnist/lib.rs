//! What the examples that train on MNIST through burn-train share.

mod batch;
mod data;
mod observed;
mod plain;

pub use batch::{MnistBatch, MnistBatcher, classified};
pub use data::read;
pub use observed::Observed;
pub use plain::PlainRenderer;
