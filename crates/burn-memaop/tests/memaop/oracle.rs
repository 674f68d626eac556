//! The whole step in plain `f64` loops: fold in, score, select, apply, keep. It shares no code
//! with the crate, its random numbers included.

use burn_memaop::{Memory, Method, baseline::Baseline};

use crate::support::Matrix;

/// The rules that choose rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    TopK,
    RandK,
    WeightedK,
    ScaledRandK,
    Systematic,
    Bernoulli,
    ColumnRow,
    WinnerTakeAll,
}

impl Policy {
    /// The method of the crate of that name.
    pub fn method(self, memory: Memory) -> Method {
        match self {
            Self::TopK => Method::TopK(memory),
            Self::RandK => Method::Baseline(Baseline::RandK(memory)),
            Self::WeightedK => Method::Baseline(Baseline::WeightedK(memory)),
            Self::ScaledRandK => Method::Baseline(Baseline::ScaledRandK),
            Self::Systematic => Method::Systematic,
            Self::Bernoulli => Method::Baseline(Baseline::Bernoulli),
            Self::ColumnRow => Method::Baseline(Baseline::ColumnRow),
            Self::WinnerTakeAll => Method::Baseline(Baseline::WinnerTakeAll),
        }
    }
}

/// One layer's approximate gradient and memory.
pub struct Oracle {
    pub policy: Policy,
    pub memory: Memory,
    pub seed: u64,
    pub step: u64,
    pub input: Matrix,
    pub grad: Matrix,
    pub age: Vec<f64>,
}

impl Oracle {
    pub fn new(policy: Policy, memory: Memory, seed: u64, d_input: usize, d_output: usize) -> Self {
        Self {
            policy,
            memory,
            seed,
            step: 0,
            input: Matrix(Vec::new()),
            grad: Matrix(Vec::new()),
            age: Vec::new(),
        }
        .with_widths(d_input, d_output)
    }

    fn with_widths(mut self, d_input: usize, d_output: usize) -> Self {
        self.input = Matrix::zeros(0, d_input);
        self.grad = Matrix::zeros(0, d_output);
        self
    }

    /// The gradient for a batch, with `k` outer products.
    pub fn step(&mut self, x: &Matrix, g: &Matrix, k: usize) -> Matrix {
        self.step_of_rounded(x, x, g, k)
    }

    /// The gradient for a batch whose input is `x`, of which the backward pass has `rounded`.
    pub fn step_of_rounded(
        &mut self,
        x: &Matrix,
        rounded: &Matrix,
        g: &Matrix,
        k: usize,
    ) -> Matrix {
        let (scored, x) = (x, rounded);
        let m = x.rows();
        let (n, p) = (x.columns(), g.columns());
        while self.input.rows() < m {
            self.input.0.push(vec![0.0; n]);
            self.grad.0.push(vec![0.0; p]);
            self.age.push(0.0);
        }

        // Fold in.
        let mut x_hat = x.clone();
        let mut g_hat = g.clone();
        for i in 0..m {
            let (mut input_scale, mut grad_scale) = (1.0, 1.0);
            if let Memory::Balanced { .. } = self.memory {
                let second = philox([i as u64, 0, self.step], self.seed)[1];
                let sign = if second >= 1 << 31 { -1.0 } else { 1.0 };
                let (a, b) = (norm(&self.input.0[i]), norm(&self.grad.0[i]));
                let (x, g) = (norm(&x.0[i]), norm(&g.0[i]));
                let r = match a * b {
                    0.0 => 1.0,
                    _ => (a * g / (x * b)).sqrt(),
                };
                (input_scale, grad_scale) = (sign * r, sign / r);
                if x * g == 0.0 {
                    (input_scale, grad_scale) = (0.0, 0.0);
                }
            }
            if let Memory::Published { decay } | Memory::Balanced { decay } = self.memory {
                let kept = decay.sqrt();
                for j in 0..n {
                    x_hat.0[i][j] = kept * self.input.0[i][j] + input_scale * x.0[i][j];
                }
                for j in 0..p {
                    g_hat.0[i][j] = kept * self.grad.0[i][j] + grad_scale * g.0[i][j];
                }
            }
        }

        // Score and select.
        let sizes: Vec<f64> = (0..m)
            .map(|i| match self.memory {
                Memory::None => norm(&scored.0[i]) * norm(&g_hat.0[i]),
                _ => norm(&x_hat.0[i]) * norm(&g_hat.0[i]),
            })
            .collect();
        let words: Vec<u64> = (0..m.max(k))
            .map(|i| philox([i as u64, 0, self.step], self.seed)[0])
            .collect();
        let order = permutation(m, self.step, self.seed);
        let chosen = choose(self.policy, &sizes, &words, &order, k);

        let mut taken = vec![false; m];
        chosen.iter().for_each(|&(row, _)| taken[row] = true);

        // Apply.
        let mut gradient = Matrix::zeros(n, p);
        for &(i, weight) in &chosen {
            for a in 0..n {
                for b in 0..p {
                    gradient.0[a][b] += weight * x_hat.0[i][a] * g_hat.0[i][b];
                }
            }
        }

        // Keep.
        if self.memory != Memory::None {
            for i in 0..m {
                let factor = if taken[i] { 0.0 } else { 1.0 };
                self.age[i] = if taken[i] { 0.0 } else { self.age[i] + 1.0 };
                for j in 0..n {
                    self.input.0[i][j] = factor * x_hat.0[i][j];
                }
                for j in 0..p {
                    self.grad.0[i][j] = factor * g_hat.0[i][j];
                }
            }
        }
        self.step += 1;
        gradient
    }
}

