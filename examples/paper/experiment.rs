use anyhow::{Result, bail, ensure};
use burn::{
    module::{Module, Param},
    nn::Linear,
    optim::{GradientsParams, SgdConfig},
    tensor::{
        Device, Int, Tensor, TensorData,
        activation::{log_softmax, softmax},
    },
};
use burn_memaop::{AopConfig, MemAopLinear, Memory, Method, OuterProducts, baseline::Baseline};
use clap::ValueEnum;
use rand::{RngExt, SeedableRng, rngs::StdRng, seq::SliceRandom};
use serde::{Deserialize, Serialize};

use crate::data::{Data, Dataset, Rows};

const LEARNING_RATE: f64 = 0.01;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lower")]
pub enum PolicyName {
    Exact,
    TopK,
    RandK,
    WeightedK,
    /// Not in the paper.
    Systematic,
}

impl PolicyName {
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::TopK => "topk",
            Self::RandK => "randk",
            Self::WeightedK => "weightedk",
            Self::Systematic => "systematic",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemoryName {
    None,
    Published,
    /// Not in the paper.
    Balanced,
}

/// A series of the paper: the same training, run several times.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    pub dataset: Dataset,
    pub policy: PolicyName,
    pub memory: MemoryName,
    pub k: usize,
}

impl Setting {
    pub fn exact(dataset: Dataset) -> Self {
        Self {
            dataset,
            policy: PolicyName::Exact,
            memory: MemoryName::None,
            k: dataset.batch(),
        }
    }

    /// The exact series of an experiment, and for each K every policy with and without memory.
    pub fn all(dataset: Dataset) -> Vec<Self> {
        let mut settings = vec![Self::exact(dataset)];
        for k in dataset.ks() {
            for policy in [PolicyName::TopK, PolicyName::RandK, PolicyName::WeightedK] {
                for memory in [MemoryName::None, MemoryName::Published] {
                    settings.push(Self {
                        dataset,
                        policy,
                        memory,
                        k,
                    });
                }
            }
        }
        settings
    }

    /// The name of the series, which is its key among the published results.
    pub fn name(&self) -> String {
        let memory = match self.memory {
            MemoryName::None => "",
            MemoryName::Published => "-mem",
            MemoryName::Balanced => "-balanced",
        };
        let (dataset, policy) = (self.dataset.name(), self.policy.name());
        format!("{dataset}-{policy}{memory}-k{}", self.k)
    }

    pub fn validate(&self) -> Result<()> {
        let batch = self.dataset.batch();
        ensure!(
            (1..=batch).contains(&self.k),
            "--k must be from 1 to {batch}, the size of a batch, but got {}",
            self.k
        );
        if self.policy == PolicyName::Exact && self.memory != MemoryName::None {
            bail!("--policy exact leaves no rows out, so it has --memory none");
        }
        if self.policy == PolicyName::Systematic && self.memory != MemoryName::None {
            bail!("--policy systematic weighs the rows that it draws, so it has --memory none");
        }
        if let Some(aop) = self.aop(0) {
            aop.validate()?;
        }
        Ok(())
    }

    fn aop(&self, seed: u64) -> Option<AopConfig> {
        let memory = match self.memory {
            MemoryName::None => Memory::None,
            MemoryName::Published => Memory::Published { decay: 1.0 },
            MemoryName::Balanced => Memory::Balanced { decay: 0.9 },
        };
        let method = match self.policy {
            PolicyName::Exact => return None,
            PolicyName::TopK => Method::TopK(memory),
            PolicyName::RandK => Method::Baseline(Baseline::RandK(memory)),
            PolicyName::WeightedK => Method::Baseline(Baseline::WeightedK(memory)),
            PolicyName::Systematic => Method::Systematic,
        };
        Some(
            AopConfig::new()
                .with_outer_products(OuterProducts::Count(self.k))
                .with_method(method)
                .with_cost_rule(false)
                .with_seed(seed),
        )
    }
}

/// The values of one run after each epoch.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Curves {
    /// The mean loss of the batches, each measured before its step.
    pub loss: Vec<f64>,
    pub loss_val: Vec<f64>,
    /// The share of the validation set that is recognised; empty for Energy.
    pub acc_val: Vec<f64>,
}

/// The model of both experiments.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)] // Only one value lives at a time.
enum Layer {
    Exact(Linear),
    Approximate(MemAopLinear),
}

