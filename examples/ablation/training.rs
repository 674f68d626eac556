use std::{f64::consts::PI, path::Path, time::Instant};

use anyhow::Result;
use burn::{
    module::{Module, Param},
    nn::{
        Initializer, LinearConfig,
        loss::{CrossEntropyLoss, CrossEntropyLossConfig},
    },
    optim::{AdamConfig, GradientsParams, ModuleOptimizer, SgdConfig, momentum::MomentumConfig},
    tensor::{Device, Int, Tensor, TensorData, activation::relu},
};
use burn_memaop::MemAopLinear;
use memaop_examples::{
    added_noise,
    mnist::{self, PIXELS, Split},
};
use rand::{RngExt, SeedableRng, rngs::StdRng, seq::SliceRandom};
use serde::{Deserialize, Serialize};

use crate::setting::{Optimizer, Setting};

const CLASSES: usize = 10;
/// The number of images that are tested at a time.
const TEST_BATCH: usize = 1000;

/// MNIST, standardised by the mean and the standard deviation of the training pixels.
pub struct Data {
    pub train: Images,
    pub test: Images,
}

pub struct Images {
    pixels: Vec<f32>,
    labels: Vec<u8>,
}

impl Data {
    pub fn load(folder: &Path) -> Result<Self> {
        let load = |split| -> Result<Images> {
            let images = mnist::read(folder, split)?;
            let scale = |&pixel: &u8| (f32::from(pixel) / 255.0 - 0.1307) / 0.3081;
            Ok(Images {
                pixels: images.pixels.iter().map(scale).collect(),
                labels: images.labels,
            })
        };
        Ok(Self {
            train: load(Split::Train)?,
            test: load(Split::Test)?,
        })
    }
}

impl Images {
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    fn batch(&self, indices: &[usize], device: &Device) -> (Tensor<2>, Tensor<1, Int>) {
        let mut pixels = Vec::with_capacity(indices.len() * PIXELS);
        for &index in indices {
            pixels.extend_from_slice(&self.pixels[index * PIXELS..][..PIXELS]);
        }
        let labels: Vec<_> = indices.iter().map(|&i| i64::from(self.labels[i])).collect();
        let pixels = TensorData::new(pixels, [indices.len(), PIXELS]);
        let labels = TensorData::new(labels, [indices.len()]);
        (
            Tensor::from_data(pixels, device),
            Tensor::from_data(labels, device),
        )
    }
}

#[derive(Module, Debug)]
struct Mlp {
    layers: Vec<MemAopLinear>,
}

impl Mlp {
    /// Draws weights and biases uniformly from ±1/sqrt(inputs), as Burn does for its `Linear`, but
    /// with a generator that trainings on other threads do not share.
    fn new(setting: &Setting, random: &mut StdRng, device: &Device) -> Self {
        let mut inputs = PIXELS;
        let outputs = setting.widths.iter().copied().chain([CLASSES]);
        let layers = outputs.map(|outputs| {
            let mut linear = LinearConfig::new(inputs, outputs)
                .with_initializer(Initializer::Zeros)
                .init(device);
            let bound = 1.0 / (inputs as f32).sqrt();
            let mut uniform = |count| -> Vec<f32> {
                let values = (0..count).map(|_| random.random_range(-bound..bound));
                values.collect()
            };
            let weight = TensorData::new(uniform(inputs * outputs), [inputs, outputs]);
            let bias = TensorData::new(uniform(outputs), [outputs]);
            linear.weight = Param::from_tensor(Tensor::from_data(weight, device));
            linear.bias = Some(Param::from_tensor(Tensor::from_data(bias, device)));
            inputs = outputs;
            let aop = setting.aop(random.random());
            MemAopLinear::from_linear(linear, aop.expect("settings are validated"))
        });
        Self {
            layers: layers.collect(),
        }
    }

    fn forward(&self, images: Tensor<2>) -> Tensor<2> {
        let (last, hidden) = self.layers.split_last().expect("at least one layer");
        let hidden = hidden
            .iter()
            .fold(images, |input, layer| relu(layer.forward(input)));
        last.forward(hidden)
    }

    fn test(&self, images: &Images, device: &Device) -> Tested {
        let model = self.valid();
        let entropy = CrossEntropyLossConfig::new().init(device);
        let indices: Vec<_> = (0..images.len()).collect();
        let (mut right, mut loss) = (0, 0.0);
        for indices in indices.chunks(TEST_BATCH) {
            let (pixels, labels) = images.batch(indices, device);
            let output = model.forward(pixels);
            let mean: f64 = entropy
                .forward(output.clone(), labels.clone())
                .into_scalar();
            loss += mean * indices.len() as f64;
            let found = output.argmax(1).squeeze_dim(1);
            right += found.equal(labels).int().sum().into_scalar::<i64>();
        }
        let count = images.len() as f64;
        Tested {
            accuracy: right as f64 / count,
            loss: loss / count,
        }
    }
}

