//! The products of convolutions on CPUs. Patches are unfolded a tile at a time, with a column for
//! each patch. A tile is multiplied while it is in the second-level cache.

use std::ops::Range;

use burn::backend::tensor::{Device, FloatTensor};

use super::{
    DrawnRow, HostTensors, from_values,
    passes::{GRAIN, RowWork},
};
use crate::rows::window::Window;

/// The number of columns of a tile.
const TILE: usize = 256;

#[derive(Clone, Copy)]
pub(super) struct Images<'a> {
    values: &'a [f32],
    pub(super) window: Window,
    /// Height and width are those of the output.
    height: usize,
    pub(super) width: usize,
}

impl<'a> Images<'a> {
    pub(super) fn new(values: &'a [f32], window: Window) -> Self {
        let [height, width] = window.output();
        Self {
            values,
            window,
            height,
            width,
        }
    }

    pub(super) fn plane(&self) -> usize {
        self.window.size.iter().product()
    }

    pub(super) fn positions(&self) -> usize {
        self.height * self.width
    }

    pub(super) fn split_at(self, image: usize) -> (Self, Self) {
        let values = self.window.channels[0] * self.plane();
        let (first, second) = self.values.split_at(image * values);
        let images = |values| Self { values, ..self };
        (images(first), images(second))
    }

    /// All channels of an image.
    pub(super) fn image(&self, image: usize) -> &'a [f32] {
        let values = self.window.channels[0] * self.plane();
        &self.values[image * values..][..values]
    }

    /// The channels of a group of an image.
    pub(super) fn group(&self, image: usize, group: usize) -> &'a [f32] {
        let values = self.window.group()[0] * self.plane();
        &self.image(image)[group * values..][..values]
    }

    /// The patches of a tile, shape `[patch, positions]`.
    fn unfold(&self, group: usize, tile: &Tile) -> Vec<f32> {
        let plane = self.plane();
        let [channels, _] = self.window.group();
        let mut columns = Vec::with_capacity(self.window.patch() * tile.positions());
        for channel in 0..channels {
            for [down, right] in self.window.offsets() {
                let run = Run::of(&self.window, right, &tile.columns);
                for image in tile.images.clone() {
                    let plane = &self.group(image, group)[channel * plane..][..plane];
                    for row in tile.rows.clone() {
                        let row = self.input_row(plane, down, row);
                        run.copy(row, self.window.stride[1], &mut columns);
                    }
                }
            }
        }
        columns
    }

    /// The row of an input plane that a row of the output sees, `down` rows down in the kernel.
    pub(super) fn input_row<'p>(
        &self,
        plane: &'p [f32],
        down: usize,
        row: usize,
    ) -> Option<&'p [f32]> {
        let Window {
            size: [height, width],
            stride,
            dilation,
            padding,
            ..
        } = self.window;
        let row = (row * stride[0] + down * dilation[0]).checked_sub(padding[0].0)?;
        (row < height).then(|| &plane[row * width..][..width])
    }

    /// The patches of some positions, shape `[patch, positions]`, from what they see of each plane.
    #[inline(always)]
    fn unfold_at(&self, group: usize, seen: &[usize], places: usize) -> Vec<f32> {
        let [channels, _] = self.window.group();
        let plane = self.plane();
        let mut columns = vec![0.0; self.window.patch() * places];
        let rows = columns.chunks_exact_mut(places);
        let channels = group * channels..(group + 1) * channels;
        let seen = channels.flat_map(|channel| {
            let values = &self.values[channel * plane..];
            seen.chunks_exact(places).map(move |seen| (values, seen))
        });
        for (row, (values, seen)) in rows.zip(seen) {
            for (to, &index) in row.iter_mut().zip(seen) {
                // An index beyond the image is beyond the batch too.
                *to = match index < values.len() {
                    true => values[index],
                    false => 0.0,
                };
            }
        }
        columns
    }

    /// Where each place sees the first channel of its image, shape `[taps, places]`.
    fn seen(&self, places: &[DrawnRow]) -> Vec<usize> {
        let window = &self.window;
        let image_values = window.channels[0] * self.plane();
        let places: Vec<_> = places.iter().map(|place| window.place(place.row)).collect();
        let mut seen = Vec::with_capacity(window.taps() * places.len());
        for offset in window.offsets() {
            seen.extend(places.iter().map(|&(image, place)| {
                let position = window.seen(place, offset);
                position.map_or(usize::MAX, |position| image * image_values + position)
            }));
        }
        seen
    }

    /// The tiles of some images. A tile is several images, several rows of one, or a part of a row.
    pub(super) fn tiles(&self, images: usize) -> Vec<Tile> {
        let (height, width) = (self.height, self.width);
        let steps = |end: usize, step: usize| {
            let step = step.max(1);
            (0..end)
                .step_by(step)
                .map(move |first| first..(first + step).min(end))
        };
        let [at_once, rows, columns] = match (self.positions(), width) {
            (positions, _) if positions < TILE => [TILE / positions.max(1), height, width],
            (_, width) if width <= 2 * TILE => [1, TILE / width, width],
            _ => [1, 1, TILE],
        };
        let tiles = steps(images, at_once).flat_map(|images| {
            steps(height, rows).flat_map(move |rows| {
                let images = images.clone();
                steps(width, columns).map(move |columns| Tile {
                    images: images.clone(),
                    rows: rows.clone(),
                    columns,
                })
            })
        });
        tiles.collect()
    }

    /// The parts of an output that each tile fills. The output has all channels of an image one
    /// after the other, so a tile of whole images fills one piece.
    pub(super) fn parts<'o>(
        &self,
        output: &'o mut [f32],
        tiles: &[Tile],
    ) -> Vec<Vec<&'o mut [f32]>> {
        let channels = self.window.channels[1];
        let mut parts = Vec::with_capacity(tiles.len());
        let mut rest = output;
        for alike in tiles.chunk_by(|tile, next| tile.images == next.images) {
            let first = parts.len();
            let planes = alike[0].images.len() * channels;
            // A tile of whole images has one piece, other tiles have one for each channel.
            let pieces = if alike.len() == 1 { 1 } else { planes };
            parts.extend(alike.iter().map(|_| Vec::with_capacity(pieces)));
            for _ in 0..pieces {
                for (tile, parts) in alike.iter().zip(&mut parts[first..]) {
                    let length = tile.rows.len() * tile.columns.len() * planes / pieces;
                    let (part, after) = rest.split_at_mut(length);
                    parts.push(part);
                    rest = after;
                }
            }
        }
        parts
    }
}

