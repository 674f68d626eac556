use std::time::Instant;

use burn::{
    module::Module,
    optim::{AdamConfig, GradientsParams, ModuleOptimizer},
};
use memaop_mnist::{MnistBatch, classified};

use crate::model::{Cnn, Convolution, Dense};

/// A training of one model, step by step.
pub struct Training<C: Convolution, D: Dense> {
    model: Cnn<C, D>,
    optimizer: ModuleOptimizer,
    lr: f64,
}

impl<C: Convolution, D: Dense> Training<C, D> {
    pub fn new(model: Cnn<C, D>, lr: f64) -> Self {
        Self {
            model,
            optimizer: AdamConfig::new().init(),
            lr,
        }
    }

    pub fn model(&self) -> &Cnn<C, D> {
        &self.model
    }
}

/// A training of any model.
pub trait Train {
    /// Takes one step, and returns its time in seconds.
    fn step(&mut self, batch: MnistBatch) -> f64;
    /// The share of the images that are recognised.
    fn accuracy(&self, batches: &[MnistBatch]) -> f64;
}

impl<C: Convolution, D: Dense> Train for Training<C, D> {
    fn step(&mut self, batch: MnistBatch) -> f64 {
        let device = batch.images.device();
        device.sync().expect("the device works");
        let start = Instant::now();
        let output = classified(self.model.forward(batch.images), batch.labels);
        let grads = GradientsParams::from_grads(output.loss.backward(), &self.model);
        self.model = self.optimizer.step(self.lr, self.model.clone(), grads);
        device.sync().expect("the device works");
        start.elapsed().as_secs_f64()
    }

    fn accuracy(&self, batches: &[MnistBatch]) -> f64 {
        let model = self.model.valid();
        let (mut right, mut all) = (0, 0);
        for batch in batches {
            let found = model.forward(batch.images.clone()).argmax(1);
            let found = found.squeeze_dim::<1>(1).into_data();
            let labels = batch.labels.clone().into_data();
            let pairs = found.iter::<i64>().zip(labels.iter::<i64>());
            right += pairs.filter(|(found, label)| found == label).count();
            all += batch.labels.dims()[0];
        }
        right as f64 / all as f64
    }
}
