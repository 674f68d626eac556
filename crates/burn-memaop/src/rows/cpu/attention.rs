//! The passes of attention with wide registers. Flex takes one pass for each of maximum, difference,
//! exponential, sum and quotient, with `exp` of the C library.

use burn::backend::{TensorMetadata, tensor::FloatTensor};

use super::{
    HostTensors, from_values,
    gelu::exp_of_minus,
    passes::{RowWork, Rows, RowsMut, in_parallel},
};
use crate::rows::{exact::Softmax, random::Dropout};

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

/// Multiplies values by the factors of a dropout.
pub(super) fn drop_out<B: HostTensors>(values: FloatTensor<B>, dropout: Dropout) -> FloatTensor<B> {
    let width = last(&values);
    let mut values = B::contiguous(values);
    in_parallel(ByRow {
        values: RowsMut::new(B::values_mut(&mut values), width),
        with: Rows::new(&[], 0),
        first: 0,
        pass: |row: &mut [f32], _: &[f32], number| {
            let factor = dropout.factors(number);
            for (column, value) in row.iter_mut().enumerate() {
                *value *= factor(column);
            }
        },
    });
    values
}

fn last<T: TensorMetadata>(tensor: &T) -> usize {
    let shape = tensor.shape();
    shape[shape.num_dims() - 1]
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

/// A pass over rows of values, each with a row of others and with its number.
struct ByRow<'a, F> {
    values: RowsMut<'a, f32>,
    with: Rows<'a, f32>,
    /// The number of the first row.
    first: usize,
    pass: F,
}

impl<F: Fn(&mut [f32], &[f32], usize) + Copy + Send> RowWork for ByRow<'_, F> {
    type Output = ();

    fn rows(&self) -> usize {
        self.values.values.len() / self.values.width.max(1)
    }

    fn width(&self) -> usize {
        WORK * self.values.width
    }

    fn split_at(self, row: usize) -> (Self, Self) {
        let (values, with) = (self.values.split_at(row), self.with.split_at(row));
        let work = |values, with, first| Self {
            values,
            with,
            first,
            ..self
        };
        (
            work(values.0, with.0, self.first),
            work(values.1, with.1, self.first + row),
        )
    }

    #[inline(always)]
    fn run(mut self) {
        for row in 0..self.rows() {
            (self.pass)(self.values.row(row), self.with.row(row), self.first + row);
        }
    }

    fn join((): (), (): ()) {}
}

/// A value takes as long as so many values that are only read.
const WORK: usize = 8;
/// Sums and maxima are taken in so many lanes, which wide registers hold.
const LANES: usize = 16;

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

#[inline(always)]
pub(super) fn sum_of(first: &[f32], second: &[f32], term: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (chunks, rest) = first.as_chunks::<LANES>();
    let (others, other_rest) = second.as_chunks::<LANES>();
    for (chunk, other) in chunks.iter().zip(others) {
        for (lane, (&a, &b)) in lanes.iter_mut().zip(chunk.iter().zip(other)) {
            *lane += term(a, b);
        }
    }
    let rest = rest.iter().zip(other_rest).map(|(&a, &b)| term(a, b));
    lanes.iter().sum::<f32>() + rest.sum::<f32>()
}
