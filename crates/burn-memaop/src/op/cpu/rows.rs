//! Passes over the rows of batch and memory, on all cores and with wide registers.

use burn::tensor::Element;
use num_traits::Float;

use crate::op::noise::StepNoise;

/// A floating-point type in which memory and scores are kept.
pub(crate) trait Real: Element + Float + Into<f64> {
    fn of(value: f64) -> Self;
    fn single(self) -> f32;
    fn from_single(value: f32) -> Self;
}

impl Real for f32 {
    fn of(value: f64) -> Self {
        value as f32
    }

    fn single(self) -> f32 {
        self
    }

    fn from_single(value: f32) -> Self {
        value
    }
}

impl Real for f64 {
    fn of(value: f64) -> Self {
        value
    }

    fn single(self) -> f32 {
        self as f32
    }

    fn from_single(value: f32) -> Self {
        value.into()
    }
}

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

    pub(super) fn row(&self, row: usize) -> &'a [E] {
        &self.values[row * self.width..][..self.width]
    }

    pub(super) fn split_at(self, row: usize) -> (Self, Self) {
        let (first, second) = self.values.split_at(row * self.width);
        (Self::new(first, self.width), Self::new(second, self.width))
    }
}

impl<E: Real> Rows<'_, E> {
    /// The rows that hold something else than zeros; most are known by their first values.
    pub(super) fn not_zero(&self) -> Vec<usize> {
        let rows = self.values.chunks_exact(self.width).enumerate();
        rows.filter(|(_, row)| row.iter().any(|value| !value.is_zero()))
            .map(|(row, _)| row)
            .collect()
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

    pub(super) fn row(&mut self, row: usize) -> &mut [E] {
        &mut self.values[row * self.width..][..self.width]
    }

    pub(super) fn split_at(self, row: usize) -> (Self, Self) {
        let (first, second) = self.values.split_at_mut(row * self.width);
        (Self::new(first, self.width), Self::new(second, self.width))
    }
}

#[derive(Clone, Copy)]
pub(super) struct Batch<'a, E> {
    pub(super) input: Rows<'a, E>,
    pub(super) grad: Rows<'a, E>,
}

impl<E> Batch<'_, E> {
    fn width(&self) -> usize {
        self.input.width + self.grad.width
    }

    fn split_at(self, row: usize) -> (Self, Self) {
        let (input, grad) = (self.input.split_at(row), self.grad.split_at(row));
        let batch = |input, grad| Self { input, grad };
        (batch(input.0, grad.0), batch(input.1, grad.1))
    }
}

/// Work on rows that do not depend on each other.
pub(super) trait RowWork: Sized + Send {
    type Output: Send;
    fn rows(&self) -> usize;
    /// The values that a row touches.
    fn width(&self) -> usize;
    fn split_at(self, row: usize) -> (Self, Self);
    /// Always inlined, so that it is compiled for the processor that [`on_this_processor`] finds.
    fn run(self) -> Self::Output;
    fn join(first: Self::Output, second: Self::Output) -> Self::Output;
}

/// Values below which handing work to another core costs more than it saves (Flex splits its own
/// passes at a like size).
pub(super) const GRAIN: usize = 128 * 1024;

/// Splits work in halves down to the grain. Where it is split depends on nothing but its size, and
/// so neither does the result.
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

/// The sums of the columns of some rows, or nothing where they are not asked for.
fn columns<E: Real>(sum: bool, width: usize) -> Vec<E> {
    vec![E::zero(); if sum { width } else { 0 }]
}

#[inline(always)]
fn add_up<E: Real>(sums: &mut [E], row: &[E]) {
    for (sum, &value) in sums.iter_mut().zip(row) {
        *sum = *sum + value;
    }
}

/// Writes `|x| |g|` of every row; returns the sum of the rows `g`.
pub(super) struct Score<'a, E> {
    pub(super) batch: Batch<'a, E>,
    pub(super) scores: &'a mut [E],
    /// Whether to add up the rows of the gradient.
    pub(super) sum: bool,
}

