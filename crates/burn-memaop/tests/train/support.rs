//! A small model, data, and a renderer that says nothing.

use std::{path::Path, sync::Arc};

use burn::{
    data::{
        dataloader::{DataLoader, DataLoaderBuilder, batcher::Batcher},
        dataset::InMemDataset,
    },
    module::{Module, Param},
    nn::{
        Linear,
        loss::{MseLoss, Reduction},
    },
    tensor::{Device, ExecutionError, Tensor, TensorData, activation::relu},
    train::{
        InferenceStep, ItemLazy, LearningResult, SupervisedTraining, TrainOutput, TrainStep,
        checkpoint::KeepLastNCheckpoints,
        logger::{EvaluationProgressLogger, TrainingProgressLogger},
        metric::{Adaptor, LossInput, LossMetric, MetricDefinition},
        renderer::{
            EvaluationName, MetricState, MetricsRenderer, MetricsRendererEvaluation,
            MetricsRendererTraining,
        },
    },
};
use burn_memaop::{
    AopConfig, AopObserver, AopReport, MemAopLinear, Memory, Method, OuterProducts,
    baseline::Baseline,
};

pub const BATCH: usize = 16;

pub fn aop() -> AopConfig {
    AopConfig::new()
        .with_outer_products(OuterProducts::Count(4))
        .with_method(Method::Baseline(Baseline::WeightedK(Memory::Balanced {
            decay: 0.9,
        })))
        .with_cost_rule(false)
}

#[derive(Module, Debug)]
pub struct Net {
    pub first: MemAopLinear,
    pub second: MemAopLinear,
    #[module(skip)]
    observer: Option<AopObserver>,
}

impl Net {
    pub fn new(aop: AopConfig, observer: Option<AopObserver>, device: &Device) -> Self {
        // The generator of the device is that of other tests too.
        let layer = |d_input: usize, d_output: usize, seed| {
            let values: Vec<f32> = (0..d_input * d_output)
                .map(|i| (i as f32 * 0.83 + seed as f32).sin() * 0.5)
                .collect();
            let weight = TensorData::new(values, [d_input, d_output]);
            let linear = Linear {
                weight: Param::from_tensor(Tensor::from_data(weight, device)),
                bias: Some(Param::from_tensor(Tensor::zeros([d_output], device))),
            };
            MemAopLinear::from_linear(linear, aop.with_seed(seed))
        };
        Self {
            first: layer(6, 24, 1),
            second: layer(24, 2, 2),
            observer,
        }
    }

    pub fn forward(&self, input: Tensor<2>) -> Tensor<2> {
        self.second.forward(relu(self.first.forward(input)))
    }

    fn loss(&self, batch: Batch) -> Tensor<1> {
        MseLoss::new().forward(self.forward(batch.input), batch.target, Reduction::Mean)
    }

    /// Weights, and a gradient, which depends on the memories.
    pub fn fingerprint(&self) -> Vec<u32> {
        let device = Device::flex().autodiff();
        let model = self.clone().train();
        let batch = Batcher::batch(&Points, points(BATCH), &device);
        let grads = model.loss(batch).backward();
        let mut values = Vec::new();
        for layer in [&model.first, &model.second] {
            for tensor in [
                layer.weight.val().inner(),
                layer.weight.grad(&grads).unwrap(),
            ] {
                values.extend(tensor.into_data().iter::<f32>().map(f32::to_bits));
            }
        }
        values
    }
}

#[derive(Clone, Debug)]
pub struct Batch {
    pub input: Tensor<2>,
    pub target: Tensor<2>,
}

pub struct Output {
    loss: Tensor<1>,
    aop: AopReport,
}

impl TrainStep for Net {
    type Input = Batch;
    type Output = Output;

    fn step(&self, batch: Batch) -> TrainOutput<Output> {
        let loss = self.loss(batch);
        let grads = loss.backward();
        let aop = self.observer.map(|observer| observer.observe(self));
        let aop = aop.unwrap_or_default();
        TrainOutput::new(self, grads, Output { loss, aop })
    }
}

impl InferenceStep for Net {
    type Input = Batch;
    type Output = Output;

