//! What the examples share: the options of the layer, the backends, and charts.

mod backend;
pub mod chart;
mod options;

pub use backend::Backend;
pub use options::{AopOptions, MemoryOption, PolicyOption};
