//! Gathers the chosen rows of both factors and clears them in the memory, in one launch; and for the
//! gradient of the input, gathers rows of one matrix and puts those of another in their place.

use burn::tensor::DType;
use burn_cubecl::{cubecl, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{
    RowLayout, address_type, cubes, elem_type, empty, fold::clear, layout, row_units,
    select::Chosen, vector_size,
};

/// The chosen rows of `input` and `grad`, contiguous, each times the root of its weight; zeros in place of one
/// without weight.
pub(super) fn gather(batch: &[CubeTensor; 2], chosen: &Chosen, dtype: DType) -> [CubeTensor; 2] {
    let panels = panels(batch, chosen, dtype);
    let [input, grad] = batch;
    let k = chosen.rows.meta.shape()[0];
    let sizes = [
        vector_size(&[input, &panels[0]]),
        vector_size(&[grad, &panels[1]]),
    ];
    let (count, dim) = cubes(&chosen.rows, k, row_units([input, grad], sizes));
    // SAFETY: every index is below a count of rows times their stride, within its tensor; the
    // chosen rows are rows of the batch.
    unsafe {
        gather_kernel::launch_unchecked(
            &chosen.rows.client,
            count,
            dim,
            address_type(&[input, grad, &panels[0], &panels[1]]),
            sizes[0],
            sizes[1],
            input.clone().into_buffer_arg(),
            grad.clone().into_buffer_arg(),
            panels[0].clone().into_buffer_arg(),
            panels[1].clone().into_buffer_arg(),
            chosen.rows.clone().into_buffer_arg(),
            chosen.roots.clone().into_buffer_arg(),
            layout(input, sizes[0]),
            layout(grad, sizes[1]),
            layout(&panels[0], sizes[0]),
            layout(&panels[1], sizes[1]),
            k,
            elem_type(dtype),
        );
    }
    panels
}

/// As [`gather`], from a memory (`m^X`, `m^G`, ages), each times `scale` too; they are zero there afterwards.
pub(super) fn take_out(
    kept: &[CubeTensor; 3],
    chosen: &Chosen,
    dtype: DType,
    scale: f32,
) -> [CubeTensor; 2] {
    let [input, grad, age] = kept;
    let panels = panels([input, grad], chosen, dtype);
    let k = chosen.rows.meta.shape()[0];
    let sizes = [
        vector_size(&[input, &panels[0]]),
        vector_size(&[grad, &panels[1]]),
    ];
    let (count, dim) = cubes(&chosen.rows, k, row_units([input, grad], sizes));
    // SAFETY: as in `gather`; no other tensor shares the buffers of the memory.
    unsafe {
        take_out_kernel::launch_unchecked(
            &chosen.rows.client,
            count,
            dim,
            address_type(&[input, grad, &panels[0], &panels[1]]),
            sizes[0],
            sizes[1],
            input.clone().into_buffer_arg(),
            grad.clone().into_buffer_arg(),
            panels[0].clone().into_buffer_arg(),
            panels[1].clone().into_buffer_arg(),
            chosen.rows.clone().into_buffer_arg(),
            chosen.roots.clone().into_buffer_arg(),
            age.clone().into_buffer_arg(),
            layout(input, sizes[0]),
            layout(grad, sizes[1]),
            layout(&panels[0], sizes[0]),
            layout(&panels[1], sizes[1]),
            age.meta.strides()[0],
            k,
            scale,
            [elem_type(input.dtype), elem_type(dtype)],
        );
    }
    panels
}

fn panels<'a>(
    from: impl IntoIterator<Item = &'a CubeTensor>,
    chosen: &Chosen,
    dtype: DType,
) -> [CubeTensor; 2] {
    let k = chosen.rows.meta.shape()[0];
    let mut panels = from
        .into_iter()
        .map(|from| empty(&chosen.rows, [k, from.meta.shape()[1]], dtype));
    [(); 2].map(|()| panels.next().expect("two factors"))
}

/// What a row is multiplied by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum By {
    Weight,
    /// The other factor of the outer product has the other root.
    Root,
}

/// The chosen rows of one matrix, contiguous, each times its weight or the root of it; zeros in place of one without
/// weight.
pub(super) fn gather_rows(from: &CubeTensor, chosen: &Chosen, by: By) -> CubeTensor {
    let k = chosen.rows.meta.shape()[0];
    let panel = empty(&chosen.rows, [k, from.meta.shape()[1]], from.dtype);
    move_rows(from, &panel, chosen, Some(by));
    panel
}

