use std::time::Instant;

use anyhow::Result;
use burn::{
    module::Module,
    nn::loss::{CrossEntropyLoss, CrossEntropyLossConfig},
    optim::{GradientsParams, ModuleOptimizer},
    tensor::{Device, Tensor},
};
use indicatif::{ProgressBar, ProgressStyle};
use memaop_examples::memory;
use serde::Serialize;

use crate::data::{Batch, Digits};

/// A model that gives each image a score for each digit.
pub trait Classifier: Module + 'static {
    fn scores(&self, images: Tensor<2>) -> Tensor<2>;

    /// The number of outer products in the last weight gradients, for a batch of `rows` images. 0
    /// if the model does not count them.
    fn outer_products(&self, rows: usize) -> usize {
        let _ = rows;
        0
    }
}

/// The outcome of one training.
#[derive(Serialize)]
pub struct Run {
    pub name: &'static str,
    /// The share of test images that are recognised.
    pub test_accuracy: f64,
    /// The mean training loss of the last part.
    pub loss: f64,
    /// The number of outer products in all weight gradients.
    pub outer_products: u64,
    /// The median time of a step: forward, backward, optimizer.
    pub step_ms: f64,
    /// The loss before the first step and the mean loss of each part, each with the time of all
    /// steps until then, in seconds.
    #[serde(skip)]
    pub losses: Vec<(f64, f64)>,
}

/// What a step allocates, in bytes.
#[derive(Serialize, Clone, Copy)]
pub struct Bytes {
    /// What is kept between the forward and the backward pass.
    pub kept: usize,
    /// The most at once, with weights and the optimizer's state.
    pub peak: usize,
}

/// A training in progress.
pub trait Training {
    /// Takes one step: forward, backward, optimizer.
    fn step(&mut self, batch: &Batch) -> Result<()>;

    /// Takes one step and returns what is allocated between its passes.
    fn step_and_count(&mut self, batch: &Batch) -> Result<usize>;

    /// Ends one of the parts of the training, for each of which there is a mean loss.
    fn end_part(&mut self);

    fn finish(self: Box<Self>, test: Batch) -> Run;
}

pub struct ClassifierTraining<M> {
    name: &'static str,
    /// Each step moves the model through the optimizer. With a clone beside it, the optimizer could
    /// not update the parameters in place.
    model: Option<M>,
    lr: f64,
    optimizer: ModuleOptimizer,
    loss: CrossEntropyLoss,
    /// The losses of the present part, on the device.
    part: Vec<Tensor<1>>,
    losses: Vec<(f64, f64)>,
    times: Vec<f64>,
    outer_products: u64,
}

impl<M: Classifier> ClassifierTraining<M> {
    pub fn new(
        name: &'static str,
        model: M,
        optimizer: ModuleOptimizer,
        lr: f64,
        device: &Device,
    ) -> Self {
        Self {
            name,
            model: Some(model),
            lr,
            optimizer,
            loss: CrossEntropyLossConfig::new().init(device),
            part: Vec::new(),
            losses: Vec::new(),
            times: Vec::new(),
            outer_products: 0,
        }
    }

    fn passes(&mut self, batch: &Batch, between: impl FnOnce()) -> Tensor<1> {
        let model = self.model.take().expect("put back by every step");
        let (images, labels) = (batch.images.clone(), batch.labels.clone());
        let loss = self.loss.forward(model.scores(images), labels);
        between();
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        self.model = Some(self.optimizer.step(self.lr, model, grads));
        loss.inner()
    }
}

impl<M: Classifier> Training for ClassifierTraining<M> {
    fn step(&mut self, batch: &Batch) -> Result<()> {
        let device = batch.images.device();
        device.sync()?;
        let start = Instant::now();
        let loss = self.passes(batch, || {});
        device.sync()?;
        self.times.push(start.elapsed().as_secs_f64() * 1e3);
        let model = self.model.as_ref().expect("put back by every step");
        self.outer_products += model.outer_products(batch.images.dims()[0]) as u64;
        if self.losses.is_empty() {
            self.losses.push((0.0, loss.clone().into_scalar()));
        }
        self.part.push(loss);
        Ok(())
    }

    fn step_and_count(&mut self, batch: &Batch) -> Result<usize> {
        let before = memory::alive();
        let mut kept = 0;
        self.passes(batch, || kept = memory::alive().saturating_sub(before));
        Ok(kept)
    }

    fn end_part(&mut self) {
        if self.part.is_empty() {
            return;
        }
        let losses = Tensor::cat(std::mem::take(&mut self.part), 0);
        let seconds = 1e-3 * self.times.iter().sum::<f64>();
        self.losses.push((seconds, losses.mean().into_scalar()));
    }

    fn finish(mut self: Box<Self>, test: Batch) -> Run {
        let model = self.model.expect("put back by every step");
        self.times.sort_by(f64::total_cmp);
        Run {
            name: self.name,
            test_accuracy: accuracy(&model, test),
            loss: self.losses.last().expect("at least one part").1,
            outer_products: self.outer_products,
            step_ms: self.times[self.times.len() / 2],
            losses: self.losses,
        }
    }
}

fn accuracy<M: Classifier>(model: &M, test: Batch) -> f64 {
    let found = model.valid().scores(test.images).argmax(1).squeeze_dim(1);
    let count = test.labels.dims()[0] as f64;
    let right = found.equal(test.labels).int().sum();
    right.into_scalar::<i64>() as f64 / count
}

/// The bytes of the third step of a training, which nothing else runs beside.
pub fn bytes(make: impl FnOnce() -> Box<dyn Training>, batch: &Batch) -> Result<Bytes> {
    let before = memory::alive();
    let mut training = make();
    for _ in 0..2 {
        training.step_and_count(batch)?;
    }
    memory::watch_peak();
    let kept = training.step_and_count(batch)?;
    let peak = memory::peak().saturating_sub(before);
    Ok(Bytes { kept, peak })
}

/// The number of parts of a training.
const PARTS: usize = 25;

/// Trains on the same batches in turns, a step each, so that the times can be compared.
pub fn train_in_turns(
    mut trainings: Vec<Box<dyn Training>>,
    digits: &Digits,
    [epochs, batch]: [usize; 2],
    seed: u64,
    device: &Device,
) -> Result<Vec<Run>> {
    let autodiff = device.clone().autodiff();
    let steps = epochs * digits.batches(batch);
    let style = ProgressStyle::with_template("{wide_bar} {percent:>3} % {eta:>4} left")?;
    let bar = ProgressBar::new(steps as u64).with_style(style);
    for epoch in 0..epochs as u64 {
        // Epochs of trainings with different seeds have different seeds too.
        for batch in digits.epoch(batch, seed << 32 | epoch, &autodiff) {
            for training in &mut trainings {
                training.step(&batch)?;
            }
            bar.inc(1);
            if bar.position().is_multiple_of(steps.div_ceil(PARTS) as u64) {
                trainings
                    .iter_mut()
                    .for_each(|training| training.end_part());
            }
        }
    }
    trainings
        .iter_mut()
        .for_each(|training| training.end_part());
    bar.finish();
    let finish = |training: Box<dyn Training>| training.finish(digits.test(device));
    Ok(trainings.into_iter().map(finish).collect())
}
