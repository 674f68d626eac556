//! Packed rows as tensors of Burn's.

use std::sync::{Arc, OnceLock};

use burn::{
    backend::Dispatch,
    tensor::{DType, Int, Tensor},
};

use super::{
    MemAopOps,
    noise::StepNoise,
    packing::{Bits, Packing},
    step::{Input as LayerInput, PackStep, Packed},
};
use crate::config::StoredInput;

/// The rows of an input in few bits, as [`StoredInput`] says.
#[derive(Debug, Clone)]
pub struct PackedRows {
    pub(crate) words: Tensor<2, Int>,
    pub(crate) norms: Tensor<2>,
    pub(crate) packing: Packing,
    /// Of the input.
    pub(crate) dtype: DType,
}

/// Packs the rows of an input, shape `[rows, d_input]`.
///
/// # Panics
///
/// Panics if `input` is on an autodiff device or has no values, or if `step.stored` is [`StoredInput::Full`].
pub fn pack(input: Tensor<2>, step: PackStep) -> PackedRows {
    let device = input.device();
    assert!(
        !device.is_autodiff(),
        "pack: input must be on a device without autodiff, but is on {device:?}"
    );
    let Some(bits) = Bits::of(step.stored) else {
        panic!(
            "pack: step.stored must be other than {:?}",
            StoredInput::Full
        );
    };
    let [rows, width] = input.dims();
    assert!(
        rows * width > 0,
        "pack: input must have values, but has the shape [{rows}, {width}]"
    );
    let packing = Packing { bits, width };
    let noise = StepNoise {
        seed: step.seed,
        step: step.step,
    };
    let dtype = input.dtype();
    let packed = Dispatch::memaop_pack(input.into_dispatch(), packing, Some(noise));
    PackedRows::from_dispatch(packed, dtype)
}

impl PackedRows {
    /// The rows and the values of each.
    pub fn dims(&self) -> [usize; 2] {
        [self.norms.dims()[0], self.packing.width]
    }

    /// The rows again, as their values were rounded.
    pub fn unpack(self) -> Tensor<2> {
        let dtype = self.dtype.into();
        Tensor::from_dispatch(Dispatch::memaop_unpack(self.into_dispatch(), dtype))
    }

    /// The bytes that are kept.
    pub fn bytes(&self) -> usize {
        let [rows, _] = self.dims();
        rows * (4 * self.packing.words() + self.norms.dtype().size())
    }

    fn from_dispatch(packed: Packed<Dispatch>, dtype: DType) -> Self {
        Self {
            words: Tensor::from_dispatch(packed.words),
            norms: Tensor::from_dispatch(packed.norms),
            packing: packed.packing,
            dtype,
        }
    }

    fn into_dispatch(self) -> Packed<Dispatch> {
        Packed {
            words: self.words.into_dispatch(),
            norms: self.norms.into_dispatch(),
            packing: self.packing,
        }
    }
}

/// The input of a gradient: as it is, or packed.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant)] // Handles of tensors, of which there is one at a time.
pub enum Input {
    /// Shape `[rows, d_input]`.
    Full(Tensor<2>),
    /// In few bits.
    Packed(PackedRows),
}

impl From<Tensor<2>> for Input {
    fn from(input: Tensor<2>) -> Self {
        Self::Full(input)
    }
}

impl From<PackedRows> for Input {
    fn from(rows: PackedRows) -> Self {
        Self::Packed(rows)
    }
}

impl Input {
    pub(super) fn dims(&self) -> [usize; 2] {
        match self {
            Self::Full(input) => input.dims(),
            Self::Packed(rows) => rows.dims(),
        }
    }

    pub(super) fn dtype(&self) -> DType {
        match self {
            Self::Full(input) => input.dtype(),
            Self::Packed(rows) => rows.dtype,
        }
    }

    /// A tensor on the device of the input.
    pub(super) fn on_device(&self) -> &Tensor<2> {
        match self {
            Self::Full(input) => input,
            Self::Packed(rows) => &rows.norms,
        }
    }

    pub(super) fn into_dispatch(self) -> LayerInput<Dispatch> {
        match self {
            Self::Full(input) => LayerInput::Full(input.into_dispatch()),
            Self::Packed(rows) => LayerInput::Packed(rows.into_dispatch()),
        }
    }
}

/// The packed input of several layers: the first to come packs it.
#[derive(Debug, Clone, Default)]
pub(crate) struct SharedRows(pub(super) Arc<OnceLock<PackedRows>>);
