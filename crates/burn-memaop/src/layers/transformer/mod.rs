//! These modules replace Burn's attention and transformer modules. Their linear layers, dropout,
//! layer norm and attention are those of this crate.
//!
//! Each is configured like Burn's module, or made from it, and has the same fields. [`MhaInput`],
//! [`TransformerEncoderInput`] and [`TransformerDecoderInput`] are types of this module, because the
//! fields of Burn's are private:
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
//! The rows of a weight gradient are the tokens of all sequences, padding included. A
//! padded token whose gradient is zero has the score 0, so methods that go by scores draw it last. Each layer gets its own seed, counted
//! from that of the [`AopConfig`](crate::AopConfig) in the order query, key, value, output, inner,
//! outer, block after block. In a decoder the cross-attention comes before the self-attention.

mod attention;
mod cross_attention;
mod decoder;
mod encoder;
mod feed_forward;
mod stack;

pub use attention::{MemAopMultiHeadAttention, MemAopMultiHeadAttentionConfig, MhaInput};
pub use cross_attention::{MemAopCrossAttention, MemAopCrossAttentionConfig};
pub use decoder::{
    MemAopTransformerDecoder, MemAopTransformerDecoderConfig, MemAopTransformerDecoderLayer,
    TransformerDecoderInput,
};
pub use encoder::{
    MemAopTransformerEncoder, MemAopTransformerEncoderConfig, MemAopTransformerEncoderLayer,
    TransformerEncoderInput,
};
pub use feed_forward::{MemAopPositionWiseFeedForward, MemAopPositionWiseFeedForwardConfig};