/// A part of the output: a part of one row, or whole rows, or whole images.
pub(super) struct Tile {
    images: Range<usize>,
    rows: Range<usize>,
    columns: Range<usize>,
}

impl Tile {
    fn positions(&self) -> usize {
        self.images.len() * self.rows.len() * self.columns.len()
    }

    /// The ranges of the tile in one channel of an output, and the run of its positions in each.
    fn runs(
        &self,
        channels: usize,
        channel: usize,
        [height, width]: [usize; 2],
    ) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
        let first = self.rows.start * width + self.columns.start;
        let length = self.rows.len() * self.columns.len();
        self.images.clone().enumerate().map(move |(index, image)| {
            let from = (image * channels + channel) * height * width + first;
            (from..from + length, index * length..(index + 1) * length)
        })
    }
}

/// How columns of a row of the output see a row of an image: beyond it, in it, beyond it again.
pub(super) struct Run {
    pub(super) before: usize,
    pub(super) first: usize,
    pub(super) inside: usize,
    all: usize,
}

impl Run {
    /// What the columns see through the value `offset` columns from the first of the kernel.
    pub(super) fn of(window: &Window, offset: usize, columns: &Range<usize>) -> Self {
        let (stride, offset) = (window.stride[1], offset * window.dilation[1]);
        let (padding, all) = (window.padding[1].0, columns.len());
        let inside = padding.saturating_sub(offset).div_ceil(stride);
        let before = inside.saturating_sub(columns.start).min(all);
        let first = ((columns.start + before) * stride + offset).saturating_sub(padding);
        let inside = window.size[1].saturating_sub(first).div_ceil(stride);
        Self {
            before,
            first,
            inside: inside.min(all - before),
            all,
        }
    }

