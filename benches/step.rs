//! Times a training step (forward, loss, backward, SGD) of a perceptron, exact and approximate.
//!
//! ```text
//! cargo bench --bench step -- --width 1024 --m 1024 --k-ratio 0.125 --policy systematic
//! ```

use anyhow::{Result, ensure};
use burn::{
    module::{Module, ModuleDisplay},
    nn::{Linear, LinearConfig, loss::CrossEntropyLossConfig},
    optim::SgdConfig,
    tensor::{Device, Distribution, Int, Tensor, activation::relu},
};
use burn_memaop::{AopConfig, MemAopLinear};
use clap::Parser;
use memaop_examples::bench::{Common, Size, StepOptions, Training, random, step_table};

const CLASSES: usize = 10;

/// Times a training step of a perceptron width-...-width-10
#[derive(Parser, Debug)]
struct Options {
    #[command(flatten)]
    common: Common,
    /// Inputs, and units in each hidden layer
    #[arg(long, default_value_t = 1024)]
    width: usize,
    #[arg(long, default_value_t = 2)]
    hidden: usize,
    /// Number of rows of the batch
    #[arg(long, default_value_t = 1024)]
    m: usize,
    #[command(flatten)]
    steps: StepOptions,
}

trait Dense: Module + ModuleDisplay {
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

#[derive(Module, Debug)]
struct Mlp<L: Dense> {
    layers: Vec<L>,
}

impl Mlp<Linear> {
    fn new(width: usize, hidden: usize, device: &Device) -> Self {
        let outputs = std::iter::repeat_n(width, hidden).chain([CLASSES]);
        let layers = outputs.map(|outputs| LinearConfig::new(width, outputs).init(device));
        Self {
            layers: layers.collect(),
        }
    }

    fn with_memaop(self, aop: AopConfig) -> Mlp<MemAopLinear> {
        let layers = self.layers.into_iter();
        let layers = layers.map(|layer| MemAopLinear::from_linear(layer, aop));
        Mlp {
            layers: layers.collect(),
        }
    }
}

impl<L: Dense> Mlp<L> {
    fn forward(&self, input: Tensor<2>) -> Tensor<2> {
        let (last, hidden) = self.layers.split_last().expect("at least one layer");
        let hidden = hidden
            .iter()
            .fold(input, |input, layer| relu(layer.apply(input)));
        last.apply(hidden)
    }

    fn loss(&self, images: &Tensor<2>, labels: &Tensor<1, Int>) -> Tensor<1> {
        let loss = CrossEntropyLossConfig::new().init(&images.device());
        loss.forward(self.forward(images.clone()), labels.clone())
    }
}

fn main() -> Result<()> {
    let options = Options::parse();
    let device = options.common.device()?;
    let autodiff = device.clone().autodiff();
    let (width, m) = (options.width, options.m);
    ensure!(
        width > 0 && m > 1,
        "--width must be at least 1, --m at least 2"
    );

    let dtype = options.common.dtype;
    let images = random(m, width, &device, dtype).autodiff();
    let labels = Distribution::Uniform(0.0, CLASSES as f64);
    let labels = Tensor::<1>::random([m], labels, &device).int().autodiff();
    let linear = dtype.cast(Mlp::new(width, options.hidden, &autodiff));

    let size = Size {
        width,
        depth: options.hidden,
        m,
    };
    step_table(&options.common, &options.steps, size, &device, |aop| {
        let (images, labels) = (&images, &labels);
        let memaop = linear.clone().with_memaop(aop);
        let sgd = || SgdConfig::new().init();
        let mut exact = Training::new(linear.clone(), sgd(), |model: &Mlp<_>| {
            model.loss(images, labels)
        });
        let mut memaop = Training::new(memaop, sgd(), |model: &Mlp<_>| model.loss(images, labels));
        [
            Box::new(move || exact.step()),
            Box::new(move || memaop.step()),
        ]
    })
}
