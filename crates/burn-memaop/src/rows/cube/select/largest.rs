//! The K rows with the largest keys, by radix selection in the shared storage of one cube.

use burn::backend::TensorMetadata;
use burn_cubecl::{CubeBackend, cubecl, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{STAGED, or_nan, room};
use crate::rows::{
    cube::{
        LEAST_UNITS,
        random::{self, RandomBits, ln},
        units::{cube_max, is_finite, prefix_sum},
    },
    tensors::{Draw, Drawn},
};

/// What makes the key of a row. The rows with the largest keys are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Key {
    Score,
    Random,
    LogScorePlusGumbel,
}

pub(super) fn largest(
    scores: &CubeTensor,
    draw: Draw,
    key: Key,
    weight: f64,
) -> Drawn<CubeBackend> {
    let drawn = room(scores, draw);
    // SAFETY: all buffers are as long as the kernel reads and writes: `rows`, at most `STAGED`, and
    // `k`.
    unsafe {
        largest_kernel::launch_unchecked(
            &scores.client,
            CubeCount::new_single(),
            CubeDim::new_1d(LEAST_UNITS),
            scores.clone().into_buffer_arg(),
            drawn.rows.clone().into_buffer_arg(),
            drawn.root.clone().into_buffer_arg(),
            scores.shape()[0] as u32,
            draw.k as u32,
            weight.sqrt() as f32,
            random::arg(draw.random),
            key,
            LEAST_UNITS,
        );
    }
    drawn
}

/// Draws the `k` rows with the largest keys. Among equal keys the lower row comes first.
#[cube(launch_unchecked)]
fn largest_kernel(
    scores: &[f32],
    drawn: &mut [u32],
    roots: &mut [f32],
    rows: u32,
    k: u32,
    root: f32,
    random: RandomBits,
    #[comptime] rule: Key,
    #[comptime] units: u32,
) {
    let mut keys = Shared::<[u32]>::new_slice(STAGED);
    let histogram = Shared::<[Atomic<u32>]>::new_slice(comptime!(DIGITS as usize));
    let mut found = Shared::<[u32]>::new_slice(2usize);
    let mut shared = Shared::<[u32]>::new_slice(comptime!(units as usize));
    let mut broken = 0.0f32;
    let mut row = UNIT_POS;
    while row < rows {
        let score = scores[row as usize];
        broken = select(is_finite(score), broken, 1.0f32);
        keys[row as usize] = key(score, row, &random, rule);
        row += comptime!(units);
    }
    let mut most = Shared::<[f32]>::new_slice(comptime!(units as usize));
    let is_broken = cube_max(broken, &mut most, units) > 0.0;

    let mut threshold = Threshold::new(k);
    #[unroll]
    for pass in 0..4u32 {
        if UNIT_POS < comptime!(DIGITS) {
            histogram[UNIT_POS as usize].store(0u32);
        }
        sync_cube();
        let mut row = UNIT_POS;
        while row < rows {
            threshold.count(keys[row as usize], &histogram, pass);
            row += comptime!(units);
        }
        sync_cube();
        let mut count = 0u32;
        if UNIT_POS < comptime!(DIGITS) {
            count = histogram[(comptime!(DIGITS - 1) - UNIT_POS) as usize].load();
        }
        narrow(&mut threshold, count, &mut shared, &mut found, pass, units);
    }

    // Each unit takes a run of rows, so that the rows come out in ascending order.
    let run = rows.div_ceil(units);
    let first = u32::min(UNIT_POS * run, rows);
    let end = u32::min(first + run, rows);
    let mut above = 0u32;
    let mut equal = 0u32;
    for row in first..end {
        let key = keys[row as usize];
        above += select(key > threshold.key, 1u32, 0u32);
        equal += select(key == threshold.key, 1u32, 0u32);
    }
    let above_before = prefix_sum(above, &mut shared, units) - above;
    let mut equal_before = prefix_sum(equal, &mut shared, units) - equal;
    let mut at = above_before + u32::min(equal_before, threshold.needed);
    for row in first..end {
        let key = keys[row as usize];
        let mut take = key > threshold.key;
        if key == threshold.key {
            take = equal_before < threshold.needed;
            equal_before += 1;
        }
        if take {
            drawn[at as usize] = row;
            roots[at as usize] = or_nan(root, is_broken);
            at += 1;
        }
    }
}

/// The K-th largest key, as far as it is known. Of the keys that share its bits of `mask`, `needed`
/// are among the largest.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Threshold {
    pub(super) key: u32,
    pub(super) mask: u32,
    pub(super) needed: u32,
}

#[cube]
impl Threshold {
    pub(super) fn new(k: u32) -> Threshold {
        Threshold {
            key: 0u32,
            mask: 0u32,
            needed: k,
        }
    }

    /// Counts a digit of a key that shares the known bits.
    pub(super) fn count(&self, key: u32, histogram: &Shared<[Atomic<u32>]>, #[comptime] pass: u32) {
        if key & self.mask == self.key {
            let digit = (key >> comptime!(24 - 8 * pass)) & comptime!(DIGITS - 1);
            histogram[digit as usize].fetch_add(1u32);
        }
    }
}

/// Finds one digit more. Unit u has counted the keys with the u-th largest digit.
#[cube]
pub(super) fn narrow(
    threshold: &mut Threshold,
    count: u32,
    shared: &mut Shared<[u32]>,
    found: &mut Shared<[u32]>,
    #[comptime] pass: u32,
    #[comptime] units: u32,
) {
    let shift = comptime!(24 - 8 * pass);
    let counted = prefix_sum(count, shared, units);
    if counted >= threshold.needed && counted - count < threshold.needed {
        found[0] = comptime!(DIGITS - 1) - UNIT_POS;
        found[1] = threshold.needed - (counted - count);
    }
    sync_cube();
    threshold.key |= found[0] << shift;
    threshold.mask |= comptime!(DIGITS - 1) << shift;
    threshold.needed = found[1];
    // The next call may write there.
    sync_cube();
}

/// The number of values of a digit of a key.
pub(super) const DIGITS: u32 = 256;

/// A number that orders the rows as the rule does. Where the rule goes by scores, those that are
/// not finite have the least number, 0, and so have scores of 0.
#[cube]
pub(super) fn key(score: f32, row: u32, random: &RandomBits, #[comptime] rule: Key) -> u32 {
    match comptime!(rule) {
        // The bits of floats that are not negative are in the order of the floats.
        Key::Score => select(is_finite(score), u32::reinterpret(score), 0u32),
        Key::Random => random.word(row),
        Key::LogScorePlusGumbel => {
            let mut key = 0u32;
            if is_finite(score) && score >= comptime!(f32::MIN_POSITIVE) {
                let bits = u32::reinterpret(2.0 * ln(score) + random.gumbel(row));
                // The bits of negative floats are in the opposite order, and must come below.
                let sign = bits >> 31;
                key = select(sign == 1, !bits, bits | 0x8000_0000);
            }
            key
        }
    }
}
