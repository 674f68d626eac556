//! Functions that keep nothing but some of their inputs. Gradient checkpointing computes their
//! outputs again.

use std::{fmt::Debug, marker::PhantomData};

use burn::{
    backend::{Autodiff, TensorMetadata, tensor::FloatTensor},
    tensor::{DType, FloatDType},
};
use burn_autodiff::{
    NodeId,
    checkpoint::{
        base::Checkpointer, retro_forward::RetroForward, state::BackwardStates,
        strategy::CheckpointStrategy,
    },
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};

use super::LayerOps;
use crate::rows::{cast, random::Dropout};

/// A function of N inputs.
pub(super) trait Function<B: LayerOps, const N: usize>:
    Copy + Debug + Send + 'static
{
    /// The number of leading inputs that the backward pass needs.
    const NEEDED: usize;

    fn forward(self, inputs: [FloatTensor<B>; N]) -> FloatTensor<B>;

    /// The gradients of the inputs, in their order.
    fn backward(self, needed: Vec<FloatTensor<B>>, grad: FloatTensor<B>) -> Vec<FloatTensor<B>>;
}

/// Burn's `gelu`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Gelu;

impl<B: LayerOps> Function<B, 1> for Gelu {
    const NEEDED: usize = 1;

    fn forward(self, [input]: [FloatTensor<B>; 1]) -> FloatTensor<B> {
        B::memaop_exact_gelu(input)
    }

    fn backward(
        self,
        mut needed: Vec<FloatTensor<B>>,
        grad: FloatTensor<B>,
    ) -> Vec<FloatTensor<B>> {
        vec![B::memaop_gelu_backward(needed.swap_remove(0), grad)]
    }
}

/// The backward pass drops the same values as the forward pass.
impl<B: LayerOps> Function<B, 1> for Dropout {
    const NEEDED: usize = 0;

    fn forward(self, [input]: [FloatTensor<B>; 1]) -> FloatTensor<B> {
        B::memaop_drop_values(input, self)
    }

    fn backward(self, _: Vec<FloatTensor<B>>, grad: FloatTensor<B>) -> Vec<FloatTensor<B>> {
        vec![B::memaop_drop_values(grad, self)]
    }
}

/// Burn's `layer_norm` of a matrix. The inputs are the matrix, gamma, and beta if there is one.
#[derive(Debug, Clone, Copy)]
pub(super) struct LayerNorm {
    pub(super) epsilon: f64,
}

impl<B: LayerOps, const N: usize> Function<B, N> for LayerNorm {
    const NEEDED: usize = 2;

    /// As in Burn, half precision is widened where the sum of the squares can be too large for it.
    fn forward(self, inputs: [FloatTensor<B>; N]) -> FloatTensor<B> {
        let dtype = inputs[0].dtype();
        let wide = match dtype {
            DType::F16 => FloatDType::F32,
            dtype => dtype.into(),
        };
        let mut inputs = inputs.into_iter().map(|input| cast::<B>(input, wide));
        let (Some(input), Some(gamma)) = (inputs.next(), inputs.next()) else {
            unreachable!("a layer norm has an input and gamma");
        };
        let output = B::layer_norm(input, gamma, inputs.next(), self.epsilon);
        cast::<B>(output, dtype.into())
    }

    fn backward(self, needed: Vec<FloatTensor<B>>, grad: FloatTensor<B>) -> Vec<FloatTensor<B>> {
        let Ok([input, gamma]) = <[_; 2]>::try_from(needed) else {
            unreachable!("two are needed");
        };
        let gradients = B::memaop_layer_norm_backward(input, gamma, grad, self.epsilon);
        vec![gradients.0, gradients.1, gradients.2]
    }
}

/// Runs the forward pass of a function, and registers its backward pass.
pub(super) fn apply<B: LayerOps, C: CheckpointStrategy, F: Function<B, N>, const N: usize>(
    function: F,
    inputs: [FloatTensor<Autodiff<B, C>>; N],
) -> FloatTensor<Autodiff<B, C>> {
    let nodes = inputs.each_ref().map(|input| input.node());
    let again = Again::<B, F, N> {
        function,
        inputs: nodes.each_ref().map(|node| node.id()),
        backend: PhantomData,
    };
    let prep = Registered(function).prepare::<C>(nodes).memory_bound();
    let prep = prep.retro_forward(again).parents(&inputs);
    match prep.stateful() {
        OpsKind::Tracked(mut prep) => {
            let needed = inputs[..F::NEEDED].iter();
            let needed = needed.map(|input| prep.checkpoint(input)).collect();
            let inputs = inputs.map(|input| input.into_primitive());
            prep.finish(needed, function.forward(inputs))
        }
        OpsKind::UnTracked(prep) => {
            prep.finish(function.forward(inputs.map(|input| input.into_primitive())))
        }
    }
}

#[derive(Debug)]
struct Registered<F>(F);

impl<B: LayerOps, F: Function<B, N>, const N: usize> Backward<B, N> for Registered<F> {
    /// The inputs that are needed.
    type State = Vec<NodeId>;

    fn backward(self, ops: Ops<Vec<NodeId>, N>, grads: &mut Gradients, stored: &mut Checkpointer) {
        let needed = ops.state.into_iter();
        let needed = needed.map(|id| stored.retrieve_node_output::<FloatTensor<B>>(id));
        let needed = needed.collect();
        let grad = grads.consume::<B>(&ops.node);
        let gradients = self.0.backward(needed, grad);
        for (parent, gradient) in ops.parents.into_iter().zip(gradients) {
            if let Some(node) = parent {
                grads.register::<B>(node.id, gradient);
            }
        }
    }
}

#[derive(Debug)]
struct Again<B, F, const N: usize> {
    function: F,
    inputs: [NodeId; N],
    backend: PhantomData<B>,
}

impl<B: LayerOps, F: Function<B, N>, const N: usize> RetroForward for Again<B, F, N> {
    fn forward(&self, states: &mut BackwardStates, output: NodeId) {
        let inputs = self
            .inputs
            .map(|id| states.get_state::<FloatTensor<B>>(&id));
        states.save(output, self.function.forward(inputs));
    }
}
