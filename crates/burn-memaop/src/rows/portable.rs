//! The verbs in Burn's own operations. They run on every backend, and say what faster bodies must
//! compute. They draw and pack rows on the host, and wait for the device to do so.

use burn::backend::{
    Backend, ExecutionError, Scalar, TensorMetadata, get_or_init_device_settings,
    tensor::{BoolTensor, FloatTensor, IntTensor},
};
use burn::tensor::{
    DType, FloatDType, IndexingUpdateOp, IntDType, Shape, Slice, TensorData, try_read_sync,
};

use super::{
    draw,
    packing::{Packing, pack_row, unpack_row},
    random::{Dropout, Random},
    tensors::{Candidates, Draw, Drawn, Factor, Fold, Memory, Packed, Scores},
    window::Window,
};

pub(super) fn score<B: Backend>(input: Factor<B>, grad: FloatTensor<B>) -> Scores<B> {
    let dtype = working_dtype(grad.dtype());
    let rows = grad.shape()[0];
    let grad = cast::<B>(grad, dtype);
    let input = match input {
        Factor::One => B::float_ones(Shape::new([rows, 1]), &grad.device(), dtype),
        Factor::Matrix(input) => row_norms::<B>(&cast::<B>(input, dtype)),
        Factor::Packed(packed) => packed.norms,
        Factor::Patches(images, window) => {
            return score_patches::<B>(cast::<B>(images, dtype), grad, &window);
        }
    };
    scores_of::<B>(input, row_norms::<B>(&grad))
}

/// The scores of rows whose factors have these norms.
fn scores_of<B: Backend>(input: FloatTensor<B>, grad: FloatTensor<B>) -> Scores<B> {
    let shape = Shape::new([input.shape().num_elements()]);
    let [input, grad] = [input, grad].map(|norms| B::float_reshape(norms, shape.clone()));
    Scores {
        score: B::float_mul(input.clone(), grad.clone()),
        tilt: tilt::<B>(input, grad),
    }
}

fn tilt<B: Backend>(input: FloatTensor<B>, grad: FloatTensor<B>) -> FloatTensor<B> {
    let nothing = B::bool_or(is_zero::<B>(&input), is_zero::<B>(&grad));
    // The root of each norm is taken, because the quotient of the norms can overflow.
    let tilt = B::float_div(B::float_sqrt(grad), B::float_sqrt(input));
    B::float_mask_fill(tilt, nothing, Scalar::from(1.0))
}

/// Scores patches. With several groups, the score of a position is the root of the sum of the
/// squares of the scores of its groups.
fn score_patches<B: Backend>(
    images: FloatTensor<B>,
    grad: FloatTensor<B>,
    window: &Window,
) -> Scores<B> {
    let count = images.shape()[0];
    let (groups, positions) = (window.groups, window.positions());
    // Squares of values up to 1 do not overflow, and those that underflow do not matter.
    let (images, most_input) = up_to_one::<B>(images);
    let (grad, most_grad) = up_to_one::<B>(grad);
    let squares = |tensor: FloatTensor<B>, channels: usize, plane: usize| {
        let squares = B::float_mul(tensor.clone(), tensor);
        let shape = Shape::new([count * groups, channels, plane]);
        B::float_sum_dim(B::float_reshape(squares, shape), 1)
    };
    let ([inputs, outputs], [height, width]) = (window.group(), window.size);
    let planes = squares(images, inputs, height * width);
    let planes = B::float_reshape(planes, Shape::new([count * groups, 1, height, width]));
    let [down, right] = window.kernel;
    let (ones, dtype) = (Shape::new([1, 1, down, right]), grad.dtype().into());
    let ones = B::float_ones(ones, &grad.device(), dtype);
    let of_one_channel = Window {
        groups: 1,
        ..*window
    };
    let patches = B::conv2d(planes, ones, None, of_one_channel.options());

    let shape = Shape::new([count, groups, positions]);
    let patches = B::float_reshape(patches, shape.clone());
    let grads = B::float_reshape(squares(grad, outputs, positions), shape);
    let root_of_sum = |squares: FloatTensor<B>| {
        let sum = B::float_sum_dim(squares, 1);
        // A convolution by way of a transform can round zero to less.
        let bools = get_or_init_device_settings::<B>(&sum.device()).bool_dtype;
        let below = B::float_lower_elem(sum.clone(), Scalar::from(0.0), bools);
        let root = B::float_sqrt(B::float_mask_fill(sum, below, Scalar::from(0.0)));
        B::float_reshape(root, Shape::new([count * positions]))
    };
    let score = root_of_sum(B::float_mul(patches.clone(), grads.clone()));
    let score = B::float_mul(B::float_mul(score, most_input.clone()), most_grad.clone());
    Scores {
        score,
        tilt: tilt::<B>(
            B::float_mul(root_of_sum(patches), most_input),
            B::float_mul(root_of_sum(grads), most_grad),
        ),
    }
}

