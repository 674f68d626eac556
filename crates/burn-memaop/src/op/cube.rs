//! The approximate weight gradient on CubeCL backends: the same result as the default body of
//! `portable.rs`, in three launches (of packed rows five; of many rows the selection takes several) and a matrix product, none
//! of which waits for the host.

use std::{future::poll_fn, mem, pin::pin, sync::Once, task::Poll};

use burn::{
    backend::{
        TensorMetadata,
        ops::{FloatTensorOps, ModuleOps},
    },
    tensor::{DType, ExecutionError, FloatDType, Shape, TensorData},
};
use burn_cubecl::{
    CubeBackend, cubecl,
    kernel::into_contiguous,
    ops::numeric::{empty_device_contiguous_dtype, empty_device_dtype},
    tensor::CubeTensor,
};
use cubecl::{
    calculate_cube_count_elemwise,
    ir::{FloatKind, VectorSize},
    prelude::*,
    server::CopyDescriptor,
    tensor_vector_size_parallel,
};

mod fold;
mod gather;
mod images;
mod noise;
mod packed;
mod select;
mod units;

use self::gather::By;
use crate::{
    config::Memory,
    op::cost::MOST_ROWS,
    op::noise::StepNoise,
    op::packing::Packing,
    op::portable::{self, LEAST_DECAY},
    op::step::{AopStep, Bias, Input, InputStep, NoiseStep, Packed, RowMemory, WeightGradient},
    op::window::Window,
    state::reading::Transfer,
};

pub(crate) fn weight_gradient(
    input: Input<CubeBackend>,
    grad: CubeTensor,
    memory: RowMemory<CubeBackend>,
    step: AopStep,
) -> WeightGradient<CubeBackend> {
    let units = grad.client.properties().hardware.max_units_per_cube;
    let supported = supported(grad.dtype, grad.shape()[0], units);
    if let Err(reason) = supported.and_then(|()| supports_decay(step.method.memory())) {
        warn(&reason);
        return portable::weight_gradient::<CubeBackend>(input, grad, memory, step);
    }
    let dtype = grad.dtype;
    let bias = match step.bias {
        true => Bias::Some(CubeBackend::linear_bias_backward(grad.clone())),
        false => Bias::None,
    };
    let grad = row_major(grad);

    let (chosen, panels, memory) = match (input, step.method.memory().decay()) {
        (Input::Packed(packed), None) => {
            let scores = packed_scores(&packed, &grad);
            let chosen = select::choose(&scores, &step);
            let panels = [
                packed::gather(&packed, &chosen, dtype),
                gather::gather_rows(&grad, &chosen, By::Root),
            ];
            (chosen, panels, RowMemory::Empty)
        }
        (Input::Full(input), None) => {
            let batch = [row_major(input), grad];
            let [input, grad] = &batch;
            let scores = fold::score(input, grad);
            let chosen = select::choose(&scores, &step);
            let panels = gather::gather(&batch, &chosen, dtype);
            (chosen, panels, RowMemory::Empty)
        }
        (input, Some(decay)) => {
            let input = match input {
                Input::Full(input) => row_major(input),
                // Every row goes into a memory.
                Input::Packed(packed) => packed::unpack(&packed, dtype.into()),
            };
            let batch = [input, grad];
            let kept = at_least(memory, &batch);
            let scores = fold::fold_in(&batch, &kept, &step);
            let chosen = select::choose(&scores, &step);
            let scale = (1.0 / decay.sqrt()) as f32;
            let panels = gather::take_out(&kept, &chosen, dtype, scale);
            let [input, grad, age] = kept;
            (chosen, panels, RowMemory::Rows { input, grad, age })
        }
    };
    let [input, grad] = panels;
    WeightGradient {
        weight: CubeBackend::linear_weight_backward(input, grad),
        memory,
        bias,
        share: chosen.share,
    }
}

/// The first time that kernels cannot be taken.
fn warn(reason: &str) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::warn!(
            "burn-memaop: the weight gradient takes primitive operations, which are slower than kernels and may wait for the \
             device: {reason}"
        );
    });
}

