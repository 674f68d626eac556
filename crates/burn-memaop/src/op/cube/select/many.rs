//! Selection among more rows than one cube can hold, by several cubes: each looks after a chunk of the rows, and what a launch
//! leaves of each chunk every cube of the next adds up by itself.

use burn::backend::TensorMetadata;
use burn_cubecl::{cubecl, tensor::CubeTensor};
use cubecl::prelude::*;

use super::write_share;
use crate::op::cube::{
    LEAST_UNITS,
    units::{Pair, pair},
};

mod largest;
mod search;
mod systematic;
mod variance;

pub(super) use self::{largest::largest, systematic::systematic, variance::variances};

/// The least rows of a chunk.
const CHUNK: usize = 1024;

/// How rows are shared out: to as many cubes as one has units, at most.
#[derive(Clone, Copy)]
struct Chunks {
    rows: usize,
    chunk: usize,
    cubes: usize,
}

impl Chunks {
    fn of(scores: &CubeTensor) -> Self {
        let rows = scores.shape()[0];
        let chunk = rows.div_ceil(LEAST_UNITS as usize).max(CHUNK);
        Self {
            rows,
            chunk,
            cubes: rows.div_ceil(chunk),
        }
    }

    fn launch(&self) -> (CubeCount, CubeDim) {
        let count = CubeCount::new_1d(self.cubes as u32);
        (count, CubeDim::new_1d(LEAST_UNITS))
    }
}

/// The rows of this cube.
#[derive(CubeType)]
struct Chunk {
    first: u32,
    end: u32,
}

#[cube]
fn of_this_cube(rows: u32, chunk: u32) -> Chunk {
    let first = u32::min(CUBE_POS_X * chunk, rows);
    Chunk {
        first,
        end: u32::min(first + chunk, rows),
    }
}

/// The share of the score mass, from the sums of the chosen scores and of all of each chunk.
fn share(scores: &CubeTensor, sums: CubeTensor, share: CubeTensor, chunks: Chunks) {
    // SAFETY: the kernel reads two sums for each chunk.
    unsafe {
        share_kernel::launch_unchecked(
            &scores.client,
            CubeCount::new_single(),
            CubeDim::new_1d(LEAST_UNITS),
            sums.into_buffer_arg(),
            share.into_buffer_arg(),
            chunks.cubes as u32,
            LEAST_UNITS,
        );
    }
}

#[cube(launch_unchecked)]
fn share_kernel(sums: &[f32], share: &mut [f32], cubes: u32, #[comptime] units: u32) {
    let mut pairs = Shared::<[Vector<f32, Pair>]>::new_slice(comptime!(units as usize));
    let sum = of_chunk(sums, UNIT_POS, cubes);
    write_share(
        sum.extract(0usize),
        sum.extract(1usize),
        share,
        &mut pairs,
        units,
    );
}

/// The two sums of a chunk; none beyond the last.
#[cube]
fn of_chunk(sums: &[f32], index: u32, cubes: u32) -> Vector<f32, Pair> {
    let mut first = 0.0f32;
    let mut second = 0.0f32;
    if index < cubes {
        let at = (2 * index) as usize;
        first = sums[at];
        second = sums[at + 1];
    }
    pair(first, second)
}