/// A tensor divided by its largest absolute value, and that value or 1 for zeros, shape `[1]`.
fn up_to_one<B: Backend>(tensor: FloatTensor<B>) -> (FloatTensor<B>, FloatTensor<B>) {
    let most = B::float_max(B::float_abs(tensor.clone()));
    let most = B::float_mask_fill(most.clone(), is_zero::<B>(&most), Scalar::from(1.0));
    let shape = tensor.shape();
    let ones = Shape::from(vec![1; shape.num_dims()]);
    let divisor = B::float_expand(B::float_reshape(most.clone(), ones), shape);
    (B::float_div(tensor, divisor), most)
}

/// The norm of a tensor, shape `[1]`. It is 0 where all squares underflow.
pub(crate) fn norm<B: Backend>(tensor: FloatTensor<B>) -> FloatTensor<B> {
    B::float_sqrt(B::float_sum(B::float_mul(tensor.clone(), tensor)))
}

/// The Euclidean norm of every row, shape `[rows, 1]`. It is not finite if a value is not.
fn row_norms<B: Backend>(matrix: &FloatTensor<B>) -> FloatTensor<B> {
    let most = B::float_max_dim(B::float_abs(matrix.clone()), 1);
    let most = B::float_mask_fill(most.clone(), is_zero::<B>(&most), Scalar::from(1.0));
    let divided = B::float_div(
        matrix.clone(),
        B::float_expand(most.clone(), matrix.shape()),
    );
    let squares = B::float_sum_dim(B::float_mul(divided.clone(), divided), 1);
    B::float_mul(B::float_sqrt(squares), most)
}

pub(super) fn fold<B: Backend>(
    memory: Memory<B>,
    input: FloatTensor<B>,
    grad: FloatTensor<B>,
    fold: Fold,
) -> (Memory<B>, Scores<B>) {
    let dtype: FloatDType = memory.input.dtype().into();
    let (rows, kept) = (grad.shape()[0], memory.input.shape()[0]);
    let batch = [input, grad].map(|factor| cast::<B>(factor, dtype));
    let norms = batch.each_ref().map(row_norms::<B>);
    // Zero times a number that is not finite is NaN.
    let is_broken = |factor: &FloatTensor<B>| {
        let zeros = B::float_mul_scalar(factor.clone(), Scalar::from(0.0));
        read::<B>(B::float_sum(zeros)) != [0.0]
    };
    if batch.iter().any(is_broken) {
        let nan = || {
            let zeros = B::float_zeros(Shape::new([rows]), &batch[0].device(), dtype);
            B::float_add_scalar(zeros, Scalar::from(f64::NAN))
        };
        let (score, tilt) = (nan(), nan());
        return (memory, Scores { score, tilt });
    }

    let first = |matrix: &FloatTensor<B>| slice_rows::<B>(matrix.clone(), 0, rows);
    let old = [&memory.input, &memory.grad]
        .map(|factor| B::float_mul_scalar(first(factor), Scalar::from(fold.decay.sqrt())));
    let scales = match fold.balanced {
        true => balance::<B>(norms, old.each_ref().map(row_norms::<B>), &fold.random),
        false => norms.map(|norms| B::float_ones(norms.shape(), &norms.device(), dtype)),
    };
    let [batch_input, batch_grad] = batch;
    let ([old_input, old_grad], [by_input, by_grad]) = (old, scales);
    let input = B::float_add(old_input, B::float_mul(batch_input, by_input));
    let grad = B::float_add(old_grad, B::float_mul(batch_grad, by_grad));
    let scores = scores_of::<B>(row_norms::<B>(&input), row_norms::<B>(&grad));
    let age = B::float_add_scalar(first(&memory.age), Scalar::from(1.0));

    // A row whose sum has overflowed is dropped.
    let lost = B::bool_not(finite::<B>(scores.score.clone()));
    let clear = |matrix: FloatTensor<B>| clear_rows::<B>(matrix, lost.clone());
    let behind = |new: FloatTensor<B>, all: FloatTensor<B>| match kept > rows {
        true => B::float_cat(vec![new, slice_rows::<B>(all, rows, kept)], 0),
        false => new,
    };
    let memory = Memory {
        input: behind(clear(input), memory.input),
        grad: behind(clear(grad), memory.grad),
        age: behind(clear(age), memory.age),
    };
    let fill = |of_rows, value: f64| B::float_mask_fill(of_rows, lost.clone(), Scalar::from(value));
    let scores = Scores {
        score: fill(scores.score, 0.0),
        tilt: fill(scores.tilt, 1.0),
    };
    (memory, scores)
}

