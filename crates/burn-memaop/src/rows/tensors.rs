//! The types that the verbs work on.

use ::burn::backend::{
    Backend, ExtensionType, TensorMetadata,
    tensor::{FloatTensor, IntTensor},
};

use super::{packing::Packing, random::Random, window::Window};
use crate::config::{Baseline, Method};

/// Burn has the path by which its macros find Fusion only with its feature `fusion`. A program can
/// turn that on without this crate's, so the implementations for Fusion must always exist.
#[cfg(feature = "cubecl-backend")]
pub(super) mod burn {
    pub(in crate::rows) mod backend {
        pub(in crate::rows) use ::burn::backend::*;
        pub(in crate::rows) use burn_fusion as fusion;
    }
}

/// One factor of the outer products. The other factor is the gradient of the output.
#[derive(ExtensionType, Debug, Clone)]
#[extension_type(fusion: cfg(feature = "cubecl-backend"))]
pub(crate) enum Factor<B: Backend> {
    /// The number 1: the rows of the gradient are scored alone, for the gradient of the input.
    One,
    /// A matrix, shape `[rows, d_input]`.
    Matrix(FloatTensor<B>),
    /// A matrix in few bits.
    Packed(#[extension_type] Packed<B>),
    /// Images, shape `[images, channels, height, width]`, whose patches are the rows: one for each
    /// position of the output of a convolution. The gradient has the shape of that output.
    Patches(FloatTensor<B>, Window),
}

impl<B: Backend> Factor<B> {
    /// The number of rows of a batch with this gradient of the output.
    pub(crate) fn rows(&self, grad: &FloatTensor<B>) -> usize {
        match self {
            Self::Patches(_, window) => grad.shape()[0] * window.positions(),
            _ => grad.shape()[0],
        }
    }
}

/// Rows in few bits.
#[derive(ExtensionType, Debug, Clone)]
#[extension_type(fusion: cfg(feature = "cubecl-backend"))]
pub(crate) struct Packed<B: Backend> {
    /// Words of 32 bits, shape `[rows, words]`.
    pub(crate) words: IntTensor<B>,
    /// The norms before packing, shape `[rows, 1]`, in single precision at least.
    pub(crate) norms: FloatTensor<B>,
    pub(crate) packing: Packing,
}

/// The scores of the rows, in single precision at least.
#[derive(ExtensionType, Debug, Clone)]
#[extension_type(fusion: cfg(feature = "cubecl-backend"))]
pub(crate) struct Scores<B: Backend> {
    /// `|x| |g|` of every row, shape `[rows]`: the square root of the paper's score.
    pub(crate) score: FloatTensor<B>,
    /// `sqrt(|g| / |x|)` of every row, shape `[rows]`, and 1 where a norm is 0. x times the tilt
    /// has the same norm as g divided by it.
    pub(crate) tilt: FloatTensor<B>,
}

/// The rows that a step uses.
#[derive(ExtensionType, Debug, Clone)]
#[extension_type(fusion: cfg(feature = "cubecl-backend"))]
pub(crate) struct Drawn<B: Backend> {
    /// Shape `[k]`.
    pub(crate) rows: IntTensor<B>,
    /// The root of the weight of each outer product, shape `[k]`, in single precision at least. It
    /// is 0 where fewer than K rows could be drawn. If a score is not finite, all roots are NaN,
    /// and so is the gradient.
    pub(crate) root: FloatTensor<B>,
}

/// The rows that earlier steps left out.
#[derive(ExtensionType, Debug, Clone)]
#[extension_type(fusion: cfg(feature = "cubecl-backend"))]
pub(crate) struct Memory<B: Backend> {
    /// `m^X`, shape `[rows, d_input]`, in single precision at least.
    pub(crate) input: FloatTensor<B>,
    /// `m^G`, shape `[rows, d_output]`.
    pub(crate) grad: FloatTensor<B>,
    /// For each row, the number of steps that it is a sum of, shape `[rows, 1]`.
    pub(crate) age: FloatTensor<B>,
}

/// How many rows are drawn, and by which rule.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Draw {
    pub(crate) k: usize,
    pub(crate) method: Method,
    pub(crate) random: Random,
}

impl Draw {
    /// The number of rows of a draw, those without weight included. [`Baseline::Bernoulli`] draws a
    /// random number, so its draw is filled up to six standard deviations above K.
    pub(crate) fn count(&self, rows: usize) -> usize {
        let most = self.k + 6 * (self.k as f64).sqrt().ceil() as usize;
        match self.method {
            Method::Baseline(Baseline::Bernoulli) => most.min(rows),
            _ => self.k,
        }
    }
}

/// How a batch is added to a memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fold {
    /// Whether the scales of [`Memory::Balanced`](crate::Memory::Balanced) are used.
    pub(crate) balanced: bool,
    /// The factor by which the product of the two kept factors shrinks.
    pub(crate) decay: f64,
    pub(crate) random: Random,
}

/// The K for which one measurement gives the variances.
pub(crate) type Candidates = [usize; 6];