/// Puts the rows of a panel where the chosen ones came from, but for those without weight.
pub(super) fn scatter_rows(panel: &CubeTensor, chosen: &Chosen, to: &CubeTensor) {
    move_rows(panel, to, chosen, None);
}

fn move_rows(from: &CubeTensor, to: &CubeTensor, chosen: &Chosen, gather: Option<By>) {
    let k = chosen.rows.meta.shape()[0];
    let size = vector_size(&[from, to]);
    let (count, dim) = cubes(&chosen.rows, k, row_units([from, from], [size, size]));
    // SAFETY: every index is below a count of rows times their stride, within its tensor; the
    // chosen rows are below the number of rows of the larger tensor.
    unsafe {
        move_kernel::launch_unchecked(
            &chosen.rows.client,
            count,
            dim,
            address_type(&[from, to]),
            size,
            from.clone().into_buffer_arg(),
            to.clone().into_buffer_arg(),
            chosen.rows.clone().into_buffer_arg(),
            chosen.roots.clone().into_buffer_arg(),
            layout(from, size),
            layout(to, size),
            k,
            gather.is_none(),
            gather == Some(By::Root),
            elem_type(from.dtype),
        );
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn move_kernel<T: Float, N: Size>(
    from: &[Vector<T, N>],
    to: &mut [Vector<T, N>],
    chosen: &[u32],
    roots: &[f32],
    from_rows: RowLayout,
    to_rows: RowLayout,
    k: usize,
    #[comptime] scatter: bool,
    #[comptime] by_root: bool,
    #[define(T)] _dtype: ElemType,
) {
    let place = CUBE_POS;
    if place >= k {
        terminate!();
    }
    let row = chosen[place] as usize;
    let root = roots[place];
    if comptime!(scatter) {
        // Places that were left over all name row 0.
        if root > 0.0 {
            copy::<T, T, N>(from, place, &from_rows, to, row, &to_rows, 1.0f32);
        }
    } else {
        let mut scale = root;
        if comptime!(!by_root) {
            scale = root * root;
        }
        copy::<T, T, N>(from, row, &from_rows, to, place, &to_rows, scale);
    }
}

/// Its inputs are only read, and may be one buffer: WebGPU forbids to bind one twice that may be written.
#[cube(launch_unchecked, address_type = "dynamic")]
fn gather_kernel<T: Float, NX: Size, NG: Size>(
    input: &[Vector<T, NX>],
    grad: &[Vector<T, NG>],
    panel_input: &mut [Vector<T, NX>],
    panel_grad: &mut [Vector<T, NG>],
    chosen: &[u32],
    roots: &[f32],
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
    let row = chosen[to] as usize;
    let scale = roots[to];
    copy::<T, T, NX>(
        input,
        row,
        &input_rows,
        panel_input,
        to,
        &panel_input_rows,
        scale,
    );
    copy::<T, T, NG>(
        grad,
        row,
        &grad_rows,
        panel_grad,
        to,
        &panel_grad_rows,
        scale,
    );
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn take_out_kernel<S: Float, T: Float, NX: Size, NG: Size>(
    input: &mut [Vector<S, NX>],
    grad: &mut [Vector<S, NG>],
    panel_input: &mut [Vector<T, NX>],
    panel_grad: &mut [Vector<T, NG>],
    chosen: &[u32],
    roots: &[f32],
    age: &mut [f32],
    input_rows: RowLayout,
    grad_rows: RowLayout,
    panel_input_rows: RowLayout,
    panel_grad_rows: RowLayout,
    age_stride: usize,
    k: usize,
    scale: f32,
    #[define(S, T)] _dtypes: [ElemType; 2],
) {
    let to = CUBE_POS;
    if to >= k {
        terminate!();
    }
    let row = chosen[to] as usize;
    let scale = scale * roots[to];
    copy::<S, T, NX>(
        &*input,
        row,
        &input_rows,
        panel_input,
        to,
        &panel_input_rows,
        scale,
    );
    copy::<S, T, NG>(
        &*grad,
        row,
        &grad_rows,
        panel_grad,
        to,
        &panel_grad_rows,
        scale,
    );
    clear::<S, NX>(input, row, &input_rows);
    clear::<S, NG>(grad, row, &grad_rows);
    if UNIT_POS == 0 {
        age[row * age_stride] = 0.0f32;
    }
}

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
    let weighted = scale > 0.0;
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
