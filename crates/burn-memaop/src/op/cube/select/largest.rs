//! The K rows with the largest keys in one cube, by radix selection: of as many rows as fit into its shared memory.

use burn::backend::TensorMetadata;
use burn_cubecl::{cubecl, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{Chosen, Draw, STAGED, finite_score, output, write_share};
use crate::op::cube::{
    LEAST_UNITS,
    noise::{self, Noise, ln},
    units::{Pair, is_finite, prefix_sum},
};

/// What makes the key of a row; the rows with the largest keys are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Key {
    Score,
    Noise,
    LogScorePlusNoise,
}

pub(super) fn largest(scores: &CubeTensor, draw: Draw, key: Key, weight: f64) -> Chosen {
    let (chosen, share) = output(scores, draw);
    // SAFETY: all buffers are as long as the kernel reads and writes: `rows`, at most `STAGED`, `k` and 1.
    unsafe {
        largest_kernel::launch_unchecked(
            &scores.client,
            CubeCount::new_single(),
            CubeDim::new_1d(LEAST_UNITS),
            scores.clone().into_buffer_arg(),
            chosen.rows.clone().into_buffer_arg(),
            chosen.roots.clone().into_buffer_arg(),
            share.into_buffer_arg(),
            scores.shape()[0] as u32,
            draw.k as u32,
            weight.sqrt() as f32,
            noise::arg(draw.noise),
            key,
            draw.measure,
            LEAST_UNITS,
        );
    }
    chosen
}

/// The `k` rows with the largest keys, the lower row first among equals.
#[cube(launch_unchecked)]
fn largest_kernel(
    scores: &[f32],
    chosen: &mut [u32],
    roots: &mut [f32],
    share: &mut [f32],
    rows: u32,
    k: u32,
    root: f32,
    noise: Noise,
    #[comptime] rule: Key,
    #[comptime] measure: bool,
    #[comptime] units: u32,
) {
    let mut keys = Shared::<[u32]>::new_slice(STAGED);
    let histogram = Shared::<[Atomic<u32>]>::new_slice(comptime!(DIGITS as usize));
    let mut found = Shared::<[u32]>::new_slice(2usize);
    let mut shared = Shared::<[u32]>::new_slice(comptime!(units as usize));
    let mut row = UNIT_POS;
    while row < rows {
        keys[row as usize] = key(scores[row as usize], row, &noise, rule);
        row += comptime!(units);
    }

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

    // Each unit looks after a run of rows, so that the chosen come out in ascending order.
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
    let mut carried = 0.0f32;
    let mut all = 0.0f32;
    for row in first..end {
        let key = keys[row as usize];
        let mut take = key > threshold.key;
        if key == threshold.key {
            take = equal_before < threshold.needed;
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
        write_share(carried, all, share, &mut pairs, units);
    }
}

/// The K-th largest key, as far as it is known: `needed` of the keys that share its bits of `mask` are among the largest.
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

    /// Counts a digit of a key that shares what is known.
    pub(super) fn count(&self, key: u32, histogram: &Shared<[Atomic<u32>]>, #[comptime] pass: u32) {
        if key & self.mask == self.key {
            let digit = (key >> comptime!(24 - 8 * pass)) & comptime!(DIGITS - 1);
            histogram[digit as usize].fetch_add(1u32);
        }
    }
}

/// One digit more: unit u has counted the keys with the u-th largest.
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
    // What comes next may write there.
    sync_cube();
}

/// The values of a digit of a key.
pub(super) const DIGITS: u32 = 256;

/// A number that orders the rows as the policy does, the worst 0: scores that are not finite and,
/// where logarithms are taken, those of 0.
#[cube]
pub(super) fn key(score: f32, row: u32, noise: &Noise, #[comptime] rule: Key) -> u32 {
    match comptime!(rule) {
        // The bits of floats that are not negative are in the order of the floats.
        Key::Score => select(is_finite(score), u32::reinterpret(score), 0u32),
        Key::Noise => noise.word(row),
        Key::LogScorePlusNoise => {
            let mut key = 0u32;
            if is_finite(score) && score >= comptime!(f32::MIN_POSITIVE) {
                let bits = u32::reinterpret(2.0 * ln(score) + noise.gumbel(row));
                // Those of negative floats are in the opposite order, and below.
                let sign = bits >> 31;
                key = select(sign == 1, !bits, bits | 0x8000_0000);
            }
            key
        }
    }
}
