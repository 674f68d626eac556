//! The approximate weight gradient on CPU backends that keep a matrix row by row in main memory:
//! the same result as the default body of `gradient.rs`, in one pass over batch and memory, which
//! is updated in place.

use burn::backend::{
    Backend, Element, TensorMetadata,
    tensor::{Device, FloatTensor},
};
use burn::tensor::TensorData;
use num_traits::Float;

use crate::{
    config::Memory,
    gradient,
    noise::StepNoise,
    ops::{AopStep, Bias, RowMemory, Share, WeightGradient},
    selection::{self, Selection},
};

/// Access to the values of a backend's tensors.
pub(crate) trait HostTensors<E>: Backend {
    /// Lays the values out row by row, without gaps, if they are not.
    fn contiguous(tensor: FloatTensor<Self>) -> FloatTensor<Self>;
    /// The values of a contiguous tensor.
    fn values(tensor: &FloatTensor<Self>) -> &[E];
    /// The values of a contiguous tensor; copies them first if another tensor shares them.
    fn values_mut(tensor: &mut FloatTensor<Self>) -> &mut [E];
}

fn from_values<B: Backend, E: Real>(
    values: Vec<E>,
    shape: [usize; 2],
    device: &Device<B>,
) -> FloatTensor<B> {
    B::float_from_data(TensorData::new(values, shape), device)
}

/// A memory that shrinks more than this from step to step is left to the default body: here the
/// chosen rows are read back from it after it has shrunk.
const LEAST_DECAY: f64 = 1e-6;

pub(crate) fn weight_gradient<B: HostTensors<E>, E: Real>(
    input: FloatTensor<B>,
    grad: FloatTensor<B>,
    memory: RowMemory<B>,
    step: AopStep,
) -> WeightGradient<B> {
    if step.memory.decay().is_some_and(|decay| decay < LEAST_DECAY) {
        return gradient::weight_gradient::<B>(input, grad, memory, step);
    }
    let device = input.device();
    let (input, grad) = (B::contiguous(input), B::contiguous(grad));
    let [rows, d_input] = input.shape().dims();
    let [_, d_output] = grad.shape().dims();
    let batch = Batch {
        input: Rows::new(B::values(&input), d_input),
        grad: Rows::new(B::values(&grad), d_output),
    };
    let mut scores = vec![E::zero(); rows];

    let (chosen, memory, sums) = match step.memory.decay() {
        None => {
            let sums = in_parallel(Score {
                batch,
                scores: &mut scores,
                sum: step.bias,
            });
            let selection = select(&scores, &step);
            let panels = gather(batch, &scores, &selection, 1.0);
            (Chosen { selection, panels }, RowMemory::Empty, sums)
        }
        Some(decay) => {
            let (kept_input, kept_grad) = match memory {
                RowMemory::Empty => (None, None),
                RowMemory::Rows { input, grad } => (Some(input), Some(grad)),
            };
            let mut kept_input = at_least::<B, E>(kept_input, rows, d_input, &device);
            let mut kept_grad = at_least::<B, E>(kept_grad, rows, d_output, &device);
            let (a, b) = (
                &mut B::values_mut(&mut kept_input)[..rows * d_input],
                &mut B::values_mut(&mut kept_grad)[..rows * d_output],
            );
            let sums = in_parallel(FoldIn {
                batch,
                input: RowsMut::new(a, d_input),
                grad: RowsMut::new(b, d_output),
                scores: &mut scores,
                sum: step.bias,
                first: 0,
                balanced: matches!(step.memory, Memory::Balanced { .. }),
                noise: StepNoise {
                    seed: step.seed,
                    step: step.step,
                },
                decay: E::of(decay.sqrt()),
            });
            let selection = select(&scores, &step);
            let folded = Batch {
                input: Rows::new(a, d_input),
                grad: Rows::new(b, d_output),
            };
            let panels = gather(folded, &scores, &selection, 1.0 / decay.sqrt());
            let mut cleared: Vec<_> = scores.iter().map(|score| !score.is_finite()).collect();
            selection.rows.iter().for_each(|&row| cleared[row] = true);
            for rows in [RowsMut::new(a, d_input), RowsMut::new(b, d_output)] {
                in_parallel(Clear {
                    rows,
                    cleared: &cleared,
                });
            }
            let memory = RowMemory::Rows {
                input: kept_input,
                grad: kept_grad,
            };
            (Chosen { selection, panels }, memory, sums)
        }
    };

    let k = chosen.selection.rows.len();
    let [panel_input, panel_grad] = chosen.panels;
    let share = match step.measure {
        true => {
            let share = share(&scores, &chosen.selection) as f32;
            let data = TensorData::new(vec![share], [1]);
            Share::Measured(B::float_from_data(data, &device))
        }
        false => Share::Skipped,
    };
    WeightGradient {
        weight: B::linear_weight_backward(
            from_values::<B, E>(panel_input, [k, d_input], &device),
            from_values::<B, E>(panel_grad, [k, d_output], &device),
        ),
        memory,
        bias: match step.bias {
            true => {
                let data = TensorData::new(sums, [d_output]);
                Bias::Some(B::float_from_data(data, &device))
            }
            false => Bias::None,
        },
        share,
    }
}

