use burn::config::Config;
use thiserror::Error;

/// How a [`MemAopLinear`](crate::MemAopLinear) or [`MemAopConv2d`](crate::MemAopConv2d)
/// approximates its weight gradient.
///
/// The exact gradient `dW = X^T G` is a sum of M outer products, of which K are evaluated. Each
/// belongs to a row of the batch (all leading dimensions flattened), in a convolution to a position
/// of the output. By default rows are drawn by systematic sampling, and the layer chooses K.
///
/// `docs/results.md` says when to change this, and has the figures below (MNIST, a perceptron
/// 784-512-512-10, five seeds, SGD and Adam, batches of 128 and 512).
///
/// ```
/// use burn_memaop::{AopConfig, Memory, Method, OuterProducts};
///
/// let aop = AopConfig::new()
///     .with_outer_products(OuterProducts::Count(32))
///     .with_method(Method::TopK(Memory::Balanced { decay: 0.9 }))
///     .with_seed(7);
/// assert_eq!(aop.outer_products.k(64), Some(32));
/// ```
#[derive(Config, Debug, Copy, PartialEq)]
pub struct AopConfig {
    /// The number K of outer products. With K >= M the gradient is exact.
    #[config(default = "OuterProducts::Auto")]
    pub outer_products: OuterProducts,
    /// Which rows are used, and what becomes of the others.
    #[config(default = "Method::Systematic")]
    pub method: Method,
    /// How many rows of the gradient of the input, `dX = G W^T`, are computed. The others are zero.
    ///
    /// Row m is drawn by systematic sampling with `p_m = min(1, c |g_m|)` and divided by `p_m`, so
    /// the expected gradient is exact. What is left out is missing in all layers below, and no
    /// memory gives it back. A row that is not finite in G is NaN in dX.
    ///
    /// [`OuterProducts::Auto`] chooses the number like K, by the noise of this layer. With methods
    /// other than [`Method::Systematic`] it takes M. Use this in perceptrons; in a small language
    /// model it cost more than it saved. All rows are computed in exact steps, with a frozen
    /// weight, and where the cost rule says so.
    #[config(default = "OuterProducts::All")]
    pub input_gradient: OuterProducts,
    /// How the input is kept for the backward pass.
    #[config(default = "StoredInput::Full")]
    pub stored_input: StoredInput,
    /// The number of first steps with exact gradients. A step is a backward pass of the layer.
    #[config(default = 0)]
    pub exact_steps: usize,
    /// Whether a gradient is exact, and an input kept in full, where that takes less time.
    ///
    /// The rule decides for weight and input separately. On CPUs layers with few inputs or outputs
    /// are exact (`docs/benchmarks.md`). So is what has no fast code: double precision, half
    /// precision on CPUs, LibTorch, CubeCL's CPU runtime. Turn the rule off for research that needs
    /// K rows at any cost.
    #[config(default = true)]
    pub cost_rule: bool,
    /// The seed of all random bits.
    ///
    /// The bits of a row depend on the seed, the number of the layer's pass and the row's position.
    /// So all backends draw the same rows, and trainings can be repeated. [`OuterProducts::Auto`]
    /// goes by fixed costs for each kind of processor, so it repeats on the same kind of machine.
    ///
    /// Layers with equal seeds draw alike, which biases no gradient of a weight.
    /// [`transformer`](crate::transformer) gives each layer its own. Draws for the [gradient of the
    /// input](Self::input_gradient) also depend on the layer's place in the autodiff graph, because
    /// layers one above the other must draw independently.
    #[config(default = 0)]
    pub seed: u64,
    /// Whether records hold the [state](crate::MemAopLinear#state) of the layer, so that a resumed
    /// training repeats the uninterrupted one bit for bit. [`Dropout`](crate::nn::Dropout) goes on,
    /// too. What else a model draws comes from the device's generator, which no record holds.
    ///
    /// Without it a record holds what that of Burn's layer holds. The records of a model and of the
    /// same model with Burn's layers then load into each other. The state of a method with a
    /// [`Memory`] is always saved.
    #[config(default = false)]
    pub saved_state: bool,
}

