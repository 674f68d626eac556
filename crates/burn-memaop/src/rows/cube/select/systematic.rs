//! Systematic sampling by a prefix sum in one cube, whose shared storage holds all scores.

use burn::backend::TensorMetadata;
use burn_cubecl::{CubeBackend, cubecl, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{STAGED, finite_score, or_nan, room, stage};
use crate::rows::{
    cube::{
        LEAST_UNITS,
        random::{self, Order, RandomBits},
        units::{Fixed, Pair, TWO_32, cube_sums, fixed_prefix_sum, fixed_sum, is_finite, pair},
    },
    tensors::{Draw, Drawn},
};

pub(super) fn systematic(scores: &CubeTensor, draw: Draw) -> Drawn<CubeBackend> {
    let drawn = room(scores, draw);
    // SAFETY: all buffers are as long as the kernel reads and writes: `rows`, at most `STAGED`, and
    // `k`.
    unsafe {
        systematic_kernel::launch_unchecked(
            &scores.client,
            CubeCount::new_single(),
            CubeDim::new_1d(LEAST_UNITS),
            scores.clone().into_buffer_arg(),
            drawn.rows.clone().into_buffer_arg(),
            drawn.root.clone().into_buffer_arg(),
            scores.shape()[0] as u32,
            draw.k as u32,
            random::arg(draw.random),
            random::order(draw.random.permutation(scores.shape()[0])),
            LEAST_UNITS,
        );
    }
    drawn
}

/// Systematic sampling with `p_m = min(1, c s_m)` in a random order of the rows. Row m is drawn
/// where the sum of a random start and the p up to `p_m` reaches the next whole number. The p are
/// rounded to multiples of 2^-32, so that their sums are exact: floats would be too coarse.
#[cube(launch_unchecked)]
fn systematic_kernel(
    scores: &[f32],
    drawn: &mut [u32],
    roots: &mut [f32],
    rows: u32,
    k: u32,
    random: RandomBits,
    order: Order,
    #[comptime] units: u32,
) {
    let mut staged = Shared::<[f32]>::new_slice(STAGED);
    let mut pairs = Shared::<[Vector<f32, Pair>]>::new_slice(comptime!(units as usize));
    let mut wholes = Shared::<[u32]>::new_slice(comptime!(units as usize));
    let mut fractions = Shared::<[u32]>::new_slice(comptime!(units as usize));
    let mut flag = Shared::<[u32]>::new_slice(1usize);

    let largest = stage(scores, rows, &mut staged, units);
    let found = inclusion(
        scores, rows, largest, k, 0.0f32, &staged, &mut pairs, &mut flag, true, units,
    );
    let c = found.c;
    let mut sum = Fixed::new(0u32, 0u32);
    let mut row = UNIT_POS;
    while row < rows {
        add_uncertain(&mut sum, c * staged[row as usize]);
        row += comptime!(units);
    }
    let total = fixed_sum(&sum, &mut wholes, &mut fractions, units);
    let correction = correction(&total, k, found.certain);

    // From here on the rows are in the random order, in which each unit takes a run of places.
    let run = rows.div_ceil(units);
    let first = u32::min(UNIT_POS * run, rows);
    let end = u32::min(first + run, rows);
    let mut run_sum = Fixed::new(0u32, 0u32);
    for place in first..end {
        let p = c * staged[order.row(place) as usize];
        add(&mut run_sum, &probability(p, correction));
    }
    let up_to = fixed_prefix_sum(&run_sum, &mut wholes, &mut fractions, units);
    let mut reached = up_to.minus(&run_sum).plus(&start(&random));
    for place in first..end {
        let row = order.row(place);
        let p = probability(c * staged[row as usize], correction);
        take(&mut reached, &p, row, k, drawn, roots);
    }

    // Where fewer rows than K are not zero, the places left get no weight.
    sync_cube();
    if UNIT_POS == comptime!(units - 1) {
        flag[0] = reached.whole;
    }
    sync_cube();
    leave(flag[0], k, drawn, roots, largest, units);
}

/// The c of `p_m = min(1, c s_m)` for scores relative to the largest, and how many p are 1.
#[derive(CubeType)]
pub(super) struct Inclusion {
    pub(super) c: f32,
    pub(super) certain: f32,
}

/// Finds c from below, beginning with `c`. Rows that are certain to be drawn take one of the K
/// each, and the others share what is left. c grows until no row is added to the certain ones.
#[cube]
#[allow(clippy::too_many_arguments)]
pub(super) fn inclusion(
    scores: &[f32],
    rows: u32,
    largest: f32,
    k: u32,
    c: f32,
    staged: &Shared<[f32]>,
    pairs: &mut Shared<[Vector<f32, Pair>]>,
    flag: &mut Shared<[u32]>,
    #[comptime] is_staged: bool,
    #[comptime] units: u32,
) -> Inclusion {
    let mut c = c;
    let mut certain = 0.0f32;
    let mut searching = 1u32;
    while searching == 1 {
        let mut ones = 0.0f32;
        let mut rest = 0.0f32;
        let mut row = UNIT_POS;
        while row < rows {
            let score = relative_at(scores, row, largest, staged, is_staged);
            if c * score >= 1.0 {
                ones += 1.0;
            } else {
                rest += score;
            }
            row += comptime!(units);
        }
        let sums = cube_sums::<Pair>(pair(ones, rest), pairs, units);
        certain = sums.extract(0usize);
        let next = next(c, k, certain, sums.extract(1usize));
        if UNIT_POS == 0 {
            flag[0] = select(next > c, 1u32, 0u32);
        }
        searching = workgroup_uniform_load(&flag[0]);
        c = next;
    }
    Inclusion { c, certain }
}

/// The c with which uncertain rows share what the certain ones leave. It does not fall.
#[cube]
pub(super) fn next(c: f32, k: u32, certain: f32, rest: f32) -> f32 {
    let mut next = c;
    let count = f32::cast_from(k);
    if certain < count && rest > 0.0 {
        // With an infinite c, the p of a row of zeros would be NaN.
        next = f32::max(c, f32::min((count - certain) / rest, 1e38f32));
    }
    next
}

#[cube]
pub(super) fn relative_at(
    scores: &[f32],
    row: u32,
    largest: f32,
    staged: &Shared<[f32]>,
    #[comptime] is_staged: bool,
) -> f32 {
    if comptime!(is_staged) {
        staged[row as usize]
    } else {
        relative(scores[row as usize], largest)
    }
}

#[cube]
pub(super) fn relative(score: f32, largest: f32) -> f32 {
    select(largest > 0.0, finite_score(score) / largest, 0.0f32)
}

#[cube]
pub(super) fn add(sum: &mut Fixed, value: &Fixed) {
    let next = sum.plus(value);
    sum.whole = next.whole;
    sum.fraction = next.fraction;
}

/// Adds a p below 1.
#[cube]
pub(super) fn add_uncertain(sum: &mut Fixed, p: f32) {
    if p < 1.0 {
        add(sum, &Fixed::new(0u32, fraction(p)));
    }
}

/// The p below 1 should sum to what the certain rows leave, but c is rounded. Returns the relative
/// error that remains.
#[cube]
pub(super) fn correction(total: &Fixed, k: u32, certain: f32) -> f32 {
    let left = Fixed::new(k - u32::cast_from(certain), 0u32);
    let mut error = total.minus(&left).float();
    if total.whole < left.whole {
        error = -left.minus(total).float();
    }
    // Where all rows that are not zero are certain, nothing is left to share.
    let mut correction = 0.0f32;
    if total.whole > 0 || total.fraction > 0 {
        let relative = -error / total.float();
        correction = select(f32::abs(relative) < 0.001, relative, 0.0f32);
    }
    correction
}

/// Where the sum of the p begins, below 1.
#[cube]
pub(super) fn start(random: &RandomBits) -> Fixed {
    Fixed::new(0u32, random.word(0u32))
}

/// Adds the p of a row, and draws the row where the sum reaches the next whole number.
#[cube]
pub(super) fn take(
    reached: &mut Fixed,
    p: &Fixed,
    row: u32,
    k: u32,
    drawn: &mut [u32],
    roots: &mut [f32],
) {
    let next = reached.plus(p);
    if next.whole > reached.whole && reached.whole < k {
        let at = reached.whole as usize;
        drawn[at] = row;
        roots[at] = 1.0 / p.float().sqrt();
    }
    reached.whole = next.whole;
    reached.fraction = next.fraction;
}

/// Fills the places from `first` on with row 0, without weight. If a score is not finite, `largest`
/// is not either: then these are all places, and their weight is NaN.
#[cube]
pub(super) fn leave(
    first: u32,
    k: u32,
    drawn: &mut [u32],
    roots: &mut [f32],
    largest: f32,
    #[comptime] units: u32,
) {
    let mut place = first + UNIT_POS;
    while place < k {
        drawn[place as usize] = 0u32;
        roots[place as usize] = or_nan(0.0f32, !is_finite(largest));
        place += comptime!(units);
    }
}

/// `p 2^32` for a p below 1.
#[cube]
fn fraction(p: f32) -> u32 {
    u32::cast_from(p * TWO_32)
}

/// A p in one word. That of 1 is the largest word, and that of any other p is below it.
#[cube]
pub(super) fn encoded(p: &Fixed) -> u32 {
    select(
        p.whole == 1,
        0xFFFF_FFFFu32,
        u32::min(p.fraction, 0xFFFF_FFFEu32),
    )
}

#[cube]
pub(super) fn decoded(p: u32) -> Fixed {
    let one = p == 0xFFFF_FFFFu32;
    Fixed::new(select(one, 1u32, 0u32), select(one, 0u32, p))
}

/// A p in fixed point: 1 where it is 1 or more, else the p times `1 + correction`.
#[cube]
pub(super) fn probability(p: f32, correction: f32) -> Fixed {
    let mut whole = 1u32;
    let mut part = 0u32;
    if p < 1.0 {
        whole = 0u32;
        part = fraction(p);
        let change = fraction(p * f32::abs(correction));
        if correction < 0.0 {
            part -= change;
        } else {
            // The p stays below 1.
            part += u32::min(change, !part);
        }
    }
    Fixed::new(whole, part)
}
