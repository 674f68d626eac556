//! The verbs on CubeCL devices, in kernels that never wait for the host. Where the kernels cannot
//! be used, the default bodies are.

use std::{future::poll_fn, mem, pin::pin, sync::Once, task::Poll};

use burn::{
    backend::{
        TensorMetadata,
        ops::{FloatTensorOps, ModuleOps},
        tensor::FloatTensor,
    },
    tensor::{DType, ExecutionError, FloatDType, IntDType, Shape, TensorData},
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

mod dropout;
mod gather;
mod images;
mod packed;
mod random;
mod scores;
mod select;
mod units;

use super::{
    ExactOps, MOST_ROWS,
    packing::Packing,
    portable,
    random::{Dropout, Random},
    tensors::{Candidates, Draw, Drawn, Factor, Fold, Memory, Packed, Scores},
    transfer::{CopyOut, Transfer},
    verbs::RowOps,
    window::Window,
};

/// The most values of drawn patches, or of their gradients, that are put together at a time. They
/// take 64 MiB in single precision, half of what every device of the WebGPU standard can bind.
const MOST_GATHERED: usize = 1 << 24;

impl RowOps for CubeBackend {
    fn memaop_score(input: Factor<Self>, grad: CubeTensor) -> Scores<Self> {
        if !takes(&grad, grad.dtype, input.rows(&grad)) {
            return portable::score::<Self>(input, grad);
        }
        match input {
            Factor::Patches(images, window) => {
                let [images, grad] = [images, grad].map(images::strided);
                images::score(&images, &grad, &window)
            }
            Factor::One => scores::score(None, &row_major(grad)),
            // The norms are a matrix of one column: the norm of a row is its value.
            Factor::Packed(Packed { norms: input, .. }) | Factor::Matrix(input) => {
                scores::score(Some(&row_major(input)), &row_major(grad))
            }
        }
    }

    fn memaop_fold(
        memory: Memory<Self>,
        input: CubeTensor,
        grad: CubeTensor,
        fold: Fold,
    ) -> (Memory<Self>, Scores<Self>) {
        if !takes(&grad, grad.dtype, grad.shape()[0]) {
            return portable::fold::<Self>(memory, input, grad, fold);
        }
        let memory = unshared(memory);
        let scores = scores::fold(&[input, grad].map(row_major), &memory, fold);
        (memory, scores)
    }

    fn memaop_draw(score: CubeTensor, draw: Draw) -> Drawn<Self> {
        match takes(&score, score.dtype, score.shape()[0]) {
            true => select::draw(&into_contiguous(score), draw),
            false => portable::draw_in::<Self>(score, draw, IntDType::U32),
        }
    }

    fn memaop_product(
        input: Factor<Self>,
        grad: CubeTensor,
        tilt: CubeTensor,
        drawn: Drawn<Self>,
    ) -> CubeTensor {
        if !takes(&grad, grad.dtype, input.rows(&grad)) {
            return portable::product::<Self>(input, grad, tilt, drawn);
        }
        let tilt = into_contiguous(tilt);
        match input {
            Factor::Patches(images, window) => {
                let [images, grad] = [images, grad].map(images::strided);
                product_of_patches(images, grad, tilt, drawn, window)
            }
            Factor::Packed(packed) => {
                let dtype = grad.dtype;
                let input = packed::gather(&packed, &tilt, &drawn, dtype);
                let grad = gather::gather_grad(&row_major(grad), Some(&tilt), &drawn);
                Self::linear_weight_backward(input, grad)
            }
            Factor::Matrix(input) => {
                let batch = [input, grad].map(row_major);
                let [input, grad] = gather::gather(&batch, &tilt, &drawn);
                Self::linear_weight_backward(input, grad)
            }
            Factor::One => unreachable!("a gradient of the weight has two factors"),
        }
    }

    fn memaop_take_out(
        memory: Memory<Self>,
        tilt: CubeTensor,
        drawn: Drawn<Self>,
        dtype: FloatDType,
    ) -> (CubeTensor, Memory<Self>) {
        if !takes(&tilt, dtype.into(), tilt.shape()[0]) {
            return portable::take_out::<Self>(memory, tilt, drawn, dtype);
        }
        let memory = unshared(memory);
        let tilt = into_contiguous(tilt);
        let [input, grad] = gather::take_out(&memory, &tilt, &drawn, dtype.into());
        (Self::linear_weight_backward(input, grad), memory)
    }

    fn memaop_input_product(
        grad: CubeTensor,
        weight: CubeTensor,
        score: CubeTensor,
        drawn: Drawn<Self>,
    ) -> CubeTensor {
        if !takes(&grad, grad.dtype, grad.shape()[0]) {
            return portable::input_product::<Self>(grad, weight, score, drawn);
        }
        let panel = gather::gather_grad(&row_major(grad), None, &drawn);
        let product = Self::float_matmul(panel, Self::float_transpose(weight));
        gather::spread(&row_major(product), &into_contiguous(score), &drawn)
    }

    fn memaop_variances(score: CubeTensor, ks: Candidates) -> CubeTensor {
        match takes(&score, score.dtype, score.shape()[0]) {
            true => select::variances(&into_contiguous(score), &ks),
            false => portable::variances::<Self>(score, ks),
        }
    }

    fn memaop_pack(input: CubeTensor, packing: Packing, random: Option<Random>) -> Packed<Self> {
        match takes(&input, input.dtype, input.shape()[0]) {
            true => packed::pack(input, packing, random),
            false => portable::pack::<Self>(input, packing, random),
        }
    }

    fn memaop_unpack(packed: Packed<Self>, dtype: FloatDType) -> CubeTensor {
        match takes(&packed.norms, dtype.into(), packed.norms.shape()[0]) {
            true => packed::unpack(&packed, dtype),
            false => portable::unpack::<Self>(packed, dtype),
        }
    }

    fn memaop_times(packed: Packed<Self>, values: CubeTensor) -> CubeTensor {
        match takes(&values, values.dtype, values.shape()[0]) {
            true => packed::times(&packed, values),
            false => portable::times::<Self>(packed, values),
        }
    }

    fn memaop_drop_values(values: CubeTensor, dropout: Dropout) -> CubeTensor {
        match takes(&values, values.dtype, values.shape()[0]) {
            true => dropout::drop_out(values, dropout),
            false => portable::drop_out::<Self>(values, dropout),
        }
    }
}

impl ExactOps for CubeBackend {}

impl<B: burn_fusion::FusionBackend + ExactOps> ExactOps for burn_fusion::Fusion<B> {}

impl CopyOut for CubeBackend {
    fn copy_out(values: FloatTensor<Self>) -> Transfer {
        copy_out(values)
    }
}

impl<B: burn_fusion::FusionBackend + CopyOut> CopyOut for burn_fusion::Fusion<B> {
    fn copy_out(values: FloatTensor<Self>) -> Transfer {
        let client = values.client.clone();
        B::copy_out(client.resolve_tensor_float::<B>(values))
    }
}

/// The sum of the outer products of drawn patches: one launch and one product, or one of both for
/// each part of very many patches.
fn product_of_patches(
    images: CubeTensor,
    grad: CubeTensor,
    tilt: CubeTensor,
    drawn: Drawn<CubeBackend>,
    window: Window,
) -> CubeTensor {
    let k = drawn.rows.shape()[0];
    let widest = (window.groups * window.patch()).max(window.channels[1]);
    let at_once = (MOST_GATHERED / widest).max(1);
    let products = (0..k).step_by(at_once).map(|first| {
        let places = first..k.min(first + at_once);
        let [patches, grads] = images::gather(&images, &grad, &tilt, &drawn, places, &window);
        CubeBackend::float_matmul(CubeBackend::float_transpose(grads), patches)
    });
    let product = products.reduce(CubeBackend::float_add);
    let product = product.expect("at least one position is drawn");
    let shape = Shape::new([window.channels[1], window.patch()]);
    CubeBackend::float_reshape(product, shape)
}

/// Whether the kernels take so many rows of a type on the device of a tensor. The first time that
/// they do not, a warning says why.
fn takes(on: &CubeTensor, dtype: DType, rows: usize) -> bool {
    static ONCE: Once = Once::new();
    let units = on.client.properties().hardware.max_units_per_cube;
    let supported = supported(dtype, rows, units);
    if let Err(reason) = &supported {
        ONCE.call_once(|| {
            log::warn!(
                "burn-memaop: gradients take primitive operations, which are slower than kernels and may wait for \
                 the device: {reason}"
            );
        });
    }
    supported.is_ok()
}

/// Burn's own would begin when the values are first needed, behind all work given by then.
fn copy_out(values: CubeTensor) -> Transfer {
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

/// The units that the kernels need in a cube. Every device of the WebGPU standard has as many.
const LEAST_UNITS: u32 = 256;
/// Whether the kernels can take so many rows of such a type on a device with so many units in a
/// cube. The error says why not.
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

/// A matrix whose rows have no gaps between their values.
fn row_major(matrix: CubeTensor) -> CubeTensor {
    match matrix.meta.strides()[1] == 1 && !matrix.meta.is_tiled() {
        true => matrix,
        false => into_contiguous(matrix),
    }
}

/// A memory in buffers that no other tensor shares.
fn unshared(memory: Memory<CubeBackend>) -> Memory<CubeBackend> {
    let unshared = |matrix: CubeTensor| {
        let matrix = row_major(matrix);
        match matrix.can_mut() && matrix.is_nonoverlapping() {
            true => matrix,
            false => matrix.copy(),
        }
    };
    Memory {
        input: unshared(memory.input),
        grad: unshared(memory.grad),
        age: unshared(memory.age),
    }
}

/// The width of a matrix and the distance of its rows, in vectors.
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
        // Half precision has all sizes of single precision, and a kernel can have both types.
        let sizes = matrix.client.io_optimized_vector_sizes(size_of::<f32>());
        tensor_vector_size_parallel(sizes, shape, strides, 1)
    });
    sizes.min().unwrap_or(1)
}

