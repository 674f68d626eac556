//! The products of a convolution.

use burn::backend::{
    TensorMetadata,
    tensor::{Device, FloatTensor},
};
use burn::tensor::{Shape, TensorData};

use super::{
    DrawnRow, HostTensors, from_values,
    images::{AllProducts, Convolve, DrawnProducts, Images},
    passes::in_parallel,
};
use crate::rows::window::Window;

/// Burn's convolution, up to rounding.
pub(super) fn convolve<B: HostTensors>(
    input: FloatTensor<B>,
    weight: FloatTensor<B>,
    bias: Option<FloatTensor<B>>,
    window: Window,
) -> FloatTensor<B> {
    if !unfolds(&window) {
        return B::conv2d(input, weight, bias, window.options());
    }
    let weight = B::contiguous(weight);
    let of_group = window.group()[1] * window.patch();
    let weights = B::values(&weight)
        .chunks_exact(of_group)
        .map(<[f32]>::to_vec);
    convolve_by::<B>(input, weights.collect(), bias, window)
}

/// Burn's convolution from the values of the weight of each group.
fn convolve_by<B: HostTensors>(
    input: FloatTensor<B>,
    weights: Vec<Vec<f32>>,
    bias: Option<FloatTensor<B>>,
    window: Window,
) -> FloatTensor<B> {
    let device = input.device();
    let input = B::contiguous(input);
    let bias = bias.map(B::contiguous);
    let shape = [window.group()[1], window.patch()];
    let weights = weights.into_iter();
    let weights: Vec<_> = weights
        .map(|weight| from_values::<B>(weight, shape, &device))
        .collect();
    let [height, width] = window.output();
    let shape = [input.shape()[0], window.channels[1], height, width];
    let mut output = vec![0.0; shape.iter().product()];
    let images = Images::new(B::values(&input), window);
    let tiles = images.tiles(shape[0]);
    in_parallel(Convolve::<B> {
        images,
        weights: &weights,
        bias: bias.as_ref().map(B::values),
        device: &device,
        tiles: &tiles,
        outputs: &mut images.parts(&mut output, &tiles),
    });
    B::float_from_data(TensorData::new(output, shape), &device)
}

/// The gradient of the input: `grad` convolved with mirrored kernels. `input` only gives a shape.
pub(super) fn input_gradient<B: HostTensors>(
    input: FloatTensor<B>,
    weight: FloatTensor<B>,
    grad: FloatTensor<B>,
    window: Window,
) -> FloatTensor<B> {
    match window.mirrored() {
        Some(mirrored) if unfolds(&window) => {
            let weight = B::contiguous(weight);
            let weights = mirrored_weights(B::values(&weight), &window);
            convolve_by::<B>(grad, weights, None, mirrored)
        }
        _ => B::conv2d_x_backward(input, weight, grad, window.options()),
    }
}

/// The weight of each group, shape `[outputs, inputs, height, width]`, with inputs and outputs
/// exchanged and the kernels from their last value to the first.
fn mirrored_weights(weight: &[f32], window: &Window) -> Vec<Vec<f32>> {
    let ([inputs, outputs], taps) = (window.group(), window.taps());
    let groups = weight.chunks_exact(outputs * inputs * taps);
    let mirrored = |weight: &[f32]| {
        let mut mirrored = Vec::with_capacity(weight.len());
        for input in 0..inputs {
            for kernels in weight.chunks_exact(inputs * taps) {
                mirrored.extend(kernels[input * taps..][..taps].iter().rev());
            }
        }
        mirrored
    };
    groups.map(mirrored).collect()
}

/// Whether patches are unfolded here. A pointwise convolution already is a product. One with an
/// input channel in each of several groups has loops of its own in Burn.
fn unfolds(window: &Window) -> bool {
    let pointwise = window.taps() == 1 && window.stride == [1, 1];
    let depthwise = window.groups > 1 && window.group()[0] == 1;
    !pointwise && !depthwise
}

/// The exact gradient of the weight, shape `[channels, patch]`.
pub(super) fn exact_weight_gradient<B: HostTensors>(
    input: FloatTensor<B>,
    grad: FloatTensor<B>,
    window: Window,
) -> FloatTensor<B> {
    let device = input.device();
    let (input, grad) = (B::contiguous(input), B::contiguous(grad));
    let images = Images::new(B::values(&input), window);
    let products = in_parallel(AllProducts::<B> {
        images,
        grad: B::values(&grad),
        tiles: &images.tiles(input.shape()[0]),
        device: &device,
    });
    by_channel::<B>(products, &window, &device)
}

/// The products of each group, shape `[patch, channels]`, as a gradient `[channels, patch]`.
fn by_channel<B: HostTensors>(
    products: Vec<f32>,
    window: &Window,
    device: &Device<B>,
) -> FloatTensor<B> {
    let [_, outputs] = window.group();
    let shape = [window.groups, window.patch(), outputs];
    let products = B::float_from_data(TensorData::new(products, shape), device);
    let shape = Shape::new([window.channels[1], window.patch()]);
    B::float_reshape(B::float_swap_dims(products, 1, 2), shape)
}

/// The sum of the outer products of the drawn positions.
pub(super) fn product<B: HostTensors>(
    images: FloatTensor<B>,
    grad: FloatTensor<B>,
    drawn: &[DrawnRow],
    window: Window,
) -> FloatTensor<B> {
    let device = grad.device();
    let products = match drawn.is_empty() {
        true => vec![0.0; window.channels[1] * window.patch()],
        false => in_parallel(DrawnProducts::<B> {
            images: Images::new(B::values(&images), window),
            grad: B::values(&grad),
            places: drawn,
            device: &device,
        }),
    };
    by_channel::<B>(products, &window, &device)
}
