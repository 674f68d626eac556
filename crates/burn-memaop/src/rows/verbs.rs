//! The verbs, and the types that they work on.

use ::burn::{
    backend::{
        Backend, ExtensionType, TensorMetadata, backend_extension,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::{DType, FloatDType, Shape},
};

use super::{
    packing::Packing,
    portable::{self, working_dtype},
    random::Random,
    transfer::CopyOut,
    window::Window,
};
use crate::config::{Baseline, Method};

/// Burn has the path by which its macros find Fusion only with its feature `fusion`. A program can
/// turn that on without this crate's, so the implementations for Fusion must always exist.
#[cfg(feature = "cubecl-backend")]
mod burn {
    pub(super) mod backend {
        pub(in crate::rows::verbs) use ::burn::backend::*;
        pub(in crate::rows::verbs) use burn_fusion as fusion;
    }
}

#[cfg(feature = "cubecl-backend")]
use burn_fusion::custom::TensorSpec;

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

/// The verbs of a backend.
// Without a backend, the code of the macro does not use the arguments.
#[allow(unused_variables)]
#[backend_extension(
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(feature = "cubecl-backend"),
    LibTorch: cfg(feature = "tch"),
    Fusion: cfg(feature = "cubecl-backend"),
)]
pub(crate) trait RowOps: CopyOut {
    /// Scores every row.
    #[fusion(meta = |input, grad| described::scores(described::rows(input, grad), grad))]
    fn memaop_score(
        #[extension_type] input: Factor<Self>,
        grad: FloatTensor<Self>,
    ) -> Scores<Self> {
        portable::score::<Self>(input, grad)
    }

    /// Adds the batch to the first rows of a memory, which has at least as many, and scores them.
    /// If a value of the batch is not finite, the memory stays as it is, and all scores are NaN.
    #[fusion(meta = |memory, _input, grad, _fold| (memory.clone(), described::scores(grad.shape[0], grad)))]
    fn memaop_fold(
        #[extension_type] memory: Memory<Self>,
        input: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        fold: Fold,
    ) -> (Memory<Self>, Scores<Self>) {
        portable::fold::<Self>(memory, input, grad, fold)
    }

    /// Draws rows by their scores.
    #[fusion(meta = |score, draw| described::drawn(score, draw))]
    fn memaop_draw(score: FloatTensor<Self>, draw: Draw) -> Drawn<Self> {
        portable::draw::<Self>(score, draw)
    }

    /// The sum of the outer products of the drawn rows, shape `[d_input, d_output]`. For patches
    /// the shape is `[channels, patch]`.
    #[fusion(meta = |input, grad, _tilt, _drawn| described::weight(input, grad))]
    fn memaop_product(
        #[extension_type] input: Factor<Self>,
        grad: FloatTensor<Self>,
        tilt: FloatTensor<Self>,
        #[extension_type] drawn: Drawn<Self>,
    ) -> FloatTensor<Self> {
        portable::product::<Self>(input, grad, tilt, drawn)
    }

    /// The sum of the outer products of the drawn rows of a memory, in the given type, and the
    /// memory without these rows. If the draw is NaN, the memory stays as it is.
    #[fusion(meta = |memory, _tilt, _drawn, dtype| (described::of_memory(memory, *dtype), memory.clone()))]
    fn memaop_take_out(
        #[extension_type] memory: Memory<Self>,
        tilt: FloatTensor<Self>,
        #[extension_type] drawn: Drawn<Self>,
        dtype: FloatDType,
    ) -> (FloatTensor<Self>, Memory<Self>) {
        portable::take_out::<Self>(memory, tilt, drawn, dtype)
    }

    /// `grad @ weight^T` of the drawn rows, times their weights. The other rows are zero, or NaN
    /// where their score is not finite.
    #[fusion(dtype = grad, shape = Shape::new([grad[0], weight[0]]))]
    fn memaop_input_product(
        grad: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        score: FloatTensor<Self>,
        #[extension_type] drawn: Drawn<Self>,
    ) -> FloatTensor<Self> {
        portable::input_product::<Self>(grad, weight, score, drawn)
    }

