//! The approximate weight gradient in primitive operations, one function a step, in the order of
//! the data flow. It runs on every backend and defines what faster bodies must compute.

use burn::backend::{
    Backend, Scalar, TensorMetadata, get_or_init_device_settings,
    tensor::{BoolTensor, FloatTensor, IntTensor},
};
use burn::tensor::{DType, FloatDType, IndexingUpdateOp, Shape, Slice};

use crate::{
    config::Memory,
    ops::{AopStep, RowMemory, WeightGradient},
    selection,
};

/// The two factors of every outer product: `x^`, shape `[rows, d_input]`, and `g^`, shape
/// `[rows, d_output]`.
struct Factors<B: Backend> {
    input: FloatTensor<B>,
    grad: FloatTensor<B>,
}

impl<B: Backend> Factors<B> {
    fn map(self, f: impl Fn(FloatTensor<B>) -> FloatTensor<B>) -> Self {
        Self {
            input: f(self.input),
            grad: f(self.grad),
        }
    }
}

pub(crate) fn weight_gradient<B: Backend>(
    input: FloatTensor<B>,
    grad: FloatTensor<B>,
    memory: RowMemory<B>,
    step: AopStep,
) -> WeightGradient<B> {
    let dtype: FloatDType = input.dtype().into();
    let rows = input.shape()[0];

    let (factors, idle) = fold_in::<B>(Factors { input, grad }, memory);
    let scores = scores::<B>(&factors);
    let chosen = selection::select::<B>(scores.clone(), rows, &step);
    let gathered = gather::<B>(&factors, &scores, chosen.clone());
    let gathered = gathered.map(|factor| B::float_cast(factor, dtype));
    let memory = match step.memory {
        Memory::None => RowMemory::Empty,
        Memory::Published { decay } => keep::<B>(factors, scores, chosen, idle, decay),
    };

    WeightGradient {
        weight: B::linear_weight_backward(gathered.input, gathered.grad),
        memory,
    }
}

/// `X^ = memory + X`, `G^ = memory + G`, in at least single precision, and the rows of the memory
/// beyond this batch, which take no part in the step.
fn fold_in<B: Backend>(
    batch: Factors<B>,
    memory: RowMemory<B>,
) -> (Factors<B>, Option<Factors<B>>) {
    let rows = batch.input.shape()[0];
    let dtype = working_dtype(batch.input.dtype());
    let batch = batch.map(|factor| cast::<B>(factor, dtype));

    let RowMemory::Rows { input, grad } = memory else {
        return (batch, None);
    };
    let kept = input.shape()[0];
    let memory = Factors::<B> { input, grad }.map(|factor| cast::<B>(factor, dtype));

    let idle = (kept > rows).then(|| Factors {
        input: slice_rows::<B>(memory.input.clone(), rows, kept),
        grad: slice_rows::<B>(memory.grad.clone(), rows, kept),
    });
    let memory = memory.map(|factor| resize_rows::<B>(factor, rows));
    let folded = Factors {
        input: B::float_add(memory.input, batch.input),
        grad: B::float_add(memory.grad, batch.grad),
    };
    (folded, idle)
}

/// `|x^| |g^|` of every row, shape `[rows]`: the square root of the paper's score, which orders
/// the rows alike and keeps clear of overflow and underflow.
fn scores<B: Backend>(factors: &Factors<B>) -> FloatTensor<B> {
    let norm = |factor: &FloatTensor<B>| {
        let square = B::float_mul(factor.clone(), factor.clone());
        B::float_sqrt(B::float_sum_dim(square, 1))
    };
    let scores = B::float_mul(norm(&factors.input), norm(&factors.grad));
    let rows = scores.shape()[0];
    B::float_reshape(scores, Shape::new([rows]))
}

/// The chosen rows, contiguous; a row of zeros in place of one whose score is not finite.
fn gather<B: Backend>(
    factors: &Factors<B>,
    scores: &FloatTensor<B>,
    chosen: IntTensor<B>,
) -> Factors<B> {
    let finite = finite::<B>(B::float_select(scores.clone(), 0, chosen.clone()));
    let gather = |factor: &FloatTensor<B>| {
        let rows = B::float_select(factor.clone(), 0, chosen.clone());
        clear_rows::<B>(rows, B::bool_not(finite.clone()))
    };
    Factors {
        input: gather(&factors.input),
        grad: gather(&factors.grad),
    }
}

