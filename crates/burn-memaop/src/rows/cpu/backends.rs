//! The backends that take these bodies.

#[cfg(feature = "ndarray")]
use burn::backend::ndarray::NdArrayTensor;
use burn::backend::tensor::{FloatTensor, IntTensor};

use super::HostTensors;
use crate::rows::transfer::CopyOut;

#[cfg(feature = "flex")]
impl CopyOut for burn::backend::Flex {}
#[cfg(feature = "ndarray")]
impl CopyOut for burn::backend::NdArray {}

#[cfg(feature = "flex")]
impl HostTensors for burn::backend::Flex {
    const HAS_EXACT_GELU: bool = true;

    fn contiguous(tensor: FloatTensor<Self>) -> FloatTensor<Self> {
        match tensor.is_contiguous() {
            true => tensor,
            false => tensor.to_contiguous(),
        }
    }

    fn values(tensor: &FloatTensor<Self>) -> &[f32] {
        tensor.as_slice().expect("a contiguous tensor of this type")
    }

    fn values_mut(tensor: &mut FloatTensor<Self>) -> &mut [f32] {
        let range = tensor.layout().contiguous_offsets();
        let (start, end) = range.expect("a contiguous tensor");
        &mut tensor.storage_mut()[start..end]
    }

    fn words(tensor: &IntTensor<Self>) -> &[i32] {
        tensor.as_slice().expect("a contiguous tensor of integers")
    }
}

#[cfg(feature = "ndarray")]
impl HostTensors for burn::backend::NdArray {
    const HAS_EXACT_GELU: bool = false;

    fn contiguous(mut tensor: FloatTensor<Self>) -> FloatTensor<Self> {
        if let NdArrayTensor::F32(storage) = &mut tensor
            && !storage.view().is_standard_layout()
        {
            let array = storage.ensure_owned();
            *array = array.as_standard_layout().into_owned().into_shared();
        }
        tensor
    }

    fn values(tensor: &FloatTensor<Self>) -> &[f32] {
        let NdArrayTensor::F32(storage) = tensor else {
            unreachable!("a tensor in single precision");
        };
        storage.view().to_slice().expect("a contiguous tensor")
    }

    fn values_mut(tensor: &mut FloatTensor<Self>) -> &mut [f32] {
        let NdArrayTensor::F32(storage) = tensor else {
            unreachable!("a tensor in single precision");
        };
        let values = storage.ensure_owned().as_slice_mut();
        values.expect("a contiguous tensor")
    }

    fn words(tensor: &IntTensor<Self>) -> &[i32] {
        let NdArrayTensor::I32(storage) = tensor else {
            unreachable!("a tensor of 32-bit integers");
        };
        storage.view().to_slice().expect("a contiguous tensor")
    }
}
