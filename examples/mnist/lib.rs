//! Code of the examples that train on MNIST by burn-train.

mod batch;
mod data;
mod observed;
mod plain;
mod training;

pub use batch::{MnistBatch, MnistBatcher, classified};
pub use data::read;
pub use observed::Observed;
pub use plain::PlainRenderer;
pub use training::{AdamOptions, Items, Loader, MnistOptions, chooses_k, loader};
