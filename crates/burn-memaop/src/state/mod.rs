//! What a layer keeps between steps, who shares it, and its place in a record.

pub(crate) mod choice;
pub(crate) mod device;
mod layer;
pub(crate) mod offer;
pub(crate) mod reading;
mod record;
pub(crate) mod rows;
mod stateful;
pub(crate) mod watch;

pub(crate) use self::{layer::LayerState, stateful::Stateful};
