//! Passes that change the values of rows in place, with wide registers.

use burn::backend::{TensorMetadata, tensor::FloatTensor};

use super::{
    HostTensors,
    passes::{RowWork, Rows, RowsMut, in_parallel},
};
use crate::rows::random::Dropout;

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

/// The length of the last axis.
pub(super) fn last<T: TensorMetadata>(tensor: &T) -> usize {
    let shape = tensor.shape();
    shape[shape.num_dims() - 1]
}

/// A pass over rows of values, each with a row of others and with its number.
pub(super) struct ByRow<'a, F> {
    pub(super) values: RowsMut<'a, f32>,
    pub(super) with: Rows<'a, f32>,
    /// The number of the first row.
    pub(super) first: usize,
    pub(super) pass: F,
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
pub(super) const WORK: usize = 8;
/// Sums and maxima are taken in so many lanes, which wide registers hold.
pub(super) const LANES: usize = 16;

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
