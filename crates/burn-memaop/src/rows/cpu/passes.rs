//! Passes over the rows of a batch and a memory, on all cores and with wide registers.

use super::{
    DrawnRow,
    norm::{LANES, largest, norm, norms, root, total},
};
use crate::rows::tensors::Fold;

/// Rows of `width` values.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a, E> {
    pub(super) values: &'a [E],
    pub(super) width: usize,
}

impl<'a, E> Rows<'a, E> {
    pub(super) fn new(values: &'a [E], width: usize) -> Self {
        Self { values, width }
    }

    pub(super) fn count(&self) -> usize {
        self.values.len() / self.width
    }

    pub(super) fn row(&self, row: usize) -> &'a [E] {
        &self.values[row * self.width..][..self.width]
    }

    pub(super) fn split_at(self, row: usize) -> (Self, Self) {
        let (first, second) = self.values.split_at(row * self.width);
        (Self::new(first, self.width), Self::new(second, self.width))
    }
}

impl<'a> Rows<'a, f32> {
    /// The rows that hold anything but zeros. Most are known by their first values.
    pub(super) fn not_zero(&self) -> impl Iterator<Item = usize> + use<'a> {
        let rows = self.values.chunks_exact(self.width).enumerate();
        let rows = rows.filter(|(_, row)| row.iter().any(|&value| value != 0.0));
        rows.map(|(row, _)| row)
    }
}

pub(super) struct RowsMut<'a, E> {
    pub(super) values: &'a mut [E],
    pub(super) width: usize,
}

impl<'a, E> RowsMut<'a, E> {
    pub(super) fn new(values: &'a mut [E], width: usize) -> Self {
        Self { values, width }
    }

    pub(super) fn first(self, rows: usize) -> Self {
        self.split_at(rows).0
    }

    pub(super) fn row(&mut self, row: usize) -> &mut [E] {
        &mut self.values[row * self.width..][..self.width]
    }

    pub(super) fn split_at(self, row: usize) -> (Self, Self) {
        let (first, second) = self.values.split_at_mut(row * self.width);
        (Self::new(first, self.width), Self::new(second, self.width))
    }
}

/// Work on rows that do not depend on each other.
pub(super) trait RowWork: Sized + Send {
    type Output: Send;
    fn rows(&self) -> usize;
    /// The number of values that a row touches.
    fn width(&self) -> usize;
    fn split_at(self, row: usize) -> (Self, Self);
    /// Always inlined, so that it is compiled for the processor that [`on_this_processor`] finds.
    fn run(self) -> Self::Output;
    fn join(first: Self::Output, second: Self::Output) -> Self::Output;
}

/// The number of values below which handing work to another core costs more than it saves. Flex
/// splits its own passes at a like size.
pub(super) const GRAIN: usize = 128 * 1024;

/// Splits work in halves down to the grain. Where work is split depends on its size alone, and so
/// the result is the same on any number of cores.
pub(super) fn in_parallel<W: RowWork>(work: W) -> W::Output {
    let rows = work.rows();
    if rows < 2 || rows * work.width() < 2 * GRAIN {
        return on_this_processor(work);
    }
    let (first, second) = work.split_at(rows / 2);
    #[cfg(feature = "rayon")]
    let (first, second) = rayon::join(|| in_parallel(first), || in_parallel(second));
    #[cfg(not(feature = "rayon"))]
    let (first, second) = (in_parallel(first), in_parallel(second));
    W::join(first, second)
}

/// Runs the work compiled for the widest registers that the processor has.
#[cfg(feature = "simd")]
#[macerator::with_simd]
#[allow(clippy::extra_unused_type_parameters)] // The macro goes by it.
fn on_this_processor<S: macerator::Simd, W: RowWork>(work: W) -> W::Output {
    work.run()
}

#[cfg(not(feature = "simd"))]
fn on_this_processor<W: RowWork>(work: W) -> W::Output {
    work.run()
}

/// Writes the scores of every row.
pub(super) struct Score<'a> {
    /// Without the input, the norm of each of its rows is 1.
    pub(super) input: Option<Rows<'a, f32>>,
    pub(super) grad: Rows<'a, f32>,
    pub(super) score: &'a mut [f32],
    pub(super) tilt: &'a mut [f32],
}

impl RowWork for Score<'_> {
    type Output = ();

    fn rows(&self) -> usize {
        self.score.len()
    }

    fn width(&self) -> usize {
        self.input.map_or(0, |input| input.width) + self.grad.width
    }

    fn split_at(self, row: usize) -> (Self, Self) {
        let (first, second) = self.input.map(|input| input.split_at(row)).unzip();
        let grad = self.grad.split_at(row);
        let (score, tilt) = (self.score.split_at_mut(row), self.tilt.split_at_mut(row));
        let work = |input, grad, score, tilt| Self {
            input,
            grad,
            score,
            tilt,
        };
        (
            work(first, grad.0, score.0, tilt.0),
            work(second, grad.1, score.1, tilt.1),
        )
    }

    #[inline(always)]
    fn run(self) {
        let scores = self.score.iter_mut().zip(self.tilt);
        for (row, (score, tilt)) in scores.enumerate() {
            let x = self.input.map_or(1.0, |input| norm(input.row(row)));
            let g = norm(self.grad.row(row));
            (*score, *tilt) = (x * g, balance(x, g));
        }
    }

    fn join((): (), (): ()) {}
}

