//! Draws rows without a wait for the host. The K rows with the largest keys are found by radix
//! selection, and systematic sampling goes by a prefix sum. One cube does either in one launch, in
//! its shared storage. Among more rows, several cubes draw in several launches.
//!
//! No unit reads what another unit has written to a buffer in the same launch. The largest come out
//! in ascending order of the rows, sampled rows in the order of the draw.

use burn::{
    backend::TensorMetadata,
    tensor::{DType, IntDType},
};
use burn_cubecl::{CubeBackend, cubecl, tensor::CubeTensor};
use cubecl::prelude::*;

mod ks;
mod largest;
mod many;
mod systematic;
mod variance;

use self::{largest::Key, systematic::relative};
use super::{
    empty,
    scores::NAN,
    units::{cube_max, is_finite},
};
use crate::{
    config::{Baseline, Method},
    rows::{
        portable,
        tensors::{Draw, Drawn},
    },
};

pub(super) use self::variance::variances;

pub(super) fn draw(scores: &CubeTensor, draw: Draw) -> Drawn<CubeBackend> {
    let random_weight = scores.shape()[0] as f64 / draw.k as f64;
    match draw.method {
        Method::Systematic => systematic(scores, draw),
        Method::TopK(_) => largest(scores, draw, Key::Score, 1.0),
        Method::Baseline(Baseline::RandK(_)) => largest(scores, draw, Key::Random, 1.0),
        Method::Baseline(Baseline::ScaledRandK) => {
            largest(scores, draw, Key::Random, random_weight)
        }
        Method::Baseline(Baseline::WeightedK(_)) => {
            largest(scores, draw, Key::LogScorePlusGumbel, 1.0)
        }
        // These are not the K largest of any keys, and are drawn on the host.
        Method::Baseline(Baseline::Bernoulli | Baseline::ColumnRow | Baseline::WinnerTakeAll) => {
            portable::draw_in::<CubeBackend>(scores.clone(), draw, IntDType::U32)
        }
    }
}

/// The number of scores that a cube holds in shared storage. With what else it holds there, they
/// fit into the 16 KiB that every device of the WebGPU standard has.
const STAGED: usize = 2048;

fn systematic(scores: &CubeTensor, draw: Draw) -> Drawn<CubeBackend> {
    match scores.shape()[0] <= STAGED {
        true => systematic::systematic(scores, draw),
        false => many::systematic(scores, draw),
    }
}

fn largest(scores: &CubeTensor, draw: Draw, key: Key, weight: f64) -> Drawn<CubeBackend> {
    match scores.shape()[0] <= STAGED {
        true => largest::largest(scores, draw, key, weight),
        false => many::largest(scores, draw, key, weight),
    }
}

fn room(scores: &CubeTensor, draw: Draw) -> Drawn<CubeBackend> {
    Drawn {
        rows: empty(scores, [draw.k], DType::U32),
        root: empty(scores, [draw.k], DType::F32),
    }
}

#[cube]
fn finite_score(score: f32) -> f32 {
    select(is_finite(score), score, 0.0f32)
}

/// A score, or infinity in the place of one that is not finite. Infinity is then the largest score,
/// and relative to it all scores are zero.
#[cube]
fn or_infinity(score: f32) -> f32 {
    select(is_finite(score), score, f32::reinterpret(INFINITY))
}

/// The bits of infinity.
const INFINITY: u32 = 0x7F80_0000;

/// The root of a weight, or NaN where a score is not finite.
#[cube]
fn or_nan(root: f32, is_broken: bool) -> f32 {
    let mut value = root;
    if is_broken {
        value = f32::reinterpret(NAN);
    }
    value
}

/// Returns the largest score, and fills `staged` with the scores relative to it. Their sums and
/// squares neither overflow nor vanish.
#[cube]
fn stage(scores: &[f32], rows: u32, staged: &mut Shared<[f32]>, #[comptime] units: u32) -> f32 {
    let mut shared = Shared::<[f32]>::new_slice(comptime!(units as usize));
    let mut largest = 0.0f32;
    let mut row = UNIT_POS;
    while row < rows {
        largest = f32::max(largest, or_infinity(scores[row as usize]));
        row += comptime!(units);
    }
    let largest = cube_max(largest, &mut shared, units);
    let mut row = UNIT_POS;
    while row < rows {
        staged[row as usize] = relative(scores[row as usize], largest);
        row += comptime!(units);
    }
    sync_cube();
    largest
}