/// The gradient of the input for some of the rows: scores, selection, gather, zeros and scatter, and a matrix product.
pub(crate) fn input_gradient(grad: CubeTensor, weight: CubeTensor, step: InputStep) -> CubeTensor {
    let (rows, d_input) = (grad.shape()[0], weight.shape()[0]);
    if step.k >= rows {
        return portable::exact_input_gradient::<CubeBackend>(grad, weight);
    }
    let units = grad.client.properties().hardware.max_units_per_cube;
    if supported(grad.dtype, rows, units).is_err() {
        return portable::input_gradient::<CubeBackend>(grad, weight, step);
    }
    let grad = row_major(grad);
    let sizes = fold::norms(&grad);
    let chosen = select::choose_input(&sizes, &step);
    let panel = gather::gather_rows(&grad, &chosen, By::Weight);
    let product = CubeBackend::float_matmul(panel, CubeBackend::float_transpose(weight));
    let shape = Shape::new([rows, d_input]);
    let gradient = CubeBackend::float_zeros(shape, &grad.device(), grad.dtype.into());
    gather::scatter_rows(&row_major(product), &chosen, &gradient);
    gradient
}

/// The noise of a gradient, in two launches and the norm.
pub(crate) fn noise(
    input: Input<CubeBackend>,
    grad: CubeTensor,
    gradient: CubeTensor,
    step: NoiseStep,
) -> CubeTensor {
    let units = grad.client.properties().hardware.max_units_per_cube;
    if supported(grad.dtype, grad.shape()[0], units).is_err() {
        return portable::noise::<CubeBackend>(input, grad, gradient, step);
    }
    let grad = row_major(grad);
    let scores = match input {
        Input::Full(input) => fold::score(&row_major(input), &grad),
        Input::Packed(packed) => packed_scores(&packed, &grad),
    };
    figures(scores, gradient, &step)
}

/// The most values of chosen patches, or of their gradients, that are put together at a time: 64 MiB in single precision, half
/// of what every device of the WebGPU standard can bind.
const MOST_GATHERED: usize = 1 << 24;

/// The weight gradient of a convolution: four launches and a matrix product, of very many patches a launch and a product more
/// for each part of them.
pub(crate) fn convolve_weight_gradient(
    input: CubeTensor,
    grad: CubeTensor,
    window: Window,
    step: AopStep,
) -> WeightGradient<CubeBackend> {
    let units = grad.client.properties().hardware.max_units_per_cube;
    let rows = grad.shape()[0] * window.positions();
    if let Err(reason) = supported(grad.dtype, rows, units) {
        warn(&reason);
        return portable::convolution::weight_gradient::<CubeBackend>(input, grad, window, step);
    }
    let bias = match step.bias {
        true => {
            let grad = grad.clone();
            Bias::Some(portable::convolution::bias_gradient::<CubeBackend>(grad))
        }
        false => Bias::None,
    };
    let [input, grad] = [input, grad].map(images::strided);
    let scores = images::score(&input, &grad, &window);
    let chosen = select::choose(&scores, &step);
    let k = chosen.rows.shape()[0];
    let widest = (window.groups * window.patch()).max(window.channels[1]);
    let at_once = (MOST_GATHERED / widest).max(1);
    let products = (0..k).step_by(at_once).map(|first| {
        let places = first..k.min(first + at_once);
        let [patches, grads] = images::gather(&input, &grad, &chosen, places, &window);
        CubeBackend::float_matmul(CubeBackend::float_transpose(grads), patches)
    });
    let product = products.reduce(CubeBackend::float_add);
    let product = product.expect("at least one position is chosen");
    let shape = Shape::new([window.channels[1], window.patch()]);
    WeightGradient {
        weight: CubeBackend::float_reshape(product, shape),
        memory: RowMemory::Empty,
        bias,
        share: chosen.share,
    }
}

/// Burn's own would copy when the values are first looked at, behind all that the device has been given to do by then.
pub(crate) fn copy_out(values: CubeTensor) -> Transfer {
    let values = into_contiguous(values);
    let (shape, dtype) = (values.shape(), values.dtype);
    let binding = CopyDescriptor::new(
        values.handle.binding(),
        shape.clone(),
        values.meta.strides().clone(),
        dtype.size(),
    );
    Box::pin(async move {
        let copy = pin!(values.client.read_one_tensor_async(binding));
        // On CUDA and ROCm the first poll of the copy waits for it.
        let mut is_begun = false;
        poll_fn(|context| match mem::replace(&mut is_begun, true) {
            true => Poll::Ready(()),
            false => {
                context.waker().wake_by_ref();
                Poll::Pending
            }
        })
        .await;
        let bytes = copy.await;
        let bytes = bytes.map_err(|error| ExecutionError::with_context(error.to_string()))?;
        Ok(TensorData::from_bytes(bytes, shape, dtype))
    })
}

