//! The K rows with the largest keys. The launches make a histogram for each digit of the keys,
//! count the rows above and at the K-th largest key in each chunk, and find the places of the rows.

use burn::{
    backend::{TensorMetadata, ops::IntTensorOps},
    tensor::{DType, IntDType, Shape},
};
use burn_cubecl::{CubeBackend, cubecl, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{Chunks, of_this_cube};
use crate::rows::{
    cube::{
        LEAST_UNITS, empty,
        random::{self, RandomBits},
        select::{
            largest::{DIGITS, Key, Threshold, key, narrow},
            or_nan, room,
        },
        units::{is_finite, prefix_sum},
    },
    tensors::{Draw, Drawn},
};

/// The number of digits of a key.
const PASSES: u32 = 4;

pub(in crate::rows::cube::select) fn largest(
    scores: &CubeTensor,
    draw: Draw,
    key: Key,
    weight: f64,
) -> Drawn<CubeBackend> {
    let chunks = Chunks::of(scores);
    let Chunks { rows, chunk, cubes } = chunks;
    let keys = empty(scores, [rows], DType::U32);
    // The last place counts the scores that are not finite.
    let digits = Shape::new([(PASSES * DIGITS + 1) as usize]);
    let digits = CubeBackend::int_zeros(digits, &scores.device(), IntDType::U32);
    let counts = empty(scores, [2 * cubes], DType::U32);
    let found = empty(scores, [3], DType::U32);
    let drawn = room(scores, draw);
    let (count, dim) = chunks.launch();
    let (rows, chunk) = (rows as u32, chunk as u32);
    // SAFETY: every index is below a number of rows, of digits, of chunks, or K, and the buffers
    // are as long.
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
                random::arg(draw.random),
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
            keys.into_buffer_arg(),
            counts.into_buffer_arg(),
            found.into_buffer_arg(),
            drawn.rows.clone().into_buffer_arg(),
            drawn.root.clone().into_buffer_arg(),
            rows,
            chunk,
            weight.sqrt() as f32,
            LEAST_UNITS,
        );
    }
    drawn
}

/// The place of the count of this unit in the histogram of a digit, with the largest digit first.
#[cube]
fn place_of_digit(#[comptime] pass: u32) -> usize {
    (comptime!(pass * DIGITS + DIGITS - 1) - UNIT_POS) as usize
}

/// Counts a digit of the keys of this chunk that share the known bits of the K-th largest.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn digit_kernel(
    scores: &[f32],
    keys: &mut [u32],
    digits: &[Atomic<u32>],
    rows: u32,
    chunk: u32,
    k: u32,
    random: RandomBits,
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
            let score = scores[row as usize];
            keys[row as usize] = key(score, row, &random, rule);
            if !is_finite(score) {
                digits[comptime!((PASSES * DIGITS) as usize)].fetch_add(1u32);
            }
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

/// Counts the keys of this chunk above the K-th largest, and equal to it. The digits are plain
/// integers here, since WGSL has no atomics that are only read.
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
            found[2] = digits[comptime!((PASSES * DIGITS) as usize)];
        }
    }
}

/// Puts the drawn rows of this chunk in their places.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn place_kernel(
    keys: &[u32],
    counts: &[u32],
    found: &[u32],
    drawn: &mut [u32],
    roots: &mut [f32],
    rows: u32,
    chunk: u32,
    root: f32,
    #[comptime] units: u32,
) {
    let mut shared = Shared::<[u32]>::new_slice(comptime!(units as usize));
    let mut two = Shared::<[u32]>::new_slice(2usize);
    let chunk = of_this_cube(rows, chunk);
    let threshold = found[0];
    let needed = found[1];
    let is_broken = found[2] > 0;

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

    // Each unit takes a run of rows, so that the rows come out in ascending order.
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
    for row in first..end {
        let key = keys[row as usize];
        let mut take = key > threshold;
        if key == threshold {
            take = equal_before < needed;
            equal_before += 1;
        }
        if take {
            drawn[at as usize] = row;
            roots[at as usize] = or_nan(root, is_broken);
            at += 1;
        }
    }
}
