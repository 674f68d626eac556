//! Convolutions against plain `f64` loops, and as a drop-in for Burn's.

use burn::{
    module::{Module, Param},
    nn::{
        PaddingConfig2d,
        conv::{Conv2d, Conv2dConfig},
    },
    store::ModuleRecord,
    tensor::{DType, Device, Tensor, TensorData, Tolerance},
};
use burn_memaop::{
    AopConfig, AopConfigError, AopObserver, InputGradient, MemAopConv2d, MemAopConv2dConfig,
    Memory, Method, OuterProducts, StoredInput, baseline::Baseline,
};

use crate::{
    oracle::{Policy, choose, inclusion_probabilities, layer_seed, permutation, philox},
    support::{Random, bits},
};

/// The sizes of a convolution.
#[derive(Debug, Clone)]
struct Sizes {
    images: usize,
    channels: [usize; 2],
    size: [usize; 2],
    kernel: [usize; 2],
    stride: [usize; 2],
    dilation: [usize; 2],
    /// Top, left, bottom, right.
    padding: [usize; 4],
    groups: usize,
}

impl Sizes {
    fn random(random: &mut Random) -> Self {
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

    fn output(&self) -> [usize; 2] {
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

    fn rows(&self) -> usize {
        let [height, width] = self.output();
        self.images * height * width
    }

    fn conv2d(&self, random: &mut Random, device: &Device, dtype: DType) -> Conv2d {
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
struct Images {
    values: Vec<f64>,
    shape: [usize; 4],
}

impl Images {
    fn zeros(shape: [usize; 4]) -> Self {
        Self {
            values: vec![0.0; shape.iter().product()],
            shape,
        }
    }

    /// Values of which some regions are larger than others.
    fn random(random: &mut Random, shape: [usize; 4]) -> Self {
        let mut images = Self::zeros(shape);
        for (index, value) in images.values.iter_mut().enumerate() {
            let scale = 1.0 + 3.0 * ((index / 5) % 4) as f64;
            *value = f64::from((scale * random.value()) as f32);
        }
        images
    }

    fn of(tensor: Tensor<4>) -> Self {
        let shape = tensor.dims();
        let values = tensor.into_data().iter::<f64>().collect();
        Self { values, shape }
    }

    fn tensor(&self, device: &Device, dtype: DType) -> Tensor<4> {
        let data = TensorData::new(self.values.clone(), self.shape).convert_dtype(dtype);
        Tensor::from_data(data, (device, dtype))
    }

    fn at(&mut self, [a, b, c, d]: [usize; 4]) -> &mut f64 {
        let [_, second, third, fourth] = self.shape;
        &mut self.values[((a * second + b) * third + c) * fourth + d]
    }

    fn get(&self, [a, b, c, d]: [usize; 4]) -> f64 {
        let [_, second, third, fourth] = self.shape;
        self.values[((a * second + b) * third + c) * fourth + d]
    }

    fn distance(&self, other: &Self) -> f64 {
        assert_eq!(self.shape, other.shape);
        let pairs = || self.values.iter().zip(&other.values);
        let difference: f64 = pairs().map(|(a, b)| (a - b) * (a - b)).sum();
        let norm: f64 = pairs().map(|(_, b)| b * b).sum();
        (difference / norm.max(f64::MIN_POSITIVE)).sqrt()
    }
}

/// The products of a convolution, of which each is an output, an input and a weight: `visit` is given the row (a position of
/// the batch), and the places in output, input and weight.
fn products(sizes: &Sizes, mut visit: impl FnMut(usize, [usize; 4], [usize; 4], [usize; 4])) {
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
fn row_sizes(sizes: &Sizes, x: &Images, g: &Images) -> Vec<f64> {
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

struct Gradients {
    output: Images,
    input: Images,
    weight: Images,
    bias: Vec<f64>,
}

/// Of which the gradient of the weight is made of the chosen rows, each times its weight.
fn gradients(
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

/// The rows that a layer whose input is a leaf draws in its step `step`.
fn drawn(policy: Policy, sizes: &[f64], k: usize, seed: u64, step: u64) -> Vec<(usize, f64)> {
    let m = sizes.len();
    let seed = layer_seed(seed, 1);
    let words: Vec<_> = (0..m.max(k))
        .map(|row| philox([row as u64, 0, step], seed)[0])
        .collect();
    choose(policy, sizes, &words, &permutation(m, step, seed), k)
}

fn count(k: usize) -> AopConfig {
    AopConfig::new()
        .with_outer_products(OuterProducts::Count(k))
        .with_cost_rule(false)
}

struct Found {
    output: Images,
    input: Images,
    weight: Images,
    bias: Vec<f64>,
}

fn run(layer: &MemAopConv2d, x: Tensor<4>, g: Tensor<4>) -> Found {
    let x = x.require_grad();
    let output = layer.forward(x.clone());
    let grads = (output.clone() * g).sum().backward();
    let bias = layer.bias.as_ref().unwrap().grad(&grads).unwrap();
    Found {
        output: Images::of(output.inner()),
        input: Images::of(x.grad(&grads).unwrap()),
        weight: Images::of(layer.weight.grad(&grads).unwrap()),
        bias: bias.into_data().iter::<f64>().collect(),
    }
}

fn assert_equal(found: &Found, expected: &Gradients, tolerance: f64, context: &str) {
    let distances = [
        found.output.distance(&expected.output),
        found.input.distance(&expected.input),
        found.weight.distance(&expected.weight),
    ];
    assert!(
        distances.iter().all(|distance| *distance < tolerance),
        "{context}: output, input, weight: {distances:?}"
    );
    let scale = expected.bias.iter().fold(1.0, |m: f64, b| m.max(b.abs()));
    for (found, expected) in found.bias.iter().zip(&expected.bias) {
        assert!(
            (found - expected).abs() < 10.0 * tolerance * scale,
            "{context}: bias"
        );
    }
}

const POLICIES: [Policy; 8] = [
    Policy::Systematic,
    Policy::TopK,
    Policy::RandK,
    Policy::WeightedK,
    Policy::ScaledRandK,
    Policy::Bernoulli,
    Policy::ColumnRow,
    Policy::WinnerTakeAll,
];

/// Larger than a tile, and many small images in one.
fn large() -> [Sizes; 3] {
    let sizes = Sizes {
        images: 3,
        channels: [5, 6],
        size: [19, 23],
        kernel: [3, 3],
        stride: [1, 1],
        dilation: [1, 1],
        padding: [1, 1, 1, 1],
        groups: 1,
    };
    [
        Sizes {
            images: 41,
            channels: [4, 6],
            size: [5, 4],
            groups: 2,
            ..sizes.clone()
        },
        Sizes {
            size: [9, 301],
            kernel: [2, 5],
            stride: [2, 1],
            padding: [0, 2, 1, 3],
            ..sizes.clone()
        },
        sizes,
    ]
}

pub fn convolutions_equal_the_oracle(device: &Device) {
    let mut random = Random(71);
    let small = (0..40).map(|_| Sizes::random(&mut Random(random.range(0, 1 << 20) as u64)));
    let small: Vec<_> = small.collect();
    for (index, sizes) in small.into_iter().chain(large()).enumerate() {
        let conv = sizes.conv2d(&mut random, device, DType::F32);
        let (weight, bias) = parameters(&conv);
        let [height, width] = sizes.output();
        let x = [
            sizes.images,
            sizes.channels[0],
            sizes.size[0],
            sizes.size[1],
        ];
        let x = Images::random(&mut random, x);
        let g = [sizes.images, sizes.channels[1], height, width];
        let g = Images::random(&mut random, g);
        let (m, scores) = (sizes.rows(), row_sizes(&sizes, &x, &g));
        let policy = POLICIES[index % POLICIES.len()];
        let several = random.range(1, m);
        for k in [1, several, m.saturating_sub(1).max(1), m] {
            let aop = count(k)
                .with_method(policy.method(Memory::None))
                .with_seed(index as u64);
            let layer = MemAopConv2d::from_conv2d(conv.clone(), aop);
            let chosen = match k < m {
                true => drawn(policy, &scores, k, aop.seed, 0),
                false => (0..m).map(|row| (row, 1.0)).collect(),
            };
            let expected = gradients(&sizes, [&x, &weight, &g], &bias, &chosen);
            let tensors = [&x, &g].map(|images| images.tensor(device, DType::F32));
            let [x, g] = tensors;
            let context = format!("{policy:?} K = {k} {sizes:?}");
            assert_equal(&run(&layer, x, g), &expected, 2e-5, &context);
        }
    }
}

fn parameters(conv: &Conv2d) -> (Images, Vec<f64>) {
    let bias = conv.bias.as_ref().unwrap().val().inner();
    (
        Images::of(conv.weight.val().inner()),
        bias.into_data().iter::<f64>().collect(),
    )
}