impl<E: Real> RowWork for Score<'_, E> {
    type Output = Vec<E>;

    fn rows(&self) -> usize {
        self.scores.len()
    }

    fn width(&self) -> usize {
        self.batch.width()
    }

    fn split_at(self, row: usize) -> (Self, Self) {
        let (first, second) = self.batch.split_at(row);
        let scores = self.scores.split_at_mut(row);
        let sum = self.sum;
        let work = |batch, scores| Self { batch, scores, sum };
        (work(first, scores.0), work(second, scores.1))
    }

    #[inline(always)]
    fn run(self) -> Vec<E> {
        let mut sums = columns(self.sum, self.batch.grad.width);
        for (row, score) in self.scores.iter_mut().enumerate() {
            let (x, g) = (self.batch.input.row(row), self.batch.grad.row(row));
            let size = square_sum(g).sqrt();
            // A row of zeros, as layers above leave behind, adds nothing whatever x is.
            *score = match size.is_zero() {
                true => E::zero(),
                false => square_sum(x).sqrt() * size,
            };
            // Also where the squares underflow: the gradient of the bias is exact.
            add_up(&mut sums, g);
        }
        sums
    }

    fn join(mut first: Vec<E>, second: Vec<E>) -> Vec<E> {
        add_up(&mut first, &second);
        first
    }
}

/// Writes the norm of every row.
pub(super) struct Norm<'a, E> {
    pub(super) rows: Rows<'a, E>,
    pub(super) norms: &'a mut [E],
}

impl<E: Real> RowWork for Norm<'_, E> {
    type Output = ();

    fn rows(&self) -> usize {
        self.norms.len()
    }

    fn width(&self) -> usize {
        self.rows.width
    }

    fn split_at(self, row: usize) -> (Self, Self) {
        let (first, second) = self.rows.split_at(row);
        let norms = self.norms.split_at_mut(row);
        let work = |rows, norms| Self { rows, norms };
        (work(first, norms.0), work(second, norms.1))
    }

    #[inline(always)]
    fn run(self) {
        for (row, norm) in self.norms.iter_mut().enumerate() {
            *norm = square_sum(self.rows.row(row)).sqrt();
        }
    }

    fn join((): (), (): ()) {}
}

/// Folds the batch into the memory, which then holds `x^` and `g^` times `decay`, and writes
/// `|x^| |g^|` of every row; returns the sum of the rows `g`.
pub(super) struct FoldIn<'a, E> {
    pub(super) batch: Batch<'a, E>,
    pub(super) input: RowsMut<'a, E>,
    pub(super) grad: RowsMut<'a, E>,
    pub(super) scores: &'a mut [E],
    pub(super) sum: bool,
    /// The position of the first of these rows in the batch.
    pub(super) first: usize,
    pub(super) balanced: bool,
    pub(super) noise: StepNoise,
    pub(super) decay: E,
}

