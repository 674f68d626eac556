//! Convolutions in plain `f64` loops. Shares no code with the crate.

use burn::{
    module::Param,
    nn::{
        PaddingConfig2d,
        conv::{Conv2d, Conv2dConfig},
    },
    tensor::{DType, Device, Tensor, TensorData},
};

use crate::support::Random;

/// The sizes of a convolution.
#[derive(Debug, Clone)]
pub struct Sizes {
    pub images: usize,
    pub channels: [usize; 2],
    pub size: [usize; 2],
    pub kernel: [usize; 2],
    pub stride: [usize; 2],
    pub dilation: [usize; 2],
    /// Top, left, bottom, right.
    pub padding: [usize; 4],
    pub groups: usize,
}

impl Sizes {
    pub fn random(random: &mut Random) -> Self {
        loop {
            let groups = [1, 1, 1, 2, 3][random.range(0, 4)];
            let mut pair = |low, high| [random.range(low, high), random.range(low, high)];
            let (kernel, stride, dilation) = (pair(1, 4), pair(1, 3), pair(1, 2));
            let (size, channels) = (pair(1, 9), pair(1, 4).map(|channels| groups * channels));
            let [[a, b], [c, d]] = [pair(0, 2), pair(0, 2)];
            let sizes = Self {
                images: random.range(1, 5),
                channels,
                size,
                kernel,
                stride,
                dilation,
                padding: [a, b, c, d],
                groups,
            };
            if sizes.fits() {
                return sizes;
            }
        }
    }

    fn padded(&self) -> [usize; 2] {
        let [top, left, bottom, right] = self.padding;
        [self.size[0] + top + bottom, self.size[1] + left + right]
    }

    fn fits(&self) -> bool {
        (0..2).all(|i| self.padded()[i] > self.dilation[i] * (self.kernel[i] - 1))
    }

    pub fn output(&self) -> [usize; 2] {
        [0, 1].map(|i| {
            let mut places = 0;
            let mut last = self.dilation[i] * (self.kernel[i] - 1);
            while last < self.padded()[i] {
                places += 1;
                last += self.stride[i];
            }
            places
        })
    }

    pub fn rows(&self) -> usize {
        let [height, width] = self.output();
        self.images * height * width
    }

    pub fn conv2d(&self, random: &mut Random, device: &Device, dtype: DType) -> Conv2d {
        let [top, left, bottom, right] = self.padding;
        let mut conv = Conv2dConfig::new(self.channels, self.kernel)
            .with_stride(self.stride)
            .with_dilation(self.dilation)
            .with_groups(self.groups)
            .with_padding(PaddingConfig2d::Explicit(top, left, bottom, right))
            .init(device);
        let [inputs, outputs] = self.channels;
        let shape = [
            outputs,
            inputs / self.groups,
            self.kernel[0],
            self.kernel[1],
        ];
        conv.weight = Param::from_tensor(Images::random(random, shape).tensor(device, dtype));
        let bias = Images::random(random, [1, 1, 1, outputs]).tensor(device, dtype);
        conv.bias = Some(Param::from_tensor(bias.reshape([outputs])));
        conv
    }
}

/// Values of four axes.
#[derive(Debug, Clone)]
pub struct Images {
    pub values: Vec<f64>,
    pub shape: [usize; 4],
}

impl Images {
    pub fn zeros(shape: [usize; 4]) -> Self {
        Self {
            values: vec![0.0; shape.iter().product()],
            shape,
        }
    }

    /// Values of which some regions are larger than others.
    pub fn random(random: &mut Random, shape: [usize; 4]) -> Self {
        let mut images = Self::zeros(shape);
        for (index, value) in images.values.iter_mut().enumerate() {
            let scale = 1.0 + 3.0 * ((index / 5) % 4) as f64;
            *value = f64::from((scale * random.value()) as f32);
        }
        images
    }

    pub fn of(tensor: Tensor<4>) -> Self {
        let shape = tensor.dims();
        let values = tensor.into_data().iter::<f64>().collect();
        Self { values, shape }
    }

    pub fn tensor(&self, device: &Device, dtype: DType) -> Tensor<4> {
        let data = TensorData::new(self.values.clone(), self.shape).convert_dtype(dtype);
        Tensor::from_data(data, (device, dtype))
    }

    pub fn at(&mut self, [a, b, c, d]: [usize; 4]) -> &mut f64 {
        let [_, second, third, fourth] = self.shape;
        &mut self.values[((a * second + b) * third + c) * fourth + d]
    }

