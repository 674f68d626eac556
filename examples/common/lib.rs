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

use burn::module::Module;
use burn_memaop::AopObserver;

pub use backend::Backend;
pub use encoder::Encoder;
pub use options::{
    AopOptions, InputGradientOptions, KRatio, MemoryOption, PolicyOption, StoredInputOption,
};

/// R of a model: the variance that drawn rows add to the gradients of its weights, relative to that
/// of the batch. It is the mean over the layers that report it, weighed by their operations. None if
/// no layer reports it.
pub fn added_noise<M: Module>(model: &M) -> Option<f64> {
    let report = AopObserver::new().observe(model);
    let layers = report.layers.iter();
    let layers = layers.filter_map(|layer| Some((layer.exact_flops(), layer.added_noise?)));
    let (flops, sum) = layers.fold((0.0, 0.0), |(all, sum), (flops, added)| {
        (all + flops, sum + flops * added)
    });
    (flops > 0.0).then(|| sum / flops)
}
