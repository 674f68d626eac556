//! The published memory under a learning rate that changes.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use thiserror::Error;

/// A learning rate that memories follow.
///
/// The published algorithm keeps rows times the root of the learning rate of their step,
/// `m^X + sqrt(eta_t) X`, so that a row is applied with the learning rate that it came with. The
/// memory of a [`MemAopLinear`](crate::MemAopLinear) is in gradient units: a row is applied with
/// the learning rate of the step that chooses it. The two agree while the learning rate is
/// constant. When it changes from `eta_a` to `eta_b`, the published memory in gradient units is
/// both of its factors times `sqrt(eta_a / eta_b)`, and a layer that follows a learning rate does
/// just that before its next gradient.
///
/// Off unless attached: with a schedule that falls, old rows then weigh more than new ones, which
/// is the opposite of what the schedule is for; and a rule such as Adam's has no one learning rate.
///
/// ```
/// # use burn::{nn::LinearConfig, tensor::{Device, Tensor}};
/// # use burn_memaop::{SharedLearningRate, MemAopLinearConfig};
/// # let device = Device::flex().autodiff();
/// # let model = MemAopLinearConfig::new(3, 2).init(&device);
/// let rate = SharedLearningRate::new();
/// rate.attach(&model);
/// for step in 0..3 {
///     let eta = 0.1 / (1.0 + step as f64);
///     rate.set(eta)?; // before the backward pass
///     let grads = model.forward(Tensor::<2>::ones([4, 3], &device)).sum().backward();
///     // ... an optimizer step with eta
/// }
/// # Ok::<(), burn_memaop::LearningRateError>(())
/// ```
#[derive(Debug, Clone)]
pub struct SharedLearningRate(Arc<AtomicU64>);

/// A learning rate that no memory can follow.
#[derive(Debug, Clone, Copy, PartialEq, Error)]
#[error("SharedLearningRate: it must be positive and finite, but got {0}")]
pub struct LearningRateError(f64);

impl Default for SharedLearningRate {
    fn default() -> Self {
        Self::new()
    }
}

impl SharedLearningRate {
    /// One that is not set yet; memories wait for it.
    pub fn new() -> Self {
        Self(Arc::new(AtomicU64::new(f64::NAN.to_bits())))
    }

    /// Sets the learning rate of the optimizer step that the next backward pass is for.
    ///
    /// # Errors
    ///
    /// A rate that is not positive and finite; the one before stays.
    pub fn set(&self, rate: f64) -> Result<(), LearningRateError> {
        if !(rate > 0.0 && rate.is_finite()) {
            return Err(LearningRateError(rate));
        }
        self.0.store(rate.to_bits(), Ordering::Relaxed);
        Ok(())
    }

    /// The rate, if it is set.
    pub fn get(&self) -> Option<f64> {
        let rate = f64::from_bits(self.0.load(Ordering::Relaxed));
        (!rate.is_nan()).then_some(rate)
    }
}

/// The factor that takes rows kept at one rate to another.
pub(crate) fn rescale(from: f64, to: f64) -> f64 {
    (from / to).sqrt()
}
