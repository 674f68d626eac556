//! Code that the benchmarks share: options, times in turns, and tables.

use std::{fs, path::PathBuf, time::Instant};

use anyhow::{Context, Result, ensure};
use burn::{
    module::{Module, ModuleMapper, Param},
    tensor::{DType, Device, Distribution, Tensor},
};
use burn_memaop::{AopConfig, OuterProducts};
use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::{Backend, MemoryOption, PolicyOption};

mod buffers;
mod observed;
mod steps;

pub use buffers::Buffers;
pub use observed::{Observed, observe};
pub use steps::{Size, Step, StepOptions, Training, step_table};

/// The options of every benchmark.
#[derive(Args, Debug)]
pub struct Common {
    #[arg(long, value_enum, default_value_t = Backend::Flex)]
    pub backend: Backend,
    /// Type of activations, weights and gradients
    #[arg(long, value_enum, default_value_t = Precision::F32)]
    pub dtype: Precision,
    /// Approximates gradients even where exact ones take less time
    #[arg(long)]
    pub no_cost_rule: bool,
    /// Number of times that each side is timed
    #[arg(long, default_value_t = 15)]
    pub repeats: usize,
    /// File for the rows of the table, as JSON
    #[arg(long)]
    pub json: Option<PathBuf>,
    /// Passed by cargo bench
    #[arg(long, hide = true)]
    pub bench: bool,
}

impl Common {
    /// The device of the backend, seeded.
    ///
    /// # Errors
    ///
    /// Returns an error if the backend is not built in, the device lacks the type, or repeats is 0.
    pub fn device(&self) -> Result<Device> {
        ensure!(self.repeats > 0, "--repeats must be at least 1, but got 0");
        let device = self.backend.device()?;
        let dtype = self.dtype.dtype();
        ensure!(
            device.supports_dtype(dtype),
            "the device {device:?} does not have {dtype:?}"
        );
        device.seed(0);
        Ok(device)
    }

    /// Writes the rows as JSON if there is a file for them.
    ///
    /// # Errors
    ///
    /// Returns an error if the file cannot be written.
    pub fn save<R: Serialize>(&self, rows: &[R]) -> Result<()> {
        match &self.json {
            None => Ok(()),
            Some(path) => fs::write(path, serde_json::to_string_pretty(rows)?)
                .with_context(|| format!("--json {}", path.display())),
        }
    }
}

/// A floating-point type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Precision {
    F32,
    F16,
    Bf16,
}

impl Precision {
    /// The type as Burn names it.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
        }
    }

    /// A module with all of its parameters in this type.
    pub fn cast<M: Module>(self, module: M) -> M {
        struct Cast(DType);
        impl ModuleMapper for Cast {
            fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
                param.map(|tensor| tensor.cast(self.0).detach().require_grad())
            }
        }
        module.map(&mut Cast(self.dtype()))
    }
}

/// An approximation to measure.
#[derive(Debug, Clone, Copy)]
pub struct Method {
    /// The policy.
    pub policy: PolicyOption,
    /// The memory, with its usual decay.
    pub memory: MemoryOption,
}

impl Method {
    /// The method of the options, or those that tables have without options.
    pub fn selected(policy: Option<PolicyOption>, memory: Option<MemoryOption>) -> Vec<Self> {
        let Some(policy) = policy else {
            let pairs = [
                (PolicyOption::TopK, MemoryOption::Balanced),
                (PolicyOption::TopK, MemoryOption::None),
                (PolicyOption::Systematic, MemoryOption::None),
            ];
            return pairs
                .map(|(policy, memory)| Self { policy, memory })
                .to_vec();
        };
        let memory = memory.unwrap_or(policy.usual_memory());
        vec![Self { policy, memory }]
    }

    /// The policy, and the memory if there is one.
    pub fn name(&self) -> String {
        let policy = self.policy;
        match self.memory {
            MemoryOption::None => policy.to_string(),
            memory => format!("{policy}, {memory:?}").to_lowercase(),
        }
    }

    /// The configuration of a layer.
    ///
    /// # Errors
    ///
    /// Returns an error for a value that breaks its rule.
    pub fn config(&self, outer_products: OuterProducts, common: &Common) -> Result<AopConfig> {
        let config = AopConfig::new()
            .with_outer_products(outer_products)
            .with_method(
                self.policy
                    .method(self.memory.memory(self.memory.default_decay()))?,
            )
            .with_cost_rule(!common.no_cost_rule);
        config.validate()?;
        Ok(config)
    }
}

/// A random matrix whose rows differ in norm.
pub fn random(rows: usize, columns: usize, device: &Device, precision: Precision) -> Tensor<2> {
    let normal = Distribution::Normal(0.0, 1.0);
    let sizes = Tensor::<2>::random([rows, 1], normal, device).exp();
    let matrix = Tensor::<2>::random([rows, columns], normal, device) * sizes;
    matrix.cast(precision.dtype())
}

/// The median times of the sides in milliseconds. Sides take turns (A B C A B C ...), and each
/// waits for the device at its end. Their first two runs are not timed.
///
/// # Errors
///
/// Returns an error if the device fails.
pub fn interleaved(
    device: &Device,
    repeats: usize,
    sides: &mut [&mut dyn FnMut()],
) -> Result<Vec<f64>> {
    let mut times = vec![Vec::with_capacity(repeats); sides.len()];
    for repeat in 0..repeats + 2 {
        for (side, times) in sides.iter_mut().zip(&mut times) {
            device.sync()?;
            let start = Instant::now();
            side();
            device.sync()?;
            if repeat >= 2 {
                times.push(start.elapsed().as_secs_f64() * 1e3);
            }
        }
    }
    Ok(times.into_iter().map(median).collect())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() % 2 {
        0 => 0.5 * (values[middle - 1] + values[middle]),
        _ => values[middle],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn sides_take_turns() {
        let order = std::cell::RefCell::new(String::new());
        let (mut a, mut b) = (
            || order.borrow_mut().push('a'),
            || order.borrow_mut().push('b'),
        );
        let times = interleaved(&Device::flex(), 3, &mut [&mut a, &mut b]).unwrap();
        assert_eq!(times.len(), 2);
        assert_eq!(order.into_inner(), "ababababab");
    }
}
