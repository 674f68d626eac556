use burn::{
    module::{Module, ModuleDisplay},
    nn::transformer::{self, TransformerEncoder},
    tensor::{Bool, Tensor},
};
use burn_memaop::transformer::{MemAopTransformerEncoder, TransformerEncoderInput};

/// Burn's transformer encoder or that of burn-memaop.
pub trait Encoder: Module + ModuleDisplay + 'static {
    /// The forward pass.
    ///
    /// # Shapes
    ///
    /// - tokens, output: `[batch, length, width]`
    /// - mask: `[batch, length, length]`, true where a token does not attend to another one
    fn encode(&self, tokens: Tensor<3>, mask: Option<Tensor<3, Bool>>) -> Tensor<3>;
}

macro_rules! encoder {
    ($encoder:ty, $input:ty) => {
        impl Encoder for $encoder {
            fn encode(&self, tokens: Tensor<3>, mask: Option<Tensor<3, Bool>>) -> Tensor<3> {
                let input = <$input>::new(tokens);
                self.forward(match mask {
                    None => input,
                    Some(mask) => input.mask_attn(mask),
                })
            }
        }
    };
}

encoder!(TransformerEncoder, transformer::TransformerEncoderInput);
encoder!(MemAopTransformerEncoder, TransformerEncoderInput);
