//! Counterparts of Burn's transformer modules with [`MemAopLinear`](crate::MemAopLinear) in place of
//! `Linear`.
//!
//! Each is configured as Burn's own with an [`AopConfig`] beside, or made of Burn's module; it has the same fields, and
//! its `forward` takes and gives the same. Only the inputs [`MhaInput`] and
//! [`TransformerEncoderInput`] are types of this module, with Burn's constructors, because Burn keeps
//! the fields of its own to itself:
//!
//! ```
//! use burn::prelude::*;
//! use burn_memaop::transformer::{MemAopTransformerEncoderConfig, TransformerEncoderInput};
//!
//! let device = Device::flex().autodiff();
//! let encoder = MemAopTransformerEncoderConfig::new(32, 64, 4, 2) // was: TransformerEncoderConfig
//!     .with_norm_first(true)
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
