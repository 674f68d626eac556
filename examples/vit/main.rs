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

use anyhow::{Result, anyhow, ensure};
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
use burn_memaop::train::{AopFigure, AopMetric};
use clap::Parser;
use memaop_examples::{AopOptions, Backend, Encoder, KRatio, check, mnist::Split};
use memaop_mnist::{MnistBatcher, PlainRenderer, read};

use crate::model::{Size, TOKENS, Vit};

/// Trains a small vision transformer on MNIST, by burn-train
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
    #[arg(long, default_value_t = 5)]
    epochs: usize,
    /// Images in a batch; M, the number of rows, is 49 times as large
    #[arg(long, default_value_t = 64)]
    batch: usize,
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
    #[arg(long, default_value = "vit-run")]
    out: PathBuf,
}

fn main() -> Result<()> {
    let options = Options::parse();
    options.validate()?;
    let device = options.backend.device()?;
    match &options.data {
        Some(folder) => {
            let train = read(folder, Split::Train)?;
            start(&options, &device, train, read(folder, Split::Test)?)
        }
        None => start(
            &options,
            &device,
            MnistDataset::train(),
            MnistDataset::test(),
        ),
    }
}

/// Seeds the device before weights are drawn, so that both kinds of model begin with the same.
fn start(
    options: &Options,
    device: &Device,
    train: impl Dataset<MnistItem> + 'static,
    test: impl Dataset<MnistItem> + 'static,
) -> Result<()> {
    let aop = options.aop.config(options.seed << 32)?;
    device.seed(options.seed);
    let size = Size {
        width: options.width,
        heads: options.heads,
        blocks: options.blocks,
        dropout: options.dropout,
    };
    let exact = Vit::new(size, &device.clone().autodiff());
    match options.exact {
        true => train_on(options, device, exact, train, test),
        false => {
            println!("M = {}", TOKENS * options.batch);
            let memaop = exact.with_memaop(aop);
            train_on(options, device, memaop, train, test)
        }
    }
}

fn train_on<E: Encoder>(
    options: &Options,
    device: &Device,
    model: Vit<E>,
    train: impl Dataset<MnistItem> + 'static,
    test: impl Dataset<MnistItem> + 'static,
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
            .metric_train_numeric(AopMetric::new(AopFigure::RowsUsed));
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

impl Options {
    fn validate(&self) -> Result<()> {
        check::at_least_one(&[
            ("epochs", self.epochs),
            ("batch", self.batch),
            ("blocks", self.blocks),
        ])?;
        check::heads(self.width, self.heads)?;
        check::positive("lr", self.lr)?;
        ensure!(
            (0.0..1.0).contains(&self.dropout),
            "--dropout must be from 0 to below 1, but got {}",
            self.dropout
        );
        Ok(())
    }
}
