use burn::config::Config;
use thiserror::Error;

/// How a [`MemAopLinear`](crate::MemAopLinear) approximates its weight gradient.
///
/// The exact gradient `dW = X^T G` is a sum of M outer products, one for each row of the batch
/// (all leading dimensions of the input flattened). K of them are evaluated.
///
/// ```
/// use burn_memaop::{AopConfig, Memory, OuterProducts, Policy};
///
/// let aop = AopConfig::new()
///     .with_outer_products(OuterProducts::Count(32))
///     .with_policy(Policy::WeightedK)
///     .with_memory(Memory::Published { decay: 1.0 })
///     .with_seed(7);
/// assert_eq!(aop.outer_products.k(64), 32);
/// ```
#[derive(Config, Debug, Copy, PartialEq)]
pub struct AopConfig {
    /// The number K of outer products. K >= M is the exact gradient.
    #[config(default = "OuterProducts::Ratio { ratio: 0.25, minimum: 1 }")]
    pub outer_products: OuterProducts,
    /// The rule that chooses the K rows.
    #[config(default = "Policy::TopK")]
    pub policy: Policy,
    /// What becomes of the rows that are not chosen.
    #[config(default = "Memory::Published { decay: 1.0 }")]
    pub memory: Memory,
    /// The seed of the noise of [`Policy::RandK`] and [`Policy::WeightedK`].
    ///
    /// The noise of a row depends only on the seed, the layer's step counter and the row's
    /// position, so every backend draws the same rows, and so do layers that share a seed and
    /// take the same steps. Give layers seeds of their own where they should differ.
    #[config(default = 0)]
    pub seed: u64,
}

/// The number K of outer products that a step evaluates.
#[derive(Config, Debug, Copy, PartialEq)]
pub enum OuterProducts {
    /// K itself, at least 1.
    Count(usize),
    /// K as a share of the rows of the batch: `max(minimum, round(ratio * M))`.
    Ratio {
        /// The share of the rows, in `(0, 1]`.
        ratio: f64,
        /// The least K, at least 1.
        minimum: usize,
    },
}

impl OuterProducts {
    /// K for a batch of `rows` rows; `rows` or more means all of them, the exact gradient.
    pub fn k(&self, rows: usize) -> usize {
        match *self {
            Self::Count(k) => k,
            Self::Ratio { ratio, minimum } => ((ratio * rows as f64).round() as usize).max(minimum),
        }
    }
}

/// The rule that chooses K of the M rows.
///
/// The score of a row is `(|x^| |g^|)^2`, the product of the Euclidean norms of its two factors,
/// squared; with a memory, of the factors after folding it in.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum Policy {
    /// The K highest scores.
    TopK,
    /// K rows uniformly at random, without replacement and without rescaling.
    RandK,
    /// K rows drawn one after the other, without replacement, each with probability proportional
    /// to its score among those left, without rescaling. Drawn as the top K of
    /// `log(score) + Gumbel noise`, which has the same distribution.
    WeightedK,
}

/// What becomes of the rows that a step leaves out.
#[derive(Config, Debug, Copy, PartialEq)]
pub enum Memory {
    /// They are dropped.
    None,
    /// The memory of the paper, algorithm Mem-AOP-GD: the rows left out are added to the rows at
    /// the same positions of the next batch.
    ///
    /// In deep networks at working learning rates it can make training collapse when K is a
    /// small share of M; a decay below 1 helps.
    Published {
        /// The factor, in `[0, 1]`, by which the product of the two kept factors shrinks from
        /// step to step; each factor is multiplied by its square root. The paper's is 1.
        decay: f64,
    },
}

/// A value of an [`AopConfig`] that breaks its rule.
#[derive(Debug, Clone, Copy, PartialEq, Error)]
pub enum AopConfigError {
    /// `OuterProducts::Count(0)`.
    #[error("AopConfig.outer_products: the count must be at least 1, but got {0}")]
    Count(usize),
    /// A ratio outside `(0, 1]`.
    #[error("AopConfig.outer_products: the ratio must be in (0, 1], but got {0}")]
    Ratio(f64),
    /// A minimum of 0.
    #[error("AopConfig.outer_products: the minimum must be at least 1, but got {0}")]
    Minimum(usize),
    /// A decay outside `[0, 1]`.
    #[error("AopConfig.memory: the decay must be in [0, 1], but got {0}")]
    Decay(f64),
}

impl AopConfig {
    /// Checks every value against its rule.
    ///
    /// # Errors
    ///
    /// The first value that breaks its rule.
    pub fn validate(&self) -> Result<(), AopConfigError> {
        match self.outer_products {
            OuterProducts::Count(0) => return Err(AopConfigError::Count(0)),
            OuterProducts::Ratio { ratio, .. } if !(ratio > 0.0 && ratio <= 1.0) => {
                return Err(AopConfigError::Ratio(ratio));
            }
            OuterProducts::Ratio { minimum: 0, .. } => return Err(AopConfigError::Minimum(0)),
            OuterProducts::Count(_) | OuterProducts::Ratio { .. } => {}
        }
        match self.memory {
            Memory::Published { decay } if !(0.0..=1.0).contains(&decay) => {
                Err(AopConfigError::Decay(decay))
            }
            Memory::None | Memory::Published { .. } => Ok(()),
        }
    }
}
