//! Times the gradient of a layer's input, from all rows and from some.
//!
//! ```text
//! cargo bench --bench input -- --m 1024 --n 1024 --p 1024 --dx-ratio 0.25
//! ```

use std::hint::black_box;

use anyhow::{Result, bail, ensure};
use burn::tensor::Tensor;
use burn_memaop::op::parts::input_gradient;
use clap::Parser;
use memaop_examples::bench::{Buffers, Common, Observed, interleaved, observe, random};
use serde::Serialize;

/// Times the gradient of the input of one layer; without sizes, of several
#[derive(Parser, Debug)]
struct Options {
    #[command(flatten)]
    common: Common,
    /// Number of rows of the batch
    #[arg(long, requires_all = ["n", "p"])]
    m: Option<usize>,
    /// Number of inputs
    #[arg(long, requires = "m")]
    n: Option<usize>,
    /// Number of outputs
    #[arg(long, requires = "m")]
    p: Option<usize>,
    /// Share of the rows that the gradient is computed from [default: 0.25 and 0.125]
    #[arg(long)]
    dx_ratio: Option<f64>,
}

const SIZES: [(usize, usize, usize); 4] = [
    (512, 512, 512),
    (1024, 1024, 1024),
    (4096, 1024, 1024),
    (2048, 4096, 1024),
];

#[derive(Serialize)]
struct Row {
    m: usize,
    n: usize,
    p: usize,
    k: usize,
    exact_ms: f64,
    aop_ms: f64,
    limit_ms: f64,
    /// The time of the gradient of all rows where all but K hold zeros.
    sparse_ms: f64,
    ratio: f64,
    limit_ratio: f64,
    sparse_ratio: f64,
    /// The kernels and read-backs of one gradient, product included.
    observed: Option<Observed>,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let common = &options.common;
    let device = common.device()?;
    let sizes = match (options.m, options.n, options.p) {
        (Some(m), Some(n), Some(p)) => vec![(m, n, p)],
        _ => SIZES.to_vec(),
    };
    println!(
        "{:>5} {:>5} {:>5} {:>5}  {:>9} {:>9} {:>9} {:>6} {:>6}  {:>9} {:>6}",
        "M", "N", "P", "rows", "exact", "aop", "limit", "ratio", "limit", "sparse", "ratio"
    );
    let mut rows = Vec::new();
    for (m, n, p) in sizes {
        ensure!(
            m > 1 && n > 0 && p > 0,
            "--m must be at least 2, --n and --p at least 1"
        );
        for ratio in options.dx_ratio.map_or(vec![0.25, 0.125], |r| vec![r]) {
            ensure!(
                ratio > 0.0 && ratio < 1.0,
                "--dx-ratio must be in (0, 1), but got {ratio}"
            );
            let k = ((ratio * m as f64) as usize).max(1);
            let random = |rows, columns| random(rows, columns, &device, common.dtype);
            let (g, w) = (random(m, p), random(n, p));
            let some = random(k, p);
            let zeros = Tensor::<2>::zeros([m - k, p], &device).cast(common.dtype.dtype());
            let sparse = Tensor::cat(vec![some.clone(), zeros], 0);
            let product = |g: &Tensor<2>| {
                black_box(g.clone().matmul(w.clone().transpose()));
            };
            let gradient = |g: &Tensor<2>, k: usize, step: u64| {
                black_box(input_gradient(g.clone(), w.clone(), k, 0, step));
            };
            let mut step = 0;
            let mut aop = || {
                step += 1;
                gradient(&g, k, step);
            };
            let mut buffers = Buffers::new(common.backend, m * (n + p) / 2, &device, common.dtype);
            let times = interleaved(
                &device,
                common.repeats,
                &mut [
                    &mut || product(&g),
                    &mut aop,
                    &mut || product(&some),
                    &mut || buffers.copy(),
                    &mut || gradient(&sparse, m, 0),
                ],
            )?;
            let [exact_ms, aop_ms, product_ms, copy_ms, sparse_ms] = times[..] else {
                bail!("five sides were timed");
            };
            // The gradient of the output is read once, and that of the input is written once.
            let limit_ms = product_ms + copy_ms;
            let row = Row {
                m,
                n,
                p,
                k,
                exact_ms,
                aop_ms,
                limit_ms,
                sparse_ms,
                ratio: aop_ms / exact_ms,
                limit_ratio: aop_ms / limit_ms,
                sparse_ratio: sparse_ms / exact_ms,
                observed: observe(&device, aop)?,
            };
            println!(
                "{m:>5} {n:>5} {p:>5} {k:>5}  {exact_ms:>9.3} {aop_ms:>9.3} \
                     {limit_ms:>9.3} {:>6.3} {:>6.2}  {sparse_ms:>9.3} {:>6.3}  {}",
                row.ratio,
                row.limit_ratio,
                row.sparse_ratio,
                row.observed
                    .map_or(String::new(), |observed| observed.to_string())
            );
            rows.push(row);
        }
    }
    println!("\nTimes are in milliseconds. limit: the product of these rows, and a copy of both");
    println!("gradients. sparse: the exact gradient, if all other rows are zeros.");
    common.save(&rows)
}
