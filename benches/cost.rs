//! Measures the constants of the cost rule: what a value costs in the passes over a batch, in
//! operations of the matrix product of the same machine.
//!
//! ```text
//! cargo bench --bench cost                                            # with AVX-512, if present
//! cargo bench --bench cost --no-default-features --features flex      # without
//! ```

use std::hint::black_box;

use anyhow::{Result, bail};
use burn::tensor::Tensor;
use burn_memaop::{
    Memory, Method,
    op::{
        AopStep,
        parts::{gradient_noise, input_gradient},
        weight_gradient,
    },
};
use clap::Parser;
use memaop_examples::bench::{Common, interleaved, random};
use serde::Serialize;

/// Measures what passes over a batch cost, in operations of the matrix product
#[derive(Parser, Debug)]
struct Options {
    #[command(flatten)]
    common: Common,
}

const SIZES: [[usize; 3]; 13] = [
    [128, 64, 64],
    [128, 128, 128],
    [512, 64, 64],
    [512, 128, 128],
    [128, 784, 512],
    [512, 784, 64],
    [512, 512, 512],
    [2048, 128, 128],
    [2048, 256, 256],
    [2048, 512, 512],
    [1024, 1024, 1024],
    [4096, 1024, 64],
    [4096, 1024, 1024],
];

#[derive(Serialize)]
struct Row {
    m: usize,
    n: usize,
    p: usize,
    /// The operations of the product in a nanosecond.
    rate: f64,
    /// The operations that each of `M (N + P)` values costs, beyond the product of the drawn rows.
    read: f64,
    fold_in: f64,
    input_rows: f64,
    /// The time of measuring the noise, divided by that of the product.
    measure: f64,
    /// The operations that a value of the gradient costs, whatever the number of rows.
    write: f64,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let common = &options.common;
    let device = common.device()?;
    println!(
        "{:>5} {:>5} {:>5} {:>8} {:>8} {:>8} {:>10} {:>6} {:>7}",
        "M", "N", "P", "ops/ns", "read", "fold in", "input rows", "write", "measure"
    );
    let mut rows = Vec::new();
    for [m, n, p] in SIZES {
        let k = m / 8;
        let random = |rows, columns| random(rows, columns, &device, common.dtype);
        let (x, g, w) = (random(m, n), random(m, p), random(n, p));
        let (some_x, some_g) = (random(k, n), random(k, p));
        let product = |x: &Tensor<2>, g: &Tensor<2>| {
            black_box(x.clone().transpose().matmul(g.clone()));
        };
        let gradient = |method| {
            let (x, g) = (&x, &g);
            let (mut kept, mut step) = (None, 0);
            move || {
                let settings = AopStep {
                    k,
                    method,
                    seed: 0,
                    step,
                };
                step += 1;
                let gradient = weight_gradient(x.clone(), g.clone(), kept.take(), settings);
                kept = gradient.memory;
                black_box(gradient.weight);
            }
        };
        let ks = [m, m / 2, m / 4, m / 8, m / 16, m / 32];
        let times = interleaved(
            &device,
            common.repeats,
            &mut [
                &mut || product(&x, &g),
                &mut || product(&some_x, &some_g),
                &mut gradient(Method::Systematic),
                &mut gradient(Method::TopK(Memory::Balanced { decay: 0.9 })),
                &mut || {
                    black_box(some_g.clone().matmul(w.clone().transpose()));
                },
                &mut || {
                    black_box(input_gradient(g.clone(), w.clone(), k, 0, 0));
                },
                &mut || {
                    black_box(gradient_noise(x.clone(), g.clone(), w.clone(), ks));
                },
            ],
        )?;
        let [exact, some, read, fold_in, some_dx, input_rows, measured] = times[..] else {
            bail!("seven sides were timed");
        };
        let rate = 2.0 * (m * n * p) as f64 / (exact * 1e6);
        let cost = |ms: f64, product: f64| (ms - product) * 1e6 * rate / (m * (n + p)) as f64;
        let row = Row {
            m,
            n,
            p,
            rate,
            read: cost(read, some),
            fold_in: cost(fold_in, some),
            input_rows: cost(input_rows, some_dx),
            measure: measured / exact,
            // The time of a product of K rows is taken to be a + b K.
            write: (some - exact / 8.0) / (1.0 - 1.0 / 8.0) * 1e6 * rate / (n * p) as f64,
        };
        println!(
            "{m:>5} {n:>5} {p:>5} {rate:>8.0} {:>8.0} {:>8.0} {:>10.0} {:>6.0} {:>7.2}",
            row.read, row.fold_in, row.input_rows, row.write, row.measure
        );
        rows.push(row);
    }
    common.save(&rows)
}
