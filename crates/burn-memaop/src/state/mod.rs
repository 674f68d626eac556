//! What a layer keeps between steps, who shares it, and its place in a record.

pub(crate) mod device;
mod layer;
pub(crate) mod measurement;
mod more;
pub(crate) mod noise_scale;
pub(crate) mod offer;
pub(crate) mod reading;
mod record;
pub(crate) mod rows;
pub(crate) mod schedule;
pub(crate) mod watch;

pub(crate) use layer::LayerState;
