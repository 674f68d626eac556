//! The approximate weight gradient on CPU backends that keep a matrix row by row in main memory:
//! the same result as the default body of `portable.rs`, in one pass over batch and memory, which
//! is updated in place.

use burn::backend::{
    Backend, TensorMetadata,
    tensor::{Device, FloatTensor, IntTensor},
};
use burn::tensor::TensorData;

pub(crate) mod convolution;
mod gelu;
mod images;
mod packed;
mod positions;
mod rows;

use self::{
    gelu::WithInput,
    packed::{Pack, Times, Unpack},
    rows::{
        Batch, FoldIn, Gather, Norm, PutBack, Real, Rows, RowsMut, Score, TakeOut, in_parallel,
    },
};
use crate::{
    config::Memory,
    op::noise::StepNoise,
    op::packing::Packing,
    op::portable::{self, LEAST_DECAY},
    op::selection::{self, Selection},
    op::step::{
        AopStep, Bias, Input, InputStep, NoiseStep, Packed, RowMemory, Share, WeightGradient,
    },
};

/// Access to the values of a backend's tensors.
pub(crate) trait HostTensors<E>: Backend {
    /// Lays the values out row by row, without gaps, if they are not.
    fn contiguous(tensor: FloatTensor<Self>) -> FloatTensor<Self>;
    /// The values of a contiguous tensor.
    fn values(tensor: &FloatTensor<Self>) -> &[E];
    /// The values of a contiguous tensor; copies them first if another tensor shares them.
    fn values_mut(tensor: &mut FloatTensor<Self>) -> &mut [E];
    /// The values of a contiguous tensor of 32-bit integers.
    fn words(tensor: &IntTensor<Self>) -> &[i32];
}

fn from_values<B: Backend, E: Real>(
    values: Vec<E>,
    shape: [usize; 2],
    device: &Device<B>,
) -> FloatTensor<B> {
    B::float_from_data(TensorData::new(values, shape), device)
}

pub(crate) fn weight_gradient<B: HostTensors<E>, E: Real>(
    input: Input<B>,
    grad: FloatTensor<B>,
    memory: RowMemory<B>,
    step: AopStep,
) -> WeightGradient<B> {
    let decay = step.method.memory().decay();
    if decay.is_some_and(|decay| decay < LEAST_DECAY) {
        return portable::weight_gradient::<B>(input, grad, memory, step);
    }
    let device = grad.device();
    let d_input = input.width();
    let input = match (input, decay) {
        // Every row goes into a memory.
        (Input::Packed(packed), Some(_)) => Input::Full(unpack::<B, E>(&packed)),
        (Input::Full(input), _) => Input::Full(B::contiguous(input)),
        (packed, None) => packed,
    };
    let grad = B::contiguous(grad);
    let [rows, d_output] = grad.shape().dims();
    let batch = Batch {
        input: match &input {
            Input::Full(input) => Rows::new(B::values(input), d_input),
            // For the scores; a norm is its own.
            Input::Packed(packed) => Rows::new(B::values(&packed.norms), 1),
        },
        grad: Rows::new(B::values(&grad), d_output),
    };
    let mut scores = vec![E::zero(); rows];
    let (chosen, memory) = match decay {
        None => {
            let input = match &input {
                Input::Full(_) => Factor::Full(batch.input),
                Input::Packed(packed) => Factor::packed::<B>(packed),
            };
            let chosen = choose(batch, input, &mut scores, &step);
            (chosen, RowMemory::Empty)
        }
        Some(decay) => {
            let mut kept = Kept::<B>::of(memory, batch, &device);
            let (input, grad) = (
                B::values_mut(&mut kept.input),
                B::values_mut(&mut kept.grad),
            );
            let kept_rows = [
                &mut input[..rows * d_input],
                &mut grad[..rows * d_output],
                &mut B::values_mut(&mut kept.age)[..rows],
            ];
            let chosen = choose_and_keep(batch, kept_rows, decay, &mut scores, &step);
            (chosen, kept.into_memory())
        }
    };

    let panel = |values: Vec<E>, width: usize| {
        let rows = values.len() / width;
        from_values::<B, E>(values, [rows, width], &device)
    };
    let vector = |values: Vec<E>| {
        let data = TensorData::new(values, [d_output]);
        B::float_from_data(data, &device)
    };
    WeightGradient {
        weight: B::linear_weight_backward(
            panel(chosen.input, d_input),
            panel(chosen.grad, d_output),
        ),
        memory,
        bias: match step.bias {
            true => Bias::Some(vector(chosen.sums)),
            false => Bias::None,
        },
        share: match step.measure {
            true => {
                let share = share(&scores, &chosen.selection) as f32;
                let data = TensorData::new(vec![share], [1]);
                Share::Measured(B::float_from_data(data, &device))
            }
            false => Share::Skipped,
        },
    }
}

