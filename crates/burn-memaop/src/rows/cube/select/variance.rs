//! The variance that sampling would add to a gradient, with a cube for each of several K.

use burn::{backend::TensorMetadata, tensor::DType};
use burn_cubecl::{cubecl, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{
    STAGED,
    ks::{self, Ks},
    many, stage,
    systematic::inclusion,
};
use crate::rows::{
    cube::{
        LEAST_UNITS, empty,
        units::{Pair, cube_sums, pair},
    },
    tensors::Candidates,
};

/// The root of the sum of the squares of all scores, and the roots of the variances that systematic
/// sampling of each K adds, in single precision.
pub(in crate::rows::cube) fn variances(scores: &CubeTensor, candidates: &Candidates) -> CubeTensor {
    match scores.shape()[0] <= STAGED {
        true => of_few(scores, candidates),
        false => many::variances(scores, candidates),
    }
}

fn of_few(scores: &CubeTensor, candidates: &Candidates) -> CubeTensor {
    let cubes = 1 + candidates.len();
    let roots = empty(scores, [cubes], DType::F32);
    // SAFETY: the kernel reads all scores, at most `STAGED`, and writes a root for each cube.
    unsafe {
        variance_kernel::launch_unchecked(
            &scores.client,
            CubeCount::new_1d(cubes as u32),
            CubeDim::new_1d(LEAST_UNITS),
            scores.clone().into_buffer_arg(),
            roots.clone().into_buffer_arg(),
            scores.shape()[0] as u32,
            ks::arg(candidates),
            LEAST_UNITS,
        );
    }
    roots
}

#[cube(launch_unchecked)]
fn variance_kernel(scores: &[f32], roots: &mut [f32], rows: u32, ks: Ks, #[comptime] units: u32) {
    let mut staged = Shared::<[f32]>::new_slice(STAGED);
    let mut pairs = Shared::<[Vector<f32, Pair>]>::new_slice(comptime!(units as usize));
    let mut flag = Shared::<[u32]>::new_slice(1usize);
    let largest = stage(scores, rows, &mut staged, units);

    // The first cube has no p: it adds up all squares. Where K is all rows, nothing is added.
    let k = ks.at(u32::max(CUBE_POS_X, 1u32) - 1);
    let mut c = 0.0f32;
    if CUBE_POS_X > 0 && k < rows {
        c = inclusion(
            scores, rows, largest, k, 0.0f32, &staged, &mut pairs, &mut flag, true, units,
        )
        .c;
    }
    let mut sum = 0.0f32;
    let mut row = UNIT_POS;
    while row < rows {
        sum += added(staged[row as usize], c, CUBE_POS_X == 0);
        row += comptime!(units);
    }
    let sum = cube_sums::<Pair>(pair(sum, 0.0f32), &mut pairs, units).extract(0usize);
    if UNIT_POS == 0 {
        roots[CUBE_POS_X as usize] = largest * sum.sqrt();
    }
}

/// The square of a score, or what a row of that score adds to the variance.
#[cube]
pub(super) fn added(score: f32, c: f32, square: bool) -> f32 {
    let p = c * score;
    let mut added = 0.0f32;
    if square {
        added = score * score;
    } else if p < 1.0 && p > 0.0 {
        added = score * score / p - score * score;
    }
    added
}
