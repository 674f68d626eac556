//! The operations of a convolution, as those of a linear layer in `cpu.rs`.

use burn::backend::{
    TensorMetadata,
    tensor::{Device, FloatTensor},
};
use burn::tensor::{Shape, TensorData};

use super::{
    HostTensors, adds, from_values,
    images::{AllProducts, ChosenProducts, Convolve, Images, Place},
    positions::ScorePositions,
    rows::{Real, in_parallel},
    select, share,
};
use crate::op::{
    step::{AopStep, Bias, RowMemory, Share, WeightGradient},
    window::Window,
};

/// Burn's convolution, to rounding.
pub(crate) fn convolve<B: HostTensors<E>, E: Real>(
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
    let weights = B::values(&weight).chunks_exact(of_group).map(<[E]>::to_vec);
    convolve_by::<B, E>(input, weights.collect(), bias, window)
}

/// By the values of the weight of each group.
fn convolve_by<B: HostTensors<E>, E: Real>(
    input: FloatTensor<B>,
    weights: Vec<Vec<E>>,
    bias: Option<FloatTensor<B>>,
    window: Window,
) -> FloatTensor<B> {
    let device = input.device();
    let input = B::contiguous(input);
    let bias = bias.map(B::contiguous);
    let shape = [window.group()[1], window.patch()];
    let weights = weights.into_iter();
    let weights: Vec<_> = weights
        .map(|weight| from_values::<B, E>(weight, shape, &device))
        .collect();
    let [height, width] = window.output();
    let shape = [input.shape()[0], window.channels[1], height, width];
    let mut output = vec![E::zero(); shape.iter().product()];
    let images = Images::new(B::values(&input), window);
    let tiles = images.tiles(shape[0]);
    in_parallel(Convolve::<B, E> {
        images,
        weights: &weights,
        bias: bias.as_ref().map(B::values),
        device: &device,
        tiles: &tiles,
        outputs: &mut images.parts(&mut output, &tiles),
    });
    B::float_from_data(TensorData::new(output, shape), &device)
}

/// The gradient of the input, whose values do not matter: the convolution of `grad` with the mirrored kernels.
pub(crate) fn input_gradient<B: HostTensors<E>, E: Real>(
    input: FloatTensor<B>,
    weight: FloatTensor<B>,
    grad: FloatTensor<B>,
    window: Window,
) -> FloatTensor<B> {
    match window.mirrored() {
        Some(mirrored) if unfolds(&window) => {
            let weight = B::contiguous(weight);
            let weights = mirrored_weights(B::values(&weight), &window);
            convolve_by::<B, E>(grad, weights, None, mirrored)
        }
        _ => B::conv2d_x_backward(input, weight, grad, window.options()),
    }
}

/// The weight of each group, shape `[outputs, inputs, height, width]`, with inputs and outputs exchanged and the kernels
/// from their last value to the first.
fn mirrored_weights<E: Real>(weight: &[E], window: &Window) -> Vec<Vec<E>> {
    let ([inputs, outputs], taps) = (window.group(), window.taps());
    let groups = weight.chunks_exact(outputs * inputs * taps);
    let mirrored = |weight: &[E]| {
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

/// Whether patches are unfolded here. A pointwise convolution is a product already, and one with an input channel in each
/// of several groups has loops of its own in Burn.
fn unfolds(window: &Window) -> bool {
    let pointwise = window.taps() == 1 && window.stride == [1, 1];
    let depthwise = window.groups > 1 && window.group()[0] == 1;
    !pointwise && !depthwise
}

/// The exact gradient of the weight, shape `[channels, patch]`.
pub(crate) fn exact_weight_gradient<B: HostTensors<E>, E: Real>(
    input: FloatTensor<B>,
    grad: FloatTensor<B>,
    window: Window,
) -> FloatTensor<B> {
    let device = input.device();
    let (input, grad) = (B::contiguous(input), B::contiguous(grad));
    let images = Images::new(B::values(&input), window);
    let products = in_parallel(AllProducts::<B, E> {
        images,
        grad: B::values(&grad),
        tiles: &images.tiles(input.shape()[0]),
        device: &device,
    });
    by_channel::<B, E>(products, &window, &device)
}

/// The products, of shape `[patch, channels]` in each group, as a gradient of shape `[channels, patch]`.
fn by_channel<B: HostTensors<E>, E: Real>(
    products: Vec<E>,
    window: &Window,
    device: &Device<B>,
) -> FloatTensor<B> {
    let [_, outputs] = window.group();
    let shape = [window.groups, window.patch(), outputs];
    let products = B::float_from_data(TensorData::new(products, shape), device);
    let shape = Shape::new([window.channels[1], window.patch()]);
    B::float_reshape(B::float_swap_dims(products, 1, 2), shape)
}

/// The same result as the default body. There is no memory.
pub(crate) fn weight_gradient<B: HostTensors<E>, E: Real>(
    input: FloatTensor<B>,
    grad: FloatTensor<B>,
    window: Window,
    step: AopStep,
) -> WeightGradient<B> {
    let device = input.device();
    let (input, grad) = (B::contiguous(input), B::contiguous(grad));
    let images = Images::new(B::values(&input), window);
    let (scores, sums) = scores(images, B::values(&grad), step.bias);
    let selection = select(&scores, &step);
    let weight = |index: usize| match &selection.weights {
        None => E::one(),
        Some(weights) => E::of(weights[index]),
    };
    let places = selection.rows.iter().enumerate();
    let places = places.filter(|&(_, &row)| adds(scores[row]));
    let mut places: Vec<_> = places
        .map(|(index, &row)| Place {
            row,
            weight: weight(index),
        })
        .collect();
    // Draws with replacement come in any order.
    places.sort_unstable_by_key(|place| place.row);
    let products = match places.is_empty() {
        true => vec![E::zero(); window.channels[1] * window.patch()],
        false => in_parallel(ChosenProducts::<B, E> {
            images,
            grad: B::values(&grad),
            places: &places,
            device: &device,
        }),
    };
    let vector = |values: Vec<E>| {
        let shape = [values.len()];
        B::float_from_data(TensorData::new(values, shape), &device)
    };
    WeightGradient {
        weight: by_channel::<B, E>(products, &window, &device),
        memory: RowMemory::Empty,
        bias: match step.bias {
            true => Bias::Some(vector(sums)),
            false => Bias::None,
        },
        share: match step.measure {
            true => {
                let share = share(&scores, &selection) as f32;
                let data = TensorData::new(vec![share], [1]);
                Share::Measured(B::float_from_data(data, &device))
            }
            false => Share::Skipped,
        },
    }
}

/// `|x| |g|` of every position, and the sums of the channels of the gradient, if they are asked for.
fn scores<E: Real>(images: Images<'_, E>, grad: &[E], sum: bool) -> (Vec<E>, Vec<E>) {
    let mut scores = vec![E::zero(); images.rows(grad)];
    let sums = in_parallel(ScorePositions {
        images,
        grad,
        scores: &mut scores,
        sum,
    });
    (scores, sums)
}
