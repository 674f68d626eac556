//! Chooses the rows in one launch of one cube, without a wait for the host: the K largest of the
//! keys by radix selection, or systematic sampling by a prefix sum.
//!
//! Each unit looks after a run of consecutive rows, so that no unit reads what another has written
//! to global memory, and the rows come out in ascending order.

use burn::{
    backend::{
        TensorMetadata,
        ops::{FloatTensorOps, IntTensorOps},
    },
    tensor::{DType, TensorData},
};
use burn_cubecl::{CubeBackend, cubecl, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{
    LEAST_UNITS, empty,
    noise::{self, Noise, ln},
    units::{Fixed, TWO_32, cube_max, cube_sum, fixed_prefix_sum, is_finite, prefix_sum},
};
use crate::{
    config::Policy,
    gradient,
    noise::StepNoise,
    ops::{AopStep, InputStep, Share},
    selection,
};

/// The chosen rows.
pub(super) struct Chosen {
    /// Shape `[chosen]`.
    pub(super) rows: CubeTensor,
    /// The root of the weight of each, in single precision.
    pub(super) roots: CubeTensor,
    /// In single precision.
    pub(super) share: Share<CubeBackend>,
}

/// What makes the key of a row; the rows with the largest keys are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Key {
    Score,
    Noise,
    LogScorePlusNoise,
}

/// How many rows, from which noise.
#[derive(Clone, Copy)]
struct Draw {
    k: usize,
    noise: StepNoise,
    /// Whether to measure the share.
    measure: bool,
}

pub(super) fn choose(scores: &CubeTensor, step: &AopStep) -> Chosen {
    let rows = scores.shape()[0];
    let random_weight = rows as f64 / step.k as f64;
    let draw = Draw {
        k: step.k,
        noise: StepNoise {
            seed: step.seed,
            step: step.step,
        },
        measure: step.measure,
    };
    match step.policy {
        Policy::TopK => largest(scores, draw, Key::Score, 1.0),
        Policy::RandK => largest(scores, draw, Key::Noise, 1.0),
        Policy::ScaledRandK => largest(scores, draw, Key::Noise, random_weight),
        Policy::WeightedK => largest(scores, draw, Key::LogScorePlusNoise, 1.0),
        Policy::Systematic => systematic(scores, draw, false),
        // The number of rows of the first depends on the draw, and with it the shape of what
        // follows; the others draw with replacement.
        Policy::Bernoulli | Policy::ColumnRow | Policy::WinnerTakeAll => on_host(scores, step),
    }
}

/// Rows of the gradient of the input, by the norms of the gradient of the output.
pub(super) fn choose_input(sizes: &CubeTensor, step: &InputStep) -> Chosen {
    let draw = Draw {
        k: step.k,
        noise: StepNoise {
            seed: step.seed,
            step: step.step,
        },
        measure: false,
    };
    match step.sampled {
        true => systematic(sizes, draw, true),
        false => largest(sizes, draw, Key::Score, 1.0),
    }
}

/// Reads the scores, and so waits for the device.
fn on_host(scores: &CubeTensor, step: &AopStep) -> Chosen {
    let rows = scores.shape()[0];
    let read = || gradient::read::<CubeBackend>(scores.clone());
    let selection = selection::select(rows, step, read);
    let count = selection.rows.len();
    let chosen: Vec<_> = selection.rows.iter().map(|&row| row as u32).collect();
    let roots: Vec<_> = match selection.weights {
        None => vec![1.0; count],
        Some(weights) => weights.iter().map(|weight| weight.sqrt() as f32).collect(),
    };
    let device = scores.device();
    let chosen = CubeBackend::int_from_data(TensorData::new(chosen, [count]), &device);
    let share = match step.measure {
        true => Share::Measured(gradient::share::<CubeBackend>(scores, &chosen)),
        false => Share::Skipped,
    };
    Chosen {
        rows: chosen,
        roots: CubeBackend::float_from_data(TensorData::new(roots, [count]), &device),
        share,
    }
}