/// `sqrt(|g| / |x|)`, and 1 where a norm is 0.
#[inline(always)]
pub(super) fn balance(x: f32, g: f32) -> f32 {
    match x == 0.0 || g == 0.0 {
        true => 1.0,
        // The root of each norm is taken, because the quotient of the norms can overflow.
        false => g.sqrt() / x.sqrt(),
    }
}

/// Whether all values are finite.
pub(super) fn are_finite(rows: Rows<'_, f32>) -> bool {
    in_parallel(AreFinite(rows))
}

struct AreFinite<'a>(Rows<'a, f32>);

impl RowWork for AreFinite<'_> {
    type Output = bool;

    fn rows(&self) -> usize {
        self.0.count()
    }

    fn width(&self) -> usize {
        self.0.width
    }

    fn split_at(self, row: usize) -> (Self, Self) {
        let (first, second) = self.0.split_at(row);
        (Self(first), Self(second))
    }

    #[inline(always)]
    fn run(self) -> bool {
        largest(self.0.values).is_finite()
    }

    fn join(first: bool, second: bool) -> bool {
        first && second
    }
}

/// Folds the batch into the memory, and writes the scores of every row.
pub(super) struct FoldIn<'a> {
    /// The rows x and g.
    pub(super) batch: [Rows<'a, f32>; 2],
    /// `m^X`, `m^G` and the ages.
    pub(super) memory: [RowsMut<'a, f32>; 3],
    pub(super) score: &'a mut [f32],
    pub(super) tilt: &'a mut [f32],
    /// The position of the first of these rows in the batch.
    pub(super) first: usize,
    pub(super) fold: Fold,
}

impl RowWork for FoldIn<'_> {
    type Output = ();

    fn rows(&self) -> usize {
        self.score.len()
    }

    fn width(&self) -> usize {
        2 * (self.batch[0].width + self.batch[1].width)
    }

    fn split_at(self, row: usize) -> (Self, Self) {
        let [x, g] = self.batch.map(|rows| rows.split_at(row));
        let [a, b, age] = self.memory.map(|rows| rows.split_at(row));
        let (score, tilt) = (self.score.split_at_mut(row), self.tilt.split_at_mut(row));
        let work = |batch, memory, score, tilt, first| Self {
            batch,
            memory,
            score,
            tilt,
            first,
            ..self
        };
        let first = work([x.0, g.0], [a.0, b.0, age.0], score.0, tilt.0, self.first);
        let next = self.first + row;
        let second = work([x.1, g.1], [a.1, b.1, age.1], score.1, tilt.1, next);
        (first, second)
    }

    #[inline(always)]
    fn run(self) {
        let decay = self.fold.decay.sqrt() as f32;
        let [mut inputs, mut grads, mut ages] = self.memory;
        for row in 0..self.score.len() {
            let [x, g] = self.batch.map(|rows| rows.row(row));
            let (a, b) = (inputs.row(row), grads.row(row));
            let (by_input, by_grad) = match self.fold.balanced {
                false => (1.0, 1.0),
                true => {
                    let sign = self.fold.random.sign(self.first + row) as f32;
                    let ([x, a], [g, b]) = (norms(x, a), norms(g, b));
                    scales([x, g], [decay * a, decay * b], sign)
                }
            };
            let x = add(a, x, by_input, decay);
            let g = add(b, g, by_grad, decay);
            let age = &mut ages.row(row)[0];
            if (x * g).is_finite() {
                *age += 1.0;
                (self.score[row], self.tilt[row]) = (x * g, balance(x, g));
            } else {
                // A row whose sum has overflowed is dropped.
                a.fill(0.0);
                b.fill(0.0);
                *age = 0.0;
                (self.score[row], self.tilt[row]) = (0.0, 1.0);
            }
        }
    }

    fn join((): (), (): ()) {}
}

/// `s r` and `s / r` for a row, from the norms of the new pair and of the kept one.
#[inline(always)]
fn scales([x, g]: [f32; 2], [a, b]: [f32; 2], sign: f32) -> (f32, f32) {
    if x == 0.0 || g == 0.0 {
        return (0.0, 0.0);
    }
    if a == 0.0 || b == 0.0 {
        return (sign, sign);
    }
    // The root of each quotient is taken, because the quotient of the products could overflow.
    let r = a.sqrt() / x.sqrt() * (g.sqrt() / b.sqrt());
    (sign * r, sign / r)
}

