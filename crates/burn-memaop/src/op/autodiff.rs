//! The autodiff operation.

use std::{mem, sync::Arc};

use burn::backend::{
    Autodiff, Backend, BackendTensor, DispatchKindConversion, DispatchTensor, TensorMetadata,
    ops::ModuleOps, tensor::FloatTensor,
};
use burn::tensor::{Shape, Tensor};
use burn_autodiff::{
    NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, NodeGuard, Ops, OpsKind},
};

use super::{
    AopLayer, MemAopOps, activation,
    noise::{StepNoise, layer_key},
    packed::PackedRows,
    packing::{Bits, Packing},
    portable,
    step::{AopStep, Bias, Input, InputStep, NoiseStep, Packed, RowMemory, Share},
};
use crate::{
    config::{AopConfig, InputGradient, Memory, OuterProducts},
    state::{
        learning_rate::{self, SharedLearningRate},
        measurement::Measurement,
        memory::{Carried, MemoryHandle, MemoryState},
        noise_scale::{Reading, Shares, StepTime, measured_ks},
        rows::RowTensors,
        schedule::{self, Progress},
        watch::Seen,
    },
};

impl<B, C> MemAopOps for Autodiff<B, C>
where
    B: MemAopOps,
    C: CheckpointStrategy,
    DispatchTensor: DispatchKindConversion<B>,
{
    fn memaop_linear(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: Bias<Self>,
        layer: AopLayer,
    ) -> FloatTensor<Self> {
        if !weight.is_tracked() {
            return Self::linear(input, weight, bias.into_option());
        }

        match bias {
            Bias::Some(bias) => {
                let nodes = [input.node(), weight.node(), bias.node()];
                tracked::<B, C, 3>(nodes, input, weight, Some(bias), layer)
            }
            Bias::None => {
                let nodes = [input.node(), weight.node()];
                tracked::<B, C, 2>(nodes, input, weight, None, layer)
            }
        }
    }

    fn memaop_relu(input: FloatTensor<Self>) -> FloatTensor<Self> {
        activation::relu::<B, C>(input)
    }

    fn memaop_gelu(input: FloatTensor<Self>) -> FloatTensor<Self> {
        activation::gelu::<B, C>(input)
    }

    fn memaop_packed_gelu(input: FloatTensor<Self>) -> FloatTensor<Self> {
        activation::packed_gelu::<B, C>(input)
    }
}

/// The forward pass, registered with the backward pass of this module.
fn tracked<B: MemAopOps, C: CheckpointStrategy, const N: usize>(
    nodes: [NodeGuard; N],
    input: FloatTensor<Autodiff<B, C>>,
    weight: FloatTensor<Autodiff<B, C>>,
    bias: Option<FloatTensor<Autodiff<B, C>>>,
    mut layer: AopLayer,
) -> FloatTensor<Autodiff<B, C>>
where
    MemAopLinearBackward: Backward<B, N, State = State<B>>,
    DispatchTensor: DispatchKindConversion<B>,
{
    let prep = MemAopLinearBackward.prepare::<C>(nodes).compute_bound();
    let OpsKind::Tracked(mut prep) = prep.stateful() else {
        unreachable!("the weight is tracked");
    };
    let state = State {
        input: match Bits::of(layer.config.stored_input) {
            None => Kept::Node(prep.checkpoint(&input)),
            Some(bits) => {
                let input = input.clone().into_primitive();
                Kept::Packed(packed::<B>(input, bits, &mut layer))
            }
        },
        // Only the gradient of the input needs the weight.
        weight: input.is_tracked().then(|| prep.checkpoint(&weight)),
        layer,
    };
    let output = B::linear(
        input.into_primitive(),
        weight.into_primitive(),
        bias.map(|bias| bias.into_primitive()),
    );
    prep.finish(state, output)
}