    fn copy(&self, row: Option<&[f32]>, stride: usize, to: &mut Vec<f32>) {
        let end = to.len() + self.all;
        if let Some(row) = row
            && self.inside > 0
        {
            to.resize(to.len() + self.before, 0.0);
            match stride {
                1 => to.extend_from_slice(&row[self.first..][..self.inside]),
                stride => {
                    let seen = row[self.first..].iter().step_by(stride);
                    to.extend(seen.take(self.inside));
                }
            }
        }
        to.resize(end, 0.0);
    }
}

/// The convolution of images, tile by tile.
pub(super) struct Convolve<'a, 'o, B: HostTensors> {
    pub(super) images: Images<'a>,
    /// The weight of each group, shape `[channels, patch]`.
    pub(super) weights: &'a [FloatTensor<B>],
    pub(super) bias: Option<&'a [f32]>,
    pub(super) device: &'a Device<B>,
    pub(super) tiles: &'a [Tile],
    /// The [parts](Images::parts) of the output that the tiles fill.
    pub(super) outputs: &'a mut [Vec<&'o mut [f32]>],
}

impl<B: HostTensors> RowWork for Convolve<'_, '_, B> {
    type Output = ();

    fn rows(&self) -> usize {
        self.tiles.len()
    }

    fn width(&self) -> usize {
        GRAIN
    }

    fn split_at(self, tile: usize) -> (Self, Self) {
        let tiles = self.tiles.split_at(tile);
        let outputs = self.outputs.split_at_mut(tile);
        let work = |tiles, outputs| Self {
            tiles,
            outputs,
            ..self
        };
        (work(tiles.0, outputs.0), work(tiles.1, outputs.1))
    }

    #[inline(always)]
    fn run(self) {
        let window = self.images.window;
        let [channels, of_group] = [window.channels[1], window.group()[1]];
        for (tile, outputs) in self.tiles.iter().zip(self.outputs) {
            let columns = tile.positions();
            let plane = columns / tile.images.len();
            let planes = outputs
                .iter_mut()
                .flat_map(|part| part.chunks_exact_mut(plane));
            let mut planes: Vec<_> = planes.collect();
            for (group, weight) in self.weights.iter().enumerate() {
                let patches = self.images.unfold(group, tile);
                let shape = [window.patch(), columns];
                let patches = from_values::<B>(patches, shape, self.device);
                let product = B::contiguous(B::float_matmul(weight.clone(), patches));
                let product = B::values(&product).chunks_exact(columns);
                for (channel, product) in (group * of_group..).zip(product) {
                    let bias = self.bias.map(|bias| bias[channel]);
                    for (image, from) in product.chunks_exact(plane).enumerate() {
                        let to = &mut *planes[image * channels + channel];
                        match bias {
                            None => to.copy_from_slice(from),
                            Some(bias) => to.iter_mut().zip(from).for_each(|(to, &value)| {
                                *to = value + bias;
                            }),
                        }
                    }
                }
            }
        }
    }

    fn join((): (), (): ()) {}
}

/// The sum of the outer products of all positions, as in [`Sums`].
pub(super) struct AllProducts<'a, B: HostTensors> {
    pub(super) images: Images<'a>,
    pub(super) grad: &'a [f32],
    pub(super) tiles: &'a [Tile],
    pub(super) device: &'a Device<B>,
}

impl<B: HostTensors> RowWork for AllProducts<'_, B> {
    type Output = Vec<f32>;

    fn rows(&self) -> usize {
        self.tiles.len()
    }

    fn width(&self) -> usize {
        GRAIN
    }

    fn split_at(self, tile: usize) -> (Self, Self) {
        let (first, second) = self.tiles.split_at(tile);
        let work = |tiles| Self { tiles, ..self };
        (work(first), work(second))
    }

    #[inline(always)]
    fn run(self) -> Vec<f32> {
        let Images {
            window,
            height,
            width,
            ..
        } = self.images;
        let [channels, of_group] = [window.channels[1], window.group()[1]];
        let mut sums = Sums::of(window);
        for tile in self.tiles {
            for group in 0..window.groups {
                let mut grad = Vec::with_capacity(of_group * tile.positions());
                for channel in group * of_group..(group + 1) * of_group {
                    for (from, _) in tile.runs(channels, channel, [height, width]) {
                        grad.extend_from_slice(&self.grad[from]);
                    }
                }
                let patches = self.images.unfold(group, tile);
                sums.add_product::<B>(group, grad, patches, self.device);
            }
        }
        sums.values
    }

    fn join(first: Vec<f32>, second: Vec<f32>) -> Vec<f32> {
        added(first, second)
    }
}

