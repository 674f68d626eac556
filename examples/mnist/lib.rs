//! Code of the examples that train on MNIST by burn-train.

mod batch;
mod data;
mod observed;
mod plain;

pub use batch::{MnistBatch, MnistBatcher, classified};
pub use data::read;
pub use observed::Observed;
pub use plain::PlainRenderer;
