//! What concerns all layers of a model at once.

pub(crate) mod observe;
pub(crate) mod summary;
pub(crate) mod tree;
