use burn::{
    module::Module,
    nn::Relu,
    tensor::{Device, Tensor},
    train::{ClassificationOutput, InferenceStep, TrainOutput, TrainStep},
};
use burn_memaop::{AopConfig, AopObserver, MemAopLinear, MemAopLinearConfig};
use memaop_mnist::{MnistBatch, Observed, classified};

/// A perceptron, written as it would be with `Linear`.
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
        let layer = |d_input, d_output| {
            MemAopLinearConfig::new(d_input, d_output)
                .init(device)
                .with_aop(aop)
        };
        Self {
            hidden1: layer(784, width),
            hidden2: layer(width, width),
            output: layer(width, 10),
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
        classified(self.forward(batch.images), batch.labels)
    }
}

impl TrainStep for Mlp {
    type Input = MnistBatch;
    type Output = Observed;

    fn step(&self, batch: MnistBatch) -> TrainOutput<Observed> {
        let output = self.classify(batch);
        let grads = output.loss.backward();
        // The report is about the backward pass, so it comes after it.
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
