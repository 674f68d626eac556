//! The operations of this crate on plain tensors, for those who build layers of their own.
//!
//! [`MemAopLinear`](crate::MemAopLinear) calls them in its backward pass and keeps between steps what they
//! return.

use burn::{
    backend::{Backend, Dispatch, backend_extension, tensor::FloatTensor},
    tensor::{FloatDType, Tensor},
};

#[cfg(feature = "autodiff")]
mod activation;
#[cfg(feature = "autodiff")]
mod autodiff;
pub(crate) mod backends;
pub(crate) mod cost;
#[cfg(any(feature = "flex", feature = "ndarray"))]
mod cpu;
#[cfg(feature = "cubecl-backend")]
mod cube;
#[cfg(feature = "cubecl-backend")]
mod fusion;
#[cfg(feature = "autodiff")]
mod layer_step;
pub(crate) mod noise;
pub(crate) mod packed;
mod packing;
mod portable;
mod selection;
pub(crate) mod step;
pub(crate) mod window;

pub use packed::{Input, PackedRows, pack};
pub use step::{AopStep, InputStep, NoiseStep, PackStep};

use self::{
    noise::StepNoise,
    packed::SharedRows,
    packing::Packing,
    step::{Bias, Input as LayerInput, Packed, RowMemory, Share, WeightGradient},
    window::Window,
};
use crate::{
    config::AopConfig,
    state::{LayerState, noise_scale::StepTime, reading::Transfer},
};

/// The rows that earlier steps left out, in gradient units (no learning rate in them): one pair of factors
/// for each position of the batch; a pair of zeros is a position with nothing pending.
#[derive(Debug, Clone)]
pub struct Rows {
    /// `m^X`, shape `[rows, d_input]`.
    pub input: Tensor<2>,
    /// `m^G`, shape `[rows, d_output]`.
    pub grad: Tensor<2>,
    /// The number of steps that each pair holds something of, shape `[rows, 1]`, in single precision at
    /// least.
    pub age: Tensor<2>,
}

/// What [`weight_gradient`] returns.
#[derive(Debug, Clone)]
pub struct Gradient {
    /// The approximate gradient, shape `[d_input, d_output]`, in the dtype of the input.
    pub weight: Tensor<2>,
    /// The memory for the next step, where the step has one.
    pub memory: Option<Rows>,
    /// The exact gradient of the bias, shape `[d_output]`, if the step asks for it.
    pub bias: Option<Tensor<1>>,
    /// The share of the sum of all `|x^| |g^|` that the chosen rows carry, shape `[1]`, in single
    /// precision, if the step asks for it; NaN where the sum is 0.
    pub share: Option<Tensor<1>>,
}

