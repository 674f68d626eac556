//! The backends that supply [`MemAopOps`]: CPU backends by the code of `cpu.rs`, for the types that
//! they keep a memory in, all others by its default bodies.

use burn::backend::DispatchDevice;
#[cfg(feature = "ndarray")]
use burn::backend::ndarray::NdArrayTensor;
#[cfg(any(feature = "flex", feature = "ndarray", feature = "cubecl-backend"))]
use burn::backend::tensor::FloatTensor;
#[cfg(any(feature = "flex", feature = "ndarray", feature = "cubecl-backend"))]
use burn::tensor::FloatDType;
#[cfg(any(feature = "flex", feature = "ndarray"))]
use burn::{
    backend::{TensorMetadata, ops::ModuleOps, tensor::IntTensor},
    tensor::DType,
};
#[cfg(feature = "flex")]
use {
    burn::{backend::ops::ActivationOps, tensor::Element},
    bytemuck::Pod,
};

#[cfg(any(
    feature = "flex",
    feature = "ndarray",
    feature = "tch",
    feature = "cubecl-backend"
))]
use crate::op::{CopyOut, MemAopOps};
#[cfg(any(feature = "flex", feature = "ndarray"))]
use crate::op::{
    cpu::{self, HostTensors},
    portable,
    step::Bias,
};
#[cfg(any(feature = "flex", feature = "ndarray", feature = "cubecl-backend"))]
use crate::op::{
    noise::StepNoise,
    packing::Packing,
    step::{AopStep, Input, InputStep, NoiseStep, Packed, RowMemory, WeightGradient},
    window::Window,
};
#[cfg(feature = "cubecl-backend")]
use crate::{
    op::{cube, fusion},
    state::reading::Transfer,
};

#[cfg(any(feature = "flex", feature = "ndarray"))]
macro_rules! cpu_backend {
    ($backend:ty { $($more:item)* }) => {
        impl CopyOut for $backend {}

        impl MemAopOps for $backend {
            $($more)*

            fn memaop_weight_gradient(
                input: Input<Self>,
                grad: FloatTensor<Self>,
                memory: RowMemory<Self>,
                step: AopStep,
            ) -> WeightGradient<Self> {
                match TensorMetadata::dtype(&grad) {
                    DType::F32 => cpu::weight_gradient::<Self, f32>(input, grad, memory, step),
                    DType::F64 => cpu::weight_gradient::<Self, f64>(input, grad, memory, step),
                    _ => portable::weight_gradient::<Self>(input, grad, memory, step),
                }
            }

            fn memaop_input_gradient(
                grad: FloatTensor<Self>,
                weight: FloatTensor<Self>,
                step: InputStep,
            ) -> FloatTensor<Self> {
                match TensorMetadata::dtype(&grad) {
                    DType::F32 => cpu::input_gradient::<Self, f32>(grad, weight, step),
                    DType::F64 => cpu::input_gradient::<Self, f64>(grad, weight, step),
                    _ => portable::input_gradient::<Self>(grad, weight, step),
                }
            }

            fn memaop_noise(
                input: Input<Self>,
                grad: FloatTensor<Self>,
                gradient: FloatTensor<Self>,
                step: NoiseStep,
            ) -> FloatTensor<Self> {
                match TensorMetadata::dtype(&grad) {
                    DType::F32 => cpu::noise::<Self, f32>(input, grad, gradient, step),
                    DType::F64 => cpu::noise::<Self, f64>(input, grad, gradient, step),
                    _ => portable::noise::<Self>(input, grad, gradient, step),
                }
            }

            fn memaop_convolve(
                input: FloatTensor<Self>,
                weight: FloatTensor<Self>,
                bias: Bias<Self>,
                window: Window,
            ) -> FloatTensor<Self> {
                use cpu::convolution::convolve;
                let bias = bias.into_option();
                match TensorMetadata::dtype(&input) {
                    DType::F32 => convolve::<Self, f32>(input, weight, bias, window),
                    DType::F64 => convolve::<Self, f64>(input, weight, bias, window),
                    _ => Self::conv2d(input, weight, bias, window.options()),
                }
            }

            fn memaop_convolve_input_gradient(
                input: FloatTensor<Self>,
                weight: FloatTensor<Self>,
                grad: FloatTensor<Self>,
                window: Window,
            ) -> FloatTensor<Self> {
                use cpu::convolution::input_gradient;
                match TensorMetadata::dtype(&grad) {
                    DType::F32 => input_gradient::<Self, f32>(input, weight, grad, window),
                    DType::F64 => input_gradient::<Self, f64>(input, weight, grad, window),
                    _ => Self::conv2d_x_backward(input, weight, grad, window.options()),
                }
            }

            fn memaop_convolve_exact_gradient(
                input: FloatTensor<Self>,
                grad: FloatTensor<Self>,
                window: Window,
            ) -> FloatTensor<Self> {
                use cpu::convolution::exact_weight_gradient;
                match TensorMetadata::dtype(&grad) {
                    DType::F32 => exact_weight_gradient::<Self, f32>(input, grad, window),
                    DType::F64 => exact_weight_gradient::<Self, f64>(input, grad, window),
                    _ => portable::convolution::exact_weight_gradient::<Self>(input, grad, window),
                }
            }

            fn memaop_convolve_weight_gradient(
                input: FloatTensor<Self>,
                grad: FloatTensor<Self>,
                window: Window,
                step: AopStep,
            ) -> WeightGradient<Self> {
                use cpu::convolution::weight_gradient;
                match TensorMetadata::dtype(&grad) {
                    DType::F32 => weight_gradient::<Self, f32>(input, grad, window, step),
                    DType::F64 => weight_gradient::<Self, f64>(input, grad, window, step),
                    _ => portable::convolution::weight_gradient::<Self>(input, grad, window, step),
                }
            }

            fn memaop_pack(
                input: FloatTensor<Self>,
                packing: Packing,
                noise: Option<StepNoise>,
            ) -> Packed<Self> {
                match TensorMetadata::dtype(&input) {
                    DType::F32 => cpu::pack::<Self, f32>(input, packing, noise),
                    DType::F64 => cpu::pack::<Self, f64>(input, packing, noise),
                    _ => portable::pack::<Self>(input, packing, noise),
                }
            }

            fn memaop_unpack(packed: Packed<Self>, dtype: FloatDType) -> FloatTensor<Self> {
                match dtype {
                    FloatDType::F64 => cpu::unpack::<Self, f64>(&packed),
                    FloatDType::F32 => cpu::unpack::<Self, f32>(&packed),
                    _ => portable::unpack::<Self>(packed, dtype),
                }
            }

            fn memaop_times(packed: Packed<Self>, values: FloatTensor<Self>) -> FloatTensor<Self> {
                match TensorMetadata::dtype(&values) {
                    DType::F32 => cpu::times::<Self, f32>(packed, values),
                    DType::F64 => cpu::times::<Self, f64>(packed, values),
                    _ => portable::times::<Self>(packed, values),
                }
            }
        }
    };
}