    fn step(&self, batch: Batch) -> Output {
        Output {
            loss: self.loss(batch),
            aop: AopReport::default(),
        }
    }
}

impl ItemLazy for Output {
    fn sync(self) -> Result<Self, ExecutionError> {
        Ok(Self {
            loss: self.loss.without_autodiff(),
            aop: self.aop.sync()?,
        })
    }
}

impl Adaptor<LossInput> for Output {
    fn adapt(&self) -> LossInput {
        LossInput::new(self.loss.clone())
    }
}

impl Adaptor<AopReport> for Output {
    fn adapt(&self) -> AopReport {
        self.aop.clone()
    }
}

/// Points and what a fixed function makes of them.
pub fn points(count: usize) -> Vec<[f32; 8]> {
    let point = |i: usize| {
        let mut values = [0.0; 8];
        for (j, value) in values[..6].iter_mut().enumerate() {
            *value = ((i * (j + 3)) as f32 * 0.37).sin() * (1.0 + (i % 5) as f32);
        }
        values[6] = values[0] * values[1] - values[2];
        values[7] = values[3].abs() + values[4] * values[5];
        values
    };
    (0..count).map(point).collect()
}

#[derive(Clone, Default)]
pub struct Points;

impl Batcher<[f32; 8], Batch> for Points {
    fn batch(&self, items: Vec<[f32; 8]>, device: &Device) -> Batch {
        let take = |range: std::ops::Range<usize>| {
            let width = range.len();
            let values: Vec<f32> = items
                .iter()
                .flat_map(|item| &item[range.clone()])
                .copied()
                .collect();
            Tensor::from_data(TensorData::new(values, [items.len(), width]), device)
        };
        Batch {
            input: take(0..6),
            target: take(6..8),
        }
    }
}

pub fn loader(count: usize, shuffle: bool) -> Arc<dyn DataLoader<Batch>> {
    let builder = DataLoaderBuilder::new(Points)
        .batch_size(BATCH)
        .num_workers(0);
    let builder = if shuffle { builder.shuffle(3) } else { builder };
    builder.build(InMemDataset::new(points(count)))
}

/// A training without output, and with the last two checkpoints kept.
pub fn training(folder: &Path, train: Arc<dyn DataLoader<Batch>>) -> SupervisedTraining<Net> {
    SupervisedTraining::new(folder, train, loader(BATCH, false))
        .metrics((LossMetric::new(),))
        .with_application_logger(None)
        .with_checkpointing_strategy(KeepLastNCheckpoints::new(2))
        .renderer(Box::new(Silent))
}

pub fn finished(result: LearningResult<Net>) -> Net {
    assert!(result.error.is_none(), "{:?}", result.error);
    result.model
}

struct Silent;

impl MetricsRendererTraining for Silent {
    fn update_train(&mut self, _state: MetricState) {}
    fn update_valid(&mut self, _state: MetricState) {}
}

impl TrainingProgressLogger for Silent {
    fn start(
        &mut self,
        _epochs: usize,
        _epoch: usize,
        _items: Option<usize>,
        _label: Option<&str>,
    ) {
    }
    fn update_epoch(&mut self, _epoch: usize) {}
    fn start_split(&mut self, _split: &str, _items: usize) {}
    fn update_split(&mut self, _items: usize) {}
    fn end_split(&mut self) {}
    fn end(&mut self) {}
    fn log_event_training(&mut self, _event: String) {}
}

impl MetricsRenderer for Silent {
    fn manual_close(&mut self) {}
    fn register_metric(&mut self, _metric: MetricDefinition) {}
}

impl MetricsRendererEvaluation for Silent {
    fn update_test(&mut self, _name: EvaluationName, _state: MetricState) {}
}

impl EvaluationProgressLogger for Silent {
    fn start_global_progress(&mut self, _tests: usize) {}
    fn start_test(&mut self, _name: &str, _items: usize) {}
    fn update_test_progress(&mut self, _items: usize) {}
    fn end_test(&mut self) {}
    fn end_global_progress(&mut self) {}
    fn log_event_evaluation(&mut self, _event: String) {}
}
