//! Draws among more rows than one cube can hold, by several cubes, each with a chunk of the rows.
//! What a launch leaves for each chunk, every cube of the next launch adds up by itself.

use burn::backend::TensorMetadata;
use burn_cubecl::{cubecl, tensor::CubeTensor};
use cubecl::prelude::*;

use crate::rows::cube::{
    LEAST_UNITS,
    units::{Pair, pair},
};

mod largest;
mod search;
mod systematic;
mod variance;

pub(super) use self::{largest::largest, systematic::systematic, variance::variances};

/// The least number of rows of a chunk.
const CHUNK: usize = 1024;

/// How rows are shared out: to at most as many cubes as a cube has units.
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

/// The two sums of a chunk, or zeros beyond the last chunk.
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
