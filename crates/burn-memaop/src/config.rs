use burn::config::Config;
use thiserror::Error;

/// How a [`MemAopLinear`](crate::MemAopLinear) or [`MemAopConv2d`](crate::MemAopConv2d) approximates its weight gradient.
///
/// The exact gradient `dW = X^T G` is a sum of M outer products, one for each row of the batch
/// (all leading dimensions of the input flattened; of a convolution, one for each position of its output). K of them are
/// evaluated.
///
/// By default nothing needs to be set: systematic sampling, with a K that the layer chooses for itself
/// ([`OuterProducts::Auto`]). `docs/choosing.md` says when to set something; `docs/study.md` has the study that the figures
/// below are from (MNIST, a perceptron 784-512-512-10, five seeds, SGD and Adam, batches of 128 and 512).
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
    /// The number K of outer products. K >= M is the exact gradient.
    #[config(default = "OuterProducts::Auto")]
    pub outer_products: OuterProducts,
    /// Which rows they are, and what becomes of the others.
    #[config(default = "Method::Systematic")]
    pub method: Method,
    /// How many rows of the gradient of the input, `dX = G W^T`, are computed; the others are zero.
    ///
    /// Some rows are a systematic sample: row m with probability `p_m = min(1, c |g_m|)`, times `1 / p_m`, so that the expected
    /// gradient is the exact one. What is left out is missing in all layers below, and no memory gives it back. Rows whose
    /// gradient is not finite are zero. With [`OuterProducts::Auto`] the layer chooses the number as it chooses K, for
    /// [`Method::Systematic`]; with other methods it takes all rows. It takes the noise of the layers below for that of its own.
    /// This is for perceptrons; in a small language model it cost more than it saved (`docs/choosing.md`).
    ///
    /// All rows are computed in the exact steps, where the weight is frozen, and where the cost rule makes the layer exact.
    #[config(default = "OuterProducts::All")]
    pub input_gradient: OuterProducts,
    /// How the input is kept for the backward pass.
    #[config(default = "StoredInput::Full")]
    pub stored_input: StoredInput,
    /// The number of first steps whose gradients are exact. A step is a backward pass of the layer.
    #[config(default = 0)]
    pub exact_steps: usize,
    /// Whether a gradient is exact (and an input kept as it is) where anything else would take longer, those of weight and input each for
    /// itself: on CPUs in layers with few inputs or outputs (`docs/benchmarks.md` has the rule and the costs
    /// behind it), and wherever there is no fast code for the approximation: half precision on CPUs, double precision on GPUs, LibTorch, CubeCL's CPU runtime. Off for research, where K rows are to be
    /// evaluated whatever it costs.
    #[config(default = true)]
    pub cost_rule: bool,
    /// The seed of the noise of random methods, of [`Memory::Balanced`] and of a [stored input](StoredInput).
    ///
    /// The random bits of a row depend on the seed, the number of the layer's pass and the position of the row. So every backend
    /// draws the same rows, as many as [`OuterProducts`] says, and a training with the same seed can be repeated.
    /// ([`OuterProducts::Auto`] goes by the times of the processor and the device, and repeats on the same kind of machine.)
    /// Layers with equal seeds draw alike, which biases no gradient of a weight; [`transformer`](crate::transformer) gives each
    /// a seed of its own. Rows of the [gradient of the input](Self::input_gradient) also depend on the place of the layer in the autodiff graph, so
    /// that layers one above the other draw them independently whatever their seeds are, as unbiased gradients need.
    #[config(default = 0)]
    pub seed: u64,
}

/// The number K of rows, out of the M of a batch, that a gradient is computed from: K outer products, for that of the weight.
#[derive(Config, Debug, Copy, PartialEq)]
pub enum OuterProducts {
    /// The layer chooses K among M, M/2, M/4, ... M/32, so that the loss falls fastest by the clock.
    ///
    /// Rows left out add noise to a gradient that has some anyway, being of one batch. The layer estimates both from the scores of
    /// its rows and the norm of its gradient. It weighs the progress of a step (McCandlish, Kaplan, Amodei and others, 2018,
    /// arXiv:1812.06162) against the time that the step takes on this device (`docs/algorithm.md` has the rule,
    /// `docs/choosing.md` what was measured). Where the gradient is mostly noise every row counts, and K is near M. Where the
    /// batch is larger than it need be, K is small.
    ///
    /// One pass in 10 to 100 is measured, and one in 3 at first. A measurement is read at the next one, so gradients of the weight
    /// are exact until the second. One measurement can at most halve K. If the noise is more than four times what it was, K rises
    /// at once to what the new noise asks for, M for instance.
    ///
    /// For [`Method::Systematic`] in linear layers, and batches of 16 rows and more; smaller ones take the share that was chosen last.
    /// The noise that other methods add follows other laws: they take K = M/8. A
    /// [convolution](crate::MemAopConv2d) takes all rows.
    Auto,
    /// K itself, at least 1.
    Count(usize),
    /// All M: the exact gradient of the weight (but for an input that is [stored](StoredInput) in few bits).
    All,
    /// K as a share of the rows of the batch, in `(0, 1]`: `round(ratio * M)`, and 1 at least.
    Ratio(f64),
}

