//! The approximate weight gradient in primitive operations, one function a step, in the order of
//! the data flow. It runs on every backend and defines what faster bodies must compute.

use burn::backend::{
    Backend, ExecutionError, Scalar, TensorMetadata, get_or_init_device_settings,
    tensor::{BoolTensor, FloatTensor, IntTensor},
};
use burn::tensor::{DType, FloatDType, IndexingUpdateOp, Shape, Slice, TensorData, try_read_sync};

use crate::{
    config::Memory,
    op::noise::StepNoise,
    op::packing::{Packing, pack_row, unpack_row},
    op::selection::{self, Selection},
    op::step::{
        AopStep, Bias, Input, InputStep, NoiseStep, Packed, RowMemory, Share, WeightGradient,
    },
};

pub(crate) mod convolution;

/// A memory that shrinks more than this from step to step is left to this body: faster ones read
/// the chosen rows back from it after it has shrunk.
#[allow(dead_code)] // Without one of them.
pub(crate) const LEAST_DECAY: f64 = 1e-6;

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
    input: Input<B>,
    grad: FloatTensor<B>,
    memory: RowMemory<B>,
    step: AopStep,
) -> WeightGradient<B> {
    let dtype: FloatDType = grad.dtype().into();
    let rows = grad.shape()[0];
    // Rows that go into a memory are scored with it.
    let kept_norms = match &input {
        Input::Packed(packed) if step.method.memory() == Memory::None => Some(packed.norms.clone()),
        _ => None,
    };
    let input = widened::<B>(input, dtype);
    let bias = match step.bias {
        true => Bias::Some(B::linear_bias_backward(grad.clone())),
        false => Bias::None,
    };

    let (factors, age, idle) = fold_in::<B>(Factors { input, grad }, memory, &step);
    let norms = kept_norms.unwrap_or_else(|| row_norms::<B>(&factors.input));
    let scores = scores::<B>(norms, &factors.grad);
    let chosen = select::<B>(&scores, rows, &step);
    let share = match step.measure {
        true => Share::Measured(share::<B>(&scores, &chosen.rows)),
        false => Share::Skipped,
    };
    let gathered = gather::<B>(&factors, &scores, &chosen);
    let gathered = gathered.map(|factor| B::float_cast(factor, dtype));
    let memory = match step.method.memory().decay() {
        None => RowMemory::Empty,
        Some(decay) => {
            let precision = working_dtype(DType::from(dtype));
            let kept = (factors, age);
            keep::<B>(kept, scores, chosen.rows, idle, decay, precision)
        }
    };

    WeightGradient {
        weight: B::linear_weight_backward(gathered.input, gathered.grad),
        memory,
        bias,
        share,
    }
}

/// The factors of some positions of the memory, and their ages.
type Kept<B> = (Factors<B>, FloatTensor<B>);

pub(crate) fn exact_input_gradient<B: Backend>(
    grad: FloatTensor<B>,
    weight: FloatTensor<B>,
) -> FloatTensor<B> {
    B::float_matmul(grad, B::float_transpose(weight))
}

pub(crate) fn input_gradient<B: Backend>(
    grad: FloatTensor<B>,
    weight: FloatTensor<B>,
    step: InputStep,
) -> FloatTensor<B> {
    let rows = grad.shape()[0];
    if step.k >= rows {
        return exact_input_gradient::<B>(grad, weight);
    }
    let dtype: FloatDType = grad.dtype().into();
    let device = grad.device();
    let d_input = weight.shape()[0];

    let working = cast::<B>(grad.clone(), working_dtype(grad.dtype()));
    let sizes = B::float_reshape(row_norms::<B>(&working), Shape::new([rows]));
    let zeros = B::float_zeros(Shape::new([rows, d_input]), &device, dtype);
    let selection = selection::select_input(read::<B>(sizes.clone()), &step);
    if selection.rows.is_empty() {
        return zeros;
    }
    let chosen = Chosen::<B>::new(selection, &sizes);
    let panel = B::float_select(working, 0, chosen.rows.clone());
    let panel = match chosen.weights {
        None => panel,
        Some(weights) => {
            let count = weights.shape()[0];
            B::float_mul(panel, B::float_reshape(weights, Shape::new([count, 1])))
        }
    };
    let product = B::float_matmul(B::float_cast(panel, dtype), B::float_transpose(weight));
    B::float_select_assign(zeros, 0, chosen.rows, product, IndexingUpdateOp::Add)
}

