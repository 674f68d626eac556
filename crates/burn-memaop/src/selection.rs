//! Policies: each gives every row a key, and the K largest keys are chosen.

use burn::backend::{
    Backend, Scalar, TensorMetadata, get_or_init_device_settings,
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::{DType, FloatDType, Slice, TensorData};

use crate::{config::Policy, gradient::finite, noise::StepNoise, ops::AopStep};

/// The key of a row that is chosen only when no other is left.
const LAST: f32 = f32::MIN;
/// The least score that has a logarithm of its own; rows below it come after all others.
const LEAST: f32 = f32::MIN_POSITIVE;
const MOST: f32 = f32::MAX;

/// The indices of the K chosen rows, shape `[k]`, in no particular order.
///
/// `scores` are the roots of the paper's scores, shape `[rows]`.
pub(crate) fn select<B: Backend>(
    scores: FloatTensor<B>,
    rows: usize,
    step: &AopStep,
) -> IntTensor<B> {
    let noise = StepNoise {
        seed: step.seed,
        step: step.step,
    };
    match step.policy {
        Policy::TopK => top_k::<B>(last_unless_finite::<B>(scores.clone(), scores), step.k),
        // Known without the scores: chosen on the host, so that nothing has to come back from the
        // device and every backend takes the same rows.
        Policy::RandK => {
            let rows = random_rows(rows, step.k, &noise);
            indices::<B>(rows, &scores)
        }
        Policy::WeightedK => {
            let gumbel = (0..rows).map(|row| noise.gumbel(row) as f32);
            let gumbel = TensorData::new(gumbel.collect::<Vec<_>>(), [rows]);
            let gumbel = B::float_from_data(gumbel, &scores.device());

            // In single precision for double-precision layers too: it is enough for keys, and
            // some devices have no other logarithm.
            let clamped = B::float_clamp(scores.clone(), Scalar::from(LEAST), Scalar::from(MOST));
            let logs = B::float_log(B::float_cast(clamped, FloatDType::F32));
            let keys = B::float_add(B::float_mul_scalar(logs, Scalar::from(2.0)), gumbel);
            top_k::<B>(last_unless_finite::<B>(keys, scores), step.k)
        }
    }
}

fn last_unless_finite<B: Backend>(keys: FloatTensor<B>, scores: FloatTensor<B>) -> FloatTensor<B> {
    B::float_mask_fill(keys, B::bool_not(finite::<B>(scores)), Scalar::from(LAST))
}

/// The indices of the K largest keys. Backends without a sort of their own sort on the host.
fn top_k<B: Backend>(keys: FloatTensor<B>, k: usize) -> IntTensor<B> {
    let ints = get_or_init_device_settings::<B>(&keys.device()).int_dtype;
    let order = B::float_argsort(keys, 0, true, ints);
    B::int_slice(order, &[Slice::from(0..k)])
}

/// K of the rows, uniformly and without replacement: those with the largest words, the lower
/// row first where words are equal.
fn random_rows(rows: usize, k: usize, noise: &StepNoise) -> Vec<usize> {
    let mut keys: Vec<_> = (0..rows)
        .map(|row| (core::cmp::Reverse(noise.word(row)), row))
        .collect();
    if k < rows {
        keys.select_nth_unstable(k);
    }
    let mut chosen: Vec<usize> = keys[..k].iter().map(|&(_, row)| row).collect();
    chosen.sort_unstable();
    chosen
}

fn indices<B: Backend>(rows: Vec<usize>, like: &FloatTensor<B>) -> IntTensor<B> {
    let device = like.device();
    let ints = get_or_init_device_settings::<B>(&device).int_dtype;
    let k = rows.len();
    let rows = rows.into_iter().map(|row| row as i64).collect::<Vec<_>>();
    B::int_from_data(
        TensorData::new(rows, [k]).convert_dtype(DType::from(ints)),
        &device,
    )
}