/// The memory of the next step: the rows that were neither chosen nor broken, times the square
/// root of the decay, and after them the rows that took no part.
fn keep<B: Backend>(
    factors: Factors<B>,
    scores: FloatTensor<B>,
    chosen: IntTensor<B>,
    idle: Option<Factors<B>>,
    decay: f64,
) -> RowMemory<B> {
    let device = scores.device();
    let bools = get_or_init_device_settings::<B>(&device).bool_dtype;
    let k = chosen.shape()[0];
    let dtype: FloatDType = scores.dtype().into();

    let marks = B::float_select_assign(
        B::float_zeros(scores.shape(), &device, dtype),
        0,
        chosen,
        B::float_ones(Shape::new([k]), &device, dtype),
        IndexingUpdateOp::Add,
    );
    let chosen = B::float_greater_elem(marks, Scalar::from(0.5), bools);
    let cleared = B::bool_or(chosen, B::bool_not(finite::<B>(scores)));

    let kept = factors.map(|factor| {
        let factor = clear_rows::<B>(factor, cleared.clone());
        match decay {
            1.0 => factor,
            decay => B::float_mul_scalar(factor, Scalar::from(decay.sqrt())),
        }
    });
    let (input, grad) = match idle {
        None => (kept.input, kept.grad),
        Some(idle) => (
            B::float_cat(vec![kept.input, idle.input], 0),
            B::float_cat(vec![kept.grad, idle.grad], 0),
        ),
    };
    RowMemory::Rows { input, grad }
}

/// Which scores are numbers; the comparison is false for NaN.
pub(crate) fn finite<B: Backend>(scores: FloatTensor<B>) -> BoolTensor<B> {
    let bools = get_or_init_device_settings::<B>(&scores.device()).bool_dtype;
    let largest = match scores.dtype() {
        DType::F64 => Scalar::from(f64::MAX),
        _ => Scalar::from(f32::MAX),
    };
    B::float_lower_equal_elem(scores, largest, bools)
}

/// The dtype of memory and scores: half-precision factors would overflow when squared and lose
/// what they accumulate.
fn working_dtype(dtype: DType) -> FloatDType {
    match dtype {
        DType::F64 => FloatDType::F64,
        _ => FloatDType::F32,
    }
}

fn cast<B: Backend>(tensor: FloatTensor<B>, dtype: FloatDType) -> FloatTensor<B> {
    match tensor.dtype() == DType::from(dtype) {
        true => tensor,
        false => B::float_cast(tensor, dtype),
    }
}

/// Fills the rows of a matrix where `mask`, shape `[rows]`, is true with zeros.
fn clear_rows<B: Backend>(matrix: FloatTensor<B>, mask: BoolTensor<B>) -> FloatTensor<B> {
    let shape = matrix.shape();
    let mask = B::bool_reshape(mask, Shape::new([shape[0], 1]));
    B::float_mask_fill(matrix, B::bool_expand(mask, shape), Scalar::from(0.0))
}

fn slice_rows<B: Backend>(matrix: FloatTensor<B>, start: usize, end: usize) -> FloatTensor<B> {
    B::float_slice(matrix, &[Slice::from(start..end), Slice::full()])
}

/// The first `rows` rows of a matrix, with rows of zeros where it has fewer.
fn resize_rows<B: Backend>(matrix: FloatTensor<B>, rows: usize) -> FloatTensor<B> {
    let [have, width] = matrix.shape().dims();
    if have > rows {
        return slice_rows::<B>(matrix, 0, rows);
    }
    if have < rows {
        let zeros = B::float_zeros(
            Shape::new([rows - have, width]),
            &matrix.device(),
            matrix.dtype().into(),
        );
        return B::float_cat(vec![matrix, zeros], 0);
    }
    matrix
}
