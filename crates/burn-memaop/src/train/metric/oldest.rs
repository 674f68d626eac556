use burn::tensor::TensorReadError;

use super::{Average, numeric_metric};
use crate::LayerReport;

/// The age of the oldest pending row: the most steps that a position of the memory holds something of,
/// the largest of the layers, at measured steps.
#[derive(Clone)]
pub struct AopOldestMetric(Average);

numeric_metric!(
    AopOldestMetric,
    "AOP oldest row",
    "steps",
    higher_is_better: false,
    "The most steps that a position of the memory has been waiting"
);

impl AopOldestMetric {
    fn figure(layers: &[&LayerReport]) -> Result<Option<f64>, TensorReadError> {
        let mut oldest: Option<f64> = None;
        for layer in layers {
            if let Some(age) = layer.measured()?.and_then(|measured| measured.oldest) {
                oldest = Some(oldest.map_or(age, |oldest| oldest.max(age)));
            }
        }
        Ok(oldest)
    }
}
