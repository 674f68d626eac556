//! The operations of a convolution in primitive operations.

use burn::backend::{
    Backend, Scalar, TensorMetadata, get_or_init_device_settings, tensor::FloatTensor,
};
use burn::tensor::{DType, FloatDType, Shape, Slice, TensorData};

use super::{Chosen, cast, floats, read, share, working_dtype};
use crate::op::{
    selection::{self, Selection},
    step::{AopStep, Bias, RowMemory, Share, WeightGradient},
    window::Window,
};

pub(crate) fn exact_weight_gradient<B: Backend>(
    input: FloatTensor<B>,
    grad: FloatTensor<B>,
    window: Window,
) -> FloatTensor<B> {
    // Of the weight only the shape counts.
    let (shape, dtype) = (Shape::new(window.weight()), grad.dtype().into());
    let weight = B::float_empty(shape, &grad.device(), dtype);
    let gradient = B::conv2d_weight_backward(input, weight, grad, window.options());
    B::float_reshape(gradient, Shape::new([window.channels[1], window.patch()]))
}

pub(crate) fn weight_gradient<B: Backend>(
    input: FloatTensor<B>,
    grad: FloatTensor<B>,
    window: Window,
    step: AopStep,
) -> WeightGradient<B> {
    let dtype: FloatDType = grad.dtype().into();
    let bias = match step.bias {
        true => Bias::Some(bias_gradient::<B>(grad.clone())),
        false => Bias::None,
    };
    let working = working_dtype(grad.dtype());
    let (input, grad) = (cast::<B>(input, working), cast::<B>(grad, working));

    let scores = scores::<B>(&input, &grad, &window);
    let sizes = read::<B>(scores.clone());
    let selection = selection::select(sizes.len(), &step, || sizes.clone());
    let share = match step.measure {
        true => {
            let chosen = Chosen::<B>::new(selection.clone(), &scores);
            Share::Measured(share::<B>(&scores, &chosen.rows))
        }
        false => Share::Skipped,
    };
    let selection = that_add(selection, &sizes);
    WeightGradient {
        weight: product::<B>(input, grad, selection, &window, dtype),
        memory: RowMemory::Empty,
        bias,
        share,
    }
}

/// The sums of the channels, shape `[channels]`.
pub(crate) fn bias_gradient<B: Backend>(grad: FloatTensor<B>) -> FloatTensor<B> {
    let [images, channels, height, width] = grad.shape().dims();
    let rows = Shape::new([images, channels, height * width]);
    let sums = B::float_sum_dim(B::float_reshape(grad, rows), 2);
    let sums = B::float_sum_dim(sums, 0);
    B::float_reshape(sums, Shape::new([channels]))
}

/// `|x| |g|` of every position, shape `[positions]`; of several groups the root of the sum of the squares.
fn scores<B: Backend>(
    input: &FloatTensor<B>,
    grad: &FloatTensor<B>,
    window: &Window,
) -> FloatTensor<B> {
    let images = input.shape()[0];
    let (groups, positions) = (window.groups, window.positions());
    let [height, width] = window.size;
    let squares = |tensor: &FloatTensor<B>, channels: usize, plane: usize| {
        let shape = Shape::new([images * groups, channels, plane]);
        let squares = B::float_mul(tensor.clone(), tensor.clone());
        B::float_sum_dim(B::float_reshape(squares, shape), 1)
    };
    let [inputs, outputs] = window.group();
    let input = squares(input, inputs, height * width);
    let input = B::float_reshape(input, Shape::new([images * groups, 1, height, width]));
    let seen = Window {
        groups: 1,
        ..*window
    };
    let [down, right] = window.kernel;
    let ones = B::float_ones(
        Shape::new([1, 1, down, right]),
        &grad.device(),
        grad.dtype().into(),
    );
    let patches = B::conv2d(input, ones, None, seen.options());

    let shape = Shape::new([images, groups, positions]);
    let norm = |squares| B::float_sqrt(B::float_reshape(squares, shape.clone()));
    let scores = B::float_mul(norm(patches), norm(squares(grad, outputs, positions)));
    let scores = match groups {
        1 => scores,
        _ => {
            // Of numbers up to 1, as squares could overflow.
            let largest = B::float_max_dim(scores.clone(), 1);
            let bools = get_or_init_device_settings::<B>(&grad.device()).bool_dtype;
            let nothing = B::float_equal_elem(largest.clone(), Scalar::from(0.0), bools);
            let divisor = B::float_mask_fill(largest.clone(), nothing, Scalar::from(1.0));
            let parts = B::float_div(scores, divisor);
            let squares = B::float_sum_dim(B::float_mul(parts.clone(), parts), 1);
            B::float_mul(largest, B::float_sqrt(squares))
        }
    };
    B::float_reshape(scores, Shape::new([images * positions]))
}

