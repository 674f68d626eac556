use burn::{
    module::Module,
    nn::{
        Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig,
        transformer::{TransformerEncoder, TransformerEncoderConfig},
    },
    tensor::{Device, Tensor},
    train::{ClassificationOutput, InferenceStep, TrainOutput, TrainStep},
};
use burn_memaop::{AopConfig, AopObserver, transformer::MemAopTransformerEncoder};
use memaop_examples::{Encoder, mnist::SIDE};
use memaop_mnist::{MnistBatch, Observed, classified};

/// Pixels along each side of a patch.
const PATCH: usize = 4;
/// Patches along each side of an image.
const GRID: usize = SIDE / PATCH;
/// The number of tokens of an image.
pub const TOKENS: usize = GRID * GRID;

/// A vision transformer: patches are tokens of an encoder, whose mean output is classified.
#[derive(Module, Debug)]
pub struct Vit<E: Encoder> {
    patches: Linear,
    positions: Embedding,
    encoder: E,
    norm: LayerNorm,
    output: Linear,
    #[module(skip)]
    observer: Option<AopObserver>,
}

#[derive(Debug, Clone, Copy)]
pub struct Size {
    pub width: usize,
    pub heads: usize,
    pub blocks: usize,
    pub dropout: f64,
}

impl Vit<TransformerEncoder> {
    pub fn new(size: Size, device: &Device) -> Self {
        let Size { width, .. } = size;
        let encoder = TransformerEncoderConfig::new(width, 4 * width, size.heads, size.blocks)
            .with_norm_first(true)
            .with_dropout(size.dropout);
        Self {
            patches: LinearConfig::new(PATCH * PATCH, width).init(device),
            positions: EmbeddingConfig::new(TOKENS, width).init(device),
            encoder: encoder.init(device),
            norm: LayerNormConfig::new(width).init(device),
            output: LinearConfig::new(width, 10).init(device),
            observer: None,
        }
    }

    /// The same weights, with approximate gradients and an observer.
    pub fn with_memaop(self, aop: AopConfig) -> Vit<MemAopTransformerEncoder> {
        Vit {
            patches: self.patches,
            positions: self.positions,
            encoder: MemAopTransformerEncoder::from_encoder(self.encoder, aop),
            norm: self.norm,
            output: self.output,
            observer: Some(AopObserver::new()),
        }
    }
}

impl<E: Encoder> Vit<E> {
    /// Logits, shape `[batch, 10]`, of images, shape `[batch, 784]`.
    pub fn forward(&self, images: Tensor<2>) -> Tensor<2> {
        let device = images.device();
        let positions = Tensor::arange(0..TOKENS as i64, &device).unsqueeze();
        let tokens = self.patches.forward(patches(images)) + self.positions.forward(positions);
        let tokens = self.norm.forward(self.encoder.encode(tokens, None));
        self.output.forward(tokens.mean_dim(1).squeeze_dim(1))
    }
}

/// The patches of images, row by row, shape `[batch, 49, 16]`; images have shape `[batch, 784]`.
fn patches(images: Tensor<2>) -> Tensor<3> {
    let [batch, _] = images.dims();
    images
        .reshape([batch, GRID, PATCH, GRID, PATCH])
        .swap_dims(2, 3)
        .reshape([batch, TOKENS, PATCH * PATCH])
}

impl<E: Encoder> TrainStep for Vit<E> {
    type Input = MnistBatch;
    type Output = Observed;

    fn step(&self, batch: MnistBatch) -> TrainOutput<Observed> {
        let output = classified(self.forward(batch.images), batch.labels);
        let grads = output.loss.backward();
        let aop = self.observer.map(|observer| observer.observe(self));
        let aop = aop.unwrap_or_default();
        TrainOutput::new(self, grads, Observed { output, aop })
    }
}

impl<E: Encoder> InferenceStep for Vit<E> {
    type Input = MnistBatch;
    type Output = ClassificationOutput;

    fn step(&self, batch: MnistBatch) -> ClassificationOutput {
        classified(self.forward(batch.images), batch.labels)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Int;

    #[test]
    fn patches_are_squares_of_the_image() {
        let device = Device::flex();
        let pixels = Tensor::<1, Int>::arange(0..2 * 784, &device).float();
        let patches = patches(pixels.reshape([2, 784]));
        let patch = patches.slice([1..2, 8..9, 0..16]).into_data();
        // The second patch of the second row of patches of the second image.
        let expected: Vec<f32> = (0..16)
            .map(|i| (784 + (4 + i / 4) * 28 + 4 + i % 4) as f32)
            .collect();
        assert_eq!(patch.try_to_vec::<f32>().unwrap(), expected);
    }

    #[test]
    fn the_counterpart_gives_the_same_logits() {
        let device = Device::flex();
        let size = Size {
            width: 16,
            heads: 2,
            blocks: 1,
            dropout: 0.0,
        };
        let exact = Vit::new(size, &device);
        let memaop = exact.clone().with_memaop(AopConfig::new());
        let images = Tensor::<1, Int>::arange(0..3 * 784, &device).float() / 2352.0;
        let images = images.reshape([3, 784]);
        let difference = exact.forward(images.clone()) - memaop.forward(images);
        assert!(difference.abs().max().into_scalar::<f32>() < 1e-5);
    }
}
