#![warn(missing_docs)]
#![cfg_attr(docsrs, feature(doc_cfg))]
// NdArray and LibTorch are deprecated in Burn, and supported here as long as Burn has them.
#![cfg_attr(any(feature = "ndarray", feature = "tch"), allow(deprecated))]

//! Drop-in layers for [Burn](https://burn.dev) that train in less time and memory.
//!
//! [`nn`] has all items of [`burn::nn`]. `Linear`, `Conv2d`, `Dropout`, `LayerNorm`, `Relu`, `Gelu`,
//! `SwiGlu`, and the modules of attention and transformers in it are those of this crate. To swap
//! layers, import them from there. The crate burn-with-memaop swaps those of a whole project.
//! [`summary`] shows which layers were reached.
//!
//! ```
//! use burn::prelude::*;
//! use burn_memaop::nn::{Linear, LinearConfig, Relu}; // was: burn::nn
//!
//! #[derive(Module, Debug)]
//! struct Mlp {
//!     hidden: Linear,
//!     activation: Relu,
//!     output: Linear,
//! }
//!
//! impl Mlp {
//!     fn new(device: &Device) -> Self {
//!         Self {
//!             hidden: LinearConfig::new(784, 128).init(device),
//!             activation: Relu::new(),
//!             output: LinearConfig::new(128, 10).init(device),
//!         }
//!     }
//!
//!     fn forward(&self, input: Tensor<2>) -> Tensor<2> {
//!         let hidden = self.activation.forward(self.hidden.forward(input));
//!         self.output.forward(hidden)
//!     }
//! }
//!
//! let device = Device::flex().autodiff();
//! let model = Mlp::new(&device);
//! let loss = model.forward(Tensor::ones([32, 784], &device)).mean();
//! let gradients = loss.backward();
//! assert!(model.hidden.weight.grad(&gradients).is_some());
//! ```
//!
//! - **Exact layers** are faster than Burn's on CPUs: [`OuterProducts::All`].
//! - **Inputs in 8 bits** between the passes save memory: [`StoredInput::Int8`].
//! - **Gradients from some of the rows**: the gradient of a weight, `dW = X^T G`, is a sum of M
//!   outer products, one for each row of the batch. By default a linear layer draws K of them
//!   without bias, and chooses K while it trains ([`OuterProducts::Auto`]). The paper's method,
//!   Mem-AOP-GD (Hernandez, Rini, Duman, 2021,
//!   [arXiv:2110.09164](https://arxiv.org/abs/2110.09164)), keeps the rows that were left out in a
//!   [`Memory`].
//!
//! [`with_aop`] sets the [`AopConfig`] of all layers of a model.
//!
//! # Features
//!
//! - Backends: `flex` (default), `ndarray`, `wgpu`, `vulkan`, `webgpu`, `metal`, `cuda`, `rocm`,
//!   `cpu`, `tch`. Each turns on the Burn feature of the same name.
//! - `autodiff` (default): the approximate backward pass. Without it the layers only infer.
//! - `rayon`, `simd`, `avx512` (default): how Flex and NdArray use the processor.
//! - `fusion`: Burn's operation fusion on CubeCL backends.
//! - `autotune`: kernel autotuning on CubeCL backends.
//! - `train`: what needs burn-train.

// In this order, each module imports only those after it.
#[cfg(feature = "train")]
pub mod train;

#[cfg_attr(not(feature = "autodiff"), allow(dead_code))]
mod model;

mod layers;

pub mod op;

#[cfg_attr(not(feature = "autodiff"), allow(dead_code))]
mod backward;

#[cfg_attr(not(feature = "autodiff"), allow(dead_code))]
mod state;

#[cfg_attr(not(feature = "autodiff"), allow(dead_code))]
mod rows;

mod config;

/// Burn itself, for programs in which another crate has its name.
pub use burn;
pub use config::{AopConfig, AopConfigError, Memory, Method, OuterProducts, StoredInput};
pub use layers::{
    activation,
    conv2d::{MemAopConv2d, MemAopConv2dConfig},
    linear::{MemAopLinear, MemAopLinearConfig},
    transformer,
};
pub use model::{
    observe::{AopObserver, AopReport, LayerReport},
    summary::{Summary, summary},
    tree::{reset, with_aop},
};
pub use state::device::MemoryStats;

/// Methods to compare with.
pub mod baseline {
    pub use crate::config::Baseline;
}

/// [`burn::nn`] with this crate's layers in place of its own. To swap layers, import from here.
///
/// ```
/// use burn::prelude::*;
/// use burn_memaop::nn::{Linear, LinearConfig, Relu}; // was: burn::nn
///
/// #[derive(Module, Debug)]
/// struct Model {
///     hidden: Linear,
///     activation: Relu,
/// }
///
/// let device = Device::flex().autodiff();
/// let model = Model {
///     hidden: LinearConfig::new(784, 512).with_bias(false).init(&device),
///     activation: Relu::new(),
/// };
/// let output = model.activation.forward(model.hidden.forward(Tensor::<2>::ones([8, 784], &device)));
/// assert_eq!(output.dims(), [8, 512]);
/// ```
pub mod nn {
    pub use burn::nn::*;