/// How well a model does on the test images.
pub struct Tested {
    /// The share of the images that are recognised.
    pub accuracy: f64,
    /// The mean cross-entropy.
    pub loss: f64,
}

/// The outcome of one training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    pub seed: u64,
    /// The share of test images that are recognised, after each epoch.
    pub test_accuracy: Vec<f64>,
    /// The time of each epoch's steps: forward, backward, optimizer.
    pub train_seconds: Vec<f64>,
}

/// Trains, and calls `after_epoch` after each epoch.
pub fn run(data: &Data, setting: &Setting, seed: u64, after_epoch: impl Fn()) -> Run {
    let mut training = Training::new(data, setting, seed);
    let mut run = Run {
        seed,
        test_accuracy: Vec::new(),
        train_seconds: Vec::new(),
    };
    for _ in 0..setting.epochs {
        let seconds = training.advance(data.train.len() / setting.batch);
        run.train_seconds.push(seconds);
        run.test_accuracy.push(training.test().accuracy);
        after_epoch();
    }
    run
}

/// A training in progress. A smaller last batch of an epoch is left out.
pub struct Training<'a> {
    data: &'a Data,
    setting: &'a Setting,
    /// The model, which each step moves through the optimizer.
    model: Option<Mlp>,
    optimizer: ModuleOptimizer,
    loss: CrossEntropyLoss,
    device: Device,
    random: StdRng,
    order: Vec<usize>,
    /// The number of the next batch of the epoch.
    next: usize,
    /// The number of steps so far.
    taken: usize,
    /// The number of steps in which the learning rate falls to zero by a cosine, if it does.
    steps: Option<usize>,
}

impl<'a> Training<'a> {
    pub fn new(data: &'a Data, setting: &'a Setting, seed: u64) -> Self {
        let device = Device::flex().autodiff();
        let mut random = StdRng::seed_from_u64(seed);
        let model = Mlp::new(setting, &mut random, &device);
        let optimizer = match setting.optimizer {
            Optimizer::Sgd if setting.momentum > 0.0 => {
                let momentum = MomentumConfig::new()
                    .with_momentum(setting.momentum)
                    .with_dampening(0.0);
                SgdConfig::new().with_momentum(Some(momentum)).init()
            }
            Optimizer::Sgd => SgdConfig::new().init(),
            Optimizer::Adam => AdamConfig::new().init(),
        };
        Self {
            data,
            setting,
            model: Some(model),
            optimizer,
            loss: CrossEntropyLossConfig::new().init(&device),
            device,
            random,
            order: (0..data.train.len()).collect(),
            next: 0,
            taken: 0,
            steps: None,
        }
    }

    /// The same with a learning rate that falls to zero in so many steps, by a cosine.
    pub fn falling(self, steps: usize) -> Self {
        Self {
            steps: Some(steps),
            ..self
        }
    }

    fn rate(&self) -> f64 {
        let share = self
            .steps
            .map_or(0.0, |steps| self.taken as f64 / steps as f64);
        self.setting.lr * (1.0 + (PI * share).cos()) / 2.0
    }

    /// Takes some steps (forward, backward, optimizer), and returns their time in seconds.
    pub fn advance(&mut self, steps: usize) -> f64 {
        let batch = self.setting.batch;
        let mut seconds = 0.0;
        for _ in 0..steps {
            if self.next == 0 {
                self.order.shuffle(&mut self.random);
            }
            let indices = &self.order[self.next * batch..][..batch];
            self.next = (self.next + 1) % (self.order.len() / batch);
            let (images, labels) = self.data.train.batch(indices, &self.device);

            let rate = self.rate();
            let start = Instant::now();
            let model = self.model.take().expect("put back by every step");
            let loss = self.loss.forward(model.forward(images), labels);
            let grads = GradientsParams::from_grads(loss.backward(), &model);
            self.model = Some(self.optimizer.step(rate, model, grads));
            seconds += start.elapsed().as_secs_f64();
            self.taken += 1;
        }
        seconds
    }

    /// The variance that drawn rows have added since the last call, relative to that of the batch:
    /// the mean over the layers that report it, weighed by their operations.
    pub fn added_noise(&self) -> Option<f64> {
        added_noise(self.model.as_ref().expect("put back by every step"))
    }

    /// Tests the model as it is now.
    pub fn test(&self) -> Tested {
        let model = self.model.as_ref().expect("put back by every step");
        model.test(&self.data.test, &Device::flex())
    }
}
