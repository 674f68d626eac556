//! The verbs on CPU backends that keep a matrix row by row in main memory: in single precision, in passes over the
//! rows on all cores. A memory is updated in place.

use burn::backend::{
    Backend, TensorMetadata,
    tensor::{Device, FloatTensor, IntTensor},
};
use burn::tensor::{IntDType, Shape, TensorData};

mod backends;
mod convolution;
#[cfg(feature = "flex")]
mod gelu;
mod images;
mod packed;
mod passes;
mod positions;

use self::{
    images::Images,
    packed::{Pack, Times, Unpack},
    passes::{Clear, FoldIn, Gather, PutBack, Rows, RowsMut, Score, are_finite, in_parallel},
};
use super::{
    packing::Packing,
    portable,
    random::Random,
    verbs::{Draw, Drawn, Factor, Fold, Memory, Packed, Scores},
};

/// Access to the values of a backend's tensors in single precision.
pub(super) trait HostTensors: Backend {
    /// Lays the values out row by row, without gaps, if they are not.
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

/// A matrix whose rows lie one after the other.
fn rows<B: HostTensors>(matrix: &FloatTensor<B>) -> Rows<'_, f32> {
    let [_, width] = TensorMetadata::shape(matrix).dims();
    Rows::new(B::values(matrix), width)
}

fn rows_mut<B: HostTensors>(matrix: &mut FloatTensor<B>) -> RowsMut<'_, f32> {
    let [_, width] = TensorMetadata::shape(matrix).dims();
    RowsMut::new(B::values_mut(matrix), width)
}

fn score<B: HostTensors>(input: Factor<B>, grad: FloatTensor<B>) -> Scores<B> {
    let device = grad.device();
    let count = input.rows(&grad);
    let grad = B::contiguous(grad);
    let mut scores = NewScores::of(count);
    match input {
        Factor::Patches(images, window) => {
            let images = B::contiguous(images);
            let images = Images::new(B::values(&images), window);
            positions::score(images, B::values(&grad), &mut scores);
        }
        Factor::One => scores.of_rows(None, rows::<B>(&grad)),
        // The norms are a matrix of one column, whose norms they are.
        Factor::Packed(Packed { norms: input, .. }) | Factor::Matrix(input) => {
            let input = B::contiguous(input);
            scores.of_rows(Some(rows::<B>(&input)), rows::<B>(&grad));
        }
    }
    scores.into_tensors::<B>(&device)
}

/// Scores that are being written.
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

fn fold<B: HostTensors>(
    memory: Memory<B>,
    input: FloatTensor<B>,
    grad: FloatTensor<B>,
    fold: Fold,
) -> (Memory<B>, Scores<B>) {
    let device = grad.device();
    let [input, grad] = [input, grad].map(B::contiguous);
    let (x, g) = (rows::<B>(&input), rows::<B>(&grad));
    let count = g.count();
    let mut scores = NewScores::of(count);
    if !are_finite(x) || !are_finite(g) {
        scores.score.fill(f32::NAN);
        return (memory, scores.into_tensors::<B>(&device));
    }
    let Memory {
        input: kept_input,
        grad: kept_grad,
        age,
    } = memory;
    let [mut kept_input, mut kept_grad, mut age] = [kept_input, kept_grad, age].map(B::contiguous);
    in_parallel(FoldIn {
        batch: [x, g],
        memory: [
            rows_mut::<B>(&mut kept_input).first(count),
            rows_mut::<B>(&mut kept_grad).first(count),
            rows_mut::<B>(&mut age).first(count),
        ],
        score: &mut scores.score,
        tilt: &mut scores.tilt,
        first: 0,
        fold,
    });
    let memory = Memory {
        input: kept_input,
        grad: kept_grad,
        age,
    };
    (memory, scores.into_tensors::<B>(&device))
}

