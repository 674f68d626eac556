//! The passes of attention with wide registers. Flex takes one pass for each of maximum, difference,
//! exponential, sum and quotient, with `exp` of the C library.

use burn::backend::{TensorMetadata, tensor::FloatTensor};

use super::{
    HostTensors, from_values,
    gelu::exp_of_minus,
    in_place::{ByRow, LANES, WORK, last, sum_of},
    passes::{RowWork, Rows, RowsMut, in_parallel},
};
use crate::rows::exact::Softmax;

/// Replaces scores by weights.
pub(super) fn softmax<B: HostTensors>(scores: FloatTensor<B>, quiet: bool) -> Softmax<B> {
    let device = scores.device();
    let mut shape = scores.shape();
    let last = shape.num_dims() - 1;
    let mut weights = B::contiguous(scores);
    let mut sums = vec![0.0; 2 * (shape.num_elements() / shape[last].max(1))];
    in_parallel(Normalise {
        scores: RowsMut::new(B::values_mut(&mut weights), shape[last]),
        sums: RowsMut::new(&mut sums, 2),
        quiet,
    });
    shape[last] = 2;
    Softmax {
        weights,
        rows: from_values::<B>(sums, shape, &device),
    }
}

/// Replaces scores by the weights of their softmax.
pub(super) fn weights<B: HostTensors>(
    scores: FloatTensor<B>,
    rows: FloatTensor<B>,
) -> FloatTensor<B> {
    let width = last(&scores);
    let (mut scores, sums) = (B::contiguous(scores), B::contiguous(rows));
    in_parallel(ByRow {
        values: RowsMut::new(B::values_mut(&mut scores), width),
        with: Rows::new(B::values(&sums), 2),
        first: 0,
        pass: |row: &mut [f32], sums: &[f32], _| {
            for score in row {
                *score = sums[1] * exp_of_difference(*score, sums[0]);
            }
        },
    });
    scores
}

/// Replaces the gradient of weights by that of their scores.
pub(super) fn softmax_backward<B: HostTensors>(
    weights: FloatTensor<B>,
    grad: FloatTensor<B>,
) -> FloatTensor<B> {
    let width = last(&grad);
    let (weights, mut grad) = (B::contiguous(weights), B::contiguous(grad));
    in_parallel(ByRow {
        values: RowsMut::new(B::values_mut(&mut grad), width),
        with: Rows::new(B::values(&weights), width),
        first: 0,
        pass: |row: &mut [f32], weights: &[f32], _| {
            let sum = sum_of(row, weights, |grad, weight| grad * weight);
            for (grad, &weight) in row.iter_mut().zip(weights) {
                *grad = weight * (*grad - sum);
            }
        },
    });
    grad
}

/// The softmax of rows of scores, in place, and the two numbers of each row.
struct Normalise<'a> {
    scores: RowsMut<'a, f32>,
    sums: RowsMut<'a, f32>,
    quiet: bool,
}

impl RowWork for Normalise<'_> {
    type Output = ();

    fn rows(&self) -> usize {
        self.sums.values.len() / 2
    }

    fn width(&self) -> usize {
        WORK * self.scores.width
    }

    fn split_at(self, row: usize) -> (Self, Self) {
        let (scores, sums) = (self.scores.split_at(row), self.sums.split_at(row));
        let work = |scores, sums| Self {
            scores,
            sums,
            ..self
        };
        (work(scores.0, sums.0), work(scores.1, sums.1))
    }

    #[inline(always)]
    fn run(self) {
        let rows = self
            .scores
            .values
            .chunks_exact_mut(self.scores.width.max(1));
        for (row, sums) in rows.zip(self.sums.values.chunks_exact_mut(2)) {
            let largest = largest_of(row);
            for score in row.iter_mut() {
                *score = exp_of_difference(*score, largest);
            }
            let sum = sum_of(row, row, |weight, _| weight);
            let sum = match self.quiet {
                false => sum,
                true => sum + (-largest).exp(),
            };
            let inverse = 1.0 / sum;
            row.iter_mut().for_each(|weight| *weight *= inverse);
            sums.copy_from_slice(&[largest, inverse]);
        }
    }

    fn join((): (), (): ()) {}
}

/// `exp(score - above)`, where `above` is at least the score. NaN stays NaN.
#[inline(always)]
fn exp_of_difference(score: f32, above: f32) -> f32 {
    let power = exp_of_minus(above - score);
    if score.is_nan() || above.is_nan() {
        f32::NAN
    } else {
        power
    }
}

/// The largest value that is a number, and at least the least that is finite.
#[inline(always)]
fn largest_of(row: &[f32]) -> f32 {
    let mut lanes = [f32::MIN; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = lane.max(value);
        }
    }
    let values = lanes.iter().chain(rest);
    values.fold(f32::MIN, |largest, &value| largest.max(value))
}
