use std::{f64::consts::PI, time::Instant};

use anyhow::Result;
use burn::{
    module::Module,
    nn::loss::{CrossEntropyLoss, CrossEntropyLossConfig},
    optim::{AdamConfig, GradientsParams, ModuleOptimizer},
    tensor::{Device, Int, Tensor, TensorData, activation::softmax},
};
use memaop_examples::{Encoder, added_noise};
use rand::{RngExt, rngs::StdRng};
use serde::Serialize;

use crate::{model::CharLm, text::Batch};

/// The course of one training.
#[derive(Debug, Clone, Serialize)]
pub struct Run {
    pub seed: u64,
    /// The steps after which loss and time were measured.
    pub steps: Vec<usize>,
    /// The mean cross-entropy of the next character in the validation text, in nats.
    pub validation_loss: Vec<f64>,
    /// R, the variance that drawn rows add to that of the batch.
    pub added_noise: Vec<Option<f64>>,
    /// The time of all steps until then (forward, backward, optimizer).
    pub seconds: Vec<f64>,
    /// The median time of a step.
    pub step_ms: f64,
}

/// A training in progress. Several can take turns, so that their times can be compared.
pub struct Training<E: Encoder> {
    /// The model, which each step moves through the optimizer.
    model: Option<CharLm<E>>,
    optimizer: ModuleOptimizer,
    lr: f64,
    /// The number of steps in which the learning rate falls to zero by a cosine, if it does.
    falling: Option<usize>,
    loss: CrossEntropyLoss,
    device: Device,
    times: Vec<f64>,
    run: Run,
}

/// A training of any model.
pub trait Contender {
    /// Takes one step: forward, backward, optimizer.
    fn step(&mut self, batch: &Batch) -> Result<()>;
    fn validate(&mut self, batches: &[Batch]) -> f64;
    /// Writes `count` characters after `start`, each from the last `length` ones.
    fn sample(&self, start: &[i64], count: usize, length: usize, random: &mut StdRng) -> Vec<i64>;
    fn finish(&mut self) -> Run;
}

impl<E: Encoder> Training<E> {
    pub fn new(
        model: CharLm<E>,
        lr: f64,
        falling: Option<usize>,
        seed: u64,
        device: &Device,
    ) -> Self {
        Self {
            model: Some(model),
            optimizer: AdamConfig::new().init(),
            lr,
            falling,
            loss: CrossEntropyLossConfig::new().init(device),
            device: device.clone(),
            times: Vec::new(),
            run: Run {
                seed,
                steps: Vec::new(),
                validation_loss: Vec::new(),
                added_noise: Vec::new(),
                seconds: Vec::new(),
                step_ms: f64::NAN,
            },
        }
    }

    fn model(&self) -> &CharLm<E> {
        self.model.as_ref().expect("put back by every step")
    }
}

impl<E: Encoder> Contender for Training<E> {
    fn step(&mut self, batch: &Batch) -> Result<()> {
        let model = self.model.take().expect("put back by every step");
        let Batch { tokens, next } = batch.clone();
        let device = tokens.device();
        let share = |steps| self.times.len() as f64 / steps as f64;
        let rate = self.lr * (1.0 + (PI * self.falling.map_or(0.0, share)).cos()) / 2.0;

        device.sync()?;
        let start = Instant::now();
        let loss = self.loss.forward(model.forward(tokens), next);
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        self.model = Some(self.optimizer.step(rate, model, grads));
        device.sync()?;
        self.times.push(start.elapsed().as_secs_f64());
        Ok(())
    }

    fn validate(&mut self, batches: &[Batch]) -> f64 {
        let model = self.model().valid();
        let losses = batches.iter().map(|Batch { tokens, next }| -> f64 {
            let output = model.forward(tokens.clone().inner());
            let loss = self.loss.forward(output, next.clone().inner());
            loss.into_scalar()
        });
        let loss = losses.sum::<f64>() / batches.len() as f64;
        self.run.steps.push(self.times.len());
        self.run.validation_loss.push(loss);
        self.run.added_noise.push(added_noise(self.model()));
        self.run.seconds.push(self.times.iter().sum());
        loss
    }

    fn sample(&self, start: &[i64], count: usize, length: usize, random: &mut StdRng) -> Vec<i64> {
        let model = self.model().valid();
        let mut tokens = start.to_vec();
        for _ in 0..count {
            let context = &tokens[tokens.len().saturating_sub(length)..];
            let context = TensorData::new(context.to_vec(), [1, context.len()]);
            let context = Tensor::<2, Int>::from_data(context, &self.device);
            let logits = model.forward(context.inner());
            let [last, vocabulary] = logits.dims();
            let next = softmax(logits.slice([last - 1..last, 0..vocabulary]), 1);
            let mut left: f64 = random.random();
            let chosen = next.into_data().iter::<f64>().position(|p| {
                left -= p;
                left < 0.0
            });
            tokens.push(chosen.unwrap_or(vocabulary - 1) as i64);
        }
        tokens.split_off(start.len())
    }

    fn finish(&mut self) -> Run {
        self.times.sort_by(f64::total_cmp);
        self.run.step_ms = 1e3 * self.times[self.times.len() / 2];
        self.run.clone()
    }
}