/// `s r` and `s / r` of every row, with a random sign s and the r for which the new row adds the
/// least variance. r is 1 where nothing is kept. A row with a factor of zeros adds nothing.
fn balance<B: Backend>(
    [x, g]: [FloatTensor<B>; 2],
    [a, b]: [FloatTensor<B>; 2],
    random: &Random,
) -> [FloatTensor<B>; 2] {
    let rows = x.shape()[0];
    let nothing = B::bool_or(is_zero::<B>(&x), is_zero::<B>(&g));
    let unkept = B::bool_or(is_zero::<B>(&a), is_zero::<B>(&b));
    let signs = (0..rows).map(|row| random.sign(row)).collect();
    let signs = floats::<B>(signs, [rows, 1], &x);
    // The root of each quotient is taken, because the quotient of the products could overflow.
    let [x, g, a, b] = [x, g, a, b].map(B::float_sqrt);
    let r = B::float_mul(B::float_div(a, x), B::float_div(g, b));
    let r = B::float_mask_fill(r, unkept, Scalar::from(1.0));
    [
        B::float_mul(signs.clone(), r.clone()),
        B::float_div(signs, r),
    ]
    .map(|scale| B::float_mask_fill(scale, nothing.clone(), Scalar::from(0.0)))
}

pub(super) fn draw<B: Backend>(score: FloatTensor<B>, draw: Draw) -> Drawn<B> {
    let ints = get_or_init_device_settings::<B>(&score.device()).int_dtype;
    draw_in::<B>(score, draw, ints)
}

/// Draws on the host, and numbers the rows in the given type.
pub(super) fn draw_in<B: Backend>(score: FloatTensor<B>, draw: Draw, ints: IntDType) -> Drawn<B> {
    let sample = draw::draw(&read::<B>(score.clone()), &draw);
    let count = sample.rows.len();
    let rows: Vec<_> = sample.rows.into_iter().map(|row| row as i64).collect();
    let rows = TensorData::new(rows, [count]).convert_dtype(ints.into());
    let roots = sample.weights.into_iter().map(f64::sqrt).collect();
    Drawn {
        rows: B::int_from_data(rows, &score.device()),
        root: floats::<B>(roots, [count], &score),
    }
}

pub(super) fn product<B: Backend>(
    input: Factor<B>,
    grad: FloatTensor<B>,
    tilt: FloatTensor<B>,
    drawn: Drawn<B>,
) -> FloatTensor<B> {
    let dtype: FloatDType = grad.dtype().into();
    let input = match input {
        Factor::Patches(images, window) => {
            return product_of_patches::<B>(images, grad, tilt, drawn, &window);
        }
        Factor::Packed(packed) => unpack::<B>(packed, dtype),
        Factor::Matrix(input) => input,
        Factor::One => unreachable!("a gradient of the weight has two factors"),
    };
    product_of_rows::<B>([input, grad], tilt, drawn, dtype)
}

/// The sum of the outer products of the drawn rows of two matrices.
fn product_of_rows<B: Backend>(
    factors: [FloatTensor<B>; 2],
    tilt: FloatTensor<B>,
    drawn: Drawn<B>,
    dtype: FloatDType,
) -> FloatTensor<B> {
    let scales = scales::<B>(tilt, &drawn);
    let [input, grad] = factors;
    let panel = |factor, scale| {
        let factor = cast::<B>(factor, working_dtype(dtype.into()));
        let rows = B::float_select(factor, 0, drawn.rows.clone());
        B::float_cast(B::float_mul(rows, scale), dtype)
    };
    let [by_input, by_grad] = scales;
    B::linear_weight_backward(panel(input, by_input), panel(grad, by_grad))
}

