//! Packs rows and unpacks them, as `packing.rs` lays them out. There is a cube for each row.

use burn::{
    backend::TensorMetadata,
    tensor::{DType, FloatDType},
};
use burn_cubecl::{CubeBackend, cubecl, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{
    LEAST_UNITS, address_type, cubes, elem_type, empty, empty_without_gaps,
    gather::is_weight,
    random::{self, RandomBits},
    row_major,
    scores::{ENLARGE, NAN, REDUCE, root},
    units::{Four, cube_sums},
};
use crate::rows::{
    packing::{COLUMN, GROUP, LEAST, MIX, Packing},
    random::Random,
    tensors::{Drawn, Packed},
};

/// The layout of a packed row, in words and values.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
struct PackedLayout {
    /// The number of words from row to row.
    stride: usize,
    /// The number of words of the scales.
    scales: usize,
    /// The number of values of a row.
    width: usize,
}

fn layout(packed: &CubeTensor, packing: Packing) -> PackedLayoutLaunch {
    let stride = packed.meta.strides()[0];
    PackedLayoutLaunch::new(stride, packing.scales(), packing.width)
}

/// The number of units that share a row: one for each value of some whole groups.
fn row_units(packing: Packing) -> u32 {
    let width = packing.width.min(LEAST_UNITS as usize) as u32;
    width.next_power_of_two().max(GROUP as u32)
}

pub(super) fn pack(
    input: CubeTensor,
    packing: Packing,
    random: Option<Random>,
) -> Packed<CubeBackend> {
    let input = row_major(input);
    let rows = input.shape()[0];
    let words = empty_without_gaps(&input, [rows, packing.words()], DType::I32);
    let norms = empty_without_gaps(&input, [rows, 1], DType::F32);
    let units = row_units(packing);
    let (count, dim) = cubes(&input, rows, units);
    // SAFETY: every index is below a count of rows times their stride, within its tensor; the words
    // of a row are as many as `packing` says.
    unsafe {
        pack_kernel::launch_unchecked(
            &input.client,
            count,
            dim,
            address_type(&[&input, &words]),
            input.clone().into_buffer_arg(),
            words.clone().into_buffer_arg(),
            norms.clone().into_buffer_arg(),
            input.meta.strides()[0],
            layout(&words, packing),
            rows,
            random::arg(random.unwrap_or(Random { seed: 0, step: 0 })),
            random.is_some(),
            packing.bits.count() as u32,
            packing.bits.levels(),
            units,
            elem_type(input.dtype),
        );
    }
    Packed {
        words,
        norms,
        packing,
    }
}

pub(super) fn unpack(packed: &Packed<CubeBackend>, dtype: FloatDType) -> CubeTensor {
    let Packed {
        words,
        norms,
        packing,
    } = packed;
    let (rows, dtype) = (norms.shape()[0], DType::from(dtype));
    let values = empty(norms, [rows, packing.width], dtype);
    let (count, dim) = cubes(norms, rows, row_units(*packing));
    // SAFETY: as in `pack`.
    unsafe {
        unpack_kernel::launch_unchecked(
            &norms.client,
            count,
            dim,
            address_type(&[words, &values]),
            words.clone().into_buffer_arg(),
            values.clone().into_buffer_arg(),
            layout(words, *packing),
            values.meta.strides()[0],
            rows,
            packing.bits.count() as u32,
            packing.bits.levels(),
            elem_type(dtype),
        );
    }
    values
}

/// The drawn rows, each times its half of the weight.
pub(super) fn gather(
    packed: &Packed<CubeBackend>,
    tilt: &CubeTensor,
    drawn: &Drawn<CubeBackend>,
    dtype: DType,
) -> CubeTensor {
    let Packed { words, packing, .. } = packed;
    let k = drawn.rows.meta.shape()[0];
    let panel = empty(&drawn.rows, [k, packing.width], dtype);
    let (count, dim) = cubes(&drawn.rows, k, row_units(*packing));
    // SAFETY: as in `pack`; the drawn rows are packed rows.
    unsafe {
        gather_packed_kernel::launch_unchecked(
            &drawn.rows.client,
            count,
            dim,
            address_type(&[words, &panel]),
            words.clone().into_buffer_arg(),
            panel.clone().into_buffer_arg(),
            drawn.rows.clone().into_buffer_arg(),
            drawn.root.clone().into_buffer_arg(),
            tilt.clone().into_buffer_arg(),
            layout(words, *packing),
            panel.meta.strides()[0],
            k,
            packing.bits.count() as u32,
            packing.bits.levels(),
            elem_type(dtype),
        );
    }
    panel
}

/// The products of packed values and others. They are zero where the packed values are.
pub(super) fn times(packed: &Packed<CubeBackend>, values: CubeTensor) -> CubeTensor {
    let Packed { words, packing, .. } = packed;
    let values = row_major(values);
    let rows = values.shape()[0];
    let products = empty(&values, [rows, packing.width], values.dtype);
    let (count, dim) = cubes(&values, rows, row_units(*packing));
    // SAFETY: as in `pack`; the values are as many as the packed ones.
    unsafe {
        times_kernel::launch_unchecked(
            &values.client,
            count,
            dim,
            address_type(&[words, &values, &products]),
            words.clone().into_buffer_arg(),
            values.clone().into_buffer_arg(),
            products.clone().into_buffer_arg(),
            layout(words, *packing),
            values.meta.strides()[0],
            products.meta.strides()[0],
            rows,
            packing.bits.count() as u32,
            packing.bits.levels(),
            elem_type(values.dtype),
        );
    }
    products
}

/// The bits of infinity. Without the sign, the bits of NaN are above them.
const INFINITE: u32 = 0x7F80_0000;

#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
fn pack_kernel<T: Float>(
    values: &[T],
    words: &mut [u32],
    norms: &mut [f32],
    values_stride: usize,
    layout: PackedLayout,
    rows: usize,
    random: RandomBits,
    #[comptime] is_random: bool,
    #[comptime] bits: u32,
    #[comptime] levels: u32,
    #[comptime] units: u32,
    #[define(T)] _dtype: ElemType,
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let unit = UNIT_POS as usize;
    let lane = unit % GROUP;
    let segment = unit - lane;
    let mut sums = Shared::<[Vector<f32, Four>]>::new_slice(comptime!(units as usize));
    let mut sizes = Shared::<[u32]>::new_slice(comptime!(units as usize));
    let mut codes = Shared::<[u32]>::new_slice(comptime!(units as usize));
    let mut key = 0u32;
    if comptime!(is_random) {
        key = random.rounding(row as u32);
    }

    let mut squares = Vector::<f32, Four>::new(0.0);
    let mut first = 0usize;
    while first < layout.width {
        let column = first + unit;
        let mut value = 0.0f32;
        if column < layout.width {
            value = f32::cast_from(values[row * values_stride + column]);
        }
        let mut parts = Vector::<f32, Four>::new(value);
        parts.insert(1usize, value * ENLARGE);
        parts.insert(2usize, value * REDUCE);
        squares += parts * parts;
        let mut dither = comptime!(1u32 << 15).runtime();
        if comptime!(is_random) {
            dither = mixed(key, column as u32) >> 16;
        }

        let group_first = first + segment;
        let group = group_first / GROUP;
        let bit_pattern = u32::reinterpret(value);
        if comptime!(levels > 0) {
            // Without the sign, the bits of numbers are in their order, then come infinity and NaN.
            let largest = largest_of_group(bit_pattern & 0x7FFF_FFFF, &mut sizes);
            let size = f32::reinterpret(largest);
            let usable = largest < INFINITE && size >= LEAST;
            let top = comptime!(levels as f32);
            let mut code = levels.runtime();
            if usable {
                let shift = top + (f32::cast_from(dither) + 0.5) * comptime!(1.0f32 / 65_536.0);
                // Rounding can bring the least value below zero.
                let scaled = f32::max(value * (top / size) + shift, 0.0);
                code = u32::min(u32::cast_from(scaled), comptime!(2 * levels));
            }
            codes[unit] = code;
            if lane == 0 && group_first < layout.width {
                let mut scale = 0u32;
                if largest >= INFINITE {
                    scale = NAN;
                } else if usable {
                    scale = u32::reinterpret(size / top);
                }
                words[row * layout.stride + group] = scale;
            }
        } else {
            let is_nan = bit_pattern & 0x7FFF_FFFF > INFINITE;
            codes[unit] = select(value > 0.0 || is_nan, 1u32, 0u32);
        }
        sync_cube();

        if group_first < layout.width {
            let count = usize::min(layout.width - group_first, GROUP);
            let group_words = (count * comptime!(bits as usize)).div_ceil(32);
            if lane < group_words {
                let start = row * layout.stride + layout.scales;
                let at = start + group * comptime!(GROUP * bits as usize / 32) + lane;
                words[at] = word(&codes, segment, lane, group_words, bits);
            }
        }
        sync_cube();
        first += comptime!(units as usize);
    }

    let sums = cube_sums::<Four>(squares, &mut sums, units);
    if unit == 0 {
        norms[row] = root(
            sums.extract(0usize),
            sums.extract(1usize),
            sums.extract(2usize),
        );
    }
}

/// The largest of the numbers of the units of a group, which each of them gets.
#[cube]
fn largest_of_group(size: u32, shared: &mut Shared<[u32]>) -> u32 {
    let unit = UNIT_POS as usize;
    let lane = unit % GROUP;
    shared[unit] = size;
    sync_cube();
    #[unroll]
    for level in 1..comptime!(GROUP.ilog2() + 1) {
        let half = comptime!(GROUP >> level);
        if lane < half {
            shared[unit] = u32::max(shared[unit], shared[unit + half]);
        }
        sync_cube();
    }
    let largest = shared[unit - lane];
    // Every unit must have read it before the next group is written there.
    sync_cube();
    largest
}

/// A word of a group, from the codes of its values.
#[cube]
fn word(
    codes: &Shared<[u32]>,
    segment: usize,
    place: usize,
    group_words: usize,
    #[comptime] bits: u32,
) -> u32 {
    let mut word = 0u32;
    if comptime!(bits == 8) {
        #[unroll]
        for byte in 0..4usize {
            word |= codes[segment + 4 * place + byte] << comptime!(8 * byte as u32);
        }
    } else if comptime!(bits == 4) {
        let half = 4 * group_words;
        #[unroll]
        for byte in 0..4usize {
            let low = codes[segment + 4 * place + byte];
            let high = codes[segment + half + 4 * place + byte];
            word |= (low | (high << 4)) << comptime!(8 * byte as u32);
        }
    } else {
        #[unroll]
        for bit in 0..32usize {
            word |= codes[segment + 32 * place + bit] << comptime!(bit as u32);
        }
    }
    word
}

/// The random word of `packing.rs` for a column.
#[cube]
pub(super) fn mixed(key: u32, column: u32) -> u32 {
    let word = key + column * COLUMN;
    let word = (word ^ (word >> 16)) * comptime!(MIX[0]);
    let word = (word ^ (word >> 13)) * comptime!(MIX[1]);
    word ^ (word >> 16)
}

#[cube]
fn unpacked(
    words: &[u32],
    row: usize,
    column: usize,
    layout: &PackedLayout,
    #[comptime] bits: u32,
    #[comptime] levels: u32,
) -> f32 {
    let row = row * layout.stride;
    let start = row + layout.scales;
    let group = column / GROUP;
    let lane = column % GROUP;
    if comptime!(bits == 1) {
        f32::cast_from((words[start + column / 32] >> (column % 32) as u32) & 1)
    } else {
        let mut place = lane;
        let mut upper = 0u32;
        if comptime!(bits == 4) {
            let count = usize::min(layout.width - group * GROUP, GROUP);
            let half = 4 * count.div_ceil(8);
            if lane >= half {
                place = lane - half;
                upper = 4u32;
            }
        }
        let word = words[start + group * comptime!(GROUP * bits as usize / 32) + place / 4];
        let shift = 8 * (place % 4) as u32 + upper;
        let code = (word >> shift) & comptime!((1u32 << bits) - 1);
        let scale = f32::reinterpret(words[row + group]);
        (f32::cast_from(code) - comptime!(levels as f32)) * scale
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn unpack_kernel<T: Float>(
    words: &[u32],
    values: &mut [T],
    layout: PackedLayout,
    values_stride: usize,
    rows: usize,
    #[comptime] bits: u32,
    #[comptime] levels: u32,
    #[define(T)] _dtype: ElemType,
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let mut column = UNIT_POS as usize;
    while column < layout.width {
        let value = unpacked(words, row, column, &layout, bits, levels);
        values[row * values_stride + column] = T::cast_from(value);
        column += CUBE_DIM as usize;
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
fn gather_packed_kernel<T: Float>(
    words: &[u32],
    panel: &mut [T],
    drawn: &[u32],
    roots: &[f32],
    tilts: &[f32],
    layout: PackedLayout,
    panel_stride: usize,
    k: usize,
    #[comptime] bits: u32,
    #[comptime] levels: u32,
    #[define(T)] _dtype: ElemType,
) {
    let to = CUBE_POS;
    if to >= k {
        terminate!();
    }
    let row = drawn[to] as usize;
    let scale = roots[to] * tilts[row];
    let mut column = UNIT_POS as usize;
    while column < layout.width {
        let mut value = 0.0f32;
        if is_weight(scale) {
            value = scale * unpacked(words, row, column, &layout, bits, levels);
        }
        panel[to * panel_stride + column] = T::cast_from(value);
        column += CUBE_DIM as usize;
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(clippy::too_many_arguments)]
fn times_kernel<T: Float>(
    words: &[u32],
    values: &[T],
    products: &mut [T],
    layout: PackedLayout,
    values_stride: usize,
    products_stride: usize,
    rows: usize,
    #[comptime] bits: u32,
    #[comptime] levels: u32,
    #[define(T)] _dtype: ElemType,
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let mut column = UNIT_POS as usize;
    while column < layout.width {
        let factor = unpacked(words, row, column, &layout, bits, levels);
        let mut product = 0.0f32;
        if factor != 0.0 {
            product = factor * f32::cast_from(values[row * values_stride + column]);
        }
        products[row * products_stride + column] = T::cast_from(product);
        column += CUBE_DIM as usize;
    }
}
