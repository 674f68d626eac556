use burn::{
    config::Config,
    module::{Content, DisplaySettings, Initializer, Module, ModuleDisplay},
    nn::{
        activation::ActivationConfig,
        transformer::{
            self, TransformerEncoder, TransformerEncoderAutoregressiveCache,
            TransformerEncoderConfig, TransformerEncoderLayer,
            TransformerEncoderLayerAutoregressiveCache,
        },
    },
    tensor::{Bool, Device, Tensor},
};

use super::{MemAopMultiHeadAttention, MemAopPositionWiseFeedForward, MhaInput, stack::stack};
use crate::{
    config::AopConfig,
    layers::{dropout::Dropout, later, norm::LayerNorm},
};

// Four linear layers of the attention, and two of the feed-forward network.
stack! {
    MemAopTransformerEncoder of MemAopTransformerEncoderLayer with MemAopTransformerEncoderConfig,
    from TransformerEncoder with TransformerEncoderConfig,
    by from_encoder, into_encoder, to_encoder,
    6 linear layers, first mha
}

/// Input of [`MemAopTransformerEncoder`], made like Burn's
/// [`TransformerEncoderInput`](burn::nn::transformer::TransformerEncoderInput).
#[derive(Debug, Clone)]
pub struct TransformerEncoderInput {
    tensor: Tensor<3>,
    mask_pad: Option<Tensor<2, Bool>>,
    mask_attn: Option<Tensor<3, Bool>>,
}

impl TransformerEncoderInput {
    /// Makes an input of tokens, shape `[batch_size, seq_length, d_model]`.
    pub fn new(tensor: Tensor<3>) -> Self {
        Self {
            tensor,
            mask_pad: None,
            mask_attn: None,
        }
    }

    /// Sets a mask, shape `[batch_size, seq_length]`, that is true at tokens which no other attends
    /// to.
    pub fn mask_pad(mut self, mask_pad: Tensor<2, Bool>) -> Self {
        self.mask_pad = Some(mask_pad);
        self
    }

    /// Sets a mask that is true at pairs of a token and another that it does not attend to, shape
    /// `[batch_size, seq_length, seq_length]`.
    pub fn mask_attn(mut self, mask_attn: Tensor<3, Bool>) -> Self {
        self.mask_attn = Some(mask_attn);
        self
    }
}

impl From<TransformerEncoderInput> for transformer::TransformerEncoderInput {
    fn from(input: TransformerEncoderInput) -> Self {
        let mut burns = Self::new(input.tensor);
        if let Some(mask) = input.mask_pad {
            burns = burns.mask_pad(mask);
        }
        if let Some(mask) = input.mask_attn {
            burns = burns.mask_attn(mask);
        }
        burns
    }
}

impl MemAopTransformerEncoder {
    /// Applies the forward pass on the input tensor.
    ///
    /// # Shapes
    ///
    /// - tensor: `[batch_size, seq_length, d_model]`
    /// - output: `[batch_size, seq_length, d_model]`
    ///
    /// # Panics
    ///
    /// As [`MemAopMultiHeadAttention::forward`].
    pub fn forward(&self, input: TransformerEncoderInput) -> Tensor<3> {
        self.layers.iter().fold(input.tensor, |tokens, layer| {
            layer.forward(tokens, input.mask_pad.clone(), input.mask_attn.clone())
        })
    }

    /// Infers token by token, by [`TransformerEncoder::forward_autoregressive_inference`] on the
    /// same parameters. A backward pass through it is exact.
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward).
    pub fn forward_autoregressive_inference(
        &self,
        input: TransformerEncoderInput,
        cache: &mut TransformerEncoderAutoregressiveCache,
    ) -> Tensor<3> {
        self.to_encoder()
            .forward_autoregressive_inference(input.into(), cache)
    }

    /// Creates an empty autoregressive cache.
    pub fn new_autoregressive_cache(&self) -> TransformerEncoderAutoregressiveCache {
        self.to_encoder().new_autoregressive_cache()
    }
}

