//! Passes that pack rows and unpack them.

use super::{
    DrawnRow,
    norm::norm,
    passes::{RowWork, Rows, RowsMut},
};
use crate::rows::{
    packing::{Packing, pack_row, unpack_row},
    random::Random,
};

/// Packs a function of the values of every row, and writes the norm of the row.
pub(super) struct Pack<'a, F> {
    pub(super) rows: Rows<'a, f32>,
    pub(super) function: F,
    pub(super) packing: Packing,
    /// Without random bits, values are rounded to the nearest.
    pub(super) random: Option<Random>,
    /// The position of the first of these rows in the batch.
    pub(super) first: usize,
    pub(super) words: RowsMut<'a, i32>,
    pub(super) norms: &'a mut [f32],
}

impl<F: Fn(f32) -> f32 + Copy + Send> RowWork for Pack<'_, F> {
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
        for (row, of_row) in self.norms.iter_mut().enumerate() {
            let values = self.rows.row(row);
            *of_row = norm(values);
            let key = self.random.map(|random| random.rounding(self.first + row));
            let words = self.words.row(row);
            pack_row(self.packing, values, self.function, key, words);
        }
    }

    fn join((): (), (): ()) {}
}

/// Unpacks the drawn rows, each times the scale of the first factor, to a panel of their own.
pub(super) struct Unpack<'a> {
    pub(super) words: Rows<'a, i32>,
    pub(super) packing: Packing,
    pub(super) drawn: &'a [DrawnRow],
    pub(super) panel: &'a mut [f32],
}

impl RowWork for Unpack<'_> {
    type Output = ();

    fn rows(&self) -> usize {
        self.drawn.len()
    }

    fn width(&self) -> usize {
        2 * self.packing.width
    }

    fn split_at(self, row: usize) -> (Self, Self) {
        let drawn = self.drawn.split_at(row);
        let panel = self.panel.split_at_mut(row * self.packing.width);
        let work = |drawn, panel| Self {
            drawn,
            panel,
            ..self
        };
        (work(drawn.0, panel.0), work(drawn.1, panel.1))
    }

    #[inline(always)]
    fn run(self) {
        let panel = self.panel.chunks_exact_mut(self.packing.width);
        for (drawn, to) in self.drawn.iter().zip(panel) {
            let scale = drawn.scales[0];
            unpack_row(self.packing, self.words.row(drawn.row), |first, values| {
                for (to, &value) in to[first..].iter_mut().zip(values) {
                    *to = scale * value;
                }
            });
        }
    }

    fn join((): (), (): ()) {}
}

/// Multiplies values by packed ones. Where these are zero, so is the product.
pub(super) struct Times<'a> {
    pub(super) words: Rows<'a, i32>,
    pub(super) packing: Packing,
    pub(super) values: RowsMut<'a, f32>,
}

impl RowWork for Times<'_> {
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
                        true => 0.0,
                        false => *value * factor,
                    };
                }
            });
        }
    }

    fn join((): (), (): ()) {}
}
