//! Systematic sampling: the same rows as in one cube, but where sums in another order round c to a neighbour.

use burn::tensor::DType;
use burn_cubecl::{cubecl, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{Chunks, of_chunk, of_this_cube, share};
use crate::op::cube::{
    LEAST_UNITS, empty,
    noise::{self, Noise, Order},
    select::{
        Chosen, Draw, finite_score, output,
        systematic::{
            add, add_uncertain, correction, decoded, encoded, inclusion, leave, next, probability,
            relative, start, take,
        },
    },
    units::{Fixed, Pair, cube_max, cube_sums, fixed_prefix_sum, fixed_sum, pair},
};

/// The launches that search for c, of which the first begins with the sum of all scores. Where these do not find it, as they do for
/// all but the most uneven scores, each cube goes on by itself.
const SEARCHES: u32 = 6;
/// What the launches hand on.
struct Buffers {
    /// Of each chunk: the largest score, and the sum of the scores relative to it.
    largest: CubeTensor,
    /// c before each search.
    c: CubeTensor,
    /// Of each search and chunk: how many p are 1, and the sum of the other scores.
    sums: CubeTensor,
    /// Of each search and chunk: the sum of the p below 1.
    uncertain: CubeTensor,
    /// The p of the row at each place, and their sum of each chunk of places.
    ps: CubeTensor,
    places: CubeTensor,
    /// Of each chunk of places: the sums of the chosen scores and of all.
    shares: CubeTensor,
}

pub(in crate::op::cube::select) fn systematic(
    scores: &CubeTensor,
    draw: Draw,
    input: bool,
) -> Chosen {
    let chunks = Chunks::of(scores);
    let Chunks { rows, chunk, cubes } = chunks;
    let searched = SEARCHES as usize * cubes;
    let buffers = Buffers {
        largest: empty(scores, [2 * cubes], DType::F32),
        c: empty(scores, [SEARCHES as usize], DType::F32),
        sums: empty(scores, [2 * searched], DType::F32),
        uncertain: empty(scores, [2 * searched], DType::U32),
        ps: empty(scores, [rows], DType::U32),
        places: empty(scores, [2 * cubes], DType::U32),
        shares: empty(scores, [2 * cubes], DType::F32),
    };
    let (chosen, of_all) = output(scores, draw);
    let (count, dim) = chunks.launch();
    let order = || noise::order(draw.noise.permutation(rows));
    let (rows, chunk, cubes) = (rows as u32, chunk as u32, cubes as u32);
    // SAFETY: every index is below a number of rows, of chunks, of chunks of all searches, or K, and the buffers are as long.
    unsafe {
        largest_kernel::launch_unchecked(
            &scores.client,
            count.clone(),
            dim,
            scores.clone().into_buffer_arg(),
            buffers.largest.clone().into_buffer_arg(),
            rows,
            chunk,
            LEAST_UNITS,
        );
        for search in 0..SEARCHES {
            search_kernel::launch_unchecked(
                &scores.client,
                count.clone(),
                dim,
                scores.clone().into_buffer_arg(),
                buffers.largest.clone().into_buffer_arg(),
                buffers.c.clone().into_buffer_arg(),
                buffers.sums.clone().into_buffer_arg(),
                buffers.uncertain.clone().into_buffer_arg(),
                rows,
                chunk,
                cubes,
                draw.k as u32,
                search,
                LEAST_UNITS,
            );
        }
        places_kernel::launch_unchecked(
            &scores.client,
            count.clone(),
            dim,
            scores.clone().into_buffer_arg(),
            buffers.largest.into_buffer_arg(),
            buffers.c.into_buffer_arg(),
            buffers.sums.into_buffer_arg(),
            buffers.uncertain.into_buffer_arg(),
            buffers.ps.clone().into_buffer_arg(),
            buffers.places.clone().into_buffer_arg(),
            rows,
            chunk,
            cubes,
            draw.k as u32,
            order(),
            LEAST_UNITS,
        );
        draw_kernel::launch_unchecked(
            &scores.client,
            count,
            dim,
            scores.clone().into_buffer_arg(),
            buffers.ps.into_buffer_arg(),
            buffers.places.into_buffer_arg(),
            chosen.rows.clone().into_buffer_arg(),
            chosen.roots.clone().into_buffer_arg(),
            buffers.shares.clone().into_buffer_arg(),
            rows,
            chunk,
            draw.k as u32,
            noise::arg(draw.noise),
            order(),
            draw.measure,
            input,
            LEAST_UNITS,
        );
    }
    if draw.measure {
        share(scores, buffers.shares, of_all, chunks);
    }
    chosen
}

#[cube(launch_unchecked)]
fn largest_kernel(
    scores: &[f32],
    largest: &mut [f32],
    rows: u32,
    chunk: u32,
    #[comptime] units: u32,
) {
    let mut shared = Shared::<[f32]>::new_slice(comptime!(units as usize));
    let mut pairs = Shared::<[Vector<f32, Pair>]>::new_slice(comptime!(units as usize));
    let chunk = of_this_cube(rows, chunk);
    let mut most = 0.0f32;
    let mut row = chunk.first + UNIT_POS;
    while row < chunk.end {
        most = f32::max(most, finite_score(scores[row as usize]));
        row += comptime!(units);
    }
    let most = cube_max(most, &mut shared, units);
    let mut sum = 0.0f32;
    let mut row = chunk.first + UNIT_POS;
    while row < chunk.end {
        sum += relative(scores[row as usize], most);
        row += comptime!(units);
    }
    let sum = cube_sums::<Pair>(pair(sum, 0.0f32), &mut pairs, units).extract(0usize);
    if UNIT_POS == 0 {
        let at = (2 * CUBE_POS_X) as usize;
        largest[at] = most;
        largest[at + 1] = sum;
    }
}

/// The largest score of all chunks.
#[cube]
fn largest_of(largest: &[f32], cubes: u32, #[comptime] units: u32) -> f32 {
    let mut shared = Shared::<[f32]>::new_slice(comptime!(units as usize));
    let most = of_chunk(largest, UNIT_POS, cubes).extract(0usize);
    cube_max(most, &mut shared, units)
}

/// The sum of all scores, relative to the largest.
#[cube]
fn sum_of_all(
    largest: &[f32],
    most: f32,
    cubes: u32,
    pairs: &mut Shared<[Vector<f32, Pair>]>,
    #[comptime] units: u32,
) -> f32 {
    let chunk = of_chunk(largest, UNIT_POS, cubes);
    let sum = chunk.extract(1usize) * relative(chunk.extract(0usize), most);
    cube_sums::<Pair>(pair(sum, 0.0f32), pairs, units).extract(0usize)
}

/// The sums of all chunks in a search.
#[cube]
fn sums_of(
    sums: &[f32],
    search: u32,
    cubes: u32,
    pairs: &mut Shared<[Vector<f32, Pair>]>,
    #[comptime] units: u32,
) -> Vector<f32, Pair> {
    let end = (search + 1) * cubes;
    cube_sums::<Pair>(of_chunk(sums, search * cubes + UNIT_POS, end), pairs, units)
}

/// One step towards c, of this chunk.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn search_kernel(
    scores: &[f32],
    largests: &[f32],
    cs: &mut [f32],
    sums: &mut [f32],
    uncertain: &mut [u32],
    rows: u32,
    chunk: u32,
    cubes: u32,
    k: u32,
    #[comptime] search: u32,
    #[comptime] units: u32,
) {
    let mut pairs = Shared::<[Vector<f32, Pair>]>::new_slice(comptime!(units as usize));
    let mut wholes = Shared::<[u32]>::new_slice(comptime!(units as usize));
    let mut fractions = Shared::<[u32]>::new_slice(comptime!(units as usize));
    let chunk = of_this_cube(rows, chunk);
    let largest = largest_of(largests, cubes, units);
    let mut at = 0.0f32;
    let mut certain = 0.0f32;
    let mut left = 0.0f32;
    if comptime!(search == 0) {
        left += sum_of_all(largests, largest, cubes, &mut pairs, units);
    } else {
        let before = comptime!(search - 1);
        let found = sums_of(&*sums, before, cubes, &mut pairs, units);
        at += cs[comptime!(before as usize)];
        certain += found.extract(0usize);
        left += found.extract(1usize);
    }
    let c = next(at, k, certain, left);

    let mut ones = 0.0f32;
    let mut rest = 0.0f32;
    let mut sum = Fixed::new(0u32, 0u32);
    let mut row = chunk.first + UNIT_POS;
    while row < chunk.end {
        let score = relative(scores[row as usize], largest);
        let p = c * score;
        if p >= 1.0 {
            ones += 1.0;
        } else {
            rest += score;
        }
        add_uncertain(&mut sum, p);
        row += comptime!(units);
    }
    let found = cube_sums::<Pair>(pair(ones, rest), &mut pairs, units);
    let sum = fixed_sum(&sum, &mut wholes, &mut fractions, units);
    if UNIT_POS == 0 {
        let at = (2 * (search * cubes + CUBE_POS_X)) as usize;
        sums[at] = found.extract(0usize);
        sums[at + 1] = found.extract(1usize);
        uncertain[at] = sum.whole;
        uncertain[at + 1] = sum.fraction;
        if CUBE_POS_X == 0 {
            cs[comptime!(search as usize)] = c;
        }
    }
}

