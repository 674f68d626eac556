//! What a layer does in one backward pass, with the state that it keeps between steps.

use std::sync::Arc;

use burn::backend::{
    Backend, BackendTensor, DispatchKindConversion, DispatchTensor, TensorMetadata,
    tensor::FloatTensor,
};
use burn::tensor::{Shape, Tensor};

use super::{
    MemAopOps,
    noise::stream,
    step::{AopStep, Bias, Input, InputStep, NoiseStep, RowMemory, Share, WeightGradient},
    window::Window,
};
use crate::{
    config::{AopConfig, Memory},
    state::{
        device::{DeviceState, StateHandle},
        measurement::Measurement,
        noise_scale::{FIGURES, Shares, StepTime, measured_ks},
        reading::Reading,
        rows::RowTensors,
        schedule,
        watch::{Due, Seen},
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
}

/// One backward pass of a layer that counts its steps.
pub(super) struct LayerStep<'a> {
    pub(super) config: &'a AopConfig,
    pub(super) state: &'a StateHandle,
    /// How often the layer has been mapped before.
    pub(super) maps: u64,
    pub(super) time: StepTime,
    pub(super) rows: usize,
    /// Whether the gradient of the input is asked for.
    pub(super) with_input: bool,
    pub(super) with_bias: bool,
}

/// What a pass has been told to do, before it does anything.
pub(super) struct Plan {
    /// The number of passes before.
    step: u64,
    k: usize,
    input_rows: usize,
    /// Whether the noise is measured.
    measures: bool,
    /// What the observer asks for.
    due: Option<Due>,
    /// The set of rows that the pass works with.
    kept: Option<RowTensors>,
    input_reading: Option<Reading<FIGURES>>,
}

/// What is to be known of a pass when it is over.
#[derive(Default)]
struct Outcome {
    kept: Option<RowTensors>,
    readings: [Option<Reading<FIGURES>>; 2],
    measurement: Option<Arc<Measurement>>,
}

