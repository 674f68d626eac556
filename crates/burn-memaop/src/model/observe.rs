//! What the layers of a model did at their last step, for metrics and logs.

use std::sync::Arc;

use burn::{module::Module, tensor::TensorReadError};

use super::tree;
use crate::state::{
    measurement::{Measured, Measurement},
    offer::Shown,
    watch::Intervals,
};

/// Collects [reports](AopReport) of all layers of this crate in a model.
///
/// A layer measures once it has been observed: every `interval`-th of its gradients, on the device
/// and without waiting for it. What takes no measuring (K, outer products) is reported at every
/// step.
///
/// ```
/// # use burn::{nn::LinearConfig, tensor::{Device, Tensor}};
/// # use burn_memaop::{AopConfig, AopObserver, MemAopLinearConfig};
/// # let device = Device::flex().autodiff();
/// # let aop = AopConfig::new().with_cost_rule(false);
/// # let model = MemAopLinearConfig::new(3, 2).with_aop(aop).init(&device);
/// let observer = AopObserver::new(1);
/// for _ in 0..2 {
///     let grads = model.forward(Tensor::<2>::ones([8, 3], &device)).sum().backward();
///     let report = observer.observe(&model); // after the backward pass
///     for layer in &report.layers {
///         println!("{}: {} of {} rows", layer.name, layer.outer_products, layer.rows);
///         if let Some(measured) = layer.measured()? {
///             println!("{:?} of the score mass", measured.share);
///         }
///     }
/// }
/// # Ok::<(), burn::tensor::TensorReadError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AopObserver(Intervals);

impl AopObserver {
    /// Measures one of `interval` gradients of each layer.
    ///
    /// # Panics
    ///
    /// If the interval is 0.
    pub fn new(interval: usize) -> Self {
        assert!(
            interval > 0,
            "AopObserver: the interval must be at least 1, but got 0"
        );
        Self(Intervals {
            measured: interval as u64,
            exact: None,
        })
    }

    /// Compares one of `interval` gradients with the exact one too, which costs the product that
    /// the layer is there to save.
    ///
    /// # Panics
    ///
    /// If the interval is 0.
    pub fn with_exact(self, interval: usize) -> Self {
        assert!(
            interval > 0,
            "AopObserver: the exact interval must be at least 1, but got 0"
        );
        Self(Intervals {
            exact: Some(interval as u64),
            ..self.0
        })
    }

    /// What each layer did at its last gradient; to be called after each backward pass. Does not
    /// wait for the device.
    pub fn observe<M: Module>(&self, module: &M) -> AopReport {
        let report = |(name, layer): (String, Shown)| {
            let seen = layer.state.watched(self.0)?;
            let [d_input, d_output] = layer.widths;
            Some(LayerReport {
                name,
                step: seen.step,
                outer_products: seen.k,
                rows: seen.rows,
                input_rows: seen.input_rows,
                noise: seen.noise,
                d_input,
                d_output,
                measurement: seen.measurement,
            })
        };
        AopReport {
            layers: tree::layers(module)
                .into_iter()
                .filter_map(report)
                .collect(),
        }
    }
}

/// The layers of a model, those that have taken a step since they were observed last.
#[derive(Debug, Clone, Default)]
pub struct AopReport {
    /// In the order of the fields.
    pub layers: Vec<LayerReport>,
}

/// One layer at one step.
#[derive(Debug, Clone)]
pub struct LayerReport {
    /// The fields of the model that lead to it, separated by dots.
    pub name: String,
    /// The number of gradients before this one.
    pub step: u64,
    /// K: the outer products evaluated.
    pub outer_products: usize,
    /// M: the rows of the batch; of a convolution the positions of its output.
    pub rows: usize,
    /// The rows of the gradient of the input that were computed; none where nothing below the layer asks
    /// for it, as in the first layer of most models.
    pub input_rows: Option<usize>,
    /// The noise-to-signal ratio of the gradient, by which [`OuterProducts::Auto`](crate::OuterProducts::Auto) chose
    /// K: the variance of the gradient of a batch, were its rows independent, against the square of the true gradient.
    /// None where neither K nor the rows of the gradient of the input are chosen, and before the first measurement.
    pub noise: Option<f64>,
    /// The inputs of the layer; of a convolution the values of a patch of one group.
    pub d_input: usize,
    /// The outputs of the layer, or its channels.
    pub d_output: usize,
    measurement: Option<Arc<Measurement>>,
}

impl LayerReport {
    /// What was measured, at the steps that are. Waits for the device the first time.
    ///
    /// # Errors
    ///
    /// A device that fails.
    pub fn measured(&self) -> Result<Option<Measured>, TensorReadError> {
        match &self.measurement {
            None => Ok(None),
            Some(measurement) => measurement.read().map(Some),
        }
    }

    /// The device that the figures are computed on, if any are.
    #[cfg(feature = "train")]
    pub(crate) fn device(&self) -> Option<burn::tensor::Device> {
        self.measurement
            .as_ref()
            .map(|measurement| measurement.device())
    }

    /// Floating-point operations of the exact backward pass: `2 M N P` for the gradient of the weight, and as
    /// many for that of the input, if it is asked for.
    pub fn exact_flops(&self) -> f64 {
        let products = 1 + usize::from(self.input_rows.is_some());
        self.flops(products * self.rows)
    }

    /// The operations of it that were saved: `2 (M - K) N P`, and as many for the rows of the gradient
    /// of the input that were left out.
    pub fn saved_flops(&self) -> f64 {
        let input_rows = self.input_rows.unwrap_or(self.rows);
        self.flops(2 * self.rows - self.outer_products - input_rows)
    }

    fn flops(&self, rows: usize) -> f64 {
        2.0 * rows as f64 * self.d_input as f64 * self.d_output as f64
    }
}
