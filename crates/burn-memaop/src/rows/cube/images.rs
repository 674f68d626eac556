//! Scores the positions of a convolution and gathers the drawn patches, of axes in any order.

use std::ops::Range;

use burn::{backend::TensorMetadata, tensor::DType};
use burn_cubecl::{CubeBackend, cubecl, kernel::into_contiguous, tensor::CubeTensor};
use cubecl::{calculate_cube_count_elemwise, prelude::*};

use super::{
    LEAST_UNITS, address_type, cubes, elem_type, empty_without_gaps,
    gather::is_weight,
    scores::{ENLARGE, REDUCE, balance, root},
};
use crate::rows::{
    tensors::{Drawn, Scores},
    window::Window,
};

/// The distances of neighbouring values along each axis.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
struct Strides {
    image: usize,
    channel: usize,
    row: usize,
    column: usize,
}

fn strides(images: &CubeTensor) -> StridesLaunch {
    let strides = images.meta.strides();
    StridesLaunch::new(strides[0], strides[1], strides[2], strides[3])
}

#[derive(CubeType, CubeLaunch, Clone, Copy)]
struct Sizes {
    groups: usize,
    /// Input and output channels are those of one group.
    inputs: usize,
    outputs: usize,
    height: usize,
    width: usize,
    output_height: usize,
    output_width: usize,
    kernel_height: usize,
    kernel_width: usize,
    stride_down: usize,
    stride_right: usize,
    dilation_down: usize,
    dilation_right: usize,
    top: usize,
    left: usize,
}

fn sizes(window: &Window) -> SizesLaunch {
    let ([inputs, outputs], [height, width]) = (window.group(), window.output());
    SizesLaunch::new(
        window.groups,
        inputs,
        outputs,
        window.size[0],
        window.size[1],
        height,
        width,
        window.kernel[0],
        window.kernel[1],
        window.stride[0],
        window.stride[1],
        window.dilation[0],
        window.dilation[1],
        window.padding[0].0,
        window.padding[1].0,
    )
}

#[cube]
impl Sizes {
    fn positions(&self) -> usize {
        self.output_height * self.output_width
    }

    /// The input row that a row of the output sees. Beyond the image it is `height` or more.
    fn row(&self, row: usize, down: usize) -> usize {
        within(
            row * self.stride_down + down * self.dilation_down,
            self.top,
            self.height,
        )
    }

    fn column(&self, column: usize, right: usize) -> usize {
        within(
            column * self.stride_right + right * self.dilation_right,
            self.left,
            self.width,
        )
    }
}

#[cube]
fn within(place: usize, padding: usize, size: usize) -> usize {
    let mut within = size;
    if place >= padding {
        within = place - padding;
    }
    within
}

/// Images whose strides can be used as they are.
pub(super) fn strided(images: CubeTensor) -> CubeTensor {
    match images.meta.is_tiled() {
        true => into_contiguous(images),
        false => images,
    }
}

/// Scores every position, in two launches.
pub(super) fn score(input: &CubeTensor, grad: &CubeTensor, window: &Window) -> Scores<CubeBackend> {
    let images = input.shape()[0];
    let planes = images * window.groups * window.size[0] * window.size[1];
    let norms = empty_without_gaps(input, [planes], DType::F32);
    let rows = images * window.positions();
    let of_rows = || empty_without_gaps(input, [rows], DType::F32);
    let scores = Scores::<CubeBackend> {
        score: of_rows(),
        tilt: of_rows(),
    };
    let units = CubeDim::new_1d(LEAST_UNITS);
    // SAFETY: every index is one of a value of the images by their strides, or below the number of
    // planes' values.
    unsafe {
        norm_kernel::launch_unchecked(
            &input.client,
            calculate_cube_count_elemwise(&input.client, planes, units),
            units,
            address_type(&[input, &norms]),
            input.clone().into_buffer_arg(),
            norms.clone().into_buffer_arg(),
            strides(input),
            sizes(window),
            planes,
            elem_type(input.dtype),
        );
    }
    // SAFETY: as above.
    unsafe {
        score_patches_kernel::launch_unchecked(
            &input.client,
            calculate_cube_count_elemwise(&input.client, rows, units),
            units,
            address_type(&[grad, &norms]),
            norms.into_buffer_arg(),
            grad.clone().into_buffer_arg(),
            scores.score.clone().into_buffer_arg(),
            scores.tilt.clone().into_buffer_arg(),
            strides(grad),
            sizes(window),
            rows,
            elem_type(grad.dtype),
        );
    }
    scores
}

