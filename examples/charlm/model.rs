use burn::{
    module::{Module, ModuleDisplay},
    nn::{
        Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig,
        attention::generate_autoregressive_mask,
        transformer::{TransformerEncoder, TransformerEncoderConfig},
    },
    tensor::{Bool, Device, Distribution, Int, Tensor},
};
use burn_memaop::{AopConfig, transformer::MemAopTransformerEncoder};
use memaop_examples::Encoder;

/// Predicts the next character from those before it.
#[derive(Module, Debug)]
pub struct CharLm<E: Encoder> {
    characters: Embedding,
    positions: Embedding,
    encoder: E,
    norm: LayerNorm,
    /// The last layer, which is exact.
    output: Linear,
}

#[derive(Debug, Clone, Copy)]
pub struct Size {
    pub vocabulary: usize,
    pub length: usize,
    pub width: usize,
    pub heads: usize,
    pub blocks: usize,
}

impl CharLm<TransformerEncoder> {
    pub fn new(size: Size, device: &Device) -> Self {
        let Size { width, .. } = size;
        // A model that takes a few hundred steps over one text needs no dropout.
        let encoder = TransformerEncoderConfig::new(width, 4 * width, size.heads, size.blocks)
            .with_norm_first(true)
            .with_dropout(0.0);
        Self {
            characters: EmbeddingConfig::new(size.vocabulary, width).init(device),
            positions: EmbeddingConfig::new(size.length, width).init(device),
            encoder: encoder.init(device),
            norm: LayerNormConfig::new(width).init(device),
            output: LinearConfig::new(width, size.vocabulary).init(device),
        }
    }

    pub fn with_memaop(self, aop: AopConfig) -> CharLm<MemAopTransformerEncoder> {
        CharLm {
            characters: self.characters,
            positions: self.positions,
            encoder: MemAopTransformerEncoder::from_encoder(self.encoder, aop),
            norm: self.norm,
            output: self.output,
        }
    }
}

impl CharLm<MemAopTransformerEncoder> {
    /// Passes only the gradients of a share of the sequences from block to block.
    pub fn with_sequences(self, share: f64) -> CharLm<SampledEncoder> {
        CharLm {
            characters: self.characters,
            positions: self.positions,
            encoder: SampledEncoder {
                encoder: self.encoder,
                share,
            },
            norm: self.norm,
            output: self.output,
        }
    }
}

/// An encoder that passes the gradient of a sequence between blocks with a probability, divided by
/// it. Sequences are sampled whole, because their tokens depend on each other.
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct SampledEncoder {
    encoder: MemAopTransformerEncoder,
    share: f64,
}

impl ModuleDisplay for SampledEncoder {}

impl Encoder for SampledEncoder {
    fn encode(&self, tokens: Tensor<3>, mask: Option<Tensor<3, Bool>>) -> Tensor<3> {
        let blocks = self.encoder.layers.iter().enumerate();
        blocks.fold(tokens, |tokens, (number, block)| {
            let tokens = match number {
                0 => tokens,
                _ => sampled(tokens, self.share),
            };
            block.forward(tokens, None, mask.clone())
        })
    }
}

/// The same tokens, with a gradient for a share of the sequences, divided by it, and else zeros.
fn sampled(tokens: Tensor<3>, share: f64) -> Tensor<3> {
    if share >= 1.0 || !tokens.is_tracked() {
        return tokens;
    }
    let [batch, ..] = tokens.dims();
    let device = tokens.device().inner();
    let drawn = Tensor::<3>::random([batch, 1, 1], Distribution::Uniform(0.0, 1.0), &device);
    let weights = drawn.lower_elem(share).float() / share;
    let weights = Tensor::from_inner(weights).to_device(&tokens.device());
    let values = tokens.clone().detach();
    values.clone() + (tokens - values) * weights
}

impl<E: Encoder> CharLm<E> {
    /// The logits of the next characters.
    ///
    /// # Shapes
    ///
    /// - tokens: `[batch, length]`
    /// - output: `[batch * length, vocabulary]`
    pub fn forward(&self, tokens: Tensor<2, Int>) -> Tensor<2> {
        let [batch, length] = tokens.dims();
        let device = tokens.device();
        let positions = Tensor::arange(0..length as i64, &device).unsqueeze();
        let hidden = self.characters.forward(tokens) + self.positions.forward(positions);
        let mask = generate_autoregressive_mask(batch, length, &device);
        let hidden = self.norm.forward(self.encoder.encode(hidden, Some(mask)));
        self.output.forward(hidden).flatten(0, 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sampled_sequences_keep_their_values_and_the_mean_of_their_gradients() {
        let device = Device::flex();
        device.seed(5);
        let tokens = Tensor::<3>::random([8, 3, 4], Distribution::Default, &device);
        let autodiff = device.clone().autodiff();
        let draws = 400;
        let mut sum = Tensor::<3>::zeros([8, 3, 4], &device);
        for _ in 0..draws {
            let input = Tensor::from_inner(tokens.clone())
                .to_device(&autodiff)
                .require_grad();
            let output = sampled(input.clone(), 0.25);
            output
                .clone()
                .inner()
                .into_data()
                .assert_eq(&tokens.clone().into_data(), true);
            let gradient = input.grad(&output.sum().backward()).unwrap();
            let values: Vec<f32> = gradient.clone().into_data().iter().collect();
            for sequence in values.chunks(12) {
                assert!(
                    sequence.iter().all(|&v| v == sequence[0]) && [0.0, 4.0].contains(&sequence[0])
                );
            }
            sum = sum + gradient;
        }
        // There are eight means, each with a standard error of sqrt(3 / 400).
        let distance = (sum / draws as f32 - 1.0).abs().max().into_scalar::<f32>();
        assert!(distance < 4.5 * (3.0 / draws as f32).sqrt(), "{distance}");
    }
}
