//! Programs of the kinds that Burn's examples are. They are written for `burn`, whichever crate has
//! that name.

pub mod guide;
pub mod mnist;
pub mod recurrent;
pub mod regression;
pub mod text_classification;
pub mod text_generation;

use burn::{module::Module, tensor::Device};

/// The turn of a thread to draw weights. Burn draws a weight when it is first read, from a generator
/// that all threads share. The lock of the standard input is one for the whole process, also where
/// the programs are built twice in it.
pub fn turn() -> std::io::StdinLock<'static> {
    std::io::stdin().lock()
}

/// A model whose weights depend on the seed alone.
fn untrained<M: Module>(seed: u64, device: &Device, new: impl FnOnce(&Device) -> M) -> M {
    let _turn = turn();
    device.seed(seed);
    let model = new(device);
    drop(model.valid());
    model
}
