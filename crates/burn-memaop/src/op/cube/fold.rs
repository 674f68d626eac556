//! Folds the batch into the memory and scores the rows, in one launch: a cube for each row.

use burn::{backend::TensorMetadata, tensor::DType};
use burn_cubecl::{cubecl, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{
    RowLayout, address_type, cubes, elem_type, empty, layout,
    noise::{self, Noise},
    row_units,
    units::{Four, Pair, cube_sum, cube_sums, is_finite, pair},
    vector_size,
};
use crate::{
    config::Memory,
    op::{noise::StepNoise, step::AopStep},
};

/// `|x| |g|` of every row, shape `[rows]`, in single precision.
pub(super) fn score(input: &CubeTensor, grad: &CubeTensor) -> CubeTensor {
    let rows = input.shape()[0];
    let scores = empty(input, [rows], DType::F32);
    let sizes = [vector_size(&[input]), vector_size(&[grad])];
    let units = row_units([input, grad], sizes);
    let (count, dim) = cubes(input, rows, units);
    // SAFETY: every index is below a count of rows times their stride, within its tensor.
    unsafe {
        score_kernel::launch_unchecked(
            &input.client,
            count,
            dim,
            address_type(&[input, grad]),
            sizes[0],
            sizes[1],
            input.clone().into_buffer_arg(),
            grad.clone().into_buffer_arg(),
            scores.clone().into_buffer_arg(),
            layout(input, sizes[0]),
            layout(grad, sizes[1]),
            rows,
            units,
            elem_type(input.dtype),
        );
    }
    scores
}

/// The norm of every row, shape `[rows]`, in single precision.
pub(super) fn norms(matrix: &CubeTensor) -> CubeTensor {
    let rows = matrix.shape()[0];
    let norms = empty(matrix, [rows], DType::F32);
    let size = vector_size(&[matrix]);
    let units = row_units([matrix, matrix], [size, size]);
    let (count, dim) = cubes(matrix, rows, units);
    // SAFETY: every index is below a count of rows times their stride, within the tensor.
    unsafe {
        norm_kernel::launch_unchecked(
            &matrix.client,
            count,
            dim,
            address_type(&[matrix]),
            size,
            matrix.clone().into_buffer_arg(),
            norms.clone().into_buffer_arg(),
            layout(matrix, size),
            rows,
            units,
            elem_type(matrix.dtype),
        );
    }
    norms
}

/// Folds the batch into the first rows of the memory, in place, and counts their ages; returns
/// `|x^| |g^|` of every row, shape `[rows]`, in single precision.
pub(super) fn fold_in(
    [input, grad]: &[CubeTensor; 2],
    [kept_input, kept_grad, age]: &[CubeTensor; 3],
    step: &AopStep,
) -> CubeTensor {
    let rows = input.shape()[0];
    let scores = empty(input, [rows], DType::F32);
    let sizes = [
        vector_size(&[input, kept_input]),
        vector_size(&[grad, kept_grad]),
    ];
    let units = row_units([input, grad], sizes);
    let (count, dim) = cubes(input, rows, units);
    let decay = step.method.memory().decay().unwrap_or(1.0).sqrt() as f32;
    let step_noise = StepNoise {
        seed: step.seed,
        step: step.step,
    };
    // SAFETY: every index is below a count of rows times their stride, within its tensor; the
    // memory has at least the rows of the batch, and no other tensor shares its buffers.
    unsafe {
        fold_kernel::launch_unchecked(
            &input.client,
            count,
            dim,
            address_type(&[input, grad, kept_input, kept_grad]),
            sizes[0],
            sizes[1],
            input.clone().into_buffer_arg(),
            grad.clone().into_buffer_arg(),
            kept_input.clone().into_buffer_arg(),
            kept_grad.clone().into_buffer_arg(),
            age.clone().into_buffer_arg(),
            scores.clone().into_buffer_arg(),
            layout(input, sizes[0]),
            layout(grad, sizes[1]),
            layout(kept_input, sizes[0]),
            layout(kept_grad, sizes[1]),
            age.meta.strides()[0],
            rows,
            decay,
            noise::arg(step_noise),
            matches!(step.method.memory(), Memory::Balanced { .. }),
            units,
            [elem_type(input.dtype), elem_type(kept_input.dtype)],
        );
    }
    scores
}

/// Writes the norm of every row.
#[cube(launch_unchecked, address_type = "dynamic")]
fn norm_kernel<T: Float, N: Size>(
    values: &[Vector<T, N>],
    norms: &mut [f32],
    layout: RowLayout,
    rows: usize,
    #[comptime] units: u32,
    #[define(T)] _dtype: ElemType,
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let mut shared = Shared::<[Vector<f32, Const<1>>]>::new_slice(comptime!(units as usize));
    let sum = square_sum::<T, N>(values, row, &layout);
    let sum = cube_sum(sum, &mut shared, units);
    if UNIT_POS == 0 {
        norms[row] = sum.sqrt();
    }
}

/// Writes `|x| |g|` of every row.
#[cube(launch_unchecked, address_type = "dynamic")]
fn score_kernel<T: Float, NX: Size, NG: Size>(
    input: &[Vector<T, NX>],
    grad: &[Vector<T, NG>],
    scores: &mut [f32],
    input_rows: RowLayout,
    grad_rows: RowLayout,
    rows: usize,
    #[comptime] units: u32,
    #[define(T)] _dtype: ElemType,
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let mut shared = Shared::<[Vector<f32, Pair>]>::new_slice(comptime!(units as usize));
    let x = square_sum::<T, NX>(input, row, &input_rows);
    let g = square_sum::<T, NG>(grad, row, &grad_rows);
    let sums = cube_sums::<Pair>(pair(x, g), &mut shared, units);
    if UNIT_POS == 0 {
        scores[row] = sums.extract(0usize).sqrt() * sums.extract(1usize).sqrt();
    }
}

/// Folds the batch into the memory, which then holds `x^` and `g^` times `decay`, and writes
/// `|x^| |g^|` of every row. A row whose score is not finite leaves zeros in the memory.
#[cube(launch_unchecked, address_type = "dynamic")]
fn fold_kernel<T: Float, S: Float, NX: Size, NG: Size>(
    input: &[Vector<T, NX>],
    grad: &[Vector<T, NG>],
    kept_input: &mut [Vector<S, NX>],
    kept_grad: &mut [Vector<S, NG>],
    age: &mut [f32],
    scores: &mut [f32],
    input_rows: RowLayout,
    grad_rows: RowLayout,
    kept_input_rows: RowLayout,
    kept_grad_rows: RowLayout,
    age_stride: usize,
    rows: usize,
    decay: f32,
    noise: Noise,
    #[comptime] balanced: bool,
    #[comptime] units: u32,
    #[define(T, S)] _dtypes: [ElemType; 2],
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let mut shared = Shared::<[Vector<f32, Pair>]>::new_slice(comptime!(units as usize));

    let mut input_scale = 1.0f32;
    let mut grad_scale = 1.0f32;
    if comptime!(balanced) {
        let mut fours = Shared::<[Vector<f32, Four>]>::new_slice(comptime!(units as usize));
        let mut squares = Vector::<f32, Four>::new(square_sum::<T, NX>(input, row, &input_rows));
        squares.insert(
            1usize,
            square_sum::<S, NX>(&*kept_input, row, &kept_input_rows),
        );
        squares.insert(2usize, square_sum::<T, NG>(grad, row, &grad_rows));
        squares.insert(
            3usize,
            square_sum::<S, NG>(&*kept_grad, row, &kept_grad_rows),
        );
        let squares = cube_sums::<Four>(squares, &mut fours, units);
        let x = squares.extract(0usize).sqrt();
        let a = squares.extract(1usize).sqrt();
        let g = squares.extract(2usize).sqrt();
        let b = squares.extract(3usize).sqrt();
        if x == 0.0 || g == 0.0 {
            input_scale = 0.0f32;
            grad_scale = 0.0f32;
        } else {
            // The root of each quotient, because the quotient of the products could overflow.
            let mut r = 1.0f32;
            if a != 0.0 && b != 0.0 {
                r = (a / x).sqrt() * (g / b).sqrt();
            }
            let sign = noise.sign(row as u32);
            input_scale = sign * r;
            grad_scale = sign / r;
        }
    }

    let x = add::<T, S, NX>(
        kept_input,
        &kept_input_rows,
        input,
        &input_rows,
        row,
        input_scale,
        decay,
    );
    let g = add::<T, S, NG>(
        kept_grad,
        &kept_grad_rows,
        grad,
        &grad_rows,
        row,
        grad_scale,
        decay,
    );
    let sums = cube_sums::<Pair>(pair(x, g), &mut shared, units);
    let score = sums.extract(0usize).sqrt() * sums.extract(1usize).sqrt();
    let finite = is_finite(score);
    if UNIT_POS == 0 {
        scores[row] = score;
        age[row * age_stride] = select(finite, age[row * age_stride] + 1.0, 0.0f32);
    }
    if !finite {
        clear::<S, NX>(kept_input, row, &kept_input_rows);
        clear::<S, NG>(kept_grad, row, &kept_grad_rows);
    }
}

/// This unit's part of the square sum of a row.
#[cube]
fn square_sum<T: Float, N: Size>(values: &[Vector<T, N>], row: usize, rows: &RowLayout) -> f32 {
    let mut sums = Vector::<f32, N>::new(0.0);
    let mut at = UNIT_POS as usize;
    while at < rows.width {
        let value = Vector::<f32, N>::cast_from(values[row * rows.stride + at]);
        sums += value * value;
        at += CUBE_DIM as usize;
    }
    total::<N>(sums)
}

/// `kept <- decay (kept + scale new)` for this unit's part of a row; returns its part of the square
/// sum of what is in the brackets.
#[cube]
fn add<T: Float, S: Float, N: Size>(
    kept: &mut [Vector<S, N>],
    kept_rows: &RowLayout,
    new: &[Vector<T, N>],
    new_rows: &RowLayout,
    row: usize,
    scale: f32,
    decay: f32,
) -> f32 {
    let scale = Vector::<f32, N>::new(scale);
    let decay = Vector::<f32, N>::new(decay);
    let mut sums = Vector::<f32, N>::new(0.0);
    let mut at = UNIT_POS as usize;
    while at < new_rows.width {
        let old = Vector::<f32, N>::cast_from(kept[row * kept_rows.stride + at]);
        let new = Vector::<f32, N>::cast_from(new[row * new_rows.stride + at]);
        let value = old + scale * new;
        sums += value * value;
        kept[row * kept_rows.stride + at] = Vector::cast_from(decay * value);
        at += CUBE_DIM as usize;
    }
    total::<N>(sums)
}

#[cube]
fn total<N: Size>(sums: Vector<f32, N>) -> f32 {
    let mut sum = 0.0f32;
    #[unroll]
    for lane in 0..N::value() {
        sum += sums.extract(lane);
    }
    sum
}

/// Fills a row with zeros.
#[cube]
pub(super) fn clear<S: Float, N: Size>(kept: &mut [Vector<S, N>], row: usize, rows: &RowLayout) {
    let mut at = UNIT_POS as usize;
    while at < rows.width {
        kept[row * rows.stride + at] = Vector::new(S::new(0.0));
        at += CUBE_DIM as usize;
    }
}
