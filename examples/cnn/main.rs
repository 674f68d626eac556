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

use std::{path::PathBuf, sync::Arc};

use anyhow::{Result, anyhow};
use burn::{
    data::{dataloader::DataLoaderBuilder, dataset::Dataset},
    optim::AdamConfig,
    tensor::Device,
    train::{
        ExecutionStrategy, Learner, SupervisedTraining,
        metric::{AccuracyMetric, LossMetric},
    },
};
use burn_dataset::vision::{MnistDataset, MnistItem};
use burn_memaop::{
    AopConfig, OuterProducts,
    train::{AopFigure, AopMetric},
};
use clap::{Parser, Subcommand};
use memaop_examples::{AopOptions, Backend, KRatio, check, mnist::Split};
use memaop_mnist::{MnistBatcher, PlainRenderer, read};

use crate::model::{Cnn, Convolution, Dense, Exact};

/// Trains a small convolutional network on MNIST, by burn-train
#[derive(Parser, Debug)]
struct Options {
    #[command(flatten)]
    aop: AopOptions,
    /// Trains Burn's own modules, from the same weights and on the same batches
    #[arg(long)]
    exact: bool,
    /// Folder with the four IDX files in mnist/, plain or .gz [default: they are downloaded]
    #[arg(long)]
    data: Option<PathBuf>,
    #[arg(long, default_value_t = 3)]
    epochs: usize,
    /// Images in a batch
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// Learning rate of Adam
    #[arg(long, default_value_t = 1e-3)]
    lr: f64,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[arg(long, value_enum, default_value_t = Backend::Flex)]
    backend: Backend,
    /// Prints a line for each epoch instead of the dashboard
    #[arg(long)]
    plain: bool,
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
    check::at_least_one(&[("epochs", options.epochs), ("batch", options.batch)])?;
    check::positive("lr", options.lr)?;
    let device = options.backend.device()?;
    let aop = options.aop.config(options.seed << 32)?;
    // Only linear layers can compute some rows of the gradient of the input.
    aop.with_input_gradient(OuterProducts::All)
        .validate_convolution()
        .map_err(|error| anyhow!("{error}: add --memory none"))?;
    let [train, test]: [Items; 2] = match &options.data {
        Some(folder) => [
            Arc::new(read(folder, Split::Train)?),
            Arc::new(read(folder, Split::Test)?),
        ],
        None => [
            Arc::new(MnistDataset::train()),
            Arc::new(MnistDataset::test()),
        ],
    };
    start(&options, aop, &device, train, test)
}

type Items = Arc<dyn Dataset<MnistItem>>;

/// Seeds the device before weights are drawn, so that both kinds of model begin with the same.
fn start(
    options: &Options,
    aop: AopConfig,
    device: &Device,
    train: Items,
    test: Items,
) -> Result<()> {
    match &options.study {
        Some(Study::Race(race)) => return race.run(options, aop, device, train, test),
        Some(Study::Units(units)) => return units.run(options, device, train),
        None => {}
    }
    device.seed(options.seed);
    let exact = Exact::new(&device.clone().autodiff());
    match options.exact {
        true => train_on(options, device, exact, train, test),
        false => {
            let memaop = exact.with_memaop(aop);
            train_on(options, device, memaop, train, test)
        }
    }
}

fn train_on<C: Convolution, D: Dense>(
    options: &Options,
    device: &Device,
    model: Cnn<C, D>,
    train: Items,
    test: Items,
) -> Result<()> {
    // Without worker threads the order of the batches is the same in every run.
    let loader = || {
        DataLoaderBuilder::new(MnistBatcher)
            .batch_size(options.batch)
            .num_workers(0)
    };
    let train = loader().shuffle(options.seed).build(train);
    let test = loader().build(test);
    let strategy = ExecutionStrategy::single(device.clone().autodiff());
    let mut training = SupervisedTraining::new(&options.out, train, test)
        .metrics((AccuracyMetric::new(), LossMetric::new()))
        .with_training_strategy(strategy.into())
        .num_epochs(options.epochs)
        .summary();
    let chooses = options.aop.k.is_none()
        && options.aop.k_ratio == KRatio::AUTO
        && options.aop.k_ratio.goes_with(options.aop.policy);
    if !options.exact {
        training = training
            .metric_train_numeric(AopMetric::new(AopFigure::SavedFlops))
            .metric_train_numeric(AopMetric::new(AopFigure::RowsUsed).of_layer("block2.conv"));
        if chooses {
            training = training.metric_train_numeric(AopMetric::new(AopFigure::Noise));
        }
    }
    if options.plain {
        training = training.renderer(Box::new(PlainRenderer::default()));
    }
    let optimizer = AdamConfig::new().init();
    let result = training.launch(Learner::new(model, optimizer, options.lr));
    match result.error {
        None => Ok(()),
        Some(error) => Err(anyhow!("{error}")),
    }
}