/// The number K of the M rows of a batch that a gradient is computed from.
#[derive(Config, Debug, Copy, PartialEq)]
pub enum OuterProducts {
    /// The layer chooses K among M, M/2, M/4, ... M/32 to make the loss fall fastest by the clock.
    ///
    /// From the scores of its rows and the norm of its gradient, it estimates the noise of the
    /// gradient and what rows left out add. It weighs the progress of a step (McCandlish, Kaplan,
    /// Amodei and others, 2018, arXiv:1812.06162) against its time on this device
    /// (`docs/algorithm.md`). K is near M if the gradient is mostly noise, and small if the batch
    /// is larger than need be.
    ///
    /// One pass in 3 is measured at first, later one in 10 to 100. Each is read at the next
    /// measurement, so gradients of the weight are exact until the second. A measurement at most
    /// halves K. If the noise is above four times its average, K rises at once to what this asks
    /// for, M for instance.
    ///
    /// This is for [`Method::Systematic`] in linear layers, from 16 rows on. A smaller batch takes
    /// the share of the rows that the layer chose last. Other methods, whose noise follows other
    /// laws, take M/8, and a [convolution](crate::MemAopConv2d) takes M.
    Auto,
    /// K itself, at least 1.
    Count(usize),
    /// All M rows: the exact gradient, but for an input [stored](StoredInput) in few bits.
    All,
    /// A share of the rows, in `(0, 1]`: K is `round(ratio * M)`, and at least 1.
    Ratio(f64),
}

impl OuterProducts {
    /// The share that [`Auto`](Self::Auto) takes with methods for which it does not choose.
    pub(crate) const UNCHOSEN: f64 = 0.125;

    /// K for a batch of `rows` rows, or none with [`Auto`](Self::Auto). `rows` or more means all.
    pub fn k(&self, rows: usize) -> Option<usize> {
        (*self != Self::Auto).then(|| self.fixed_k(rows))
    }

    /// As [`k`](Self::k); for [`Auto`](Self::Auto) the K of methods for which it does not choose.
    pub(crate) fn fixed_k(&self, rows: usize) -> usize {
        match *self {
            Self::Auto => share_of(Self::UNCHOSEN, rows),
            Self::All => rows,
            Self::Count(k) => k,
            Self::Ratio(ratio) => share_of(ratio, rows),
        }
    }
}

fn share_of(ratio: f64, rows: usize) -> usize {
    ((ratio * rows as f64).round() as usize).max(1)
}

/// Which K of the M rows are used, and what becomes of the others.
///
/// Rows are mostly drawn by `|x^| |g^|`, the product of the Euclidean norms of their two factors
/// (with a memory, after folding it in). The paper's score is its square.
#[derive(Config, Debug, Copy, PartialEq)]
pub enum Method {
    /// Systematic sampling (Madow, 1949; Horvitz and Thompson, 1952): K rows, from one random
    /// number. Row m is drawn with probability `p_m = min(1, c |x_m| |g_m|)`, where c makes the
    /// `p_m` sum to K. Its outer product is divided by `p_m`, so the expected gradient is exact.
    /// The rows are taken in a random order. Measured: at most 0.2 points lost at M/8, 0.4 at M/16.
    Systematic,
    /// The K rows with the highest scores, without weights. This is biased; a [`Memory`] gives back
    /// later what is left out. Measured: at most 0.1 points lost at M/8, 0.5 at M/16 with the
    /// balanced memory; none at M/8, up to 2 and single collapses at M/16 without; 2 to 83 at M/8
    /// with the published one.
    TopK(Memory),
    /// A method of [`baseline`](crate::baseline).
    Baseline(Baseline),
}

