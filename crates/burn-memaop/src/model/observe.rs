//! What the layers of a model did at their last step, for metrics and logs.

use burn::module::Module;

use super::tree;
use crate::state::{offer::Shown, reading::Reading};

/// Collects [reports](AopReport) of all layers of this crate in a model.
///
/// ```
/// # use burn::{nn::LinearConfig, tensor::{Device, Tensor}};
/// # use burn_memaop::{AopConfig, AopObserver, MemAopLinearConfig};
/// # let device = Device::flex().autodiff();
/// # let aop = AopConfig::new().with_cost_rule(false);
/// # let model = MemAopLinearConfig::new(3, 2).with_aop(aop).init(&device);
/// let observer = AopObserver::new();
/// for _ in 0..2 {
///     let grads = model.forward(Tensor::<2>::ones([8, 3], &device)).sum().backward();
///     let report = observer.observe(&model); // after the backward pass
///     for layer in &report.layers {
///         println!("{}: {} of {} rows", layer.name, layer.outer_products, layer.rows);
///     }
/// }
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AopObserver {
    error_interval: Option<u64>,
}

impl AopObserver {
    /// Reports what each layer did, which takes no measuring.
    pub fn new() -> Self {
        Self::default()
    }

    /// Compares one of `interval` gradients of each layer with the exact one too. That costs the product which the layer
    /// is there to save.
    ///
    /// # Panics
    ///
    /// If the interval is 0.
    pub fn with_error(self, interval: usize) -> Self {
        assert!(
            interval > 0,
            "AopObserver: the interval must be at least 1, but got 0"
        );
        Self {
            error_interval: Some(interval as u64),
        }
    }

    /// What each layer did at its last step. Call it after each backward pass. It does not wait for the device.
    ///
    /// A layer reports the steps that it takes after it has been observed for the first time.
    pub fn observe<M: Module>(&self, module: &M) -> AopReport {
        let report = |(name, layer): (String, Shown)| {
            let seen = layer.state.watched(self.error_interval)?;
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
                error: seen.error,
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
    error: Option<Reading<2>>,
}

impl LayerReport {
    /// The relative error of the gradient of the weight, `|approximate - exact| / |exact|` in Frobenius norms, at the steps
    /// that are [compared](AopObserver::with_error). With a memory the gradient also holds rows of earlier batches. Waits
    /// for the device the first time. None where there is no exact gradient to compare with: because the step took all rows,
    /// or because that gradient is zero or not finite.
    pub fn error(&self) -> Option<f64> {
        let [distance, exact] = self.error.as_ref()?.read();
        let error = distance / exact;
        error.is_finite().then_some(error)
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
