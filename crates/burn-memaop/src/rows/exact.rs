//! Exact operations, which draw no rows, where a backend can be faster than Burn's own.

use burn::backend::{
    Backend, ExtensionType, Scalar, TensorMetadata, backend_extension,
    tensor::{BoolTensor, FloatTensor},
};

use burn::tensor::{Shape, Slice};

use super::{
    packing::Packing,
    portable::{self, cast, working_dtype},
    random::{Dropout, Random},
    tensors::Packed,
    verbs::RowOps,
    window::Window,
};

/// A bias, or none.
#[derive(ExtensionType, Debug)]
pub(crate) enum Bias<B: Backend> {
    /// Shape `[d_output]`.
    Some(FloatTensor<B>),
    None,
}

impl<B: Backend> Bias<B> {
    pub(crate) fn into_option(self) -> Option<FloatTensor<B>> {
        match self {
            Self::Some(bias) => Some(bias),
            Self::None => None,
        }
    }
}

impl<B: Backend> From<Option<FloatTensor<B>>> for Bias<B> {
    fn from(bias: Option<FloatTensor<B>>) -> Self {
        bias.map_or(Self::None, Self::Some)
    }
}

/// A mask of attention, or none.
#[derive(ExtensionType, Debug)]
pub(crate) enum Mask<B: Backend> {
    /// True where a query does not attend to a key. It broadcasts to `[batch, heads, queries, keys]`.
    Some(BoolTensor<B>),
    None,
}

impl<B: Backend> Mask<B> {
    pub(crate) fn into_option(self) -> Option<BoolTensor<B>> {
        match self {
            Self::Some(mask) => Some(mask),
            Self::None => None,
        }
    }
}

/// How the scores of attention become weights.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attention {
    /// The value that masked scores get.
    pub(crate) min_float: f64,
    /// Whether 1 is added to the sum of the exponentials.
    pub(crate) quiet: bool,
    /// A dropout of the weights. The rows are all queries of all heads.
    pub(crate) dropout: Option<Dropout>,
}

/// The softmax of each row of scores.
#[derive(ExtensionType, Debug)]
pub(crate) struct Softmax<B: Backend> {
    /// The shape is that of the scores.
    pub(crate) weights: FloatTensor<B>,
    /// The largest score of each row, and the inverse of its sum of exponentials: shape `[..., 2]`,
    /// in single precision at least. One number, the logarithm of the sum, would be too coarse where
    /// all scores are masked and so large.
    pub(crate) rows: FloatTensor<B>,
}

/// Each default body is Burn's own operation. Fusion takes the default bodies too.
#[allow(unused_variables)]
#[backend_extension(
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(feature = "cubecl-backend"),
    LibTorch: cfg(feature = "tch"),
)]
pub(crate) trait ExactOps: RowOps {
    /// `grad @ weight^T`. A body may skip rows of zeros, such as layers above that draw rows leave.
    fn memaop_exact_input_product(
        grad: FloatTensor<Self>,
        weight: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        portable::exact_input_product::<Self>(grad, weight)
    }

    /// Burn's `conv2d`.
    fn memaop_convolve(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        #[extension_type] bias: Bias<Self>,
        window: Window,
    ) -> FloatTensor<Self> {
        Self::conv2d(input, weight, bias.into_option(), window.options())
    }

    /// The gradient of the input of a convolution. Of the input only the shape matters.
    fn memaop_convolve_input_gradient(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        window: Window,
    ) -> FloatTensor<Self> {
        Self::conv2d_x_backward(input, weight, grad, window.options())
    }

    /// The gradient of the weight of a convolution, shape `[channels, patch]`.
    fn memaop_convolve_weight_gradient(
        input: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        window: Window,
    ) -> FloatTensor<Self> {
        portable::exact_gradient_of_patches::<Self>(input, grad, window)
    }

    /// The softmax of each row of `scores`, shape `[batch, heads, queries, keys]`.
    fn memaop_softmax(scores: FloatTensor<Self>, quiet: bool) -> Softmax<Self> {
        softmax::<Self>(scores, quiet)
    }

    /// The weights of a softmax, computed again from the numbers of its rows.
    fn memaop_weights(scores: FloatTensor<Self>, rows: FloatTensor<Self>) -> FloatTensor<Self> {
        weights::<Self>(scores, rows)
    }

    /// The gradient of the scores of a softmax from that of its weights, `w (g - sum(w g))`.
    fn memaop_softmax_backward(
        weights: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        softmax_backward::<Self>(weights, grad)
    }

    /// The gradients of the input of a layer norm, a matrix, and of its gamma and beta.
    fn memaop_layer_norm_backward(
        input: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        epsilon: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        layer_norm_backward::<Self>(input, gamma, grad, epsilon)
    }

    /// Burn's `gelu` of a matrix.
    fn memaop_exact_gelu(input: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::gelu(input)
    }

