//! Activation functions whose backward pass needs a bit or a byte of a value, and keeps no more.
//!
//! Burn's keep their input, which beside layers with a [`StoredInput`](crate::StoredInput) of few bits is the larger part of what
//! is kept then.
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
    module::Module,
    tensor::{Tensor, activation},
};

use super::linear::is_tracked;
use crate::op::{MemAopOps, backends::assert_supported, cost};

/// Applies [`burn::tensor::activation::relu`]; the gradient is the same, and one bit a value is kept for it.
///
/// Burn's own where no gradient is asked for, and where values could only be packed by way of the host (double precision on
/// GPUs, half precision on CPUs, LibTorch, CubeCL's CPU runtime).
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

/// Applies [`burn::tensor::activation::gelu`]; its derivative is kept in 8 bits, with a scale for each 64 values, rounded
/// up or down by the place of the value: at most 0.009 off. One that is not finite makes the 64 NaN.
///
/// On Flex in single precision the values are Burn's to 1e-6, and take less time. Burn's own where [`relu`] is.
///
/// # Panics
///
/// As [`relu`].
pub fn gelu<const D: usize>(input: Tensor<D>) -> Tensor<D> {
    match packs(&input) {
        false => activation::gelu(input),
        true => as_matrix(input, |input| {
            Tensor::from_dispatch(Dispatch::memaop_packed_gelu(input.into_dispatch()))
        }),
    }
}

/// Applies [`burn::tensor::activation::gelu`], faster on Flex in single precision, to 1e-6; Burn's own where no gradient is
/// asked for.
pub(super) fn exact_gelu<const D: usize>(input: Tensor<D>) -> Tensor<D> {
    match is_tracked(&input) {
        false => activation::gelu(input),
        true => as_matrix(input, |input| {
            Tensor::from_dispatch(Dispatch::memaop_gelu(input.into_dispatch()))
        }),
    }
}

/// Whether something is kept, and can be in few bits.
fn packs<const D: usize>(input: &Tensor<D>) -> bool {
    let device = input.device();
    assert_supported(device.as_dispatch());
    is_tracked(input) && cost::packs_fast(device.as_dispatch(), input.dtype())
}

/// The least width of a row, for its parts that are not full to count little.
const LEAST_WIDTH: usize = 512;

/// Applies a function of values to all of a tensor as one matrix, in rows of some width.
fn as_matrix<const D: usize>(
    input: Tensor<D>,
    function: impl FnOnce(Tensor<2>) -> Tensor<2>,
) -> Tensor<D> {
    let shape = input.shape();
    let mut width = 1;
    for &length in shape.iter().rev() {
        if width >= LEAST_WIDTH {
            break;
        }
        width *= length;
    }
    if width == 0 {
        return input;
    }
    let rows = shape.num_elements() / width;
    function(input.reshape([rows, width])).reshape(shape)
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

/// Applies [`gelu`], as [`burn::nn::Gelu`] does.
#[derive(Module, Debug, Default)]
pub struct Gelu;

impl Gelu {
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
        gelu(input)
    }
}
