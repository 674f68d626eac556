use std::{fmt, str::FromStr};

use anyhow::{Result, anyhow, bail};
use burn_memaop::{AopConfig, Memory, Method, OuterProducts, StoredInput, baseline::Baseline};
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
    /// Whether it leaves rows that a memory can keep.
    pub fn takes_memory(self) -> bool {
        matches!(self, Self::TopK | Self::RandK | Self::WeightedK)
    }

    /// The memory that it has unless another is given.
    pub fn usual_memory(self) -> MemoryOption {
        match self.takes_memory() {
            true => MemoryOption::Balanced,
            false => MemoryOption::None,
        }
    }

    /// The method with a memory.
    ///
    /// # Errors
    ///
    /// A memory for a policy that takes none.
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
    /// As the layer chooses.
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
    /// As the layer chooses.
    pub const AUTO: Self = Self::Auto(AutoName::Auto);
    /// All rows.
    pub const ALL: Self = Self::Of(1.0);

    /// Whether K is what the layer chooses with a policy, which is no rule for policies but systematic.
    pub fn goes_with(self, policy: PolicyOption) -> bool {
        self != Self::AUTO || policy == PolicyOption::Systematic
    }

    /// The setting of a layer.
    pub fn outer_products(self) -> OuterProducts {
        match self {
            Self::Of(1.0) => OuterProducts::All,
            Self::Of(ratio) => OuterProducts::Ratio(ratio),
            Self::Auto(_) => OuterProducts::Auto,
        }
    }

    /// M over K, where it is fixed.
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
    /// `docs/study.md` found best.
    pub fn default_decay(self) -> f64 {
        match self {
            Self::None | Self::Published => 1.0,
            Self::Balanced => 0.9,
        }
    }
}

/// How inputs are kept, on the command line.
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
    /// The setting of a layer.
    pub fn stored_input(self) -> StoredInput {
        match self {
            Self::Full => StoredInput::Full,
            Self::Int8 => StoredInput::Int8,
            Self::Int4 => StoredInput::Int4,
        }
    }

    /// What it adds to the name of a method.
    pub fn suffix(self) -> String {
        match self {
            Self::Full => String::new(),
            stored => format!(", {stored:?}").to_lowercase(),
        }
    }
}

/// The gradient of the input on the command line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Args, Serialize, Deserialize)]
#[serde(default)]
pub struct InputGradientOptions {
    /// Rows of the gradient of the input that are sampled, as a share of the batch, or auto: as the layer chooses [default:
    /// all]
    #[arg(long)]
    pub dx_ratio: Option<KRatio>,
}

impl InputGradientOptions {
    /// The rows that are asked for.
    pub fn input_gradient(self) -> OuterProducts {
        self.dx_ratio.unwrap_or(KRatio::ALL).outer_products()
    }

    /// What it adds to the name of a method.
    pub fn suffix(self) -> String {
        match self.dx_ratio {
            None => String::new(),
            Some(KRatio::Auto(_)) => ", dX auto".to_string(),
            Some(KRatio::Of(ratio)) => format!(", dX {ratio} sampled"),
        }
    }
}

/// The options of a `MemAopLinear`.
#[derive(Debug, Clone, Args)]
pub struct AopOptions {
    /// Outer products in a step, in place of --k-ratio
    #[arg(long, conflicts_with = "k_ratio")]
    pub k: Option<usize>,
    /// Outer products in a step as a share of the batch, or auto: as the layer chooses (M/8 with policies other than
    /// systematic)
    #[arg(long, default_value = "auto")]
    pub k_ratio: KRatio,
    /// The rule that chooses the rows
    #[arg(long, value_enum, default_value_t = PolicyOption::Systematic)]
    pub policy: PolicyOption,
    /// What becomes of the rows left out [default: balanced; none with policies that take none]
    #[arg(long, value_enum)]
    pub memory: Option<MemoryOption>,
    /// The factor by which the memory shrinks from step to step [default: 1 for published, 0.9 for
    /// balanced]
    #[arg(long)]
    pub decay: Option<f64>,
    #[command(flatten)]
    pub input_gradient: InputGradientOptions,
    /// How inputs are kept for the backward pass
    #[arg(long, value_enum, default_value_t)]
    pub stored_input: StoredInputOption,
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
