//! Activation functions whose backward pass needs a bit or a byte of a value, and keeps no more.
//!
//! Burn's keep their input, which for layers with a [`StoredInput`](crate::StoredInput) of few bits is the larger part of what
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

use burn::{backend::Dispatch, module::Module, tensor::Tensor};

use crate::op::{MemAopOps, backends::assert_supported};

/// Applies [`burn::tensor::activation::relu`]; the gradient is the same, and one bit a value is kept for it.
///
/// # Panics
///
/// Panics if the feature for the backend of `input` is not enabled; the message names the feature.
pub fn relu<const D: usize>(input: Tensor<D>) -> Tensor<D> {
    by_rows(input, |input| {
        Tensor::from_dispatch(Dispatch::memaop_relu(input.into_dispatch()))
    })
}

/// Applies [`burn::tensor::activation::gelu`]; its derivative is kept in 8 bits, with a scale for each 64 values of the last
/// axis and rounded to the nearest: at most 0.005 off. On CPUs the values are Burn's to 1e-6, and take less time.
///
/// # Panics
///
/// As [`relu`].
pub fn gelu<const D: usize>(input: Tensor<D>) -> Tensor<D> {
    gelu_by(input, true)
}

/// Keeps the derivative in 8 bits, or the input.
pub(super) fn gelu_by<const D: usize>(input: Tensor<D>, packed: bool) -> Tensor<D> {
    by_rows(input, |input| {
        Tensor::from_dispatch(Dispatch::memaop_gelu(input.into_dispatch(), packed))
    })
}

/// Applies a function of a matrix to the last axis and all others.
fn by_rows<const D: usize>(
    input: Tensor<D>,
    function: impl FnOnce(Tensor<2>) -> Tensor<2>,
) -> Tensor<D> {
    assert_supported(input.device().as_dispatch());
    let shape = input.shape();
    let width = shape[D - 1];
    let rows = shape.num_elements().checked_div(width).unwrap_or(0);
    if rows == 0 {
        return input;
    }
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