/// The sum of the outer products of the chosen rows, times their weights with an unbiased method, and the
/// memory of the other rows.
///
/// Takes the memory by value, so that a backend that holds the only reference can update it in place. A
/// row whose score is NaN or infinite is not chosen, adds nothing to the gradient and leaves a pair of
/// zeros in the memory.
///
/// # Shapes
///
/// - input: `[rows, d_input]`, as a tensor or [packed](pack)
/// - grad: `[rows, d_output]`
/// - memory: any number of rows; the first `rows` take part, missing ones are zero
///
/// # Panics
///
/// Panics if the tensors are on an autodiff device or on different devices, `input` and `grad` differ in
/// dtype or rows, `step.k` is not in `1..=rows`, or a tensor of the memory has another width or another number
/// of rows than the others.
pub fn weight_gradient(
    input: impl Into<Input>,
    grad: Tensor<2>,
    memory: Option<Rows>,
    step: AopStep,
) -> Gradient {
    const NAME: &str = "weight_gradient";
    let input = input.into();
    let ([rows, d_input], [grad_rows, d_output]) = (input.dims(), grad.dims());
    same_device(NAME, [("input", input.on_device()), ("grad", &grad)]);
    expect(NAME, "the rows of grad", rows, grad_rows);
    expect(NAME, "the dtype of grad", input.dtype(), grad.dtype());
    assert!(
        (1..=rows).contains(&step.k),
        "{NAME}: step.k must be in 1..={rows}, the rows of the batch, but is {}",
        step.k
    );
    let memory = match memory {
        None => RowMemory::Empty,
        Some(Rows {
            input: kept,
            grad,
            age,
        }) => {
            let device = input.on_device();
            same_device(NAME, [("input", device), ("memory.input", &kept)]);
            same_device(NAME, [("memory.grad", &grad), ("memory.age", &age)]);
            same_device(NAME, [("input", device), ("memory.age", &age)]);
            let [kept_rows, width] = kept.dims();
            expect(NAME, "the width of memory.input", d_input, width);
            expect(
                NAME,
                "the shape of memory.grad",
                [kept_rows, d_output],
                grad.dims(),
            );
            expect(NAME, "the shape of memory.age", [kept_rows, 1], age.dims());
            RowMemory::Rows {
                input: kept.into_dispatch(),
                grad: grad.into_dispatch(),
                age: age.into_dispatch(),
            }
        }
    };
    let (input, grad) = (input.into_dispatch(), grad.into_dispatch());
    let gradient = Dispatch::memaop_weight_gradient(input, grad, memory, step);
    Gradient {
        weight: Tensor::from_dispatch(gradient.weight),
        memory: match gradient.memory {
            RowMemory::Empty => None,
            RowMemory::Rows { input, grad, age } => Some(Rows {
                input: Tensor::from_dispatch(input),
                grad: Tensor::from_dispatch(grad),
                age: Tensor::from_dispatch(age),
            }),
        },
        bias: gradient.bias.into_option().map(Tensor::from_dispatch),
        share: match gradient.share {
            Share::Measured(share) => Some(Tensor::from_dispatch(share)),
            Share::Skipped => None,
        },
    }
}

/// `grad @ weight^T` for some of the rows, zero in the others; for all of them where `step.k` is their
/// number.
///
/// # Shapes
///
/// - grad: `[rows, d_output]`
/// - weight: `[d_input, d_output]`
/// - output: `[rows, d_input]`
///
/// # Panics
///
/// Panics if the tensors are on an autodiff device or on different devices, or differ in dtype or
/// `d_output`, or if `step.k` is not in `1..=rows`.
pub fn input_gradient(grad: Tensor<2>, weight: Tensor<2>, step: InputStep) -> Tensor<2> {
    const NAME: &str = "input_gradient";
    let ([rows, d_output], [_, width]) = (grad.dims(), weight.dims());
    same_device(NAME, [("grad", &grad), ("weight", &weight)]);
    expect(NAME, "the second axis of weight", d_output, width);
    expect(NAME, "the dtype of weight", grad.dtype(), weight.dtype());
    assert!(
        (1..=rows).contains(&step.k),
        "{NAME}: step.k must be in 1..={rows}, the rows of grad, but is {}",
        step.k
    );
    let (grad, weight) = (grad.into_dispatch(), weight.into_dispatch());
    Tensor::from_dispatch(Dispatch::memaop_input_gradient(grad, weight, step))
}

