//! The verbs on CPU backends that keep a matrix row by row. They go over the rows in single
//! precision, on all cores, and update a memory in place.

use burn::backend::{
    Backend, TensorMetadata,
    tensor::{Device, FloatTensor, IntTensor},
};
use burn::tensor::{DType, FloatDType, IntDType, Shape, TensorData};

mod attention;
mod backends;
mod convolution;
mod gelu;
mod images;
mod in_place;
mod layer_norm;
mod norm;
mod packed;
mod passes;
mod positions;

use self::{
    images::Images,
    packed::{Pack, Times, Unpack},
    passes::{Clear, FoldIn, Gather, PutBack, Rows, RowsMut, Score, are_finite, in_parallel},
};
use super::{
    Bias, ExactOps,
    exact::{self, Softmax},
    packing::Packing,
    portable,
    random::{Dropout, Random},
    tensors::{Draw, Drawn, Factor, Fold, Memory, Packed, Scores},
    transfer::CopyOut,
    verbs::RowOps,
    window::Window,
};

/// Access to the values of a backend's tensors in single precision.
pub(super) trait HostTensors: CopyOut {
    /// Whether GELU goes by the normal distribution function, and so has faster passes here.
    const HAS_EXACT_GELU: bool;

    /// Lays the values out row by row and without gaps, unless they are so already.
    fn contiguous(tensor: FloatTensor<Self>) -> FloatTensor<Self>;
    /// The values of a contiguous tensor.
    fn values(tensor: &FloatTensor<Self>) -> &[f32];
    /// The values of a contiguous tensor. They are copied first if another tensor shares them.
    fn values_mut(tensor: &mut FloatTensor<Self>) -> &mut [f32];
    /// The values of a contiguous tensor of 32-bit integers.
    fn words(tensor: &IntTensor<Self>) -> &[i32];
}

fn from_values<B: Backend>(
    values: Vec<f32>,
    shape: impl Into<Shape>,
    device: &Device<B>,
) -> FloatTensor<B> {
    B::float_from_data(TensorData::new(values, shape), device)
}

fn is_single<B: HostTensors>(tensor: &FloatTensor<B>) -> bool {
    TensorMetadata::dtype(tensor) == DType::F32
}

/// Tensors that are not in single precision take the default bodies.
impl<B: HostTensors> RowOps for B {
    fn memaop_score(input: Factor<Self>, grad: FloatTensor<Self>) -> Scores<Self> {
        if !is_single::<Self>(&grad) {
            return portable::score::<Self>(input, grad);
        }
        let device = grad.device();
        let count = input.rows(&grad);
        let grad = Self::contiguous(grad);
        let mut scores = NewScores::of(count);
        match input {
            Factor::Patches(images, window) => {
                let images = Self::contiguous(images);
                let images = Images::new(Self::values(&images), window);
                positions::score(images, Self::values(&grad), &mut scores);
            }
            Factor::One => scores.of_rows(None, rows::<Self>(&grad)),
            // The norms are a matrix of one column: the norm of a row is its value.
            Factor::Packed(Packed { norms: input, .. }) | Factor::Matrix(input) => {
                let input = Self::contiguous(input);
                scores.of_rows(Some(rows::<Self>(&input)), rows::<Self>(&grad));
            }
        }
        scores.into_tensors::<Self>(&device)
    }

    fn memaop_fold(
        memory: Memory<Self>,
        input: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        fold: Fold,
    ) -> (Memory<Self>, Scores<Self>) {
        if !is_single::<Self>(&grad) {
            return portable::fold::<Self>(memory, input, grad, fold);
        }
        let device = grad.device();
        let [input, grad] = [input, grad].map(Self::contiguous);
        let (x, g) = (rows::<Self>(&input), rows::<Self>(&grad));
        let count = g.count();
        let mut scores = NewScores::of(count);
        let mut memory = Memory {
            input: Self::contiguous(memory.input),
            grad: Self::contiguous(memory.grad),
            age: Self::contiguous(memory.age),
        };
        if !are_finite(x) || !are_finite(g) {
            scores.score.fill(f32::NAN);
            return (memory, scores.into_tensors::<Self>(&device));
        }
        in_parallel(FoldIn {
            batch: [x, g],
            memory: [
                rows_mut::<Self>(&mut memory.input).first(count),
                rows_mut::<Self>(&mut memory.grad).first(count),
                rows_mut::<Self>(&mut memory.age).first(count),
            ],
            score: &mut scores.score,
            tilt: &mut scores.tilt,
            first: 0,
            fold,
        });
        (memory, scores.into_tensors::<Self>(&device))
    }

    fn memaop_draw(score: FloatTensor<Self>, draw: Draw) -> Drawn<Self> {
        portable::draw_in::<Self>(score, draw, IntDType::I32)
    }