/// What a pass over the batch makes of it.
struct Chosen<E> {
    selection: Selection,
    /// The two factors of the chosen outer products, contiguous and with weights, without those that add
    /// nothing: rows whose score is zero or not finite. At least one row, if only of zeros, for the product.
    input: Vec<E>,
    grad: Vec<E>,
    /// The sums of the columns of the gradient, if they are asked for.
    sums: Vec<E>,
}

/// Where the rows of a factor are copied from.
#[derive(Clone, Copy)]
enum Factor<'a, E> {
    Full(Rows<'a, E>),
    Packed {
        words: Rows<'a, i32>,
        packing: Packing,
    },
}

impl<'a, E: Real> Factor<'a, E> {
    fn packed<B: HostTensors<E>>(packed: &'a Packed<B>) -> Self {
        let packing = packed.packing;
        Self::Packed {
            words: Rows::new(B::words(&packed.words), packing.words()),
            packing,
        }
    }

    /// These rows, each times its scale, one after the other.
    fn copied(self, rows: &[usize], scales: &[E]) -> Vec<E> {
        let width = match self {
            Self::Full(from) => from.width,
            Self::Packed { packing, .. } => packing.width,
        };
        let mut copied = panel(rows.len(), width);
        let panel = &mut copied[..rows.len() * width];
        match self {
            Self::Full(from) => in_parallel(Gather {
                from,
                rows,
                scales,
                panel,
            }),
            Self::Packed { words, packing } => in_parallel(Unpack {
                words,
                packing,
                rows,
                scales,
                panel,
            }),
        }
        copied
    }
}

/// Scores the rows and copies the chosen ones, those of the input from `input`.
fn choose<E: Real>(
    batch: Batch<'_, E>,
    input: Factor<'_, E>,
    scores: &mut [E],
    step: &AopStep,
) -> Chosen<E> {
    let sums = in_parallel(Score {
        batch,
        scores,
        sum: step.bias,
    });
    let selection = select(scores, step);
    let weight = |index: usize| match &selection.weights {
        None => E::one(),
        Some(weights) => E::of(weights[index].sqrt()),
    };
    let chosen = selection.rows.iter().enumerate();
    let chosen = chosen.filter(|&(_, &row)| adds(scores[row]));
    let (rows, scales): (Vec<_>, Vec<_>) = chosen.map(|(i, &row)| (row, weight(i))).unzip();
    Chosen {
        input: input.copied(&rows, &scales),
        grad: Factor::Full(batch.grad).copied(&rows, &scales),
        sums,
        selection,
    }
}

/// Folds the batch into the memory (`m^X`, `m^G`, ages), scores the rows and takes the chosen ones out.
fn choose_and_keep<E: Real>(
    batch: Batch<'_, E>,
    [input, grad, age]: [&mut [E]; 3],
    decay: f64,
    scores: &mut [E],
    step: &AopStep,
) -> Chosen<E> {
    let (d_input, d_output) = (batch.input.width, batch.grad.width);
    let sums = in_parallel(FoldIn {
        batch,
        input: RowsMut::new(input, d_input),
        grad: RowsMut::new(grad, d_output),
        scores,
        sum: step.bias,
        first: 0,
        balanced: matches!(step.method.memory(), Memory::Balanced { .. }),
        noise: StepNoise {
            seed: step.seed,
            step: step.step,
        },
        decay: E::of(decay.sqrt()),
    });
    let selection = select(scores, step);

    age.iter_mut().for_each(|age| *age = *age + E::one());
    // Broken rows, and chosen ones that add nothing, are dropped.
    let broken = (0..scores.len()).filter(|&row| !scores[row].is_finite());
    let idle = selection.rows.iter().copied();
    let idle = idle.filter(|&row| !adds(scores[row]));
    for row in broken.chain(idle) {
        RowsMut::new(input, d_input).row(row).fill(E::zero());
        RowsMut::new(grad, d_output).row(row).fill(E::zero());
        age[row] = E::zero();
    }
    let rows = selection.rows.iter().copied();
    let rows: Vec<_> = rows.filter(|&row| adds(scores[row])).collect();
    rows.iter().for_each(|&row| age[row] = E::zero());
    let taken = |from: &mut [E], width: usize| {
        let mut panel = panel(rows.len(), width);
        in_parallel(TakeOut {
            from: RowsMut::new(from, width),
            first: 0,
            rows: &rows,
            // The memory has shrunk already.
            scale: E::of(1.0 / decay.sqrt()),
            panel: &mut panel[..rows.len() * width],
        });
        panel
    };
    Chosen {
        input: taken(input, d_input),
        grad: taken(grad, d_output),
        sums,
        selection,
    }
}

