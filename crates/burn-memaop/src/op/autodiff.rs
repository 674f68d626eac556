//! The autodiff operation.

use burn::backend::{
    Autodiff, Backend, BackendTensor, DispatchKindConversion, DispatchTensor, TensorMetadata,
    ops::ModuleOps, tensor::FloatTensor,
};
use burn::tensor::Tensor;
use burn_autodiff::{
    NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, NodeGuard, Ops, OpsKind},
};

use super::{
    AopLayer, MemAopOps, activation,
    layer_step::{LayerStep, exact_weight_gradient, from_primitive, into_primitive},
    noise::{StepNoise, layer_key},
    packed::PackedRows,
    packing::{Bits, Packing},
    portable,
    step::{Bias, Input, Packed},
};
use crate::state::schedule;

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