/// The number of units that share a row, so that there is work for each.
fn row_units(matrices: [&CubeTensor; 2], sizes: [VectorSize; 2]) -> u32 {
    let vectors = |i: usize| matrices[i].meta.shape()[1] / sizes[i];
    let most = vectors(0).max(vectors(1)).min(LEAST_UNITS as usize);
    (most as u32).next_power_of_two().max(32)
}

fn cubes(like: &CubeTensor, count: usize, units: u32) -> (CubeCount, CubeDim) {
    let dim = CubeDim::new_1d(units);
    let count = calculate_cube_count_elemwise(&like.client, count * units as usize, dim);
    (count, dim)
}

fn empty<const D: usize>(like: &CubeTensor, shape: [usize; D], dtype: DType) -> CubeTensor {
    let (client, device) = (like.client.clone(), like.device.clone());
    empty_device_dtype(client, device, Shape::new(shape), dtype)
}

/// As [`empty`], without gaps between the rows, which on CUDA and ROCm can be as wide as the rows.
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
        for (found, reason) in [
            (supported(DType::F64, 10, 256), "F64"),
            (supported(DType::F32, 10, 64), "the device has 64"),
            (supported(DType::F32, (1 << 24) + 1, 256), "16777217"),
        ] {
            let message = found.unwrap_err();
            assert!(message.contains(reason), "{message}");
        }
    }
}
