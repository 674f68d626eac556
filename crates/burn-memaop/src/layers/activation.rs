//! Activations: Burn's, faster, or keeping only a bit or a byte of a value for the backward pass.
//!
//! Burn's activations keep their input, which beside layers with a
//! [`StoredInput`](crate::StoredInput) of few bits is the larger part of what is kept.
//! [`burn_memaop::nn`](crate::nn) has these in the places of Burn's.
//!
//! ```
//! use burn::prelude::*;
//! use burn_memaop::nn::Relu; // was: burn::nn
//!
//! let device = Device::flex().autodiff();
//! let output = Relu::new().forward(Tensor::<2>::ones([8, 16], &device));
//! assert_eq!(output.dims(), [8, 16]);
//! ```

use burn::{
    backend::Dispatch,
    config::Config,
    module::{Content, DisplaySettings, Initializer, Module, ModuleDisplay},
    nn::{
        self, LinearLayout,
        activation::{Activation, ActivationConfig},
    },
    tensor::{Device, Tensor, activation},
};

use super::linear::{MemAopLinear, is_tracked};
use crate::{
    backward::{LayerOps, SharedInput, cost, is_supported},
    config::{AopConfig, StoredInput},
    layers::later,
    rows::random::Random,
    state::Stateful,
};

/// Applies [`burn::tensor::activation::relu`]. The gradient is the same, and needs one bit a value.
///
/// Burn's own function is used where no gradient is asked for, with gradient checkpointing (which
/// can compute again what it needs), on devices that this crate has no code for, and where only the
/// host could pack values: in double precision, in half precision on CPUs, with LibTorch and on
/// CubeCL's CPU runtime.
pub fn relu<const D: usize>(input: Tensor<D>) -> Tensor<D> {
    match packs(&input) {
        false => activation::relu(input),
        true => as_matrix(input, |input| {
            Tensor::from_dispatch(Dispatch::memaop_relu(input.into_dispatch()))
        }),
    }
}

/// Applies [`burn::tensor::activation::gelu`], and keeps the derivative in 8 bits, rounded by the
/// random bits of the pass.
pub(super) fn packed_gelu<const D: usize>(
    input: Tensor<D>,
    random: impl FnOnce(&Device) -> Random,
) -> Tensor<D> {
    match packs(&input) {
        false => exact_gelu(input),
        true => {
            let random = random(&input.device());
            as_matrix(input, |input| {
                Tensor::from_dispatch(Dispatch::memaop_packed_gelu(input.into_dispatch(), random))
            })
        }
    }
}

/// Applies [`burn::tensor::activation::gelu`] to 1e-6, faster on Flex in single precision. There
/// it is used for inference, too.
pub(super) fn exact_gelu<const D: usize>(input: Tensor<D>) -> Tensor<D> {
    let device = input.device();
    let on = device.as_dispatch();
    let infers = !device.is_autodiff() && cost::is_cpu(on);
    match is_supported(on) && (is_tracked(&input) || infers) {
        false => activation::gelu(input),
        true => as_matrix(input, |input| {
            Tensor::from_dispatch(Dispatch::memaop_gelu(input.into_dispatch()))
        }),
    }
}

/// Whether something is kept, and can be kept in few bits.
fn packs<const D: usize>(input: &Tensor<D>) -> bool {
    let device = input.device();
    is_tracked(input)
        && is_supported(device.as_dispatch())
        && cost::packs(device.as_dispatch(), input.dtype())
}

/// The least width of a row. Its last words and groups, which may not be full, then count little.
const LEAST_WIDTH: usize = 512;
/// The widest row that is looked for.
const MOST_WIDTH: usize = 8 * LEAST_WIDTH;

/// The width of rows for so many values, of which `last` lie on the last axis. A core or a cube
/// takes a row. None if no width that is neither narrow nor wide divides the values.
fn row_width(values: usize, last: usize) -> Option<usize> {
    if values <= LEAST_WIDTH || (LEAST_WIDTH..=MOST_WIDTH).contains(&last) {
        return Some(last.max(values.min(LEAST_WIDTH)));
    }
    if last > MOST_WIDTH {
        return (LEAST_WIDTH..=MOST_WIDTH).find(|&width| last.is_multiple_of(width));
    }
    let rows = values / last;
    let merged = LEAST_WIDTH.div_ceil(last)..=MOST_WIDTH / last;
    match merged
        .into_iter()
        .find(|&merged| rows.is_multiple_of(merged))
    {
        Some(merged) => Some(merged * last),
        None if values <= MOST_WIDTH => Some(values),
        None => (last >= 32).then_some(last),
    }
}

