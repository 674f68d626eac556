//! Code that the examples and benchmarks share: options of layers, backends, encoders, MNIST,
//! charts and times.

mod backend;
pub mod bench;
pub mod chart;
pub mod check;
mod encoder;
pub mod memory;
pub mod mnist;
mod options;
pub mod parallel;
pub mod statistics;

pub use backend::Backend;
pub use encoder::Encoder;
pub use options::{
    AopOptions, InputGradientOptions, KRatio, MemoryOption, PolicyOption, StoredInputOption,
};