#[cfg(feature = "flex")]
cpu_backend!(burn::backend::Flex {
    fn memaop_gelu(input: FloatTensor<Self>) -> FloatTensor<Self> {
        match TensorMetadata::dtype(&input) {
            DType::F32 => cpu::gelu::<Self>(input),
            _ => Self::gelu(input),
        }
    }

    fn memaop_gelu_backward(
        input: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        match TensorMetadata::dtype(&input) {
            DType::F32 => cpu::gelu_backward::<Self>(input, grad),
            _ => Self::gelu_backward(input, grad),
        }
    }

    fn memaop_gelu_derivative(
        input: FloatTensor<Self>,
        packing: Packing,
        noise: StepNoise,
    ) -> Packed<Self> {
        match TensorMetadata::dtype(&input) {
            DType::F32 => cpu::gelu_derivative::<Self>(input, packing, noise),
            _ => {
                let derivative = portable::gelu_derivative::<Self>(input);
                Self::memaop_pack(derivative, packing, Some(noise))
            }
        }
    }
});

#[cfg(feature = "flex")]
impl<E: Element + Pod> HostTensors<E> for burn::backend::Flex {
    fn contiguous(tensor: FloatTensor<Self>) -> FloatTensor<Self> {
        match tensor.is_contiguous() {
            true => tensor,
            false => tensor.to_contiguous(),
        }
    }

    fn values(tensor: &FloatTensor<Self>) -> &[E] {
        tensor.as_slice().expect("a contiguous tensor of this type")
    }

    fn values_mut(tensor: &mut FloatTensor<Self>) -> &mut [E] {
        let range = tensor.layout().contiguous_offsets();
        let (start, end) = range.expect("a contiguous tensor");
        &mut tensor.storage_mut()[start..end]
    }

    fn words(tensor: &IntTensor<Self>) -> &[i32] {
        tensor.as_slice().expect("a contiguous tensor of integers")
    }
}

#[cfg(feature = "ndarray")]
// Its derivative of GELU is another, and so is not exchanged.
cpu_backend!(burn::backend::NdArray {});

