use std::{fmt, str::FromStr};

use anyhow::{Result, anyhow, bail};
use burn_memaop::{AopConfig, Memory, Method, OuterProducts, StoredInput, baseline::Baseline};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

/// A policy, by its name on the command line.
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
    /// Whether a memory can keep the rows that this policy leaves out.
    pub fn takes_memory(self) -> bool {
        matches!(self, Self::TopK | Self::RandK | Self::WeightedK)
    }

    /// The memory of this policy unless another one is given.
    pub fn usual_memory(self) -> MemoryOption {
        match self.takes_memory() {
            true => MemoryOption::Balanced,
            false => MemoryOption::None,
        }
    }

    /// The method of this policy with a memory.
    ///
    /// # Errors
    ///
    /// Returns an error if there is a memory and the policy takes none.
    pub fn method(self, memory: Memory) -> Result<Method> {
        if memory != Memory::None && !self.takes_memory() {
            bail!(
                "--policy {self} weighs what it chooses and takes --memory none, but got {memory:?}"
            );
        }
        Ok(match self {
            Self::TopK => Method::TopK(memory),
            Self::RandK => Method::Baseline(Baseline::RandK(memory)),
            Self::WeightedK => Method::Baseline(Baseline::WeightedK(memory)),
            Self::ScaledRandK => Method::Baseline(Baseline::ScaledRandK),
            Self::Systematic => Method::Systematic,
            Self::Bernoulli => Method::Baseline(Baseline::Bernoulli),
            Self::ColumnRow => Method::Baseline(Baseline::ColumnRow),
            Self::WinnerTakeAll => Method::Baseline(Baseline::WinnerTakeAll),
        })
    }
}

impl fmt::Display for PolicyOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let option = self.to_possible_value().expect("none is skipped");
        f.write_str(option.get_name())
    }
}

/// K on the command line and in results: a share of the batch, or `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum KRatio {
    /// K as a share of the rows.
    Of(f64),
    /// The K that the layer chooses.
    Auto(AutoName),
}

/// The name of [`KRatio::AUTO`] in results.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum AutoName {
    Auto,
}

impl KRatio {
    /// The K that the layer chooses.
    pub const AUTO: Self = Self::Auto(AutoName::Auto);
    /// All rows.
    pub const ALL: Self = Self::Of(1.0);

    /// Whether a policy goes with this K: a layer chooses K only for systematic sampling.
    pub fn goes_with(self, policy: PolicyOption) -> bool {
        self != Self::AUTO || policy == PolicyOption::Systematic
    }

    /// The setting of a layer with this K.
    pub fn outer_products(self) -> OuterProducts {
        match self {
            Self::Of(1.0) => OuterProducts::All,
            Self::Of(ratio) => OuterProducts::Ratio(ratio),
            Self::Auto(_) => OuterProducts::Auto,
        }
    }

    /// M / K with two decimals, if K is fixed.
    pub fn divisor(self) -> Option<f64> {
        match self {
            Self::Of(ratio) => Some((1e2 / ratio).round() / 1e2),
            Self::Auto(_) => None,
        }
    }
}

impl FromStr for KRatio {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "auto" => Ok(Self::AUTO),
            ratio => ratio
                .parse()
                .map(Self::Of)
                .map_err(|_| anyhow!("must be auto or a share of the batch, but got {ratio}")),
        }
    }
}

impl fmt::Display for KRatio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.divisor() {
            None => f.write_str("auto"),
            Some(1.0) => f.write_str("M"),
            Some(divisor) => write!(f, "M/{divisor}"),
        }
    }
}

/// A memory, by its name on the command line.
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
    /// This memory with a decay.
    pub fn memory(self, decay: f64) -> Memory {
        match self {
            Self::None => Memory::None,
            Self::Published => Memory::Published { decay },
            Self::Balanced => Memory::Balanced { decay },
        }
    }

    /// The decay of this memory unless another one is given. That of the paper is 1.
    pub fn default_decay(self) -> f64 {
        match self {
            Self::None | Self::Published => 1.0,
            Self::Balanced => 0.9,
        }
    }
}

