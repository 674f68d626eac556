//! What the layers of a model did at their last step, for metrics and logs.

use std::sync::{Arc, OnceLock};

use burn::{
    module::Module,
    tensor::{DType, Tensor, TensorReadError},
};

use crate::{memory::RowTensors, tree};

/// Collects [reports](AopReport) of all `MemAopLinear` layers of a model.
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
pub struct AopObserver {
    interval: u64,
    exact_interval: Option<u64>,
}

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
        Self {
            interval: interval as u64,
            exact_interval: None,
        }
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
        Self {
            exact_interval: Some(interval as u64),
            ..self
        }
    }

    /// What each layer did at its last gradient; to be called after each backward pass. Does not
    /// wait for the device.
    pub fn observe<M: Module>(&self, module: &M) -> AopReport {
        let report = |layer: tree::FoundLayer| {
            let mut state = layer.memory.lock();
            let watch = &mut state.watch;
            watch.observer = Some(*self);
            let seen = watch.seen.take()?;
            Some(LayerReport {
                name: layer.path,
                step: seen.step,
                outer_products: seen.k,
                rows: seen.rows,
                input_rows: seen.input_rows,
                d_input: layer.d_input,
                d_output: layer.d_output,
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

    /// Whether the gradient of a step is measured, and whether it is compared with the exact one.
    pub(crate) fn due(&self, step: u64) -> Option<Due> {
        let exact = self.exact_interval.is_some_and(|n| step.is_multiple_of(n));
        (exact || step.is_multiple_of(self.interval)).then_some(Due { exact })
    }
}

/// That a gradient is measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Due {
    pub(crate) exact: bool,
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
    /// M: the rows of the batch.
    pub rows: usize,
    /// The rows of the gradient of the input that are computed, if it is asked for.
    pub input_rows: usize,
    /// The inputs of the layer.
    pub d_input: usize,
    /// The outputs of the layer.
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

    /// Floating-point operations of the exact backward pass, of weight and input: `4 M N P`.
    pub fn exact_flops(&self) -> f64 {
        4.0 * self.rows as f64 * self.d_input as f64 * self.d_output as f64
    }

    /// The operations of it that were saved: `2 (M - K) N P`, and as much for the rows of the gradient
    /// of the input that are left out.
    pub fn saved_flops(&self) -> f64 {
        let left_out = 2 * self.rows - self.outer_products - self.input_rows;
        2.0 * left_out as f64 * self.d_input as f64 * self.d_output as f64
    }
}

/// The figures of a gradient; none where there is nothing to measure: no memory, no comparison
/// with the exact gradient at this step, only zeros.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    /// The share of the sum of all `|x^| |g^|` that the chosen rows carry.
    pub share: Option<f64>,
    /// What is left in the memory against what is applied: the root of the sum over all positions
    /// of `(|m^X| |m^G|)^2`, divided by the Frobenius norm of the gradient.
    pub memory: Option<f64>,
    /// The most steps that a position of the memory holds something of.
    pub oldest: Option<f64>,
    /// `|approximate - exact| / |exact|`, in Frobenius norms, of the gradient of this batch alone.
    /// With a memory the approximate gradient also holds rows of earlier batches.
    pub error: Option<f64>,
    /// The cosine between the two.
    pub cosine: Option<f64>,
}

/// The figures of [`Measured`] on the device: one tensor, so that they are read at once.
#[derive(Debug)]
pub(crate) struct Measurement {
    values: Tensor<1>,
    read: OnceLock<Measured>,
}

/// In place of a figure that there is not; none of them can be it.
const MISSING: f64 = -2.0;

impl Measurement {
    pub(crate) fn new(
        share: Option<Tensor<1>>,
        memory: Option<&RowTensors>,
        gradient: &Tensor<2>,
        exact: Option<Tensor<2>>,
    ) -> Self {
        let device = gradient.device();
        let gradient = gradient.clone().cast(DType::F32);
        let missing = || Tensor::full([1], MISSING, (&device, DType::F32));
        let ratio = |a: Tensor<1>, b: Tensor<1>| {
            let none = b.clone().lower_equal_elem(0.0);
            (a / b).mask_fill(none, MISSING)
        };
        let share = share.map(|share| {
            // NaN where there is nothing to share.
            let none = share.clone().is_nan();
            share.mask_fill(none, MISSING)
        });
        let kept = memory.map(|rows| {
            let squares = |tensor: &Tensor<2>| tensor.clone().cast(DType::F32).square().sum_dim(1);
            let pending = (squares(&rows.input) * squares(&rows.grad)).sum().sqrt();
            (
                ratio(pending, norm(&gradient)),
                rows.age.clone().cast(DType::F32).max(),
            )
        });
        let (kept, oldest) = kept.unzip();
        let compared = exact.map(|exact| {
            let exact = exact.cast(DType::F32);
            let difference = gradient.clone() - exact.clone();
            let product = (gradient.clone() * exact.clone()).sum();
            (
                ratio(norm(&difference), norm(&exact)),
                ratio(product, norm(&gradient) * norm(&exact)),
            )
        });
        let (error, cosine) = compared.unzip();
        let values = [share, kept, oldest, error, cosine];
        let values = values.map(|value| value.unwrap_or_else(missing));
        Self {
            values: Tensor::cat(values.to_vec(), 0),
            read: OnceLock::new(),
        }
    }

    fn read(&self) -> Result<Measured, TensorReadError> {
        if let Some(read) = self.read.get() {
            return Ok(*read);
        }
        let data = self.values.clone().try_into_data()?;
        let mut values = data.iter::<f64>();
        let mut next = || values.next().filter(|&value| value != MISSING);
        let measured = Measured {
            share: next(),
            memory: next(),
            oldest: next(),
            error: next(),
            cosine: next(),
        };
        Ok(*self.read.get_or_init(|| measured))
    }

    /// Where the figures are.
    #[cfg(feature = "train")]
    fn device(&self) -> burn::tensor::Device {
        self.values.device()
    }
}

fn norm(matrix: &Tensor<2>) -> Tensor<1> {
    matrix.clone().square().sum().sqrt()
}
