//! What a layer does in one backward pass, with the state that it keeps between steps.

use std::{mem, sync::Arc};

use burn::backend::{
    Backend, BackendTensor, DispatchKindConversion, DispatchTensor, TensorMetadata,
    tensor::FloatTensor,
};
use burn::tensor::{Shape, Tensor};

use super::{
    MemAopOps,
    step::{AopStep, Bias, Input, InputStep, NoiseStep, RowMemory, Share, WeightGradient},
    window::Window,
};
use crate::{
    config::{AopConfig, InputGradient, Memory, OuterProducts},
    state::{
        learning_rate::{self, SharedLearningRate},
        measurement::Measurement,
        memory::{Carried, MemoryHandle, MemoryState},
        noise_scale::{FIGURES, Shares, StepTime, measured_ks},
        reading::Reading,
        rows::RowTensors,
        schedule::{self, Progress},
        watch::Seen,
    },
};

/// What stands beside the gradient of the output in the sum of outer products.
#[derive(Debug, Clone)]
pub(super) enum Factor<B: Backend> {
    Linear(Input<B>),
    /// Images, whose patches are the rows.
    Convolution(FloatTensor<B>, Window),
}

impl<B: MemAopOps> Factor<B> {
    /// Shape `[d_input, d_output]`; of a convolution `[channels, patch]`.
    pub(super) fn exact_gradient(self, grad: FloatTensor<B>) -> FloatTensor<B> {
        let input = match self {
            Self::Linear(Input::Full(input)) => input,
            Self::Linear(Input::Packed(packed)) => B::memaop_unpack(packed, grad.dtype().into()),
            Self::Convolution(images, window) => {
                return B::memaop_convolve_exact_gradient(images, grad, window);
            }
        };
        B::linear_weight_backward(input, grad)
    }

    fn gradient(
        self,
        grad: FloatTensor<B>,
        memory: RowMemory<B>,
        step: AopStep,
    ) -> WeightGradient<B> {
        match self {
            Self::Linear(input) => B::memaop_weight_gradient(input, grad, memory, step),
            Self::Convolution(images, window) => {
                B::memaop_convolve_weight_gradient(images, grad, window, step)
            }
        }
    }

    fn noise(
        self,
        grad: FloatTensor<B>,
        gradient: FloatTensor<B>,
        step: NoiseStep,
    ) -> FloatTensor<B> {
        match self {
            Self::Linear(input) => B::memaop_noise(input, grad, gradient, step),
            Self::Convolution(images, window) => {
                B::memaop_convolve_noise(images, grad, gradient, window, step)
            }
        }
    }
}

/// One backward pass of a layer.
pub(super) struct LayerStep<'a> {
    pub(super) config: &'a AopConfig,
    pub(super) time: StepTime,
    /// Of the noise of the layer.
    pub(super) key: u64,
    pub(super) rows: usize,
    /// Of the gradient of the input, where it is asked for.
    pub(super) input_rows: Option<usize>,
    pub(super) with_bias: bool,
}

