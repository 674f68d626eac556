//! What sampling would add to the variance of a gradient, for several K at once: a cube for each.

use burn::{backend::TensorMetadata, tensor::DType};
use burn_cubecl::{cubecl, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{
    STAGED, stage,
    systematic::{inclusion, relative_at},
};
use crate::op::{
    cube::{
        LEAST_UNITS, empty,
        units::{Pair, cube_sums, pair},
    },
    step::NoiseStep,
};

/// The root of the sum of the squares of all scores, and the roots of the variances that systematic sampling of each
/// K adds, in single precision.
pub(in crate::op::cube) fn variances(scores: &CubeTensor, step: &NoiseStep) -> CubeTensor {
    let cubes = 1 + step.ks.len();
    let roots = empty(scores, [cubes], DType::F32);
    let rows = scores.shape()[0];
    let units = LEAST_UNITS;
    let [k1, k2, k3, k4, k5, k6] = step.ks.map(|k| k as u32);
    // SAFETY: the kernel reads `rows` scores and writes a root for each cube.
    unsafe {
        variance_kernel::launch_unchecked(
            &scores.client,
            CubeCount::new_1d(cubes as u32),
            CubeDim::new_1d(units),
            scores.clone().into_buffer_arg(),
            roots.clone().into_buffer_arg(),
            rows as u32,
            k1,
            k2,
            k3,
            k4,
            k5,
            k6,
            rows <= STAGED,
            units,
        );
    }
    roots
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn variance_kernel(
    scores: &[f32],
    roots: &mut [f32],
    rows: u32,
    k1: u32,
    k2: u32,
    k3: u32,
    k4: u32,
    k5: u32,
    k6: u32,
    #[comptime] is_staged: bool,
    #[comptime] units: u32,
) {
    let staged = comptime!(if is_staged { STAGED } else { 1 });
    let mut staged = Shared::<[f32]>::new_slice(staged);
    let mut pairs = Shared::<[Vector<f32, Pair>]>::new_slice(comptime!(units as usize));
    let mut flag = Shared::<[u32]>::new_slice(1usize);
    let largest = stage(scores, rows, &mut staged, is_staged, units);

    let mut k = k1;
    if CUBE_POS_X == 2 {
        k = k2;
    } else if CUBE_POS_X == 3 {
        k = k3;
    } else if CUBE_POS_X == 4 {
        k = k4;
    } else if CUBE_POS_X == 5 {
        k = k5;
    } else if CUBE_POS_X == 6 {
        k = k6;
    }
    // The first cube has no p: all squares are added up. With all rows nothing is added.
    let mut c = 0.0f32;
    if CUBE_POS_X > 0 && k < rows {
        c = inclusion(
            scores, rows, largest, k, 0.0f32, &staged, &mut pairs, &mut flag, is_staged, units,
        )
        .c;
    }
    let mut sum = 0.0f32;
    let mut row = UNIT_POS;
    while row < rows {
        let score = relative_at(scores, row, largest, &staged, is_staged);
        let p = c * score;
        let square = score * score;
        if CUBE_POS_X == 0 {
            sum += square;
        } else if p < 1.0 && p > 0.0 {
            sum += square / p - square;
        }
        row += comptime!(units);
    }
    let sum = cube_sums::<Pair>(pair(sum, 0.0f32), &mut pairs, units).extract(0usize);
    if UNIT_POS == 0 {
        roots[CUBE_POS_X as usize] = largest * sum.sqrt();
    }
}