/// The share of the rows that [`OuterProducts::Auto`] takes where it does not choose.
const UNCHOSEN: f64 = 0.125;

impl OuterProducts {
    /// K for a batch of `rows` rows; `rows` or more means all of them, the exact gradient. None where it is not fixed.
    pub fn k(&self, rows: usize) -> Option<usize> {
        (*self != Self::Auto).then(|| self.fixed_k(rows))
    }

    /// K where it is fixed, and that of the methods for which [`Auto`](Self::Auto) does not choose.
    pub(crate) fn fixed_k(&self, rows: usize) -> usize {
        match *self {
            Self::Auto => share_of(UNCHOSEN, rows),
            Self::All => rows,
            Self::Count(k) => k,
            Self::Ratio(ratio) => share_of(ratio, rows),
        }
    }
}

/// A share of the rows, and one at least.
fn share_of(ratio: f64, rows: usize) -> usize {
    ((ratio * rows as f64).round() as usize).max(1)
}

/// Which K of the M rows a step evaluates, and what becomes of the others.
///
/// Methods go by `|x^| |g^|`, the product of the Euclidean norms of a row's two factors (with a
/// memory, of the factors after folding it in). The paper's score is its square.
#[derive(Config, Debug, Copy, PartialEq)]
pub enum Method {
    /// Systematic sampling: K rows, row m with probability `p_m = min(1, c |x_m| |g_m|)`, where c
    /// makes the `p_m` sum to K, from one random number; each outer product times `1 / p_m`, so that the expected
    /// gradient is the exact one (Madow, 1949; Horvitz and Thompson, 1952). The rows are taken in a random order.
    /// Measured: at most 0.2 points lost at M/8, 0.4 at M/16.
    Systematic,
    /// The K rows with the highest scores, as they are: biased on its own, and a [`Memory`] gives back later what is
    /// left out. Measured: with the balanced memory at most 0.1 points lost at M/8, 0.5 at M/16; without a memory none
    /// at M/8, up to 2 and single collapses at M/16; with the published one 2 to 83 at M/8.
    TopK(Memory),
    /// What these are compared with: [`baseline`](crate::baseline).
    Baseline(Baseline),
}

