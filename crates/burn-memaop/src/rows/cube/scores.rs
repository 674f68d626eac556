//! Scores the rows of a batch, and folds a batch into a memory. There is a cube for each row.

use burn::{
    backend::{TensorMetadata, ops::FloatTensorOps},
    tensor::{DType, FloatDType, Shape},
};
use burn_cubecl::{CubeBackend, cubecl, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{
    RowLayout, address_type, cubes, elem_type, empty, layout,
    random::{self, RandomBits},
    row_units,
    units::{Four, cube_sums, is_finite},
    vector_size,
};
use crate::rows::tensors::{Fold, Memory, Scores};

pub(super) fn new_scores(like: &CubeTensor, rows: usize) -> Scores<CubeBackend> {
    Scores {
        score: empty(like, [rows], DType::F32),
        tilt: empty(like, [rows], DType::F32),
    }
}

/// Scores every row in one launch. Without `input`, the norm of its rows is 1.
pub(super) fn score(input: Option<&CubeTensor>, grad: &CubeTensor) -> Scores<CubeBackend> {
    let rows = grad.shape()[0];
    let scores = new_scores(grad, rows);
    let has_input = input.is_some();
    // A buffer that is only read may be bound twice.
    let input = input.unwrap_or(grad);
    let sizes = [vector_size(&[input]), vector_size(&[grad])];
    let units = row_units([input, grad], sizes);
    let (count, dim) = cubes(grad, rows, units);
    // SAFETY: every index is below a count of rows times their stride, within its tensor.
    unsafe {
        score_kernel::launch_unchecked(
            &grad.client,
            count,
            dim,
            address_type(&[input, grad]),
            sizes[0],
            sizes[1],
            input.clone().into_buffer_arg(),
            grad.clone().into_buffer_arg(),
            scores.score.clone().into_buffer_arg(),
            scores.tilt.clone().into_buffer_arg(),
            layout(input, sizes[0]),
            layout(grad, sizes[1]),
            rows,
            has_input,
            units,
            [elem_type(input.dtype), elem_type(grad.dtype)],
        );
    }
    scores
}

/// Folds the batch into the first rows of the memory, in place, and scores them. A first launch
/// looks for values that are not finite.
pub(super) fn fold(
    [input, grad]: &[CubeTensor; 2],
    memory: &Memory<CubeBackend>,
    fold: Fold,
) -> Scores<CubeBackend> {
    let rows = grad.shape()[0];
    // Behind the scores stands whether the batch is broken: WebGPU grants a kernel eight buffers.
    let shape = Shape::new([rows + 1]);
    let flagged = CubeBackend::float_zeros(shape, &grad.device(), FloatDType::F32);
    let scores = Scores::<CubeBackend> {
        score: CubeTensor::new_contiguous(
            grad.client.clone(),
            grad.device.clone(),
            Shape::new([rows]),
            flagged.handle.clone(),
            DType::F32,
        ),
        tilt: empty(grad, [rows], DType::F32),
    };
    let Memory {
        input: kept_input,
        grad: kept_grad,
        age,
    } = memory;
    let sizes = [
        vector_size(&[input, kept_input]),
        vector_size(&[grad, kept_grad]),
    ];
    let units = row_units([input, grad], sizes);
    let (count, dim) = cubes(grad, rows, units);
    // SAFETY: every index is below a count of rows times their stride, within its tensor; the
    // memory has at least the rows of the batch, and no other tensor shares its buffers.
    unsafe {
        check_kernel::launch_unchecked(
            &grad.client,
            count.clone(),
            dim,
            address_type(&[input, grad]),
            sizes[0],
            sizes[1],
            input.clone().into_buffer_arg(),
            grad.clone().into_buffer_arg(),
            flagged.clone().into_buffer_arg(),
            layout(input, sizes[0]),
            layout(grad, sizes[1]),
            rows,
            elem_type(input.dtype),
        );
        fold_kernel::launch_unchecked(
            &grad.client,
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
            flagged.into_buffer_arg(),
            scores.tilt.clone().into_buffer_arg(),
            layout(input, sizes[0]),
            layout(grad, sizes[1]),
            layout(kept_input, sizes[0]),
            layout(kept_grad, sizes[1]),
            age.meta.strides()[0],
            rows,
            fold.decay.sqrt() as f32,
            random::arg(fold.random),
            fold.balanced,
            units,
            elem_type(input.dtype),
        );
    }
    scores
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn score_kernel<X: Float, G: Float, NX: Size, NG: Size>(
    input: &[Vector<X, NX>],
    grad: &[Vector<G, NG>],
    score: &mut [f32],
    tilt: &mut [f32],
    input_rows: RowLayout,
    grad_rows: RowLayout,
    rows: usize,
    #[comptime] has_input: bool,
    #[comptime] units: u32,
    #[define(X, G)] _dtypes: [ElemType; 2],
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let mut shared = Shared::<[Vector<f32, Four>]>::new_slice(comptime!(units as usize));
    let mut x = 1.0f32;
    if comptime!(has_input) {
        x = norm::<X, NX>(input, row, &input_rows, &mut shared, units);
    }
    let g = norm::<G, NG>(grad, row, &grad_rows, &mut shared, units);
    if UNIT_POS == 0 {
        score[row] = x * g;
        tilt[row] = balance(x, g);
    }
}

/// Notes whether a value is not finite.
#[cube(launch_unchecked, address_type = "dynamic")]
fn check_kernel<T: Float, NX: Size, NG: Size>(
    input: &[Vector<T, NX>],
    grad: &[Vector<T, NG>],
    score: &mut [f32],
    input_rows: RowLayout,
    grad_rows: RowLayout,
    rows: usize,
    #[define(T)] _dtype: ElemType,
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    if !are_finite::<T, NX>(input, row, &input_rows) || !are_finite::<T, NG>(grad, row, &grad_rows)
    {
        // All units that come here write the same value.
        score[rows] = 1.0f32;
    }
}

/// Whether this unit's part of a row is finite.
#[cube]
fn are_finite<T: Float, N: Size>(values: &[Vector<T, N>], row: usize, rows: &RowLayout) -> bool {
    let mut finite = true;
    let mut at = UNIT_POS as usize;
    while at < rows.width {
        let value = Vector::<f32, N>::cast_from(values[row * rows.stride + at]);
        #[unroll]
        for lane in 0..N::value() {
            finite = finite && is_finite(value.extract(lane));
        }
        at += CUBE_DIM as usize;
    }
    finite
}

/// Folds the batch into the memory, and writes the scores of every row. If the batch is broken, the
/// memory stays as it is, and the scores are NaN.
#[cube(launch_unchecked, address_type = "dynamic")]
fn fold_kernel<T: Float, NX: Size, NG: Size>(
    input: &[Vector<T, NX>],
    grad: &[Vector<T, NG>],
    kept_input: &mut [Vector<f32, NX>],
    kept_grad: &mut [Vector<f32, NG>],
    age: &mut [f32],
    score: &mut [f32],
    tilt: &mut [f32],
    input_rows: RowLayout,
    grad_rows: RowLayout,
    kept_input_rows: RowLayout,
    kept_grad_rows: RowLayout,
    age_stride: usize,
    rows: usize,
    decay: f32,
    random: RandomBits,
    #[comptime] balanced: bool,
    #[comptime] units: u32,
    #[define(T)] _dtype: ElemType,
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let mut shared = Shared::<[Vector<f32, Four>]>::new_slice(comptime!(units as usize));
    let broken = score[rows] > 0.0;

    let mut by_input = 1.0f32;
    let mut by_grad = 1.0f32;
    if comptime!(balanced) {
        let x = norm::<T, NX>(input, row, &input_rows, &mut shared, units);
        let a = norm::<f32, NX>(&*kept_input, row, &kept_input_rows, &mut shared, units) * decay;
        let g = norm::<T, NG>(grad, row, &grad_rows, &mut shared, units);
        let b = norm::<f32, NG>(&*kept_grad, row, &kept_grad_rows, &mut shared, units) * decay;
        if x == 0.0 || g == 0.0 {
            by_input = 0.0f32;
            by_grad = 0.0f32;
        } else {
            // The root of each quotient, because the quotient of the products could overflow.
            let mut r = 1.0f32;
            if a != 0.0 && b != 0.0 {
                r = a.sqrt() / x.sqrt() * (g.sqrt() / b.sqrt());
            }
            let sign = random.sign(row as u32);
            by_input = sign * r;
            by_grad = sign / r;
        }
    }

    if !broken {
        add::<T, NX>(
            kept_input,
            &kept_input_rows,
            input,
            &input_rows,
            row,
            by_input,
            decay,
        );
        add::<T, NG>(
            kept_grad,
            &kept_grad_rows,
            grad,
            &grad_rows,
            row,
            by_grad,
            decay,
        );
    }
    let x = norm::<f32, NX>(&*kept_input, row, &kept_input_rows, &mut shared, units);
    let g = norm::<f32, NG>(&*kept_grad, row, &kept_grad_rows, &mut shared, units);
    // A row whose sum has overflowed is dropped.
    let lost = !is_finite(x * g);
    if lost && !broken {
        clear::<f32, NX>(kept_input, row, &kept_input_rows);
        clear::<f32, NG>(kept_grad, row, &kept_grad_rows);
    }
    if UNIT_POS == 0 {
        let mut weighed = select(lost, 0.0f32, x * g);
        if broken {
            weighed = f32::reinterpret(NAN);
        } else {
            age[row * age_stride] = select(lost, 0.0f32, age[row * age_stride] + 1.0);
        }
        score[row] = weighed;
        tilt[row] = select(lost, 1.0f32, balance(x, g));
    }
}

/// The bits of NaN.
pub(super) const NAN: u32 = 0x7FC0_0000;

/// `sqrt(|g| / |x|)`, and 1 where a norm is 0.
#[cube]
pub(super) fn balance(x: f32, g: f32) -> f32 {
    let mut tilt = 1.0f32;
    if x > 0.0 && g > 0.0 {
        // The root of each norm is taken, because the quotient of the norms can overflow.
        tilt = g.sqrt() / x.sqrt();
    }
    tilt
}

/// The norm of a row, which every unit gets. It is not finite if a value of the row is not.
#[cube]
fn norm<T: Float, N: Size>(
    values: &[Vector<T, N>],
    row: usize,
    rows: &RowLayout,
    shared: &mut Shared<[Vector<f32, Four>]>,
    #[comptime] units: u32,
) -> f32 {
    let mut plain = Vector::<f32, N>::new(0.0);
    let mut enlarged = Vector::<f32, N>::new(0.0);
    let mut reduced = Vector::<f32, N>::new(0.0);
    let mut at = UNIT_POS as usize;
    while at < rows.width {
        let value = Vector::<f32, N>::cast_from(values[row * rows.stride + at]);
        let large = value * Vector::new(ENLARGE);
        let small = value * Vector::new(REDUCE);
        plain += value * value;
        enlarged += large * large;
        reduced += small * small;
        at += CUBE_DIM as usize;
    }
    let mut sums = Vector::<f32, Four>::new(0.0);
    sums.insert(0usize, total::<N>(plain));
    sums.insert(1usize, total::<N>(enlarged));
    sums.insert(2usize, total::<N>(reduced));
    let sums = cube_sums::<Four>(sums, shared, units);
    root(
        sums.extract(0usize),
        sums.extract(1usize),
        sums.extract(2usize),
    )
}

/// Squares of values times one of these are safe where plain squares underflow or overflow.
pub(super) const ENLARGE: f32 = (1u64 << 63) as f32;
pub(super) const REDUCE: f32 = 1.0 / (ENLARGE * (1u64 << 17) as f32);

/// The root of a sum of squares, from the sums of plain, of enlarged and of reduced values.
#[cube]
pub(super) fn root(plain: f32, enlarged: f32, reduced: f32) -> f32 {
    let mut root = plain.sqrt();
    if plain < 1e-20 {
        root = enlarged.sqrt() * comptime!(1.0 / ENLARGE);
    }
    if !is_finite(plain) || plain > 1e30 {
        root = reduced.sqrt() * comptime!(1.0 / REDUCE);
    }
    root
}

/// `kept <- decay kept + scale new` for this unit's part of a row.
#[cube]
fn add<T: Float, N: Size>(
    kept: &mut [Vector<f32, N>],
    kept_rows: &RowLayout,
    new: &[Vector<T, N>],
    new_rows: &RowLayout,
    row: usize,
    scale: f32,
    decay: f32,
) {
    let scale = Vector::<f32, N>::new(scale);
    let decay = Vector::<f32, N>::new(decay);
    let mut at = UNIT_POS as usize;
    while at < new_rows.width {
        let old = kept[row * kept_rows.stride + at];
        let new = Vector::<f32, N>::cast_from(new[row * new_rows.stride + at]);
        kept[row * kept_rows.stride + at] = decay * old + scale * new;
        at += CUBE_DIM as usize;
    }
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

#[cube]
pub(super) fn clear<S: Float, N: Size>(kept: &mut [Vector<S, N>], row: usize, rows: &RowLayout) {
    let mut at = UNIT_POS as usize;
    while at < rows.width {
        kept[row * rows.stride + at] = Vector::new(S::new(0.0));
        at += CUBE_DIM as usize;
    }
}