impl LayerStep<'_> {
    pub(super) fn input_gradient<B: MemAopOps>(
        &self,
        grad: FloatTensor<B>,
        weight: FloatTensor<B>,
        step: u64,
    ) -> FloatTensor<B> {
        let step = InputStep {
            k: self.input_rows.unwrap_or(self.rows),
            sampled: matches!(
                self.config.input_gradient,
                InputGradient::Sampled { .. } | InputGradient::Auto
            ),
            seed: self.key,
            step,
        };
        B::memaop_input_gradient(grad, weight, step)
    }

    /// The gradient of the weight, with the memory that is taken out of the state and put back. The gradient
    /// of the bias comes along where the pass over the batch has it at hand.
    ///
    /// The state is not locked while the gradient is computed: on CPUs that runs on a pool of threads, which may
    /// take up other work of their owner meanwhile, a backward pass of the same layer too.
    pub(super) fn weight_gradient<B>(
        &self,
        input: Factor<B>,
        grad: FloatTensor<B>,
        memory: &MemoryHandle,
    ) -> (FloatTensor<B>, Bias<B>)
    where
        B: MemAopOps,
        DispatchTensor: DispatchKindConversion<B>,
    {
        let measures = self.choose(memory);
        if measures && self.chooses_input_rows() {
            let reading = self.measure_input::<B>(&grad);
            memory.lock().input_reading = Some(reading);
        }
        let adapts = self.adapts(memory);
        let mut state = memory.lock();
        let intervals = state.watch.intervals;
        let due = intervals.and_then(|intervals| intervals.due(state.progress.step));
        let device = grad.device();
        let step = self
            .start(&mut state, adapts || due.is_some())
            .of_device(|dtype| B::supports_dtype(&device, dtype));
        let batch = measures.then(|| (input.clone(), grad.clone()));
        let read = |gradient: &FloatTensor<B>| {
            let (input, grad) = batch?;
            let ks = measured_ks(self.rows, step.k);
            let noise = input.noise(grad, gradient.clone(), NoiseStep { ks });
            Some(Reading::start(B::copy_out(noise)))
        };
        if step.k >= self.rows {
            drop(state);
            let gradient = input.exact_gradient(grad);
            if let Some(reading) = read(&gradient) {
                memory.lock().reading = Some(reading);
            }
            return (gradient, Bias::None);
        }
        let rows = state.rows.take();
        let rate = state.watch.rate.as_ref().and_then(SharedLearningRate::get);
        let rates = (mem::replace(&mut state.rate, rate), rate);
        drop(state);
        let kept = match &input {
            Factor::Linear(input) => self.memory::<B>(rows, rates, input, &grad),
            Factor::Convolution(..) => RowMemory::Empty,
        };

        let compared = due.is_some_and(|due| due.exact);
        let batch = compared.then(|| (input.clone(), grad.clone()));
        let gradient = input.gradient(grad, kept, step);
        let exact = batch.map(|(input, grad)| input.exact_gradient(grad));

        let reading = read(&gradient.weight);
        let rows = put_back::<B>(gradient.memory);
        let share = match gradient.share {
            Share::Measured(share) => Some(share),
            Share::Skipped => None,
        };
        let carried = share.clone().filter(|_| adapts).map(|share| Carried {
            ratio: step.k as f64 / self.rows as f64,
            share: Reading::start(B::copy_out(share)),
        });
        let measurement = due.is_some().then(|| {
            Arc::new(Measurement::new(
                share.map(from_primitive::<B, 1>),
                rows.as_ref(),
                &from_primitive::<B, 2>(gradient.weight.clone()),
                exact.map(from_primitive::<B, 2>),
            ))
        });
        let mut state = memory.lock();
        state.rows = rows;
        if reading.is_some() {
            state.reading = reading;
        }
        if let Some(seen) = state.watch.seen.as_mut()
            && seen.step == step.step
        {
            seen.measurement = measurement;
        }
        if adapts {
            state.carried = carried;
        }
        (gradient.weight, gradient.bias)
    }

    /// Whether the share of this step is to be measured. Then adjusts K by that of an earlier step, if there is one; the state is
    /// not locked while that is waited for.
    fn adapts(&self, memory: &MemoryHandle) -> bool {
        let mut state = memory.lock();
        let OuterProducts::Share { share, .. } = self.config.outer_products else {
            return false;
        };
        let is_late = |carried: &Carried| carried.share.is_late();
        if !schedule::measures_share(self.config, state.progress.step)
            || state.carried.as_ref().is_some_and(is_late)
        {
            return false;
        }
        let carried = state.carried.take();
        drop(state);
        if let Some(carried) = carried {
            let ratio = schedule::adapt(carried.ratio, carried.read(), share);
            memory.lock().progress.ratio = Some(ratio);
        }
        true
    }

    fn chooses(&self) -> bool {
        self.config.chooses_k() || self.chooses_input_rows()
    }

    fn chooses_input_rows(&self) -> bool {
        self.config.chooses_input_rows() && self.input_rows.is_some()
    }

    /// Whether the noise of this step is to be measured. Then chooses K, and the rows of the gradient of the input from the
    /// next step on, by all measurements up to an earlier step, if there is one; the state is not locked while that
    /// is waited for.
    fn choose(&self, memory: &MemoryHandle) -> bool {
        let mut state = memory.lock();
        let step = state.progress.step;
        if !(self.chooses() && self.time.measures(step, self.rows)) {
            return false;
        }
        let readings = [&state.reading, &state.input_reading];
        if readings.into_iter().flatten().any(Reading::is_late) {
            return false;
        }
        let readings = [state.reading.take(), state.input_reading.take()];
        drop(state);
        let [figures, input_figures] =
            readings.map(|reading| reading.map(|reading| reading.read()));

        let mut state = memory.lock();
        let MemoryState {
            noise, progress, ..
        } = &mut *state;
        if let Some(figures) = input_figures {
            noise.add_input(figures);
        }
        let Some(figures) = figures else {
            return true;
        };
        noise.add(figures);
        let share = |rows: usize| rows as f64 / self.rows as f64;
        let mut present = Shares {
            weight: match self.config.chooses_k() {
                true => progress.chosen.unwrap_or(1.0),
                false => share(schedule::target(self.config, progress, self.rows)),
            },
            input: match self.chooses_input_rows() {
                true => progress.input_chosen.unwrap_or(1.0),
                false => self.input_rows.map_or(1.0, share),
            },
        };
        if self.config.chooses_k() {
            present.weight = noise.choose(present, self.rows, &self.time);
            progress.chosen = Some(present.weight);
        }
        if self.chooses_input_rows() {
            present.input = noise.choose_input(present, self.rows, &self.time);
            progress.input_chosen = Some(present.input);
        }
        true
    }

    /// What leaving rows out would add to the gradient of the input: the scores of rows whose other factor is 1.
    fn measure_input<B>(&self, grad: &FloatTensor<B>) -> Reading<FIGURES>
    where
        B: MemAopOps,
        DispatchTensor: DispatchKindConversion<B>,
    {
        let (device, dtype) = (grad.device(), grad.dtype().into());
        let ones = B::float_ones(Shape::new([self.rows, 1]), &device, dtype);
        // There is no gradient whose norm would be of use.
        let none = B::float_zeros(Shape::new([1, 1]), &device, dtype);
        let ks = measured_ks(self.rows, self.rows);
        let noise = B::memaop_noise(Input::Full(ones), grad.clone(), none, NoiseStep { ks });
        Reading::start(B::copy_out(noise))
    }

    /// The settings of the step, which is counted and noted.
    fn start(&self, state: &mut MemoryState, measure: bool) -> AopStep {
        let Progress { step, .. } = state.progress;
        let k = schedule::k(self.config, &state.progress, self.rows);
        state.watch.seen = Some(Seen {
            step,
            k: k.min(self.rows),
            rows: self.rows,
            input_rows: self.input_rows,
            noise: state.noise.noise().filter(|_| self.chooses()),
            measurement: None,
        });
        state.progress.step += 1;
        state.progress.k = k;
        AopStep {
            k,
            method: self.config.method,
            memory_precision: self.config.memory_precision,
            seed: self.key,
            step,
            bias: self.with_bias,
            measure,
        }
    }

    /// The memory on the device of the gradient, taken from the units of one learning rate to those of another.
    /// One of other widths, of a weight that has been exchanged for another since, is dropped.
    fn memory<B>(
        &self,
        rows: Option<RowTensors>,
        rates: (Option<f64>, Option<f64>),
        input: &Input<B>,
        grad: &FloatTensor<B>,
    ) -> RowMemory<B>
    where
        B: MemAopOps,
        DispatchTensor: DispatchKindConversion<B>,
    {
        let widths = [input.width(), grad.shape()[1]];
        let fits = |rows: &RowTensors| [rows.input.dims()[1], rows.grad.dims()[1]] == widths;
        match (self.config.method.memory(), rows.filter(fits)) {
            (Memory::None, _) | (_, None) => RowMemory::Empty,
            (_, Some(rows)) => {
                let rows = rows.to_device(&from_primitive::<B, 2>(grad.clone()).device());
                let rows = follow(rows, rates);
                RowMemory::Rows {
                    input: into_primitive::<B>(rows.input),
                    grad: into_primitive::<B>(rows.grad),
                    age: into_primitive::<B>(rows.age),
                }
            }
        }
    }
}