    pub use crate::{
        MemAopLinear as Linear, MemAopLinearConfig as LinearConfig,
        activation::{Gelu, Relu, SwiGlu, SwiGluConfig},
        layers::{
            dropout::{Dropout, DropoutConfig},
            norm::{LayerNorm, LayerNormConfig},
        },
    };

    /// [`burn::nn::modules`] with this crate's layers in place of its own.
    pub mod modules {
        pub use burn::nn::modules::*;

        pub use super::{
            Dropout, DropoutConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig, attention,
            conv, norm, transformer,
        };
    }

    /// [`burn::nn::activation`] with the activations of this crate in the places of Burn's.
    ///
    /// The variants of [`Activation`](activation::Activation) hold Burn's modules. `.into()` makes
    /// one from a module of this crate, too.
    pub mod activation {
        pub use burn::nn::activation::*;

        pub use crate::activation::{Gelu, Relu, SwiGlu, SwiGluConfig};
    }

    /// [`burn::nn::conv`] with the 2D convolution of this crate in place of its own.
    ///
    /// ```
    /// use burn::prelude::*;
    /// use burn_memaop::nn::conv::Conv2dConfig; // was: burn::nn::conv
    ///
    /// let device = Device::flex().autodiff();
    /// let conv = Conv2dConfig::new([3, 8], [3, 3]).init(&device);
    /// assert_eq!(conv.forward(Tensor::ones([2, 3, 28, 28], &device)).dims(), [2, 8, 26, 26]);
    /// ```
    pub mod conv {
        pub use burn::nn::conv::*;

        pub use crate::{MemAopConv2d as Conv2d, MemAopConv2dConfig as Conv2dConfig};
    }

    /// [`burn::nn::norm`] with the layer norm of this crate in place of its own.
    pub mod norm {
        pub use burn::nn::norm::*;

        pub use super::{LayerNorm, LayerNormConfig};
    }

    /// [`burn::nn::attention`] with the attention of this crate in place of its own.
    pub mod attention {
        pub use burn::nn::attention::*;

        pub use crate::transformer::{
            MemAopCrossAttention as CrossAttention,
            MemAopCrossAttentionConfig as CrossAttentionConfig,
            MemAopMultiHeadAttention as MultiHeadAttention,
            MemAopMultiHeadAttentionConfig as MultiHeadAttentionConfig, MhaInput,
        };
    }

    /// [`burn::nn::transformer`] with this crate's encoder, decoder and feed-forward network in
    /// place of its own.
    ///
    /// ```
    /// use burn::prelude::*;
    /// // was: burn::nn::transformer
    /// use burn_memaop::nn::transformer::{TransformerEncoderConfig, TransformerEncoderInput};
    ///
    /// let device = Device::flex().autodiff();
    /// let encoder = TransformerEncoderConfig::new(32, 64, 4, 2).init(&device);
    /// let output = encoder.forward(TransformerEncoderInput::new(Tensor::ones([8, 16, 32], &device)));
    /// assert_eq!(output.dims(), [8, 16, 32]);
    /// ```
    pub mod transformer {
        pub use burn::nn::transformer::*;

        pub use crate::transformer::{
            MemAopPositionWiseFeedForward as PositionWiseFeedForward,
            MemAopPositionWiseFeedForwardConfig as PositionWiseFeedForwardConfig,
            MemAopTransformerDecoder as TransformerDecoder,
            MemAopTransformerDecoderConfig as TransformerDecoderConfig,
            MemAopTransformerDecoderLayer as TransformerDecoderLayer,
            MemAopTransformerEncoder as TransformerEncoder,
            MemAopTransformerEncoderConfig as TransformerEncoderConfig,
            MemAopTransformerEncoderLayer as TransformerEncoderLayer, TransformerDecoderInput,
            TransformerEncoderInput,
        };
    }
}

/// Compiles the code of the documents.
#[cfg(doctest)]
mod documents {
    #[doc = include_str!("../README.md")]
    struct Readme;
    #[doc = include_str!("../../../docs/activation-memory.md")]
    struct ActivationMemory;
    #[doc = include_str!("../../../docs/algorithm.md")]
    struct Algorithm;
    #[doc = include_str!("../../../docs/architecture.md")]
    struct Architecture;
    #[doc = include_str!("../../../docs/benchmarks.md")]
    struct Benchmarks;
    #[doc = include_str!("../../../docs/compare.md")]
    struct Compare;
    #[doc = include_str!("../../../docs/contributing.md")]
    struct Contributing;
    #[doc = include_str!("../../../docs/convolutions.md")]
    struct Convolutions;
    #[doc = include_str!("../../../docs/gpu.md")]
    struct Gpu;
    #[doc = include_str!("../../../docs/reproduction.md")]
    struct Reproduction;
    #[doc = include_str!("../../../docs/results.md")]
    struct Results;
    #[cfg(feature = "train")]
    #[doc = include_str!("../../../docs/training.md")]
    struct Training;
}
