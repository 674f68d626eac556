use burn::{
    config::Config,
    module::{Content, DisplaySettings, Initializer, Module, ModuleDisplay},
    nn::{
        activation::ActivationConfig,
        transformer::{
            self, TransformerDecoder, TransformerDecoderAutoregressiveCache,
            TransformerDecoderConfig, TransformerDecoderLayer,
        },
    },
    tensor::{Bool, Device, Tensor},
};

use super::{MemAopMultiHeadAttention, MemAopPositionWiseFeedForward, MhaInput, stack::stack};
use crate::{
    config::AopConfig,
    layers::{dropout::Dropout, later, norm::LayerNorm},
};

// Four linear layers of each attention, and two of the feed-forward network.
stack! {
    MemAopTransformerDecoder of MemAopTransformerDecoderLayer with MemAopTransformerDecoderConfig,
    from TransformerDecoder with TransformerDecoderConfig,
    by from_decoder, into_decoder, to_decoder,
    10 linear layers, first self_attn
}

/// Input of [`MemAopTransformerDecoder`], made like Burn's
/// [`TransformerDecoderInput`](burn::nn::transformer::TransformerDecoderInput).
#[derive(Debug, Clone)]
pub struct TransformerDecoderInput {
    target: Tensor<3>,
    target_mask_pad: Option<Tensor<2, Bool>>,
    target_mask_attn: Option<Tensor<3, Bool>>,
    memory: Tensor<3>,
    memory_mask_pad: Option<Tensor<2, Bool>>,
    memory_mask_attn: Option<Tensor<3, Bool>>,
}

impl TransformerDecoderInput {
    /// Makes an input of the tokens to decode, shape `[batch_size, seq_length_1, d_model]`, and of
    /// the encoded tokens, shape `[batch_size, seq_length_2, d_model]`.
    pub fn new(target: Tensor<3>, memory: Tensor<3>) -> Self {
        Self {
            target,
            target_mask_pad: None,
            target_mask_attn: None,
            memory,
            memory_mask_pad: None,
            memory_mask_attn: None,
        }
    }

    /// Sets a mask, shape `[batch_size, seq_length_2]`, that is true at encoded tokens which no
    /// token attends to.
    pub fn memory_mask_pad(mut self, mask_pad: Tensor<2, Bool>) -> Self {
        self.memory_mask_pad = Some(mask_pad);
        self
    }

    /// Sets a mask that is true at pairs of a token and an encoded one that it does not attend to,
    /// shape `[batch_size, seq_length_1, seq_length_2]`.
    pub fn memory_mask_attn(mut self, mask_attn: Tensor<3, Bool>) -> Self {
        self.memory_mask_attn = Some(mask_attn);
        self
    }

    /// Sets a mask, shape `[batch_size, seq_length_1]`, that is true at tokens which no other
    /// attends to.
    pub fn target_mask_pad(mut self, mask_pad: Tensor<2, Bool>) -> Self {
        self.target_mask_pad = Some(mask_pad);
        self
    }

    /// Sets a mask that is true at pairs of a token and another that it does not attend to, shape
    /// `[batch_size, seq_length_1, seq_length_1]`.
    pub fn target_mask_attn(mut self, mask_attn: Tensor<3, Bool>) -> Self {
        self.target_mask_attn = Some(mask_attn);
        self
    }
}

impl From<TransformerDecoderInput> for transformer::TransformerDecoderInput {
    fn from(input: TransformerDecoderInput) -> Self {
        let mut burns = Self::new(input.target, input.memory);
        if let Some(mask) = input.target_mask_pad {
            burns = burns.target_mask_pad(mask);
        }
        if let Some(mask) = input.target_mask_attn {
            burns = burns.target_mask_attn(mask);
        }
        if let Some(mask) = input.memory_mask_pad {
            burns = burns.memory_mask_pad(mask);
        }
        if let Some(mask) = input.memory_mask_attn {
            burns = burns.memory_mask_attn(mask);
        }
        burns
    }
}

impl MemAopTransformerDecoder {
    /// Applies the forward pass.
    ///
    /// # Shapes
    ///
    /// - target: `[batch_size, seq_length_1, d_model]`
    /// - memory: `[batch_size, seq_length_2, d_model]`
    /// - output: `[batch_size, seq_length_1, d_model]`
    ///
    /// # Panics
    ///
    /// As [`MemAopMultiHeadAttention::forward`].
    pub fn forward(&self, input: TransformerDecoderInput) -> Tensor<3> {
        let decode = |input, layer: &MemAopTransformerDecoderLayer| layer.forward(input);
        self.layers.iter().fold(input, decode).target
    }

    /// Infers token by token, by [`TransformerDecoder::forward_autoregressive_inference`] on the
    /// same parameters. A backward pass through it is exact.
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward).
    pub fn forward_autoregressive_inference(
        &self,
        input: TransformerDecoderInput,
        cache: &mut TransformerDecoderAutoregressiveCache,
    ) -> Tensor<3> {
        self.to_decoder()
            .forward_autoregressive_inference(input.into(), cache)
    }

    /// Creates an empty autoregressive cache.
    pub fn new_autoregressive_cache(&self) -> TransformerDecoderAutoregressiveCache {
        self.to_decoder().new_autoregressive_cache()
    }
}

