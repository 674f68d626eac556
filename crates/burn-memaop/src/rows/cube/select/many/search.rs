//! The c of `p_m = min(1, c s_m)` among more rows than one cube can hold, for several K at once.

use burn::tensor::DType;
use burn_cubecl::{cubecl, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{Chunks, of_chunk, of_this_cube};
use crate::rows::cube::{
    LEAST_UNITS, empty,
    select::{
        ks::{self, Ks},
        or_infinity,
        systematic::{add_uncertain, inclusion, next, relative},
    },
    units::{Fixed, Pair, cube_max, cube_sums, fixed_sum, pair},
};

/// The number of launches that search for c. The first begins with the sum of all scores. They find
/// c for all but the most uneven scores. Where they do not, each cube searches on by itself.
const SEARCHES: u32 = 6;

/// What the launches hand on.
pub(super) struct Search {
    /// For each chunk: the largest score, and the sum of the scores relative to it.
    pub(super) largest: CubeTensor,
    /// For each K and search: the c that the search begins with.
    pub(super) c: CubeTensor,
    /// For each K, search and chunk: the number of p that are 1, and the sum of the other scores.
    pub(super) sums: CubeTensor,
    /// For each K and chunk: the sum of the p below 1 in the last search.
    pub(super) uncertain: CubeTensor,
}

/// Finds the largest scores in one launch, and each c in [`SEARCHES`] more.
pub(super) fn search(scores: &CubeTensor, ks: &[usize], chunks: Chunks) -> Search {
    let Chunks { rows, chunk, cubes } = chunks;
    let searches = ks.len() * SEARCHES as usize;
    let found = Search {
        largest: empty(scores, [2 * cubes], DType::F32),
        c: empty(scores, [searches], DType::F32),
        sums: empty(scores, [2 * searches * cubes], DType::F32),
        uncertain: empty(scores, [2 * ks.len() * cubes], DType::U32),
    };
    let (count, dim) = chunks.launch();
    let of_all = CubeCount::new_2d(cubes as u32, ks.len() as u32);
    let (rows, chunk, cubes) = (rows as u32, chunk as u32, cubes as u32);
    // SAFETY: every index is below a number of rows, of chunks, or of chunks of all searches of all
    // K, and the buffers are as long.
    unsafe {
        chunk_largest_kernel::launch_unchecked(
            &scores.client,
            count,
            dim,
            scores.clone().into_buffer_arg(),
            found.largest.clone().into_buffer_arg(),
            rows,
            chunk,
            LEAST_UNITS,
        );
        for search in 0..SEARCHES {
            search_kernel::launch_unchecked(
                &scores.client,
                of_all.clone(),
                dim,
                scores.clone().into_buffer_arg(),
                found.largest.clone().into_buffer_arg(),
                found.c.clone().into_buffer_arg(),
                found.sums.clone().into_buffer_arg(),
                found.uncertain.clone().into_buffer_arg(),
                rows,
                chunk,
                cubes,
                ks::arg(ks),
                search,
                LEAST_UNITS,
            );
        }
    }
    found
}

#[cube(launch_unchecked)]
fn chunk_largest_kernel(
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
        most = f32::max(most, or_infinity(scores[row as usize]));
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
pub(super) fn largest_of(largest: &[f32], cubes: u32, #[comptime] units: u32) -> f32 {
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

/// The sums of all chunks in a search for the K at `index`.
#[cube]
fn sums_of(
    sums: &[f32],
    index: u32,
    #[comptime] search: u32,
    cubes: u32,
    pairs: &mut Shared<[Vector<f32, Pair>]>,
    #[comptime] units: u32,
) -> Vector<f32, Pair> {
    let first = (index * SEARCHES + search) * cubes;
    let chunk = of_chunk(sums, first + UNIT_POS, first + cubes);
    cube_sums::<Pair>(chunk, pairs, units)
}

/// One step towards the c of one K, for this chunk.
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
    ks: Ks,
    #[comptime] search: u32,
    #[comptime] units: u32,
) {
    let mut pairs = Shared::<[Vector<f32, Pair>]>::new_slice(comptime!(units as usize));
    let chunk = of_this_cube(rows, chunk);
    let largest = largest_of(largests, cubes, units);
    let mut at = 0.0f32;
    let mut certain = 0.0f32;
    let mut left = 0.0f32;
    if comptime!(search == 0) {
        left += sum_of_all(largests, largest, cubes, &mut pairs, units);
    } else {
        let before = comptime!(search - 1);
        let found = sums_of(&*sums, CUBE_POS_Y, before, cubes, &mut pairs, units);
        at += cs[(CUBE_POS_Y * SEARCHES + before) as usize];
        certain += found.extract(0usize);
        left += found.extract(1usize);
    }
    let c = next(at, ks.at(CUBE_POS_Y), certain, left);

    let mut ones = 0.0f32;
    let mut rest = 0.0f32;
    let mut row = chunk.first + UNIT_POS;
    while row < chunk.end {
        let score = relative(scores[row as usize], largest);
        if c * score >= 1.0 {
            ones += 1.0;
        } else {
            rest += score;
        }
        row += comptime!(units);
    }
    let found = cube_sums::<Pair>(pair(ones, rest), &mut pairs, units);
    let this = CUBE_POS_Y * SEARCHES + search;
    if UNIT_POS == 0 {
        let at = (2 * (this * cubes + CUBE_POS_X)) as usize;
        sums[at] = found.extract(0usize);
        sums[at + 1] = found.extract(1usize);
        if CUBE_POS_X == 0 {
            cs[this as usize] = c;
        }
    }
    if comptime!(search == SEARCHES - 1) {
        let mut wholes = Shared::<[u32]>::new_slice(comptime!(units as usize));
        let mut fractions = Shared::<[u32]>::new_slice(comptime!(units as usize));
        let mut sum = Fixed::new(0u32, 0u32);
        let mut row = chunk.first + UNIT_POS;
        while row < chunk.end {
            add_uncertain(&mut sum, c * relative(scores[row as usize], largest));
            row += comptime!(units);
        }
        let sum = fixed_sum(&sum, &mut wholes, &mut fractions, units);
        if UNIT_POS == 0 {
            let at = (2 * (CUBE_POS_Y * cubes + CUBE_POS_X)) as usize;
            uncertain[at] = sum.whole;
            uncertain[at + 1] = sum.fraction;
        }
    }
}

/// The result of a search.
#[derive(CubeType)]
pub(super) struct Found {
    pub(super) c: f32,
    /// The number of p that are 1.
    pub(super) certain: f32,
    /// Whether the launches did not find c, so that their last sums belong to another c.
    pub(super) searched_on: bool,
}

/// The c of the K at `index`.
#[cube]
#[allow(clippy::too_many_arguments)]
pub(super) fn found(
    scores: &[f32],
    largest: f32,
    cs: &[f32],
    sums: &[f32],
    rows: u32,
    cubes: u32,
    index: u32,
    k: u32,
    pairs: &mut Shared<[Vector<f32, Pair>]>,
    #[comptime] units: u32,
) -> Found {
    let mut flag = Shared::<[u32]>::new_slice(1usize);
    let last = comptime!(SEARCHES - 1);
    let last_sums = sums_of(sums, index, last, cubes, pairs, units);
    let mut certain = last_sums.extract(0usize);
    let before = cs[(index * SEARCHES + last) as usize];
    let mut c = next(before, k, certain, last_sums.extract(1usize));
    if UNIT_POS == 0 {
        flag[0] = select(c > before, 1u32, 0u32);
    }
    let searched_on = workgroup_uniform_load(&flag[0]) == 1;
    if searched_on {
        let none = Shared::<[f32]>::new_slice(1usize);
        let searched = inclusion(
            scores, rows, largest, k, c, &none, pairs, &mut flag, false, units,
        );
        c = searched.c;
        certain = searched.certain;
    }
    Found {
        c,
        certain,
        searched_on,
    }
}