/// What is measured of a gradient, by the scores of its rows.
fn figures(scores: CubeTensor, gradient: CubeTensor, step: &NoiseStep) -> CubeTensor {
    let noise = select::variances(&scores, step);
    let gradient = portable::cast::<CubeBackend>(gradient, FloatDType::F32);
    CubeBackend::float_cat(vec![portable::norm::<CubeBackend>(gradient), noise], 0)
}

/// `|x| |g|` of every row, shape `[rows]`, in single precision.
fn packed_scores(packed: &Packed<CubeBackend>, grad: &CubeTensor) -> CubeTensor {
    let norms = CubeBackend::float_reshape(packed.norms.clone(), Shape::new([grad.shape()[0]]));
    into_contiguous(CubeBackend::float_mul(norms, fold::norms(grad)))
}

pub(crate) fn pack(
    input: CubeTensor,
    packing: Packing,
    noise: Option<StepNoise>,
) -> Packed<CubeBackend> {
    let units = input.client.properties().hardware.max_units_per_cube;
    match supported(input.dtype, input.shape()[0], units) {
        Ok(()) => packed::pack(input, packing, noise),
        Err(_) => portable::pack::<CubeBackend>(input, packing, noise),
    }
}

pub(crate) fn unpack(packed: Packed<CubeBackend>, dtype: FloatDType) -> CubeTensor {
    let units = packed.norms.client.properties().hardware.max_units_per_cube;
    match supported(dtype.into(), packed.norms.shape()[0], units) {
        Ok(()) => packed::unpack(&packed, dtype),
        Err(_) => portable::unpack::<CubeBackend>(packed, dtype),
    }
}

pub(crate) fn times(packed: Packed<CubeBackend>, values: CubeTensor) -> CubeTensor {
    let units = values.client.properties().hardware.max_units_per_cube;
    match supported(values.dtype, values.shape()[0], units) {
        Ok(()) => packed::times(&packed, values),
        Err(_) => portable::times::<CubeBackend>(packed, values),
    }
}

/// The units that the kernels need in a cube. Every device of the WebGPU standard has as many.
const LEAST_UNITS: u32 = 256;
/// Whether the kernels can take so many rows of such a type on a device with so many units in a cube,
/// or why not.
fn supported(dtype: DType, rows: usize, units: u32) -> Result<(), String> {
    if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
        return Err(format!(
            "they score rows in single precision, and the input is {dtype:?}"
        ));
    }
    if units < LEAST_UNITS {
        return Err(format!(
            "they need cubes of {LEAST_UNITS} units, and the device has {units}"
        ));
    }
    if rows > MOST_ROWS {
        return Err(format!(
            "they take at most {MOST_ROWS} rows, and the input has {rows}"
        ));
    }
    Ok(())
}

fn supports_decay(memory: Memory) -> Result<(), String> {
    match memory.decay() {
        Some(decay) if decay < LEAST_DECAY => Err(format!(
            "they need a decay of at least {LEAST_DECAY}, and that of the memory is {decay}"
        )),
        _ => Ok(()),
    }
}

/// A matrix whose rows have no gaps between their values.
fn row_major(matrix: CubeTensor) -> CubeTensor {
    match matrix.meta.strides()[1] == 1 && !matrix.meta.is_tiled() {
        true => matrix,
        false => into_contiguous(matrix),
    }
}