/// [`TransformerDecoderLayer`] whose linear layers are [`MemAopLinear`](crate::MemAopLinear).
#[derive(Module, Debug)]
pub struct MemAopTransformerDecoderLayer {
    /// Cross-attention sub-layer.
    pub cross_attn: MemAopMultiHeadAttention,
    /// Self-attention sub-layer.
    pub self_attn: MemAopMultiHeadAttention,
    /// Position-wise feed-forward sub-layer.
    pub pwff: MemAopPositionWiseFeedForward,
    /// The norm before the cross-attention (pre-norm) or after the self-attention (post-norm).
    pub norm_1: LayerNorm,
    /// The norm before the feed-forward sub-layer (pre-norm) or after the cross-attention.
    pub norm_2: LayerNorm,
    /// The norm before the self-attention (pre-norm) or after the feed-forward sub-layer.
    pub norm_3: LayerNorm,
    /// Dropout of the outputs of all sub-layers.
    pub dropout: Dropout,
    /// Whether layer normalization is before the sub-layers (pre-norm) or after them (post-norm).
    pub norm_first: bool,
}

impl MemAopTransformerDecoderLayer {
    /// Creates a transformer decoder layer from a configuration.
    pub fn new(config: &MemAopTransformerDecoderConfig, device: &Device) -> Self {
        let layer = TransformerDecoderLayer::new(&config.burns(), device);
        Self::from_layer(layer, AopConfig::new())
    }

    /// Takes the parameters of a [`TransformerDecoderLayer`], with their ids. Memories are empty.
    ///
    /// # Panics
    ///
    /// Panics if [`AopConfig::validate`] rejects `aop`.
    pub fn from_layer(layer: TransformerDecoderLayer, aop: AopConfig) -> Self {
        Self {
            cross_attn: MemAopMultiHeadAttention::from_mha(layer.cross_attn, aop),
            self_attn: MemAopMultiHeadAttention::from_mha(layer.self_attn, later(aop, 4)),
            pwff: MemAopPositionWiseFeedForward::from_pwff(layer.pwff, later(aop, 8)),
            norm_1: LayerNorm::from_layer_norm(layer.norm_1),
            norm_2: LayerNorm::from_layer_norm(layer.norm_2),
            norm_3: LayerNorm::from_layer_norm(layer.norm_3),
            dropout: Dropout::from_dropout(layer.dropout, aop),
            norm_first: layer.norm_first,
        }
    }

    /// Gives the parameters back, with their ids, and drops the memories.
    pub fn into_layer(self) -> TransformerDecoderLayer {
        self.to_layer()
    }

    /// Burn's module on the same parameters.
    fn to_layer(&self) -> TransformerDecoderLayer {
        TransformerDecoderLayer {
            cross_attn: self.cross_attn.to_mha(),
            self_attn: self.self_attn.to_mha(),
            pwff: self.pwff.to_pwff(),
            norm_1: self.norm_1.to_layer_norm(),
            norm_2: self.norm_2.to_layer_norm(),
            norm_3: self.norm_3.to_layer_norm(),
            dropout: self.dropout.to_dropout(),
            norm_first: self.norm_first,
        }
    }

    /// Applies the forward pass, and puts the decoded tokens in the place of the target.
    ///
    /// # Shapes
    ///
    /// As [`MemAopTransformerDecoder::forward`].
    ///
    /// # Panics
    ///
    /// As [`MemAopMultiHeadAttention::forward`].
    pub fn forward(&self, mut input: TransformerDecoderInput) -> TransformerDecoderInput {
        let attend = |tokens| {
            let mut attended = MhaInput::self_attn(tokens);
            attended.mask_pad = input.target_mask_pad.clone();
            attended.mask_attn = input.target_mask_attn.clone();
            self.dropout
                .forward(self.self_attn.forward_context(attended))
        };
        let attend_to_memory = |tokens| {
            let mut attended = MhaInput::cross_attn(tokens, input.memory.clone());
            attended.mask_pad = input.memory_mask_pad.clone();
            attended.mask_attn = input.memory_mask_attn.clone();
            self.dropout
                .forward(self.cross_attn.forward_context(attended))
        };
        let feed = |tokens| self.dropout.forward(self.pwff.forward(tokens));

        // As in Burn, the third norm belongs to both ends of the block.
        let tokens = input.target;
        input.target = match self.norm_first {
            true => {
                let tokens = tokens.clone() + attend(self.norm_3.forward(tokens));
                let tokens = tokens.clone() + attend_to_memory(self.norm_1.forward(tokens));
                tokens.clone() + feed(self.norm_2.forward(tokens))
            }
            false => {
                let tokens = self.norm_1.forward(tokens.clone() + attend(tokens));
                let tokens = tokens.clone() + attend_to_memory(tokens);
                let tokens = self.norm_2.forward(tokens);
                self.norm_3.forward(tokens.clone() + feed(tokens))
            }
        };
        input
    }
}
