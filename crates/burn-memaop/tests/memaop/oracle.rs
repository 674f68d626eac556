//! The whole step in plain `f64` loops: fold in, score, select, apply, keep. It shares no code
//! with the crate, its random numbers included.

use burn_memaop::{Memory, Policy};

use crate::support::Matrix;

/// One layer's approximate gradient and memory.
pub struct Oracle {
    pub policy: Policy,
    pub memory: Memory,
    pub seed: u64,
    pub step: u64,
    pub input: Matrix,
    pub grad: Matrix,
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
        let m = x.rows();
        let (n, p) = (x.columns(), g.columns());
        while self.input.rows() < m {
            self.input.0.push(vec![0.0; n]);
            self.grad.0.push(vec![0.0; p]);
        }

        // Fold in.
        let mut x_hat = x.clone();
        let mut g_hat = g.clone();
        if self.memory != Memory::None {
            for i in 0..m {
                for j in 0..n {
                    x_hat.0[i][j] += self.input.0[i][j];
                }
                for j in 0..p {
                    g_hat.0[i][j] += self.grad.0[i][j];
                }
            }
        }

        // Score and select.
        let mut keys = Vec::new();
        for i in 0..m {
            let x_square: f64 = x_hat.0[i].iter().map(|v| v * v).sum();
            let g_square: f64 = g_hat.0[i].iter().map(|v| v * v).sum();
            let score = x_square * g_square;
            let word = philox([i as u64, 0, self.step], self.seed);
            let uniform = ((word / 512) as f64 + 0.5) / 8_388_608.0;
            keys.push(match self.policy {
                Policy::TopK => score,
                Policy::RandK => word as f64,
                Policy::WeightedK => score.ln() - (-uniform.ln()).ln(),
            });
        }
        let mut order: Vec<usize> = (0..m).collect();
        order.sort_by(|&a, &b| keys[b].total_cmp(&keys[a]));

        // Apply.
        let mut gradient = Matrix::zeros(n, p);
        for &i in &order[..k] {
            for a in 0..n {
                for b in 0..p {
                    gradient.0[a][b] += x_hat.0[i][a] * g_hat.0[i][b];
                }
            }
        }

        // Keep.
        if let Memory::Published { decay } = self.memory {
            for i in 0..m {
                let factor = match order[..k].contains(&i) {
                    true => 0.0,
                    false => decay.sqrt(),
                };
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

/// The first word of Philox4x32-10 for the counter `(row, 0, step low, step high)`.
fn philox([row, zero, step]: [u64; 3], seed: u64) -> u64 {
    const MASK: u64 = 0xFFFF_FFFF;
    let mut c = [row, zero, step & MASK, step >> 32];
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
    c[0]
}
