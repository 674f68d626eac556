//! The verbs: what a backend does with rows. `backward/recipe.rs` builds all gradients from them.
//!
//! Each verb has a default body in Burn's own operations, which says what is computed. CPUs and
//! CubeCL devices have their own bodies. For Fusion each verb is one operation of its stream.

#[cfg(any(feature = "flex", feature = "ndarray"))]
mod cpu;
#[cfg(feature = "cubecl-backend")]
mod cube;
pub(crate) mod draw;
mod exact;
pub(crate) mod packing;
mod portable;
pub(crate) mod random;
mod tensors;
pub(crate) mod transfer;
mod verbs;
pub(crate) mod window;

/// The most rows that the kernels take, because they also count rows in single precision.
pub(crate) const MOST_ROWS: usize = 1 << 24;

pub(crate) use self::{
    exact::{Attention, Bias, ExactOps, Mask},
    portable::{bias_of_channels, cast, norm, working_dtype},
    tensors::{Candidates, Draw, Factor, Fold, Memory, Packed},
    verbs::RowOps,
};
