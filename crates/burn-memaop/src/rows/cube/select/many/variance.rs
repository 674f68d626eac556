//! The variance that sampling would add to a gradient.

use burn::tensor::DType;
use burn_cubecl::{cubecl, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{
    Chunks, of_this_cube,
    search::{found, largest_of, search},
};
use crate::rows::{
    cube::{
        LEAST_UNITS, empty,
        select::{
            ks::{self, Ks},
            systematic::relative,
            variance::added,
        },
        units::{Pair, cube_sum, cube_sums, pair},
    },
    tensors::Candidates,
};

pub(in crate::rows::cube::select) fn variances(
    scores: &CubeTensor,
    candidates: &Candidates,
) -> CubeTensor {
    let chunks = Chunks::of(scores);
    let found = search(scores, candidates, chunks);
    let all = 1 + candidates.len();
    let Chunks { rows, chunk, cubes } = chunks;
    let sums = empty(scores, [all * cubes], DType::F32);
    let roots = empty(scores, [all], DType::F32);
    let (_, dim) = chunks.launch();
    let largest = || found.largest.clone().into_buffer_arg();
    // SAFETY: every index is below a number of rows, of chunks of all roots, or is one of a search
    // for each K.
    unsafe {
        sums_kernel::launch_unchecked(
            &scores.client,
            CubeCount::new_2d(cubes as u32, all as u32),
            dim,
            scores.clone().into_buffer_arg(),
            largest(),
            found.c.into_buffer_arg(),
            found.sums.into_buffer_arg(),
            sums.clone().into_buffer_arg(),
            rows as u32,
            chunk as u32,
            cubes as u32,
            ks::arg(candidates),
            LEAST_UNITS,
        );
        roots_kernel::launch_unchecked(
            &scores.client,
            CubeCount::new_1d(all as u32),
            dim,
            largest(),
            sums.into_buffer_arg(),
            roots.clone().into_buffer_arg(),
            cubes as u32,
            LEAST_UNITS,
        );
    }
    roots
}

/// Writes the sum of this chunk.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn sums_kernel(
    scores: &[f32],
    largest: &[f32],
    cs: &[f32],
    found_sums: &[f32],
    sums: &mut [f32],
    rows: u32,
    chunk: u32,
    cubes: u32,
    ks: Ks,
    #[comptime] units: u32,
) {
    let mut pairs = Shared::<[Vector<f32, Pair>]>::new_slice(comptime!(units as usize));
    let chunk = of_this_cube(rows, chunk);
    let largest = largest_of(largest, cubes, units);
    let index = u32::max(CUBE_POS_Y, 1u32) - 1;
    let k = ks.at(index);
    let mut c = 0.0f32;
    if CUBE_POS_Y > 0 && k < rows {
        c = found(
            scores, largest, cs, found_sums, rows, cubes, index, k, &mut pairs, units,
        )
        .c;
    }
    let mut sum = 0.0f32;
    let mut row = chunk.first + UNIT_POS;
    while row < chunk.end {
        sum += added(relative(scores[row as usize], largest), c, CUBE_POS_Y == 0);
        row += comptime!(units);
    }
    let sum = cube_sums::<Pair>(pair(sum, 0.0f32), &mut pairs, units).extract(0usize);
    if UNIT_POS == 0 {
        sums[(CUBE_POS_Y * cubes + CUBE_POS_X) as usize] = sum;
    }
}

/// Writes the root of the sums of all chunks.
#[cube(launch_unchecked)]
fn roots_kernel(
    largest: &[f32],
    sums: &[f32],
    roots: &mut [f32],
    cubes: u32,
    #[comptime] units: u32,
) {
    let mut shared = Shared::<[Vector<f32, Const<1>>]>::new_slice(comptime!(units as usize));
    let largest = largest_of(largest, cubes, units);
    let mut sum = 0.0f32;
    if UNIT_POS < cubes {
        sum = sums[(CUBE_POS_X * cubes + UNIT_POS) as usize];
    }
    let sum = cube_sum(sum, &mut shared, units);
    if UNIT_POS == 0 {
        roots[CUBE_POS_X as usize] = largest * sum.sqrt();
    }
}
