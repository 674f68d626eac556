//! What goes into one approximate gradient and what comes out: plain types, below everything else.

use burn::backend::{
    Backend, ExtensionType, TensorMetadata,
    tensor::{FloatTensor, IntTensor},
};

use super::packing::Packing;
use crate::config::{Method, StoredInput};

/// The input of a layer, as its backward pass finds it.
#[derive(ExtensionType, Debug, Clone)]
pub(crate) enum Input<B: Backend> {
    /// Shape `[rows, d_input]`.
    Full(FloatTensor<B>),
    /// In few bits.
    Packed(#[extension_type] Packed<B>),
}

impl<B: Backend> Input<B> {
    pub(crate) fn width(&self) -> usize {
        match self {
            Self::Full(input) => input.shape()[1],
            Self::Packed(packed) => packed.packing.width,
        }
    }
}

/// Rows in few bits.
#[derive(ExtensionType, Debug, Clone)]
pub(crate) struct Packed<B: Backend> {
    /// 32 bits each, shape `[rows, words]`.
    pub(crate) words: IntTensor<B>,
    /// The norms of the rows before, shape `[rows, 1]`, in single precision at least.
    pub(crate) norms: FloatTensor<B>,
    /// How to read the words.
    pub(crate) packing: Packing,
}

/// A bias or its gradient, or none.
#[derive(ExtensionType, Debug)]
pub(crate) enum Bias<B: Backend> {
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

/// [`Rows`](super::Rows) in the primitives of a backend.
#[derive(ExtensionType, Debug)]
pub(crate) enum RowMemory<B: Backend> {
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
pub(crate) enum Share<B: Backend> {
    /// Shape `[1]`, in single precision; NaN where the sum is 0.
    Measured(FloatTensor<B>),
    /// Not asked for.
    Skipped,
}

/// [`Gradient`](super::Gradient) in the primitives of a backend.
#[derive(ExtensionType, Debug)]
pub(crate) struct WeightGradient<B: Backend> {
    /// The approximate gradient, shape `[d_input, d_output]`, in the dtype of the input.
    pub(crate) weight: FloatTensor<B>,
    /// The memory for the next step.
    #[extension_type]
    pub(crate) memory: RowMemory<B>,
    /// The exact gradient of the bias, shape `[d_output]`, as [`AopStep::bias`] asks.
    #[extension_type]
    pub(crate) bias: Bias<B>,
    /// As [`AopStep::measure`] asks.
    #[extension_type]
    pub(crate) share: Share<B>,
}

/// The settings of one approximate weight gradient.
#[derive(Debug, Clone, Copy)]
pub struct AopStep {
    /// The number of outer products, from 1 to the number of rows.
    pub k: usize,
    /// Which rows they are, and what becomes of the others.
    pub method: Method,
    /// The seed of the noise.
    pub seed: u64,
    /// The number of gradients the layer has computed before this one.
    pub step: u64,
    /// Whether to compute the gradient of the bias too, which a pass over the batch has at hand.
    pub bias: bool,
    /// Whether to measure the share of the score mass that the chosen rows carry.
    pub measure: bool,
}

/// The settings with which rows are packed.
#[derive(Debug, Clone, Copy)]
pub struct PackStep {
    /// In what; there is nothing to pack in [`StoredInput::Full`].
    pub stored: StoredInput,
    /// The seed of the noise with which values are rounded.
    pub seed: u64,
    /// The number of gradients the layer has computed before this one.
    pub step: u64,
}

/// The settings of one approximate input gradient.
#[derive(Debug, Clone, Copy)]
pub struct InputStep {
    /// The number of rows, from 1 to that of the batch.
    pub k: usize,
    /// The seed of the noise.
    pub seed: u64,
    /// The number of gradients the layer has computed before this one.
    pub step: u64,
}

/// The settings of one measurement of the noise of a gradient.
#[derive(Debug, Clone, Copy)]
pub struct NoiseStep {
    /// The numbers of rows of which the variance of sampling is asked for, each from 1 to that of the batch.
    pub ks: [usize; 6],
}