/// The chosen rows: which they are, and their two factors, contiguous.
struct Chosen<E> {
    selection: Selection,
    panels: [Vec<E>; 2],
}

/// The memory as a contiguous matrix of type `E` with at least `rows` rows, new ones being zero.
fn at_least<B: HostTensors<E>, E: Real>(
    memory: Option<FloatTensor<B>>,
    rows: usize,
    width: usize,
    device: &Device<B>,
) -> FloatTensor<B> {
    let mut values = match memory {
        None => Vec::new(),
        Some(memory) => {
            // A layer can have been cast since its last step.
            let memory = match memory.dtype() == E::dtype() {
                true => B::contiguous(memory),
                false => B::contiguous(B::float_cast(memory, E::dtype().into())),
            };
            if memory.shape()[0] >= rows {
                return memory;
            }
            B::values(&memory).to_vec()
        }
    };
    values.resize(rows * width, E::zero());
    from_values::<B, E>(values, [rows, width], device)
}

fn select<E: Real>(scores: &[E], step: &AopStep) -> Selection {
    let read = || scores.iter().map(|&score| score.into()).collect();
    selection::select(scores.len(), step, read)
}

/// The two factors of the chosen rows times `scale` and the root of their weights; zeros in place
/// of a row whose score is not finite.
fn gather<E: Real>(
    from: Batch<'_, E>,
    scores: &[E],
    selection: &Selection,
    scale: f64,
) -> [Vec<E>; 2] {
    let scales: Vec<E> = match &selection.weights {
        None => vec![E::of(scale); selection.rows.len()],
        Some(weights) => weights.iter().map(|w| E::of(scale * w.sqrt())).collect(),
    };
    [from.input, from.grad].map(|from| {
        let mut panel = vec![E::zero(); selection.rows.len() * from.width];
        in_parallel(Gather {
            from,
            scores,
            rows: &selection.rows,
            scales: &scales,
            panel: &mut panel,
        });
        panel
    })
}

fn share<E: Real>(scores: &[E], selection: &Selection) -> f64 {
    let finite = |score: E| -> f64 {
        match score.is_finite() {
            true => score.into(),
            false => 0.0,
        }
    };
    // A draw with replacement can hold a row twice.
    let mut chosen = selection.rows.clone();
    chosen.sort_unstable();
    chosen.dedup();
    let carried: f64 = chosen.iter().map(|&row| finite(scores[row])).sum();
    carried / scores.iter().map(|&score| finite(score)).sum::<f64>()
}

/// A floating-point type in which memory and scores are kept.
pub(crate) trait Real: Element + Float + Into<f64> {
    fn of(value: f64) -> Self;
}

impl Real for f32 {
    fn of(value: f64) -> Self {
        value as f32
    }
}

impl Real for f64 {
    fn of(value: f64) -> Self {
        value
    }
}

/// Rows of `width` values.
#[derive(Clone, Copy)]
struct Rows<'a, E> {
    values: &'a [E],
    width: usize,
}