/// The sum of the outer products of the drawn positions, each times its weight, as in [`Sums`].
pub(super) struct DrawnProducts<'a, B: HostTensors> {
    pub(super) images: Images<'a>,
    pub(super) grad: &'a [f32],
    pub(super) places: &'a [DrawnRow],
    pub(super) device: &'a Device<B>,
}

impl<B: HostTensors> RowWork for DrawnProducts<'_, B> {
    type Output = Vec<f32>;

    fn rows(&self) -> usize {
        self.places.len()
    }

    fn width(&self) -> usize {
        2 * GRAIN / TILE
    }

    fn split_at(self, place: usize) -> (Self, Self) {
        let (first, second) = self.places.split_at(place);
        let work = |places| Self { places, ..self };
        (work(first), work(second))
    }

    #[inline(always)]
    fn run(self) -> Vec<f32> {
        let window = self.images.window;
        let [channels, of_group] = [window.channels[1], window.group()[1]];
        let positions = self.images.positions();
        let mut sums = Sums::of(window);
        let of_channel_0 = |place: &DrawnRow| {
            let (image, position) = (place.row / positions, place.row % positions);
            let weight = place.scales[0] * place.scales[1];
            (image * channels * positions + position, weight)
        };
        let grads: Vec<_> = self.places.iter().map(of_channel_0).collect();
        let seen = self.images.seen(self.places);
        for group in 0..window.groups {
            let mut grad = vec![0.0; of_group * self.places.len()];
            let rows = grad.chunks_exact_mut(self.places.len());
            for (channel, row) in (group * of_group..).zip(rows) {
                let values = &self.grad[channel * positions..];
                for (to, &(index, weight)) in row.iter_mut().zip(&grads) {
                    *to = weight * values[index];
                }
            }
            let patches = self.images.unfold_at(group, &seen, self.places.len());
            sums.add_product::<B>(group, grad, patches, self.device);
        }
        sums.values
    }

    fn join(first: Vec<f32>, second: Vec<f32>) -> Vec<f32> {
        added(first, second)
    }
}

/// The products of all groups, each of shape `[patch, channels]`, which is faster than its
/// transpose. Before the first product there are no values.
struct Sums {
    values: Vec<f32>,
    /// The number of output channels of a group.
    channels: usize,
    patch: usize,
}

impl Sums {
    fn of(window: Window) -> Self {
        Self {
            values: Vec::with_capacity(window.channels[1] * window.patch()),
            channels: window.group()[1],
            patch: window.patch(),
        }
    }

    /// Adds the product of a gradient `[channels, columns]` and patches `[patch, columns]`.
    fn add_product<B: HostTensors>(
        &mut self,
        group: usize,
        grad: Vec<f32>,
        patches: Vec<f32>,
        device: &Device<B>,
    ) {
        let columns = patches.len() / self.patch;
        let grad = from_values::<B>(grad, [self.channels, columns], device);
        let patches = from_values::<B>(patches, [self.patch, columns], device);
        let product = B::float_matmul(patches, B::float_transpose(grad));
        let product = B::contiguous(product);
        let (values, first) = (B::values(&product), group * self.channels * self.patch);
        if self.values.len() == first {
            return self.values.extend_from_slice(values);
        }
        for (sum, &value) in self.values[first..].iter_mut().zip(values) {
            *sum += value;
        }
    }
}

fn added(mut first: Vec<f32>, second: Vec<f32>) -> Vec<f32> {
    for (first, second) in first.iter_mut().zip(second) {
        *first += second;
    }
    first
}