/// Applies a function of values to a tensor as one matrix.
pub(super) fn as_matrix<const D: usize>(
    input: Tensor<D>,
    function: impl FnOnce(Tensor<2>) -> Tensor<2>,
) -> Tensor<D> {
    let shape = input.shape();
    let values = shape.num_elements();
    if values == 0 {
        return input;
    }
    if let Some(width) = row_width(values, shape[D - 1]) {
        return function(input.reshape([values / width, width])).reshape(shape);
    }
    // The number of narrow rows is prime, for instance. Zeros fill the last row up.
    let rows = values.div_ceil(LEAST_WIDTH);
    let zeros = [rows * LEAST_WIDTH - values];
    let zeros = Tensor::<1>::zeros(zeros, (&input.device(), input.dtype()));
    let filled = Tensor::cat(vec![input.reshape([values]), zeros], 0);
    let output = function(filled.reshape([rows, LEAST_WIDTH]));
    let output = output.reshape([rows * LEAST_WIDTH]);
    output.slice(0..values).reshape(shape)
}

/// Applies [`relu`], as [`burn::nn::Relu`] does. It keeps one bit a value, where Burn's keeps its
/// input.
#[derive(Module, Debug, Default)]
pub struct Relu;

impl Relu {
    /// Create the module.
    pub fn new() -> Self {
        Self
    }

    /// Applies the forward pass on the input tensor.
    ///
    /// # Shapes
    ///
    /// - input: `[..., any]`
    /// - output: `[..., any]`
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        relu(input)
    }
}

impl From<Relu> for Activation {
    /// Gives Burn's module, because Burn's list of activations has no other.
    fn from(_: Relu) -> Self {
        nn::Relu::new().into()
    }
}

/// Applies [`burn::tensor::activation::gelu`], as [`burn::nn::Gelu`] does.
///
/// By default its values differ from Burn's by at most 1e-6, and on Flex in single precision it
/// takes less time.
///
/// With a [`StoredInput`] of few bits its backward pass keeps the derivative in 8 bits, with a
/// scale for each 64 values, at most 0.009 off. [`with_aop`](crate::with_aop) sets this for the
/// `Gelu` of a model as for its layers. The derivative is rounded up or down at random, with the
/// distances as odds, by new random bits in each pass, so the expected gradient is exact. If one
/// `Gelu` is above another, both must round by different bits. [`with_aop`](crate::with_aop) of the
/// whole model arranges this by the names of their fields. If you configure them one by one, set
/// two seeds.
///
/// A derivative that is not finite makes its 64 NaN. Nothing is packed where [`relu`] is Burn's
/// own, or in the tanh approximation.
///
/// The number of passes is [state](crate::MemAopLinear#state): each device has one, clones share
/// it, and records hold it with [`AopConfig::saved_state`].
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct Gelu {
    /// Whether to use tanh approximation.
    pub approximate: bool,
    passes: Stateful,
}

impl Default for Gelu {
    fn default() -> Self {
        Self::new()
    }
}

impl Gelu {
    /// Create the module with exact GELU.
    pub fn new() -> Self {
        Self {
            approximate: false,
            passes: Stateful::new(),
        }
    }

    /// Create the module with tanh approximation.
    pub fn new_approximate() -> Self {
        Self {
            approximate: true,
            ..Self::new()
        }
    }

    /// The same with another configuration, of which `stored_input`, `seed` and `saved_state`
    /// count.
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

    /// Applies the forward pass on the input tensor.
    ///
    /// # Shapes
    ///
    /// - input: `[..., any]`
    /// - output: `[..., any]`
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        if self.approximate {
            return activation::gelu_approximate(input);
        }
        match self.passes.aop.stored_input {
            StoredInput::Full => exact_gelu(input),
            StoredInput::Int8 | StoredInput::Int4 => {
                let Stateful { aop, state } = &self.passes;
                packed_gelu(input, |device| state.pass_random(aop.seed, device))
            }
        }
    }
}

impl ModuleDisplay for Gelu {
    fn custom_content(&self, content: Content) -> Option<Content> {
        content.add("approximate", &self.approximate).optional()
    }
}

impl From<Gelu> for Activation {
    /// Gives Burn's module, because Burn's list of activations has no other.
    fn from(gelu: Gelu) -> Self {
        let approximate = gelu.approximate;
        nn::Gelu { approximate }.into()
    }
}

