use burn::{
    data::dataloader::batcher::Batcher,
    module::Module,
    nn::{Relu, loss::CrossEntropyLossConfig},
    tensor::{Device, ExecutionError, Int, Tensor, TensorData},
    train::{
        ClassificationOutput, InferenceStep, ItemLazy, TrainOutput, TrainStep,
        metric::{AccuracyInput, Adaptor, LossInput},
    },
};
use burn_dataset::vision::MnistItem;
use burn_memaop::{AopConfig, AopObserver, AopReport, MemAopLinear, MemAopLinearConfig};

/// A multi-layer perceptron, written as with `Linear`.
#[derive(Module, Debug)]
pub struct Mlp {
    hidden1: MemAopLinear,
    hidden2: MemAopLinear,
    output: MemAopLinear,
    activation: Relu,
    #[module(skip)]
    observer: Option<AopObserver>,
}

impl Mlp {
    pub fn new(
        width: usize,
        aop: AopConfig,
        observer: Option<AopObserver>,
        device: &Device,
    ) -> Self {
        let layer = |number, d_input, d_output| {
            MemAopLinearConfig::new(d_input, d_output)
                .with_aop(aop.with_seed(aop.seed.wrapping_add(number)))
                .init(device)
        };
        Self {
            hidden1: layer(1, 784, width),
            hidden2: layer(2, width, width),
            output: layer(3, width, 10),
            activation: Relu::new(),
            observer,
        }
    }

    fn forward(&self, images: Tensor<2>) -> Tensor<2> {
        let hidden = self.activation.forward(self.hidden1.forward(images));
        let hidden = self.activation.forward(self.hidden2.forward(hidden));
        self.output.forward(hidden)
    }

    fn classify(&self, batch: MnistBatch) -> ClassificationOutput {
        let output = self.forward(batch.images);
        let loss = CrossEntropyLossConfig::new()
            .init(&output.device())
            .forward(output.clone(), batch.labels.clone());
        ClassificationOutput::new(loss, output, batch.labels)
    }
}

impl TrainStep for Mlp {
    type Input = MnistBatch;
    type Output = Observed;

    fn step(&self, batch: MnistBatch) -> TrainOutput<Observed> {
        let output = self.classify(batch);
        let grads = output.loss.backward();
        // After the backward pass, which is what it reports.
        let aop = self.observer.map(|observer| observer.observe(self));
        let aop = aop.unwrap_or_default();
        TrainOutput::new(self, grads, Observed { output, aop })
    }
}

impl InferenceStep for Mlp {
    type Input = MnistBatch;
    type Output = ClassificationOutput;

    fn step(&self, batch: MnistBatch) -> ClassificationOutput {
        self.classify(batch)
    }
}

/// What Burn's metrics want, and what the layers report.
pub struct Observed {
    output: ClassificationOutput,
    aop: AopReport,
}

impl ItemLazy for Observed {
    fn sync(self) -> Result<Self, ExecutionError> {
        Ok(Self {
            output: self.output.sync()?,
            aop: self.aop.sync()?,
        })
    }
}

/// The one adaptor that all metrics of burn-memaop need.
impl Adaptor<AopReport> for Observed {
    fn adapt(&self) -> AopReport {
        self.aop.clone()
    }
}

impl Adaptor<AccuracyInput> for Observed {
    fn adapt(&self) -> AccuracyInput {
        self.output.adapt()
    }
}

impl Adaptor<LossInput> for Observed {
    fn adapt(&self) -> LossInput {
        self.output.adapt()
    }
}

/// Images, shape `[batch, 784]`, and labels, shape `[batch]`.
#[derive(Clone, Debug)]
pub struct MnistBatch {
    images: Tensor<2>,
    labels: Tensor<1, Int>,
}

#[derive(Clone, Default)]
pub struct MnistBatcher;

impl Batcher<MnistItem, MnistBatch> for MnistBatcher {
    fn batch(&self, items: Vec<MnistItem>, device: &Device) -> MnistBatch {
        // The mean and the standard deviation of the training pixels.
        let pixels = |item: &MnistItem| {
            let pixels = item.image.as_flattened().iter();
            pixels
                .map(|pixel| (pixel / 255.0 - 0.1307) / 0.3081)
                .collect::<Vec<_>>()
        };
        let images = TensorData::new(
            items.iter().flat_map(pixels).collect::<Vec<f32>>(),
            [items.len(), 784],
        );
        let labels: Vec<i64> = items.iter().map(|item| i64::from(item.label)).collect();
        MnistBatch {
            images: Tensor::from_data(images, device),
            labels: Tensor::from_data(TensorData::new(labels, [items.len()]), device),
        }
    }
}
