//! The K rows with the largest keys: a histogram for each digit of the keys, the rows above and at the K-th largest key of each
//! chunk, and their places.

use burn::{
    backend::{TensorMetadata, ops::IntTensorOps},
    tensor::{DType, IntDType, Shape},
};
use burn_cubecl::{CubeBackend, cubecl, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{Chunks, of_this_cube, share};
use crate::op::cube::{
    LEAST_UNITS, empty,
    noise::{self, Noise},
    select::{
        Chosen, Draw, finite_score,
        largest::{DIGITS, Key, Threshold, key, narrow},
        output,
    },
    units::{Pair, cube_sums, is_finite, pair, prefix_sum},
};

/// The digits of a key.
const PASSES: u32 = 4;

pub(in crate::op::cube::select) fn largest(
    scores: &CubeTensor,
    draw: Draw,
    key: Key,
    weight: f64,
) -> Chosen {
    let chunks = Chunks::of(scores);
    let Chunks { rows, chunk, cubes } = chunks;
    let keys = empty(scores, [rows], DType::U32);
    let digits = Shape::new([(PASSES * DIGITS) as usize]);
    let digits = CubeBackend::int_zeros(digits, &scores.device(), IntDType::U32);
    let counts = empty(scores, [2 * cubes], DType::U32);
    let found = empty(scores, [2], DType::U32);
    let sums = empty(scores, [2 * cubes], DType::F32);
    let (chosen, of_all) = output(scores, draw);
    let (count, dim) = chunks.launch();
    let (rows, chunk) = (rows as u32, chunk as u32);
    // SAFETY: every index is below a number of rows, of digits, of chunks, or K, and the buffers are as long.
    unsafe {
        for pass in 0..PASSES {
            digit_kernel::launch_unchecked(
                &scores.client,
                count.clone(),
                dim,
                scores.clone().into_buffer_arg(),
                keys.clone().into_buffer_arg(),
                digits.clone().into_buffer_arg(),
                rows,
                chunk,
                draw.k as u32,
                noise::arg(draw.noise),
                key,
                pass,
                LEAST_UNITS,
            );
        }
        count_kernel::launch_unchecked(
            &scores.client,
            count.clone(),
            dim,
            keys.clone().into_buffer_arg(),
            digits.into_buffer_arg(),
            counts.clone().into_buffer_arg(),
            found.clone().into_buffer_arg(),
            rows,
            chunk,
            draw.k as u32,
            LEAST_UNITS,
        );
        place_kernel::launch_unchecked(
            &scores.client,
            count,
            dim,
            scores.clone().into_buffer_arg(),
            keys.into_buffer_arg(),
            counts.into_buffer_arg(),
            found.into_buffer_arg(),
            chosen.rows.clone().into_buffer_arg(),
            chosen.roots.clone().into_buffer_arg(),
            sums.clone().into_buffer_arg(),
            rows,
            chunk,
            weight.sqrt() as f32,
            draw.measure,
            LEAST_UNITS,
        );
    }
    if draw.measure {
        share(scores, sums, of_all, chunks);
    }
    chosen
}

/// Where the histogram of a digit has the count of this unit: the largest digit first.
#[cube]
fn place_of_digit(#[comptime] pass: u32) -> usize {
    (comptime!(pass * DIGITS + DIGITS - 1) - UNIT_POS) as usize
}

/// Counts a digit of the keys of this chunk that share those known of the K-th largest.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn digit_kernel(
    scores: &[f32],
    keys: &mut [u32],
    digits: &[Atomic<u32>],
    rows: u32,
    chunk: u32,
    k: u32,
    noise: Noise,
    #[comptime] rule: Key,
    #[comptime] pass: u32,
    #[comptime] units: u32,
) {
    let histogram = Shared::<[Atomic<u32>]>::new_slice(comptime!(DIGITS as usize));
    let mut found = Shared::<[u32]>::new_slice(2usize);
    let mut shared = Shared::<[u32]>::new_slice(comptime!(units as usize));
    let chunk = of_this_cube(rows, chunk);
    if UNIT_POS < comptime!(DIGITS) {
        histogram[UNIT_POS as usize].store(0u32);
    }
    let mut threshold = Threshold::new(k);
    #[unroll]
    for known in 0..pass {
        let mut count = 0u32;
        if UNIT_POS < comptime!(DIGITS) {
            count = digits[place_of_digit(known)].load();
        }
        narrow(&mut threshold, count, &mut shared, &mut found, known, units);
    }
    sync_cube();
    let mut row = chunk.first + UNIT_POS;
    while row < chunk.end {
        if comptime!(pass == 0) {
            keys[row as usize] = key(scores[row as usize], row, &noise, rule);
        }
        threshold.count(keys[row as usize], &histogram, pass);
        row += comptime!(units);
    }
    sync_cube();
    if UNIT_POS < comptime!(DIGITS) {
        let count = histogram[UNIT_POS as usize].load();
        if count > 0 {
            digits[(comptime!(pass * DIGITS) + UNIT_POS) as usize].fetch_add(count);
        }
    }
}