fn norm(row: &[f64]) -> f64 {
    row.iter().map(|value| value * value).sum::<f64>().sqrt()
}

/// The chosen rows and their weights, by the formulas of the policies, for `|x^| |g^|` and a
/// random word of every row, and a random order of the rows.
pub fn choose(
    policy: Policy,
    sizes: &[f64],
    words: &[u64],
    order: &[usize],
    k: usize,
) -> Vec<(usize, f64)> {
    let m = sizes.len();
    let uniform = |i: usize| (words[i] as f64 + 0.5) / 4_294_967_296.0;
    let best = |keys: Vec<f64>| -> Vec<usize> {
        let mut order: Vec<usize> = (0..m).collect();
        order.sort_by(|&a, &b| keys[b].total_cmp(&keys[a]));
        order[..k].to_vec()
    };
    let gumbel = |i: usize| {
        let uniform = ((words[i] / 512) as f64 + 0.5) / 8_388_608.0;
        -(-uniform.ln()).ln()
    };
    let random = || best(words[..m].iter().map(|&word| word as f64).collect());
    let total: f64 = sizes.iter().sum();
    match policy {
        Policy::TopK => best(sizes.to_vec()).into_iter().map(|i| (i, 1.0)).collect(),
        Policy::RandK => random().into_iter().map(|i| (i, 1.0)).collect(),
        Policy::WeightedK => {
            let keys = (0..m).map(|i| (sizes[i] * sizes[i]).ln() + gumbel(i));
            best(keys.collect()).into_iter().map(|i| (i, 1.0)).collect()
        }
        Policy::ScaledRandK => {
            let rows = random().into_iter();
            rows.map(|i| (i, m as f64 / k as f64)).collect()
        }
        Policy::Systematic => {
            let p = inclusion_probabilities(sizes, k);
            let mut chosen = Vec::new();
            for point in 1..=k {
                let mut reached = uniform(0);
                let row = order.iter().find(|&&i| {
                    reached += p[i];
                    reached >= point as f64
                });
                chosen.extend(row.map(|&i| (i, 1.0 / p[i])));
            }
            chosen
        }
        Policy::Bernoulli => {
            let p = inclusion_probabilities(sizes, k);
            let drawn = (0..m).filter(|&i| uniform(i) < p[i]);
            drawn.map(|i| (i, 1.0 / p[i])).collect()
        }
        Policy::ColumnRow => draws(sizes, k, uniform),
        Policy::WinnerTakeAll => {
            let mut order: Vec<usize> = (0..m).collect();
            order.sort_by(|&a, &b| sizes[b].total_cmp(&sizes[a]));
            let factor = |count: usize| {
                let won: f64 = order[..count].iter().map(|&i| sizes[i] / total).sum();
                (1.0 - won) / (k - count) as f64
            };
            let count = (0..k).fold(0, |best, count| {
                if factor(count) < factor(best) {
                    count
                } else {
                    best
                }
            });
            let mut rest = sizes.to_vec();
            order[..count].iter().for_each(|&i| rest[i] = 0.0);
            let mut chosen: Vec<_> = order[..count].iter().map(|&i| (i, 1.0)).collect();
            chosen.extend(draws(&rest, k - count, uniform));
            chosen
        }
    }
}