/// The rows that add something finite.
fn that_add(selection: Selection, scores: &[f64]) -> Selection {
    let weights = selection.weights;
    let weights = weights.unwrap_or_else(|| vec![1.0; selection.rows.len()]);
    let rows = selection.rows.into_iter().zip(weights);
    let (rows, weights) = rows
        .filter(|&(row, _)| scores[row].is_finite() && scores[row] > 0.0)
        .unzip();
    Selection {
        rows,
        weights: Some(weights),
    }
}

/// The sum of the chosen outer products, shape `[channels, patch]`. Only chosen patches are unfolded.
fn product<B: Backend>(
    input: FloatTensor<B>,
    grad: FloatTensor<B>,
    selection: Selection,
    window: &Window,
    dtype: FloatDType,
) -> FloatTensor<B> {
    let device = grad.device();
    let [images, channels, height, width] = grad.shape().dims();
    let count = selection.rows.len();
    if count == 0 {
        let shape = Shape::new([channels, window.patch()]);
        return B::float_zeros(shape, &device, dtype);
    }
    let indices: Vec<_> = (0..window.groups)
        .map(|group| indices(&selection.rows, group, images, window))
        .collect();
    let weights = selection.weights.clone().unwrap_or_default();
    let roots = weights.iter().map(|weight| weight.sqrt()).collect();
    let roots = floats::<B>(roots, [count, 1], &grad);

    let chosen = Chosen::<B>::new(selection, &grad);
    let grad = B::float_reshape(grad, Shape::new([images, channels, height * width]));
    let grad = B::float_swap_dims(grad, 1, 2);
    let grad = B::float_reshape(grad, Shape::new([images * height * width, channels]));
    let grad = B::float_mul(B::float_select(grad, 0, chosen.rows), roots.clone());
    let grad = B::float_cast(grad, dtype);

    // Beyond the images stands a zero.
    let values = input.shape().num_elements();
    let flat = B::float_reshape(input, Shape::new([values]));
    let zero = B::float_zeros(Shape::new([1]), &device, flat.dtype().into());
    let flat = B::float_cat(vec![flat, zero], 0);
    let ints = DType::from(get_or_init_device_settings::<B>(&device).int_dtype);
    let outputs = window.group()[1];
    let products = indices.into_iter().enumerate().map(|(group, indices)| {
        let indices = TensorData::new(indices, [count * window.patch()]).convert_dtype(ints);
        let patches = B::float_select(flat.clone(), 0, B::int_from_data(indices, &device));
        let patches = B::float_reshape(patches, Shape::new([count, window.patch()]));
        let patches = B::float_cast(B::float_mul(patches, roots.clone()), dtype);
        let grad = B::float_slice(
            grad.clone(),
            &[
                Slice::full(),
                Slice::from(group * outputs..(group + 1) * outputs),
            ],
        );
        B::float_matmul(B::float_transpose(grad), patches)
    });
    B::float_cat(products.collect(), 0)
}

/// Where the patches of a group lie among the values of all images, one after the other; one index beyond them where they
/// reach beyond their image.
fn indices(rows: &[usize], group: usize, images: usize, window: &Window) -> Vec<i64> {
    let plane: usize = window.size.iter().product();
    let beyond = images * window.channels[0] * plane;
    let inputs = window.group()[0];
    let mut indices = Vec::with_capacity(rows.len() * window.patch());
    for &row in rows {
        let (image, place) = window.place(row);
        let first = image * window.channels[0] * plane;
        let seen = window.offsets().map(|offset| window.seen(place, offset));
        let seen: Vec<_> = seen.collect();
        for channel in group * inputs..(group + 1) * inputs {
            indices.extend(seen.iter().map(|seen| match seen {
                Some(position) => (first + channel * plane + position) as i64,
                None => beyond as i64,
            }));
        }
    }
    indices
}