    fn memaop_product(
        input: Factor<Self>,
        grad: FloatTensor<Self>,
        tilt: FloatTensor<Self>,
        drawn: Drawn<Self>,
    ) -> FloatTensor<Self> {
        if !is_single::<Self>(&grad) {
            return portable::product::<Self>(input, grad, tilt, drawn);
        }
        let device = grad.device();
        let grad = Self::contiguous(grad);
        let drawn = drawn_rows::<Self>(&drawn, Some(&tilt));
        let input = match input {
            Factor::Patches(images, window) => {
                let images = Self::contiguous(images);
                return convolution::product::<Self>(images, grad, &drawn, window);
            }
            Factor::Packed(packed) => unpack_rows::<Self>(&packed, &drawn),
            Factor::Matrix(input) => {
                gather::<Self, 0>(rows::<Self>(&Self::contiguous(input)), &drawn, &device)
            }
            Factor::One => unreachable!("a gradient of the weight has two factors"),
        };
        Self::linear_weight_backward(
            input,
            gather::<Self, 1>(rows::<Self>(&grad), &drawn, &device),
        )
    }

    fn memaop_take_out(
        memory: Memory<Self>,
        tilt: FloatTensor<Self>,
        drawn: Drawn<Self>,
        dtype: FloatDType,
    ) -> (FloatTensor<Self>, Memory<Self>) {
        if dtype != FloatDType::F32 {
            return portable::take_out::<Self>(memory, tilt, drawn, dtype);
        }
        let device = tilt.device();
        let drawn = drawn_rows::<Self>(&drawn, Some(&tilt));
        let weight = Self::linear_weight_backward(
            gather::<Self, 0>(rows::<Self>(&memory.input), &drawn, &device),
            gather::<Self, 1>(rows::<Self>(&memory.grad), &drawn, &device),
        );
        if drawn.iter().any(|drawn| drawn.scales[0].is_nan()) {
            return (weight, memory);
        }
        let cleared = |mut matrix: FloatTensor<Self>| {
            in_parallel(Clear {
                of: rows_mut::<Self>(&mut matrix),
                first: 0,
                drawn: &drawn,
            });
            matrix
        };
        let Memory { input, grad, age } = memory;
        let memory = Memory {
            input: cleared(input),
            grad: cleared(grad),
            age: cleared(age),
        };
        (weight, memory)
    }

    fn memaop_input_product(
        grad: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        score: FloatTensor<Self>,
        drawn: Drawn<Self>,
    ) -> FloatTensor<Self> {
        if !is_single::<Self>(&grad) {
            return portable::input_product::<Self>(grad, weight, score, drawn);
        }
        let (device, d_input) = (grad.device(), weight.shape()[0]);
        let grad = Self::contiguous(grad);
        let grad = rows::<Self>(&grad);
        let scores = Self::values(&score);
        let mut drawn = drawn_rows::<Self>(&drawn, None);
        let finite = scores.iter().all(|score| score.is_finite());
        if !finite {
            drawn.clear();
        }
        let panel = gather::<Self, 0>(grad, &drawn, &device);
        let product = Self::contiguous(Self::float_matmul(panel, Self::float_transpose(weight)));
        let mut gradient = put_back::<Self>(&product, &drawn, grad.count(), d_input, &device);
        if !finite {
            let rows = Self::values_mut(&mut gradient).chunks_exact_mut(d_input);
            let broken = rows.zip(scores).filter(|(_, score)| !score.is_finite());
            broken.for_each(|(row, _)| row.fill(f32::NAN));
        }
        gradient
    }

    fn memaop_pack(
        input: FloatTensor<Self>,
        packing: Packing,
        random: Option<Random>,
    ) -> Packed<Self> {
        match is_single::<Self>(&input) {
            true => pack::<Self>(input, |value| value, packing, random),
            false => portable::pack::<Self>(input, packing, random),
        }
    }

    fn memaop_unpack(packed: Packed<Self>, dtype: FloatDType) -> FloatTensor<Self> {
        if dtype != FloatDType::F32 {
            return portable::unpack::<Self>(packed, dtype);
        }
        let scales = [1.0; 2];
        let all = (0..packed.norms.shape()[0]).map(|row| DrawnRow { row, scales });
        unpack_rows::<Self>(&packed, &all.collect::<Vec<_>>())
    }

    fn memaop_times(packed: Packed<Self>, values: FloatTensor<Self>) -> FloatTensor<Self> {
        if !is_single::<Self>(&values) {
            return portable::times::<Self>(packed, values);
        }
        let packing = packed.packing;
        let mut values = Self::contiguous(values);
        in_parallel(Times {
            words: Rows::new(Self::words(&packed.words), packing.words()),
            packing,
            values: rows_mut::<Self>(&mut values),
        });
        values
    }

