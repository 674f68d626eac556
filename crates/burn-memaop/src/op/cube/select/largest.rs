//! The K rows with the largest keys, by radix selection.

use burn::{backend::TensorMetadata, tensor::DType};
use burn_cubecl::{cubecl, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{Chosen, Draw, finite_score, output, units, write_share};
use crate::op::cube::{
    empty,
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
    let rows = scores.shape()[0];
    let units = units(scores);
    let keys = empty(scores, [rows], DType::U32);
    let (chosen, share) = output(scores, draw);
    // SAFETY: all buffers are as long as the kernel reads and writes: `rows`, `k` and 1.
    unsafe {
        largest_kernel::launch_unchecked(
            &scores.client,
            CubeCount::new_single(),
            CubeDim::new_1d(units),
            scores.clone().into_buffer_arg(),
            keys.into_buffer_arg(),
            chosen.rows.clone().into_buffer_arg(),
            chosen.roots.clone().into_buffer_arg(),
            share.into_buffer_arg(),
            rows as u32,
            draw.k as u32,
            weight.sqrt() as f32,
            noise::arg(draw.noise),
            key,
            draw.measure,
            units,
        );
    }
    chosen
}

/// The `k` rows with the largest keys, the lower row first among equals.
#[cube(launch_unchecked)]
fn largest_kernel(
    scores: &[f32],
    keys: &mut [u32],
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
    let run = rows.div_ceil(units);
    let first = u32::min(UNIT_POS * run, rows);
    let end = u32::min(first + run, rows);
    let histogram = Shared::<[Atomic<u32>]>::new_slice(comptime!(DIGITS as usize));
    let mut found = Shared::<[u32]>::new_slice(2usize);
    let mut shared = Shared::<[u32]>::new_slice(comptime!(units as usize));

    for row in first..end {
        keys[row as usize] = key(scores[row as usize], row, &noise, rule);
    }

    // The k-th largest key, digit by digit: the bits of `mask` are those known, `needed` of the
    // keys that share them are among the largest.
    let mut threshold = 0u32;
    let mut mask = 0u32;
    let mut needed = k;
    #[unroll]
    for pass in 0..4u32 {
        let shift = comptime!(24 - 8 * pass);
        if UNIT_POS < comptime!(DIGITS) {
            histogram[UNIT_POS as usize].store(0u32);
        }
        sync_cube();
        for row in first..end {
            let key = keys[row as usize];
            if key & mask == threshold {
                let digit = (key >> shift) & comptime!(DIGITS - 1);
                histogram[digit as usize].fetch_add(1u32);
            }
        }
        sync_cube();
        let mut count = 0u32;
        if UNIT_POS < comptime!(DIGITS) {
            count = histogram[(comptime!(DIGITS - 1) - UNIT_POS) as usize].load();
        }
        let counted = prefix_sum(count, &mut shared, units);
        if counted >= needed && counted - count < needed {
            found[0] = comptime!(DIGITS - 1) - UNIT_POS;
            found[1] = needed - (counted - count);
        }
        sync_cube();
        threshold |= found[0] << shift;
        mask |= comptime!(DIGITS - 1) << shift;
        needed = found[1];
    }

    let mut above = 0u32;
    let mut equal = 0u32;
    for row in first..end {
        let key = keys[row as usize];
        above += select(key > threshold, 1u32, 0u32);
        equal += select(key == threshold, 1u32, 0u32);
    }
    let above_before = prefix_sum(above, &mut shared, units) - above;
    let mut equal_before = prefix_sum(equal, &mut shared, units) - equal;
    let mut at = above_before + u32::min(equal_before, needed);
    let mut carried = 0.0f32;
    for row in first..end {
        let key = keys[row as usize];
        let mut take = key > threshold;
        if key == threshold {
            take = equal_before < needed;
            equal_before += 1;
        }
        if take {
            chosen[at as usize] = row;
            roots[at as usize] = root;
            at += 1;
            if comptime!(measure) {
                carried += finite_score(scores[row as usize]);
            }
        }
    }
    if comptime!(measure) {
        let mut all = 0.0f32;
        for row in first..end {
            all += finite_score(scores[row as usize]);
        }
        let mut pairs = Shared::<[Vector<f32, Pair>]>::new_slice(comptime!(units as usize));
        write_share(carried, all, share, &mut pairs, units);
    }
}

/// The values of a digit of a key.
const DIGITS: u32 = 256;

/// A number that orders the rows as the policy does, the worst 0: scores that are not finite and,
/// where logarithms are taken, those of 0.
#[cube]
fn key(score: f32, row: u32, noise: &Noise, #[comptime] rule: Key) -> u32 {
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