impl LayerStep<'_> {
    /// Counts the pass and says what it does. Passes of one layer may run at the same time, and so the state is not locked
    /// while they compute: on CPUs that takes place on a pool of threads, which may meanwhile take up another pass of the
    /// same layer.
    pub(super) fn plan(&self) -> Plan {
        let mut state = self.state.lock();
        let step = state.count_step(self.maps);
        let measures = self.measures(&state, step);
        let readings = match measures {
            true => [state.reading.take(), state.input_reading.take()],
            false => [None, None],
        };
        if readings.iter().any(Option::is_some) {
            // Waits for the device.
            drop(state);
            let figures = readings.map(|reading| reading.map(|reading| reading.read()));
            state = self.state.lock();
            self.choose(&mut state, figures);
        }

        let at = schedule::Progress {
            step,
            ..state.progress
        };
        let k = schedule::k(self.config, &at, self.rows);
        let input_rows = schedule::input_rows(self.config, &at, self.rows);
        state.progress.k = k;
        state.watch.seen = Some(Seen {
            step,
            k,
            rows: self.rows,
            input_rows: self.with_input.then_some(input_rows),
            noise: state.noise.noise().filter(|_| self.chooses()),
            measurement: None,
        });
        let intervals = state.watch.intervals;
        Plan {
            step,
            k,
            input_rows,
            measures,
            due: intervals.and_then(|intervals| intervals.due(step)),
            kept: match k < self.rows {
                true => state.take_rows(),
                false => None,
            },
            input_reading: None,
        }
    }

    /// Notes what a pass has left behind.
    fn note(&self, step: u64, outcome: Outcome) {
        let mut state = self.state.lock();
        state.put_back(outcome.kept);
        let [reading, input_reading] = outcome.readings;
        // Readings of a pass at the same time may have to be waited for, and so they go when the lock has gone.
        let _before = (
            reading.and_then(|reading| state.reading.replace(reading)),
            input_reading.and_then(|reading| state.input_reading.replace(reading)),
        );
        if let Some(seen) = state.watch.seen.as_mut()
            && seen.step == step
        {
            seen.measurement = outcome.measurement;
        }
        drop(state);
    }

    fn chooses(&self) -> bool {
        self.config.chooses_k() || self.chooses_input_rows()
    }

    fn chooses_input_rows(&self) -> bool {
        self.config.chooses_input_rows() && self.with_input
    }

    /// Whether the noise of this pass is measured. It is not while the figures of an earlier one cannot be waited for.
    fn measures(&self, state: &DeviceState, step: u64) -> bool {
        let readings = [&state.reading, &state.input_reading];
        self.chooses()
            && self.rows >= LEAST_ROWS
            && self.time.measures(step, &state.noise, |interval| {
                stream(self.config.seed, interval)
            })
            && !readings.into_iter().flatten().any(Reading::is_late)
    }

    /// Chooses K and the rows of the gradient of the input by all measurements so far, of which `figures` are the last.
    fn choose(&self, state: &mut DeviceState, figures: [Option<[f64; FIGURES]>; 2]) {
        let DeviceState {
            noise, progress, ..
        } = state;
        let [figures, input_figures] = figures;
        if let Some(figures) = input_figures {
            noise.add_input(figures);
        }
        let Some(figures) = figures else {
            return;
        };
        noise.add(figures);
        let share = |rows: usize| rows as f64 / self.rows as f64;
        let mut present = Shares {
            weight: match self.config.chooses_k() {
                true => progress.chosen.unwrap_or(1.0),
                false => share(schedule::later_k(self.config, progress, self.rows)),
            },
            input: match self.config.chooses_input_rows() {
                true => progress.input_chosen.unwrap_or(1.0),
                false => share(self.config.fixed_input_rows(self.rows)),
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
    }

    /// The gradient of the input, with random bits of the stream `key`.
    pub(super) fn input_gradient<B>(
        &self,
        grad: FloatTensor<B>,
        weight: FloatTensor<B>,
        plan: &mut Plan,
        key: u64,
    ) -> FloatTensor<B>
    where
        B: MemAopOps,
        DispatchTensor: DispatchKindConversion<B>,
    {
        if plan.measures && self.chooses_input_rows() {
            plan.input_reading = Some(self.measure_input::<B>(&grad));
        }
        let step = InputStep {
            k: plan.input_rows,
            seed: key,
            step: plan.step,
        };
        B::memaop_input_gradient(grad, weight, step)
    }

    /// The gradient of the weight. That of the bias comes along where the pass over the batch has it at hand.
    pub(super) fn weight_gradient<B>(
        &self,
        input: Factor<B>,
        grad: FloatTensor<B>,
        plan: Plan,
    ) -> (FloatTensor<B>, Bias<B>)
    where
        B: MemAopOps,
        DispatchTensor: DispatchKindConversion<B>,
    {
        let batch = match &input {
            Factor::Linear(input) if plan.measures => Some((input.clone(), grad.clone())),
            _ => None,
        };
        let read = |gradient: &FloatTensor<B>| {
            let (input, grad) = batch?;
            let ks = measured_ks(self.rows, plan.k);
            let noise = B::memaop_noise(input, grad, gradient.clone(), NoiseStep { ks });
            Some(Reading::start(B::copy_out(noise)))
        };
        if plan.k >= self.rows {
            let gradient = input.exact_gradient(grad);
            let outcome = Outcome {
                readings: [read(&gradient), plan.input_reading],
                ..Outcome::default()
            };
            self.note(plan.step, outcome);
            return (gradient, Bias::None);
        }

        let step = AopStep {
            k: plan.k,
            method: self.config.method,
            seed: self.config.seed,
            step: plan.step,
            bias: self.with_bias,
            measure: plan.due.is_some(),
        };
        let kept = match &input {
            Factor::Linear(input) => self.memory::<B>(plan.kept, input, &grad),
            Factor::Convolution(..) => RowMemory::Empty,
        };
        let compared = plan.due.is_some_and(|due| due.exact);
        let batch = compared.then(|| (input.clone(), grad.clone()));
        let gradient = input.gradient(grad, kept, step);
        let exact = batch.map(|(input, grad)| input.exact_gradient(grad));

        let kept = put_back::<B>(gradient.memory);
        let share = match gradient.share {
            Share::Measured(share) => Some(from_primitive::<B, 1>(share)),
            Share::Skipped => None,
        };
        let measurement = plan.due.is_some().then(|| {
            Arc::new(Measurement::new(
                share,
                kept.as_ref(),
                &from_primitive::<B, 2>(gradient.weight.clone()),
                exact.map(from_primitive::<B, 2>),
            ))
        });
        let outcome = Outcome {
            readings: [read(&gradient.weight), plan.input_reading],
            kept,
            measurement,
        };
        self.note(plan.step, outcome);
        (gradient.weight, gradient.bias)
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

    /// The memory on the device of the gradient. One of other widths, of a weight that has been exchanged for another
    /// since, is dropped.
    fn memory<B>(
        &self,
        rows: Option<RowTensors>,
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
                RowMemory::Rows {
                    input: into_primitive::<B>(rows.input),
                    grad: into_primitive::<B>(rows.grad),
                    age: into_primitive::<B>(rows.age),
                }
            }
        }
    }
}

/// Fewer rows tell too little of their noise.
const LEAST_ROWS: usize = 16;

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