    fn memaop_drop_values(values: FloatTensor<Self>, dropout: Dropout) -> FloatTensor<Self> {
        match is_single::<Self>(&values) {
            true => in_place::drop_out::<Self>(values, dropout),
            false => portable::drop_out::<Self>(values, dropout),
        }
    }
}

impl<B: HostTensors> ExactOps for B {
    /// Leaves out the rows of zeros, if they are so many that a copy of the others pays.
    fn memaop_exact_input_product(
        grad: FloatTensor<Self>,
        weight: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        if !is_single::<Self>(&grad) {
            return portable::exact_input_product::<Self>(grad, weight);
        }
        let (device, d_input) = (grad.device(), weight.shape()[0]);
        let grad = Self::contiguous(grad);
        let all = rows::<Self>(&grad);
        let scales = [1.0; 2];
        let drawn = all.not_zero().map(|row| DrawnRow { row, scales });
        let drawn: Vec<_> = drawn.collect();
        let weight = Self::float_transpose(weight);
        if 4 * drawn.len() > 3 * all.count() {
            return Self::float_matmul(grad, weight);
        }
        let panel = gather::<Self, 0>(all, &drawn, &device);
        let product = Self::contiguous(Self::float_matmul(panel, weight));
        put_back::<Self>(&product, &drawn, all.count(), d_input, &device)
    }

    fn memaop_convolve(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: Bias<Self>,
        window: Window,
    ) -> FloatTensor<Self> {
        let bias = bias.into_option();
        match is_single::<Self>(&input) {
            true => convolution::convolve::<Self>(input, weight, bias, window),
            false => Self::conv2d(input, weight, bias, window.options()),
        }
    }

    fn memaop_convolve_input_gradient(
        input: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        window: Window,
    ) -> FloatTensor<Self> {
        match is_single::<Self>(&grad) {
            true => convolution::input_gradient::<Self>(input, weight, grad, window),
            false => Self::conv2d_x_backward(input, weight, grad, window.options()),
        }
    }

    fn memaop_convolve_weight_gradient(
        input: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        window: Window,
    ) -> FloatTensor<Self> {
        match is_single::<Self>(&grad) {
            true => convolution::exact_weight_gradient::<Self>(input, grad, window),
            false => portable::exact_gradient_of_patches::<Self>(input, grad, window),
        }
    }

    fn memaop_softmax(scores: FloatTensor<Self>, quiet: bool) -> Softmax<Self> {
        match is_single::<Self>(&scores) {
            true => attention::softmax::<Self>(scores, quiet),
            false => exact::softmax::<Self>(scores, quiet),
        }
    }

    fn memaop_weights(scores: FloatTensor<Self>, rows: FloatTensor<Self>) -> FloatTensor<Self> {
        match is_single::<Self>(&scores) {
            true => attention::weights::<Self>(scores, rows),
            false => exact::weights::<Self>(scores, rows),
        }
    }

    fn memaop_softmax_backward(
        weights: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        match is_single::<Self>(&weights) {
            true => attention::softmax_backward::<Self>(weights, grad),
            false => exact::softmax_backward::<Self>(weights, grad),
        }
    }

    fn memaop_layer_norm_backward(
        input: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        epsilon: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        match is_single::<Self>(&input) {
            true => layer_norm::backward::<Self>(input, gamma, grad, epsilon),
            false => exact::layer_norm_backward::<Self>(input, gamma, grad, epsilon),
        }
    }

    fn memaop_exact_gelu(input: FloatTensor<Self>) -> FloatTensor<Self> {
        match Self::HAS_EXACT_GELU && is_single::<Self>(&input) {
            true => gelu::forward::<Self>(input),
            false => Self::gelu(input),
        }
    }

    fn memaop_gelu_backward(
        input: FloatTensor<Self>,
        grad: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        match Self::HAS_EXACT_GELU && is_single::<Self>(&input) {
            true => gelu::backward::<Self>(input, grad),
            false => Self::gelu_backward(input, grad),
        }
    }

    fn memaop_gelu_derivative(
        input: FloatTensor<Self>,
        packing: Packing,
        random: Random,
    ) -> Packed<Self> {
        match Self::HAS_EXACT_GELU && is_single::<Self>(&input) {
            // The norms are those of the input, and no one reads them.
            true => pack::<Self>(input, gelu::derivative, packing, Some(random)),
            false => exact::gelu_derivative::<Self>(input, packing, random),
        }
    }
}

/// A matrix whose rows lie one after the other.
fn rows<B: HostTensors>(matrix: &FloatTensor<B>) -> Rows<'_, f32> {
    let [_, width] = TensorMetadata::shape(matrix).dims();
    Rows::new(B::values(matrix), width)
}

