//! How the verbs of a backend make gradients: one recipe for all layers, methods and backends.
//!
//! These functions know nothing of layers and steps, and have no side effects.

use burn::backend::{TensorMetadata, tensor::FloatTensor};
use burn::tensor::{FloatDType, Shape};

use crate::{
    config::Memory as MemoryRule,
    rows::{Candidates, Draw, ExactOps, Factor, Fold, Memory, RowOps, cast, norm, working_dtype},
};

/// The gradient of the weight from K outer products, shape `[d_input, d_output]` (of a convolution
/// `[channels, patch]`), and the memory for the next step, if the method has one.
pub(crate) fn weight_gradient<B: RowOps>(
    input: Factor<B>,
    grad: FloatTensor<B>,
    memory: Option<Memory<B>>,
    draw: Draw,
) -> (FloatTensor<B>, Option<Memory<B>>) {
    let rule = draw.method.memory();
    let Some(decay) = rule.decay() else {
        let scores = B::memaop_score(input.clone(), grad.clone());
        let drawn = B::memaop_draw(scores.score, draw);
        return (B::memaop_product(input, grad, scores.tilt, drawn), None);
    };
    let dtype: FloatDType = grad.dtype().into();
    let input = as_matrix::<B>(input, dtype);
    let memory = at_least::<B>(memory, &input, &grad);
    let fold = Fold {
        balanced: matches!(rule, MemoryRule::Balanced { .. }),
        decay,
        random: draw.random,
    };
    let (memory, scores) = B::memaop_fold(memory, input, grad, fold);
    let drawn = B::memaop_draw(scores.score, draw);
    let (weight, memory) = B::memaop_take_out(memory, scores.tilt, drawn, dtype);
    (weight, Some(memory))
}

/// The gradient of the weight from all outer products, as Burn computes it.
pub(crate) fn exact_weight_gradient<B: ExactOps>(
    input: Factor<B>,
    grad: FloatTensor<B>,
) -> FloatTensor<B> {
    match input {
        Factor::Patches(images, window) => B::memaop_convolve_weight_gradient(images, grad, window),
        input => {
            let input = as_matrix::<B>(input, grad.dtype().into());
            B::linear_weight_backward(input, grad)
        }
    }
}

/// The gradient of the input of a linear layer, `grad @ weight^T`, from K of the rows.
pub(crate) fn input_gradient<B: ExactOps>(
    grad: FloatTensor<B>,
    weight: FloatTensor<B>,
    draw: Draw,
) -> FloatTensor<B> {
    if draw.k >= grad.shape()[0] {
        return B::memaop_exact_input_product(grad, weight);
    }
    let scores = B::memaop_score(Factor::One, grad.clone());
    let drawn = B::memaop_draw(scores.score.clone(), draw);
    B::memaop_input_product(grad, weight, scores.score, drawn)
}

/// The figures of the noise of a gradient, shape `[8]`, in single precision: the norm of `gradient`
/// (0 if there is none), then the [variances](RowOps::memaop_variances).
pub(crate) fn noise<B: RowOps>(
    input: Factor<B>,
    grad: FloatTensor<B>,
    gradient: Option<FloatTensor<B>>,
    ks: Candidates,
) -> FloatTensor<B> {
    let norm = match gradient {
        Some(gradient) => norm::<B>(cast::<B>(gradient, FloatDType::F32)),
        None => B::float_zeros(Shape::new([1]), &grad.device(), FloatDType::F32),
    };
    let scores = B::memaop_score(input, grad);
    let variances = B::memaop_variances(scores.score, ks);
    B::float_cat(vec![norm, variances], 0)
}

/// `|gradient - exact|` and `|exact|` in Frobenius norms, shape `[2]`, in single precision.
pub(crate) fn distance<B: RowOps>(
    gradient: FloatTensor<B>,
    exact: FloatTensor<B>,
) -> FloatTensor<B> {
    let [gradient, exact] = [gradient, exact].map(|g| cast::<B>(g, FloatDType::F32));
    let difference = B::float_sub(gradient, exact.clone());
    B::float_cat(vec![norm::<B>(difference), norm::<B>(exact)], 0)
}

fn as_matrix<B: RowOps>(input: Factor<B>, dtype: FloatDType) -> FloatTensor<B> {
    match input {
        Factor::Matrix(input) => input,
        Factor::Packed(packed) => B::memaop_unpack(packed, dtype),
        Factor::One | Factor::Patches(..) => unreachable!("layers with a memory are linear"),
    }
}

/// The memory with at least as many rows as the batch. New rows are zero.
fn at_least<B: RowOps>(
    memory: Option<Memory<B>>,
    input: &FloatTensor<B>,
    grad: &FloatTensor<B>,
) -> Memory<B> {
    let ([rows, d_input], [_, d_output]) = (input.shape().dims(), grad.shape().dims());
    let (device, dtype) = (grad.device(), working_dtype(grad.dtype()));
    let grown = |matrix: Option<FloatTensor<B>>, width: usize| {
        let zeros = |rows| B::float_zeros(Shape::new([rows, width]), &device, dtype);
        let Some(matrix) = matrix else {
            return zeros(rows);
        };
        // A layer can have been cast since its last step.
        let matrix = cast::<B>(matrix, dtype);
        match matrix.shape()[0] {
            kept if kept < rows => B::float_cat(vec![matrix, zeros(rows - kept)], 0),
            _ => matrix,
        }
    };
    let (input, grad, age) = match memory {
        None => (None, None, None),
        Some(Memory { input, grad, age }) => (Some(input), Some(grad), Some(age)),
    };
    Memory {
        input: grown(input, d_input),
        grad: grown(grad, d_output),
        age: grown(age, 1),
    }
}