fn draw<B: HostTensors>(score: FloatTensor<B>, draw: Draw) -> Drawn<B> {
    portable::draw_in::<B>(score, draw, IntDType::I32)
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

fn product<B: HostTensors>(
    input: Factor<B>,
    grad: FloatTensor<B>,
    tilt: FloatTensor<B>,
    drawn: Drawn<B>,
) -> FloatTensor<B> {
    let device = grad.device();
    let grad = B::contiguous(grad);
    let drawn = drawn_rows::<B>(&drawn, Some(&tilt));
    let input = match input {
        Factor::Patches(images, window) => {
            let images = B::contiguous(images);
            return convolution::product::<B>(images, grad, &drawn, window);
        }
        Factor::Packed(packed) => unpack_rows::<B>(&packed, &drawn),
        Factor::Matrix(input) => gather::<B, 0>(rows::<B>(&B::contiguous(input)), &drawn, &device),
        Factor::One => unreachable!("a gradient of the weight has two factors"),
    };
    B::linear_weight_backward(input, gather::<B, 1>(rows::<B>(&grad), &drawn, &device))
}

/// The drawn rows of a matrix, each times the scale of factor `FACTOR`. A product needs a row, so there is a row of
/// zeros at least.
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

fn take_out<B: HostTensors>(
    memory: Memory<B>,
    tilt: FloatTensor<B>,
    drawn: Drawn<B>,
) -> (FloatTensor<B>, Memory<B>) {
    let device = tilt.device();
    let drawn = drawn_rows::<B>(&drawn, Some(&tilt));
    let weight = B::linear_weight_backward(
        gather::<B, 0>(rows::<B>(&memory.input), &drawn, &device),
        gather::<B, 1>(rows::<B>(&memory.grad), &drawn, &device),
    );
    if drawn.iter().any(|drawn| drawn.scales[0].is_nan()) {
        return (weight, memory);
    }
    let cleared = |mut matrix: FloatTensor<B>| {
        in_parallel(Clear {
            of: rows_mut::<B>(&mut matrix),
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

fn input_product<B: HostTensors>(
    grad: FloatTensor<B>,
    weight: FloatTensor<B>,
    score: FloatTensor<B>,
    drawn: Drawn<B>,
) -> FloatTensor<B> {
    let (device, d_input) = (grad.device(), weight.shape()[0]);
    let grad = B::contiguous(grad);
    let grad = rows::<B>(&grad);
    let scores = B::values(&score);
    let mut drawn = drawn_rows::<B>(&drawn, None);
    let finite = scores.iter().all(|score| score.is_finite());
    if !finite {
        drawn.clear();
    }
    let panel = gather::<B, 0>(grad, &drawn, &device);
    let product = B::contiguous(B::float_matmul(panel, B::float_transpose(weight)));
    let mut gradient = put_back::<B>(&product, &drawn, grad.count(), d_input, &device);
    if !finite {
        let rows = B::values_mut(&mut gradient).chunks_exact_mut(d_input);
        let broken = rows.zip(scores).filter(|(_, score)| !score.is_finite());
        broken.for_each(|(row, _)| row.fill(f32::NAN));
    }
    gradient
}

/// A matrix of zeros, but for the rows of the product, each times its scale.
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

/// `grad @ weight^T` without the rows of zeros, if they are many enough for a copy of the others to pay.
fn exact_input_product<B: HostTensors>(
    grad: FloatTensor<B>,
    weight: FloatTensor<B>,
) -> FloatTensor<B> {
    let (device, d_input) = (grad.device(), weight.shape()[0]);
    let grad = B::contiguous(grad);
    let all = rows::<B>(&grad);
    let scales = [1.0; 2];
    let drawn = all.not_zero().map(|row| DrawnRow { row, scales });
    let drawn: Vec<_> = drawn.collect();
    let weight = B::float_transpose(weight);
    if 4 * drawn.len() > 3 * all.count() {
        return B::float_matmul(grad, weight);
    }
    let panel = gather::<B, 0>(all, &drawn, &device);
    let product = B::contiguous(B::float_matmul(panel, weight));
    put_back::<B>(&product, &drawn, all.count(), d_input, &device)
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

fn unpack<B: HostTensors>(packed: &Packed<B>) -> FloatTensor<B> {
    let scales = [1.0; 2];
    let all = (0..packed.norms.shape()[0]).map(|row| DrawnRow { row, scales });
    unpack_rows::<B>(packed, &all.collect::<Vec<_>>())
}

/// The drawn rows, each times the scale of the first factor.
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

fn times<B: HostTensors>(packed: Packed<B>, values: FloatTensor<B>) -> FloatTensor<B> {
    let packing = packed.packing;
    let mut values = B::contiguous(values);
    in_parallel(Times {
        words: Rows::new(B::words(&packed.words), packing.words()),
        packing,
        values: rows_mut::<B>(&mut values),
    });
    values
}