fn rows_mut<B: HostTensors>(matrix: &mut FloatTensor<B>) -> RowsMut<'_, f32> {
    let [_, width] = TensorMetadata::shape(matrix).dims();
    RowsMut::new(B::values_mut(matrix), width)
}

struct NewScores {
    score: Vec<f32>,
    tilt: Vec<f32>,
}

impl NewScores {
    fn of(rows: usize) -> Self {
        Self {
            score: vec![0.0; rows],
            tilt: vec![1.0; rows],
        }
    }

    fn of_rows(&mut self, input: Option<Rows<'_, f32>>, grad: Rows<'_, f32>) {
        in_parallel(Score {
            input,
            grad,
            score: &mut self.score,
            tilt: &mut self.tilt,
        });
    }

    fn into_tensors<B: Backend>(self, device: &Device<B>) -> Scores<B> {
        let shape = [self.score.len()];
        Scores {
            score: from_values::<B>(self.score, shape, device),
            tilt: from_values::<B>(self.tilt, shape, device),
        }
    }
}

/// A drawn row, and what its two factors are multiplied by.
#[derive(Clone, Copy)]
struct DrawnRow {
    row: usize,
    scales: [f32; 2],
}

/// The drawn rows in ascending order, without those that have no weight.
fn drawn_rows<B: HostTensors>(drawn: &Drawn<B>, tilt: Option<&FloatTensor<B>>) -> Vec<DrawnRow> {
    let tilt = tilt.map(B::values);
    let drawn = B::words(&drawn.rows).iter().zip(B::values(&drawn.root));
    let drawn = drawn.filter(|&(_, &root)| root != 0.0);
    let mut drawn: Vec<_> = drawn
        .map(|(&row, &root)| {
            let tilt = tilt.map_or(1.0, |tilt| tilt[row as usize]);
            DrawnRow {
                row: row as usize,
                scales: [root * tilt, root / tilt],
            }
        })
        .collect();
    drawn.sort_by_key(|drawn| drawn.row);
    drawn
}

/// The drawn rows of a matrix, each times the scale of factor `FACTOR`. A product needs a row, so
/// an empty draw gives one row of zeros.
fn gather<B: Backend, const FACTOR: usize>(
    from: Rows<'_, f32>,
    drawn: &[DrawnRow],
    device: &Device<B>,
) -> FloatTensor<B> {
    let mut panel = vec![0.0; drawn.len().max(1) * from.width];
    in_parallel(Gather::<FACTOR> {
        from,
        drawn,
        panel: &mut panel[..drawn.len() * from.width],
    });
    from_values::<B>(panel, [drawn.len().max(1), from.width], device)
}

/// A matrix of zeros, except that the drawn rows are those of the product, each times its scale.
fn put_back<B: HostTensors>(
    product: &FloatTensor<B>,
    drawn: &[DrawnRow],
    count: usize,
    width: usize,
    device: &Device<B>,
) -> FloatTensor<B> {
    let mut gradient = vec![0.0; count * width];
    in_parallel(PutBack {
        panel: Rows::new(&B::values(product)[..drawn.len() * width], width),
        drawn,
        to: RowsMut::new(&mut gradient, width),
        first: 0,
    });
    from_values::<B>(gradient, [count, width], device)
}

/// The drawn rows, unpacked and each times the scale of the first factor.
fn unpack_rows<B: HostTensors>(packed: &Packed<B>, drawn: &[DrawnRow]) -> FloatTensor<B> {
    let packing = packed.packing;
    let shape = [drawn.len().max(1), packing.width];
    let mut values = vec![0.0; shape[0] * shape[1]];
    in_parallel(Unpack {
        words: Rows::new(B::words(&packed.words), packing.words()),
        packing,
        drawn,
        panel: &mut values[..drawn.len() * packing.width],
    });
    from_values::<B>(values, shape, &packed.norms.device())
}

fn pack<B: HostTensors>(
    input: FloatTensor<B>,
    function: impl Fn(f32) -> f32 + Copy + Send,
    packing: Packing,
    random: Option<Random>,
) -> Packed<B> {
    let device = input.device();
    let input = B::contiguous(input);
    let all = rows::<B>(&input);
    let count = all.count();
    let mut words = vec![0; count * packing.words()];
    let mut norms = vec![0.0; count];
    in_parallel(Pack {
        rows: all,
        function,
        packing,
        random,
        first: 0,
        words: RowsMut::new(&mut words, packing.words()),
        norms: &mut norms,
    });
    let words = TensorData::new(words, [count, packing.words()]);
    Packed {
        words: B::int_from_data(words, &device),
        norms: from_values::<B>(norms, [count, 1], &device),
        packing,
    }
}
