//! What a layer keeps between steps: the rows left out, the progress of its schedule, who watches it;
//! who shares it, and its place in a record.

pub(crate) mod learning_rate;
pub(crate) mod measurement;
pub(crate) mod memory;
mod module;
mod more;
pub(crate) mod noise_scale;
pub(crate) mod offer;
pub(crate) mod reading;
mod record;
pub(crate) mod rows;
pub(crate) mod schedule;
pub(crate) mod watch;
mod workers;

pub(crate) use module::LayerMemory;