    /// A gradient times the derivative of `gelu`.
    fn memaop_gelu_backward(
        input: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        Self::gelu_backward(input, grad)
    }

    /// The derivative of `gelu` in few bits.
    fn memaop_gelu_derivative(
        input: FloatTensor<Self>,
        packing: Packing,
        random: Random,
    ) -> Packed<Self> {
        gelu_derivative::<Self>(input, packing, random)
    }
}

pub(super) fn gelu_derivative<B: RowOps>(
    input: FloatTensor<B>,
    packing: Packing,
    random: Random,
) -> Packed<B> {
    let ones = B::float_ones(input.shape(), &input.device(), input.dtype().into());
    B::memaop_pack(B::gelu_backward(input, ones), packing, Some(random))
}

pub(super) fn softmax<B: Backend>(scores: FloatTensor<B>, quiet: bool) -> Softmax<B> {
    let last = scores.shape().num_dims() - 1;
    let largest = cast::<B>(scores.clone(), working_dtype(scores.dtype()));
    let wide = largest.clone();
    // Without the clamp, a row whose scores are all minus infinity would become NaN.
    let largest = B::float_max_dim(largest, last);
    let largest = B::float_clamp_min(largest, Scalar::from(f32::MIN));
    let sum = B::float_exp(B::float_sub(wide, largest.clone()));
    let sum = B::float_sum_dim(sum, last);
    let sum = match quiet {
        false => sum,
        true => B::float_add(sum, B::float_exp(B::float_neg(largest.clone()))),
    };
    let rows = B::float_cat(vec![largest, B::float_recip(sum)], last);
    Softmax {
        weights: weights::<B>(scores, rows.clone()),
        rows,
    }
}

pub(super) fn weights<B: Backend>(scores: FloatTensor<B>, rows: FloatTensor<B>) -> FloatTensor<B> {
    let (dtype, last) = (scores.dtype(), scores.shape().num_dims() - 1);
    let [largest, inverse] = [0..1, 1..2].map(|column| {
        let mut slices = vec![Slice::full(); last];
        slices.push(Slice::from(column));
        B::float_slice(rows.clone(), &slices)
    });
    let scores = cast::<B>(scores, working_dtype(dtype));
    let powers = B::float_exp(B::float_sub(scores, largest));
    cast::<B>(B::float_mul(powers, inverse), dtype.into())
}

pub(super) fn softmax_backward<B: Backend>(
    weights: FloatTensor<B>,
    grad: FloatTensor<B>,
) -> FloatTensor<B> {
    let (dtype, last) = (weights.dtype(), weights.shape().num_dims() - 1);
    let [weights, grad] = [weights, grad].map(|it| cast::<B>(it, working_dtype(dtype)));
    let sum = B::float_sum_dim(B::float_mul(weights.clone(), grad.clone()), last);
    let gradient = B::float_mul(weights, B::float_sub(grad, sum));
    cast::<B>(gradient, dtype.into())
}

pub(super) fn layer_norm_backward<B: Backend>(
    input: FloatTensor<B>,
    gamma: FloatTensor<B>,
    grad: FloatTensor<B>,
    epsilon: f64,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let (dtype, width) = (input.dtype(), gamma.shape()[0]);
    let [input, gamma, grad] = [input, gamma, grad].map(|it| cast::<B>(it, working_dtype(dtype)));
    let centred = B::float_sub(input.clone(), B::float_mean_dim(input, 1));
    let variance = B::float_mean_dim(B::float_mul(centred.clone(), centred.clone()), 1);
    let inverse = B::float_add_scalar(variance, Scalar::from(epsilon));
    let inverse = B::float_recip(B::float_sqrt(inverse));
    let normal = B::float_mul(centred, inverse.clone());
    let products = B::float_mul(grad.clone(), normal.clone());
    let [of_gamma, of_beta] = [products, grad.clone()].map(|columns| {
        let sum = B::float_sum_dim(columns, 0);
        B::float_reshape(sum, Shape::new([width]))
    });
    let grad = B::float_mul(grad, B::float_reshape(gamma, Shape::new([1, width])));
    let along = B::float_mean_dim(B::float_mul(grad.clone(), normal.clone()), 1);
    let across = B::float_sub(grad.clone(), B::float_mean_dim(grad, 1));
    let of_input = B::float_sub(across, B::float_mul(normal, along));
    let of_input = B::float_mul(of_input, inverse);
    let gradient = |wide| cast::<B>(wide, dtype.into());
    (gradient(of_input), gradient(of_gamma), gradient(of_beta))
}

#[cfg(feature = "tch")]
impl super::transfer::CopyOut for burn::backend::LibTorch {}
#[cfg(feature = "tch")]
impl RowOps for burn::backend::LibTorch {}
#[cfg(feature = "tch")]
impl ExactOps for burn::backend::LibTorch {}