/// How a layer keeps its input, by its name on the command line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lower")]
#[allow(missing_docs)]
pub enum StoredInputOption {
    #[default]
    Full,
    Int8,
    Int4,
}

impl StoredInputOption {
    /// The setting of a layer that keeps its input so.
    pub fn stored_input(self) -> StoredInput {
        match self {
            Self::Full => StoredInput::Full,
            Self::Int8 => StoredInput::Int8,
            Self::Int4 => StoredInput::Int4,
        }
    }

    /// What this adds to the name of a method.
    pub fn suffix(self) -> String {
        match self {
            Self::Full => String::new(),
            stored => format!(", {stored:?}").to_lowercase(),
        }
    }
}

/// The option of the gradient of the input.
#[derive(Debug, Clone, Copy, Default, PartialEq, Args, Serialize, Deserialize)]
#[serde(default)]
pub struct InputGradientOptions {
    /// Share of the rows that the gradient of the input is computed from, or auto [default: all]
    #[arg(long)]
    pub dx_ratio: Option<KRatio>,
}

impl InputGradientOptions {
    /// The setting of a layer with this option.
    pub fn input_gradient(self) -> OuterProducts {
        self.dx_ratio.unwrap_or(KRatio::ALL).outer_products()
    }

    /// What this adds to the name of a method.
    pub fn suffix(self) -> String {
        match self.dx_ratio {
            None => String::new(),
            Some(KRatio::Auto(_)) => ", dX auto".to_string(),
            Some(KRatio::Of(ratio)) => format!(", dX {ratio} sampled"),
        }
    }
}

/// The options of a layer of burn-memaop.
#[derive(Debug, Clone, Args)]
pub struct AopOptions {
    /// Number K of rows that a weight gradient uses, in place of --k-ratio
    #[arg(long, conflicts_with = "k_ratio")]
    pub k: Option<usize>,
    /// K as a share of the batch, or auto: the layer chooses it (M/8 if not systematic)
    #[arg(long, default_value = "auto")]
    pub k_ratio: KRatio,
    /// Rule by which the rows are drawn
    #[arg(long, value_enum, default_value_t = PolicyOption::Systematic)]
    pub policy: PolicyOption,
    /// Memory of the rows left out [default: balanced, or none if the policy takes none]
    #[arg(long, value_enum)]
    pub memory: Option<MemoryOption>,
    /// Factor by which the memory shrinks at each step [default: published 1, balanced 0.9]
    #[arg(long)]
    pub decay: Option<f64>,
    #[command(flatten)]
    pub input_gradient: InputGradientOptions,
    /// How a layer keeps its input for the backward pass
    #[arg(long, value_enum, default_value_t)]
    pub stored_input: StoredInputOption,
    /// Approximates gradients even where exact ones take less time
    #[arg(long)]
    pub no_cost_rule: bool,
}

impl AopOptions {
    /// The configuration of the layer.
    ///
    /// # Errors
    ///
    /// Returns an error for a value that breaks its rule.
    pub fn config(&self, seed: u64) -> Result<AopConfig> {
        let memory = self.memory.unwrap_or(self.policy.usual_memory());
        let decay = self.decay.unwrap_or(memory.default_decay());
        let config = AopConfig::new()
            .with_outer_products(match self.k {
                Some(k) => OuterProducts::Count(k),
                None => self.k_ratio.outer_products(),
            })
            .with_method(self.policy.method(memory.memory(decay))?)
            .with_input_gradient(self.input_gradient.input_gradient())
            .with_stored_input(self.stored_input.stored_input())
            .with_cost_rule(!self.no_cost_rule)
            .with_seed(seed);
        config.validate()?;
        Ok(config)
    }
}
