//! Attention under autodiff.

use burn::{
    backend::{
        Autodiff, BackendTensor, DispatchKindConversion, DispatchTensor,
        tensor::{BoolTensor, FloatTensor},
    },
    tensor::Tensor,
};
use burn_autodiff::{
    NodeId,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};

use super::{Masks, backward, forward};
use crate::{
    backward::LayerOps,
    rows::{Attention, Mask},
};

pub(in crate::backward) fn attention<B, C>(
    inputs: [FloatTensor<Autodiff<B, C>>; 3],
    masks: [Mask<Autodiff<B, C>>; 2],
    attention: Attention,
) -> FloatTensor<Autodiff<B, C>>
where
    B: LayerOps,
    C: CheckpointStrategy,
    DispatchTensor: DispatchKindConversion<B>,
{
    let masks: Masks = masks.map(|mask| {
        let mask: Option<BoolTensor<B>> = mask.into_option();
        let tensor = |mask| DispatchTensor::from_backend(BackendTensor::Bool(mask));
        mask.map(|mask| Tensor::from_dispatch(tensor(mask)))
    });
    let nodes = inputs.each_ref().map(|input| input.node());
    let primitives = inputs
        .clone()
        .map(|input| tensor::<B>(input.into_primitive()));
    let [context, rows] = forward(primitives, &masks, attention);
    let context = primitive::<B>(context);
    let prep = AttentionBackward.prepare::<C>(nodes).compute_bound();
    match prep.stateful() {
        OpsKind::UnTracked(prep) => prep.finish(context),
        OpsKind::Tracked(mut prep) => {
            let state = State {
                inputs: inputs.each_ref().map(|input| prep.checkpoint(input)),
                masks,
                rows,
                attention,
            };
            prep.finish(state, context)
        }
    }
}

#[derive(Debug)]
struct AttentionBackward;

#[derive(Debug, Clone)]
struct State {
    inputs: [NodeId; 3],
    masks: Masks,
    /// Two numbers for each query, shape `[batch, heads, queries, 2]`.
    rows: Tensor<4>,
    attention: Attention,
}

impl<B> Backward<B, 3> for AttentionBackward
where
    B: LayerOps,
    DispatchTensor: DispatchKindConversion<B>,
{
    type State = State;

    fn backward(self, ops: Ops<State, 3>, grads: &mut Gradients, stored: &mut Checkpointer) {
        let state = ops.state;
        let retrieved = state
            .inputs
            .map(|id| tensor::<B>(stored.retrieve_node_output::<FloatTensor<B>>(id)));
        let grad = tensor::<B>(grads.consume::<B>(&ops.node));
        let gradients = backward(retrieved, &state.masks, state.rows, grad, state.attention);
        for (parent, gradient) in ops.parents.into_iter().zip(gradients) {
            if let Some(node) = parent {
                grads.register::<B>(node.id, primitive::<B>(gradient));
            }
        }
    }
}

fn tensor<B: LayerOps>(tensor: FloatTensor<B>) -> Tensor<4>
where
    DispatchTensor: DispatchKindConversion<B>,
{
    Tensor::from_dispatch(DispatchTensor::from_backend(BackendTensor::Float(tensor)))
}

fn primitive<B: LayerOps>(tensor: Tensor<4>) -> FloatTensor<B>
where
    DispatchTensor: DispatchKindConversion<B>,
{
    DispatchTensor::try_into_backend(tensor.into_dispatch())
        .expect("all tensors of an attention are on one device")
        .float()
}
