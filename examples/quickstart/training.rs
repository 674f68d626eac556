use std::time::Instant;

use anyhow::{Result, ensure};
use burn::{
    module::Module,
    nn::loss::{CrossEntropyLoss, CrossEntropyLossConfig},
    optim::{GradientsParams, SgdConfig},
    tensor::{Device, Tensor},
};
use indicatif::ProgressBar;
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
        ensure!(self.epochs > 0, "--epochs must be at least 1, but got 0");
        ensure!(
            (1..=train).contains(&self.batch),
            "--batch must be from 1 to {train}, but got {}",
            self.batch
        );
        ensure!(self.width > 0, "--width must be at least 1, but got 0");
        ensure!(
            self.lr.is_finite() && self.lr > 0.0,
            "--lr must be a positive number, but got {}",
            self.lr
        );
        Ok(())
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
    /// Outer products evaluated for weight gradients.
    pub outer_products: u64,
    /// The median time of a step: forward, backward, optimizer.
    pub step_ms: f64,
    #[serde(skip)]
    pub losses: Vec<f64>,
}

pub fn train<L: Dense>(
    layer: &'static str,
    mut model: Mlp<L>,
    digits: &Digits,
    settings: &Settings,
    device: &Device,
    bar: &ProgressBar,
) -> Result<Run> {
    let autodiff = device.clone().autodiff();
    let loss = CrossEntropyLossConfig::new().init(&autodiff);
    let mut optimizer = SgdConfig::new().init();
    let mut losses = Vec::new();
    let mut times = Vec::new();
    let mut outer_products = 0;

    for epoch in 0..settings.epochs as u64 {
        // The seeds of the epochs of one training do not meet those of another.
        let seed = settings.seed << 32 | epoch;
        let mut sum = Tensor::<1>::zeros([1], device);
        let mut count = 0.0;
        for batch in digits.epoch(settings.batch, seed, &autodiff) {
            device.sync()?;
            let start = Instant::now();
            let value = step(&mut model, &loss, batch, |model, grads| {
                optimizer.step(settings.lr, model, grads)
            });
            device.sync()?;
            times.push(start.elapsed().as_secs_f64() * 1e3);

            sum = sum + value;
            count += 1.0;
            outer_products += model.outer_products(settings.batch) as u64;
            bar.inc(1);
        }
        losses.push(sum.into_scalar::<f64>() / count);
    }
    bar.finish();

    times.sort_by(f64::total_cmp);
    Ok(Run {
        layer,
        test_accuracy: accuracy(&model, digits.test(device)),
        loss: *losses.last().expect("at least one epoch"),
        outer_products,
        step_ms: times[times.len() / 2],
        losses,
    })
}

/// One training step; returns the loss, without waiting for it.
fn step<L: Dense>(
    model: &mut Mlp<L>,
    loss: &CrossEntropyLoss,
    batch: Batch,
    mut optimize: impl FnMut(Mlp<L>, GradientsParams) -> Mlp<L>,
) -> Tensor<1> {
    let loss = loss.forward(model.forward(batch.images), batch.labels);
    let grads = GradientsParams::from_grads(loss.backward(), model);
    *model = optimize(model.clone(), grads);
    loss.inner()
}

fn accuracy<L: Dense>(model: &Mlp<L>, test: Batch) -> f64 {
    let found = model.valid().forward(test.images).argmax(1).squeeze_dim(1);
    let count = test.labels.dims()[0] as f64;
    let right = found.equal(test.labels).int().sum();
    right.into_scalar::<i64>() as f64 / count
}
