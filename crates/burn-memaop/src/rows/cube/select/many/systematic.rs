//! Systematic sampling of the same rows as in one cube, unless sums in another order round c apart.

use burn::tensor::DType;
use burn_cubecl::{CubeBackend, cubecl, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{
    Chunks, of_this_cube,
    search::{Search, found, largest_of, search},
};
use crate::rows::{
    cube::{
        LEAST_UNITS, empty,
        random::{self, Order, RandomBits},
        select::{
            room,
            systematic::{
                add, add_uncertain, correction, decoded, encoded, leave, probability, relative,
                start, take,
            },
        },
        units::{Fixed, Pair, fixed_prefix_sum, fixed_sum},
    },
    tensors::{Draw, Drawn},
};

pub(in crate::rows::cube::select) fn systematic(
    scores: &CubeTensor,
    draw: Draw,
) -> Drawn<CubeBackend> {
    let chunks = Chunks::of(scores);
    let Chunks { rows, chunk, cubes } = chunks;
    let Search {
        largest,
        c,
        sums,
        uncertain,
    } = search(scores, &[draw.k], chunks);
    // The p of the row at each place, and the sum of the p of each chunk of places.
    let ps = empty(scores, [rows], DType::U32);
    let places = empty(scores, [2 * cubes], DType::U32);
    let drawn = room(scores, draw);
    let (count, dim) = chunks.launch();
    let order = || random::order(draw.random.permutation(rows));
    let (rows, chunk, cubes) = (rows as u32, chunk as u32, cubes as u32);
    // SAFETY: every index is below a number of rows, of chunks, or K, or is one of a search for one
    // K, and the buffers are as long.
    unsafe {
        places_kernel::launch_unchecked(
            &scores.client,
            count.clone(),
            dim,
            scores.clone().into_buffer_arg(),
            largest.clone().into_buffer_arg(),
            c.into_buffer_arg(),
            sums.into_buffer_arg(),
            uncertain.into_buffer_arg(),
            ps.clone().into_buffer_arg(),
            places.clone().into_buffer_arg(),
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
            largest.into_buffer_arg(),
            ps.into_buffer_arg(),
            places.into_buffer_arg(),
            drawn.rows.clone().into_buffer_arg(),
            drawn.root.clone().into_buffer_arg(),
            rows,
            chunk,
            cubes,
            draw.k as u32,
            random::arg(draw.random),
            order(),
            LEAST_UNITS,
        );
    }
    drawn
}

/// Writes the p of this chunk of places in the random order, and their sum.
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
    let chunk = of_this_cube(rows, chunk);
    let largest = largest_of(largest, cubes, units);
    let found = found(
        scores, largest, cs, sums, rows, cubes, 0u32, k, &mut pairs, units,
    );
    let c = found.c;
    let mut sum = Fixed::new(0u32, 0u32);
    if found.searched_on {
        let mut row = UNIT_POS;
        while row < rows {
            add_uncertain(&mut sum, c * relative(scores[row as usize], largest));
            row += comptime!(units);
        }
    } else if UNIT_POS < cubes {
        let at = (2 * UNIT_POS) as usize;
        sum.whole = uncertain[at];
        sum.fraction = uncertain[at + 1];
    }
    let total = fixed_sum(&sum, &mut wholes, &mut fractions, units);
    let correction = correction(&total, k, found.certain);

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

/// Draws the rows of this chunk of places. The p are read, not computed again: if their sum
/// differed by a bit, two cubes could take one place, or none.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn draw_kernel(
    largest: &[f32],
    ps: &[u32],
    places: &[u32],
    drawn: &mut [u32],
    roots: &mut [f32],
    rows: u32,
    chunk: u32,
    cubes: u32,
    k: u32,
    random: RandomBits,
    order: Order,
    #[comptime] units: u32,
) {
    let mut wholes = Shared::<[u32]>::new_slice(comptime!(units as usize));
    let mut fractions = Shared::<[u32]>::new_slice(comptime!(units as usize));
    let mut flag = Shared::<[u32]>::new_slice(1usize);
    let chunk = of_this_cube(rows, chunk);
    let largest = largest_of(largest, cubes, units);
    let mut before = Fixed::new(0u32, 0u32);
    if UNIT_POS < CUBE_POS_X {
        let at = (2 * UNIT_POS) as usize;
        before.whole = places[at];
        before.fraction = places[at + 1];
    }
    let before = fixed_sum(&before, &mut wholes, &mut fractions, units);

    // Each unit takes a run of places.
    let run = (chunk.end - chunk.first).div_ceil(units);
    let first = u32::min(chunk.first + UNIT_POS * run, chunk.end);
    let end = u32::min(first + run, chunk.end);
    let mut run_sum = Fixed::new(0u32, 0u32);
    for place in first..end {
        add(&mut run_sum, &decoded(ps[place as usize]));
    }
    let up_to = fixed_prefix_sum(&run_sum, &mut wholes, &mut fractions, units);
    let within = up_to.minus(&run_sum).plus(&start(&random));
    let mut reached = before.plus(&within);
    for place in first..end {
        let row = order.row(place);
        let p = decoded(ps[place as usize]);
        take(&mut reached, &p, row, k, drawn, roots);
    }

    // Where fewer rows than K are not zero, the places left get no weight.
    sync_cube();
    if UNIT_POS == comptime!(units - 1) {
        flag[0] = reached.whole;
    }
    sync_cube();
    if chunk.end == rows {
        leave(flag[0], k, drawn, roots, largest, units);
    }
}
