use burn::{
    module::{Module, ModuleDisplay},
    nn::{
        BatchNorm, BatchNormConfig, Dropout, DropoutConfig, Gelu, Linear, LinearConfig, Relu,
        conv::{Conv2d, Conv2dConfig},
        pool::{MaxPool2d, MaxPool2dConfig},
    },
    tensor::{Device, Tensor},
    train::{ClassificationOutput, InferenceStep, TrainOutput, TrainStep},
};
use burn_memaop::{AopConfig, AopObserver, MemAopConv2d, MemAopLinear, OuterProducts};
use memaop_examples::mnist::SIDE;
use memaop_mnist::{MnistBatch, Observed, classified};

/// Burn's convolution or that of burn-memaop.
pub trait Convolution: Module + ModuleDisplay + 'static {
    fn convolve(&self, images: Tensor<4>) -> Tensor<4>;
}

impl Convolution for Conv2d {
    fn convolve(&self, images: Tensor<4>) -> Tensor<4> {
        self.forward(images)
    }
}

impl Convolution for MemAopConv2d {
    fn convolve(&self, images: Tensor<4>) -> Tensor<4> {
        self.forward(images)
    }
}

/// Burn's linear layer or that of burn-memaop.
pub trait Dense: Module + ModuleDisplay + 'static {
    fn apply(&self, input: Tensor<2>) -> Tensor<2>;
}

impl Dense for Linear {
    fn apply(&self, input: Tensor<2>) -> Tensor<2> {
        self.forward(input)
    }
}

impl Dense for MemAopLinear {
    fn apply(&self, input: Tensor<2>) -> Tensor<2> {
        self.forward(input)
    }
}

/// A convolution, batch normalization, ReLU, and max pooling to half the size.
#[derive(Module, Debug)]
pub struct Block<C: Convolution> {
    conv: C,
    norm: BatchNorm,
    activation: Relu,
    pool: MaxPool2d,
}

impl Block<Conv2d> {
    fn new(channels: [usize; 2], device: &Device) -> Self {
        Self {
            conv: Conv2dConfig::new(channels, [3, 3]).init(device),
            norm: BatchNormConfig::new(channels[1]).init(device),
            activation: Relu::new(),
            pool: MaxPool2dConfig::new([2, 2]).with_strides([2, 2]).init(),
        }
    }
}

impl<C: Convolution> Block<C> {
    fn forward(&self, images: Tensor<4>) -> Tensor<4> {
        self.after(self.conv.convolve(images))
    }

    fn after(&self, convolved: Tensor<4>) -> Tensor<4> {
        let normalized = self.norm.forward(convolved);
        self.pool.forward(self.activation.forward(normalized))
    }
}

/// The network of Burn's own MNIST example: two blocks of 64 channels and three linear layers.
#[derive(Module, Debug)]
pub struct Cnn<C: Convolution, D: Dense> {
    block1: Block<C>,
    block2: Block<C>,
    dropout: Dropout,
    hidden1: D,
    hidden2: D,
    output: D,
    activation: Gelu,
    #[module(skip)]
    observer: Option<AopObserver>,
}

pub type Exact = Cnn<Conv2d, Linear>;
pub type MemAop = Cnn<MemAopConv2d, MemAopLinear>;

impl Exact {
    pub fn new(device: &Device) -> Self {
        let linear = |inputs, outputs| LinearConfig::new(inputs, outputs).init(device);
        Self {
            block1: Block::new([1, 64], device),
            block2: Block::new([64, 64], device),
            dropout: DropoutConfig::new(0.25).init(),
            hidden1: linear(64 * 5 * 5, 128),
            hidden2: linear(128, 128),
            output: linear(128, 10),
            activation: Gelu::new(),
            observer: None,
        }
    }

    /// The same weights, with approximate gradients and an observer. The gradients of the inputs of
    /// convolutions stay exact.
    pub fn with_memaop(self, aop: AopConfig) -> MemAop {
        let of_convolutions = aop.with_input_gradient(OuterProducts::All);
        let block = |block: Block<Conv2d>| Block {
            conv: MemAopConv2d::from_conv2d(block.conv, of_convolutions),
            norm: block.norm,
            activation: block.activation,
            pool: block.pool,
        };
        let linear = |linear| MemAopLinear::from_linear(linear, aop);
        Cnn {
            block1: block(self.block1),
            block2: block(self.block2),
            dropout: self.dropout,
            hidden1: linear(self.hidden1),
            hidden2: linear(self.hidden2),
            output: linear(self.output),
            activation: self.activation,
            observer: Some(AopObserver::new()),
        }
    }
}

impl<C: Convolution, D: Dense> Cnn<C, D> {
    /// Logits, shape `[batch, 10]`, of images, shape `[batch, 784]`.
    pub fn forward(&self, images: Tensor<2>) -> Tensor<2> {
        let [batch, _] = images.dims();
        let images = self.block1.forward(images.reshape([batch, 1, SIDE, SIDE]));
        self.classify(self.block2.forward(images))
    }

    /// The input of the second convolution, and its output, detached from the graph.
    pub fn cut(&self, images: Tensor<2>) -> [Tensor<4>; 2] {
        let [batch, _] = images.dims();
        let images = self.block1.forward(images.reshape([batch, 1, SIDE, SIDE]));
        let convolved = self.block2.conv.convolve(images.clone());
        [images, convolved.detach()]
    }

    /// The logits for an output of [`cut`](Self::cut).
    pub fn after_cut(&self, convolved: Tensor<4>) -> Tensor<2> {
        self.classify(self.block2.after(convolved))
    }

    fn classify(&self, images: Tensor<4>) -> Tensor<2> {
        let hidden = self.dropout.forward(images.flatten(1, 3));
        let hidden = self.activation.forward(self.hidden1.apply(hidden));
        let hidden = self.activation.forward(self.hidden2.apply(hidden));
        self.output.apply(hidden)
    }
}

impl<C: Convolution, D: Dense> TrainStep for Cnn<C, D> {
    type Input = MnistBatch;
    type Output = Observed;

    fn step(&self, batch: MnistBatch) -> TrainOutput<Observed> {
        let output = classified(self.forward(batch.images), batch.labels);
        let grads = output.loss.backward();
        let aop = self.observer.map(|observer| observer.observe(self));
        let aop = aop.unwrap_or_default();
        TrainOutput::new(self, grads, Observed { output, aop })
    }
}

impl<C: Convolution, D: Dense> InferenceStep for Cnn<C, D> {
    type Input = MnistBatch;
    type Output = ClassificationOutput;

    fn step(&self, batch: MnistBatch) -> ClassificationOutput {
        classified(self.forward(batch.images), batch.labels)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Int;

    #[test]
    fn the_counterpart_gives_the_same_logits() {
        let device = Device::flex();
        let exact = Cnn::new(&device);
        let memaop = exact.clone().with_memaop(AopConfig::new());
        let images = Tensor::<1, Int>::arange(0..3 * 784, &device).float() / 2352.0;
        let images = images.reshape([3, 784]);
        let expected = exact.forward(images.clone());
        let difference = expected - memaop.forward(images.clone());
        assert!(difference.abs().max().into_scalar::<f32>() < 1e-5);

        let [_, convolved] = exact.cut(images.clone());
        let difference = exact.after_cut(convolved) - exact.forward(images);
        assert!(difference.abs().max().into_scalar::<f32>() < 1e-5);
    }
}