/// The units of the one cube: more of them where there is more to do.
fn units(scores: &CubeTensor) -> u32 {
    let most = scores.client.properties().hardware.max_units_per_cube;
    match scores.shape()[0] > 4096 && most >= 1024 {
        true => 1024,
        false => LEAST_UNITS,
    }
}

fn output(scores: &CubeTensor, draw: Draw) -> (Chosen, CubeTensor) {
    let share = empty(scores, [1], DType::F32);
    let chosen = Chosen {
        rows: empty(scores, [draw.k], DType::U32),
        roots: empty(scores, [draw.k], DType::F32),
        share: match draw.measure {
            true => Share::Measured(share.clone()),
            false => Share::Skipped,
        },
    };
    (chosen, share)
}

fn largest(scores: &CubeTensor, draw: Draw, key: Key, weight: f64) -> Chosen {
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
        write_share(carried, all, share, units);
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

#[cube]
fn finite_score(score: f32) -> f32 {
    select(is_finite(score), score, 0.0f32)
}

#[cube]
fn write_share(carried: f32, all: f32, share: &mut [f32], #[comptime] units: u32) {
    let mut shared = Shared::<[f32]>::new_slice(comptime!(units as usize));
    let carried = cube_sum(carried, &mut shared, units);
    let all = cube_sum(all, &mut shared, units);
    if UNIT_POS == 0 {
        share[0] = carried / all;
    }
}

fn systematic(scores: &CubeTensor, draw: Draw, input: bool) -> Chosen {
    let units = units(scores);
    let (chosen, share) = output(scores, draw);
    // SAFETY: all buffers are as long as the kernel reads and writes: `rows`, `k` and 1.
    unsafe {
        systematic_kernel::launch_unchecked(
            &scores.client,
            CubeCount::new_single(),
            CubeDim::new_1d(units),
            scores.clone().into_buffer_arg(),
            chosen.rows.clone().into_buffer_arg(),
            chosen.roots.clone().into_buffer_arg(),
            share.into_buffer_arg(),
            scores.shape()[0] as u32,
            draw.k as u32,
            noise::arg(draw.noise),
            draw.measure,
            input,
            units,
        );
    }
    chosen
}

/// Systematic sampling with `p_m = min(1, c s_m)`: row m is chosen where the sum of a random start
/// and the p up to `p_m` reaches the next whole number. The p are rounded to multiples of 2^-32,
/// so that the sums are exact: they would be too coarse as floats.
#[cube(launch_unchecked)]
fn systematic_kernel(
    scores: &[f32],
    chosen: &mut [u32],
    roots: &mut [f32],
    share: &mut [f32],
    rows: u32,
    k: u32,
    noise: Noise,
    #[comptime] measure: bool,
    #[comptime] input: bool,
    #[comptime] units: u32,
) {
    let run = rows.div_ceil(units);
    let first = u32::min(UNIT_POS * run, rows);
    let end = u32::min(first + run, rows);
    let mut shared = Shared::<[f32]>::new_slice(comptime!(units as usize));
    let mut wholes = Shared::<[u32]>::new_slice(comptime!(units as usize));
    let mut fractions = Shared::<[u32]>::new_slice(comptime!(units as usize));
    let mut flag = Shared::<[u32]>::new_slice(1usize);

    // Scores relative to the largest have sums that neither overflow nor vanish.
    let mut largest = 0.0f32;
    for row in first..end {
        largest = f32::max(largest, finite_score(scores[row as usize]));
    }
    let largest = cube_max(largest, &mut shared, units);

    // c, from below: rows that are certain to be chosen take one of the K each, the others share
    // what is left. It grows until no row is added to the certain ones.
    let count = f32::cast_from(k);
    let mut c = 0.0f32;
    let mut certain = 0.0f32;
    let mut searching = 1u32;
    while searching == 1 {
        let mut ones = 0.0f32;
        let mut rest = 0.0f32;
        for row in first..end {
            let score = relative(scores[row as usize], largest);
            if c * score >= 1.0 {
                ones += 1.0;
            } else {
                rest += score;
            }
        }
        certain = cube_sum(ones, &mut shared, units);
        let rest = cube_sum(rest, &mut shared, units);
        let mut next = c;
        if certain < count && rest > 0.0 {
            next = (count - certain) / rest;
        }
        if UNIT_POS == 0 {
            flag[0] = select(next > c, 1u32, 0u32);
        }
        searching = workgroup_uniform_load(&flag[0]);
        c = f32::max(c, next);
    }

    // The p below 1 sum to what the certain rows leave, but for the rounding of c: `correction` is
    // the relative error that remains.
    let mut sum = Fixed::new(0u32, 0u32);
    for row in first..end {
        let p = c * relative(scores[row as usize], largest);
        if p < 1.0 {
            let next = sum.plus(&Fixed::new(0u32, fraction(p)));
            sum.whole = next.whole;
            sum.fraction = next.fraction;
        }
    }
    let sum = fixed_prefix_sum(&sum, &mut wholes, &mut fractions, units);
    sync_cube();
    if UNIT_POS == comptime!(units - 1) {
        wholes[0] = sum.whole;
        fractions[0] = sum.fraction;
    }
    sync_cube();
    let total = Fixed::new(wholes[0], fractions[0]);
    let left = Fixed::new(k - u32::cast_from(certain), 0u32);
    let mut error = total.minus(&left).float();
    if total.whole < left.whole {
        error = -left.minus(&total).float();
    }
    let correction = -error / total.float();
    // Where all rows that are not zero are certain, nothing is to be shared: 0 / 0 above.
    let correction = select(f32::abs(correction) < 0.001, correction, 0.0f32);

    let mut run_sum = Fixed::new(0u32, 0u32);
    for row in first..end {
        let p = c * relative(scores[row as usize], largest);
        let next = run_sum.plus(&probability(p, correction));
        run_sum.whole = next.whole;
        run_sum.fraction = next.fraction;
    }
    let up_to = fixed_prefix_sum(&run_sum, &mut wholes, &mut fractions, units);
    let start = if comptime!(input) {
        noise.step_word()
    } else {
        noise.word(0u32)
    };
    let start = Fixed::new(0u32, start);
    let mut reached = up_to.minus(&run_sum).plus(&start);
    let mut carried = 0.0f32;
    for row in first..end {
        let score = relative(scores[row as usize], largest);
        let p = probability(c * score, correction);
        let next = reached.plus(&p);
        if next.whole > reached.whole && reached.whole < k {
            let at = reached.whole as usize;
            chosen[at] = row;
            roots[at] = 1.0 / p.float().sqrt();
            if comptime!(measure) {
                carried += score;
            }
        }
        reached.whole = next.whole;
        reached.fraction = next.fraction;
    }

    // Where fewer rows than K are not zero, the places left get no weight.
    sync_cube();
    if UNIT_POS == comptime!(units - 1) {
        flag[0] = reached.whole;
    }
    sync_cube();
    let mut place = flag[0] + UNIT_POS;
    while place < k {
        chosen[place as usize] = 0u32;
        roots[place as usize] = 0.0f32;
        place += comptime!(units);
    }
    if comptime!(measure) {
        let mut all = 0.0f32;
        for row in first..end {
            all += relative(scores[row as usize], largest);
        }
        write_share(carried, all, share, units);
    }
}

#[cube]
fn relative(score: f32, largest: f32) -> f32 {
    select(largest > 0.0, finite_score(score) / largest, 0.0f32)
}

/// `p 2^32` for a p below 1.
#[cube]
fn fraction(p: f32) -> u32 {
    u32::cast_from(p * TWO_32)
}

/// A p in fixed point: 1 where it is 1 or more, else times `1 + correction`.
#[cube]
fn probability(p: f32, correction: f32) -> Fixed {
    let mut whole = 1u32;
    let mut part = 0u32;
    if p < 1.0 {
        whole = 0u32;
        part = fraction(p);
        let change = fraction(p * f32::abs(correction));
        if correction < 0.0 {
            part -= change;
        } else {
            // It stays below 1.
            part += u32::min(change, !part);
        }
    }
    Fixed::new(whole, part)
}
