//! A whole training step (forward, loss, backward, SGD) of a multi-layer perceptron, exact and
//! approximate.
//!
//! ```text
//! cargo bench --bench step -- --width 1024 --m 1024 --k-ratio 0.125 --policy topk --memory balanced
//! ```

use anyhow::{Result, bail, ensure};
use burn::{
    module::{Module, ModuleDisplay},
    nn::{Linear, LinearConfig, loss::CrossEntropyLossConfig},
    optim::{GradientsParams, ModuleOptimizer, SgdConfig},
    tensor::{Device, Distribution, Int, Tensor, activation::relu},
};
use burn_memaop::{AopConfig, MemAopLinear, OuterProducts};
use clap::Parser;
use memaop_benches::{Common, Method, Precision, interleaved, random};
use memaop_examples::{
    Backend, InputGradientOptions, MemoryOption, MemoryPrecisionOption, PolicyOption,
};
use serde::Serialize;

const CLASSES: usize = 10;

/// A training step of a perceptron width-width-width-10
#[derive(Parser, Debug)]
struct Options {
    #[command(flatten)]
    common: Common,
    /// Inputs, and units in each of the two hidden layers
    #[arg(long, default_value_t = 1024)]
    width: usize,
    /// Rows of the batch
    #[arg(long, default_value_t = 1024)]
    m: usize,
    /// Outer products as a share of the batch; without it 1/4, 1/8 and 1/16
    #[arg(long)]
    k_ratio: Option<f64>,
    /// Without it topk with balanced memory, topk without memory, and systematic
    #[arg(long, value_enum)]
    policy: Option<PolicyOption>,
    #[arg(long, value_enum, requires = "policy")]
    memory: Option<MemoryOption>,
    #[command(flatten)]
    input_gradient: InputGradientOptions,
}

#[derive(Serialize)]
struct Row {
    backend: Backend,
    dtype: Precision,
    memory_precision: MemoryPrecisionOption,
    width: usize,
    m: usize,
    k_ratio: f64,
    policy: PolicyOption,
    memory: MemoryOption,
    #[serde(flatten)]
    input_gradient: InputGradientOptions,
    exact_ms: f64,
    aop_ms: f64,
    step_ratio: f64,
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
    layers: [L; 3],
}

impl Mlp<Linear> {
    fn new(width: usize, device: &Device) -> Self {
        let outputs = [width, width, CLASSES];
        Self {
            layers: outputs.map(|outputs| LinearConfig::new(width, outputs).init(device)),
        }
    }

    fn with_memaop(self, aop: AopConfig) -> Mlp<MemAopLinear> {
        Mlp {
            layers: self
                .layers
                .map(|layer| MemAopLinear::from_linear(layer, aop)),
        }
    }
}

impl<L: Dense> Mlp<L> {
    fn forward(&self, input: Tensor<2>) -> Tensor<2> {
        let [first, second, last] = &self.layers;
        last.apply(relu(second.apply(relu(first.apply(input)))))
    }
}

/// A training, step after step on one batch.
struct Training<L: Dense> {
    model: Option<Mlp<L>>,
    optimizer: ModuleOptimizer,
    images: Tensor<2>,
    labels: Tensor<1, Int>,
}

impl<L: Dense> Training<L> {
    fn new(model: Mlp<L>, images: &Tensor<2>, labels: &Tensor<1, Int>) -> Self {
        Self {
            model: Some(model),
            optimizer: SgdConfig::new().init(),
            images: images.clone(),
            labels: labels.clone(),
        }
    }

    fn step(&mut self) {
        let model = self.model.take().expect("put back by every step");
        let output = model.forward(self.images.clone());
        let loss = CrossEntropyLossConfig::new().init(&self.images.device());
        let loss = loss.forward(output, self.labels.clone());
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        self.model = Some(self.optimizer.step(1e-3, model, grads));
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
    let linear = dtype.cast(Mlp::new(width, &autodiff));

    println!(
        "{:>6} {:>6} {:>7}  {:<20} {:>9} {:>9} {:>6}",
        "width", "M", "K/M", "method", "exact", "aop", "ratio"
    );
    let mut rows = Vec::new();
    for k_ratio in options
        .k_ratio
        .map_or(vec![0.25, 0.125, 0.0625], |k| vec![k])
    {
        for method in Method::selected(options.policy, options.memory) {
            let outer_products = OuterProducts::Ratio {
                ratio: k_ratio,
                minimum: 1,
            };
            let config = method
                .config(outer_products, &options.common)?
                .with_input_gradient(options.input_gradient.input_gradient());
            config.validate()?;
            let mut exact = Training::new(linear.clone(), &images, &labels);
            let memaop = linear.clone().with_memaop(config);
            let mut memaop = Training::new(memaop, &images, &labels);
            let times = interleaved(
                &device,
                options.common.repeats,
                &mut [&mut || exact.step(), &mut || memaop.step()],
            )?;
            let [exact_ms, aop_ms] = times[..] else {
                bail!("two sides were timed");
            };
            let row = Row {
                backend: options.common.backend,
                dtype,
                memory_precision: options.common.memory_precision,
                width,
                m,
                k_ratio,
                policy: method.policy,
                memory: method.memory,
                input_gradient: options.input_gradient,
                exact_ms,
                aop_ms,
                step_ratio: aop_ms / exact_ms,
            };
            println!(
                "{:>6} {:>6} {:>7}  {:<20} {:>9.3} {:>9.3} {:>6.3}",
                row.width,
                row.m,
                row.k_ratio,
                method.name(),
                row.exact_ms,
                row.aop_ms,
                row.step_ratio
            );
            rows.push(row);
        }
    }
    println!("\nMilliseconds for forward, loss, backward and SGD.");
    options.common.save(&rows)
}
