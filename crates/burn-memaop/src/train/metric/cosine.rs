use burn::tensor::TensorReadError;

use super::{Average, mean, numeric_metric};
use crate::LayerReport;

/// The cosine between the approximate gradient and the exact one: the mean over the layers, at the steps
/// that are compared ([`AopObserver::with_exact`](crate::AopObserver::with_exact)).
#[derive(Clone)]
pub struct AopCosineMetric(Average);

numeric_metric!(
    AopCosineMetric,
    "AOP cosine",
    "",
    higher_is_better: true,
    "Cosine between the gradient and the exact one"
);

impl AopCosineMetric {
    fn figure(layers: &[&LayerReport]) -> Result<Option<f64>, TensorReadError> {
        mean(layers, |measured| measured.cosine)
    }
}
