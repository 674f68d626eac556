//! Chooses the rows without a wait for the host: the K largest of the keys by radix selection, or systematic sampling by a
//! prefix sum. One cube does it in one launch, from shared memory; of more rows several do, in several launches.
//!
//! No unit reads what another has written to global memory in the same launch. The largest come out in ascending order of the
//! rows, sampled ones in that of the draw.

use burn::{
    backend::{
        TensorMetadata,
        ops::{FloatTensorOps, IntTensorOps},
    },
    tensor::{DType, TensorData},
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
    units::{Pair, cube_max, cube_sums, is_finite, pair},
};
use crate::{
    config::{Baseline, Method},
    op::noise::StepNoise,
    op::portable,
    op::selection,
    op::step::{AopStep, InputStep, Share},
};

pub(super) use self::variance::variances;

/// The chosen rows.
pub(super) struct Chosen {
    /// Shape `[chosen]`.
    pub(super) rows: CubeTensor,
    /// The root of the weight of each, in single precision: 0 of one whose score is not finite.
    pub(super) roots: CubeTensor,
    /// In single precision.
    pub(super) share: Share<CubeBackend>,
}

/// How many rows, from which noise.
#[derive(Clone, Copy)]
struct Draw {
    k: usize,
    noise: StepNoise,
    /// Whether to measure the share.
    measure: bool,
}

pub(super) fn choose(scores: &CubeTensor, step: &AopStep) -> Chosen {
    let rows = scores.shape()[0];
    let random_weight = rows as f64 / step.k as f64;
    let draw = Draw {
        k: step.k,
        noise: StepNoise {
            seed: step.seed,
            step: step.step,
        },
        measure: step.measure,
    };
    match step.method {
        Method::Systematic => systematic(scores, draw, false),
        Method::TopK(_) => largest(scores, draw, Key::Score, 1.0),
        Method::Baseline(Baseline::RandK(_)) => largest(scores, draw, Key::Noise, 1.0),
        Method::Baseline(Baseline::ScaledRandK) => largest(scores, draw, Key::Noise, random_weight),
        Method::Baseline(Baseline::WeightedK(_)) => {
            largest(scores, draw, Key::LogScorePlusNoise, 1.0)
        }
        // The number of rows of the first depends on the draw, and with it the shape of what
        // follows; the others draw with replacement.
        Method::Baseline(Baseline::Bernoulli | Baseline::ColumnRow | Baseline::WinnerTakeAll) => {
            on_host(scores, step)
        }
    }
}

/// Rows of the gradient of the input, by the norms of the gradient of the output.
pub(super) fn choose_input(sizes: &CubeTensor, step: &InputStep) -> Chosen {
    let draw = Draw {
        k: step.k,
        noise: StepNoise {
            seed: step.seed,
            step: step.step,
        },
        measure: false,
    };
    systematic(sizes, draw, true)
}

/// The scores that a cube holds in shared memory: with what else it needs there they fit into the 16 KiB that every device
/// of the WebGPU standard has.
const STAGED: usize = 2048;

fn systematic(scores: &CubeTensor, draw: Draw, input: bool) -> Chosen {
    match scores.shape()[0] <= STAGED {
        true => systematic::systematic(scores, draw, input),
        false => many::systematic(scores, draw, input),
    }
}

fn largest(scores: &CubeTensor, draw: Draw, key: Key, weight: f64) -> Chosen {
    match scores.shape()[0] <= STAGED {
        true => largest::largest(scores, draw, key, weight),
        false => many::largest(scores, draw, key, weight),
    }
}

/// Reads the scores, and so waits for the device.
fn on_host(scores: &CubeTensor, step: &AopStep) -> Chosen {
    let sizes = portable::read::<CubeBackend>(scores.clone());
    let selection = selection::select(sizes.len(), step, || sizes.clone());
    let count = selection.rows.len();
    let weights = selection.weights.unwrap_or_else(|| vec![1.0; count]);
    let roots = selection.rows.iter().zip(weights);
    let roots: Vec<_> = roots
        .map(|(&row, weight)| match sizes[row].is_finite() {
            true => weight.sqrt() as f32,
            false => 0.0,
        })
        .collect();
    let chosen: Vec<_> = selection.rows.iter().map(|&row| row as u32).collect();
    let device = scores.device();
    let chosen = CubeBackend::int_from_data(TensorData::new(chosen, [count]), &device);
    let share = match step.measure {
        true => Share::Measured(portable::share::<CubeBackend>(scores, &chosen)),
        false => Share::Skipped,
    };
    Chosen {
        rows: chosen,
        roots: CubeBackend::float_from_data(TensorData::new(roots, [count]), &device),
        share,
    }
}

fn output(scores: &CubeTensor, draw: Draw) -> (Chosen, CubeTensor) {
    let share = empty(scores, [1], DType::F32);
    let chosen = Chosen {
        rows: empty(scores, [draw.k], DType::U32),
        roots: empty(scores, [draw.k], DType::F32),
        share: match draw.measure {
            true => Share::Measured(share.clone()),
            false => Share::Skipped,
        },
    };
    (chosen, share)
}

#[cube]
fn finite_score(score: f32) -> f32 {
    select(is_finite(score), score, 0.0f32)
}

#[cube]
fn write_share(
    carried: f32,
    all: f32,
    share: &mut [f32],
    pairs: &mut Shared<[Vector<f32, Pair>]>,
    #[comptime] units: u32,
) {
    let sums = cube_sums::<Pair>(pair(carried, all), pairs, units);
    if UNIT_POS == 0 {
        share[0] = sums.extract(0usize) / sums.extract(1usize);
    }
}

/// The largest score. Scores relative to it, which `staged` holds, have sums and squares that neither overflow nor vanish.
#[cube]
fn stage(scores: &[f32], rows: u32, staged: &mut Shared<[f32]>, #[comptime] units: u32) -> f32 {
    let mut shared = Shared::<[f32]>::new_slice(comptime!(units as usize));
    let mut largest = 0.0f32;
    let mut row = UNIT_POS;
    while row < rows {
        largest = f32::max(largest, finite_score(scores[row as usize]));
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