#[cfg(feature = "ndarray")]
macro_rules! ndarray_tensors {
    ($element:ty, $variant:ident) => {
        impl HostTensors<$element> for burn::backend::NdArray {
            fn contiguous(mut tensor: FloatTensor<Self>) -> FloatTensor<Self> {
                if let NdArrayTensor::$variant(storage) = &mut tensor
                    && !storage.view().is_standard_layout()
                {
                    let array = storage.ensure_owned();
                    *array = array.as_standard_layout().into_owned().into_shared();
                }
                tensor
            }

            fn values(tensor: &FloatTensor<Self>) -> &[$element] {
                let NdArrayTensor::$variant(storage) = tensor else {
                    unreachable!("a tensor of this type");
                };
                storage.view().to_slice().expect("a contiguous tensor")
            }

            fn values_mut(tensor: &mut FloatTensor<Self>) -> &mut [$element] {
                let NdArrayTensor::$variant(storage) = tensor else {
                    unreachable!("a tensor of this type");
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
    };
}

#[cfg(feature = "ndarray")]
ndarray_tensors!(f32, F32);
#[cfg(feature = "ndarray")]
ndarray_tensors!(f64, F64);

#[cfg(feature = "tch")]
impl CopyOut for burn::backend::LibTorch {}

#[cfg(feature = "tch")]
impl MemAopOps for burn::backend::LibTorch {}

#[cfg(feature = "cubecl-backend")]
impl CopyOut for burn_cubecl::CubeBackend {
    fn copy_out(values: FloatTensor<Self>) -> Transfer {
        cube::copy_out(values)
    }
}

#[cfg(feature = "cubecl-backend")]
impl MemAopOps for burn_cubecl::CubeBackend {
    fn memaop_weight_gradient(
        input: Input<Self>,
        grad: FloatTensor<Self>,
        memory: RowMemory<Self>,
        step: AopStep,
    ) -> WeightGradient<Self> {
        cube::weight_gradient(input, grad, memory, step)
    }

    fn memaop_input_gradient(
        grad: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        step: InputStep,
    ) -> FloatTensor<Self> {
        cube::input_gradient(grad, weight, step)
    }

    fn memaop_noise(
        input: Input<Self>,
        grad: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        step: NoiseStep,
    ) -> FloatTensor<Self> {
        cube::noise(input, grad, gradient, step)
    }

    fn memaop_convolve_weight_gradient(
        input: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        window: Window,
        step: AopStep,
    ) -> WeightGradient<Self> {
        cube::convolve_weight_gradient(input, grad, window, step)
    }

    fn memaop_pack(
        input: FloatTensor<Self>,
        packing: Packing,
        noise: Option<StepNoise>,
    ) -> Packed<Self> {
        cube::pack(input, packing, noise)
    }

    fn memaop_unpack(packed: Packed<Self>, dtype: FloatDType) -> FloatTensor<Self> {
        cube::unpack(packed, dtype)
    }

    fn memaop_times(packed: Packed<Self>, values: FloatTensor<Self>) -> FloatTensor<Self> {
        cube::times(packed, values)
    }
}

#[cfg(feature = "cubecl-backend")]
impl<B: burn_fusion::FusionBackend + MemAopOps> CopyOut for burn_fusion::Fusion<B> {
    fn copy_out(values: FloatTensor<Self>) -> Transfer {
        let client = values.client.clone();
        B::copy_out(client.resolve_tensor_float::<B>(values))
    }
}

// With and without the feature `fusion` of this crate: Burn's own features can turn Fusion on too.
#[cfg(feature = "cubecl-backend")]
impl<B: burn_fusion::FusionBackend + MemAopOps> MemAopOps for burn_fusion::Fusion<B> {
    fn memaop_weight_gradient(
        input: Input<Self>,
        grad: FloatTensor<Self>,
        memory: RowMemory<Self>,
        step: AopStep,
    ) -> WeightGradient<Self> {
        fusion::weight_gradient::<B>(input, grad, memory, step)
    }

    fn memaop_input_gradient(
        grad: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        step: InputStep,
    ) -> FloatTensor<Self> {
        fusion::input_gradient::<B>(grad, weight, step)
    }

    fn memaop_noise(
        input: Input<Self>,
        grad: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        step: NoiseStep,
    ) -> FloatTensor<Self> {
        fusion::noise::<B>(input, grad, gradient, step)
    }

    fn memaop_convolve_weight_gradient(
        input: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        window: Window,
        step: AopStep,
    ) -> WeightGradient<Self> {
        fusion::convolve_weight_gradient::<B>(input, grad, window, step)
    }

    fn memaop_pack(
        input: FloatTensor<Self>,
        packing: Packing,
        noise: Option<StepNoise>,
    ) -> Packed<Self> {
        fusion::pack::<B>(input, packing, noise)
    }

    fn memaop_unpack(packed: Packed<Self>, dtype: FloatDType) -> FloatTensor<Self> {
        fusion::unpack::<B>(packed, dtype)
    }

    fn memaop_times(packed: Packed<Self>, values: FloatTensor<Self>) -> FloatTensor<Self> {
        fusion::times::<B>(packed, values)
    }
}

/// Stops where the device's backend is compiled into Burn, but not into this crate.
pub(crate) fn assert_supported(device: &DispatchDevice) {
    match device {
        #[cfg(feature = "flex")]
        DispatchDevice::Flex(_) => {}
        #[cfg(feature = "ndarray")]
        DispatchDevice::NdArray(_) => {}
        #[cfg(feature = "tch")]
        DispatchDevice::LibTorch(_) => {}
        #[cfg(feature = "cubecl-backend")]
        DispatchDevice::Cube(_) => {}
        #[cfg(feature = "autodiff")]
        DispatchDevice::Autodiff(device) => assert_supported(device),
        // A variant that is there through Burn's features alone cannot be named here.
        #[allow(unreachable_patterns)]
        device => panic!(
            "MemAopLinear does not support the device {device:?} in this build: enable the feature of burn-memaop \
             that has the name of its backend (flex, ndarray, tch, wgpu, vulkan, webgpu, metal, cuda, rocm or cpu; there \
             is none for the remote backend)"
        ),
    }
}