/// Methods of the paper and of the field to compare with; `docs/study.md` found none better than
/// [`Method::Systematic`]. Rows of the first two count as they are, those of the others so that the expected gradient is
/// the exact one.
///
/// On GPUs [`Bernoulli`](Self::Bernoulli), [`ColumnRow`](Self::ColumnRow) and [`WinnerTakeAll`](Self::WinnerTakeAll)
/// choose on the host, which waits for the device at each step.
#[derive(Config, Debug, Copy, PartialEq)]
pub enum Baseline {
    /// K rows uniformly at random, without replacement and without rescaling (the paper's randK).
    RandK(Memory),
    /// K rows drawn one after the other, without replacement, each with probability proportional
    /// to the paper's score among those left, without rescaling (the paper's weightedK). Drawn as the top K of
    /// `log(score) + Gumbel noise`, which has the same distribution.
    WeightedK(Memory),
    /// [`RandK`](Self::RandK) without a memory, each outer product times M / K. Measured: 2.5 to 4 points lost at M/16.
    ScaledRandK,
    /// Every row on its own, with the `p_m` of [`Method::Systematic`], and the same
    /// weights: K rows on average, not always (Adelman, Levy, Hakimi, Silberstein,
    /// 2021; VCAS: Wang, Chen, Zhu, 2024).
    Bernoulli,
    /// Column-row sampling: K draws with replacement, row m with probability
    /// `p_m = |x_m| |g_m| / sum`, each outer product times `1 / (K p_m)` (Drineas,
    /// Kannan, Mahoney, 2006; Adelman et al., 2021).
    ColumnRow,
    /// Winner-take-all column-row sampling: the rows with the largest probabilities as they are,
    /// the other draws as by [`ColumnRow`](Self::ColumnRow) from the rest; as many winners as make
    /// the variance smallest (WTA-CRS: Liu et al., 2023).
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
/// Both memories shrink by a decay, in `[0, 1]`: the factor by which the product of the two kept
/// factors shrinks from step to step (each factor is multiplied by its square root).
#[derive(Config, Debug, Copy, PartialEq)]
pub enum Memory {
    /// They are dropped.
    None,
    /// The memory of the paper, algorithm Mem-AOP-GD: the rows left out are added to the rows at
    /// the same positions of the next batch.
    ///
    /// In deep networks at working learning rates the products of factors of different steps
    /// that it creates make training collapse when K is a small share of M.
    Published {
        /// The decay; 1 in the paper.
        decay: f64,
    },
    /// The rows left out are added with a random sign s and the scale
    /// `r = sqrt(|m^X| |g| / (|x| |m^G|))`: `m^X + s r x` and `m^G + (s / r) g`. The products of
    /// factors of different steps then cancel in expectation, and this r makes what they add
    /// to the variance smallest: the rank-one trick of NoBackTrack and UORO (Ollivier, Tallec,
    /// Charpiat, 2015; Tallec, Ollivier, 2017).
    ///
    /// r is 1 where a norm of the memory is 0; a pair with `|x| |g| = 0` adds nothing. The study of
    /// `docs/study.md` takes a decay of 0.9.
    Balanced {
        /// The decay.
        decay: f64,
    },
}

impl Memory {
    /// The factor for the product of what is kept, or none without a memory.
    pub fn decay(self) -> Option<f64> {
        match self {
            Self::None => None,
            Self::Published { decay } | Self::Balanced { decay } => Some(decay),
        }
    }
}

/// How a layer keeps its input from the forward to the backward pass, where the gradient of the weight needs it: mostly
/// the larger part of a training's memory.
///
/// In few bits the values are rounded up or down at random, with the distances as odds, so that the expected gradient
/// is that of the input itself, and without a memory scores go by the norms of the input itself. In 8 and 4 bits each group of 64 values of
/// a row has a scale, that of its largest: a value much larger than the others costs precision in its own group alone, a
/// value that is not finite makes its group NaN, and a group below 1e-35 is zeros. `docs/memory.md` has what modules keep,
/// and what was measured.
///
/// All gradients can be exact otherwise (what is measured against the exact gradient goes by that of the rounded input). What is
/// saved is saved only where no one else keeps the input: [`activation`](crate::activation) has functions whose own backward
/// pass needs little, which the feed-forward network of [`transformer`](crate::transformer) takes by itself; its GELU then has a
/// derivative in 8 bits. A memory ([`Method::TopK`]) widens all rows for a moment, and so does a gradient of all rows.
///
/// The input is kept as it is by the [cost rule](AopConfig::cost_rule) where values could only be packed by way of the host and with gradient checkpointing: what is
/// computed again takes nothing, and would be kept in few bits instead.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum StoredInput {
    /// As it is: a reference to the tensor.
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
    /// Whether the gradients of a batch of `rows` rows are exact at every step; that of the input counts
    /// where a backward pass asks for it (`with_input`).
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

    /// Whether the layer chooses K by the noise of its gradient.
    pub(crate) fn chooses_k(&self) -> bool {
        self.outer_products == OuterProducts::Auto && self.method == Method::Systematic
    }

    /// Whether the layer chooses the rows of the gradient of its input.
    pub(crate) fn chooses_input_rows(&self) -> bool {
        self.input_gradient == OuterProducts::Auto && self.method == Method::Systematic
    }

    /// The rows of the gradient of the input where their number is fixed; all of them where a layer cannot choose.
    pub(crate) fn fixed_input_rows(&self, rows: usize) -> usize {
        match self.input_gradient {
            OuterProducts::Auto => rows,
            fixed => fixed.fixed_k(rows).min(rows),
        }
    }

    /// As [`validate`](Self::validate), for a [`MemAopConv2d`](crate::MemAopConv2d): it has no [`Memory`], and the gradient
    /// of its input is exact.
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

/// Whether a number is a share of the rows, of which there is one at least.
fn is_share(ratio: f64) -> bool {
    ratio > 0.0 && ratio <= 1.0
}