impl Layer {
    /// Draws weights and bias uniformly from `±1 / sqrt(d_input)`.
    fn new(d_input: usize, d_output: usize, aop: Option<AopConfig>, random: &mut StdRng) -> Self {
        let device = Device::flex().autodiff();
        let bound = 1.0 / (d_input as f32).sqrt();
        let mut uniform = |count: usize| -> Vec<f32> {
            let values = (0..count).map(|_| random.random_range(-bound..bound));
            values.collect()
        };
        let weight = TensorData::new(uniform(d_input * d_output), [d_input, d_output]);
        let bias = TensorData::new(uniform(d_output), [d_output]);
        let linear = Linear {
            weight: Param::from_data(weight, &device),
            bias: Some(Param::from_data(bias, &device)),
        };
        match aop {
            None => Self::Exact(linear),
            Some(aop) => Self::Approximate(MemAopLinear::from_linear(linear, aop)),
        }
    }

    fn forward(&self, input: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Exact(layer) => layer.forward(input),
            Self::Approximate(layer) => layer.forward(input),
        }
    }
}

/// Some rows of a split, as tensors.
struct Batch {
    inputs: Tensor<2>,
    targets: Tensor<2>,
}

impl Batch {
    fn new(rows: &Rows, indices: &[usize], device: &Device) -> Self {
        let mut inputs = Vec::with_capacity(indices.len() * rows.width);
        for &index in indices {
            inputs.extend_from_slice(&rows.inputs[index * rows.width..][..rows.width]);
        }
        let targets: Vec<f32> = indices.iter().map(|&index| rows.targets[index]).collect();
        Self {
            inputs: Tensor::from_data(TensorData::new(inputs, [indices.len(), rows.width]), device),
            targets: Tensor::from_data(TensorData::new(targets, [indices.len(), 1]), device),
        }
    }
}

fn loss(dataset: Dataset, output: Tensor<2>, targets: Tensor<2>) -> Tensor<1> {
    match dataset {
        Dataset::Energy => (output - targets).square().mean(),
        // The authors give probabilities to a loss that expects logits: the softmax is taken twice.
        Dataset::Mnist => {
            let logs = log_softmax(softmax(output, 1), 1);
            -logs.gather(1, targets.int()).mean()
        }
    }
}

/// Trains for `epochs` epochs, and calls `after_epoch` after each of them.
pub fn run(
    data: &Data,
    setting: &Setting,
    epochs: usize,
    seed: u64,
    after_epoch: impl Fn(),
) -> Curves {
    let dataset = data.dataset;
    let device = Device::flex();
    let autodiff = device.clone().autodiff();
    let mut random = StdRng::seed_from_u64(seed);
    let aop = setting.aop(seed);
    let mut layer = Layer::new(data.train.width, dataset.outputs(), aop, &mut random);
    let mut optimizer = SgdConfig::new().init();

    // A smaller last batch is left out, in validation too. Energy is validated as one batch.
    let validated = match dataset {
        Dataset::Energy => data.validation.len(),
        Dataset::Mnist => data.validation.len() / dataset.batch() * dataset.batch(),
    };
    let validated: Vec<_> = (0..validated).collect();
    let validation = Batch::new(&data.validation, &validated, &device);

    let mut order: Vec<_> = (0..data.train.len()).collect();
    let mut curves = Curves::default();
    for _ in 0..epochs {
        order.shuffle(&mut random);
        let mut sum = 0.0;
        let mut steps = 0.0;
        for indices in order.chunks_exact(dataset.batch()) {
            let batch = Batch::new(&data.train, indices, &autodiff);
            let loss = loss(dataset, layer.forward(batch.inputs), batch.targets);
            let grads = GradientsParams::from_grads(loss.backward(), &layer);
            sum += loss.into_scalar::<f64>();
            steps += 1.0;
            layer = optimizer.step(LEARNING_RATE, layer, grads);
        }
        curves.loss.push(sum / steps);

        let output = layer.valid().forward(validation.inputs.clone());
        let loss = loss(dataset, output.clone(), validation.targets.clone());
        curves.loss_val.push(loss.into_scalar::<f64>());
        if dataset == Dataset::Mnist {
            let labels: Tensor<2, Int> = validation.targets.clone().int();
            let right = output.argmax(1).equal(labels).int().sum();
            let right = right.into_scalar::<i64>() as f64;
            curves.acc_val.push(right / validated.len() as f64);
        }
        after_epoch();
    }
    curves
}
