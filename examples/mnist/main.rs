//! MNIST trained by burn-train, with its dashboard, checkpoints, learning rate schedules and
//! workers, and with the metrics of burn-memaop.
//!
//! ```text
//! cargo mnist
//! cargo mnist --data DIR --plain
//! cargo mnist --resume --epochs 10
//! cargo mnist --out run-2 --policy topk --schedule cosine
//! ```

mod model;

use std::path::PathBuf;

use anyhow::{Result, anyhow, ensure};
use burn::{
    data::{dataloader::DataLoaderBuilder, dataset::Dataset},
    lr_scheduler::{
        cosine::CosineAnnealingLrSchedulerConfig, linear::LinearLrSchedulerConfig,
        module_lr_scheduler::ModuleLrScheduler,
    },
    optim::SgdConfig,
    tensor::Device,
    train::{
        ExecutionStrategy, Learner, MultiDeviceOptim, SupervisedTraining,
        metric::{AccuracyMetric, LearningRateMetric, LossMetric},
    },
};
use burn_dataset::vision::{MnistDataset, MnistItem};
use burn_memaop::{
    AopConfig, AopObserver, Method, OuterProducts,
    train::{AopFigure, AopMetric, Checkpoints, resume_loader},
};
use clap::{Parser, ValueEnum};
use memaop_examples::{AopOptions, Backend, check, mnist::Split};
use memaop_mnist::{MnistBatcher, PlainRenderer, read};

use crate::model::Mlp;

/// Trains a perceptron of MemAopLinear layers on MNIST, by burn-train
#[derive(Parser, Debug)]
struct Options {
    #[command(flatten)]
    aop: AopOptions,
    /// Folder with the four IDX files in mnist/, plain or .gz [default: they are downloaded]
    #[arg(long)]
    data: Option<PathBuf>,
    #[arg(long, default_value_t = 5)]
    epochs: usize,
    #[arg(long, default_value_t = 128)]
    batch: usize,
    /// Units in each of the two hidden layers
    #[arg(long, default_value_t = 512)]
    width: usize,
    /// Learning rate of SGD at the start
    #[arg(long, default_value_t = 0.05)]
    lr: f64,
    /// Course of the learning rate; linear and cosine end at a hundredth
    #[arg(long, value_enum, default_value_t = LrSchedule::Constant)]
    schedule: LrSchedule,
    /// Number of workers with batches of their own; they share the device and the layers' state
    #[arg(long, default_value_t = 1)]
    devices: usize,
    /// Goes on after the last complete checkpoint in --out
    #[arg(long)]
    resume: bool,
    /// Compares the gradient with the exact one in one of this many steps; 0 for never
    #[arg(long, default_value_t = 0)]
    compare: usize,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[arg(long, value_enum, default_value_t = Backend::Flex)]
    backend: Backend,
    /// Prints a line for each epoch instead of the dashboard
    #[arg(long)]
    plain: bool,
    /// Folder for logs and checkpoints
    #[arg(long, default_value = "mnist-run")]
    out: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LrSchedule {
    Constant,
    Linear,
    Cosine,
}

impl LrSchedule {
    fn scheduler(self, lr: f64, steps: usize) -> Result<ModuleLrScheduler> {
        let least = 0.01 * lr;
        let scheduler = match self {
            Self::Constant => Ok(lr.into()),
            Self::Linear => LinearLrSchedulerConfig::new(lr, least, steps).init(),
            Self::Cosine => CosineAnnealingLrSchedulerConfig::new(lr, steps)
                .with_min_lr(least)
                .init(),
        };
        scheduler.map_err(|error| anyhow!("--schedule with --lr {lr}: {error}"))
    }
}

fn main() -> Result<()> {
    let options = Options::parse();
    check::at_least_one(&[
        ("batch", options.batch),
        ("width", options.width),
        ("epochs", options.epochs),
        ("devices", options.devices),
    ])?;
    check::positive("lr", options.lr)?;
    let device = options.backend.device()?;
    let aop = options.aop.config(options.seed)?;

    match &options.data {
        Some(folder) => {
            let train = read(folder, Split::Train)?;
            let test = read(folder, Split::Test)?;
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
    aop: AopConfig,
    device: &Device,
    train: impl Dataset<MnistItem> + 'static,
    test: impl Dataset<MnistItem> + 'static,
) -> Result<()> {
    device.seed(options.seed);
    let autodiff = device.clone().autodiff();
    let checkpoints = Checkpoints::new(options.out.join("checkpoint"));
    let done = checkpoints.resumable()?.unwrap_or(0);
    ensure!(
        options.resume || done == 0,
        "--out {} holds a training of {done} epochs: go on with --resume, or choose another folder",
        options.out.display()
    );

    // Without worker threads the order of the batches is the same in every run.
    let loader = || {
        DataLoaderBuilder::new(MnistBatcher)
            .batch_size(options.batch)
            .num_workers(0)
    };
    let steps = options.epochs * train.len().div_ceil(options.batch * options.devices);
    let train = resume_loader(loader().shuffle(options.seed).build(train), done);
    let test = loader().build(test);

    let mut training = SupervisedTraining::new(&options.out, train, test)
        .metrics((AccuracyMetric::new(), LossMetric::new()))
        .with_training_strategy(strategy(options.devices, &autodiff).into())
        .with_custom_checkpointers(
            checkpoints.model(),
            checkpoints.optimizer(),
            checkpoints.scheduler(),
        )
        .num_epochs(options.epochs)
        .summary();
    if options.schedule != LrSchedule::Constant {
        training = training.metric_train_numeric(LearningRateMetric::new());
    }
    training = training
        .metric_train_numeric(AopMetric::new(AopFigure::RowsUsed))
        .metric_train_numeric(AopMetric::new(AopFigure::SavedFlops));
    if (aop.outer_products, aop.method) == (OuterProducts::Auto, Method::Systematic) {
        training = training.metric_train_numeric(AopMetric::new(AopFigure::Noise));
    }
    if options.compare > 0 {
        training = training.metric_train_numeric(AopMetric::new(AopFigure::Error));
    }
    if options.plain {
        training = training.renderer(Box::new(PlainRenderer::default()));
    }
    if done > 0 {
        training = training.checkpoint(done);
    }

    let model = Mlp::new(options.width, aop, Some(observer(options)), &autodiff);
    let scheduler = options.schedule.scheduler(options.lr, steps)?;
    let result = training.launch(Learner::new(model, SgdConfig::new().init(), scheduler));
    match result.error {
        None => Ok(()),
        Some(error) => Err(anyhow!("{error}")),
    }
}

fn strategy(devices: usize, device: &Device) -> ExecutionStrategy {
    match devices {
        1 => ExecutionStrategy::single(device.clone()),
        count => {
            let devices = vec![device.clone(); count];
            ExecutionStrategy::multi(devices, MultiDeviceOptim::OptimMainDevice)
        }
    }
}

fn observer(options: &Options) -> AopObserver {
    let observer = AopObserver::new();
    match options.compare {
        0 => observer,
        interval => observer.with_error(interval),
    }
}