/// The norm of the channels of a group, at each place of each image.
#[cube(launch_unchecked, address_type = "dynamic")]
fn norm_kernel<T: Float>(
    images: &[T],
    norms: &mut [f32],
    strides: Strides,
    sizes: Sizes,
    count: usize,
    #[define(T)] _dtype: ElemType,
) {
    let at = ABSOLUTE_POS;
    if at >= count {
        terminate!();
    }
    let column = at % sizes.width;
    let row = at / sizes.width % sizes.height;
    let group = at / (sizes.width * sizes.height) % sizes.groups;
    let image = at / (sizes.width * sizes.height * sizes.groups);
    let first = image * strides.image
        + group * sizes.inputs * strides.channel
        + row * strides.row
        + column * strides.column;
    let mut squares = Squares::new();
    for channel in 0..sizes.inputs {
        squares.add(f32::cast_from(images[first + channel * strides.channel]));
    }
    norms[at] = squares.root();
}

/// A sum of squares that neither overflows nor loses what underflows.
#[derive(CubeType)]
struct Squares {
    plain: f32,
    enlarged: f32,
    reduced: f32,
}

#[cube]
impl Squares {
    fn new() -> Squares {
        Squares {
            plain: 0.0f32,
            enlarged: 0.0f32,
            reduced: 0.0f32,
        }
    }

    fn add(&mut self, value: f32) {
        let large = value * ENLARGE;
        let small = value * REDUCE;
        self.plain += value * value;
        self.enlarged += large * large;
        self.reduced += small * small;
    }

    fn root(&self) -> f32 {
        root(self.plain, self.enlarged, self.reduced)
    }
}

/// Scores every position. With several groups, the score is the root of the sum of the squares of
/// the scores of its groups.
#[cube(launch_unchecked, address_type = "dynamic")]
fn score_patches_kernel<T: Float>(
    norms: &[f32],
    grad: &[T],
    scores: &mut [f32],
    tilts: &mut [f32],
    strides: Strides,
    sizes: Sizes,
    rows: usize,
    #[define(T)] _dtype: ElemType,
) {
    let at = ABSOLUTE_POS;
    if at >= rows {
        terminate!();
    }
    let column = at % sizes.output_width;
    let row = at / sizes.output_width % sizes.output_height;
    let image = at / sizes.positions();
    let mut score = 0.0f32;
    let mut all_inputs = Squares::new();
    let mut all_grads = Squares::new();
    for group in 0..sizes.groups {
        let plane = (image * sizes.groups + group) * sizes.height * sizes.width;
        let mut x = Squares::new();
        for down in 0..sizes.kernel_height {
            let y = sizes.row(row, down);
            if y < sizes.height {
                for right in 0..sizes.kernel_width {
                    let z = sizes.column(column, right);
                    if z < sizes.width {
                        x.add(norms[plane + y * sizes.width + z]);
                    }
                }
            }
        }
        let first = image * strides.image
            + group * sizes.outputs * strides.channel
            + row * strides.row
            + column * strides.column;
        let mut g = Squares::new();
        for channel in 0..sizes.outputs {
            g.add(f32::cast_from(grad[first + channel * strides.channel]));
        }
        let x = x.root();
        let g = g.root();
        all_inputs.add(x);
        all_grads.add(g);
        let size = x * g;
        // Squares are taken of numbers up to 1, because others could overflow.
        let large = f32::max(score, size);
        if large > 0.0 {
            let (a, b) = (score / large, size / large);
            score = large * (a * a + b * b).sqrt();
        } else {
            // The score is zero, or not a number.
            score += size;
        }
    }
    scores[at] = score;
    tilts[at] = balance(all_inputs.root(), all_grads.root());
}