pub(crate) fn noise<B: Backend>(
    input: Input<B>,
    grad: FloatTensor<B>,
    gradient: FloatTensor<B>,
    step: NoiseStep,
) -> FloatTensor<B> {
    let working = |tensor: FloatTensor<B>| {
        let dtype = working_dtype(tensor.dtype());
        cast::<B>(tensor, dtype)
    };
    let norms = match input {
        Input::Full(input) => row_norms::<B>(&working(input)),
        Input::Packed(packed) => packed.norms,
    };
    figures::<B>(scores::<B>(norms, &working(grad)), gradient, &step)
}

/// What is measured of a gradient, by the scores of its rows.
fn figures<B: Backend>(
    scores: FloatTensor<B>,
    gradient: FloatTensor<B>,
    step: &NoiseStep,
) -> FloatTensor<B> {
    let norm = norm::<B>(cast::<B>(gradient, scores.dtype().into()));
    let noise = selection::noise(read::<B>(scores.clone()), step);
    let count = noise.len();
    let noise = floats::<B>(noise, [count], &scores);
    B::float_cast(B::float_cat(vec![norm, noise], 0), FloatDType::F32)
}

/// Packs rows on the host, which makes their noise.
pub(crate) fn pack<B: Backend>(
    input: FloatTensor<B>,
    packing: Packing,
    noise: Option<StepNoise>,
) -> Packed<B> {
    let [rows, width] = input.shape().dims();
    let device = input.device();
    let working = working_dtype(input.dtype());
    let norms = row_norms::<B>(&cast::<B>(input.clone(), working));
    // A value that single precision does not hold breaks the row as one that is not finite.
    let bools = get_or_init_device_settings::<B>(&device).bool_dtype;
    let too_large = B::float_greater_elem(norms.clone(), Scalar::from(f32::MAX), bools);
    let norms = B::float_mask_fill(norms, too_large, Scalar::from(f64::INFINITY));
    let values: Vec<f32> = host(B::float_into_data(input)).iter().collect();
    let mut words = vec![0; rows * packing.words()];
    let packed = values.chunks(width).zip(words.chunks_mut(packing.words()));
    for (row, (values, words)) in packed.enumerate() {
        let key = noise.map(|noise| noise.rounding(row));
        pack_row(packing, values, |value| value, key, words);
    }
    let words = TensorData::new(words, [rows, packing.words()]);
    Packed {
        words: B::int_from_data(words, &device),
        norms,
        packing,
    }
}

pub(crate) fn gelu_derivative<B: Backend>(input: FloatTensor<B>) -> FloatTensor<B> {
    let ones = B::float_ones(input.shape(), &input.device(), input.dtype().into());
    B::gelu_backward(input, ones)
}

/// All rows, in a type.
pub(crate) fn unpack<B: Backend>(packed: Packed<B>, dtype: FloatDType) -> FloatTensor<B> {
    let packing = packed.packing;
    let (rows, device) = (packed.norms.shape()[0], packed.norms.device());
    let words: Vec<i32> = host(B::int_into_data(packed.words)).iter().collect();
    let mut values = Vec::with_capacity(rows * packing.width);
    for words in words.chunks(packing.words()) {
        unpack_row(packing, words, |_, group| values.extend_from_slice(group));
    }
    let data = TensorData::new(values, [rows, packing.width]);
    B::float_from_data(data.convert_dtype(dtype.into()), &device)
}

/// The product of packed values and others, zero where the packed ones are.
pub(crate) fn times<B: Backend>(packed: Packed<B>, values: FloatTensor<B>) -> FloatTensor<B> {
    let factors = unpack::<B>(packed, values.dtype().into());
    let bools = get_or_init_device_settings::<B>(&values.device()).bool_dtype;
    let zeros = B::float_equal_elem(factors.clone(), Scalar::from(0.0), bools);
    B::float_mask_fill(B::float_mul(values, factors), zeros, Scalar::from(0.0))
}