/// [`TransformerEncoderLayer`] whose linear layers are [`MemAopLinear`](crate::MemAopLinear).
#[derive(Module, Debug)]
pub struct MemAopTransformerEncoderLayer {
    /// Multi-head self-attention sub-layer.
    pub mha: MemAopMultiHeadAttention,
    /// Position-wise feed-forward sub-layer.
    pub pwff: MemAopPositionWiseFeedForward,
    /// The norm before the feed-forward sub-layer (pre-norm) or after the attention (post-norm).
    pub norm_1: LayerNorm,
    /// The norm before the attention (pre-norm) or after the feed-forward sub-layer (post-norm).
    pub norm_2: LayerNorm,
    /// Dropout of the outputs of both sub-layers.
    pub dropout: Dropout,
    /// Whether layer normalization is before the sub-layers (pre-norm) or after them (post-norm).
    pub norm_first: bool,
}

impl MemAopTransformerEncoderLayer {
    /// Creates a transformer encoder layer from a configuration.
    pub fn new(config: &MemAopTransformerEncoderConfig, device: &Device) -> Self {
        let layer = TransformerEncoderLayer::new(&config.burns(), device);
        Self::from_layer(layer, AopConfig::new())
    }

    /// Takes the parameters of a [`TransformerEncoderLayer`], with their ids. Memories are empty.
    ///
    /// # Panics
    ///
    /// Panics if [`AopConfig::validate`] rejects `aop`.
    pub fn from_layer(layer: TransformerEncoderLayer, aop: AopConfig) -> Self {
        Self {
            mha: MemAopMultiHeadAttention::from_mha(layer.mha, aop),
            pwff: MemAopPositionWiseFeedForward::from_pwff(layer.pwff, later(aop, 4)),
            norm_1: LayerNorm::from_layer_norm(layer.norm_1),
            norm_2: LayerNorm::from_layer_norm(layer.norm_2),
            dropout: Dropout::from_dropout(layer.dropout, aop),
            norm_first: layer.norm_first,
        }
    }

    /// Gives the parameters back, with their ids, and drops the memories.
    pub fn into_layer(self) -> TransformerEncoderLayer {
        self.to_layer()
    }

    /// Burn's module on the same parameters.
    fn to_layer(&self) -> TransformerEncoderLayer {
        TransformerEncoderLayer {
            mha: self.mha.to_mha(),
            pwff: self.pwff.to_pwff(),
            norm_1: self.norm_1.to_layer_norm(),
            norm_2: self.norm_2.to_layer_norm(),
            dropout: self.dropout.to_dropout(),
            norm_first: self.norm_first,
        }
    }

    /// Applies the forward pass on the input tensor.
    ///
    /// # Shapes
    ///
    /// - input: `[batch_size, seq_length, d_model]`
    /// - output: `[batch_size, seq_length, d_model]`
    ///
    /// # Panics
    ///
    /// As [`MemAopMultiHeadAttention::forward`].
    pub fn forward(
        &self,
        input: Tensor<3>,
        mask_pad: Option<Tensor<2, Bool>>,
        mask_attn: Option<Tensor<3, Bool>>,
    ) -> Tensor<3> {
        let attend = |tokens| {
            let mut input = MhaInput::self_attn(tokens);
            input.mask_pad = mask_pad;
            input.mask_attn = mask_attn;
            self.dropout.forward(self.mha.forward_context(input))
        };
        let feed = |tokens| self.dropout.forward(self.pwff.forward(tokens));

        // As in Burn, the norm before the attention is the second one, the norm after it the first.
        match self.norm_first {
            true => {
                let tokens = input.clone() + attend(self.norm_2.forward(input));
                tokens.clone() + feed(self.norm_1.forward(tokens))
            }
            false => {
                let tokens = self.norm_1.forward(input.clone() + attend(input));
                self.norm_2.forward(tokens.clone() + feed(tokens))
            }
        }
    }

    /// Infers token by token, by [`TransformerEncoderLayer::forward_autoregressive_inference`] on
    /// the same parameters. A backward pass through it is exact.
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward).
    pub fn forward_autoregressive_inference(
        &self,
        input: Tensor<3>,
        mask_pad: Option<Tensor<2, Bool>>,
        mask_attn: Option<Tensor<3, Bool>>,
        cache: &mut TransformerEncoderLayerAutoregressiveCache,
    ) -> Tensor<3> {
        self.to_layer()
            .forward_autoregressive_inference(input, mask_pad, mask_attn, cache)
    }
}
