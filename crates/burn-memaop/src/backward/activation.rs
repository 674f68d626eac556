//! Activation functions whose derivative is kept in few bits.

use burn::backend::{Autodiff, TensorMetadata, ops::ActivationOps, tensor::FloatTensor};
use burn_autodiff::{
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};

use super::{
    LayerOps,
    recomputed::{Gelu, apply},
};
use crate::rows::{
    Packed,
    packing::{Bits, Packing},
    random::Random,
};

/// The backward pass keeps one bit of each output: whether it is above zero.
pub(super) fn relu<B: LayerOps, C: CheckpointStrategy>(
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

/// The backward pass keeps the derivative in 8 bits, rounded by random bits.
pub(super) fn packed_gelu<B: LayerOps, C: CheckpointStrategy>(
    input: FloatTensor<Autodiff<B, C>>,
    random: Random,
) -> FloatTensor<Autodiff<B, C>> {
    if !input.is_tracked() {
        return apply::<B, C, _, 1>(Gelu, [input]);
    }
    times::<B, C>(input, Bits::Eight, move |input, packing| {
        let derivative = B::memaop_gelu_derivative(input.clone(), packing, random);
        (derivative, B::memaop_exact_gelu(input))
    })
}

/// Registers a function whose derivative is packed. `run` returns the derivative and the output.
fn times<B: LayerOps, C: CheckpointStrategy>(
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

impl<B: LayerOps> Backward<B, 1> for Times {
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
