use std::time::Instant;

use anyhow::{Result, ensure};
use burn::{
    module::Module,
    nn::loss::{CrossEntropyLoss, CrossEntropyLossConfig},
    optim::{GradientsParams, ModuleOptimizer, SgdConfig},
    tensor::{Device, Tensor},
};
use memaop_examples::check;
use serde::Serialize;

use crate::{
    data::{Batch, Digits},
    model::{Dense, Mlp},
};

pub struct Settings {
    pub epochs: usize,
    pub batch: usize,
    pub width: usize,
    pub lr: f64,
    pub seed: u64,
}

impl Settings {
    pub fn validate(&self) -> Result<()> {
        let train = Digits::load().train_len();
        check::at_least_one(&[("epochs", self.epochs), ("width", self.width)])?;
        ensure!(
            (1..=train).contains(&self.batch),
            "--batch must be from 1 to {train}, but got {}",
            self.batch
        );
        check::positive("lr", self.lr)
    }
}

/// The outcome of one training.
#[derive(Serialize)]
pub struct Run {
    pub layer: &'static str,
    /// The share of test images that are recognised.
    pub test_accuracy: f64,
    /// The mean training loss of the last epoch.
    pub loss: f64,
    /// The number of outer products in all weight gradients.
    pub outer_products: u64,
    /// The median time of a step: forward, backward, optimizer.
    pub step_ms: f64,
    /// The mean loss of each epoch; `seconds` has the time of all steps until its end.
    #[serde(skip)]
    pub losses: Vec<f64>,
    #[serde(skip)]
    pub seconds: Vec<f64>,
}

/// A training in progress. Two of them can take turns, so that their times can be compared.
pub struct Training<L: Dense> {
    layer: &'static str,
    /// Each step moves the model through the optimizer. With a clone beside it, the optimizer could
    /// not update the parameters in place.
    model: Option<Mlp<L>>,
    lr: f64,
    optimizer: ModuleOptimizer,
    loss: CrossEntropyLoss,
    /// The losses of the present epoch, on the device.
    epoch: Vec<Tensor<1>>,
    losses: Vec<f64>,
    seconds: Vec<f64>,
    times: Vec<f64>,
    outer_products: u64,
}

impl<L: Dense> Training<L> {
    pub fn new(layer: &'static str, model: Mlp<L>, lr: f64, device: &Device) -> Self {
        Self {
            layer,
            model: Some(model),
            lr,
            optimizer: SgdConfig::new().init(),
            loss: CrossEntropyLossConfig::new().init(device),
            epoch: Vec::new(),
            losses: Vec::new(),
            seconds: Vec::new(),
            times: Vec::new(),
            outer_products: 0,
        }
    }

    /// Takes one step: forward, backward, optimizer.
    pub fn step(&mut self, batch: &Batch) -> Result<()> {
        let rows = batch.images.dims()[0];
        let model = self.model.take().expect("put back by every step");
        let (images, labels) = (batch.images.clone(), batch.labels.clone());
        let device = images.device();

        device.sync()?;
        let start = Instant::now();
        let loss = self.loss.forward(model.forward(images), labels);
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        let model = self.optimizer.step(self.lr, model, grads);
        device.sync()?;
        self.times.push(start.elapsed().as_secs_f64() * 1e3);
        self.outer_products += model.outer_products(rows) as u64;
        self.model = Some(model);

        self.epoch.push(loss.inner());
        Ok(())
    }

    pub fn end_epoch(&mut self) {
        let losses = Tensor::cat(std::mem::take(&mut self.epoch), 0);
        self.losses.push(losses.mean().into_scalar());
        self.seconds.push(1e-3 * self.times.iter().sum::<f64>());
    }

    pub fn finish(mut self, test: Batch) -> Run {
        let model = self.model.expect("put back by every step");
        self.times.sort_by(f64::total_cmp);
        Run {
            layer: self.layer,
            test_accuracy: accuracy(&model, test),
            loss: *self.losses.last().expect("at least one epoch"),
            outer_products: self.outer_products,
            step_ms: self.times[self.times.len() / 2],
            losses: self.losses,
            seconds: self.seconds,
        }
    }
}

fn accuracy<L: Dense>(model: &Mlp<L>, test: Batch) -> f64 {
    let found = model.valid().forward(test.images).argmax(1).squeeze_dim(1);
    let count = test.labels.dims()[0] as f64;
    let right = found.equal(test.labels).int().sum();
    right.into_scalar::<i64>() as f64 / count
}
