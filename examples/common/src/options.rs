use anyhow::{Result, bail};
use burn_memaop::{AopConfig, Memory, OuterProducts, Policy};
use clap::{Args, ValueEnum};

/// A policy on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "lower")]
#[allow(missing_docs)]
pub enum PolicyOption {
    TopK,
    RandK,
    WeightedK,
}

/// A memory on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "lower")]
#[allow(missing_docs)]
pub enum MemoryOption {
    None,
    Published,
}

/// The options of a `MemAopLinear`.
#[derive(Debug, Clone, Args)]
pub struct AopOptions {
    /// Outer products in a step, in place of --k-ratio
    #[arg(long, conflicts_with = "k_ratio")]
    pub k: Option<usize>,
    /// Outer products in a step as a share of the batch
    #[arg(long, default_value_t = 0.25)]
    pub k_ratio: f64,
    /// The rule that chooses the rows
    #[arg(long, value_enum, default_value_t = PolicyOption::TopK)]
    pub policy: PolicyOption,
    /// What becomes of the rows left out
    #[arg(long, value_enum, default_value_t = MemoryOption::Published)]
    pub memory: MemoryOption,
    /// The factor by which the memory shrinks from step to step
    #[arg(long, default_value_t = 1.0)]
    pub decay: f64,
}

impl AopOptions {
    /// The configuration of the layer.
    ///
    /// # Errors
    ///
    /// The option that breaks its rule.
    pub fn config(&self, seed: u64) -> Result<AopConfig> {
        let config = AopConfig::new()
            .with_outer_products(match self.k {
                Some(k) => OuterProducts::Count(k),
                None => OuterProducts::Ratio {
                    ratio: self.k_ratio,
                    minimum: 1,
                },
            })
            .with_policy(match self.policy {
                PolicyOption::TopK => Policy::TopK,
                PolicyOption::RandK => Policy::RandK,
                PolicyOption::WeightedK => Policy::WeightedK,
            })
            .with_memory(match self.memory {
                MemoryOption::None => Memory::None,
                MemoryOption::Published => Memory::Published { decay: self.decay },
            })
            .with_seed(seed);
        match config.validate() {
            Ok(()) => Ok(config),
            Err(error) => bail!("{error}"),
        }
    }
}