/// Methods of the paper and of the field to compare with. In `docs/results.md` none is better than
/// [`Method::Systematic`].
///
/// [`RandK`](Self::RandK) and [`WeightedK`](Self::WeightedK) give rows no weights. The others do,
/// so that the expected gradient is exact. On GPUs the last three draw on the host, which waits for
/// the device at each step.
#[derive(Config, Debug, Copy, PartialEq)]
pub enum Baseline {
    /// K rows uniformly at random, without replacement (the paper's randK).
    RandK(Memory),
    /// K rows one by one, without replacement, each with probability proportional to the paper's
    /// score among those left (the paper's weightedK). They are the top K of `log(score)` plus
    /// Gumbel numbers.
    WeightedK(Memory),
    /// [`RandK`](Self::RandK) with no memory, times M / K. Measured: 2.5 to 4 points lost at M/16.
    ScaledRandK,
    /// Each row by itself, with the `p_m` and weights of [`Method::Systematic`]: on average K rows
    /// (Adelman, Levy, Hakimi, Silberstein, 2021; VCAS: Wang, Chen, Zhu, 2024).
    Bernoulli,
    /// Column-row sampling: K draws with replacement, row m with `p_m = |x_m| |g_m| / sum`, times
    /// `1 / (K p_m)` (Drineas, Kannan, Mahoney, 2006; Adelman et al., 2021).
    ColumnRow,
    /// Winner-take-all column-row sampling: the rows with the largest probabilities without
    /// weights, and draws as by [`ColumnRow`](Self::ColumnRow) from the rest. The number of winners
    /// makes the variance smallest (WTA-CRS: Liu et al., 2023).
    WinnerTakeAll,
}

impl Method {
    /// What becomes of the rows left out.
    pub fn memory(self) -> Memory {
        match self {
            Self::TopK(memory)
            | Self::Baseline(Baseline::RandK(memory) | Baseline::WeightedK(memory)) => memory,
            _ => Memory::None,
        }
    }
}

/// What becomes of the rows that a step leaves out.
///
/// A decay, in `[0, 1]`, is the factor by which the product of the two kept factors shrinks at each
/// step. Each factor shrinks by its square root.
#[derive(Config, Debug, Copy, PartialEq)]
pub enum Memory {
    /// Rows left out are dropped.
    None,
    /// The memory of the paper, Mem-AOP-GD: rows left out are added to those at the same positions
    /// of the next batch. This makes products of factors of different steps. They let training
    /// collapse in deep networks at working learning rates if K is a small share of M.
    Published {
        /// The decay; 1 in the paper.
        decay: f64,
    },
    /// Rows left out are added to the batch's as `m^X + s r x` and `m^G + (s / r) g`, with a random
    /// sign s and `r = sqrt(|m^X| |g| / (|x| |m^G|))`. Products of factors of different steps then
    /// cancel in expectation, and this r makes the variance that they add smallest: the rank-one
    /// trick of NoBackTrack and UORO (Ollivier, Tallec, Charpiat, 2015; Tallec, Ollivier, 2017). r
    /// is 1 where a norm of the memory is 0, and a pair with `|x| |g| = 0` adds nothing. A decay of
    /// 0.9 was measured.
    Balanced {
        /// The decay.
        decay: f64,
    },
}

impl Memory {
    /// The decay, or none without a memory.
    pub fn decay(self) -> Option<f64> {
        match self {
            Self::None => None,
            Self::Published { decay } | Self::Balanced { decay } => Some(decay),
        }
    }
}

/// How a layer keeps its input for the gradient of the weight: mostly the larger part of a
/// training's activation memory (`docs/activation-memory.md`).
///
/// In few bits values are rounded up or down at random, with the distances as odds, so the expected
/// gradient is that of the input itself. Each group of 64 values of a row has the scale of its
/// largest, which costs precision in this group alone. A value that is not finite makes its group
/// NaN. A group below 1e-35 is zeros. Scores go by the norms of the input itself, except with a
/// memory and in convolutions. [Errors](crate::AopObserver::with_error) are relative to the rounded
/// input's gradient.
///
/// Bytes are saved only if nothing else keeps the same tensor. [`activation`](crate::activation)
/// has functions that keep little; the feed-forward network of [`transformer`](crate::transformer)
/// takes them by itself, GELU with a derivative in 8 bits. With a memory, or if all rows are used,
/// the backward pass holds the whole input in full for a moment. By the [cost
/// rule](AopConfig::cost_rule) inputs are kept in full where only the host could pack them, and
/// with gradient checkpointing, where they would be kept instead of computed again.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum StoredInput {
    /// A reference to the tensor.
    Full,
    /// 8 bits a value: 0.266 of single precision, with the scales.
    Int8,
    /// 4 bits a value: 0.141 of single precision, with the scales.
    Int4,
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
    /// A count of 0 for the gradient of the input.
    #[error("AopConfig.input_gradient: the count must be at least 1, but got {0}")]
    InputCount(usize),
    /// A ratio outside `(0, 1]` for the gradient of the input.
    #[error("AopConfig.input_gradient: the ratio must be in (0, 1], but got {0}")]
    InputRatio(f64),
    /// A decay outside `[0, 1]`.
    #[error("AopConfig.method: the decay must be in [0, 1], but got {0}")]
    Decay(f64),
    /// A memory, in a convolution.
    #[error("AopConfig.method: in a convolution it must have no memory, but got {0:?}")]
    ConvolutionMemory(Method),
    /// Some rows of the gradient of the input, in a convolution.
    #[error("AopConfig.input_gradient: in a convolution it must be All, but got {0:?}")]
    ConvolutionInput(OuterProducts),
}