fn put_back<B>(memory: RowMemory<B>) -> Option<RowTensors>
where
    B: MemAopOps,
    DispatchTensor: DispatchKindConversion<B>,
{
    match memory {
        RowMemory::Empty => None,
        RowMemory::Rows { input, grad, age } => Some(RowTensors {
            input: from_primitive::<B, 2>(input),
            grad: from_primitive::<B, 2>(grad),
            age: from_primitive::<B, 2>(age),
        }),
    }
}

/// The rows in the units of the learning rate that they follow.
fn follow(rows: RowTensors, rates: (Option<f64>, Option<f64>)) -> RowTensors {
    match rates {
        (Some(from), Some(to)) if from != to => {
            let factor = learning_rate::rescale(from, to);
            RowTensors {
                input: rows.input * factor,
                grad: rows.grad * factor,
                age: rows.age,
            }
        }
        _ => rows,
    }
}

pub(super) fn from_primitive<B: MemAopOps, const D: usize>(tensor: FloatTensor<B>) -> Tensor<D>
where
    DispatchTensor: DispatchKindConversion<B>,
{
    Tensor::from_dispatch(DispatchTensor::from_backend(BackendTensor::Float(tensor)))
}

pub(super) fn into_primitive<B: MemAopOps>(tensor: Tensor<2>) -> FloatTensor<B>
where
    DispatchTensor: DispatchKindConversion<B>,
{
    DispatchTensor::try_into_backend(tensor.into_dispatch())
        .expect("the memory was moved to the device of the gradient")
        .float()
}
