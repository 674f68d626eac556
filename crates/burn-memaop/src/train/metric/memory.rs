use burn::tensor::TensorReadError;

use super::{Average, mean, numeric_metric};
use crate::LayerReport;

/// What is left in the memory against what is applied ([`Measured::memory`](crate::Measured::memory)):
/// the mean over the layers that have a memory, at measured steps.
#[derive(Clone)]
pub struct AopMemoryMetric(Average);

numeric_metric!(
    AopMemoryMetric,
    "AOP memory",
    "",
    higher_is_better: false,
    "Norm of what is left in the memory against that of the gradient"
);

impl AopMemoryMetric {
    fn figure(layers: &[&LayerReport]) -> Result<Option<f64>, TensorReadError> {
        mean(layers, |measured| measured.memory)
    }
}
