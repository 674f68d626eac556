//! Dropout by the random bits of `random.rs`. There is a cube for each row.

use burn::backend::TensorMetadata;
use burn_cubecl::{cubecl, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{
    LEAST_UNITS, address_type, cubes, elem_type, empty,
    packed::mixed,
    random::{self, RandomBits},
    row_major,
};
use crate::rows::random::Dropout;

/// The products of values and the factors of a dropout.
pub(super) fn drop_out(values: CubeTensor, dropout: Dropout) -> CubeTensor {
    let values = row_major(values);
    let [rows, width] = values.shape().dims();
    let products = empty(&values, [rows, width], values.dtype);
    let units = width.min(LEAST_UNITS as usize) as u32;
    let (count, dim) = cubes(&values, rows, units.next_power_of_two().max(32));
    // SAFETY: every index is in a row below `rows` and in a column below `width`.
    unsafe {
        drop_out_kernel::launch_unchecked(
            &values.client,
            count,
            dim,
            address_type(&[&values, &products]),
            values.clone().into_buffer_arg(),
            products.clone().into_buffer_arg(),
            width,
            values.meta.strides()[0],
            products.meta.strides()[0],
            rows,
            random::arg(dropout.random),
            dropout.first as u32,
            dropout.threshold(),
            dropout.scale(),
            elem_type(values.dtype),
        );
    }
    products
}

#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
fn drop_out_kernel<T: Float>(
    values: &[T],
    products: &mut [T],
    width: usize,
    values_stride: usize,
    products_stride: usize,
    rows: usize,
    random: RandomBits,
    first: u32,
    threshold: u32,
    scale: f32,
    #[define(T)] _dtype: ElemType,
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let key = random.rounding(first + row as u32);
    let mut column = UNIT_POS as usize;
    while column < width {
        let is_zero = mixed(key, column as u32) >> comptime!(32 - Dropout::BITS) < threshold;
        let factor = select(is_zero, 0.0f32, scale);
        let value = f32::cast_from(values[row * values_stride + column]);
        products[row * products_stride + column] = T::cast_from(factor * value);
        column += CUBE_DIM as usize;
    }
}