    pub fn get(&self, [a, b, c, d]: [usize; 4]) -> f64 {
        let [_, second, third, fourth] = self.shape;
        self.values[((a * second + b) * third + c) * fourth + d]
    }

    pub fn distance(&self, other: &Self) -> f64 {
        assert_eq!(self.shape, other.shape);
        let pairs = || self.values.iter().zip(&other.values);
        let difference: f64 = pairs().map(|(a, b)| (a - b) * (a - b)).sum();
        let norm: f64 = pairs().map(|(_, b)| b * b).sum();
        (difference / norm.max(f64::MIN_POSITIVE)).sqrt()
    }
}

/// The products of a convolution, of which each is an output, an input and a weight: `visit` is given the row (a position of
/// the batch), and the places in output, input and weight.
pub fn products(sizes: &Sizes, mut visit: impl FnMut(usize, [usize; 4], [usize; 4], [usize; 4])) {
    let ([height, width], [inputs, outputs]) = (sizes.output(), sizes.channels);
    let (of_group, to_group) = (inputs / sizes.groups, outputs / sizes.groups);
    for n in 0..sizes.images {
        for i in 0..height {
            for j in 0..width {
                let row = (n * height + i) * width + j;
                for o in 0..outputs {
                    for c in 0..of_group {
                        for u in 0..sizes.kernel[0] {
                            for v in 0..sizes.kernel[1] {
                                let y = i * sizes.stride[0] + u * sizes.dilation[0];
                                let x = j * sizes.stride[1] + v * sizes.dilation[1];
                                let [top, left, ..] = sizes.padding;
                                if y < top || x < left {
                                    continue;
                                }
                                let (y, x) = (y - top, x - left);
                                if y >= sizes.size[0] || x >= sizes.size[1] {
                                    continue;
                                }
                                let channel = o / to_group * of_group + c;
                                visit(row, [n, o, i, j], [n, channel, y, x], [o, c, u, v]);
                            }
                        }
                    }
                }
            }
        }
    }
}

/// `|x| |g|` of every row; of several groups the root of the sum of the squares.
pub fn row_sizes(sizes: &Sizes, x: &Images, g: &Images) -> Vec<f64> {
    let to_group = sizes.channels[1] / sizes.groups;
    let mut squares = vec![vec![[0.0; 2]; sizes.groups]; sizes.rows()];
    products(sizes, |row, _, input, [o, ..]| {
        // Each value of a patch once.
        if o % to_group == 0 {
            squares[row][o / to_group][0] += x.get(input).powi(2);
        }
    });
    let [height, width] = sizes.output();
    for row in 0..sizes.rows() {
        let (n, i, j) = (row / (height * width), row / width % height, row % width);
        for o in 0..sizes.channels[1] {
            squares[row][o / to_group][1] += g.get([n, o, i, j]).powi(2);
        }
    }
    let size = |groups: &Vec<[f64; 2]>| groups.iter().map(|[x, g]| x * g).sum::<f64>().sqrt();
    squares.iter().map(size).collect()
}

pub struct Gradients {
    pub output: Images,
    pub input: Images,
    pub weight: Images,
    pub bias: Vec<f64>,
}

/// Of which the gradient of the weight is made of the chosen rows, each times its weight.
pub fn gradients(
    sizes: &Sizes,
    [x, weight, g]: [&Images; 3],
    bias: &[f64],
    chosen: &[(usize, f64)],
) -> Gradients {
    let [height, width] = sizes.output();
    let mut output = Images::zeros([sizes.images, sizes.channels[1], height, width]);
    for n in 0..sizes.images {
        for o in 0..sizes.channels[1] {
            for i in 0..height {
                for j in 0..width {
                    *output.at([n, o, i, j]) = bias[o];
                }
            }
        }
    }
    let mut factors = vec![0.0; sizes.rows()];
    for &(row, factor) in chosen {
        factors[row] += factor;
    }
    let (mut dx, mut dw) = (Images::zeros(x.shape), Images::zeros(weight.shape));
    products(sizes, |row, to, from, by| {
        *output.at(to) += x.get(from) * weight.get(by);
        *dx.at(from) += g.get(to) * weight.get(by);
        *dw.at(by) += factors[row] * g.get(to) * x.get(from);
    });
    let mut db = vec![0.0; sizes.channels[1]];
    for (index, value) in g.values.iter().enumerate() {
        db[index / (height * width) % sizes.channels[1]] += value;
    }
    Gradients {
        output,
        input: dx,
        weight: dw,
        bias: db,
    }
}
