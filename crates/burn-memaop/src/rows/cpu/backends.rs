//! The backends that take these bodies in single precision. Other types take the default bodies.

#[cfg(feature = "ndarray")]
use burn::backend::ndarray::NdArrayTensor;
#[cfg(feature = "flex")]
use burn::backend::ops::ActivationOps;
use burn::{
    backend::{
        TensorMetadata,
        ops::ModuleOps,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::{DType, FloatDType},
};

#[cfg(feature = "flex")]
use super::gelu;
use super::{HostTensors, convolution};
use crate::rows::{
    Bias, ExactOps,
    packing::Packing,
    portable,
    random::Random,
    transfer::CopyOut,
    verbs::{Draw, Drawn, Factor, Fold, Memory, Packed, RowOps, Scores},
    window::Window,
};

fn is_single<B: HostTensors>(tensor: &FloatTensor<B>) -> bool {
    TensorMetadata::dtype(tensor) == DType::F32
}

macro_rules! cpu_backend {
    ($backend:ty { $($more:item)* }) => {
        impl CopyOut for $backend {}

        impl RowOps for $backend {
            fn memaop_score(input: Factor<Self>, grad: FloatTensor<Self>) -> Scores<Self> {
                match is_single::<Self>(&grad) {
                    true => super::score::<Self>(input, grad),
                    false => portable::score::<Self>(input, grad),
                }
            }

            fn memaop_fold(
                memory: Memory<Self>,
                input: FloatTensor<Self>,
                grad: FloatTensor<Self>,
                fold: Fold,
            ) -> (Memory<Self>, Scores<Self>) {
                match is_single::<Self>(&grad) {
                    true => super::fold::<Self>(memory, input, grad, fold),
                    false => portable::fold::<Self>(memory, input, grad, fold),
                }
            }

            fn memaop_draw(score: FloatTensor<Self>, draw: Draw) -> Drawn<Self> {
                super::draw::<Self>(score, draw)
            }

            fn memaop_product(
                input: Factor<Self>,
                grad: FloatTensor<Self>,
                tilt: FloatTensor<Self>,
                drawn: Drawn<Self>,
            ) -> FloatTensor<Self> {
                match is_single::<Self>(&grad) {
                    true => super::product::<Self>(input, grad, tilt, drawn),
                    false => portable::product::<Self>(input, grad, tilt, drawn),
                }
            }

            fn memaop_take_out(
                memory: Memory<Self>,
                tilt: FloatTensor<Self>,
                drawn: Drawn<Self>,
                dtype: FloatDType,
            ) -> (FloatTensor<Self>, Memory<Self>) {
                match dtype {
                    FloatDType::F32 => super::take_out::<Self>(memory, tilt, drawn),
                    dtype => portable::take_out::<Self>(memory, tilt, drawn, dtype),
                }
            }

            fn memaop_input_product(
                grad: FloatTensor<Self>,
                weight: FloatTensor<Self>,
                score: FloatTensor<Self>,
                drawn: Drawn<Self>,
            ) -> FloatTensor<Self> {
                match is_single::<Self>(&grad) {
                    true => super::input_product::<Self>(grad, weight, score, drawn),
                    false => portable::input_product::<Self>(grad, weight, score, drawn),
                }
            }

            fn memaop_pack(
                input: FloatTensor<Self>,
                packing: Packing,
                random: Option<Random>,
            ) -> Packed<Self> {
                match is_single::<Self>(&input) {
                    true => super::pack::<Self>(input, |value| value, packing, random),
                    false => portable::pack::<Self>(input, packing, random),
                }
            }

            fn memaop_unpack(packed: Packed<Self>, dtype: FloatDType) -> FloatTensor<Self> {
                match dtype {
                    FloatDType::F32 => super::unpack::<Self>(&packed),
                    dtype => portable::unpack::<Self>(packed, dtype),
                }
            }

            fn memaop_times(packed: Packed<Self>, values: FloatTensor<Self>) -> FloatTensor<Self> {
                match is_single::<Self>(&values) {
                    true => super::times::<Self>(packed, values),
                    false => portable::times::<Self>(packed, values),
                }
            }
        }

        impl ExactOps for $backend {
            fn memaop_exact_input_product(
                grad: FloatTensor<Self>,
                weight: FloatTensor<Self>,
            ) -> FloatTensor<Self> {
                match is_single::<Self>(&grad) {
                    true => super::exact_input_product::<Self>(grad, weight),
                    false => portable::exact_input_product::<Self>(grad, weight),
                }
            }

            fn memaop_convolve(
                input: FloatTensor<Self>,
                weight: FloatTensor<Self>,
                bias: Bias<Self>,
                window: Window,
            ) -> FloatTensor<Self> {
                let bias = bias.into_option();
                match is_single::<Self>(&input) {
                    true => convolution::convolve::<Self>(input, weight, bias, window),
                    false => Self::conv2d(input, weight, bias, window.options()),
                }
            }

            fn memaop_convolve_input_gradient(
                input: FloatTensor<Self>,
                weight: FloatTensor<Self>,
                grad: FloatTensor<Self>,
                window: Window,
            ) -> FloatTensor<Self> {
                match is_single::<Self>(&grad) {
                    true => convolution::input_gradient::<Self>(input, weight, grad, window),
                    false => Self::conv2d_x_backward(input, weight, grad, window.options()),
                }
            }

            fn memaop_convolve_weight_gradient(
                input: FloatTensor<Self>,
                grad: FloatTensor<Self>,
                window: Window,
            ) -> FloatTensor<Self> {
                match is_single::<Self>(&grad) {
                    true => convolution::exact_weight_gradient::<Self>(input, grad, window),
                    false => portable::exact_gradient_of_patches::<Self>(input, grad, window),
                }
            }

            $($more)*
        }
    };
}

#[cfg(feature = "flex")]
cpu_backend!(burn::backend::Flex {
    fn memaop_exact_gelu(input: FloatTensor<Self>) -> FloatTensor<Self> {
        match is_single::<Self>(&input) {
            true => gelu::forward::<Self>(input),
            false => Self::gelu(input),
        }
    }

    fn memaop_gelu_backward(
        input: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        match is_single::<Self>(&input) {
            true => gelu::backward::<Self>(input, grad),
            false => Self::gelu_backward(input, grad),
        }
    }

    fn memaop_gelu_derivative(
        input: FloatTensor<Self>,
        packing: Packing,
        random: Random,
    ) -> Packed<Self> {
        match is_single::<Self>(&input) {
            // The norms are those of the input, and no one reads them.
            true => super::pack::<Self>(input, gelu::derivative, packing, Some(random)),
            false => portable::gelu_derivative::<Self>(input, packing, random),
        }
    }
});

#[cfg(feature = "flex")]
impl HostTensors for burn::backend::Flex {
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

// The derivative of GELU is another one here, and so is not exchanged.
#[cfg(feature = "ndarray")]
cpu_backend!(burn::backend::NdArray {});

#[cfg(feature = "ndarray")]
impl HostTensors for burn::backend::NdArray {
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