impl<'a, E> Rows<'a, E> {
    fn new(values: &'a [E], width: usize) -> Self {
        Self { values, width }
    }

    fn row(&self, row: usize) -> &'a [E] {
        &self.values[row * self.width..][..self.width]
    }

    fn split_at(self, row: usize) -> (Self, Self) {
        let (first, second) = self.values.split_at(row * self.width);
        (Self::new(first, self.width), Self::new(second, self.width))
    }
}

struct RowsMut<'a, E> {
    values: &'a mut [E],
    width: usize,
}

impl<'a, E> RowsMut<'a, E> {
    fn new(values: &'a mut [E], width: usize) -> Self {
        Self { values, width }
    }

    fn row(&mut self, row: usize) -> &mut [E] {
        &mut self.values[row * self.width..][..self.width]
    }

    fn split_at(self, row: usize) -> (Self, Self) {
        let (first, second) = self.values.split_at_mut(row * self.width);
        (Self::new(first, self.width), Self::new(second, self.width))
    }
}

#[derive(Clone, Copy)]
struct Batch<'a, E> {
    input: Rows<'a, E>,
    grad: Rows<'a, E>,
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
trait RowWork: Sized + Send {
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
const GRAIN: usize = 128 * 1024;

/// Splits work in halves down to the grain. Where it is split depends on nothing but its size, and
/// so neither does the result.
fn in_parallel<W: RowWork>(work: W) -> W::Output {
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
struct Score<'a, E> {
    batch: Batch<'a, E>,
    scores: &'a mut [E],
    /// Whether to add up the rows of the gradient.
    sum: bool,
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
            *score = square_sum(x).sqrt() * square_sum(g).sqrt();
            add_up(&mut sums, g);
        }
        sums
    }

    fn join(mut first: Vec<E>, second: Vec<E>) -> Vec<E> {
        add_up(&mut first, &second);
        first
    }
}

/// Folds the batch into the memory, which then holds `x^` and `g^` times `decay`, and writes
/// `|x^| |g^|` of every row; returns the sum of the rows `g`.
struct FoldIn<'a, E> {
    batch: Batch<'a, E>,
    input: RowsMut<'a, E>,
    grad: RowsMut<'a, E>,
    scores: &'a mut [E],
    sum: bool,
    /// The position of the first of these rows in the batch.
    first: usize,
    balanced: bool,
    noise: StepNoise,
    decay: E,
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
struct Gather<'a, E> {
    from: Rows<'a, E>,
    scores: &'a [E],
    rows: &'a [usize],
    scales: &'a [E],
    panel: &'a mut [E],
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
            if self.scores[row].is_finite() {
                for (to, &value) in to.iter_mut().zip(self.from.row(row)) {
                    *to = scale * value;
                }
            }
        }
    }

    fn join((): (), (): ()) {}
}

/// Fills rows with zeros.
struct Clear<'a, E> {
    rows: RowsMut<'a, E>,
    cleared: &'a [bool],
}

impl<E: Real> RowWork for Clear<'_, E> {
    type Output = ();

    fn rows(&self) -> usize {
        self.cleared.len()
    }

    fn width(&self) -> usize {
        self.rows.width
    }

    fn split_at(self, row: usize) -> (Self, Self) {
        let (rows, cleared) = (self.rows.split_at(row), self.cleared.split_at(row));
        let work = |rows, cleared| Self { rows, cleared };
        (work(rows.0, cleared.0), work(rows.1, cleared.1))
    }

    #[inline(always)]
    fn run(mut self) {
        for (row, _) in self
            .cleared
            .iter()
            .enumerate()
            .filter(|(_, cleared)| **cleared)
        {
            self.rows.row(row).fill(E::zero());
        }
    }

    fn join((): (), (): ()) {}
}

/// Sums that are added up side by side: enough for the widest registers, and several of them.
const LANES: usize = 32;

#[inline(always)]
fn square_sum<E: Real>(row: &[E]) -> E {
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

#[inline(always)]
fn total<E: Real>(sums: [E; LANES]) -> E {
    sums.into_iter().fold(E::zero(), |sum, lane| sum + lane)
}
