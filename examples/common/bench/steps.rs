//! A table of whole training steps, exact and approximate.

use crate::{Backend, InputGradientOptions, KRatio, MemoryOption, PolicyOption};
use anyhow::{Result, bail};
use burn::{
    module::Module,
    optim::{GradientsParams, ModuleOptimizer},
    tensor::{Device, Tensor},
};
use burn_memaop::AopConfig;
use clap::Args;
use serde::Serialize;

use super::{Common, Method, Precision, interleaved};

/// The approximations of a table.
#[derive(Args, Debug)]
pub struct StepOptions {
    /// K as a share of the batch [default: 0.25, 0.125 and 0.0625]
    #[arg(long)]
    pub k_ratio: Option<KRatio>,
    /// Policy [default: topk with balanced memory, topk without memory, and systematic]
    #[arg(long, value_enum)]
    pub policy: Option<PolicyOption>,
    #[arg(long, value_enum, requires = "policy")]
    pub memory: Option<MemoryOption>,
    #[command(flatten)]
    pub input_gradient: InputGradientOptions,
}

/// The size of the model and the batch of a step.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Size {
    /// Units in a layer, or the width of a token.
    pub width: usize,
    /// Hidden layers, or blocks of a transformer.
    pub depth: usize,
    /// The number M of rows.
    pub m: usize,
}

/// One step of a training.
pub type Step<'a> = Box<dyn FnMut() + 'a>;

#[derive(Serialize)]
struct Row {
    backend: Backend,
    dtype: Precision,
    #[serde(flatten)]
    size: Size,
    k_ratio: KRatio,
    policy: PolicyOption,
    memory: MemoryOption,
    #[serde(flatten)]
    input_gradient: InputGradientOptions,
    exact_ms: f64,
    aop_ms: f64,
    step_ratio: f64,
}

/// Prints and saves a row for each K and method. `sides` gives a step of exact training, and one of
/// training with a configuration.
///
/// # Errors
///
/// Returns an error if an option breaks its rule, the device fails, or the file cannot be written.
pub fn step_table<'a>(
    common: &Common,
    options: &StepOptions,
    size: Size,
    device: &Device,
    mut sides: impl FnMut(AopConfig) -> [Step<'a>; 2],
) -> Result<()> {
    println!(
        "{:>6} {:>6} {:>7}  {:<20} {:>9} {:>9} {:>6}",
        "width", "M", "K", "method", "exact", "aop", "ratio"
    );
    if options.k_ratio == Some(KRatio::AUTO) {
        bail!("--k-ratio must be a share of the batch, because a chosen K changes, but got auto");
    }
    let mut rows = Vec::new();
    let ratios = [0.25, 0.125, 0.0625].map(KRatio::Of).to_vec();
    for k_ratio in options.k_ratio.map_or(ratios, |ratio| vec![ratio]) {
        for method in Method::selected(options.policy, options.memory) {
            let config = method
                .config(k_ratio.outer_products(), common)?
                .with_input_gradient(options.input_gradient.input_gradient());
            config.validate()?;
            let [mut exact, mut aop] = sides(config);
            let times = interleaved(device, common.repeats, &mut [&mut exact, &mut aop])?;
            let [exact_ms, aop_ms] = times[..] else {
                bail!("two sides were timed");
            };
            println!(
                "{:>6} {:>6} {:>7}  {:<20} {exact_ms:>9.3} {aop_ms:>9.3} {:>6.3}",
                size.width,
                size.m,
                k_ratio.to_string(),
                method.name(),
                aop_ms / exact_ms
            );
            rows.push(Row {
                backend: common.backend,
                dtype: common.dtype,
                size,
                k_ratio,
                policy: method.policy,
                memory: method.memory,
                input_gradient: options.input_gradient,
                exact_ms,
                aop_ms,
                step_ratio: aop_ms / exact_ms,
            });
        }
    }
    println!("\nTimes are in milliseconds: forward, loss, backward and optimizer.");
    common.save(&rows)
}

/// A training with the same loss in each step.
pub struct Training<M, L> {
    /// The model, which each step moves through the optimizer.
    model: Option<M>,
    optimizer: ModuleOptimizer,
    loss: L,
}

impl<M: Module, L: Fn(&M) -> Tensor<1>> Training<M, L> {
    /// A training that begins with `model`.
    pub fn new(model: M, optimizer: ModuleOptimizer, loss: L) -> Self {
        Self {
            model: Some(model),
            optimizer,
            loss,
        }
    }

    /// Takes one step: forward, loss, backward, optimizer.
    pub fn step(&mut self) {
        let model = self.model.take().expect("put back by every step");
        let grads = GradientsParams::from_grads((self.loss)(&model).backward(), &model);
        self.model = Some(self.optimizer.step(1e-3, model, grads));
    }
}