/// Sets `kept` to `decay kept + scale new`, and returns its norm.
#[inline(always)]
fn add(kept: &mut [f32], new: &[f32], scale: f32, decay: f32) -> f32 {
    let mut sums = [0.0; LANES];
    let (chunks, rest) = kept.as_chunks_mut::<LANES>();
    let (new_chunks, new_rest) = new.as_chunks::<LANES>();
    for (kept, new) in chunks.iter_mut().zip(new_chunks) {
        for lane in 0..LANES {
            let value = decay * kept[lane] + scale * new[lane];
            sums[lane] += value * value;
            kept[lane] = value;
        }
    }
    let mut sum = total(sums);
    for (kept, &new) in rest.iter_mut().zip(new_rest) {
        let value = decay * *kept + scale * new;
        sum += value * value;
        *kept = value;
    }
    root(sum, kept)
}

/// Copies the drawn rows to a panel of their own, each times the scale of factor `FACTOR`.
pub(super) struct Gather<'a, const FACTOR: usize> {
    pub(super) from: Rows<'a, f32>,
    pub(super) drawn: &'a [DrawnRow],
    pub(super) panel: &'a mut [f32],
}

impl<const FACTOR: usize> RowWork for Gather<'_, FACTOR> {
    type Output = ();

    fn rows(&self) -> usize {
        self.drawn.len()
    }

    fn width(&self) -> usize {
        2 * self.from.width
    }

    fn split_at(self, row: usize) -> (Self, Self) {
        let drawn = self.drawn.split_at(row);
        let panel = self.panel.split_at_mut(row * self.from.width);
        let work = |drawn, panel| Self {
            drawn,
            panel,
            ..self
        };
        (work(drawn.0, panel.0), work(drawn.1, panel.1))
    }

    #[inline(always)]
    fn run(self) {
        let panel = self.panel.chunks_exact_mut(self.from.width);
        for (drawn, to) in self.drawn.iter().zip(panel) {
            let scale = drawn.scales[FACTOR];
            for (to, &value) in to.iter_mut().zip(self.from.row(drawn.row)) {
                *to = scale * value;
            }
        }
    }

    fn join((): (), (): ()) {}
}

/// Fills the drawn rows with zeros. Their numbers ascend, and none comes twice.
pub(super) struct Clear<'a> {
    pub(super) of: RowsMut<'a, f32>,
    /// The number of the first row of `of`.
    pub(super) first: usize,
    pub(super) drawn: &'a [DrawnRow],
}

impl RowWork for Clear<'_> {
    type Output = ();

    fn rows(&self) -> usize {
        self.drawn.len()
    }

    fn width(&self) -> usize {
        self.of.width
    }

    fn split_at(self, index: usize) -> (Self, Self) {
        let (drawn, row) = (self.drawn.split_at(index), self.drawn[index].row);
        let of = self.of.split_at(row - self.first);
        let work = |of, first, drawn| Self { of, first, drawn };
        (work(of.0, self.first, drawn.0), work(of.1, row, drawn.1))
    }

    #[inline(always)]
    fn run(mut self) {
        for drawn in self.drawn {
            self.of.row(drawn.row - self.first).fill(0.0);
        }
    }

    fn join((): (), (): ()) {}
}

/// Copies the rows of a panel, each times the scale of the second factor, to their places in a
/// matrix. The places ascend, and none comes twice.
pub(super) struct PutBack<'a> {
    pub(super) panel: Rows<'a, f32>,
    pub(super) drawn: &'a [DrawnRow],
    pub(super) to: RowsMut<'a, f32>,
    /// The number of the first row of `to`.
    pub(super) first: usize,
}

impl RowWork for PutBack<'_> {
    type Output = ();

    fn rows(&self) -> usize {
        self.drawn.len()
    }

    fn width(&self) -> usize {
        2 * self.to.width
    }

    fn split_at(self, index: usize) -> (Self, Self) {
        let (drawn, row) = (self.drawn.split_at(index), self.drawn[index].row);
        let panel = self.panel.split_at(index);
        let to = self.to.split_at(row - self.first);
        let work = |panel, drawn, to, first| Self {
            panel,
            drawn,
            to,
            first,
        };
        (
            work(panel.0, drawn.0, to.0, self.first),
            work(panel.1, drawn.1, to.1, row),
        )
    }

    #[inline(always)]
    fn run(mut self) {
        for (index, drawn) in self.drawn.iter().enumerate() {
            let to = self.to.row(drawn.row - self.first);
            for (to, &value) in to.iter_mut().zip(self.panel.row(index)) {
                *to = drawn.scales[1] * value;
            }
        }
    }

    fn join((): (), (): ()) {}
}
