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
use burn_memaop::{
    AopConfig, AopObserver,
    train::{AopFigure, AopMetric, Checkpoints, resume_loader},
};
use clap::{Parser, ValueEnum};
use memaop_examples::check;
use memaop_mnist::{MnistOptions, chooses_k};

use crate::model::Mlp;

/// Trains a perceptron of MemAopLinear layers on MNIST, by burn-train
#[derive(Parser, Debug)]
struct Options {
    #[command(flatten)]
    mnist: MnistOptions,
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
    // A resumed training goes on with the state of the layers.
    let aop = options.mnist.aop.config(options.mnist.seed)?;
    train(&options, aop.with_saved_state(true))
}

fn train(options: &Options, aop: AopConfig) -> Result<()> {
    let device = options.mnist.backend.device()?;
    let items = options.mnist.items()?;
    device.seed(options.mnist.seed);
    let autodiff = device.clone().autodiff();
    let checkpoints = Checkpoints::new(options.out.join("checkpoint"));
    let done = checkpoints.resumable()?.unwrap_or(0);
    ensure!(
        options.resume || done == 0,
        "--out {} holds a training of {done} epochs: go on with --resume, or choose another folder",
        options.out.display()
    );

    let steps = options.epochs * items[0].len().div_ceil(options.batch * options.devices);
    let [train, test] = options.mnist.loaders(options.batch, items, &device);
    let train = resume_loader(train, done);

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
    if chooses_k(&aop) {
        training = training.metric_train_numeric(AopMetric::new(AopFigure::Noise));
    }
    if options.compare > 0 {
        training = training.metric_train_numeric(AopMetric::new(AopFigure::Error));
    }
    if done > 0 {
        training = training.checkpoint(done);
    }

    let model = Mlp::new(options.width, aop, Some(observer(options)), &autodiff);
    let scheduler = options.schedule.scheduler(options.lr, steps)?;
    let learner = Learner::new(model, SgdConfig::new().init(), scheduler);
    options.mnist.launch(training, learner)
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