/// What the two factors of the drawn rows are multiplied by, shape `[k, 1]` each.
fn scales<B: Backend>(tilt: FloatTensor<B>, drawn: &Drawn<B>) -> [FloatTensor<B>; 2] {
    let tilt = B::float_select(tilt, 0, drawn.rows.clone());
    let root = drawn.root.clone();
    [
        B::float_mul(root.clone(), tilt.clone()),
        B::float_div(root, tilt),
    ]
    .map(column::<B>)
}

fn column<B: Backend>(values: FloatTensor<B>) -> FloatTensor<B> {
    let rows = values.shape()[0];
    B::float_reshape(values, Shape::new([rows, 1]))
}

/// The sum of the outer products of drawn patches. Only the drawn patches are unfolded.
fn product_of_patches<B: Backend>(
    images: FloatTensor<B>,
    grad: FloatTensor<B>,
    tilt: FloatTensor<B>,
    drawn: Drawn<B>,
    window: &Window,
) -> FloatTensor<B> {
    let (device, dtype) = (grad.device(), FloatDType::from(grad.dtype()));
    let working = working_dtype(grad.dtype());
    let (images, grad) = (cast::<B>(images, working), cast::<B>(grad, working));
    let [by_input, by_grad] = scales::<B>(tilt, &drawn);
    let [count, channels, height, width] = grad.shape().dims();
    let k = drawn.root.shape()[0];
    let rows: Vec<usize> = host(B::int_into_data(drawn.rows.clone()))
        .iter::<i64>()
        .map(|row| row as usize)
        .collect();

    let grad = B::float_reshape(grad, Shape::new([count, channels, height * width]));
    let grad = B::float_swap_dims(grad, 1, 2);
    let grad = B::float_reshape(grad, Shape::new([count * height * width, channels]));
    let grad = B::float_mul(B::float_select(grad, 0, drawn.rows), by_grad);
    let grad = B::float_cast(grad, dtype);

    // What patches see beyond an image is the zero behind all images.
    let values = Shape::new([images.shape().num_elements()]);
    let zero = B::float_zeros(Shape::new([1]), &device, working);
    let flat = B::float_cat(vec![B::float_reshape(images, values), zero], 0);
    let ints = DType::from(get_or_init_device_settings::<B>(&device).int_dtype);
    let outputs = window.group()[1];
    let products = (0..window.groups).map(|group| {
        let seen = values_seen(&rows, group, count, window);
        let seen = TensorData::new(seen, [k * window.patch()]).convert_dtype(ints);
        let patches = B::float_select(flat.clone(), 0, B::int_from_data(seen, &device));
        let patches = B::float_reshape(patches, Shape::new([k, window.patch()]));
        let patches = B::float_cast(B::float_mul(patches, by_input.clone()), dtype);
        let of_group = Slice::from(group * outputs..(group + 1) * outputs);
        let grad = B::float_slice(grad.clone(), &[Slice::full(), of_group]);
        B::float_matmul(B::float_transpose(grad), patches)
    });
    B::float_cat(products.collect(), 0)
}