/// The input in few bits, by the noise of the step to come.
fn packed<B: MemAopOps>(input: FloatTensor<B>, bits: Bits, layer: &mut AopLayer) -> Packed<B>
where
    DispatchTensor: DispatchKindConversion<B>,
{
    let packing = Packing {
        bits,
        width: input.shape()[1],
    };
    let dtype = input.dtype();
    let pack = || {
        // A layer with a packed input has a memory to count its steps.
        let noise = layer.memory.as_ref().map(|memory| {
            let mut state = memory.lock();
            StepNoise {
                seed: layer_key(layer.config.seed, state.count_pack()),
                step: state.progress.step,
            }
        });
        B::memaop_pack(input.clone(), packing, noise)
    };
    let Some(shared) = layer.shared.take() else {
        return pack();
    };
    let rows = shared.0.get_or_init(|| {
        let packed = pack();
        let words = DispatchTensor::from_backend(BackendTensor::Int(packed.words));
        PackedRows {
            words: Tensor::from_dispatch(words),
            norms: from_primitive::<B, 2>(packed.norms),
            packing,
            dtype,
        }
    });
    if rows.packing != packing {
        return pack();
    }
    let rows = rows.clone();
    let words = DispatchTensor::try_into_backend(rows.words.into_dispatch());
    Packed {
        words: words
            .expect("layers that share an input share its device")
            .int(),
        norms: into_primitive::<B>(rows.norms),
        packing,
    }
}

/// The backward pass of a linear layer whose weight is tracked.
#[derive(Debug)]
struct MemAopLinearBackward;

#[derive(Debug, Clone)]
struct State<B: Backend> {
    input: Kept<B>,
    /// Only when the input is tracked.
    weight: Option<NodeId>,
    layer: AopLayer,
}

/// What the backward pass finds the input by.
#[derive(Debug, Clone)]
enum Kept<B: Backend> {
    Node(NodeId),
    Packed(Packed<B>),
}

impl<B> Backward<B, 3> for MemAopLinearBackward
where
    B: MemAopOps,
    DispatchTensor: DispatchKindConversion<B>,
{
    type State = State<B>;

    fn backward(
        self,
        ops: Ops<State<B>, 3>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let parents = ops.parents.map(|parent| parent.map(|node| node.id));
        let grad = grads.consume::<B>(&ops.node);
        propagate::<B>(
            ops.state,
            ops.node.order,
            parents,
            grad,
            grads,
            checkpointer,
        );
    }
}

impl<B> Backward<B, 2> for MemAopLinearBackward
where
    B: MemAopOps,
    DispatchTensor: DispatchKindConversion<B>,
{
    type State = State<B>;

    fn backward(
        self,
        ops: Ops<State<B>, 2>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let [input, weight] = ops.parents.map(|parent| parent.map(|node| node.id));
        let grad = grads.consume::<B>(&ops.node);
        let parents = [input, weight, None];
        propagate::<B>(
            ops.state,
            ops.node.order,
            parents,
            grad,
            grads,
            checkpointer,
        );
    }
}

/// The gradients of input, weight and bias. `order` is the place of the operation in the graph.
fn propagate<B>(
    State {
        input,
        weight,
        layer,
    }: State<B>,
    order: usize,
    [input_node, weight_node, bias_node]: [Option<NodeId>; 3],
    grad: FloatTensor<B>,
    grads: &mut Gradients,
    checkpointer: &mut Checkpointer,
) where
    B: MemAopOps,
    DispatchTensor: DispatchKindConversion<B>,
{
    let input = match input {
        Kept::Node(id) => Input::Full(checkpointer.retrieve_node_output::<FloatTensor<B>>(id)),
        Kept::Packed(packed) => Input::Packed(packed),
    };
    let weight = weight.map(|id| checkpointer.retrieve_node_output::<FloatTensor<B>>(id));
    let rows = grad.shape()[0];
    let progress = layer.memory.as_ref().map(|memory| memory.lock().progress);
    let step = LayerStep {
        config: &layer.config,
        time: layer.time,
        key: layer_key(layer.config.seed, order as u64),
        rows,
        input_rows: input_node.is_some().then(|| {
            progress.map_or(rows, |progress| {
                schedule::input_rows(&layer.config, &progress, rows)
            })
        }),
        with_bias: bias_node.is_some(),
    };

    if let (Some(node), Some(weight)) = (input_node, weight) {
        let gradient = match progress {
            // As `Linear` computes it, rows of zeros included.
            None => portable::exact_input_gradient::<B>(grad.clone(), weight),
            Some(progress) => step.input_gradient::<B>(grad.clone(), weight, progress.step),
        };
        grads.register::<B>(node, gradient);
    }
    let sums = match (weight_node, &layer.memory) {
        (None, _) => Bias::None,
        (Some(node), None) => {
            grads.register::<B>(node, exact_weight_gradient(input, grad.clone()));
            Bias::None
        }
        (Some(node), Some(memory)) => {
            let (gradient, sums) = step.weight_gradient::<B>(input, grad.clone(), memory);
            grads.register::<B>(node, gradient);
            sums
        }
    };
    if let Some(node) = bias_node {
        let gradient = sums.into_option();
        let gradient = gradient.unwrap_or_else(|| B::linear_bias_backward(grad));
        grads.register::<B>(node, gradient);
    }
}

