use anyhow::Result;
use burn_memaop::{AopConfig, InputGradient, Memory, MemoryPrecision, OuterProducts, Policy};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

/// A policy on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lower")]
#[allow(missing_docs)]
pub enum PolicyOption {
    TopK,
    RandK,
    WeightedK,
    ScaledRandK,
    Systematic,
    Bernoulli,
    #[value(name = "crs")]
    #[serde(rename = "crs")]
    ColumnRow,
    #[value(name = "wta")]
    #[serde(rename = "wta")]
    WinnerTakeAll,
}

impl PolicyOption {
    /// The policy of that name.
    pub fn policy(self) -> Policy {
        match self {
            Self::TopK => Policy::TopK,
            Self::RandK => Policy::RandK,
            Self::WeightedK => Policy::WeightedK,
            Self::ScaledRandK => Policy::ScaledRandK,
            Self::Systematic => Policy::Systematic,
            Self::Bernoulli => Policy::Bernoulli,
            Self::ColumnRow => Policy::ColumnRow,
            Self::WinnerTakeAll => Policy::WinnerTakeAll,
        }
    }
}

/// A memory on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lower")]
#[allow(missing_docs)]
pub enum MemoryOption {
    None,
    Published,
    Balanced,
}

impl MemoryOption {
    /// The memory of that name.
    pub fn memory(self, decay: f64) -> Memory {
        match self {
            Self::None => Memory::None,
            Self::Published => Memory::Published { decay },
            Self::Balanced => Memory::Balanced { decay },
        }
    }

    /// The decay it has unless another is given: 1 for the paper's, and else the one that
    /// `docs/choosing.md` found best.
    pub fn default_decay(self) -> f64 {
        match self {
            Self::None | Self::Published => 1.0,
            Self::Balanced => 0.9,
        }
    }
}

/// The precision of a memory on the command line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lower")]
#[allow(missing_docs)]
pub enum MemoryPrecisionOption {
    #[default]
    Full,
    F16,
    Bf16,
}

impl MemoryPrecisionOption {
    /// The precision of that name.
    pub fn precision(self) -> MemoryPrecision {
        match self {
            Self::Full => MemoryPrecision::Full,
            Self::F16 => MemoryPrecision::F16,
            Self::Bf16 => MemoryPrecision::BF16,
        }
    }
}

/// The gradient of the input on the command line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Args, Serialize, Deserialize)]
#[serde(default)]
pub struct InputGradientOptions {
    /// Rows of the gradient of the input that are computed, as a share of the batch [default: all]
    #[arg(long)]
    pub dx_ratio: Option<f64>,
    /// Samples them without bias, in place of the largest
    #[arg(long, requires = "dx_ratio")]
    pub dx_sampled: bool,
}

impl InputGradientOptions {
    /// The gradient of the input that is asked for.
    pub fn input_gradient(self) -> InputGradient {
        let minimum = 1;
        match self.dx_ratio {
            None => InputGradient::Exact,
            Some(ratio) if self.dx_sampled => InputGradient::Sampled { ratio, minimum },
            Some(ratio) => InputGradient::Largest { ratio, minimum },
        }
    }
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
    #[arg(long, value_enum, default_value_t = PolicyOption::Systematic)]
    pub policy: PolicyOption,
    /// What becomes of the rows left out [default: balanced, none with unbiased policies]
    #[arg(long, value_enum)]
    pub memory: Option<MemoryOption>,
    /// The factor by which the memory shrinks from step to step [default: 1 for published, 0.9 for
    /// balanced]
    #[arg(long)]
    pub decay: Option<f64>,
    /// The precision in which the memory is kept
    #[arg(long, value_enum, default_value_t)]
    pub memory_precision: MemoryPrecisionOption,
    #[command(flatten)]
    pub input_gradient: InputGradientOptions,
    /// Approximates layers too for which the exact gradient takes less time
    #[arg(long)]
    pub no_cost_rule: bool,
}

impl AopOptions {
    /// The configuration of the layer.
    ///
    /// # Errors
    ///
    /// The option that breaks its rule.
    pub fn config(&self, seed: u64) -> Result<AopConfig> {
        let policy = self.policy.policy();
        let memory = self.memory.unwrap_or(match policy.is_unbiased() {
            true => MemoryOption::None,
            false => MemoryOption::Balanced,
        });
        let decay = self.decay.unwrap_or(memory.default_decay());
        let config = AopConfig::new()
            .with_outer_products(match self.k {
                Some(k) => OuterProducts::Count(k),
                None => OuterProducts::Ratio {
                    ratio: self.k_ratio,
                    minimum: 1,
                },
            })
            .with_policy(policy)
            .with_memory(memory.memory(decay))
            .with_memory_precision(self.memory_precision.precision())
            .with_input_gradient(self.input_gradient.input_gradient())
            .with_cost_rule(!self.no_cost_rule)
            .with_seed(seed);
        config.validate()?;
        Ok(config)
    }
}
