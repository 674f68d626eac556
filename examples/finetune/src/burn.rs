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

#[cfg(test)]
mod tests {
    /// Burn's dropout draws anew.
    #[test]
    fn a_resumed_training_is_the_same() {
        crate::app::tests::resumes("--dropout 0");
    }
}