/// The indices of what the patches of a group see, among the values of all images, one image after
/// the other. What lies beyond an image has the first index behind all images.
fn values_seen(rows: &[usize], group: usize, images: usize, window: &Window) -> Vec<i64> {
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

pub(super) fn take_out<B: Backend>(
    memory: Memory<B>,
    tilt: FloatTensor<B>,
    drawn: Drawn<B>,
    dtype: FloatDType,
) -> (FloatTensor<B>, Memory<B>) {
    let factors = [memory.input.clone(), memory.grad.clone()];
    let taken = drawn.rows.clone();
    let broken = read::<B>(drawn.root.clone())
        .iter()
        .any(|root| root.is_nan());
    let weight = product_of_rows::<B>(factors, tilt, drawn, dtype);
    if broken {
        return (weight, memory);
    }
    let taken = marked::<B>(&memory.age, taken);
    let clear = |matrix| clear_rows::<B>(matrix, taken.clone());
    let memory = Memory {
        input: clear(memory.input),
        grad: clear(memory.grad),
        age: clear(memory.age),
    };
    (weight, memory)
}

pub(super) fn input_product<B: Backend>(
    grad: FloatTensor<B>,
    weight: FloatTensor<B>,
    score: FloatTensor<B>,
    drawn: Drawn<B>,
) -> FloatTensor<B> {
    let (device, dtype) = (grad.device(), FloatDType::from(grad.dtype()));
    let working = working_dtype(grad.dtype());
    // One root of the weight goes before the product and one behind it, so that neither overflows.
    let broken = B::bool_not(finite::<B>(drawn.root.clone()));
    let root = column::<B>(B::float_mask_fill(drawn.root, broken, Scalar::from(0.0)));
    let rows = B::float_select(cast::<B>(grad, working), 0, drawn.rows.clone());
    let rows = B::float_cast(B::float_mul(rows, root.clone()), dtype);
    let others = Shape::new([score.shape()[0], weight.shape()[0]]);
    let product = B::float_matmul(rows, B::float_transpose(weight));
    let product = B::float_mul(cast::<B>(product, working), root);
    let gradient = B::float_zeros(others, &device, dtype);
    let gradient = B::float_select_assign(
        gradient,
        0,
        drawn.rows,
        B::float_cast(product, dtype),
        IndexingUpdateOp::Add,
    );
    fill_rows::<B>(gradient, B::bool_not(finite::<B>(score)), f64::NAN)
}

pub(super) fn variances<B: Backend>(score: FloatTensor<B>, ks: Candidates) -> FloatTensor<B> {
    let roots = draw::variances(&read::<B>(score.clone()), &ks);
    let roots = roots.into_iter().map(|root| root as f32).collect();
    let data = TensorData::new::<f32, _>(roots, [1 + ks.len()]);
    B::float_from_data(data, &score.device())
}

/// The sums of the channels of a gradient, shape `[channels]`: a convolution's bias gradient.
pub(crate) fn bias_of_channels<B: Backend>(grad: FloatTensor<B>) -> FloatTensor<B> {
    let [images, channels, height, width] = grad.shape().dims();
    let rows = Shape::new([images, channels, height * width]);
    let sums = B::float_sum_dim(B::float_reshape(grad, rows), 2);
    let sums = B::float_sum_dim(sums, 0);
    B::float_reshape(sums, Shape::new([channels]))
}

pub(super) fn pack<B: Backend>(
    input: FloatTensor<B>,
    packing: Packing,
    random: Option<Random>,
) -> Packed<B> {
    let [rows, width] = input.shape().dims();
    let device = input.device();
    let working = working_dtype(input.dtype());
    let norms = row_norms::<B>(&cast::<B>(input.clone(), working));
    // A row with a norm that single precision does not hold counts as broken.
    let bools = get_or_init_device_settings::<B>(&device).bool_dtype;
    let too_large = B::float_greater_elem(norms.clone(), Scalar::from(f32::MAX), bools);
    let norms = B::float_mask_fill(norms, too_large, Scalar::from(f64::INFINITY));
    let values: Vec<f32> = host(B::float_into_data(input)).iter().collect();
    let mut words = vec![0; rows * packing.words()];
    let packed = values.chunks(width).zip(words.chunks_mut(packing.words()));
    for (row, (values, words)) in packed.enumerate() {
        let key = random.map(|random| random.rounding(row));
        pack_row(packing, values, |value| value, key, words);
    }
    let words = TensorData::new(words, [rows, packing.words()]);
    Packed {
        words: B::int_from_data(words, &device),
        norms,
        packing,
    }
}

pub(super) fn unpack<B: Backend>(packed: Packed<B>, dtype: FloatDType) -> FloatTensor<B> {
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

pub(super) fn times<B: Backend>(packed: Packed<B>, values: FloatTensor<B>) -> FloatTensor<B> {
    let factors = unpack::<B>(packed, values.dtype().into());
    let zeros = is_zero::<B>(&factors);
    B::float_mask_fill(B::float_mul(values, factors), zeros, Scalar::from(0.0))
}

pub(super) fn drop_out<B: Backend>(values: FloatTensor<B>, dropout: Dropout) -> FloatTensor<B> {
    let [rows, width] = values.shape().dims();
    let factors = (0..rows).flat_map(|row| (0..width).map(dropout.factors(row)));
    let factors = TensorData::new(factors.collect::<Vec<_>>(), [rows, width]);
    let factors = factors.convert_dtype(values.dtype());
    let factors = B::float_from_data(factors, &values.device());
    B::float_mul(values, factors)
}

pub(super) fn exact_input_product<B: Backend>(
    grad: FloatTensor<B>,
    weight: FloatTensor<B>,
) -> FloatTensor<B> {
    B::float_matmul(grad, B::float_transpose(weight))
}

pub(super) fn exact_gradient_of_patches<B: Backend>(
    images: FloatTensor<B>,
    grad: FloatTensor<B>,
    window: Window,
) -> FloatTensor<B> {
    // Only the shape of this weight matters.
    let (shape, dtype) = (Shape::new(window.weight()), grad.dtype().into());
    let weight = B::float_empty(shape, &grad.device(), dtype);
    let gradient = B::conv2d_weight_backward(images, weight, grad, window.options());
    B::float_reshape(gradient, Shape::new([window.channels[1], window.patch()]))
}

fn read<B: Backend>(tensor: FloatTensor<B>) -> Vec<f64> {
    host(B::float_into_data(tensor)).iter().collect()
}

fn host(data: impl Future<Output = Result<TensorData, ExecutionError>>) -> TensorData {
    #[cfg(feature = "cubecl-backend")]
    log::debug!(target: "burn_memaop::read", "a tensor is read back: this part of a gradient is computed on the host");
    let data = try_read_sync(data);
    let data = data.expect("backends on which gradients are approximated can be read");
    data.expect("the tensor can be read")
}

/// Whether each row is drawn.
fn marked<B: Backend>(like: &FloatTensor<B>, rows: IntTensor<B>) -> BoolTensor<B> {
    let (device, dtype) = (like.device(), FloatDType::from(like.dtype()));
    let marks = B::float_zeros(Shape::new([like.shape()[0]]), &device, dtype);
    let ones = B::float_ones(rows.shape(), &device, dtype);
    let marks = B::float_select_assign(marks, 0, rows, ones, IndexingUpdateOp::Add);
    let bools = get_or_init_device_settings::<B>(&device).bool_dtype;
    B::float_greater_elem(marks, Scalar::from(0.5), bools)
}

/// Whether each value, none of which is negative, is finite. The comparison is false for NaN.
fn finite<B: Backend>(values: FloatTensor<B>) -> BoolTensor<B> {
    let bools = get_or_init_device_settings::<B>(&values.device()).bool_dtype;
    let largest = match values.dtype() {
        DType::F64 => Scalar::from(f64::MAX),
        _ => Scalar::from(f32::MAX),
    };
    B::float_lower_equal_elem(values, largest, bools)
}

fn is_zero<B: Backend>(values: &FloatTensor<B>) -> BoolTensor<B> {
    let bools = get_or_init_device_settings::<B>(&values.device()).bool_dtype;
    B::float_equal_elem(values.clone(), Scalar::from(0.0), bools)
}

/// The type of sums, scores and a memory. In half precision squares would overflow, and sums would
/// lose what they add up.
pub(crate) fn working_dtype(dtype: DType) -> FloatDType {
    match dtype {
        DType::F64 => FloatDType::F64,
        _ => FloatDType::F32,
    }
}

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

fn clear_rows<B: Backend>(matrix: FloatTensor<B>, mask: BoolTensor<B>) -> FloatTensor<B> {
    fill_rows::<B>(matrix, mask, 0.0)
}

/// Fills the rows of a matrix where `mask`, shape `[rows]`, is true.
fn fill_rows<B: Backend>(
    matrix: FloatTensor<B>,
    mask: BoolTensor<B>,
    value: f64,
) -> FloatTensor<B> {
    let shape = matrix.shape();
    let mask = B::bool_reshape(mask, Shape::new([shape[0], 1]));
    B::float_mask_fill(matrix, B::bool_expand(mask, shape), Scalar::from(value))
}

fn slice_rows<B: Backend>(matrix: FloatTensor<B>, start: usize, end: usize) -> FloatTensor<B> {
    B::float_slice(matrix, &[Slice::from(start..end), Slice::full()])
}
