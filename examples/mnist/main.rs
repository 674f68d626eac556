//! MNIST through burn-train: its loop, metrics, checkpoints and terminal dashboard.
//!
//! ```text
//! cargo mnist
//! cargo mnist --data DIR --plain
//! ```

mod data;
mod model;
mod plain;

use std::path::PathBuf;

use anyhow::{Result, anyhow, ensure};
use burn::{
    data::{dataloader::DataLoaderBuilder, dataset::Dataset},
    optim::SgdConfig,
    train::{
        ExecutionStrategy, Learner, SupervisedTraining,
        metric::{AccuracyMetric, LossMetric},
    },
};
use burn_dataset::vision::{MnistDataset, MnistItem};
use clap::Parser;
use memaop_examples::{AopOptions, Backend, mnist::Split};

use crate::{
    model::{Mlp, MnistBatcher},
    plain::PlainRenderer,
};

/// MNIST with MemAopLinear, trained by burn-train
#[derive(Parser, Debug)]
struct Options {
    #[command(flatten)]
    aop: AopOptions,
    /// A folder with the four IDX files, plain or .gz; they are downloaded without it
    #[arg(long)]
    data: Option<PathBuf>,
    #[arg(long, default_value_t = 5)]
    epochs: usize,
    #[arg(long, default_value_t = 128)]
    batch: usize,
    /// Units in each of the two hidden layers
    #[arg(long, default_value_t = 512)]
    width: usize,
    /// Learning rate of plain SGD
    #[arg(long, default_value_t = 0.05)]
    lr: f64,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[arg(long, value_enum, default_value_t = Backend::Flex)]
    backend: Backend,
    /// No dashboard, but a line for each epoch
    #[arg(long)]
    plain: bool,
    /// Where logs and checkpoints go
    #[arg(long, default_value = "mnist-run")]
    out: PathBuf,
}

fn main() -> Result<()> {
    let options = Options::parse();
    ensure!(options.batch > 0, "--batch must be at least 1, but got 0");
    ensure!(options.width > 0, "--width must be at least 1, but got 0");
    let device = options.backend.device()?;
    let aop = options.aop.config(options.seed)?;

    match &options.data {
        Some(folder) => {
            let train = data::read(folder, Split::Train)?;
            let test = data::read(folder, Split::Test)?;
            train_on(&options, aop, &device, train, test)
        }
        None => train_on(
            &options,
            aop,
            &device,
            MnistDataset::train(),
            MnistDataset::test(),
        ),
    }
}

fn train_on(
    options: &Options,
    aop: burn_memaop::AopConfig,
    device: &burn::tensor::Device,
    train: impl Dataset<MnistItem> + 'static,
    test: impl Dataset<MnistItem> + 'static,
) -> Result<()> {
    device.seed(options.seed);
    let autodiff = device.clone().autodiff();
    let loader = || {
        DataLoaderBuilder::new(MnistBatcher)
            .batch_size(options.batch)
            .num_workers(1)
    };
    let train = loader().shuffle(options.seed).build(train);
    let test = loader().build(test);

    let mut training = SupervisedTraining::new(&options.out, train, test)
        .metrics((AccuracyMetric::new(), LossMetric::new()))
        .with_training_strategy(ExecutionStrategy::SingleDevice(autodiff.clone()).into())
        .with_default_checkpointers()
        .num_epochs(options.epochs)
        .summary();
    if options.plain {
        training = training.renderer(Box::new(PlainRenderer::default()));
    }
    let model = Mlp::new(options.width, aop, &autodiff);
    let result = training.launch(Learner::new(model, SgdConfig::new().init(), options.lr));
    match result.error {
        None => Ok(()),
        Some(error) => Err(anyhow!("{error}")),
    }
}
