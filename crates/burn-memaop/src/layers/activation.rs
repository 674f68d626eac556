//! Activation functions that keep only a bit or a byte of a value for the backward pass.
//!
//! Burn's keep their input, which beside layers with a [`StoredInput`](crate::StoredInput) of few
//! bits is the larger part of what is kept.
//!
//! ```
//! use burn::prelude::*;
//! use burn_memaop::activation::Relu; // was: burn::nn
//!
//! let device = Device::flex().autodiff();
//! let output = Relu::new().forward(Tensor::<2>::ones([8, 16], &device));
//! assert_eq!(output.dims(), [8, 16]);
//! ```

use burn::{
    backend::Dispatch,
    module::{Content, Module, ModuleDisplay},
    tensor::{Device, Tensor, activation},
};

use super::linear::is_tracked;
use crate::{
    backward::{LayerOps, assert_supported, cost},
    rows::random::Random,
    state::LayerState,
};

/// Applies [`burn::tensor::activation::relu`]. The gradient is the same, and needs one bit a value.
///
/// Burn's own function is used where no gradient is asked for, with gradient checkpointing (which
/// can compute again what it needs), and where only the host could pack values: in double
/// precision, in half precision on CPUs, with LibTorch and on CubeCL's CPU runtime.
///
/// # Panics
///
/// Panics if the feature for the backend of `input` is not enabled; the message names the feature.
pub fn relu<const D: usize>(input: Tensor<D>) -> Tensor<D> {
    match packs(&input) {
        false => activation::relu(input),
        true => as_matrix(input, |input| {
            Tensor::from_dispatch(Dispatch::memaop_relu(input.into_dispatch()))
        }),
    }
}

/// Applies [`burn::tensor::activation::gelu`], and keeps the derivative as [`Gelu`] does, rounded
/// by the random bits of the pass.
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

/// Applies [`burn::tensor::activation::gelu`] to 1e-6, faster on Flex in single precision. It is
/// Burn's own where no gradient is asked for.
pub(super) fn exact_gelu<const D: usize>(input: Tensor<D>) -> Tensor<D> {
    match is_tracked(&input) {
        false => activation::gelu(input),
        true => as_matrix(input, |input| {
            Tensor::from_dispatch(Dispatch::memaop_gelu(input.into_dispatch()))
        }),
    }
}

/// Whether something is kept, and can be kept in few bits.
fn packs<const D: usize>(input: &Tensor<D>) -> bool {
    let device = input.device();
    assert_supported(device.as_dispatch());
    is_tracked(input) && cost::packs(device.as_dispatch(), input.dtype())
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
fn as_matrix<const D: usize>(
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

/// Applies [`relu`], as [`burn::nn::Relu`] does.
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
    ///
    /// # Panics
    ///
    /// As [`relu`].
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        relu(input)
    }
}

/// Applies [`burn::tensor::activation::gelu`], as [`burn::nn::Gelu`] does. Its derivative is kept
/// in 8 bits, with a scale for each 64 values, and is at most 0.009 off.
///
/// The derivative is rounded up or down at random, with the distances as odds, by new random bits
/// in each pass. So the expected gradient of one `Gelu` is exact; in a stack, each needs its own
/// [seed](Self::with_seed). A derivative that is not finite makes its 64 NaN. The number of passes
/// is [state](crate::MemAopLinear#state): each device has one, clones share it, records hold it.
///
/// On Flex in single precision the values are Burn's to 1e-6, and take less time. Nothing is packed
/// where [`relu`] is Burn's own.
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct Gelu {
    state: LayerState,
    seed: u64,
}

impl Default for Gelu {
    fn default() -> Self {
        Self::new()
    }
}

impl Gelu {
    /// Create the module.
    pub fn new() -> Self {
        Self {
            state: LayerState::without_device(),
            seed: 0,
        }
    }

    /// The same with another seed than 0 for the random bits. Modules with equal seeds round equal
    /// positions alike, so the expected gradient is not exact if one is above the other.
    pub fn with_seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    /// Applies the forward pass on the input tensor.
    ///
    /// # Shapes
    ///
    /// - input: `[..., any]`
    /// - output: `[..., any]`
    ///
    /// # Panics
    ///
    /// As [`relu`].
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        packed_gelu(input, |device| Random {
            seed: self.seed,
            step: self.state.on(device).lock().count_pass(),
        })
    }
}

impl ModuleDisplay for Gelu {
    fn custom_content(&self, content: Content) -> Option<Content> {
        content.optional()
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
