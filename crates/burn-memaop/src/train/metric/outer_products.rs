use burn::tensor::TensorReadError;

use super::{Average, numeric_metric};
use crate::LayerReport;

/// The outer products evaluated in a step, K: the sum over the layers.
#[derive(Clone)]
pub struct AopOuterProductsMetric(Average);

numeric_metric!(
    AopOuterProductsMetric,
    "AOP outer products",
    "",
    higher_is_better: false,
    "Outer products evaluated in a step"
);

impl AopOuterProductsMetric {
    fn figure(layers: &[&LayerReport]) -> Result<Option<f64>, TensorReadError> {
        let evaluated = layers
            .iter()
            .map(|layer| layer.outer_products)
            .sum::<usize>();
        Ok((!layers.is_empty()).then_some(evaluated as f64))
    }
}