/// Some of the drawn patches, shape `[groups, drawn, patch]`, and their gradients, shape
/// `[groups, drawn, channels]`, each times its half of the weight.
pub(super) fn gather(
    input: &CubeTensor,
    grad: &CubeTensor,
    tilt: &CubeTensor,
    drawn: &Drawn<CubeBackend>,
    places: Range<usize>,
    window: &Window,
) -> [CubeTensor; 2] {
    let k = places.len();
    let panel =
        |width: usize| empty_without_gaps(&drawn.rows, [window.groups, k, width], input.dtype);
    let [patches, grads] = [window.patch(), window.group()[1]].map(panel);
    let units = (window.patch() as u32)
        .next_power_of_two()
        .clamp(32, LEAST_UNITS);
    let (count, dim) = cubes(&drawn.rows, k, units);
    // SAFETY: every index is one of a value of the images by their strides, or of a panel by its
    // shape; the drawn rows are positions of the batch.
    unsafe {
        gather_patches_kernel::launch_unchecked(
            &drawn.rows.client,
            count,
            dim,
            address_type(&[input, grad, &patches, &grads]),
            input.clone().into_buffer_arg(),
            grad.clone().into_buffer_arg(),
            patches.clone().into_buffer_arg(),
            grads.clone().into_buffer_arg(),
            drawn.rows.clone().into_buffer_arg(),
            drawn.root.clone().into_buffer_arg(),
            tilt.clone().into_buffer_arg(),
            strides(input),
            strides(grad),
            sizes(window),
            places.start,
            k,
            elem_type(input.dtype),
        );
    }
    [patches, grads]
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn gather_patches_kernel<T: Float>(
    input: &[T],
    grad: &[T],
    patches: &mut [T],
    grads: &mut [T],
    drawn: &[u32],
    roots: &[f32],
    tilts: &[f32],
    input_strides: Strides,
    grad_strides: Strides,
    sizes: Sizes,
    first: usize,
    k: usize,
    #[define(T)] _dtype: ElemType,
) {
    let place = CUBE_POS;
    if place >= k {
        terminate!();
    }
    let position = drawn[first + place] as usize;
    let root = roots[first + place];
    let by_input = root * tilts[position];
    let by_grad = root / tilts[position];
    let column = position % sizes.output_width;
    let row = position / sizes.output_width % sizes.output_height;
    let image = position / sizes.positions();

    let taps = sizes.kernel_height * sizes.kernel_width;
    let patch = sizes.inputs * taps;
    for group in 0..sizes.groups {
        let panel = (group * k + place) * patch;
        let mut at = UNIT_POS as usize;
        while at < patch {
            let tap = at % taps;
            let y = sizes.row(row, tap / sizes.kernel_width);
            let z = sizes.column(column, tap % sizes.kernel_width);
            let mut value = 0.0f32;
            if is_weight(root) && y < sizes.height && z < sizes.width {
                let channel = group * sizes.inputs + at / taps;
                let from = image * input_strides.image
                    + channel * input_strides.channel
                    + y * input_strides.row
                    + z * input_strides.column;
                value = by_input * f32::cast_from(input[from]);
            }
            patches[panel + at] = T::cast_from(value);
            at += CUBE_DIM as usize;
        }

        let panel = (group * k + place) * sizes.outputs;
        let mut at = UNIT_POS as usize;
        while at < sizes.outputs {
            let mut value = 0.0f32;
            if is_weight(root) {
                let channel = group * sizes.outputs + at;
                let from = image * grad_strides.image
                    + channel * grad_strides.channel
                    + row * grad_strides.row
                    + column * grad_strides.column;
                value = by_grad * f32::cast_from(grad[from]);
            }
            grads[panel + at] = T::cast_from(value);
            at += CUBE_DIM as usize;
        }
    }
}