impl<E: Real> RowWork for FoldIn<'_, E> {
    type Output = Vec<E>;

    fn rows(&self) -> usize {
        self.scores.len()
    }

    fn width(&self) -> usize {
        2 * self.batch.width()
    }

    fn split_at(self, row: usize) -> (Self, Self) {
        let batch = self.batch.split_at(row);
        let (input, grad) = (self.input.split_at(row), self.grad.split_at(row));
        let scores = self.scores.split_at_mut(row);
        let work = |batch, input, grad, scores, first| Self {
            batch,
            input,
            grad,
            scores,
            first,
            ..self
        };
        (
            work(batch.0, input.0, grad.0, scores.0, self.first),
            work(batch.1, input.1, grad.1, scores.1, self.first + row),
        )
    }

    #[inline(always)]
    fn run(mut self) -> Vec<E> {
        let mut sums = columns(self.sum, self.batch.grad.width);
        for row in 0..self.scores.len() {
            let (x, g) = (self.batch.input.row(row), self.batch.grad.row(row));
            let (a, b) = (self.input.row(row), self.grad.row(row));
            let (input_scale, grad_scale) = match self.balanced {
                false => (E::one(), E::one()),
                true => {
                    let sign = E::of(self.noise.sign(self.first + row));
                    let [x, a] = square_sums(x, a).map(E::sqrt);
                    let [g, b] = square_sums(g, b).map(E::sqrt);
                    balance([x, g], [a, b], sign)
                }
            };
            let input = add(a, x, input_scale, self.decay).sqrt();
            self.scores[row] = input * add(b, g, grad_scale, self.decay).sqrt();
            add_up(&mut sums, g);
        }
        sums
    }

    fn join(mut first: Vec<E>, second: Vec<E>) -> Vec<E> {
        add_up(&mut first, &second);
        first
    }
}

/// `s r` and `s / r` for a row, from the norms of the new pair and the kept one.
#[inline(always)]
fn balance<E: Real>([x, g]: [E; 2], [a, b]: [E; 2], sign: E) -> (E, E) {
    if x.is_zero() || g.is_zero() {
        return (E::zero(), E::zero());
    }
    if a.is_zero() || b.is_zero() {
        return (sign, sign);
    }
    // The root of each quotient, because the quotient of the products could overflow.
    let r = (a / x).sqrt() * (g / b).sqrt();
    (sign * r, sign / r)
}

/// Copies the chosen rows, scaled, to a panel of their own.
pub(super) struct Gather<'a, E> {
    pub(super) from: Rows<'a, E>,
    pub(super) rows: &'a [usize],
    pub(super) scales: &'a [E],
    pub(super) panel: &'a mut [E],
}

impl<E: Real> RowWork for Gather<'_, E> {
    type Output = ();

    fn rows(&self) -> usize {
        self.rows.len()
    }

    fn width(&self) -> usize {
        2 * self.from.width
    }

    fn split_at(self, row: usize) -> (Self, Self) {
        let (rows, scales) = (self.rows.split_at(row), self.scales.split_at(row));
        let panel = self.panel.split_at_mut(row * self.from.width);
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
        let panel = self.panel.chunks_exact_mut(self.from.width);
        for ((&row, &scale), to) in self.rows.iter().zip(self.scales).zip(panel) {
            for (to, &value) in to.iter_mut().zip(self.from.row(row)) {
                *to = scale * value;
            }
        }
    }

    fn join((): (), (): ()) {}
}

/// Moves rows, in ascending order, to a panel of their own, scaled, and leaves zeros.
pub(super) struct TakeOut<'a, E> {
    pub(super) from: RowsMut<'a, E>,
    /// The number of the first row of `from`.
    pub(super) first: usize,
    pub(super) rows: &'a [usize],
    pub(super) scale: E,
    pub(super) panel: &'a mut [E],
}

impl<E: Real> RowWork for TakeOut<'_, E> {
    type Output = ();

    fn rows(&self) -> usize {
        self.rows.len()
    }

    fn width(&self) -> usize {
        3 * self.from.width
    }

    fn split_at(self, index: usize) -> (Self, Self) {
        let (rows, row) = (self.rows.split_at(index), self.rows[index]);
        let width = self.from.width;
        let from = self.from.split_at(row - self.first);
        let panel = self.panel.split_at_mut(index * width);
        let work = |from, first, rows, panel| Self {
            from,
            first,
            rows,
            panel,
            ..self
        };
        (
            work(from.0, self.first, rows.0, panel.0),
            work(from.1, row, rows.1, panel.1),
        )
    }

    #[inline(always)]
    fn run(mut self) {
        let panel = self.panel.chunks_exact_mut(self.from.width);
        for (&row, to) in self.rows.iter().zip(panel) {
            let from = self.from.row(row - self.first);
            for (to, value) in to.iter_mut().zip(from) {
                *to = self.scale * *value;
                *value = E::zero();
            }
        }
    }

    fn join((): (), (): ()) {}
}

