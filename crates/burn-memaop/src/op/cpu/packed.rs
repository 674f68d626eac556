//! Passes that pack rows and unpack them.

use super::rows::{Real, RowWork, Rows, RowsMut, square_sum};
use crate::op::{
    noise::StepNoise,
    packing::{Packing, pack_row, unpack_row},
};

/// Packs a function of the values of every row, and writes the norm of the row.
pub(super) struct Pack<'a, E, F> {
    pub(super) rows: Rows<'a, E>,
    pub(super) function: F,
    pub(super) packing: Packing,
    /// Without noise, rounding is to the nearest.
    pub(super) noise: Option<StepNoise>,
    /// The position of the first of these rows in the batch.
    pub(super) first: usize,
    pub(super) words: RowsMut<'a, i32>,
    pub(super) norms: &'a mut [E],
}

impl<E: Real, F: Fn(E) -> f32 + Copy + Send> RowWork for Pack<'_, E, F> {
    type Output = ();

    fn rows(&self) -> usize {
        self.norms.len()
    }

    fn width(&self) -> usize {
        2 * self.rows.width
    }

    fn split_at(self, row: usize) -> (Self, Self) {
        let (rows, words) = (self.rows.split_at(row), self.words.split_at(row));
        let norms = self.norms.split_at_mut(row);
        let work = |rows, words, norms, first| Self {
            rows,
            words,
            norms,
            first,
            ..self
        };
        (
            work(rows.0, words.0, norms.0, self.first),
            work(rows.1, words.1, norms.1, self.first + row),
        )
    }

    #[inline(always)]
    fn run(mut self) {
        for (row, norm) in self.norms.iter_mut().enumerate() {
            let values = self.rows.row(row);
            // A value that single precision does not hold breaks the row as one that is not finite.
            *norm = match square_sum(values).sqrt() {
                norm if norm > E::from_single(f32::MAX) => E::infinity(),
                norm => norm,
            };
            let key = self.noise.map(|noise| noise.rounding(self.first + row));
            pack_row(
                self.packing,
                values,
                self.function,
                key,
                self.words.row(row),
            );
        }
    }

    fn join((): (), (): ()) {}
}

/// Unpacks the chosen rows, scaled, to a panel of their own.
pub(super) struct Unpack<'a, E> {
    pub(super) words: Rows<'a, i32>,
    pub(super) packing: Packing,
    pub(super) rows: &'a [usize],
    pub(super) scales: &'a [E],
    pub(super) panel: &'a mut [E],
}

impl<E: Real> RowWork for Unpack<'_, E> {
    type Output = ();

    fn rows(&self) -> usize {
        self.rows.len()
    }

    fn width(&self) -> usize {
        2 * self.packing.width
    }

    fn split_at(self, row: usize) -> (Self, Self) {
        let (rows, scales) = (self.rows.split_at(row), self.scales.split_at(row));
        let panel = self.panel.split_at_mut(row * self.packing.width);
        let work = |rows, scales, panel| Self {
            rows,
            scales,
            panel,
            ..self
        };
        (
            work(rows.0, scales.0, panel.0),
            work(rows.1, scales.1, panel.1),
        )
    }

    #[inline(always)]
    fn run(self) {
        let panel = self.panel.chunks_exact_mut(self.packing.width);
        for ((&row, &scale), to) in self.rows.iter().zip(self.scales).zip(panel) {
            unpack_row(self.packing, self.words.row(row), |first, values| {
                for (to, &value) in to[first..].iter_mut().zip(values) {
                    *to = scale * E::from_single(value);
                }
            });
        }
    }

    fn join((): (), (): ()) {}
}

/// Multiplies values by packed ones; where these are zero, so is the product.
pub(super) struct Times<'a, E> {
    pub(super) words: Rows<'a, i32>,
    pub(super) packing: Packing,
    pub(super) values: RowsMut<'a, E>,
}

impl<E: Real> RowWork for Times<'_, E> {
    type Output = ();

    fn rows(&self) -> usize {
        self.values.values.len() / self.values.width
    }

    fn width(&self) -> usize {
        2 * self.packing.width
    }

    fn split_at(self, row: usize) -> (Self, Self) {
        let (words, values) = (self.words.split_at(row), self.values.split_at(row));
        let work = |words, values| Self {
            words,
            values,
            ..self
        };
        (work(words.0, values.0), work(words.1, values.1))
    }

    #[inline(always)]
    fn run(mut self) {
        for row in 0..self.rows() {
            let values = self.values.row(row);
            unpack_row(self.packing, self.words.row(row), |first, factors| {
                for (value, &factor) in values[first..].iter_mut().zip(factors) {
                    *value = match factor == 0.0 {
                        true => E::zero(),
                        false => *value * E::from_single(factor),
                    };
                }
            });
        }
    }

    fn join((): (), (): ()) {}
}
