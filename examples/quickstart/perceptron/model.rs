use burn::{
    module::{Module, ModuleDisplay},
    nn::{Linear, LinearConfig, Relu},
    tensor::{Device, Tensor},
};
use burn_memaop::{AopConfig, MemAopLinear};

use crate::data::{CLASSES, PIXELS};

/// What the model needs of a dense layer.
pub trait Dense: Module + ModuleDisplay + 'static {
    fn apply(&self, input: Tensor<2>) -> Tensor<2>;

    /// The number of outer products in the last weight gradient, for a batch of `rows` rows.
    fn outer_products(&self, rows: usize) -> usize;
}

impl Dense for Linear {
    fn apply(&self, input: Tensor<2>) -> Tensor<2> {
        self.forward(input)
    }

    fn outer_products(&self, rows: usize) -> usize {
        rows
    }
}

impl Dense for MemAopLinear {
    fn apply(&self, input: Tensor<2>) -> Tensor<2> {
        self.forward(input)
    }

    fn outer_products(&self, rows: usize) -> usize {
        match self.is_exact(rows, &self.weight.device()) {
            true => rows,
            false => self.memory_stats().k,
        }
    }
}

/// A perceptron with two hidden layers.
#[derive(Module, Debug)]
pub struct Mlp<L: Dense> {
    layers: [L; 3],
    activation: Relu,
}

impl Mlp<Linear> {
    pub fn new(width: usize, device: &Device) -> Self {
        let widths = [(PIXELS, width), (width, width), (width, CLASSES)];
        Self {
            layers: widths.map(|(input, output)| LinearConfig::new(input, output).init(device)),
            activation: Relu::new(),
        }
    }

    /// The same parameters, in layers with approximate gradients.
    pub fn with_memaop(self, aop: AopConfig) -> Mlp<MemAopLinear> {
        Mlp {
            layers: self
                .layers
                .map(|layer| MemAopLinear::from_linear(layer, aop)),
            activation: self.activation,
        }
    }
}

impl<L: Dense> Mlp<L> {
    pub fn forward(&self, images: Tensor<2>) -> Tensor<2> {
        let [first, second, last] = &self.layers;
        let hidden = self.activation.forward(first.apply(images));
        let hidden = self.activation.forward(second.apply(hidden));
        last.apply(hidden)
    }

    pub fn outer_products(&self, rows: usize) -> usize {
        let layers = self.layers.iter();
        layers.map(|layer| layer.outer_products(rows)).sum()
    }
}
