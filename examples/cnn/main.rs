//! MNIST with the convolutional network of Burn's own example, but with the layers of burn-memaop.
//!
//! ```text
//! cargo cnn
//! cargo cnn --data DIR --plain --epochs 3
//! cargo cnn --data DIR --plain --epochs 3 --exact --out cnn-exact
//! cargo cnn --data DIR race --seeds 5
//! cargo cnn --data DIR units
//! ```

mod model;
mod race;
mod training;
mod units;

use std::path::PathBuf;

use anyhow::{Result, anyhow};
use burn::tensor::Device;
use burn_memaop::{
    AopConfig, OuterProducts,
    train::{AopFigure, AopMetric},
};
use clap::{Parser, Subcommand};
use memaop_examples::check;
use memaop_mnist::{AdamOptions, Items};

use crate::model::Exact;

/// Trains a small convolutional network on MNIST, by burn-train
#[derive(Parser, Debug)]
struct Options {
    #[command(flatten)]
    adam: AdamOptions,
    #[arg(long, default_value_t = 3)]
    epochs: usize,
    /// Folder for logs
    #[arg(long, default_value = "cnn-run")]
    out: PathBuf,
    #[command(subcommand)]
    study: Option<Study>,
}

/// What is run in place of one training
#[derive(Subcommand, Debug)]
enum Study {
    /// Measures the time to an accuracy, in turns with exact trainings
    Race(race::Race),
    /// Compares the variance of sampled positions with that of sampled images
    Units(units::Units),
}

fn main() -> Result<()> {
    let options = Options::parse();
    check::at_least_one(&[("epochs", options.epochs)])?;
    options.adam.validate()?;
    let mnist = &options.adam.mnist;
    let device = mnist.backend.device()?;
    let aop = mnist.aop.config(mnist.seed << 32)?;
    // Only linear layers can compute some rows of the gradient of the input.
    aop.with_input_gradient(OuterProducts::All)
        .validate_convolution()
        .map_err(|error| anyhow!("{error}: add --memory none"))?;
    let items = mnist.items()?;
    match &options.study {
        Some(Study::Race(race)) => race.run(&options, aop, &device, items),
        Some(Study::Units(units)) => units.run(&options, &device, items),
        None => train(&options, aop, &device, items),
    }
}

/// Seeds the device before weights are drawn, so that both kinds of model begin with the same.
fn train(options: &Options, aop: AopConfig, device: &Device, items: [Items; 2]) -> Result<()> {
    let adam = &options.adam;
    device.seed(adam.mnist.seed);
    let model = Exact::new(&device.clone().autodiff());
    let (epochs, out) = (options.epochs, options.out.as_path());
    let rows_used = AopMetric::new(AopFigure::RowsUsed).of_layer("block2.conv");
    match adam.exact {
        true => adam.train(model, device, items, epochs, out, rows_used),
        false => adam.train(
            model.with_memaop(aop),
            device,
            items,
            epochs,
            out,
            rows_used,
        ),
    }
}
