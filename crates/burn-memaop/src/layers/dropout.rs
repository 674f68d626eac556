//! Dropout that keeps a number in place of a mask.

use burn::{
    backend::Dispatch,
    config::Config,
    module::{Content, DisplaySettings, Flag, Module, ModuleDisplay, Param},
    nn,
    tensor::{DType, Device, Tensor},
};

use super::activation::as_matrix;
use crate::{
    backward::{LayerOps, cost, is_supported},
    config::AopConfig,
    rows::random,
    state::Stateful,
};

/// Configuration to create a [`Dropout`] layer, with the field of Burn's
/// [`DropoutConfig`](nn::DropoutConfig).
#[derive(Config, Debug)]
pub struct DropoutConfig {
    /// The probability that a value becomes zero during training.
    pub prob: f64,
}

impl DropoutConfig {
    /// Creates a [`Dropout`].
    ///
    /// # Panics
    ///
    /// Panics unless `prob` is at least 0 and below 1.
    pub fn init(&self) -> Dropout {
        let burns = nn::DropoutConfig::new(self.prob).init();
        Dropout::from_dropout(burns, AopConfig::new())
    }
}

/// Sets values to zero at random during training, as [`burn::nn::Dropout`] does.
///
/// Burn's keeps a mask of as many values as its input. This one keeps two numbers: the random bits
/// of a pass are a function of a seed, the number of the pass and the position of a value, so the
/// backward pass draws them again (`docs/algorithm.md`, "Random numbers").
///
/// Burn's generator draws the number of the first pass, and each later pass adds 1. So a
/// [`Device::seed`] before the first pass decides which values are dropped. In a browser, the number
/// depends on the order in which dropouts first run. With the same seed, this dropout and Burn's
/// drop different values.
///
/// The count of passes is [state](crate::MemAopLinear#state): each device has one, clones share it,
/// and records hold it with [`AopConfig::saved_state`]. A training that is resumed from such a record
/// drops the same values as one that was not interrupted. If a copy of a model is to drop other
/// values than the model, call [`reset`](crate::reset) on it.
///
/// Burn's own function is used in double precision, in half precision on CPUs, with LibTorch, on
/// CubeCL's CPU runtime, and on devices that this crate has no code for.
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct Dropout {
    /// The probability that a value becomes zero during training.
    pub prob: f64,
    /// Whether to behave as during training. Freezing the module clears it.
    pub training: Param<Flag>,
    passes: Stateful,
}

impl Dropout {
    /// Takes the fields of Burn's module. Only `seed` and `saved_state` of `aop` are used.
    ///
    /// # Panics
    ///
    /// Panics if [`AopConfig::validate`] rejects `aop`.
    pub fn from_dropout(dropout: nn::Dropout, aop: AopConfig) -> Self {
        Self {
            prob: dropout.prob,
            training: dropout.training,
            passes: Stateful::new().with_aop(aop.valid()),
        }
    }

    /// The same with another configuration, of which only `seed` and `saved_state` are used.
    ///
    /// # Panics
    ///
    /// Panics if [`AopConfig::validate`] rejects `aop`.
    pub fn with_aop(self, aop: AopConfig) -> Self {
        Self {
            passes: self.passes.with_aop(aop.valid()),
            ..self
        }
    }

    /// The configuration.
    pub fn aop(&self) -> AopConfig {
        self.passes.aop
    }

    /// Gives Burn's module.
    pub fn into_dropout(self) -> nn::Dropout {
        self.to_dropout()
    }

    pub(super) fn to_dropout(&self) -> nn::Dropout {
        nn::Dropout {
            prob: self.prob,
            training: self.training.clone(),
        }
    }

    /// Applies the forward pass on the input tensor.
    ///
    /// # Shapes
    ///
    /// - input: `[..., any]`
    /// - output: `[..., any]`
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        let device = input.device();
        if !self.is_on(&device) {
            return input;
        }
        match self.next(&device, input.dtype()) {
            None => self.to_dropout().forward(input),
            Some(dropout) => as_matrix(input, |input| {
                Tensor::from_dispatch(Dispatch::memaop_dropout(input.into_dispatch(), dropout))
            }),
        }
    }

    /// Whether a pass on a device drops values.
    pub(super) fn is_on(&self, device: &Device) -> bool {
        self.training.is_enabled() && device.is_autodiff() && self.prob > 0.0
    }

    /// The dropout of a pass that is counted, or none where Burn's own function is used.
    pub(super) fn next(&self, device: &Device, dtype: DType) -> Option<random::Dropout> {
        let on = device.as_dispatch();
        let Stateful { aop, state } = &self.passes;
        let has_code = is_supported(on) && cost::has_code_for_values(on, dtype);
        has_code.then(|| random::Dropout {
            random: state.dropout_random(aop.seed, device),
            prob: self.prob,
            first: 0,
        })
    }
}

impl ModuleDisplay for Dropout {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        self.to_dropout().custom_settings()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        self.to_dropout().custom_content(content)
    }
}
