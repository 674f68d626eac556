use burn::tensor::TensorReadError;

use super::{Average, mean, numeric_metric};
use crate::LayerReport;

/// The share of the sum of all `|x^| |g^|` that the evaluated rows carry, in per cent: the mean over
/// the layers, at measured steps.
#[derive(Clone)]
pub struct AopShareMetric(Average);

numeric_metric!(
    AopShareMetric,
    "AOP share",
    "%",
    higher_is_better: true,
    "Share of the score mass that the evaluated rows carry"
);

impl AopShareMetric {
    fn figure(layers: &[&LayerReport]) -> Result<Option<f64>, TensorReadError> {
        let share = mean(layers, |measured| measured.share)?;
        Ok(share.map(|share| 100.0 * share))
    }
}
