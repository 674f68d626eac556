use burn::{
    module::Module,
    nn::{
        Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig,
        attention::generate_autoregressive_mask,
        transformer::{TransformerEncoder, TransformerEncoderConfig},
    },
    tensor::{Device, Int, Tensor},
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
    /// Gives the classes, and so is exact.
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
        // A few hundred steps over one text: there is nothing for dropout to do.
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
