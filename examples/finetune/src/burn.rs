//! Fine-tunes a pre-trained encoder with Burn's own layers. `memaop.rs` swaps the layers.

mod app;

use burn::module::Module;

/// Burn's layers have no options.
#[derive(clap::Args, Debug)]
struct Layers {}

impl Layers {
    fn configured<M: Module>(&self, model: M) -> M {
        model
    }
}

fn main() -> anyhow::Result<()> {
    app::main()
}