/// All rows of an input, in a type.
fn widened<B: Backend>(input: Input<B>, dtype: FloatDType) -> FloatTensor<B> {
    match input {
        Input::Full(input) => input,
        Input::Packed(packed) => unpack::<B>(packed, dtype),
    }
}

/// The Frobenius norm of a matrix, shape `[1]`.
pub(crate) fn norm<B: Backend>(matrix: FloatTensor<B>) -> FloatTensor<B> {
    B::float_sqrt(B::float_sum(B::float_mul(matrix.clone(), matrix)))
}

/// `X^` and `G^` in at least single precision, the ages of their positions, and the rows of the
/// memory beyond this batch, which take no part in the step.
fn fold_in<B: Backend>(
    batch: Factors<B>,
    memory: RowMemory<B>,
    step: &AopStep,
) -> (Factors<B>, FloatTensor<B>, Option<Kept<B>>) {
    let rows = batch.input.shape()[0];
    let dtype = working_dtype(batch.input.dtype());
    let batch = batch.map(|factor| cast::<B>(factor, dtype));

    let RowMemory::Rows { input, grad, age } = memory else {
        let age = B::float_ones(Shape::new([rows, 1]), &batch.input.device(), dtype);
        return match step.method.memory() {
            Memory::None | Memory::Published { .. } => (batch, age, None),
            Memory::Balanced { .. } => (balance::<B>(batch, None, step), age, None),
        };
    };
    let age = cast::<B>(age, dtype);
    let kept = input.shape()[0];
    let memory = Factors::<B> { input, grad }.map(|factor| cast::<B>(factor, dtype));

    let idle = (kept > rows).then(|| {
        let slice = |matrix: &FloatTensor<B>| slice_rows::<B>(matrix.clone(), rows, kept);
        let factors = Factors {
            input: slice(&memory.input),
            grad: slice(&memory.grad),
        };
        (factors, slice(&age))
    });
    let age = B::float_add_scalar(resize_rows::<B>(age, rows), Scalar::from(1.0));
    let memory = memory.map(|factor| resize_rows::<B>(factor, rows));
    let batch = match step.method.memory() {
        Memory::None | Memory::Published { .. } => batch,
        Memory::Balanced { .. } => balance::<B>(batch, Some(&memory), step),
    };
    let folded = Factors {
        input: B::float_add(memory.input, batch.input),
        grad: B::float_add(memory.grad, batch.grad),
    };
    (folded, age, idle)
}

/// `s r x` and `(s / r) g` of every row, with a random sign s and the r that makes the variance of
/// what is added to the memory smallest; 1 where nothing is kept.
fn balance<B: Backend>(
    batch: Factors<B>,
    memory: Option<&Factors<B>>,
    step: &AopStep,
) -> Factors<B> {
    let bools = get_or_init_device_settings::<B>(&batch.input.device()).bool_dtype;
    let is_zero =
        |norm: &FloatTensor<B>| B::float_equal_elem(norm.clone(), Scalar::from(0.0), bools);
    let (x, g) = (row_norms::<B>(&batch.input), row_norms::<B>(&batch.grad));
    let nothing = B::bool_or(is_zero(&x), is_zero(&g));

    let noise = StepNoise {
        seed: step.seed,
        step: step.step,
    };
    let rows = x.shape()[0];
    let signs = (0..rows).map(|row| noise.sign(row)).collect();
    let signs = floats::<B>(signs, [rows, 1], &x);

    let (input_scale, grad_scale) = match memory {
        None => (signs.clone(), signs),
        Some(memory) => {
            let (a, b) = (row_norms::<B>(&memory.input), row_norms::<B>(&memory.grad));
            let unkept = B::bool_or(is_zero(&a), is_zero(&b));
            // The root of each quotient, because the quotient of the products could overflow.
            let r = B::float_mul(
                B::float_sqrt(B::float_div(a, x)),
                B::float_sqrt(B::float_div(g, b)),
            );
            let r = B::float_mask_fill(r, unkept, Scalar::from(1.0));
            (
                B::float_mul(signs.clone(), r.clone()),
                B::float_div(signs, r),
            )
        }
    };
    let scale = |factor: FloatTensor<B>, by: FloatTensor<B>| {
        let by = B::float_mask_fill(by, nothing.clone(), Scalar::from(0.0));
        B::float_mul(factor, by)
    };
    Factors {
        input: scale(batch.input, input_scale),
        grad: scale(batch.grad, grad_scale),
    }
}

