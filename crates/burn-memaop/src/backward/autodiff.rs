//! The autodiff operation of a layer.

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
    AopLayer, LayerOps, activation, attention,
    plan::{LayerStep, Outcome, Plan},
    recipe,
    recomputed::{self, LayerNorm, apply},
};
use crate::{
    config::Method,
    rows::{
        Attention, Bias, Candidates, Draw, ExactOps, Factor, Mask, Memory, Packed, RowOps,
        bias_of_channels,
        packing::{Bits, Packing},
        random::{Dropout, Random, stream},
        transfer::CopyOut,
        window::Window,
    },
    state::{choice::FIGURES, reading::Reading, rows::Rows},
};

impl<B: LayerOps, C: CheckpointStrategy> CopyOut for Autodiff<B, C> {}
impl<B: LayerOps, C: CheckpointStrategy> RowOps for Autodiff<B, C> {}
impl<B: LayerOps, C: CheckpointStrategy> ExactOps for Autodiff<B, C> {}

impl<B, C> LayerOps for Autodiff<B, C>
where
    B: LayerOps,
    C: CheckpointStrategy,
    DispatchTensor: DispatchKindConversion<B>,
{
    fn memaop_linear(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: Bias<Self>,
        layer: AopLayer,
    ) -> FloatTensor<Self> {
        match weight.is_tracked() {
            true => tracked::<B, C>(input, weight, bias, None, layer),
            false => Self::linear(input, weight, bias.into_option()),
        }
    }

    fn memaop_conv2d(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: Bias<Self>,
        window: Window,
        layer: AopLayer,
    ) -> FloatTensor<Self> {
        match weight.is_tracked() {
            true => tracked::<B, C>(input, weight, bias, Some(window), layer),
            false => Self::conv2d(input, weight, bias.into_option(), window.options()),
        }
    }

    fn memaop_relu(input: FloatTensor<Self>) -> FloatTensor<Self> {
        activation::relu::<B, C>(input)
    }

    fn memaop_attention(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        of_keys: Mask<Self>,
        of_pairs: Mask<Self>,
        attention: Attention,
    ) -> FloatTensor<Self> {
        attention::tracked::attention::<B, C>([query, key, value], [of_keys, of_pairs], attention)
    }

    fn memaop_gelu(input: FloatTensor<Self>) -> FloatTensor<Self> {
        apply::<B, C, _, 1>(recomputed::Gelu, [input])
    }

    fn memaop_packed_gelu(input: FloatTensor<Self>, random: Random) -> FloatTensor<Self> {
        activation::packed_gelu::<B, C>(input, random)
    }

    fn memaop_dropout(input: FloatTensor<Self>, dropout: Dropout) -> FloatTensor<Self> {
        apply::<B, C, _, 1>(dropout, [input])
    }

    fn memaop_layer_norm(
        input: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: Bias<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self> {
        let norm = LayerNorm { epsilon };
        match beta {
            Bias::Some(beta) => apply::<B, C, _, 3>(norm, [input, gamma, beta]),
            Bias::None => apply::<B, C, _, 2>(norm, [input, gamma]),
        }
    }
}

/// Runs the forward pass of a linear layer, or of a convolution if there is a window, and registers
/// its backward pass.
fn tracked<B: LayerOps, C: CheckpointStrategy>(
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

fn registered<B: LayerOps, C: CheckpointStrategy, const N: usize>(
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
            None => Stored::Node(prep.checkpoint(&input)),
            Some(bits) => {
                let input = rows_to_pack::<B>(input.clone().into_primitive());
                Stored::Packed(packed::<B>(input, bits, &mut layer))
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
        Some(window) => B::memaop_convolve(input, weight, bias.into(), window),
    };
    prep.finish(state, output)
}

/// A smaller channel of an image gets no packed row of its own, because rows do not share scales.
const LEAST_PACKED: usize = 64;

/// The matrix that is packed: the input itself, or a row for each channel of each image. If
/// channels are small, an image is one row.
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

/// The input in few bits, rounded by the random bits of this pass.
fn packed<B: LayerOps>(input: FloatTensor<B>, bits: Bits, layer: &mut AopLayer) -> Packed<B>
where
    DispatchTensor: DispatchKindConversion<B>,
{
    let packing = Packing {
        bits,
        width: input.shape()[1],
    };
    let pack = || {
        // A layer with a packed input has a state, which counts its passes.
        let random = layer.state.as_ref().map(|state| Random {
            seed: layer.config.seed,
            step: state.here().lock().count_pass(),
        });
        B::memaop_pack(input.clone(), packing, random)
    };
    let Some(shared) = layer.shared.take() else {
        return pack();
    };
    let rows = shared.0.get_or_init(|| {
        let packed = pack();
        Packed {
            words: DispatchTensor::from_backend(BackendTensor::Int(packed.words)),
            norms: DispatchTensor::from_backend(BackendTensor::Float(packed.norms)),
            packing,
        }
    });
    if rows.packing != packing {
        return pack();
    }
    let here = |tensor: &DispatchTensor| {
        DispatchTensor::try_into_backend(tensor.clone())
            .expect("layers that share an input share its device")
    };
    Packed {
        words: here(&rows.words).int(),
        norms: here(&rows.norms).float(),
        packing,
    }
}

/// The backward pass of a layer whose weight is tracked.
#[derive(Debug)]
struct MemAopBackward;

#[derive(Debug, Clone)]
struct State<B: Backend> {
    input: Stored<B>,
    /// None unless the input is tracked.
    weight: Option<NodeId>,
    /// None in a linear layer.
    window: Option<Window>,
    layer: AopLayer,
}

/// Where the backward pass finds the input.
#[derive(Debug, Clone)]
enum Stored<B: Backend> {
    Node(NodeId),
    Packed(Packed<B>),
}

impl<B> Backward<B, 3> for MemAopBackward
where
    B: LayerOps,
    DispatchTensor: DispatchKindConversion<B>,
{
    type State = State<B>;

    fn backward(self, ops: Ops<State<B>, 3>, grads: &mut Gradients, stored: &mut Checkpointer) {
        let parents = ops.parents.map(|parent| parent.map(|node| node.id));
        let grad = grads.consume::<B>(&ops.node);
        propagate::<B>(ops.state, ops.node.order, parents, grad, grads, stored);
    }
}

impl<B> Backward<B, 2> for MemAopBackward
where
    B: LayerOps,
    DispatchTensor: DispatchKindConversion<B>,
{
    type State = State<B>;

    fn backward(self, ops: Ops<State<B>, 2>, grads: &mut Gradients, stored: &mut Checkpointer) {
        let [input, weight] = ops.parents.map(|parent| parent.map(|node| node.id));
        let (parents, grad) = ([input, weight, None], grads.consume::<B>(&ops.node));
        propagate::<B>(ops.state, ops.node.order, parents, grad, grads, stored);
    }
}

/// Registers the gradients of input, weight and bias. `order` is the place in the autodiff graph.
fn propagate<B>(
    state: State<B>,
    order: usize,
    [input_node, weight_node, bias_node]: [Option<NodeId>; 3],
    grad: FloatTensor<B>,
    grads: &mut Gradients,
    stored: &mut Checkpointer,
) where
    B: LayerOps,
    DispatchTensor: DispatchKindConversion<B>,
{
    let State { window, layer, .. } = &state;
    let input = factor::<B>(&state, &grad, stored);
    let weight = state
        .weight
        .map(|id| stored.retrieve_node_output::<FloatTensor<B>>(id));
    let in_step = layer.state.as_ref().map(|state| state.in_step());
    let step = in_step.map(|(state, maps)| LayerStep {
        layer,
        state,
        maps,
        rows: input.rows(&grad),
        with_input: input_node.is_some(),
    });
    let mut planned = step.as_ref().map(|step| (step, step.plan()));
    let mut outcome = Outcome::default();

    if let (Some(node), Some(weight)) = (input_node, weight) {
        let gradient = match (&input, &planned) {
            (Factor::Patches(images, window), _) => {
                let (images, grad) = (images.clone(), grad.clone());
                B::memaop_convolve_input_gradient(images, weight, grad, *window)
            }
            // Burn's `Linear` computes this product too, and does not skip rows of zeros.
            (_, None) => B::float_matmul(grad.clone(), B::float_transpose(weight)),
            (_, Some((_, plan))) => {
                let measured = plan.measures_input;
                outcome.input_figures = measure::<B>(&Factor::One, &grad, None, measured);
                let draw = Draw {
                    k: plan.input_rows,
                    method: Method::Systematic,
                    random: Random {
                        seed: stream(layer.config.seed, order as u64),
                        step: plan.step,
                    },
                };
                recipe::input_gradient::<B>(grad.clone(), weight, draw)
            }
        };
        grads.register::<B>(node, gradient);
    }
    if let Some(node) = weight_node {
        let gradient = match &mut planned {
            None => recipe::exact_weight_gradient::<B>(input, grad.clone()),
            Some((_, plan)) => weight_gradient::<B>(layer, input, &grad, plan, &mut outcome),
        };
        let gradient = match window {
            None => gradient,
            Some(window) => B::float_reshape(gradient, Shape::new(window.weight())),
        };
        grads.register::<B>(node, gradient);
    }
    if let Some((step, plan)) = planned {
        step.note(plan.step, outcome);
    }
    if let Some(node) = bias_node {
        let gradient = match window {
            None => B::linear_bias_backward(grad),
            Some(_) => bias_of_channels::<B>(grad),
        };
        grads.register::<B>(node, gradient);
    }
}

/// Computes the gradient of the weight as planned, and adds what is to be noted to `outcome`.
fn weight_gradient<B>(
    layer: &AopLayer,
    input: Factor<B>,
    grad: &FloatTensor<B>,
    plan: &mut Plan,
    outcome: &mut Outcome,
) -> FloatTensor<B>
where
    B: LayerOps,
    DispatchTensor: DispatchKindConversion<B>,
{
    let measured = plan.measures.map(|ks| (input.clone(), ks));
    let gradient = if plan.k >= input.rows(grad) {
        recipe::exact_weight_gradient::<B>(input, grad.clone())
    } else {
        let draw = Draw {
            k: plan.k,
            method: layer.config.method,
            random: Random {
                seed: layer.config.seed,
                step: plan.step,
            },
        };
        let compared = plan.compares.then(|| input.clone());
        let memory = plan.memory.take();
        let memory = memory.and_then(|rows| of_layer::<B>(rows, layer, &input, grad));
        let (gradient, memory) = recipe::weight_gradient::<B>(input, grad.clone(), memory, draw);
        outcome.memory = memory.map(of_state::<B>);
        outcome.error = compared.map(|input| {
            let exact = recipe::exact_weight_gradient::<B>(input, grad.clone());
            let distance = recipe::distance::<B>(gradient.clone(), exact);
            Reading::start(B::copy_out(distance))
        });
        gradient
    };
    if let Some((input, ks)) = measured {
        outcome.figures = measure::<B>(&input, grad, Some(&gradient), Some(ks));
    }
    gradient
}

/// Begins to read the figures of the noise of a gradient, if this step measures it.
fn measure<B: LayerOps>(
    input: &Factor<B>,
    grad: &FloatTensor<B>,
    gradient: Option<&FloatTensor<B>>,
    ks: Option<Candidates>,
) -> Option<Reading<FIGURES>> {
    let ks = ks?;
    if let Factor::Patches(..) = input {
        return None;
    }
    let noise = recipe::noise::<B>(input.clone(), grad.clone(), gradient.cloned(), ks);
    Some(Reading::start(B::copy_out(noise)))
}

/// The input as a factor of the outer products.
fn factor<B: LayerOps>(
    state: &State<B>,
    grad: &FloatTensor<B>,
    stored: &mut Checkpointer,
) -> Factor<B> {
    let input = match &state.input {
        Stored::Node(id) => Factor::Matrix(stored.retrieve_node_output::<FloatTensor<B>>(*id)),
        Stored::Packed(packed) => Factor::Packed(packed.clone()),
    };
    let Some(window) = state.window else {
        return input;
    };
    let images = match input {
        Factor::Packed(packed) => {
            let ([channels, _], [height, width]) = (window.channels, window.size);
            let shape = Shape::new([grad.shape()[0], channels, height, width]);
            B::float_reshape(B::memaop_unpack(packed, grad.dtype().into()), shape)
        }
        Factor::Matrix(images) => images,
        input => return input,
    };
    Factor::Patches(images, window)
}

/// The memory on the device of the gradient. Returns None if the layer has no memory any more, or
/// if the widths do not fit, because the weight was exchanged for another one.
fn of_layer<B>(
    rows: Rows,
    layer: &AopLayer,
    input: &Factor<B>,
    grad: &FloatTensor<B>,
) -> Option<Memory<B>>
where
    B: LayerOps,
    DispatchTensor: DispatchKindConversion<B>,
{
    layer.config.method.memory().decay()?;
    let d_input = match input {
        Factor::Matrix(input) => input.shape()[1],
        Factor::Packed(packed) => packed.packing.width,
        Factor::One | Factor::Patches(..) => return None,
    };
    if [rows.input.dims()[1], rows.grad.dims()[1]] != [d_input, grad.shape()[1]] {
        return None;
    }
    let device = tensor::<B, 2>(grad.clone()).device();
    let rows = rows.moved_to(&device);
    let primitive = |tensor: Tensor<2>| {
        DispatchTensor::try_into_backend(tensor.into_dispatch())
            .expect("the memory was moved to the device of the gradient")
            .float()
    };
    Some(Memory {
        input: primitive(rows.input),
        grad: primitive(rows.grad),
        age: primitive(rows.age),
    })
}

fn of_state<B>(memory: Memory<B>) -> Rows
where
    B: LayerOps,
    DispatchTensor: DispatchKindConversion<B>,
{
    Rows {
        input: tensor::<B, 2>(memory.input),
        grad: tensor::<B, 2>(memory.grad),
        age: tensor::<B, 2>(memory.age),
    }
}

fn tensor<B: Backend, const D: usize>(tensor: FloatTensor<B>) -> Tensor<D>
where
    DispatchTensor: DispatchKindConversion<B>,
{
    Tensor::from_dispatch(DispatchTensor::from_backend(BackendTensor::Float(tensor)))
}
