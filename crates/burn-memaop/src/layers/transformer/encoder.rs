use burn::{
    config::Config,
    module::{Content, DisplaySettings, Initializer, Module, ModuleDisplay},
    nn::{
        Dropout, LayerNorm,
        activation::ActivationConfig,
        transformer::{
            self, TransformerEncoder, TransformerEncoderAutoregressiveCache,
            TransformerEncoderConfig, TransformerEncoderLayer,
            TransformerEncoderLayerAutoregressiveCache,
        },
    },
    tensor::{Bool, Device, Tensor},
};

use super::{MemAopMultiHeadAttention, MemAopPositionWiseFeedForward, MhaInput};
use crate::{config::AopConfig, layers::later};

/// The number of linear layers of a block: four of the attention, two of the feed-forward network.
const LAYERS: u64 = 6;

/// Configuration to create a [`MemAopTransformerEncoder`] layer, with the fields of Burn's
/// [`TransformerEncoderConfig`]. To set an [`AopConfig`], use [`with_aop`](crate::with_aop).
#[derive(Config, Debug)]
pub struct MemAopTransformerEncoderConfig {
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

impl MemAopTransformerEncoderConfig {
    /// Creates a [`MemAopTransformerEncoder`] with the parameters that
    /// [`TransformerEncoderConfig::init`] gives from the same random state.
    pub fn init(&self, device: &Device) -> MemAopTransformerEncoder {
        MemAopTransformerEncoder::from_encoder(self.burns().init(device), AopConfig::new())
    }

    /// Burn's own configuration.
    fn burns(&self) -> TransformerEncoderConfig {
        TransformerEncoderConfig {
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

/// [`TransformerEncoder`] whose linear layers are [`MemAopLinear`](crate::MemAopLinear).
///
/// Create it with [`MemAopTransformerEncoderConfig`], or from a [`TransformerEncoder`] with
/// [`from_encoder`](Self::from_encoder).
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct MemAopTransformerEncoder {
    /// The transformer encoder layers.
    pub layers: Vec<MemAopTransformerEncoderLayer>,
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

impl ModuleDisplay for MemAopTransformerEncoder {
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
            Some(layer) => content.add_debug_attribute("aop", &layer.mha.query.aop()),
        }
        .optional()
    }
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
    /// Takes the parameters of a [`TransformerEncoder`], with their ids. The memories are empty.
    ///
    /// # Panics
    ///
    /// Panics if [`AopConfig::validate`] rejects `aop`.
    pub fn from_encoder(encoder: TransformerEncoder, aop: AopConfig) -> Self {
        let layers = (0..).zip(encoder.layers).map(|(number, layer)| {
            MemAopTransformerEncoderLayer::from_layer(layer, later(aop, LAYERS * number))
        });
        Self {
            layers: layers.collect(),
            d_model: encoder.d_model,
            d_ff: encoder.d_ff,
            n_heads: encoder.n_heads,
            n_layers: encoder.n_layers,
            dropout: encoder.dropout,
            norm_first: encoder.norm_first,
            quiet_softmax: encoder.quiet_softmax,
        }
    }

    /// Gives the parameters back, with their ids, and drops the memories.
    pub fn into_encoder(self) -> TransformerEncoder {
        self.to_encoder()
    }

    /// Burn's module on the same parameters.
    fn to_encoder(&self) -> TransformerEncoder {
        let layers = self.layers.iter();
        TransformerEncoder {
            layers: layers
                .map(MemAopTransformerEncoderLayer::to_layer)
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
            norm_1: layer.norm_1,
            norm_2: layer.norm_2,
            dropout: layer.dropout,
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
            norm_1: self.norm_1.clone(),
            norm_2: self.norm_2.clone(),
            dropout: self.dropout.clone(),
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