/// The Euclidean norm of every row, shape `[rows, 1]`.
fn row_norms<B: Backend>(matrix: &FloatTensor<B>) -> FloatTensor<B> {
    let squares = B::float_mul(matrix.clone(), matrix.clone());
    B::float_sqrt(B::float_sum_dim(squares, 1))
}

/// `|x^| |g^|` of every row, shape `[rows]`: the square root of the paper's score, which orders
/// the rows alike and keeps clear of overflow and underflow.
fn scores<B: Backend>(input_norms: FloatTensor<B>, grad: &FloatTensor<B>) -> FloatTensor<B> {
    let scores = B::float_mul(input_norms, row_norms::<B>(grad));
    let rows = scores.shape()[0];
    B::float_reshape(scores, Shape::new([rows]))
}

/// The chosen rows and their weights, both of shape `[chosen]`.
struct Chosen<B: Backend> {
    rows: IntTensor<B>,
    weights: Option<FloatTensor<B>>,
}

/// Selects on the host; reads the scores, and so waits for the device, where the policy needs them.
fn select<B: Backend>(scores: &FloatTensor<B>, rows: usize, step: &AopStep) -> Chosen<B> {
    let selection = selection::select(rows, step, || read::<B>(scores.clone()));
    Chosen::new(selection, scores)
}

impl<B: Backend> Chosen<B> {
    /// On the device and in the dtype of the scores.
    fn new(selection: Selection, scores: &FloatTensor<B>) -> Self {
        let device = scores.device();
        let ints = get_or_init_device_settings::<B>(&device).int_dtype;
        let chosen: Vec<_> = selection.rows.iter().map(|&row| row as i64).collect();
        let shape = [chosen.len()];
        let indices = TensorData::new(chosen, shape).convert_dtype(DType::from(ints));
        Self {
            rows: B::int_from_data(indices, &device),
            weights: selection
                .weights
                .map(|weights| floats::<B>(weights, shape, scores)),
        }
    }
}

/// The values on the host; waits for the device.
pub(crate) fn read<B: Backend>(tensor: FloatTensor<B>) -> Vec<f64> {
    host(B::float_into_data(tensor)).iter().collect()
}

fn host(data: impl Future<Output = Result<TensorData, ExecutionError>>) -> TensorData {
    #[cfg(feature = "cubecl-backend")]
    log::debug!(target: "burn_memaop::read", "a tensor is read back: this part of a gradient is computed on the host");
    let data = try_read_sync(data);
    let data = data.expect("backends on which the weight gradient is approximated can be read");
    data.expect("the tensor can be read")
}

/// The share of the sum of the finite scores that the chosen rows carry, shape `[1]`, in single precision.
pub(crate) fn share<B: Backend>(scores: &FloatTensor<B>, chosen: &IntTensor<B>) -> FloatTensor<B> {
    let broken = B::bool_not(finite::<B>(scores.clone()));
    let scores = B::float_mask_fill(scores.clone(), broken, Scalar::from(0.0));
    let others = B::bool_not(marked::<B>(&scores, chosen.clone()));
    let carried = B::float_mask_fill(scores.clone(), others, Scalar::from(0.0));
    let share = B::float_div(B::float_sum(carried), B::float_sum(scores));
    B::float_cast(share, FloatDType::F32)
}

