use burn::backend::{
    Backend, ExtensionType, TensorMetadata, backend_extension, tensor::FloatTensor,
};

use crate::{
    config::{AopConfig, Memory, MemoryPrecision, Policy},
    gradient,
    memory::MemoryHandle,
};

/// The bias of a [`MemAopOps::memaop_linear`] or its gradient, or none.
#[derive(ExtensionType, Debug)]
pub enum Bias<B: Backend> {
    /// Shape `[d_output]`.
    Some(FloatTensor<B>),
    /// No bias.
    None,
}

impl<B: Backend> Bias<B> {
    pub(crate) fn into_option(self) -> Option<FloatTensor<B>> {
        match self {
            Self::Some(bias) => Some(bias),
            Self::None => None,
        }
    }
}

/// The rows that earlier steps left out, in gradient units (no learning rate in them).
#[derive(ExtensionType, Debug)]
pub enum RowMemory<B: Backend> {
    /// Nothing is kept.
    Empty,
    /// One pair of factors for each batch position; a pair of zeros is a position with nothing
    /// pending.
    Rows {
        /// `m^X`, shape `[rows, d_input]`.
        input: FloatTensor<B>,
        /// `m^G`, shape `[rows, d_output]`.
        grad: FloatTensor<B>,
        /// The number of steps that each pair holds something of, shape `[rows, 1]`, in single
        /// precision at least.
        age: FloatTensor<B>,
    },
}

/// The share of the sum of all `|x^| |g^|` that the chosen rows carry, if it was asked for.
#[derive(ExtensionType, Debug)]
pub enum Share<B: Backend> {
    /// Shape `[1]`, in single precision; NaN where the sum is 0.
    Measured(FloatTensor<B>),
    /// Not asked for.
    Skipped,
}

/// What [`MemAopOps::memaop_weight_gradient`] returns.
#[derive(ExtensionType, Debug)]
pub struct WeightGradient<B: Backend> {
    /// The approximate gradient, shape `[d_input, d_output]`, in the dtype of the input.
    pub weight: FloatTensor<B>,
    /// The memory for the next step.
    #[extension_type]
    pub memory: RowMemory<B>,
    /// The exact gradient of the bias, shape `[d_output]`, as [`AopStep::bias`] asks.
    #[extension_type]
    pub bias: Bias<B>,
    /// As [`AopStep::measure`] asks.
    #[extension_type]
    pub share: Share<B>,
}

/// The settings of one approximate weight gradient.
#[derive(Debug, Clone, Copy)]
pub struct AopStep {
    /// The number of outer products, from 1 to the number of rows.
    pub k: usize,
    /// The rule that chooses the rows.
    pub policy: Policy,
    /// What becomes of the other rows.
    pub memory: Memory,
    /// The precision in which they are kept.
    pub memory_precision: MemoryPrecision,
    /// The seed of the noise.
    pub seed: u64,
    /// The number of gradients the layer has computed before this one.
    pub step: u64,
    /// Whether to compute the gradient of the bias too, which a pass over the batch has at hand.
    pub bias: bool,
    /// Whether to measure the [`Share`].
    pub measure: bool,
}

/// The settings of one approximate input gradient.
#[derive(Debug, Clone, Copy)]
pub struct InputStep {
    /// The number of rows, from 1 to that of the batch.
    pub k: usize,
    /// Whether they are drawn and weighted, and not the largest.
    pub sampled: bool,
    /// The seed of the noise.
    pub seed: u64,
    /// The number of gradients the layer has computed before this one.
    pub step: u64,
}

/// What the autodiff operation needs to know of its layer.
#[derive(Debug, Clone)]
pub struct AopLayer {
    pub(crate) config: AopConfig,
    pub(crate) memory: MemoryHandle,
}

/// The operations of this crate, supplied by a backend extension.
///
/// Each has a default body in primitive operations, which defines its result; a backend overrides
/// what it can do faster.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(feature = "cubecl-backend"),
    LibTorch: cfg(feature = "tch"),
    Autodiff: cfg(feature = "autodiff"),
)]
pub trait MemAopOps: Backend {
    /// `input @ weight + bias`, as Burn's `linear`; under autodiff, with an approximate weight
    /// gradient and exact gradients of input and bias.
    ///
    /// # Shapes
    ///
    /// - input: `[..., d_input]`, rank 2 or more
    /// - weight: `[d_input, d_output]`
    /// - output: `[..., d_output]`
    #[allow(unused_variables)]
    fn memaop_linear(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        #[extension_type] bias: Bias<Self>,
        layer: AopLayer,
    ) -> FloatTensor<Self> {
        Self::linear(input, weight, bias.into_option())
    }

    /// The sum of the outer products of the chosen rows, times their weights with an unbiased
    /// policy, and the memory of the other rows.
    ///
    /// Takes the memory by value, so that a backend that holds the only reference can update it
    /// in place. A row whose score is NaN or infinite is not chosen, adds nothing to the gradient
    /// and leaves a pair of zeros in the memory.
    ///
    /// # Shapes
    ///
    /// - input: `[rows, d_input]`
    /// - grad: `[rows, d_output]`
    /// - memory: any number of rows; the first `rows` take part, missing ones are zero
    // Without a backend the macro has no use for the arguments.
    #[allow(unused_variables)]
    fn memaop_weight_gradient(
        input: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        #[extension_type] memory: RowMemory<Self>,
        step: AopStep,
    ) -> WeightGradient<Self> {
        debug_assert_eq!(input.shape()[0], grad.shape()[0]);
        gradient::weight_gradient::<Self>(input, grad, memory, step)
    }

    /// `grad @ weight^T` for some of the rows, zero in the others; for all of them where
    /// `step.k` is not below their number.
    ///
    /// # Shapes
    ///
    /// - grad: `[rows, d_output]`
    /// - weight: `[d_input, d_output]`
    /// - output: `[rows, d_input]`
    #[allow(unused_variables)]
    fn memaop_input_gradient(
        grad: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        step: InputStep,
    ) -> FloatTensor<Self> {
        gradient::input_gradient::<Self>(grad, weight, step)
    }
}
