//! Systematic sampling, by a prefix sum.

use burn::backend::TensorMetadata;
use burn_cubecl::{cubecl, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{Chosen, Draw, finite_score, output, units, write_share};
use crate::op::cube::{
    noise::{self, Noise, Order},
    units::{Fixed, TWO_32, cube_max, cube_sum, fixed_prefix_sum},
};

pub(super) fn systematic(scores: &CubeTensor, draw: Draw, input: bool) -> Chosen {
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
            noise::order(draw.noise.permutation(scores.shape()[0])),
            draw.measure,
            input,
            units,
        );
    }
    chosen
}

/// Systematic sampling with `p_m = min(1, c s_m)` in a random order of the rows: row m is chosen where the
/// sum of a random start and the p up to `p_m` reaches the next whole number. The p are rounded to multiples of 2^-32,
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
    order: Order,
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

    let found = inclusion(
        scores,
        first,
        end,
        largest,
        k,
        &mut shared,
        &mut flag,
        units,
    );
    let c = found.c;
    let certain = found.certain;

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

    // From here on in the random order: `first..end` are places in it.
    let mut run_sum = Fixed::new(0u32, 0u32);
    for place in first..end {
        let row = order.row(place);
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
    for place in first..end {
        let row = order.row(place);
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

/// The c of `p_m = min(1, c s_m)`, for scores relative to the largest, and how many p are 1.
#[derive(CubeType)]
pub(super) struct Inclusion {
    pub(super) c: f32,
    pub(super) certain: f32,
}

/// From below: rows that are certain to be chosen take one of the K each, the others share what is left. It grows
/// until no row is added to the certain ones.
#[cube]
#[allow(clippy::too_many_arguments)]
pub(super) fn inclusion(
    scores: &[f32],
    first: u32,
    end: u32,
    largest: f32,
    k: u32,
    shared: &mut Shared<[f32]>,
    flag: &mut Shared<[u32]>,
    #[comptime] units: u32,
) -> Inclusion {
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
        certain = cube_sum(ones, shared, units);
        let rest = cube_sum(rest, shared, units);
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
    Inclusion { c, certain }
}

#[cube]
pub(super) fn relative(score: f32, largest: f32) -> f32 {
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
