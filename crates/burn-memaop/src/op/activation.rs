//! Activation functions under autodiff that keep few bits a value for their backward pass.

use burn::backend::{Autodiff, TensorMetadata, ops::ActivationOps, tensor::FloatTensor};
use burn_autodiff::{
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};

use super::{
    MemAopOps,
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
    tracked::<B, C>(input, Bits::One, |input| {
        let output = B::relu(input);
        (output.clone(), output)
    })
}

/// Keeps the derivative.
pub(super) fn gelu<B: MemAopOps, C: CheckpointStrategy>(
    input: FloatTensor<Autodiff<B, C>>,
) -> FloatTensor<Autodiff<B, C>> {
    if !input.is_tracked() {
        return Autodiff::<B, C>::gelu(input);
    }
    tracked::<B, C>(input, Bits::Eight, |input| {
        let ones = B::float_ones(input.shape(), &input.device(), input.dtype().into());
        let derivative = B::gelu_backward(input.clone(), ones);
        (derivative, B::gelu(input))
    })
}

/// Registers a function whose gradient is that of its output times a factor, which `run` gives with the output.
fn tracked<B: MemAopOps, C: CheckpointStrategy>(
    input: FloatTensor<Autodiff<B, C>>,
    bits: Bits,
    run: impl FnOnce(FloatTensor<B>) -> (FloatTensor<B>, FloatTensor<B>),
) -> FloatTensor<Autodiff<B, C>> {
    let prep = Times.prepare::<C>([input.node()]).compute_bound();
    let OpsKind::Tracked(prep) = prep.stateful() else {
        unreachable!("the input is tracked");
    };
    let packing = Packing {
        bits,
        width: input.shape()[1],
    };
    let (factor, output) = run(input.into_primitive());
    prep.finish(B::memaop_pack(factor, packing, None), output)
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
