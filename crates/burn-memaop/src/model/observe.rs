//! What the layers of a model did at their last step, for metrics and logs.

use std::sync::Once;

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
/// # let model = MemAopLinearConfig::new(3, 2).init(&device).with_aop(aop);
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
    /// Reports what each layer did. Once observed, layers with a fixed K and
    /// [`Systematic`](crate::Method::Systematic) measure their noise, which takes half a per cent of
    /// their time. Layers that choose K measure it anyway.
    pub fn new() -> Self {
        Self::default()
    }

    /// Also compares one of `interval` gradients of each layer with the exact one, which costs the
    /// product that the layer is there to save.
    ///
    /// # Panics
    ///
    /// Panics if the interval is 0.
    pub fn with_error(self, interval: usize) -> Self {
        assert!(
            interval > 0,
            "AopObserver: the interval must be at least 1, but got 0"
        );
        Self {
            error_interval: Some(interval as u64),
        }
    }

    /// Reports what each layer did at its last step. Call it after each backward pass. It does not
    /// wait for the device. A layer that is exact at every step only reports the steps that it
    /// takes after it was first observed.
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
                added_noise: seen.added_noise,
                time: seen.time,
                d_input,
                d_output,
                error: seen.error,
            })
        };
        let layers = tree::layers(module).into_iter().filter_map(report);
        let report = AopReport {
            layers: layers.collect(),
        };
        if report.to_best_batch().is_some_and(|cost| cost > 1.0) {
            static WARNING: Once = Once::new();
            WARNING.call_once(|| {
                log::warn!(
                    "burn-memaop: the rows that the layers of this model draw cost more than they save, compared \
                     with exact gradients (OuterProducts::All) and the batch that is best for them."
                );
            });
        }
        report
    }
}

/// The layers of a model that have taken a step since they were observed last.
#[derive(Debug, Clone, Default)]
pub struct AopReport {
    /// The reports of the layers, in the order of the model's fields.
    pub layers: Vec<LayerReport>,
}

impl AopReport {
    /// The mean of [`LayerReport::to_best_batch`] over the layers that have it, weighed by the
    /// operations of their exact backward passes. A warning is logged once in a process, at the
    /// first report whose value is above 1.
    pub fn to_best_batch(&self) -> Option<f64> {
        LayerReport::mean_to_best_batch(self.layers.iter())
    }
}

/// One layer at one step.
#[derive(Debug, Clone)]
pub struct LayerReport {
    /// The fields of the model that lead to the layer, separated by dots.
    pub name: String,
    /// The number of gradients before this one.
    pub step: u64,
    /// K, the number of outer products evaluated.
    pub outer_products: usize,
    /// M, the number of rows of the batch, or of positions of a convolution's output.
    pub rows: usize,
    /// The number of computed rows of the gradient of the input. None if nothing below the layer
    /// asks for that gradient, as in the first layer of most models.
    pub input_rows: Option<usize>,
    /// The noise-to-signal ratio by which [`OuterProducts::Auto`](crate::OuterProducts::Auto) chose
    /// K: the variance of a batch's gradient, if its rows are independent, relative to the square
    /// of the true gradient. With a fixed K it is measured once the layer is observed, if the method
    /// is [`Systematic`](crate::Method::Systematic). None before the first measurement, and if the
    /// layer always takes all rows.
    pub noise: Option<f64>,
    /// R, the variance that drawing rows adds to the gradient of the weight, relative to that of
    /// the batch, if its rows are independent. It is 0 if K is M. None before the first
    /// measurement, and for methods other than [`Systematic`](crate::Method::Systematic).
    pub added_noise: Option<f64>,
    /// f, the expected time of a step of this layer, relative to an exact one. It is that of the
    /// [cost rule](crate::AopConfig::cost_rule).
    pub time: f64,
    /// The number of inputs of the layer, or of values of a convolution's patch in one group.
    pub d_input: usize,
    /// The number of outputs of the layer, or of its channels.
    pub d_output: usize,
    error: Option<Reading<2>>,
}

impl LayerReport {
    /// The relative error of the gradient of the weight, `|approximate - exact| / |exact|` in
    /// Frobenius norms. Waits for the device the first time. With a memory the gradient also holds
    /// rows of earlier batches. None if the step was not [compared](AopObserver::with_error) or
    /// took all rows, if a gradient is not finite, or if the exact one is zero.
    pub fn error(&self) -> Option<f64> {
        let [distance, exact] = self.error.as_ref()?.read();
        let error = distance / exact;
        error.is_finite().then_some(error)
    }

    /// `f (1 + R)`: the time of training with the present K, relative to exact training, if both may
    /// choose the batch that is best for them. Above 1, exact steps with the best batch are better
    /// (`docs/results.md` has the reason). None where [`added_noise`](Self::added_noise) is.
    pub fn to_best_batch(&self) -> Option<f64> {
        Some(self.time * (1.0 + self.added_noise?))
    }

    pub(crate) fn mean_to_best_batch<'a>(layers: impl Iterator<Item = &'a Self>) -> Option<f64> {
        let costs = layers.filter_map(|layer| Some((layer.exact_flops(), layer.to_best_batch()?)));
        let (flops, sum) = costs.fold((0.0, 0.0), |(all, sum), (flops, cost)| {
            (all + flops, sum + flops * cost)
        });
        (flops > 0.0).then(|| sum / flops)
    }

    /// The floating-point operations of the exact backward pass: `2 M N P` for the gradient of the
    /// weight, and as many for that of the input if it is asked for.
    pub fn exact_flops(&self) -> f64 {
        let products = 1 + usize::from(self.input_rows.is_some());
        self.flops(products * self.rows)
    }

    /// The operations of the exact backward pass that were saved: `2 (M - K) N P`, and as many for
    /// rows of the gradient of the input that were left out.
    pub fn saved_flops(&self) -> f64 {
        let input_rows = self.input_rows.unwrap_or(self.rows);
        self.flops(2 * self.rows - self.outer_products - input_rows)
    }

    fn flops(&self, rows: usize) -> f64 {
        2.0 * rows as f64 * self.d_input as f64 * self.d_output as f64
    }
}
