//! Copies the drawn rows to panels, takes them out of a memory, and puts products in their places.

use burn::tensor::DType;
use burn_cubecl::{CubeBackend, cubecl, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{
    RowLayout, address_type, cubes, elem_type, empty, layout, row_units,
    scores::{NAN, clear},
    units::is_finite,
    vector_size,
};
use crate::rows::tensors::{Drawn, Memory};

/// The drawn rows of both factors, each times its half of the weight, in one launch.
pub(super) fn gather(
    batch: &[CubeTensor; 2],
    tilt: &CubeTensor,
    drawn: &Drawn<CubeBackend>,
) -> [CubeTensor; 2] {
    let [input, grad] = batch;
    let panels = [
        panel(input, drawn, input.dtype),
        panel(grad, drawn, grad.dtype),
    ];
    let k = drawn.rows.meta.shape()[0];
    let sizes = [
        vector_size(&[input, &panels[0]]),
        vector_size(&[grad, &panels[1]]),
    ];
    let (count, dim) = cubes(&drawn.rows, k, row_units([input, grad], sizes));
    // SAFETY: every index is below a count of rows times their stride, within its tensor; the drawn
    // rows are rows of the batch.
    unsafe {
        gather_kernel::launch_unchecked(
            &drawn.rows.client,
            count,
            dim,
            address_type(&[input, grad, &panels[0], &panels[1]]),
            sizes[0],
            sizes[1],
            input.clone().into_buffer_arg(),
            grad.clone().into_buffer_arg(),
            panels[0].clone().into_buffer_arg(),
            panels[1].clone().into_buffer_arg(),
            drawn.rows.clone().into_buffer_arg(),
            drawn.root.clone().into_buffer_arg(),
            tilt.clone().into_buffer_arg(),
            layout(input, sizes[0]),
            layout(grad, sizes[1]),
            layout(&panels[0], sizes[0]),
            layout(&panels[1], sizes[1]),
            k,
            elem_type(grad.dtype),
        );
    }
    panels
}

/// As [`gather`], but from a memory, in a launch for each factor. The rows there are zeros
/// afterwards, unless their weights are NaN.
pub(super) fn take_out(
    memory: &Memory<CubeBackend>,
    tilt: &CubeTensor,
    drawn: &Drawn<CubeBackend>,
    dtype: DType,
) -> [CubeTensor; 2] {
    let k = drawn.rows.meta.shape()[0];
    [(&memory.input, true), (&memory.grad, false)].map(|(from, is_input)| {
        let panel = panel(from, drawn, dtype);
        let size = vector_size(&[from, &panel]);
        let (count, dim) = cubes(&drawn.rows, k, row_units([from, from], [size, size]));
        // SAFETY: as in `gather`; no other tensor shares the buffers of the memory.
        unsafe {
            take_out_kernel::launch_unchecked(
                &drawn.rows.client,
                count,
                dim,
                address_type(&[from, &panel]),
                size,
                from.clone().into_buffer_arg(),
                panel.clone().into_buffer_arg(),
                drawn.rows.clone().into_buffer_arg(),
                drawn.root.clone().into_buffer_arg(),
                tilt.clone().into_buffer_arg(),
                memory.age.clone().into_buffer_arg(),
                layout(from, size),
                layout(&panel, size),
                memory.age.meta.strides()[0],
                k,
                is_input,
                elem_type(dtype),
            );
        }
        panel
    })
}

/// A new panel for the drawn rows of a matrix.
fn panel(from: &CubeTensor, drawn: &Drawn<CubeBackend>, dtype: DType) -> CubeTensor {
    let k = drawn.rows.meta.shape()[0];
    empty(&drawn.rows, [k, from.meta.shape()[1]], dtype)
}

/// The drawn rows of the second factor alone. With a tilt they are those of [`gather`]. Without
/// one, each is multiplied by the root of its weight.
pub(super) fn gather_grad(
    from: &CubeTensor,
    tilt: Option<&CubeTensor>,
    drawn: &Drawn<CubeBackend>,
) -> CubeTensor {
    let panel = panel(from, drawn, from.dtype);
    let k = drawn.rows.meta.shape()[0];
    let size = vector_size(&[from, &panel]);
    let (count, dim) = cubes(&drawn.rows, k, row_units([from, from], [size, size]));
    // SAFETY: as in `gather`.
    unsafe {
        gather_grad_kernel::launch_unchecked(
            &drawn.rows.client,
            count,
            dim,
            address_type(&[from, &panel]),
            size,
            from.clone().into_buffer_arg(),
            panel.clone().into_buffer_arg(),
            drawn.rows.clone().into_buffer_arg(),
            drawn.root.clone().into_buffer_arg(),
            tilt.unwrap_or(&drawn.root).clone().into_buffer_arg(),
            layout(from, size),
            layout(&panel, size),
            k,
            tilt.is_some(),
            elem_type(from.dtype),
        );
    }
    panel
}

/// A matrix with the rows of a product in the places of the drawn rows, each times the root of its
/// weight. Other rows are zero, or NaN where their score is not finite.
pub(super) fn spread(
    product: &CubeTensor,
    score: &CubeTensor,
    drawn: &Drawn<CubeBackend>,
) -> CubeTensor {
    let ([rows], [k, width]) = (score.meta.shape().dims(), product.meta.shape().dims());
    let spread = empty(product, [rows, width], product.dtype);
    let size = vector_size(&[product, &spread]);
    let units = row_units([product, product], [size, size]);
    let (count, dim) = cubes(&spread, rows, units);
    let (drawn_count, _) = cubes(&spread, k, units);
    // SAFETY: as in `gather`; the drawn rows are below the number of scores.
    unsafe {
        rest_kernel::launch_unchecked(
            &spread.client,
            count,
            dim,
            address_type(&[&spread]),
            size,
            score.clone().into_buffer_arg(),
            spread.clone().into_buffer_arg(),
            layout(&spread, size),
            rows,
            elem_type(spread.dtype),
        );
        spread_kernel::launch_unchecked(
            &spread.client,
            drawn_count,
            dim,
            address_type(&[product, &spread]),
            size,
            product.clone().into_buffer_arg(),
            spread.clone().into_buffer_arg(),
            drawn.rows.clone().into_buffer_arg(),
            drawn.root.clone().into_buffer_arg(),
            layout(product, size),
            layout(&spread, size),
            k,
            elem_type(spread.dtype),
        );
    }
    spread
}

/// The inputs may be one buffer, which WebGPU allows because they are only read.
#[cube(launch_unchecked, address_type = "dynamic")]
fn gather_kernel<T: Float, NX: Size, NG: Size>(
    input: &[Vector<T, NX>],
    grad: &[Vector<T, NG>],
    panel_input: &mut [Vector<T, NX>],
    panel_grad: &mut [Vector<T, NG>],
    drawn: &[u32],
    roots: &[f32],
    tilts: &[f32],
    input_rows: RowLayout,
    grad_rows: RowLayout,
    panel_input_rows: RowLayout,
    panel_grad_rows: RowLayout,
    k: usize,
    #[define(T)] _dtype: ElemType,
) {
    let to = CUBE_POS;
    if to >= k {
        terminate!();
    }
    let row = drawn[to] as usize;
    let root = roots[to];
    let by_input = root * tilts[row];
    let by_grad = root / tilts[row];
    copy::<T, T, NX>(
        input,
        row,
        &input_rows,
        panel_input,
        to,
        &panel_input_rows,
        by_input,
    );
    copy::<T, T, NG>(
        grad,
        row,
        &grad_rows,
        panel_grad,
        to,
        &panel_grad_rows,
        by_grad,
    );
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn take_out_kernel<T: Float, N: Size>(
    from: &mut [Vector<f32, N>],
    panel: &mut [Vector<T, N>],
    drawn: &[u32],
    roots: &[f32],
    tilts: &[f32],
    age: &mut [f32],
    from_rows: RowLayout,
    panel_rows: RowLayout,
    age_stride: usize,
    k: usize,
    #[comptime] is_input: bool,
    #[define(T)] _dtype: ElemType,
) {
    let to = CUBE_POS;
    if to >= k {
        terminate!();
    }
    let row = drawn[to] as usize;
    let root = roots[to];
    let mut scale = root / tilts[row];
    if comptime!(is_input) {
        scale = root * tilts[row];
    }
    copy::<f32, T, N>(&*from, row, &from_rows, panel, to, &panel_rows, scale);
    if is_finite(root) {
        clear::<f32, N>(from, row, &from_rows);
        if UNIT_POS == 0 {
            age[row * age_stride] = 0.0f32;
        }
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn gather_grad_kernel<T: Float, N: Size>(
    from: &[Vector<T, N>],
    panel: &mut [Vector<T, N>],
    drawn: &[u32],
    roots: &[f32],
    tilts: &[f32],
    from_rows: RowLayout,
    panel_rows: RowLayout,
    k: usize,
    #[comptime] tilted: bool,
    #[define(T)] _dtype: ElemType,
) {
    let to = CUBE_POS;
    if to >= k {
        terminate!();
    }
    let row = drawn[to] as usize;
    let mut scale = roots[to];
    if comptime!(tilted) {
        scale /= tilts[row];
    }
    copy::<T, T, N>(from, row, &from_rows, panel, to, &panel_rows, scale);
}

/// Fills every row with zeros, or with NaN where its score is not finite.
#[cube(launch_unchecked, address_type = "dynamic")]
fn rest_kernel<T: Float, N: Size>(
    scores: &[f32],
    to: &mut [Vector<T, N>],
    to_rows: RowLayout,
    rows: usize,
    #[define(T)] _dtype: ElemType,
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let mut rest = 0.0f32;
    if !is_finite(scores[row]) {
        rest = f32::reinterpret(NAN);
    }
    let mut at = UNIT_POS as usize;
    while at < to_rows.width {
        to[row * to_rows.stride + at] = Vector::cast_from(Vector::<f32, N>::new(rest));
        at += CUBE_DIM as usize;
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn spread_kernel<T: Float, N: Size>(
    product: &[Vector<T, N>],
    to: &mut [Vector<T, N>],
    drawn: &[u32],
    roots: &[f32],
    product_rows: RowLayout,
    to_rows: RowLayout,
    k: usize,
    #[define(T)] _dtype: ElemType,
) {
    let place = CUBE_POS;
    if place >= k {
        terminate!();
    }
    let root = roots[place];
    // All places without a row name row 0, and so do those of a broken draw.
    if root > 0.0 {
        let row = drawn[place] as usize;
        copy::<T, T, N>(product, place, &product_rows, to, row, &to_rows, root);
    }
}

/// Copies a row, each value times a scale. A scale of 0 gives zeros, whatever the row holds.
#[cube]
fn copy<S: Float, T: Float, N: Size>(
    from: &[Vector<S, N>],
    row: usize,
    from_rows: &RowLayout,
    panel: &mut [Vector<T, N>],
    to: usize,
    panel_rows: &RowLayout,
    scale: f32,
) {
    let weighted = is_weight(scale);
    let scale = Vector::<f32, N>::new(scale);
    let mut at = UNIT_POS as usize;
    while at < from_rows.width {
        let mut value = Vector::<f32, N>::new(0.0);
        if weighted {
            value = scale * Vector::cast_from(from[row * from_rows.stride + at]);
        }
        panel[to * panel_rows.stride + at] = Vector::cast_from(value);
        at += CUBE_DIM as usize;
    }
}

/// Whether a scale is not 0. It is judged by its bits, since it may be NaN.
#[cube]
pub(super) fn is_weight(scale: f32) -> bool {
    u32::reinterpret(scale) != 0
}
