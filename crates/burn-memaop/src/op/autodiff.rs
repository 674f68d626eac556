//! The autodiff operation.

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
    layer_step::{Factor, LayerStep, from_primitive, into_primitive},
    noise::{StepNoise, stream},
    packed::PackedRows,
    packing::{Bits, Packing},
    portable,
    step::{Bias, Input, Packed},
    window::Window,
};
use crate::state::LayerState;

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

        tracked::<B, C>(input, weight, bias, None, layer)
    }

    fn memaop_conv2d(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: Bias<Self>,
        window: Window,
        layer: AopLayer,
    ) -> FloatTensor<Self> {
        if !weight.is_tracked() {
            return Self::conv2d(input, weight, bias.into_option(), window.options());
        }
        tracked::<B, C>(input, weight, bias, Some(window), layer)
    }

    fn memaop_relu(input: FloatTensor<Self>) -> FloatTensor<Self> {
        activation::relu::<B, C>(input)
    }

    fn memaop_gelu(input: FloatTensor<Self>) -> FloatTensor<Self> {
        activation::gelu::<B, C>(input)
    }

    fn memaop_packed_gelu(input: FloatTensor<Self>, noise: StepNoise) -> FloatTensor<Self> {
        activation::packed_gelu::<B, C>(input, noise)
    }
}

/// The forward pass, registered with the backward pass of this module: of a convolution, if there is a window.
fn tracked<B: MemAopOps, C: CheckpointStrategy>(
    input: FloatTensor<Autodiff<B, C>>,
    weight: FloatTensor<Autodiff<B, C>>,
    bias: Bias<Autodiff<B, C>>,
    window: Option<Window>,
    layer: AopLayer,
) -> FloatTensor<Autodiff<B, C>>
where
    DispatchTensor: DispatchKindConversion<B>,
{
    match bias {
        Bias::Some(bias) => {
            let nodes = [input.node(), weight.node(), bias.node()];
            registered::<B, C, 3>(nodes, input, weight, Some(bias), window, layer)
        }
        Bias::None => {
            let nodes = [input.node(), weight.node()];
            registered::<B, C, 2>(nodes, input, weight, None, window, layer)
        }
    }
}

fn registered<B: MemAopOps, C: CheckpointStrategy, const N: usize>(
    nodes: [NodeGuard; N],
    input: FloatTensor<Autodiff<B, C>>,
    weight: FloatTensor<Autodiff<B, C>>,
    bias: Option<FloatTensor<Autodiff<B, C>>>,
    window: Option<Window>,
    mut layer: AopLayer,
) -> FloatTensor<Autodiff<B, C>>
where
    MemAopBackward: Backward<B, N, State = State<B>>,
    DispatchTensor: DispatchKindConversion<B>,
{
    let prep = MemAopBackward.prepare::<C>(nodes).compute_bound();
    let OpsKind::Tracked(mut prep) = prep.stateful() else {
        unreachable!("the weight is tracked");
    };
    let state = State {
        input: match Bits::of(layer.config.stored_input) {
            None => Kept::Node(prep.checkpoint(&input)),
            Some(bits) => {
                let input = input.clone().into_primitive();
                Kept::Packed(packed::<B>(rows_to_pack::<B>(input), bits, &mut layer))
            }
        },
        // Only the gradient of the input needs the weight.
        weight: input.is_tracked().then(|| prep.checkpoint(&weight)),
        window,
        layer,
    };
    let (input, weight) = (input.into_primitive(), weight.into_primitive());
    let bias = bias.map(|bias| bias.into_primitive());
    let output = match window {
        None => B::linear(input, weight, bias),
        Some(window) => {
            let bias = bias.map_or(Bias::None, Bias::Some);
            B::memaop_convolve(input, weight, bias, window)
        }
    };
    prep.finish(state, output)
}

/// The least values of a packed row of an image: as many as share a scale.
const LEAST_PACKED: usize = 64;