impl AopConfig {
    /// Whether the gradients of a batch of `rows` rows are exact at every step. That of the input
    /// counts if a backward pass asks for it (`with_input`).
    pub(crate) fn is_exact(&self, rows: usize, with_input: bool) -> bool {
        let some_of_input = match self.chooses_input_rows() {
            true => rows > 1,
            false => self.fixed_input_rows(rows) < rows,
        };
        if with_input && some_of_input {
            return false;
        }
        match self.outer_products {
            OuterProducts::Auto => rows <= 1,
            fixed => fixed.fixed_k(rows) >= rows,
        }
    }

    /// The same configuration. Panics if [`validate`](Self::validate) rejects it.
    pub(crate) fn valid(self) -> Self {
        if let Err(error) = self.validate() {
            panic!("{error}");
        }
        self
    }

    /// Whether records hold the state of the layer.
    pub(crate) fn is_state_saved(&self) -> bool {
        self.saved_state || self.method.memory() != Memory::None
    }

    /// Whether the layer chooses K by the noise of its gradient.
    pub(crate) fn chooses_k(&self) -> bool {
        self.outer_products == OuterProducts::Auto && self.method == Method::Systematic
    }

    pub(crate) fn chooses_input_rows(&self) -> bool {
        self.input_gradient == OuterProducts::Auto && self.method == Method::Systematic
    }

    /// The number of these rows where it is fixed. It is `rows` where a layer cannot choose.
    pub(crate) fn fixed_input_rows(&self, rows: usize) -> usize {
        match self.input_gradient {
            OuterProducts::Auto => rows,
            fixed => fixed.fixed_k(rows).min(rows),
        }
    }

    /// As [`validate`](Self::validate), for a [`MemAopConv2d`](crate::MemAopConv2d): it has no
    /// [`Memory`], and the gradient of its input is exact.
    ///
    /// # Errors
    ///
    /// The first value that breaks its rule.
    pub fn validate_convolution(&self) -> Result<(), AopConfigError> {
        self.validate()?;
        if self.method.memory() != Memory::None {
            return Err(AopConfigError::ConvolutionMemory(self.method));
        }
        match self.input_gradient {
            OuterProducts::All => Ok(()),
            other => Err(AopConfigError::ConvolutionInput(other)),
        }
    }

    /// Checks every value against its rule.
    ///
    /// # Errors
    ///
    /// The first value that breaks its rule.
    pub fn validate(&self) -> Result<(), AopConfigError> {
        match self.outer_products {
            OuterProducts::Count(0) => return Err(AopConfigError::Count(0)),
            OuterProducts::Ratio(ratio) if !is_share(ratio) => {
                return Err(AopConfigError::Ratio(ratio));
            }
            _ => {}
        }
        match self.input_gradient {
            OuterProducts::Count(0) => return Err(AopConfigError::InputCount(0)),
            OuterProducts::Ratio(ratio) if !is_share(ratio) => {
                return Err(AopConfigError::InputRatio(ratio));
            }
            _ => {}
        }
        match self.method.memory().decay() {
            Some(decay) if !(0.0..=1.0).contains(&decay) => Err(AopConfigError::Decay(decay)),
            _ => Ok(()),
        }
    }
}

fn is_share(ratio: f64) -> bool {
    ratio > 0.0 && ratio <= 1.0
}
