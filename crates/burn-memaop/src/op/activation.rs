//! Activation functions under autodiff.

use std::marker::PhantomData;

use burn::backend::{Autodiff, TensorMetadata, ops::ActivationOps, tensor::FloatTensor};
use burn_autodiff::{
    NodeId,
    checkpoint::{
        base::Checkpointer, retro_forward::RetroForward, state::BackwardStates,
        strategy::CheckpointStrategy,
    },
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};

use super::{
    MemAopOps,
    noise::{StepNoise, stream},
    packing::{Bits, Packing},
    step::Packed,
};

/// Keeps whether each output is above zero.
pub(super) fn relu<B: MemAopOps, C: CheckpointStrategy>(
    input: FloatTensor<Autodiff<B, C>>,
) -> FloatTensor<Autodiff<B, C>> {
    if !input.is_tracked() {
        return Autodiff::<B, C>::relu(input);
    }
    times::<B, C>(input, Bits::One, |input, packing| {
        let output = B::relu(input);
        (B::memaop_pack(output.clone(), packing, None), output)
    })
}

/// Keeps the derivative, in 8 bits, rounded by the noise.
pub(super) fn packed_gelu<B: MemAopOps, C: CheckpointStrategy>(
    input: FloatTensor<Autodiff<B, C>>,
    noise: StepNoise,
) -> FloatTensor<Autodiff<B, C>> {
    if !input.is_tracked() {
        return gelu::<B, C>(input);
    }
    // The layer whose pass this is rounds its input by the bits of the seed itself.
    let noise = StepNoise {
        seed: stream(noise.seed, 0),
        ..noise
    };
    times::<B, C>(input, Bits::Eight, move |input, packing| {
        let derivative = B::memaop_gelu_derivative(input.clone(), packing, noise);
        (derivative, B::memaop_gelu(input))
    })
}

/// Registers a function whose gradient is that of its output times packed factors, which `run` gives with the output.
fn times<B: MemAopOps, C: CheckpointStrategy>(
    input: FloatTensor<Autodiff<B, C>>,
    bits: Bits,
    run: impl FnOnce(FloatTensor<B>, Packing) -> (Packed<B>, FloatTensor<B>),
) -> FloatTensor<Autodiff<B, C>> {
    let prep = Times.prepare::<C>([input.node()]).compute_bound();
    let OpsKind::Tracked(prep) = prep.stateful() else {
        unreachable!("the input is tracked");
    };
    let packing = Packing {
        bits,
        width: input.shape()[1],
    };
    let (factors, output) = run(input.into_primitive(), packing);
    prep.finish(factors, output)
}

#[derive(Debug)]
struct Times;

impl<B: MemAopOps> Backward<B, 1> for Times {
    type State = Packed<B>;

    fn backward(
        self,
        ops: Ops<Packed<B>, 1>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let grad = grads.consume::<B>(&ops.node);
        let [parent] = ops.parents;
        if let Some(node) = parent {
            grads.register::<B>(node.id, B::memaop_times(ops.state, grad));
        }
    }
}

/// Keeps the input, or computes it again, as Burn's function does.
pub(super) fn gelu<B: MemAopOps, C: CheckpointStrategy>(
    input: FloatTensor<Autodiff<B, C>>,
) -> FloatTensor<Autodiff<B, C>> {
    let node = input.node();
    let again = GeluAgain::<B> {
        input: node.id(),
        backend: PhantomData,
    };
    let prep = Gelu.prepare::<C>([node]).memory_bound();
    match prep.retro_forward(again).parents([&input]).stateful() {
        OpsKind::Tracked(mut prep) => {
            let state = prep.checkpoint(&input);
            prep.finish(state, B::memaop_gelu(input.into_primitive()))
        }
        OpsKind::UnTracked(prep) => prep.finish(B::memaop_gelu(input.into_primitive())),
    }
}

#[derive(Debug)]
struct Gelu;

impl<B: MemAopOps> Backward<B, 1> for Gelu {
    type State = NodeId;

    fn backward(self, ops: Ops<NodeId, 1>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let input = checkpointer.retrieve_node_output::<FloatTensor<B>>(ops.state);
        let grad = grads.consume::<B>(&ops.node);
        let [parent] = ops.parents;
        if let Some(node) = parent {
            grads.register::<B>(node.id, B::memaop_gelu_backward(input, grad));
        }
    }
}

#[derive(Debug)]
struct GeluAgain<B> {
    input: NodeId,
    backend: PhantomData<B>,
}

impl<B: MemAopOps> RetroForward for GeluAgain<B> {
    fn forward(&self, states: &mut BackwardStates, output: NodeId) {
        let input = states.get_state::<FloatTensor<B>>(&self.input);
        states.save(output, B::memaop_gelu(input));
    }
}
