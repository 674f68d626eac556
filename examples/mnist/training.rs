use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Result, anyhow};
use burn::{
    data::{
        dataloader::{DataLoader, DataLoaderBuilder},
        dataset::Dataset,
    },
    optim::AdamConfig,
    tensor::Device,
    train::{
        ClassificationOutput, ExecutionStrategy, InferenceStep, Learner, LearnerModel,
        SupervisedTraining, TrainStep,
        metric::{AccuracyMetric, LossMetric},
    },
};
use burn_dataset::vision::{MnistDataset, MnistItem};
use burn_memaop::{
    AopConfig, Method, OuterProducts,
    train::{AopFigure, AopMetric},
};
use clap::Args;
use memaop_examples::{AopOptions, Backend, check, mnist::Split};

use crate::{MnistBatch, MnistBatcher, Observed, PlainRenderer, read};

/// The images of a split.
pub type Items = Arc<dyn Dataset<MnistItem>>;
/// A loader of batches.
pub type Loader = Arc<dyn DataLoader<MnistBatch>>;

/// The options that all trainings on MNIST share.
#[derive(Args, Debug)]
pub struct MnistOptions {
    #[command(flatten)]
    pub aop: AopOptions,
    /// Folder with the four IDX files in mnist/, plain or .gz [default: they are downloaded]
    #[arg(long)]
    pub data: Option<PathBuf>,
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    #[arg(long, value_enum, default_value_t = Backend::Flex)]
    pub backend: Backend,
    /// Prints a line for each epoch instead of the dashboard
    #[arg(long)]
    pub plain: bool,
}

impl MnistOptions {
    /// The images of training and test.
    ///
    /// # Errors
    ///
    /// Returns an error that names the file and what is wrong with it.
    pub fn items(&self) -> Result<[Items; 2]> {
        Ok(match &self.data {
            Some(folder) => [
                Arc::new(read(folder, Split::Train)?),
                Arc::new(read(folder, Split::Test)?),
            ],
            None => [
                Arc::new(MnistDataset::train()),
                Arc::new(MnistDataset::test()),
            ],
        })
    }

    /// The loaders of training and test for a device, with `batch` images in a batch.
    pub fn loaders(&self, batch: usize, [train, test]: [Items; 2], device: &Device) -> [Loader; 2] {
        [
            loader(train, batch, Some(self.seed), device),
            loader(test, batch, None, device),
        ]
    }

    /// Runs a training.
    ///
    /// # Errors
    ///
    /// Returns the error that ended the training.
    pub fn launch<M: LearnerModel>(
        &self,
        mut training: SupervisedTraining<M>,
        learner: Learner<M>,
    ) -> Result<()> {
        println!("{}", burn_memaop::summary(&learner.model()));
        if self.plain {
            training = training.renderer(Box::new(PlainRenderer::default()));
        }
        match training.launch(learner).error {
            None => Ok(()),
            Some(error) => Err(anyhow!("{error}")),
        }
    }
}

/// Loads batches of `size` images, shuffled if there is a seed. Without worker threads the order of
/// the batches is the same in every run.
pub fn loader(items: Items, size: usize, seed: Option<u64>, device: &Device) -> Loader {
    let loader = DataLoaderBuilder::new(MnistBatcher)
        .batch_size(size)
        .num_workers(0)
        .set_device(device.clone());
    match seed {
        Some(seed) => loader.shuffle(seed).build(items),
        None => loader.build(items),
    }
}

/// Whether layers with this configuration choose K, and so have a figure for noise.
pub fn chooses_k(aop: &AopConfig) -> bool {
    (aop.outer_products, aop.method) == (OuterProducts::Auto, Method::Systematic)
}

/// The options of a training by Adam, of layers of burn-memaop or of Burn's own.
#[derive(Args, Debug)]
pub struct AdamOptions {
    #[command(flatten)]
    pub mnist: MnistOptions,
    /// Trains Burn's own modules, from the same weights and on the same batches
    #[arg(long)]
    pub exact: bool,
    /// Images in a batch
    #[arg(long, default_value_t = 64)]
    pub batch: usize,
    /// Learning rate of Adam
    #[arg(long, default_value_t = 1e-3)]
    pub lr: f64,
}

impl AdamOptions {
    /// Checks the options that the parser does not check.
    ///
    /// # Errors
    ///
    /// Returns an error that names the option, its rule and its value.
    pub fn validate(&self) -> Result<()> {
        check::at_least_one(&[("batch", self.batch)])?;
        check::positive("lr", self.lr)
    }

    /// Trains a model for some epochs, with logs in a folder. `rows_used` is shown for layers of
    /// burn-memaop.
    ///
    /// # Errors
    ///
    /// Returns the error that ended the training.
    pub fn train<M>(
        &self,
        model: M,
        device: &Device,
        items: [Items; 2],
        epochs: usize,
        out: &Path,
        rows_used: AopMetric,
    ) -> Result<()>
    where
        M: LearnerModel
            + TrainStep<Input = MnistBatch, Output = Observed>
            + InferenceStep<Input = MnistBatch, Output = ClassificationOutput>,
    {
        let [train, test] = self.mnist.loaders(self.batch, items, device);
        let strategy = ExecutionStrategy::single(device.clone().autodiff());
        let mut training = SupervisedTraining::new(out, train, test)
            .metrics((AccuracyMetric::new(), LossMetric::new()))
            .with_training_strategy(strategy.into())
            .num_epochs(epochs)
            .summary();
        if !self.exact {
            training = training
                .metric_train_numeric(AopMetric::new(AopFigure::SavedFlops))
                .metric_train_numeric(rows_used);
            if chooses_k(&self.mnist.aop.config(self.mnist.seed)?) {
                training = training.metric_train_numeric(AopMetric::new(AopFigure::Noise));
            }
        }
        let optimizer = AdamConfig::new().init();
        self.mnist
            .launch(training, Learner::new(model, optimizer, self.lr))
    }
}