/// A matrix as it is; of images a row for each channel of each, or for each image where channels are small.
fn rows_to_pack<B: Backend>(input: FloatTensor<B>) -> FloatTensor<B> {
    let shape = input.shape();
    if shape.num_dims() == 2 {
        return input;
    }
    let [images, channels, height, width] = shape.dims();
    let rows = match height * width < LEAST_PACKED {
        true => [images, channels * height * width],
        false => [images * channels, height * width],
    };
    B::float_reshape(input, Shape::new(rows))
}

/// The input in few bits, by random bits of this pass.
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
        // A layer with a packed input has a state to count its passes.
        let noise = layer.state.as_ref().map(|state| StepNoise {
            seed: layer.config.seed,
            step: state.here().lock().count_pass(),
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

/// The backward pass of a layer whose weight is tracked.
#[derive(Debug)]
struct MemAopBackward;

#[derive(Debug, Clone)]
struct State<B: Backend> {
    input: Kept<B>,
    /// Only when the input is tracked.
    weight: Option<NodeId>,
    /// Of a convolution.
    window: Option<Window>,
    layer: AopLayer,
}

/// What the backward pass finds the input by.
#[derive(Debug, Clone)]
enum Kept<B: Backend> {
    Node(NodeId),
    Packed(Packed<B>),
}

impl<B> Backward<B, 3> for MemAopBackward
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

impl<B> Backward<B, 2> for MemAopBackward
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
        window,
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
    let input = match window {
        None => Factor::Linear(input),
        Some(window) => Factor::Convolution(images(input, &grad, &window), window),
    };
    let weight = weight.map(|id| checkpointer.retrieve_node_output::<FloatTensor<B>>(id));
    let rows = match window {
        None => grad.shape()[0],
        Some(window) => grad.shape()[0] * window.positions(),
    };
    let state = layer.state.as_ref().map(LayerState::in_step);
    let step = state.as_ref().map(|(state, maps)| LayerStep {
        config: &layer.config,
        state,
        maps: *maps,
        time: layer.time,
        rows,
        with_input: input_node.is_some(),
        with_bias: bias_node.is_some(),
    });
    let mut planned = step.as_ref().map(|step| (step, step.plan()));

    if let (Some(node), Some(weight)) = (input_node, weight) {
        let grad = grad.clone();
        let gradient = match (&input, &mut planned) {
            (Factor::Convolution(images, window), _) => {
                B::memaop_convolve_input_gradient(images.clone(), weight, grad, *window)
            }
            // As `Linear` computes it, rows of zeros included.
            (_, None) => portable::exact_input_gradient::<B>(grad, weight),
            (_, Some((step, plan))) => {
                let key = stream(layer.config.seed, order as u64);
                step.input_gradient::<B>(grad, weight, plan, key)
            }
        };
        grads.register::<B>(node, gradient);
    }
    let sums = match weight_node {
        None => Bias::None,
        Some(node) => {
            let (gradient, sums) = match planned {
                None => (input.exact_gradient(grad.clone()), Bias::None),
                Some((step, plan)) => step.weight_gradient::<B>(input, grad.clone(), plan),
            };
            let gradient = match window {
                None => gradient,
                Some(window) => B::float_reshape(gradient, Shape::new(window.weight())),
            };
            grads.register::<B>(node, gradient);
            sums
        }
    };
    if let Some(node) = bias_node {
        let gradient = sums.into_option().unwrap_or_else(|| match window {
            None => B::linear_bias_backward(grad),
            Some(_) => portable::convolution::bias_gradient::<B>(grad),
        });
        grads.register::<B>(node, gradient);
    }
}

/// The input of a convolution, unpacked.
fn images<B: MemAopOps>(input: Input<B>, grad: &FloatTensor<B>, window: &Window) -> FloatTensor<B> {
    match input {
        Input::Full(input) => input,
        Input::Packed(packed) => {
            let ([channels, _], [height, width]) = (window.channels, window.size);
            let images = grad.shape()[0];
            let input = B::memaop_unpack(packed, grad.dtype().into());
            B::float_reshape(input, Shape::new([images, channels, height, width]))
        }
    }
}
