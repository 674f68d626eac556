use burn::{
    config::Config,
    module::{Content, DisplaySettings, Initializer, Module, ModuleDisplay},
    nn::{
        Dropout, LayerNorm,
        activation::ActivationConfig,
        transformer::{
            self, TransformerDecoder, TransformerDecoderAutoregressiveCache,
            TransformerDecoderConfig, TransformerDecoderLayer,
        },
    },
    tensor::{Bool, Device, Tensor},
};

use super::{MemAopMultiHeadAttention, MemAopPositionWiseFeedForward, MhaInput};
use crate::{config::AopConfig, layers::later};

/// The number of linear layers of a block: four of each attention, two of the feed-forward network.
const LAYERS: u64 = 10;

/// Configuration to create a [`MemAopTransformerDecoder`] layer, with the fields of Burn's
/// [`TransformerDecoderConfig`]. To set an [`AopConfig`], use [`with_aop`](crate::with_aop).
#[derive(Config, Debug)]
pub struct MemAopTransformerDecoderConfig {
    /// The size of the model.
    pub d_model: usize,
    /// The size of the position-wise feed-forward network.
    pub d_ff: usize,
    /// The number of attention heads.
    pub n_heads: usize,
    /// The number of layers.
    pub n_layers: usize,
    /// The dropout rate.
    #[config(default = 0.1)]
    pub dropout: f64,
    /// Whether layer norm is applied before the other modules instead of after them.
    #[config(default = false)]
    pub norm_first: bool,
    /// Use "quiet softmax" instead of regular softmax.
    #[config(default = false)]
    pub quiet_softmax: bool,
    /// The type of function used to initialize neural network parameters.
    #[config(
        default = "Initializer::KaimingUniform { gain: 1.0 / 3.0f64.sqrt(), fan_out_only: false }"
    )]
    pub initializer: Initializer,
    /// The activation function used in the position-wise feed-forward network.
    #[config(default = "ActivationConfig::Gelu")]
    pub activation: ActivationConfig,
    /// The epsilon value for layer normalization.
    #[config(default = 1e-5)]
    pub layer_norm_eps: f64,
}

impl MemAopTransformerDecoderConfig {
    /// Creates a [`MemAopTransformerDecoder`] with the parameters that
    /// [`TransformerDecoderConfig::init`] gives from the same random state.
    pub fn init(&self, device: &Device) -> MemAopTransformerDecoder {
        MemAopTransformerDecoder::from_decoder(self.burns().init(device), AopConfig::new())
    }

    /// Burn's own configuration.
    fn burns(&self) -> TransformerDecoderConfig {
        TransformerDecoderConfig {
            d_model: self.d_model,
            d_ff: self.d_ff,
            n_heads: self.n_heads,
            n_layers: self.n_layers,
            dropout: self.dropout,
            norm_first: self.norm_first,
            quiet_softmax: self.quiet_softmax,
            initializer: self.initializer.clone(),
            activation: self.activation.clone(),
            layer_norm_eps: self.layer_norm_eps,
        }
    }
}

/// [`TransformerDecoder`] whose linear layers are [`MemAopLinear`](crate::MemAopLinear).
///
/// Create it with [`MemAopTransformerDecoderConfig`], or from a [`TransformerDecoder`] with
/// [`from_decoder`](Self::from_decoder).
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct MemAopTransformerDecoder {
    /// The transformer decoder layers.
    pub layers: Vec<MemAopTransformerDecoderLayer>,
    /// The size of the model.
    pub d_model: usize,
    /// The size of the position-wise feed-forward network.
    pub d_ff: usize,
    /// The number of attention heads.
    pub n_heads: usize,
    /// The number of layers.
    pub n_layers: usize,
    /// The dropout rate.
    pub dropout: f64,
    /// Whether layer norm is applied before the other modules instead of after them.
    pub norm_first: bool,
    /// Use "quiet softmax" instead of regular softmax.
    pub quiet_softmax: bool,
}

impl ModuleDisplay for MemAopTransformerDecoder {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new()
            .with_new_line_after_attribute(false)
            .optional()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        let content = content
            .add("d_model", &self.d_model)
            .add("d_ff", &self.d_ff)
            .add("n_heads", &self.n_heads)
            .add("n_layers", &self.n_layers)
            .add("dropout", &self.dropout)
            .add("norm_first", &self.norm_first)
            .add("quiet_softmax", &self.quiet_softmax);
        match self.layers.first() {
            None => content,
            Some(layer) => content.add_debug_attribute("aop", &layer.self_attn.query.aop()),
        }
        .optional()
    }
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
    /// Takes the parameters of a [`TransformerDecoder`], with their ids. The memories are empty.
    ///
    /// # Panics
    ///
    /// Panics if [`AopConfig::validate`] rejects `aop`.
    pub fn from_decoder(decoder: TransformerDecoder, aop: AopConfig) -> Self {
        let layers = (0..).zip(decoder.layers).map(|(number, layer)| {
            MemAopTransformerDecoderLayer::from_layer(layer, later(aop, LAYERS * number))
        });
        Self {
            layers: layers.collect(),
            d_model: decoder.d_model,
            d_ff: decoder.d_ff,
            n_heads: decoder.n_heads,
            n_layers: decoder.n_layers,
            dropout: decoder.dropout,
            norm_first: decoder.norm_first,
            quiet_softmax: decoder.quiet_softmax,
        }
    }

    /// Gives the parameters back, with their ids, and drops the memories.
    pub fn into_decoder(self) -> TransformerDecoder {
        self.to_decoder()
    }

    /// Burn's module on the same parameters.
    fn to_decoder(&self) -> TransformerDecoder {
        let layers = self.layers.iter();
        TransformerDecoder {
            layers: layers
                .map(MemAopTransformerDecoderLayer::to_layer)
                .collect(),
            d_model: self.d_model,
            d_ff: self.d_ff,
            n_heads: self.n_heads,
            n_layers: self.n_layers,
            dropout: self.dropout,
            norm_first: self.norm_first,
            quiet_softmax: self.quiet_softmax,
        }
    }

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
            norm_1: layer.norm_1,
            norm_2: layer.norm_2,
            norm_3: layer.norm_3,
            dropout: layer.dropout,
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
            norm_1: self.norm_1.clone(),
            norm_2: self.norm_2.clone(),
            norm_3: self.norm_3.clone(),
            dropout: self.dropout.clone(),
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