/// Configuration to create a [`SwiGlu`] layer, with the fields of Burn's
/// [`SwiGluConfig`](nn::SwiGluConfig). To set an [`AopConfig`], use [`with_aop`](crate::with_aop).
#[derive(Config, Debug)]
pub struct SwiGluConfig {
    /// The size of the input features.
    pub d_input: usize,
    /// The size of the output features.
    pub d_output: usize,
    /// If a bias should be applied during the linear transformations.
    #[config(default = false)]
    pub bias: bool,
    /// The type of function used to initialize neural network parameters.
    #[config(
        default = "Initializer::KaimingUniform { gain: 1.0 / 3.0f64.sqrt(), fan_out_only: false }"
    )]
    pub initializer: Initializer,
    /// The layout in which the linear parameters are stored.
    #[config(default = "LinearLayout::Row")]
    pub layout: LinearLayout,
}

impl SwiGluConfig {
    /// Creates a [`SwiGlu`] with the parameters that Burn's configuration gives from the same
    /// random state.
    pub fn init(&self, device: &Device) -> SwiGlu {
        let burns = nn::SwiGluConfig::from(self.clone());
        SwiGlu::from_swiglu(burns.init(device), AopConfig::new())
    }
}

impl From<SwiGluConfig> for nn::SwiGluConfig {
    fn from(config: SwiGluConfig) -> Self {
        Self {
            d_input: config.d_input,
            d_output: config.d_output,
            bias: config.bias,
            initializer: config.initializer,
            layout: config.layout,
        }
    }
}

impl From<SwiGluConfig> for ActivationConfig {
    /// Gives that of Burn's module, because Burn's list of activations has no other.
    fn from(config: SwiGluConfig) -> Self {
        Self::SwiGlu(config.into())
    }
}

/// [`burn::nn::SwiGlu`] whose two linear layers are [`MemAopLinear`]: `silu(x W + b) (x V + c)`.
///
/// Create it with [`SwiGluConfig`], or from Burn's with [`from_swiglu`](Self::from_swiglu).
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct SwiGlu {
    /// The layer whose output the activation is applied to.
    pub linear_inner: MemAopLinear,
    /// The layer whose output is multiplied by the activation.
    pub linear_outer: MemAopLinear,
}

impl ModuleDisplay for SwiGlu {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new()
            .with_new_line_after_attribute(false)
            .optional()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        let [d_input, d_output] = self.linear_inner.weight.shape().dims();
        content
            .add("d_input", &d_input)
            .add("d_output", &d_output)
            .add("bias", &self.linear_inner.bias.is_some())
            .optional()
    }
}

impl SwiGlu {
    /// Takes the parameters of Burn's module, with their ids.
    ///
    /// # Panics
    ///
    /// Panics if [`AopConfig::validate`] rejects `aop`.
    pub fn from_swiglu(swiglu: nn::SwiGlu, aop: AopConfig) -> Self {
        Self {
            linear_inner: MemAopLinear::from_linear(swiglu.linear_inner, aop),
            linear_outer: MemAopLinear::from_linear(swiglu.linear_outer, later(aop, 1)),
        }
    }

    /// Gives the parameters back, with their ids.
    pub fn into_swiglu(self) -> nn::SwiGlu {
        nn::SwiGlu {
            linear_inner: self.linear_inner.into_linear(),
            linear_outer: self.linear_outer.into_linear(),
        }
    }

    /// Applies the Swish Gated Linear Unit to the input tensor.
    ///
    /// # Shapes
    ///
    /// - input: `[..., d_input]`, of any rank
    /// - output: `[..., d_output]`
    ///
    /// # Panics
    ///
    /// As [`MemAopLinear::forward`].
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        let shared = SharedInput::default();
        let inner = self
            .linear_inner
            .forward_shared(input.clone(), Some(&shared));
        let outer = self.linear_outer.forward_shared(input, Some(&shared));
        activation::silu(inner) * outer
    }
}

impl From<SwiGlu> for Activation {
    /// Gives Burn's module, because Burn's list of activations has no other.
    fn from(swiglu: SwiGlu) -> Self {
        swiglu.into_swiglu().into()
    }
}

#[cfg(test)]
mod tests {
    use super::row_width;

    #[test]
    fn rows_are_neither_narrow_nor_all_in_one() {
        for (rows, last, width) in [
            (4096, 512, 512),
            (4096, 2048, 2048),
            (8192, 256, 512),
            (64 * 32 * 28, 28, 28 * 28),
            (100_000, 1, 625),
            (128, 10, 640),
            // The number of rows is prime, and they are wide enough by themselves or not.
            (8191, 256, 256),
            (7, 300, 2100),
            (1, 9, 9),
        ] {
            assert_eq!(row_width(rows * last, last), Some(width), "{rows} {last}");
        }
        assert_eq!(row_width(3 * 8191, 3), None);
        // Long rows are split.
        assert_eq!(row_width(2 * 100_000, 100_000), Some(625));
        assert_eq!(row_width(2 * 1_000_003, 1_000_003), None);
    }
}
