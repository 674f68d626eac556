//! A network of convolution blocks with batch normalization, which reads the digits of a pocket
//! calculator's display instead of the handwritten ones of MNIST.

use burn::{
    module::Module,
    nn::{
        BatchNorm, BatchNormConfig, Gelu, Linear, LinearConfig, PaddingConfig2d,
        conv::{Conv2d, Conv2dConfig},
        loss::CrossEntropyLossConfig,
        pool::{MaxPool2d, MaxPool2dConfig},
    },
    optim::{AdamConfig, GradientsParams},
    tensor::{Device, Int, Tensor, TensorData},
};

use super::untrained;

const SEED: u64 = 11;
const DIGITS: usize = 10;
const IMAGES: usize = 3 * DIGITS;
const SIDE: usize = 12;
const STEPS: usize = 20;
const LEARNING_RATE: f64 = 0.01;

/// The lit ones of the seven segments of each digit, one bit each.
const LIT: [u8; DIGITS] = [63, 6, 91, 79, 102, 109, 125, 7, 127, 111];

/// A convolution that keeps the image's size, and a pooling that halves it.
#[derive(Module, Debug)]
struct ConvBlock {
    conv: Conv2d,
    norm: BatchNorm,
    activation: Gelu,
    pool: MaxPool2d,
}

impl ConvBlock {
    fn new(channels: [usize; 2], device: &Device) -> Self {
        Self {
            conv: Conv2dConfig::new(channels, [3, 3])
                .with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1))
                .with_bias(false)
                .init(device),
            norm: BatchNormConfig::new(channels[1])
                .with_momentum(0.3)
                .init(device),
            activation: Gelu::new(),
            pool: MaxPool2dConfig::new([2, 2]).init(),
        }
    }

    fn forward(&self, images: Tensor<4>) -> Tensor<4> {
        let x = self.norm.forward(self.conv.forward(images));
        self.pool.forward(self.activation.forward(x))
    }
}

#[derive(Module, Debug)]
struct Model {
    blocks: Vec<ConvBlock>,
    hidden: Linear,
    activation: Gelu,
    output: Linear,
}

impl Model {
    fn new(device: &Device) -> Self {
        let channels = [[1, 8], [8, 16]];
        Self {
            blocks: channels.map(|ends| ConvBlock::new(ends, device)).into(),
            hidden: LinearConfig::new(16 * (SIDE / 4) * (SIDE / 4), 32).init(device),
            activation: Gelu::new(),
            output: LinearConfig::new(32, DIGITS).init(device),
        }
    }

    /// From images `[count, 1, height, width]` to the scores of their digits `[count, digits]`.
    fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        let blocks = self.blocks.iter();
        let features = blocks.fold(images, |x, block| block.forward(x));
        let x = self.hidden.forward(features.flatten(1, 3));
        self.output.forward(self.activation.forward(x))
    }
}

/// The segments that pass through a pixel of a display of nine rows and five columns.
fn segments(row: usize, column: usize) -> u8 {
    let across = match row {
        0 => 1,
        4 => 64,
        8 => 8,
        _ => 0,
    };
    let (upper, lower) = (u8::from(row <= 4), u8::from(row >= 4));
    let down = match column {
        0 => 32 * upper + 16 * lower,
        4 => 2 * upper + 4 * lower,
        _ => 0,
    };
    across | down
}

/// A digit, further down and to the right by a pixel in each ten images.
fn image(index: usize) -> impl Iterator<Item = f32> {
    let (digit, shift) = (index % DIGITS, index / DIGITS);
    (0..SIDE * SIDE).map(move |pixel| {
        let row = (pixel / SIDE).checked_sub(1 + shift);
        let column = (pixel % SIDE).checked_sub(2 + shift);
        let bright = match (row, column) {
            (Some(row @ 0..9), Some(column @ 0..5)) => segments(row, column) & LIT[digit] != 0,
            _ => false,
        };
        f32::from(u8::from(bright))
    })
}

fn batch(device: &Device) -> (Tensor<4>, Tensor<1, Int>) {
    let pixels: Vec<f32> = (0..IMAGES).flat_map(image).collect();
    let digits: Vec<i64> = (0..IMAGES).map(|index| (index % DIGITS) as i64).collect();
    (
        Tensor::from_data(TensorData::new(pixels, [IMAGES, 1, SIDE, SIDE]), device),
        Tensor::from_data(TensorData::new(digits, [IMAGES]), device),
    )
}

fn train() -> (Model, Vec<f32>) {
    let device = Device::flex().autodiff();
    let (images, digits) = batch(&device);
    let cross_entropy = CrossEntropyLossConfig::new().init(&device);
    let mut model = untrained(SEED, &device, Model::new);
    let mut optimizer = AdamConfig::new().init();
    let mut losses = Vec::with_capacity(STEPS);
    for _ in 0..STEPS {
        let scores = model.forward(images.clone());
        let loss = cross_entropy.forward(scores, digits.clone());
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(LEARNING_RATE, model, gradients);
        losses.push(loss.into_scalar());
    }
    (model, losses)
}

/// The loss of each training step.
pub fn losses() -> Vec<f32> {
    train().1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loss_falls_to_a_third() {
        let losses = losses();
        assert_eq!(losses.len(), STEPS);
        assert!(losses[STEPS - 1] < losses[0] / 3.0, "{losses:?}");
    }

    #[test]
    fn trained_model_reads_the_digits() {
        let (images, digits) = batch(&Device::flex());
        let scores = train().0.valid().forward(images);
        assert_eq!(scores.dims(), [IMAGES, DIGITS]);
        let guesses: Tensor<1, Int> = scores.argmax(1).flatten(0, 1);
        let right: i64 = guesses.equal(digits).int().sum().into_scalar();
        assert!(right >= 26, "{right} of {IMAGES} digits");
    }

    #[test]
    fn record_brings_the_trained_weights_and_statistics_back() {
        let device = Device::flex();
        let (images, _) = batch(&device);
        let trained = train().0.valid();
        let record = trained.clone().into_record();
        let expected = trained.forward(images.clone()).into_data();

        let fresh = untrained(SEED + 1, &device, Model::new).valid();
        let before = fresh.forward(images.clone()).into_data();
        assert_ne!(before, expected);
        let loaded = fresh.load_record(record);
        assert_eq!(loaded.forward(images).into_data(), expected);
    }
}