    /// The root of the sum of the squares of all scores, and for each K of `ks` the root of the
    /// variance that systematic sampling of K rows adds, `sum (1 / p - 1) score^2`: shape `[7]`, in
    /// single precision. All are NaN if a score is not finite.
    #[fusion(meta = |_score, _ks| TensorSpec::new(Shape::new([7]), DType::F32))]
    fn memaop_variances(score: FloatTensor<Self>, ks: Candidates) -> FloatTensor<Self> {
        portable::variances::<Self>(score, ks)
    }

    /// Packs the rows of a matrix. Without random bits, values are rounded to the nearest.
    #[fusion(meta = |input, packing, _random| described::packed(input, *packing))]
    fn memaop_pack(
        input: FloatTensor<Self>,
        packing: Packing,
        random: Option<Random>,
    ) -> Packed<Self> {
        portable::pack::<Self>(input, packing, random)
    }

    /// All rows, unpacked to the given type.
    #[fusion(meta = |packed, dtype| {
        let shape = Shape::new([packed.norms.shape[0], packed.packing.width]);
        TensorSpec::new(shape, (*dtype).into())
    })]
    fn memaop_unpack(
        #[extension_type] packed: Packed<Self>,
        dtype: FloatDType,
    ) -> FloatTensor<Self> {
        portable::unpack::<Self>(packed, dtype)
    }

    /// The products of values and packed values. They are zero wherever the packed value is zero.
    #[fusion(meta = |_packed, values| values.clone())]
    fn memaop_times(
        #[extension_type] packed: Packed<Self>,
        values: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        portable::times::<Self>(packed, values)
    }
}

/// The shapes and types of what the verbs return, for Fusion.
#[cfg(feature = "cubecl-backend")]
mod described {
    use super::*;

    pub(super) fn scores(rows: usize, grad: &TensorSpec) -> ScoresMetadata {
        let of_rows = || TensorSpec::new(Shape::new([rows]), working_dtype(grad.dtype).into());
        ScoresMetadata {
            score: of_rows(),
            tilt: of_rows(),
        }
    }

    pub(super) fn drawn(score: &TensorSpec, draw: &Draw) -> DrawnMetadata {
        let shape = Shape::new([draw.count(score.shape[0])]);
        DrawnMetadata {
            // Fusion runs on CubeCL devices alone, which number rows in this type.
            rows: TensorSpec::new(shape.clone(), DType::U32),
            root: TensorSpec::new(shape, score.dtype),
        }
    }

    pub(super) fn rows(input: &FactorMetadata, grad: &TensorSpec) -> usize {
        match input {
            FactorMetadata::Patches(_, window) => grad.shape[0] * window.positions(),
            _ => grad.shape[0],
        }
    }

    pub(super) fn weight(input: &FactorMetadata, grad: &TensorSpec) -> TensorSpec {
        let shape = match input {
            FactorMetadata::One => [1, grad.shape[1]],
            FactorMetadata::Matrix(input) => [input.shape[1], grad.shape[1]],
            FactorMetadata::Packed(packed) => [packed.packing.width, grad.shape[1]],
            FactorMetadata::Patches(_, window) => [window.channels[1], window.patch()],
        };
        TensorSpec::new(Shape::new(shape), grad.dtype)
    }

    pub(super) fn of_memory(memory: &MemoryMetadata, dtype: FloatDType) -> TensorSpec {
        let shape = [memory.input.shape[1], memory.grad.shape[1]];
        TensorSpec::new(Shape::new(shape), dtype.into())
    }

    pub(super) fn packed(input: &TensorSpec, packing: Packing) -> PackedMetadata {
        let rows = input.shape[0];
        PackedMetadata {
            words: TensorSpec::new(Shape::new([rows, packing.words()]), DType::I32),
            norms: TensorSpec::new(Shape::new([rows, 1]), working_dtype(input.dtype).into()),
            packing,
        }
    }
}