/// Which rows are among the chosen.
fn marked<B: Backend>(scores: &FloatTensor<B>, chosen: IntTensor<B>) -> BoolTensor<B> {
    let device = scores.device();
    let dtype: FloatDType = scores.dtype().into();
    let marks = B::float_zeros(scores.shape(), &device, dtype);
    let ones = B::float_ones(chosen.shape(), &device, dtype);
    let marks = B::float_select_assign(marks, 0, chosen, ones, IndexingUpdateOp::Add);
    let bools = get_or_init_device_settings::<B>(&device).bool_dtype;
    B::float_greater_elem(marks, Scalar::from(0.5), bools)
}

/// The chosen rows, contiguous, each factor times the root of the weight (half-precision factors
/// could not hold the whole); a row of zeros in place of one whose score is not finite.
fn gather<B: Backend>(
    factors: &Factors<B>,
    scores: &FloatTensor<B>,
    chosen: &Chosen<B>,
) -> Factors<B> {
    let finite = finite::<B>(B::float_select(scores.clone(), 0, chosen.rows.clone()));
    let roots = chosen.weights.clone().map(|weights| {
        let count = weights.shape()[0];
        B::float_reshape(B::float_sqrt(weights), Shape::new([count, 1]))
    });
    let gather = |factor: &FloatTensor<B>| {
        let rows = B::float_select(factor.clone(), 0, chosen.rows.clone());
        let rows = clear_rows::<B>(rows, B::bool_not(finite.clone()));
        match &roots {
            None => rows,
            Some(roots) => B::float_mul(rows, roots.clone()),
        }
    };
    Factors {
        input: gather(&factors.input),
        grad: gather(&factors.grad),
    }
}

/// The memory of the next step: the rows that were neither chosen nor broken, times the square
/// root of the decay, and after them the rows that took no part.
fn keep<B: Backend>(
    (factors, age): Kept<B>,
    scores: FloatTensor<B>,
    chosen: IntTensor<B>,
    idle: Option<Kept<B>>,
    decay: f64,
    dtype: FloatDType,
) -> RowMemory<B> {
    let chosen = marked::<B>(&scores, chosen);
    let cleared = B::bool_or(chosen, B::bool_not(finite::<B>(scores)));

    let kept = factors.map(|factor| {
        let factor = clear_rows::<B>(factor, cleared.clone());
        match decay {
            1.0 => factor,
            decay => B::float_mul_scalar(factor, Scalar::from(decay.sqrt())),
        }
    });
    let age = clear_rows::<B>(age, cleared);
    let (input, grad, age) = match idle {
        None => (kept.input, kept.grad, age),
        Some((idle, idle_age)) => (
            B::float_cat(vec![kept.input, idle.input], 0),
            B::float_cat(vec![kept.grad, idle.grad], 0),
            B::float_cat(vec![age, idle_age], 0),
        ),
    };
    RowMemory::Rows {
        input: cast::<B>(input, dtype),
        grad: cast::<B>(grad, dtype),
        age,
    }
}

/// Which scores are numbers; the comparison is false for NaN.
fn finite<B: Backend>(scores: FloatTensor<B>) -> BoolTensor<B> {
    let bools = get_or_init_device_settings::<B>(&scores.device()).bool_dtype;
    let largest = match scores.dtype() {
        DType::F64 => Scalar::from(f64::MAX),
        _ => Scalar::from(f32::MAX),
    };
    B::float_lower_equal_elem(scores, largest, bools)
}

/// The dtype of sums, scores and a memory: half-precision factors would overflow when squared and lose
/// what they accumulate.
pub(crate) fn working_dtype(dtype: DType) -> FloatDType {
    match dtype {
        DType::F64 => FloatDType::F64,
        _ => FloatDType::F32,
    }
}

/// Values as a tensor with the device and dtype of another.
fn floats<B: Backend>(
    values: Vec<f64>,
    shape: impl Into<Shape>,
    like: &FloatTensor<B>,
) -> FloatTensor<B> {
    let data = TensorData::new(values, shape).convert_dtype(like.dtype());
    B::float_from_data(data, &like.device())
}

pub(crate) fn cast<B: Backend>(tensor: FloatTensor<B>, dtype: FloatDType) -> FloatTensor<B> {
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
pub(crate) fn resize_rows<B: Backend>(matrix: FloatTensor<B>, rows: usize) -> FloatTensor<B> {
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
