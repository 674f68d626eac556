use burn::{
    config::Config,
    module::{Content, DisplaySettings, Initializer, Module, ModuleDisplay},
    nn::{
        Gelu,
        activation::{Activation, ActivationConfig},
        transformer::{PositionWiseFeedForward, PositionWiseFeedForwardConfig},
    },
    tensor::{Device, Tensor, assert_shape},
};

use crate::{
    config::{AopConfig, StoredInput},
    layers::{
        activation::{exact_gelu, packed_gelu, relu},
        dropout::Dropout,
        later,
        linear::MemAopLinear,
    },
};

/// Configuration to create a [`MemAopPositionWiseFeedForward`] layer, with the fields of Burn's
/// [`PositionWiseFeedForwardConfig`]. To set an [`AopConfig`], use [`with_aop`](crate::with_aop).
#[derive(Config, Debug)]
pub struct MemAopPositionWiseFeedForwardConfig {
    /// The size of the input and output features.
    pub d_model: usize,
    /// The size of the hidden inner features.
    pub d_ff: usize,
    /// The dropout rate.
    #[config(default = 0.1)]
    pub dropout: f64,
    /// The type of function used to initialize neural network parameters.
    #[config(
        default = "Initializer::KaimingUniform { gain: 1.0 / 3.0f64.sqrt(), fan_out_only: false }"
    )]
    pub initializer: Initializer,
    /// The activation function used between the two linear layers.
    #[config(default = "ActivationConfig::Gelu")]
    pub activation: ActivationConfig,
}

impl MemAopPositionWiseFeedForwardConfig {
    /// Creates a [`MemAopPositionWiseFeedForward`] with the parameters that
    /// [`PositionWiseFeedForwardConfig::init`] gives from the same random state.
    pub fn init(&self, device: &Device) -> MemAopPositionWiseFeedForward {
        let pwff = PositionWiseFeedForwardConfig {
            d_model: self.d_model,
            d_ff: self.d_ff,
            dropout: self.dropout,
            initializer: self.initializer.clone(),
            activation: self.activation.clone(),
        };
        MemAopPositionWiseFeedForward::from_pwff(pwff.init(device), AopConfig::new())
    }
}

/// [`PositionWiseFeedForward`] whose two linear layers are [`MemAopLinear`].
///
/// Create it with [`MemAopPositionWiseFeedForwardConfig`], or from a [`PositionWiseFeedForward`]
/// with [`from_pwff`](Self::from_pwff). As in Burn, the parameters of an activation that has some
/// (`SwiGlu`) are not part of the record.
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct MemAopPositionWiseFeedForward {
    /// Linear layer with `d_model` input features and `d_ff` output features.
    pub linear_inner: MemAopLinear,
    /// Linear layer with `d_ff` input features and `d_model` output features.
    pub linear_outer: MemAopLinear,
    /// Dropout layer.
    pub dropout: Dropout,
    /// Activation function.
    #[module(skip)]
    pub activation: Activation,
}

impl ModuleDisplay for MemAopPositionWiseFeedForward {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new()
            .with_new_line_after_attribute(false)
            .optional()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        let [d_model, d_ff] = self.linear_inner.weight.shape().dims();
        content
            .add("d_model", &d_model)
            .add("d_ff", &d_ff)
            .add("prob", &self.dropout.prob)
            .add_debug_attribute("aop", &self.linear_inner.aop())
            .optional()
    }
}

impl MemAopPositionWiseFeedForward {
    /// Takes the parameters of a [`PositionWiseFeedForward`], with their ids. Memories are empty.
    ///
    /// # Panics
    ///
    /// Panics if [`AopConfig::validate`] rejects `aop`.
    pub fn from_pwff(pwff: PositionWiseFeedForward, aop: AopConfig) -> Self {
        Self {
            linear_inner: MemAopLinear::from_linear(pwff.linear_inner, aop),
            linear_outer: MemAopLinear::from_linear(pwff.linear_outer, later(aop, 1)),
            dropout: Dropout::from_dropout(pwff.dropout, aop),
            activation: pwff.activation,
        }
    }

    /// Gives the parameters back, with their ids, and drops the memories.
    pub fn into_pwff(self) -> PositionWiseFeedForward {
        self.to_pwff()
    }

    /// Burn's module on the same parameters.
    pub(super) fn to_pwff(&self) -> PositionWiseFeedForward {
        PositionWiseFeedForward {
            linear_inner: self.linear_inner.to_linear(),
            linear_outer: self.linear_outer.to_linear(),
            dropout: self.dropout.to_dropout(),
            activation: self.activation.clone(),
        }
    }

    /// Applies the forward pass on the input tensor.
    ///
    /// # Shapes
    ///
    /// - input: `[..., d_model]`, of any rank
    /// - output: `[..., d_model]`
    ///
    /// # Panics
    ///
    /// Panics where [`MemAopLinear::forward`] does, and if the last axis of `input` is not
    /// `d_model`.
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        let [d_model, _] = self.linear_inner.weight.shape().dims();
        assert_shape!(input, [.., d_model]);

        let hidden = self.activated(self.linear_inner.forward(input));
        self.linear_outer.forward(self.dropout.forward(hidden))
    }

    /// The activation. Its backward pass keeps few bits where those of the linear layers do.
    fn activated<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        use StoredInput::{Full, Int4, Int8};
        match (&self.activation, self.linear_outer.aop().stored_input) {
            (Activation::Relu(_), Int8 | Int4) => relu(input),
            (Activation::Gelu(Gelu { approximate: false }), Int8 | Int4) => {
                packed_gelu(input, |device| self.linear_inner.pass_random(device))
            }
            (Activation::Gelu(Gelu { approximate: false }), Full) => exact_gelu(input),
            _ => self.activation.forward(input),
        }
    }
}