/// Copies the rows of a panel to places in a matrix, which are in ascending order.
pub(super) struct PutBack<'a, E> {
    pub(super) panel: Rows<'a, E>,
    pub(super) rows: &'a [usize],
    pub(super) to: RowsMut<'a, E>,
    /// The number of the first row of `to`.
    pub(super) first: usize,
}

impl<E: Real> RowWork for PutBack<'_, E> {
    type Output = ();

    fn rows(&self) -> usize {
        self.rows.len()
    }

    fn width(&self) -> usize {
        2 * self.to.width
    }

    fn split_at(self, index: usize) -> (Self, Self) {
        let (rows, row) = (self.rows.split_at(index), self.rows[index]);
        let panel = self.panel.split_at(index);
        let to = self.to.split_at(row - self.first);
        let work = |panel, rows, to, first| Self {
            panel,
            rows,
            to,
            first,
        };
        (
            work(panel.0, rows.0, to.0, self.first),
            work(panel.1, rows.1, to.1, row),
        )
    }

    #[inline(always)]
    fn run(mut self) {
        for (index, &row) in self.rows.iter().enumerate() {
            let to = self.to.row(row - self.first);
            to.copy_from_slice(self.panel.row(index));
        }
    }

    fn join((): (), (): ()) {}
}

/// Sums that are added up side by side: enough for the widest registers, and several of them.
pub(super) const LANES: usize = 32;

#[inline(always)]
pub(super) fn square_sum<E: Real>(row: &[E]) -> E {
    let mut sums = [E::zero(); LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            sums[lane] = sums[lane] + chunk[lane] * chunk[lane];
        }
    }
    total(sums) + rest.iter().fold(E::zero(), |sum, &v| sum + v * v)
}

/// The square sums of two rows of one width, in one pass over both.
#[inline(always)]
fn square_sums<E: Real>(first: &[E], second: &[E]) -> [E; 2] {
    let mut sums = [[E::zero(); LANES]; 2];
    let (first, first_rest) = first.as_chunks::<LANES>();
    let (second, second_rest) = second.as_chunks::<LANES>();
    for (first, second) in first.iter().zip(second) {
        for lane in 0..LANES {
            sums[0][lane] = sums[0][lane] + first[lane] * first[lane];
            sums[1][lane] = sums[1][lane] + second[lane] * second[lane];
        }
    }
    let [first, second] = sums.map(total);
    let rest = |rest: &[E]| rest.iter().fold(E::zero(), |sum, &v| sum + v * v);
    [first + rest(first_rest), second + rest(second_rest)]
}

/// `kept <- decay (kept + scale new)`; returns the square sum of what is in the brackets.
#[inline(always)]
fn add<E: Real>(kept: &mut [E], new: &[E], scale: E, decay: E) -> E {
    let mut sums = [E::zero(); LANES];
    let (kept, kept_rest) = kept.as_chunks_mut::<LANES>();
    let (new, new_rest) = new.as_chunks::<LANES>();
    for (kept, new) in kept.iter_mut().zip(new) {
        for lane in 0..LANES {
            let value = kept[lane] + scale * new[lane];
            sums[lane] = sums[lane] + value * value;
            kept[lane] = decay * value;
        }
    }
    let mut sum = total(sums);
    for (kept, &new) in kept_rest.iter_mut().zip(new_rest) {
        let value = *kept + scale * new;
        sum = sum + value * value;
        *kept = decay * value;
    }
    sum
}

/// In halves, so that the lanes stay in registers.
#[inline(always)]
pub(super) fn total<E: Real>(mut sums: [E; LANES]) -> E {
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for lane in 0..width {
            sums[lane] = sums[lane] + sums[lane + width];
        }
    }
    sums[0]
}
