// A small vision transformer, written for Burn. The quickstart includes this file twice: with Burn
// under the name `burn`, and with burn-with-memaop under the same name.

use burn::{
    nn::{
        Embedding, EmbeddingConfig, Linear, LinearConfig,
        transformer::{TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput},
    },
    prelude::*,
};

/// Reads an image pixel by pixel: each is a token.
#[derive(Module, Debug)]
pub struct Transformer {
    pixel: Linear,
    position: Embedding,
    encoder: TransformerEncoder,
    class: Linear,
}

impl Transformer {
    pub fn new(size: Size, device: &Device) -> Self {
        let width = size.width;
        Self {
            pixel: LinearConfig::new(1, width).init(device),
            position: EmbeddingConfig::new(PIXELS, width).init(device),
            encoder: TransformerEncoderConfig::new(width, 4 * width, size.heads, size.blocks)
                .with_dropout(0.0)
                .with_norm_first(true)
                .init(device),
            class: LinearConfig::new(width, CLASSES).init(device),
        }
    }
}

impl Classifier for Transformer {
    fn scores(&self, images: Tensor<2>) -> Tensor<2> {
        let positions = Tensor::arange(0..PIXELS as i64, &images.device());
        let positions = self.position.forward(positions.unsqueeze());
        let tokens = self.pixel.forward(images.unsqueeze_dim(2)) + positions;
        let tokens = self.encoder.forward(TransformerEncoderInput::new(tokens));
        self.class.forward(tokens.mean_dim(1).squeeze_dim(1))
    }
}