/// The memory (`m^X`, `m^G`, ages) with at least as many rows as the batch, new ones being zero, in
/// buffers that no other tensor shares.
fn at_least(memory: RowMemory<CubeBackend>, batch: &[CubeTensor; 2]) -> [CubeTensor; 3] {
    let [input, grad] = batch.each_ref().map(|batch| batch.shape()[1]);
    let widths = [input, grad, 1];
    let kept = match memory {
        RowMemory::Empty => [None, None, None],
        RowMemory::Rows { input, grad, age } => [Some(input), Some(grad), Some(age)],
    };
    let (rows, device) = (batch[0].shape()[0], batch[0].device());
    let mut kept = kept.into_iter();
    let dtype = FloatDType::F32;
    widths.map(|width| {
        let kept = match kept.next().flatten() {
            None => CubeBackend::float_zeros(Shape::new([rows, width]), &device, dtype),
            Some(kept) => {
                // A layer can have been cast since its last step.
                let kept = portable::cast::<CubeBackend>(kept, dtype);
                match kept.shape()[0] < rows {
                    true => portable::resize_rows::<CubeBackend>(kept, rows),
                    false => kept,
                }
            }
        };
        let kept = row_major(kept);
        match kept.can_mut() && kept.is_nonoverlapping() {
            true => kept,
            false => kept.copy(),
        }
    })
}

/// The extent of a matrix in memory, in vectors.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
struct RowLayout {
    width: usize,
    stride: usize,
}

fn layout(matrix: &CubeTensor, size: VectorSize) -> RowLayoutLaunch {
    let width = matrix.meta.shape()[1];
    RowLayoutLaunch::new(width / size, matrix.meta.strides()[0] / size)
}

/// The widest vectors in which the rows of all these matrices can be read and written.
fn vector_size(matrices: &[&CubeTensor]) -> VectorSize {
    let sizes = matrices.iter().map(|matrix| {
        let (shape, strides) = (matrix.meta.shape(), matrix.meta.strides());
        // As in single precision: wider vectors of it than of half precision do not exist.
        let sizes = matrix.client.io_optimized_vector_sizes(size_of::<f32>());
        tensor_vector_size_parallel(sizes, shape, strides, 1)
    });
    sizes.min().unwrap_or(1)
}

/// The units that share a row: enough to have work for each.
fn row_units(matrices: [&CubeTensor; 2], sizes: [VectorSize; 2]) -> u32 {
    let vectors = |i: usize| matrices[i].meta.shape()[1] / sizes[i];
    let most = vectors(0).max(vectors(1)).min(LEAST_UNITS as usize);
    (most as u32).next_power_of_two().max(32)
}

/// `count` cubes of `units` units.
fn cubes(like: &CubeTensor, count: usize, units: u32) -> (CubeCount, CubeDim) {
    let dim = CubeDim::new_1d(units);
    let count = calculate_cube_count_elemwise(&like.client, count * units as usize, dim);
    (count, dim)
}

fn empty<const D: usize>(like: &CubeTensor, shape: [usize; D], dtype: DType) -> CubeTensor {
    let (client, device) = (like.client.clone(), like.device.clone());
    empty_device_dtype(client, device, Shape::new(shape), dtype)
}

/// As [`empty`], without gaps between the rows: those of CUDA and ROCm could be as wide as packed rows are.
fn empty_without_gaps<const D: usize>(
    like: &CubeTensor,
    shape: [usize; D],
    dtype: DType,
) -> CubeTensor {
    let (client, device) = (like.client.clone(), like.device.clone());
    empty_device_contiguous_dtype(client, device, Shape::new(shape), dtype)
}

fn address_type(tensors: &[&CubeTensor]) -> AddressType {
    let types = tensors.iter().map(|tensor| tensor.required_address_type());
    types.max().unwrap_or_default()
}

fn elem_type(dtype: DType) -> ElemType {
    match dtype {
        DType::F32 => ElemType::Float(FloatKind::F32),
        DType::F16 => ElemType::Float(FloatKind::F16),
        DType::BF16 => ElemType::Float(FloatKind::BF16),
        dtype => unreachable!("{dtype:?} is left to the default body"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernels_cannot_do_is_told_with_the_reason() {
        assert_eq!(supported(DType::F16, 262_144, 256), Ok(()));
        assert_eq!(supports_decay(Memory::Balanced { decay: 0.9 }), Ok(()));
        for (found, reason) in [
            (supported(DType::F64, 10, 256), "F64"),
            (supported(DType::F32, 10, 64), "the device has 64"),
            (supported(DType::F32, (1 << 24) + 1, 256), "16777217"),
            (supports_decay(Memory::Published { decay: 0.0 }), "decay"),
        ] {
            let message = found.unwrap_err();
            assert!(message.contains(reason), "{message}");
        }
    }
}
