use burn::tensor::TensorReadError;

use super::{Average, numeric_metric};
use crate::LayerReport;

/// The floating-point operations that are saved of the backward passes of the layers (of weight and input
/// together; 50 % at most where the gradient of the input is exact), in per cent.
#[derive(Clone)]
pub struct AopSavedFlopsMetric(Average);

numeric_metric!(
    AopSavedFlopsMetric,
    "AOP saved",
    "%",
    higher_is_better: true,
    "Share of the FLOPs of the layers' backward pass that is not computed"
);

impl AopSavedFlopsMetric {
    fn figure(layers: &[&LayerReport]) -> Result<Option<f64>, TensorReadError> {
        let exact: f64 = layers.iter().map(|layer| layer.exact_flops()).sum();
        let saved: f64 = layers.iter().map(|layer| layer.saved_flops()).sum();
        Ok((exact > 0.0).then(|| 100.0 * saved / exact))
    }
}
