use burn::tensor::TensorReadError;

use super::{Average, mean, numeric_metric};
use crate::LayerReport;

/// The relative error of the approximate gradient, `|approximate - exact| / |exact|`: the mean over the
/// layers, at the steps that are compared ([`AopObserver::with_exact`](crate::AopObserver::with_exact)).
#[derive(Clone)]
pub struct AopErrorMetric(Average);

numeric_metric!(
    AopErrorMetric,
    "AOP error",
    "",
    higher_is_better: false,
    "Distance of the gradient from the exact one, relative to the exact one"
);

impl AopErrorMetric {
    fn figure(layers: &[&LayerReport]) -> Result<Option<f64>, TensorReadError> {
        mean(layers, |measured| measured.error)
    }
}
