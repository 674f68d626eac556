//! The verbs of a backend.

use ::burn::{
    backend::{backend_extension, tensor::FloatTensor},
    tensor::FloatDType,
};

#[cfg(feature = "cubecl-backend")]
use super::tensors::burn;
use super::{
    packing::Packing,
    portable,
    random::{Dropout, Random},
    tensors::{Candidates, Draw, Drawn, Factor, Fold, Memory, Packed, Scores},
    transfer::CopyOut,
};
#[cfg(feature = "cubecl-backend")]
use ::burn::tensor::{DType, Shape};
#[cfg(feature = "cubecl-backend")]
use burn_fusion::custom::TensorSpec;

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

    /// A matrix in which some values are zero, and the others are larger to make up for it.
    #[fusion(meta = |values, _dropout| values.clone())]
    fn memaop_drop_values(values: FloatTensor<Self>, dropout: Dropout) -> FloatTensor<Self> {
        portable::drop_out::<Self>(values, dropout)
    }
}

/// The shapes and types of what the verbs return, for Fusion.
#[cfg(feature = "cubecl-backend")]
mod described {
    use super::*;
    use crate::rows::{
        portable::working_dtype,
        tensors::{DrawnMetadata, FactorMetadata, MemoryMetadata, PackedMetadata, ScoresMetadata},
    };

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
