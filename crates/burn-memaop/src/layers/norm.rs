//! Layer norm that keeps its input alone.

use burn::{
    backend::Dispatch,
    config::Config,
    module::{Content, DisplaySettings, Initializer, Module, ModuleDisplay, Param},
    nn::{
        self,
        norm::{Normalization, NormalizationConfig},
    },
    tensor::{Device, Tensor, assert_shape},
};

use super::linear::is_tracked;
use crate::{
    backward::{LayerOps, is_supported},
    rows::Bias,
};

/// Configuration to create a [`LayerNorm`] layer, with the fields of Burn's
/// [`LayerNormConfig`](nn::LayerNormConfig).
#[derive(Config, Debug)]
pub struct LayerNormConfig {
    /// The size of the input features.
    pub d_model: usize,
    /// A value required for numerical stability.
    #[config(default = 1e-5)]
    pub epsilon: f64,
    /// If a bias (beta) should be applied during the normalization.
    #[config(default = true)]
    pub bias: bool,
}

impl LayerNormConfig {
    /// Creates a [`LayerNorm`].
    pub fn init(&self, device: &Device) -> LayerNorm {
        let vector = |initializer: Initializer| initializer.init([self.d_model], device);
        LayerNorm {
            gamma: vector(Initializer::Ones),
            beta: self.bias.then(|| vector(Initializer::Zeros)),
            epsilon: self.epsilon,
        }
    }
}

impl From<LayerNormConfig> for NormalizationConfig {
    /// Gives that of Burn's module, because Burn's list of norms has no other.
    fn from(config: LayerNormConfig) -> Self {
        Self::Layer(nn::LayerNormConfig {
            d_model: config.d_model,
            epsilon: config.epsilon,
            bias: config.bias,
        })
    }
}

impl From<LayerNorm> for Normalization {
    /// Gives Burn's module, because Burn's list of norms has no other.
    fn from(norm: LayerNorm) -> Self {
        norm.into_layer_norm().into()
    }
}

/// Normalises the last axis of its input, as [`burn::nn::LayerNorm`] does.
///
/// This layer keeps its input for the backward pass. Burn's keeps two tensors of that size. On CPUs
/// in single precision, the backward pass goes over the rows once.
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct LayerNorm {
    /// The learnable weight (scale).
    pub gamma: Param<Tensor<1>>,
    /// The learnable bias (optional).
    pub beta: Option<Param<Tensor<1>>>,
    epsilon: f64,
}

impl LayerNorm {
    /// Takes the parameters of Burn's module, with their ids.
    pub fn from_layer_norm(norm: nn::LayerNorm) -> Self {
        // Burn shows its epsilon in the text of a module, and nowhere else.
        let content = norm.custom_content(Content::new(DisplaySettings::new()));
        let attributes = content.into_iter().flat_map(|content| content.attributes);
        let mut shown = attributes.filter(|attribute| attribute.name == "epsilon");
        let epsilon = shown.next().and_then(|epsilon| epsilon.value.parse().ok());
        Self {
            gamma: norm.gamma,
            beta: norm.beta,
            epsilon: epsilon.expect("Burn's layer norm shows its epsilon"),
        }
    }

    /// Gives the parameters back, with their ids.
    pub fn into_layer_norm(self) -> nn::LayerNorm {
        self.to_layer_norm()
    }

    pub(super) fn to_layer_norm(&self) -> nn::LayerNorm {
        let config = nn::LayerNormConfig {
            d_model: self.gamma.lazy_shape()[0],
            epsilon: self.epsilon,
            bias: false,
        };
        let mut norm = config.init(&self.gamma.lazy_device());
        norm.gamma = self.gamma.clone();
        norm.beta = self.beta.clone();
        norm
    }

    /// Applies the forward pass on the input tensor.
    ///
    /// # Shapes
    ///
    /// - input: `[..., any, d_model]`
    /// - output: `[..., any, d_model]`
    ///
    /// # Panics
    ///
    /// Panics if the last axis of `input` is not `d_model`.
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        let gamma = self.gamma.val();
        let [d_model] = gamma.dims();
        assert_shape!(input, [.., d_model]);
        let beta = self.beta.as_ref().map(Param::val);
        let tracked =
            is_tracked(&input) || is_tracked(&gamma) || beta.as_ref().is_some_and(is_tracked);
        let shape = input.shape();
        let values = shape.num_elements();
        if !tracked || values == 0 || !is_supported(input.device().as_dispatch()) {
            return self.to_layer_norm().forward(input);
        }
        let input = input.reshape([values / d_model, d_model]);
        let beta = match beta {
            Some(beta) => Bias::<Dispatch>::Some(beta.into_dispatch()),
            None => Bias::None,
        };
        let (input, gamma) = (input.into_dispatch(), gamma.into_dispatch());
        let output = Dispatch::memaop_layer_norm(input, gamma, beta, self.epsilon);
        Tensor::<2>::from_dispatch(output).reshape(shape)
    }
}

impl ModuleDisplay for LayerNorm {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        self.to_layer_norm().custom_settings()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        self.to_layer_norm().custom_content(content)
    }
}
