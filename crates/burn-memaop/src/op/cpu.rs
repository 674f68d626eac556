//! The approximate weight gradient on CPU backends that keep a matrix row by row in main memory:
//! the same result as the default body of `portable.rs`, in one pass over batch and memory, which
//! is updated in place.

use burn::backend::{
    Backend, TensorMetadata,
    tensor::{Device, FloatTensor},
};
use burn::tensor::TensorData;

mod rows;

use self::rows::{Batch, Clear, FoldIn, Gather, Norm, Real, Rows, RowsMut, Score, in_parallel};
use crate::{
    config::{Memory, MemoryPrecision},
    op::noise::StepNoise,
    op::portable::{self, LEAST_DECAY},
    op::selection::{self, Selection},
    op::step::{AopStep, Bias, InputStep, RowMemory, Share, WeightGradient},
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

pub(crate) fn weight_gradient<B: HostTensors<E>, E: Real>(
    input: FloatTensor<B>,
    grad: FloatTensor<B>,
    memory: RowMemory<B>,
    step: AopStep,
) -> WeightGradient<B> {
    let full = step.memory_precision == MemoryPrecision::Full;
    if step
        .memory
        .decay()
        .is_some_and(|decay| decay < LEAST_DECAY || !full)
    {
        return portable::weight_gradient::<B>(input, grad, memory, step);
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
            let (kept_input, kept_grad, age) = match memory {
                RowMemory::Empty => (None, None, None),
                RowMemory::Rows { input, grad, age } => (Some(input), Some(grad), Some(age)),
            };
            let mut kept_input = at_least::<B, E>(kept_input, rows, d_input, &device);
            let mut kept_grad = at_least::<B, E>(kept_grad, rows, d_output, &device);
            let mut age = at_least::<B, E>(age, rows, 1, &device);
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
            for (age, &cleared) in B::values_mut(&mut age).iter_mut().zip(&cleared) {
                *age = if cleared { E::zero() } else { *age + E::one() };
            }
            for rows in [RowsMut::new(a, d_input), RowsMut::new(b, d_output)] {
                in_parallel(Clear {
                    rows,
                    cleared: &cleared,
                });
            }
            let memory = RowMemory::Rows {
                input: kept_input,
                grad: kept_grad,
                age,
            };
            (Chosen { selection, panels }, memory, sums)
        }
    };

    let Panels { k, input, grad } = chosen.panels;
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
            from_values::<B, E>(input, [k, d_input], &device),
            from_values::<B, E>(grad, [k, d_output], &device),
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

/// The same result as the default body: a pass over the gradient, the product of the chosen rows,
/// and their places in a matrix of zeros.
///
/// A row of zeros takes no part in the product even if all rows are asked for: layers above this one
/// that compute some of the rows leave the others as zeros.
pub(crate) fn input_gradient<B: HostTensors<E>, E: Real>(
    grad: FloatTensor<B>,
    weight: FloatTensor<B>,
    step: InputStep,
) -> FloatTensor<B> {
    let device = grad.device();
    let grad = B::contiguous(grad);
    let [rows, d_output] = grad.shape().dims();
    let d_input = weight.shape()[0];
    let values = Rows::new(B::values(&grad), d_output);

    let chosen = match step.k >= rows {
        true => Selection::unweighted(values.not_zero()),
        false => {
            let mut sizes = vec![E::zero(); rows];
            in_parallel(Norm {
                rows: values,
                norms: &mut sizes,
            });
            let read = sizes.iter().map(|&size| size.into()).collect();
            selection::select_input(read, &step)
        }
    };
    if chosen.rows.is_empty() {
        return from_values::<B, E>(vec![E::zero(); rows * d_input], [rows, d_input], &device);
    }
    if step.k >= rows && !pays_to_gather(chosen.rows.len(), rows) {
        return portable::exact_input_gradient::<B>(grad, weight);
    }
    let scales: Vec<_> = match &chosen.weights {
        None => vec![E::one(); chosen.rows.len()],
        Some(weights) => weights.iter().copied().map(E::of).collect(),
    };
    let mut panel = vec![E::zero(); chosen.rows.len() * d_output];
    in_parallel(Gather {
        from: values,
        rows: &chosen.rows,
        scales: &scales,
        panel: &mut panel,
    });
    let panel = from_values::<B, E>(panel, [chosen.rows.len(), d_output], &device);
    let product = B::contiguous(B::float_matmul(panel, B::float_transpose(weight)));

    let mut gradient = vec![E::zero(); rows * d_input];
    let product = B::values(&product).chunks_exact(d_input);
    for (&row, values) in chosen.rows.iter().zip(product) {
        gradient[row * d_input..][..d_input].copy_from_slice(values);
    }
    from_values::<B, E>(gradient, [rows, d_input], &device)
}

/// Whether the product of some of the rows is worth copying them to a panel and back.
fn pays_to_gather(some: usize, rows: usize) -> bool {
    4 * some <= 3 * rows
}

/// The chosen rows: which they are, and what they add to the gradient.
struct Chosen<E> {
    selection: Selection,
    panels: Panels<E>,
}

/// The two factors of `k` outer products, contiguous.
struct Panels<E> {
    k: usize,
    input: Vec<E>,
    grad: Vec<E>,
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

/// The two factors of the chosen rows times `scale` and the root of their weights, without the rows
/// that add nothing: those whose score is zero or not finite.
fn gather<E: Real>(
    from: Batch<'_, E>,
    scores: &[E],
    selection: &Selection,
    scale: f64,
) -> Panels<E> {
    let adds = |row: usize| scores[row].is_finite() && !scores[row].is_zero();
    let weight = |index: usize| match &selection.weights {
        None => E::of(scale),
        Some(weights) => E::of(scale * weights[index].sqrt()),
    };
    let chosen = selection.rows.iter().enumerate();
    let chosen = chosen.filter(|&(_, &row)| adds(row));
    let (rows, scales): (Vec<_>, Vec<_>) = chosen.map(|(i, &row)| (row, weight(i))).unzip();
    // A product needs a row, if only one of zeros.
    let k = rows.len().max(1);
    let panel = |from: Rows<'_, E>| {
        let mut panel = vec![E::zero(); k * from.width];
        in_parallel(Gather {
            from,
            rows: &rows,
            scales: &scales,
            panel: &mut panel[..rows.len() * from.width],
        });
        panel
    };
    Panels {
        k,
        input: panel(from.input),
        grad: panel(from.grad),
    }
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