/// What the noise of a gradient follows from, shape `[8]`, in single precision: the norm of `gradient`, the root of
/// the sum of the squares of all scores `s_m = |x_m| |g_m|`, and for each of `step.ks` the root of the variance that
/// [systematic sampling](crate::Method::Systematic) of so many rows adds, `sum (1 / p_m - 1) s_m^2`. A score that is
/// not finite counts as zero.
///
/// # Shapes
///
/// - input: `[rows, d_input]`
/// - grad: `[rows, d_output]`
/// - gradient: `[d_input, d_output]`, of the weight
///
/// # Panics
///
/// Panics if the tensors are on an autodiff device or on different devices, or differ in dtype or in a
/// dimension that they share, or if one of `step.ks` is not in `1..=rows`.
pub fn gradient_noise(
    input: impl Into<Input>,
    grad: Tensor<2>,
    gradient: Tensor<2>,
    step: NoiseStep,
) -> Tensor<1> {
    const NAME: &str = "gradient_noise";
    let input = input.into();
    let ([rows, d_input], [grad_rows, d_output]) = (input.dims(), grad.dims());
    same_device(NAME, [("input", input.on_device()), ("grad", &grad)]);
    same_device(
        NAME,
        [("input", input.on_device()), ("gradient", &gradient)],
    );
    expect(NAME, "the rows of grad", rows, grad_rows);
    expect(
        NAME,
        "the shape of gradient",
        [d_input, d_output],
        gradient.dims(),
    );
    for (name, tensor) in [("grad", &grad), ("gradient", &gradient)] {
        expect(
            NAME,
            &format!("the dtype of {name}"),
            input.dtype(),
            tensor.dtype(),
        );
    }
    assert!(
        step.ks.iter().all(|k| (1..=rows).contains(k)),
        "{NAME}: step.ks must be in 1..={rows}, the rows of the batch, but are {:?}",
        step.ks
    );
    let [grad, gradient] = [grad, gradient].map(Tensor::into_dispatch);
    let noise = Dispatch::memaop_noise(input.into_dispatch(), grad, gradient, step);
    Tensor::from_dispatch(noise)
}

fn expect<T: PartialEq + core::fmt::Debug>(name: &str, what: &str, expected: T, found: T) {
    assert!(
        expected == found,
        "{name}: {what} must be {expected:?}, as the other tensors have it, but is {found:?}"
    );
}

fn same_device(name: &str, [first, second]: [(&str, &Tensor<2>); 2]) {
    let devices = [first.1.device(), second.1.device()];
    assert!(
        devices[0] == devices[1] && !devices[0].is_autodiff(),
        "{name}: {} and {} must be on one device, without autodiff, but are on {devices:?}",
        first.0,
        second.0
    );
}

/// What the autodiff operation needs to know of its layer.
#[derive(Debug, Clone)]
pub(crate) struct AopLayer {
    pub(crate) config: AopConfig,
    /// Of a step, for the choice of K.
    pub(crate) time: StepTime,
    /// None where the gradients are exact at every step, and steps are not counted.
    pub(crate) state: Option<LayerState>,
    /// The packed input, where other layers have the same.
    pub(crate) shared: Option<SharedRows>,
}

/// Copies to the host that are waited for later.
pub(crate) trait CopyOut: Backend {
    /// Values that the first poll has copied, behind what the device has been given to do by then.
    fn copy_out(values: FloatTensor<Self>) -> Transfer {
        Box::pin(Self::float_into_data(values))
    }
}

impl CopyOut for Dispatch {}

#[cfg(feature = "autodiff")]
impl<B: Backend, S: burn_autodiff::checkpoint::strategy::CheckpointStrategy> CopyOut
    for burn_autodiff::Autodiff<B, S>
{
}

/// The operations as supplied by a backend extension; arguments have been checked.
///
/// Each has a default body in primitive operations, which defines its result; a backend overrides
/// what it can do faster.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(feature = "cubecl-backend"),
    LibTorch: cfg(feature = "tch"),
    Autodiff: cfg(feature = "autodiff"),
)]
pub(crate) trait MemAopOps: CopyOut {
    /// `input @ weight + bias`, as Burn's `linear`, of a matrix; under autodiff, with approximate
    /// gradients of weight and input.
    #[allow(unused_variables)]
    fn memaop_linear(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        #[extension_type] bias: Bias<Self>,
        layer: AopLayer,
    ) -> FloatTensor<Self> {
        Self::linear(input, weight, bias.into_option())
    }

    /// Burn's `conv2d`; under autodiff, with an approximate gradient of the weight.
    #[allow(unused_variables)]
    fn memaop_conv2d(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        #[extension_type] bias: Bias<Self>,
        window: Window,
        layer: AopLayer,
    ) -> FloatTensor<Self> {
        Self::memaop_convolve(input, weight, bias, window)
    }

    /// The forward pass alone.
    #[allow(unused_variables)]
    fn memaop_convolve(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        #[extension_type] bias: Bias<Self>,
        window: Window,
    ) -> FloatTensor<Self> {
        Self::conv2d(input, weight, bias.into_option(), window.options())
    }