/// Whether an outer product of this score is more than zeros, and finite.
fn adds<E: Real>(score: E) -> bool {
    score.is_finite() && !score.is_zero()
}

fn panel<E: Real>(rows: usize, width: usize) -> Vec<E> {
    vec![E::zero(); rows.max(1) * width]
}

/// The memory as contiguous matrices with at least as many rows as the batch.
struct Kept<B: Backend> {
    input: FloatTensor<B>,
    grad: FloatTensor<B>,
    age: FloatTensor<B>,
}

impl<B: Backend> Kept<B> {
    fn of<E: Real>(memory: RowMemory<B>, batch: Batch<'_, E>, device: &Device<B>) -> Self
    where
        B: HostTensors<E>,
    {
        let (input, grad, age) = match memory {
            RowMemory::Empty => (None, None, None),
            RowMemory::Rows { input, grad, age } => (Some(input), Some(grad), Some(age)),
        };
        let rows = batch.input.values.len() / batch.input.width;
        Self {
            input: at_least::<B, E>(input, rows, batch.input.width, device),
            grad: at_least::<B, E>(grad, rows, batch.grad.width, device),
            age: at_least::<B, E>(age, rows, 1, device),
        }
    }

    fn into_memory(self) -> RowMemory<B> {
        RowMemory::Rows {
            input: self.input,
            grad: self.grad,
            age: self.age,
        }
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
    let panel = Factor::Full(values).copied(&chosen.rows, &scales);
    let panel = from_values::<B, E>(panel, [chosen.rows.len(), d_output], &device);
    let product = B::contiguous(B::float_matmul(panel, B::float_transpose(weight)));

    let mut gradient = vec![E::zero(); rows * d_input];
    in_parallel(PutBack {
        panel: Rows::new(B::values(&product), d_input),
        rows: &chosen.rows,
        to: RowsMut::new(&mut gradient, d_input),
        first: 0,
    });
    from_values::<B, E>(gradient, [rows, d_input], &device)
}

/// The same result as the default body.
pub(crate) fn noise<B: HostTensors<E>, E: Real>(
    input: Input<B>,
    grad: FloatTensor<B>,
    gradient: FloatTensor<B>,
    step: NoiseStep,
) -> FloatTensor<B> {
    let input = match input {
        Input::Full(input) => input,
        // A norm is its own.
        Input::Packed(packed) => packed.norms,
    };
    let [input, grad] = [input, grad].map(B::contiguous);
    let rows = |tensor| {
        let [_, width] = TensorMetadata::shape(tensor).dims();
        Rows::new(B::values(tensor), width)
    };
    let mut scores = vec![E::zero(); grad.shape()[0]];
    in_parallel(Score {
        batch: Batch {
            input: rows(&input),
            grad: rows(&grad),
        },
        scores: &mut scores,
        sum: false,
    });
    figures::<B, E>(scores, gradient, &step)
}

/// What is measured of a gradient, by the scores of its rows.
fn figures<B: HostTensors<E>, E: Real>(
    scores: Vec<E>,
    gradient: FloatTensor<B>,
    step: &NoiseStep,
) -> FloatTensor<B> {
    let device = gradient.device();
    let gradient = B::contiguous(gradient);
    let [rows, width] = gradient.shape().dims();
    let mut norms = vec![E::zero(); rows];
    in_parallel(Norm {
        rows: Rows::new(B::values(&gradient), width),
        norms: &mut norms,
    });
    let squares = norms.iter().map(|&norm| {
        let norm: f64 = norm.into();
        norm * norm
    });
    let norm = squares.sum::<f64>().sqrt();
    let scores = scores.iter().map(|&score| score.into()).collect();
    let noise = selection::noise(scores, step);
    let figures: Vec<_> = std::iter::once(norm)
        .chain(noise)
        .map(|root| root as f32)
        .collect();
    let shape = [figures.len()];
    B::float_from_data(TensorData::new(figures, shape), &device)
}

/// The same result as the default body.
pub(crate) fn pack<B: HostTensors<E>, E: Real>(
    input: FloatTensor<B>,
    packing: Packing,
    noise: Option<StepNoise>,
) -> Packed<B> {
    pack_of::<B, E>(input, E::single, packing, noise)
}

/// Packs a function of the values.
fn pack_of<B: HostTensors<E>, E: Real>(
    input: FloatTensor<B>,
    function: impl Fn(E) -> f32 + Copy + Send,
    packing: Packing,
    noise: Option<StepNoise>,
) -> Packed<B> {
    let device = input.device();
    let input = B::contiguous(input);
    let [rows, width] = input.shape().dims();
    let mut words = vec![0; rows * packing.words()];
    let mut norms = vec![E::zero(); rows];
    in_parallel(Pack {
        rows: Rows::new(B::values(&input), width),
        function,
        packing,
        noise,
        first: 0,
        words: RowsMut::new(&mut words, packing.words()),
        norms: &mut norms,
    });
    Packed {
        words: B::int_from_data(TensorData::new(words, [rows, packing.words()]), &device),
        norms: from_values::<B, E>(norms, [rows, 1], &device),
        packing,
    }
}

/// The same result as the default body, in the type of the norms.
pub(crate) fn unpack<B: HostTensors<E>, E: Real>(packed: &Packed<B>) -> FloatTensor<B> {
    let shape = [packed.norms.shape()[0], packed.packing.width];
    let rows: Vec<_> = (0..shape[0]).collect();
    let values = Factor::packed::<B>(packed).copied(&rows, &vec![E::one(); shape[0]]);
    from_values::<B, E>(values, shape, &packed.norms.device())
}

/// The same result as the default body.
pub(crate) fn times<B: HostTensors<E>, E: Real>(
    packed: Packed<B>,
    values: FloatTensor<B>,
) -> FloatTensor<B> {
    let packing = packed.packing;
    let mut values = B::contiguous(values);
    in_parallel(Times {
        words: Rows::new(B::words(&packed.words), packing.words()),
        packing,
        values: RowsMut::new(B::values_mut(&mut values), packing.width),
    });
    values
}

/// Burn's function, to 1e-6.
pub(crate) fn gelu<B: HostTensors<f32>>(input: FloatTensor<B>) -> FloatTensor<B> {
    let device = input.device();
    let input = B::contiguous(input);
    let [rows, width] = input.shape().dims();
    let mut output = vec![0.0; rows * width];
    in_parallel(WithInput {
        input: Rows::new(B::values(&input), width),
        values: RowsMut::new(&mut output, width),
        function: |x, _| gelu::gelu(x),
    });
    from_values::<B, f32>(output, [rows, width], &device)
}

/// Burn's function, to 1e-6.
pub(crate) fn gelu_backward<B: HostTensors<f32>>(
    input: FloatTensor<B>,
    grad: FloatTensor<B>,
) -> FloatTensor<B> {
    let (input, mut grad) = (B::contiguous(input), B::contiguous(grad));
    let [_, width] = input.shape().dims();
    in_parallel(WithInput {
        input: Rows::new(B::values(&input), width),
        values: RowsMut::new(B::values_mut(&mut grad), width),
        function: |x, grad| grad * gelu::derivative(x),
    });
    grad
}

/// As the default body, to rounding, but that the norms are of the input: no one reads them.
pub(crate) fn gelu_derivative<B: HostTensors<f32>>(
    input: FloatTensor<B>,
    packing: Packing,
    noise: StepNoise,
) -> Packed<B> {
    pack_of::<B, f32>(input, gelu::derivative, packing, Some(noise))
}

/// Whether the product of some of the rows is worth copying them to a panel and back.
fn pays_to_gather(some: usize, rows: usize) -> bool {
    4 * some <= 3 * rows
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
