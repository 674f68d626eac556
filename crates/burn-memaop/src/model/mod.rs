//! What concerns all layers of a model at once.

mod follow;
pub(crate) mod observe;
pub(crate) mod tree;
