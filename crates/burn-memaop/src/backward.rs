//! The autodiff operation.

use std::sync::Arc;

use burn::backend::{
    Autodiff, BackendTensor, DispatchKindConversion, DispatchTensor, TensorMetadata,
    ops::ModuleOps, tensor::FloatTensor,
};
use burn::tensor::{Shape, Tensor};
use burn_autodiff::{
    NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, NodeGuard, Ops, OpsKind},
};

use crate::{
    config::{AopConfig, InputGradient, Memory, Schedule},
    learning_rate::{self, SharedLearningRate},
    memory::{Measured, RowTensors, Seen, Watch},
    observe::Measurement,
    ops::{AopLayer, AopStep, Bias, InputStep, MemAopOps, RowMemory, Share},
    schedule::{self, Progress},
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
}

/// The forward pass, registered with the backward pass of this module.
fn tracked<B: MemAopOps, C: CheckpointStrategy, const N: usize>(
    nodes: [NodeGuard; N],
    input: FloatTensor<Autodiff<B, C>>,
    weight: FloatTensor<Autodiff<B, C>>,
    bias: Option<FloatTensor<Autodiff<B, C>>>,
    layer: AopLayer,
) -> FloatTensor<Autodiff<B, C>>
where
    MemAopLinearBackward: Backward<B, N, State = State>,
{
    let prep = MemAopLinearBackward.prepare::<C>(nodes).compute_bound();
    let OpsKind::Tracked(mut prep) = prep.stateful() else {
        unreachable!("the weight is tracked");
    };
    let state = State {
        input: prep.checkpoint(&input),
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

/// The backward pass of a linear layer whose weight is tracked and whose K is below M.
#[derive(Debug)]
struct MemAopLinearBackward;

#[derive(Debug, Clone)]
struct State {
    input: NodeId,
    /// Only when the input is tracked.
    weight: Option<NodeId>,
    layer: AopLayer,
}

impl<B> Backward<B, 3> for MemAopLinearBackward
where
    B: MemAopOps,
    DispatchTensor: DispatchKindConversion<B>,
{
    type State = State;

    fn backward(self, ops: Ops<State, 3>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let parents = ops.parents.map(|parent| parent.map(|node| node.id));
        let grad = grads.consume::<B>(&ops.node);
        propagate::<B>(ops.state, parents, grad, grads, checkpointer);
    }
}

impl<B> Backward<B, 2> for MemAopLinearBackward
where
    B: MemAopOps,
    DispatchTensor: DispatchKindConversion<B>,
{
    type State = State;

    fn backward(self, ops: Ops<State, 2>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let [input, weight] = ops.parents.map(|parent| parent.map(|node| node.id));
        let grad = grads.consume::<B>(&ops.node);
        let parents = [input, weight, None];
        propagate::<B>(ops.state, parents, grad, grads, checkpointer);
    }
}

/// The exact gradients of the input and the bias, and the approximate one of the weight.
fn propagate<B>(
    state: State,
    [input_node, weight_node, bias_node]: [Option<NodeId>; 3],
    grad: FloatTensor<B>,
    grads: &mut Gradients,
    checkpointer: &mut Checkpointer,
) where
    B: MemAopOps,
    DispatchTensor: DispatchKindConversion<B>,
{
    let input = checkpointer.retrieve_node_output::<FloatTensor<B>>(state.input);
    let weight = state
        .weight
        .map(|id| checkpointer.retrieve_node_output::<FloatTensor<B>>(id));

    let shape = input.shape();
    let grad = flatten::<B>(grad);

    if let (Some(node), Some(weight)) = (input_node, weight) {
        let gradient = input_gradient::<B>(grad.clone(), weight, &state.layer);
        grads.register::<B>(node, B::float_reshape(gradient, shape));
    }
    let sums = match weight_node {
        None => Bias::None,
        Some(node) => {
            let input = flatten::<B>(input);
            let with_bias = bias_node.is_some();
            let (gradient, sums) =
                weight_gradient::<B>(input, grad.clone(), with_bias, &state.layer);
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

/// The gradient of the input, as the layer's step comes to it.
fn input_gradient<B: MemAopOps>(
    grad: FloatTensor<B>,
    weight: FloatTensor<B>,
    AopLayer { config, memory }: &AopLayer,
) -> FloatTensor<B> {
    let rows = grad.shape()[0];
    let progress = memory.lock().progress;
    let step = InputStep {
        k: input_rows(config, &progress, rows),
        sampled: matches!(config.input_gradient, InputGradient::Sampled { .. }),
        seed: config.seed,
        step: progress.step,
    };
    B::memaop_input_gradient(grad, weight, step)
}

fn input_rows(config: &AopConfig, progress: &Progress, rows: usize) -> usize {
    match schedule::is_exact_for_now(config, progress, rows) {
        true => rows,
        false => config.input_gradient.k(rows),
    }
}

/// Takes the layer's memory out, computes the gradient with it, and puts the new memory back. The
/// gradient of the bias comes along where the pass over the batch has it at hand.
fn weight_gradient<B>(
    input: FloatTensor<B>,
    grad: FloatTensor<B>,
    bias: bool,
    layer: &AopLayer,
) -> (FloatTensor<B>, Bias<B>)
where
    B: MemAopOps,
    DispatchTensor: DispatchKindConversion<B>,
{
    let AopLayer { config, memory } = layer;
    let rows = input.shape()[0];
    let mut state = memory.lock();
    let state = &mut *state;
    let adapts = schedule::measures(config, state.progress.step);
    let due = state
        .watch
        .observer
        .and_then(|observer| observer.due(state.progress.step));
    if let Schedule::Adaptive { share, .. } = config.schedule
        && adapts
        && let Some(measured) = state.measured.take()
    {
        let ratio = schedule::adapt(measured.ratio, measured.read(), share);
        state.progress.ratio = Some(ratio);
    }
    let k = schedule::k(config, &state.progress, rows);
    let step = AopStep {
        k,
        policy: config.policy,
        memory: config.memory,
        memory_precision: config.memory_precision,
        seed: config.seed,
        step: state.progress.step,
        bias,
        measure: adapts || due.is_some(),
    };
    state.watch.seen = Some(Seen {
        step: step.step,
        k: k.min(rows),
        rows,
        input_rows: input_rows(config, &state.progress, rows),
        measurement: None,
    });
    state.progress.step += 1;
    state.progress.k = k;
    if k >= rows {
        return (B::linear_weight_backward(input, grad), Bias::None);
    }

    let kept = match (config.memory, state.rows.take()) {
        (Memory::None, _) | (_, None) => RowMemory::Empty,
        (_, Some(rows)) => {
            let rows = rows.to_device(&from_primitive::<B, 2>(grad.clone()).device());
            let rows = follow(rows, state.rate, &state.watch);
            RowMemory::Rows {
                input: into_primitive::<B>(rows.input),
                grad: into_primitive::<B>(rows.grad),
                age: into_primitive::<B>(rows.age),
            }
        }
    };
    state.rate = state.watch.rate.as_ref().and_then(SharedLearningRate::get);
    let compared = due.is_some_and(|due| due.exact);
    let batch = compared.then(|| (input.clone(), grad.clone()));
    let gradient = B::memaop_weight_gradient(input, grad, kept, step);

    state.rows = match gradient.memory {
        RowMemory::Empty => None,
        RowMemory::Rows { input, grad, age } => Some(RowTensors {
            input: from_primitive::<B, 2>(input),
            grad: from_primitive::<B, 2>(grad),
            age: from_primitive::<B, 2>(age),
        }),
    };
    let share = match gradient.share {
        Share::Measured(share) => Some(from_primitive::<B, 1>(share)),
        Share::Skipped => None,
    };
    if due.is_some()
        && let Some(seen) = &mut state.watch.seen
    {
        let exact = batch.map(|(input, grad)| B::linear_weight_backward(input, grad));
        seen.measurement = Some(Arc::new(Measurement::new(
            share.clone(),
            state.rows.as_ref(),
            &from_primitive::<B, 2>(gradient.weight.clone()),
            exact.map(from_primitive::<B, 2>),
        )));
    }
    if adapts && let Some(share) = share {
        state.measured = Some(Measured {
            ratio: k as f64 / rows as f64,
            share,
        });
    }
    (gradient.weight, gradient.bias)
}

/// The rows in the units of the learning rate that they follow.
fn follow(rows: RowTensors, rate: Option<f64>, watch: &Watch) -> RowTensors {
    let target = watch.rate.as_ref().and_then(SharedLearningRate::get);
    match rate.zip(target) {
        Some((from, to)) if from != to => {
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

/// `[..., width]` as a matrix.
fn flatten<B: MemAopOps>(tensor: FloatTensor<B>) -> FloatTensor<B> {
    let shape = tensor.shape();
    let (width, leading) = shape.split_last().expect("at least one dimension");
    let rows = leading.iter().product();
    let matrix = Shape::new([rows, *width]);
    B::float_reshape(tensor, matrix)
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
