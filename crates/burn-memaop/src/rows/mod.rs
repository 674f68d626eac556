//! What a backend does with the rows of a batch: a few verbs, of which `backward/recipe.rs` makes all gradients.
//!
//! Each verb has a default body in Burn's own operations, which says what is computed. CPUs and CubeCL devices have
//! bodies of their own, and Burn's macro gives Fusion one operation of its stream for each verb.

#[cfg(any(feature = "flex", feature = "ndarray"))]
mod cpu;
#[cfg(feature = "cubecl-backend")]
mod cube;
pub(crate) mod draw;
mod exact;
pub(crate) mod packing;
mod portable;
pub(crate) mod random;
pub(crate) mod transfer;
mod verbs;
pub(crate) mod window;

/// The most rows that the kernels take: they count them in single precision too.
pub(crate) const MOST_ROWS: usize = 1 << 24;

pub(crate) use self::{
    exact::{Bias, ExactOps},
    portable::{bias_of_channels, cast, norm, working_dtype},
    verbs::{Candidates, Draw, Factor, Fold, Memory, Packed, RowOps},
};
