//! What concerns all layers of a model at once.

pub(crate) mod observe;
pub(crate) mod tree;