/// Counts the keys of this chunk above the K-th largest, and equal to it. The digits are plain integers here, since WGSL has no
/// atomics that are read only.
#[cube(launch_unchecked)]
fn count_kernel(
    keys: &[u32],
    digits: &[u32],
    counts: &mut [u32],
    found: &mut [u32],
    rows: u32,
    chunk: u32,
    k: u32,
    #[comptime] units: u32,
) {
    let mut two = Shared::<[u32]>::new_slice(2usize);
    let mut shared = Shared::<[u32]>::new_slice(comptime!(units as usize));
    let chunk = of_this_cube(rows, chunk);
    let mut threshold = Threshold::new(k);
    #[unroll]
    for pass in 0..PASSES {
        let mut count = 0u32;
        if UNIT_POS < comptime!(DIGITS) {
            count = digits[place_of_digit(pass)];
        }
        narrow(&mut threshold, count, &mut shared, &mut two, pass, units);
    }
    let mut above = 0u32;
    let mut equal = 0u32;
    let mut row = chunk.first + UNIT_POS;
    while row < chunk.end {
        let key = keys[row as usize];
        above += select(key > threshold.key, 1u32, 0u32);
        equal += select(key == threshold.key, 1u32, 0u32);
        row += comptime!(units);
    }
    let above = prefix_sum(above, &mut shared, units);
    let equal = prefix_sum(equal, &mut shared, units);
    // The last unit has the sums.
    if UNIT_POS == comptime!(units - 1) {
        let at = (2 * CUBE_POS_X) as usize;
        counts[at] = above;
        counts[at + 1] = equal;
        if CUBE_POS_X == 0 {
            found[0] = threshold.key;
            found[1] = threshold.needed;
        }
    }
}

/// Puts the chosen rows of this chunk in their places.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn place_kernel(
    scores: &[f32],
    keys: &[u32],
    counts: &[u32],
    found: &[u32],
    chosen: &mut [u32],
    roots: &mut [f32],
    sums: &mut [f32],
    rows: u32,
    chunk: u32,
    root: f32,
    #[comptime] measure: bool,
    #[comptime] units: u32,
) {
    let mut shared = Shared::<[u32]>::new_slice(comptime!(units as usize));
    let mut two = Shared::<[u32]>::new_slice(2usize);
    let chunk = of_this_cube(rows, chunk);
    let threshold = found[0];
    let needed = found[1];

    let mut above = 0u32;
    let mut equal = 0u32;
    if UNIT_POS < CUBE_POS_X {
        let at = (2 * UNIT_POS) as usize;
        above = counts[at];
        equal = counts[at + 1];
    }
    let above = prefix_sum(above, &mut shared, units);
    let equal = prefix_sum(equal, &mut shared, units);
    if UNIT_POS == comptime!(units - 1) {
        two[0] = above;
        two[1] = equal;
    }
    sync_cube();
    let above_before = two[0];
    let equal_before = two[1];

    // Each unit looks after a run of rows, so that the chosen come out in ascending order.
    let run = (chunk.end - chunk.first).div_ceil(units);
    let first = u32::min(chunk.first + UNIT_POS * run, chunk.end);
    let end = u32::min(first + run, chunk.end);
    let mut above = 0u32;
    let mut equal = 0u32;
    for row in first..end {
        let key = keys[row as usize];
        above += select(key > threshold, 1u32, 0u32);
        equal += select(key == threshold, 1u32, 0u32);
    }
    let above_before = above_before + prefix_sum(above, &mut shared, units) - above;
    let mut equal_before = equal_before + prefix_sum(equal, &mut shared, units) - equal;
    let mut at = above_before + u32::min(equal_before, needed);
    let mut carried = 0.0f32;
    let mut all = 0.0f32;
    for row in first..end {
        let key = keys[row as usize];
        let mut take = key > threshold;
        if key == threshold {
            take = equal_before < needed;
            equal_before += 1;
        }
        if take {
            chosen[at as usize] = row;
            roots[at as usize] = select(is_finite(scores[row as usize]), root, 0.0f32);
            at += 1;
        }
        if comptime!(measure) {
            let score = finite_score(scores[row as usize]);
            carried += select(take, score, 0.0f32);
            all += score;
        }
    }
    if comptime!(measure) {
        let mut pairs = Shared::<[Vector<f32, Pair>]>::new_slice(comptime!(units as usize));
        let sum = cube_sums::<Pair>(pair(carried, all), &mut pairs, units);
        if UNIT_POS == 0 {
            let at = (2 * CUBE_POS_X) as usize;
            sums[at] = sum.extract(0usize);
            sums[at + 1] = sum.extract(1usize);
        }
    }
}