    /// The gradient of the input of a convolution, of which only the shape counts.
    #[allow(unused_variables)]
    fn memaop_convolve_input_gradient(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        window: Window,
    ) -> FloatTensor<Self> {
        Self::conv2d_x_backward(input, weight, grad, window.options())
    }

    /// The exact gradient of the weight of a convolution, shape `[channels, patch]`.
    #[allow(unused_variables)]
    fn memaop_convolve_exact_gradient(
        input: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        window: Window,
    ) -> FloatTensor<Self> {
        portable::convolution::exact_weight_gradient::<Self>(input, grad, window)
    }

    /// As [`weight_gradient`], of a convolution, whose rows are the positions of its output: shape `[channels, patch]`.
    /// There is no memory.
    #[allow(unused_variables)]
    fn memaop_convolve_weight_gradient(
        input: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        window: Window,
        step: AopStep,
    ) -> WeightGradient<Self> {
        portable::convolution::weight_gradient::<Self>(input, grad, window, step)
    }

    /// Burn's `relu` of a matrix; under autodiff, with a backward pass that keeps one bit a value.
    #[allow(unused_variables)]
    fn memaop_relu(input: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::relu(input)
    }

    /// Burn's `gelu` of a matrix.
    #[allow(unused_variables)]
    fn memaop_gelu(input: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::gelu(input)
    }

    /// The same; under autodiff, with a backward pass that keeps 8 bits a value, rounded by the noise.
    #[allow(unused_variables)]
    fn memaop_packed_gelu(input: FloatTensor<Self>, noise: StepNoise) -> FloatTensor<Self> {
        Self::memaop_gelu(input)
    }

    /// A gradient times the derivative of `gelu`.
    #[allow(unused_variables)]
    fn memaop_gelu_backward(
        input: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        Self::gelu_backward(input, grad)
    }

    /// The derivative of `gelu` in few bits.
    #[allow(unused_variables)]
    fn memaop_gelu_derivative(
        input: FloatTensor<Self>,
        packing: Packing,
        noise: StepNoise,
    ) -> Packed<Self> {
        let derivative = portable::gelu_derivative::<Self>(input);
        Self::memaop_pack(derivative, packing, Some(noise))
    }

    /// As [`weight_gradient`].
    // Without a backend the macro has no use for the arguments.
    #[allow(unused_variables)]
    fn memaop_weight_gradient(
        #[extension_type] input: LayerInput<Self>,
        grad: FloatTensor<Self>,
        #[extension_type] memory: RowMemory<Self>,
        step: AopStep,
    ) -> WeightGradient<Self> {
        portable::weight_gradient::<Self>(input, grad, memory, step)
    }

    /// As [`input_gradient`].
    #[allow(unused_variables)]
    fn memaop_input_gradient(
        grad: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        step: InputStep,
    ) -> FloatTensor<Self> {
        portable::input_gradient::<Self>(grad, weight, step)
    }

    /// As [`gradient_noise`].
    #[allow(unused_variables)]
    fn memaop_noise(
        #[extension_type] input: LayerInput<Self>,
        grad: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        step: NoiseStep,
    ) -> FloatTensor<Self> {
        portable::noise::<Self>(input, grad, gradient, step)
    }

    /// Rows in few bits; without noise, values are rounded to the nearest.
    #[allow(unused_variables)]
    fn memaop_pack(
        input: FloatTensor<Self>,
        packing: Packing,
        noise: Option<StepNoise>,
    ) -> Packed<Self> {
        portable::pack::<Self>(input, packing, noise)
    }

    /// All packed rows, in a type.
    #[allow(unused_variables)]
    fn memaop_unpack(
        #[extension_type] packed: Packed<Self>,
        dtype: FloatDType,
    ) -> FloatTensor<Self> {
        portable::unpack::<Self>(packed, dtype)
    }

    /// The product of packed values and others, zero where the packed ones are.
    #[allow(unused_variables)]
    fn memaop_times(
        #[extension_type] packed: Packed<Self>,
        values: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        portable::times::<Self>(packed, values)
    }
}
