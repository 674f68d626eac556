//! Counterparts of Burn's transformer modules with [`MemAopLinear`](crate::MemAopLinear) in place of
//! `Linear`.
//!
//! Each is made from Burn's own configuration or module and an [`AopConfig`], has the same fields, and
//! its `forward` takes and gives the same as Burn's. Only the inputs [`MhaInput`] and
//! [`TransformerEncoderInput`] are types of this module, with Burn's constructors, because Burn keeps
//! the fields of its own to itself:
//!
//! ```
//! use burn::nn::transformer::TransformerEncoderConfig;
//! use burn::prelude::*;
//! use burn_memaop::AopConfig;
//! use burn_memaop::transformer::{MemAopTransformerEncoderConfig, TransformerEncoderInput};
//!
//! let device = Device::flex().autodiff();
//! let config = TransformerEncoderConfig::new(32, 64, 4, 2).with_norm_first(true);
//! let encoder = MemAopTransformerEncoderConfig::new(config) // was: config.init(&device)
//!     .with_aop(AopConfig::new())
//!     .init(&device);
//! let tokens = Tensor::<3>::ones([8, 16, 32], &device);
//! let output = encoder.forward(TransformerEncoderInput::new(tokens));
//! assert_eq!(output.dims(), [8, 16, 32]);
//! let encoder = encoder.into_encoder(); // Burn's own, with the same parameters.
//! ```
//!
//! The rows of a weight gradient are the tokens of all sequences, padding included: a padded token whose
//! gradient is zero is not chosen before any other. Each layer gets a seed of its own, counted from that
//! of the [`AopConfig`] in the order query, key, value, output, inner, outer, block after block.

mod attention;
mod encoder;
mod feed_forward;

pub use attention::{MemAopMultiHeadAttention, MemAopMultiHeadAttentionConfig, MhaInput};
pub use encoder::{
    MemAopTransformerEncoder, MemAopTransformerEncoderConfig, MemAopTransformerEncoderLayer,
    TransformerEncoderInput,
};
pub use feed_forward::{MemAopPositionWiseFeedForward, MemAopPositionWiseFeedForwardConfig};

use crate::config::AopConfig;

/// The configuration of the layer that is `count` layers after the one of `aop`.
fn later(aop: AopConfig, count: u64) -> AopConfig {
    aop.with_seed(aop.seed.wrapping_add(count))
}