/// c, and the sum of the p of this chunk of places in the random order.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn places_kernel(
    scores: &[f32],
    largest: &[f32],
    cs: &[f32],
    sums: &[f32],
    uncertain: &[u32],
    ps: &mut [u32],
    places: &mut [u32],
    rows: u32,
    chunk: u32,
    cubes: u32,
    k: u32,
    order: Order,
    #[comptime] units: u32,
) {
    let mut pairs = Shared::<[Vector<f32, Pair>]>::new_slice(comptime!(units as usize));
    let mut wholes = Shared::<[u32]>::new_slice(comptime!(units as usize));
    let mut fractions = Shared::<[u32]>::new_slice(comptime!(units as usize));
    let mut flag = Shared::<[u32]>::new_slice(1usize);
    let chunk = of_this_cube(rows, chunk);
    let largest = largest_of(largest, cubes, units);
    let last = comptime!(SEARCHES - 1);
    let last_sums = sums_of(sums, last, cubes, &mut pairs, units);
    let mut certain = last_sums.extract(0usize);
    let before = cs[comptime!(last as usize)];
    let mut c = next(before, k, certain, last_sums.extract(1usize));
    let mut sum = Fixed::new(0u32, 0u32);
    if UNIT_POS < cubes {
        let at = (2 * (last * cubes + UNIT_POS)) as usize;
        sum.whole = uncertain[at];
        sum.fraction = uncertain[at + 1];
    }

    if UNIT_POS == 0 {
        flag[0] = select(c > before, 1u32, 0u32);
    }
    if workgroup_uniform_load(&flag[0]) == 1 {
        let none = Shared::<[f32]>::new_slice(1usize);
        let searched = inclusion(
            scores, rows, largest, k, c, &none, &mut pairs, &mut flag, false, units,
        );
        c = searched.c;
        certain = searched.certain;
        sum.whole = 0u32;
        sum.fraction = 0u32;
        let mut row = UNIT_POS;
        while row < rows {
            add_uncertain(&mut sum, c * relative(scores[row as usize], largest));
            row += comptime!(units);
        }
    }
    let total = fixed_sum(&sum, &mut wholes, &mut fractions, units);
    let correction = correction(&total, k, certain);

    let mut sum = Fixed::new(0u32, 0u32);
    let mut place = chunk.first + UNIT_POS;
    while place < chunk.end {
        let p = c * relative(scores[order.row(place) as usize], largest);
        let p = encoded(&probability(p, correction));
        ps[place as usize] = p;
        add(&mut sum, &decoded(p));
        place += comptime!(units);
    }
    let sum = fixed_sum(&sum, &mut wholes, &mut fractions, units);
    if UNIT_POS == 0 {
        let at = (2 * CUBE_POS_X) as usize;
        places[at] = sum.whole;
        places[at + 1] = sum.fraction;
    }
}

