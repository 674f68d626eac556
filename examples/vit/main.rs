//! MNIST with a small vision transformer that sees an image as 49 patches, trained by burn-train.
//! Attention and feed-forward networks are those of burn-memaop or Burn's own.
//!
//! ```text
//! cargo vit
//! cargo vit --data DIR --plain --k-ratio 0.125
//! cargo vit --data DIR --plain --exact --out vit-exact
//! ```

mod model;

use std::path::PathBuf;

use anyhow::{Result, ensure};
use burn_memaop::train::{AopFigure, AopMetric};
use clap::Parser;
use memaop_examples::check;
use memaop_mnist::AdamOptions;

use crate::model::{Size, TOKENS, Vit};

/// Trains a small vision transformer on MNIST, by burn-train
#[derive(Parser, Debug)]
struct Options {
    #[command(flatten)]
    adam: AdamOptions,
    #[arg(long, default_value_t = 5)]
    epochs: usize,
    /// The size of a token
    #[arg(long, default_value_t = 64)]
    width: usize,
    #[arg(long, default_value_t = 4)]
    heads: usize,
    /// Transformer blocks
    #[arg(long, default_value_t = 2)]
    blocks: usize,
    #[arg(long, default_value_t = 0.0)]
    dropout: f64,
    /// Folder for logs
    #[arg(long, default_value = "vit-run")]
    out: PathBuf,
}

fn main() -> Result<()> {
    let options = Options::parse();
    options.validate()?;
    let adam = &options.adam;
    let aop = adam.mnist.aop.config(adam.mnist.seed << 32)?;
    let device = adam.mnist.backend.device()?;
    let items = adam.mnist.items()?;
    // The device is seeded before weights are drawn, so both kinds of model begin with the same.
    device.seed(adam.mnist.seed);
    let size = Size {
        width: options.width,
        heads: options.heads,
        blocks: options.blocks,
        dropout: options.dropout,
    };
    let model = Vit::new(size, &device.clone().autodiff());
    let (epochs, out) = (options.epochs, options.out.as_path());
    let rows_used = AopMetric::new(AopFigure::RowsUsed);
    match adam.exact {
        true => adam.train(model, &device, items, epochs, out, rows_used),
        false => {
            println!("M = {}", TOKENS * adam.batch);
            adam.train(
                model.with_memaop(aop),
                &device,
                items,
                epochs,
                out,
                rows_used,
            )
        }
    }
}

impl Options {
    fn validate(&self) -> Result<()> {
        check::at_least_one(&[("epochs", self.epochs), ("blocks", self.blocks)])?;
        check::heads(self.width, self.heads)?;
        self.adam.validate()?;
        ensure!(
            (0.0..1.0).contains(&self.dropout),
            "--dropout must be from 0 to below 1, but got {}",
            self.dropout
        );
        Ok(())
    }
}