fn exact_weight_gradient<B: MemAopOps>(input: Input<B>, grad: FloatTensor<B>) -> FloatTensor<B> {
    let input = match input {
        Input::Full(input) => input,
        Input::Packed(packed) => B::memaop_unpack(packed, grad.dtype().into()),
    };
    B::linear_weight_backward(input, grad)
}

/// One backward pass of a layer.
struct LayerStep<'a> {
    config: &'a AopConfig,
    time: StepTime,
    /// Of the noise of the layer.
    key: u64,
    rows: usize,
    /// Of the gradient of the input, where it is asked for.
    input_rows: Option<usize>,
    with_bias: bool,
}

impl LayerStep<'_> {
    fn input_gradient<B: MemAopOps>(
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
    fn weight_gradient<B>(
        &self,
        input: Input<B>,
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
        let mut state = memory.lock();
        let adapts = schedule::measures_share(self.config, state.progress.step);
        if adapts {
            self.adapt(&mut state);
        }
        let intervals = state.watch.intervals;
        let due = intervals.and_then(|intervals| intervals.due(state.progress.step));
        let step = self.start(&mut state, adapts || due.is_some());
        let batch = measures.then(|| (input.clone(), grad.clone()));
        let read = |gradient: &FloatTensor<B>| {
            let (input, grad) = batch?;
            let ks = measured_ks(self.rows, step.k);
            let noise = B::memaop_noise(input, grad, gradient.clone(), NoiseStep { ks });
            Some(Reading::start(from_primitive::<B, 1>(noise)))
        };
        if step.k >= self.rows {
            drop(state);
            let gradient = exact_weight_gradient(input, grad);
            if let Some(reading) = read(&gradient) {
                memory.lock().reading = Some(reading);
            }
            return (gradient, Bias::None);
        }
        let rows = state.rows.take();
        let rate = state.watch.rate.as_ref().and_then(SharedLearningRate::get);
        let rates = (mem::replace(&mut state.rate, rate), rate);
        drop(state);
        let kept = self.memory::<B>(rows, rates, &input, &grad);

        let compared = due.is_some_and(|due| due.exact);
        let batch = compared.then(|| (input.clone(), grad.clone()));
        let gradient = B::memaop_weight_gradient(input, grad, kept, step);
        let exact = batch.map(|(input, grad)| exact_weight_gradient(input, grad));

        let reading = read(&gradient.weight);
        let rows = put_back::<B>(gradient.memory);
        let share = match gradient.share {
            Share::Measured(share) => Some(from_primitive::<B, 1>(share)),
            Share::Skipped => None,
        };
        let measurement = due.is_some().then(|| {
            Arc::new(Measurement::new(
                share.clone(),
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
            state.carried = share.map(|share| Carried {
                ratio: step.k as f64 / self.rows as f64,
                share,
            });
        }
        (gradient.weight, gradient.bias)
    }

    /// Adjusts K by the measurement of an earlier step, if there is one.
    fn adapt(&self, state: &mut MemoryState) {
        if let OuterProducts::Share { share, .. } = self.config.outer_products
            && let Some(carried) = state.carried.take()
        {
            let ratio = schedule::adapt(carried.ratio, carried.read(), share);
            state.progress.ratio = Some(ratio);
        }
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
    fn measure_input<B>(&self, grad: &FloatTensor<B>) -> Reading
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
        Reading::start(from_primitive::<B, 1>(noise))
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

fn from_primitive<B: MemAopOps, const D: usize>(tensor: FloatTensor<B>) -> Tensor<D>
where
    DispatchTensor: DispatchKindConversion<B>,
{
    Tensor::from_dispatch(DispatchTensor::from_backend(BackendTensor::Float(tensor)))
}

fn into_primitive<B: MemAopOps>(tensor: Tensor<2>) -> FloatTensor<B>
where
    DispatchTensor: DispatchKindConversion<B>,
{
    DispatchTensor::try_into_backend(tensor.into_dispatch())
        .expect("the memory was moved to the device of the gradient")
        .float()
}