/// Draws with replacement in proportion to the sizes.
fn draws(sizes: &[f64], count: usize, uniform: impl Fn(usize) -> f64) -> Vec<(usize, f64)> {
    let total: f64 = sizes.iter().sum();
    let draw = |index: usize| {
        let mut left = uniform(index) * total;
        let row = (0..sizes.len()).find(|&i| {
            left -= sizes[i];
            left < 0.0
        })?;
        Some((row, total / (count as f64 * sizes[row])))
    };
    (0..count).filter_map(draw).collect()
}

/// `min(1, c size)`, with c found by bisection so that they sum to K.
pub fn inclusion_probabilities(sizes: &[f64], k: usize) -> Vec<f64> {
    // With this c every row that is not zero is certain, even if they are fewer than K.
    let positive = sizes.iter().copied().filter(|&size| size > 0.0);
    let least = positive.fold(f64::INFINITY, f64::min);
    let (mut low, mut high) = (0.0, 1.0 / least);
    for _ in 0..200 {
        let c = 0.5 * (low + high);
        let sum: f64 = sizes.iter().map(|size| (c * size).min(1.0)).sum();
        if sum < k as f64 { low = c } else { high = c }
    }
    sizes.iter().map(|size| (high * size).min(1.0)).collect()
}

const MASK: u64 = 0xFFFF_FFFF;

/// The seed by which a layer with this seed draws rows of the gradient of its input, where its operation is at this place of
/// the graph: 1 where its input is a leaf.
pub fn layer_seed(seed: u64, place: u64) -> u64 {
    let words = philox([place & MASK, place >> 32, MASK], seed);
    words[0] + (words[1] << 32)
}

/// The order in which systematic sampling takes the rows: numbers of as many bits as the last row needs are
/// permuted by four times two rounds of an odd factor, an addition and a shift, and again while they are no
/// rows.
pub fn permutation(rows: usize, step: u64, seed: u64) -> Vec<usize> {
    let keys = philox([0, 1, step], seed);
    let mut size = 2;
    while size < rows as u64 {
        size *= 2;
    }
    let bits = size.ilog2();
    let round = |row: u64, factor: u64, addend: u64, shift: u32| {
        let row = (row * (factor - factor % 2 + 1) + addend) % size;
        row ^ (row / 2u64.pow(shift))
    };
    let sent_on = |row: u64| {
        keys.iter().fold(row, |row, key| {
            let row = round(row, *key, key / 65_536, bits - bits / 2);
            round(row, key / 256, key / 16_777_216, (bits / 3).max(1))
        })
    };
    let row = |place| {
        let mut row = sent_on(place);
        while row >= rows as u64 {
            row = sent_on(row);
        }
        row as usize
    };
    (0..rows as u64).map(row).collect()
}

/// The words of Philox4x32-10 for the counter `(row, second, step low, step high)`.
pub fn philox([row, second, step]: [u64; 3], seed: u64) -> [u64; 4] {
    let mut c = [row, second, step & MASK, step >> 32];
    let mut key = [seed & MASK, seed >> 32];
    for _ in 0..10 {
        let first = 0xD251_1F53 * c[0];
        let second = 0xCD9E_8D57 * c[2];
        c = [
            (second >> 32) ^ c[1] ^ key[0],
            second & MASK,
            (first >> 32) ^ c[3] ^ key[1],
            first & MASK,
        ];
        key[0] = (key[0] + 0x9E37_79B9) & MASK;
        key[1] = (key[1] + 0xBB67_AE85) & MASK;
    }
    c
}

/// The random word of a value: the fourth word of its row's block, and its column, mixed.
pub fn word_of_value([row, column]: [usize; 2], step: u64, seed: u64) -> u64 {
    const WORDS: u64 = 1 << 32;
    let key = philox([row as u64, 0, step], seed)[3];
    let mut word = (key + column as u64 * 0x9E37_79B9) % WORDS;
    for (shift, factor) in [(16, 0x85EB_CA6B), (13, 0xC2B2_AE35)] {
        word = ((word ^ (word >> shift)) * factor) % WORDS;
    }
    word ^ (word >> 16)
}