/// The chosen rows of this chunk of places. The p are read, not computed again: were their sum another by a bit, two cubes could
/// take one place, or none.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn draw_kernel(
    scores: &[f32],
    ps: &[u32],
    places: &[u32],
    chosen: &mut [u32],
    roots: &mut [f32],
    shares: &mut [f32],
    rows: u32,
    chunk: u32,
    k: u32,
    noise: Noise,
    order: Order,
    #[comptime] measure: bool,
    #[comptime] input: bool,
    #[comptime] units: u32,
) {
    let mut wholes = Shared::<[u32]>::new_slice(comptime!(units as usize));
    let mut fractions = Shared::<[u32]>::new_slice(comptime!(units as usize));
    let mut flag = Shared::<[u32]>::new_slice(1usize);
    let chunk = of_this_cube(rows, chunk);
    let mut before = Fixed::new(0u32, 0u32);
    if UNIT_POS < CUBE_POS_X {
        let at = (2 * UNIT_POS) as usize;
        before.whole = places[at];
        before.fraction = places[at + 1];
    }
    let before = fixed_sum(&before, &mut wholes, &mut fractions, units);

    // Each unit looks after a run of places.
    let run = (chunk.end - chunk.first).div_ceil(units);
    let first = u32::min(chunk.first + UNIT_POS * run, chunk.end);
    let end = u32::min(first + run, chunk.end);
    let mut run_sum = Fixed::new(0u32, 0u32);
    for place in first..end {
        add(&mut run_sum, &decoded(ps[place as usize]));
    }
    let up_to = fixed_prefix_sum(&run_sum, &mut wholes, &mut fractions, units);
    let within = up_to.minus(&run_sum).plus(&start(&noise, input));
    let mut reached = before.plus(&within);
    let mut carried = 0.0f32;
    let mut all = 0.0f32;
    for place in first..end {
        let row = order.row(place);
        let p = decoded(ps[place as usize]);
        let taken = take(&mut reached, &p, row, k, chosen, roots);
        if comptime!(measure) {
            let score = finite_score(scores[row as usize]);
            carried += select(taken, score, 0.0f32);
            all += score;
        }
    }

    // Where fewer rows than K are not zero, the places left get no weight.
    sync_cube();
    if UNIT_POS == comptime!(units - 1) {
        flag[0] = reached.whole;
    }
    sync_cube();
    if chunk.end == rows {
        leave(flag[0], k, chosen, roots, units);
    }
    if comptime!(measure) {
        let mut pairs = Shared::<[Vector<f32, Pair>]>::new_slice(comptime!(units as usize));
        let sums = cube_sums::<Pair>(pair(carried, all), &mut pairs, units);
        if UNIT_POS == 0 {
            let at = (2 * CUBE_POS_X) as usize;
            shares[at] = sums.extract(0usize);
            shares[at + 1] = sums.extract(1usize);
        }
    }
}
