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

const SIZES: [[usize; 3]; 16] = [
    [128, 64, 64],
    [128, 128, 128],
    [512, 64, 64],
    [512, 128, 128],
    [128, 784, 512],
    [512, 784, 64],
    [512, 384, 384],
    [1024, 384, 384],
    [1024, 384, 1536],
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
    /// The operations that each of the `K (N + P)` values of drawn rows costs. The others contain
    /// an eighth of them.
    copy: f64,
    input_copy: f64,
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
        "{:>5} {:>5} {:>5} {:>8} {:>8} {:>8} {:>10} {:>6} {:>6} {:>6} {:>7}",
        "M",
        "N",
        "P",
        "ops/ns",
        "read",
        "fold in",
        "input rows",
        "gather",
        "for dX",
        "write",
        "measure"
    );
    let mut rows = Vec::new();
    for [m, n, p] in SIZES {
        let [k, half] = [m / 8, m / 2];
        let random = |rows, columns| random(rows, columns, &device, common.dtype);
        let (x, g, w) = (random(m, n), random(m, p), random(n, p));
        let (some_x, some_g) = (random(k, n), random(k, p));
        let (half_x, half_g) = (random(half, n), random(half, p));
        let product = |x: &Tensor<2>, g: &Tensor<2>| {
            black_box(x.clone().transpose().matmul(g.clone()));
        };
        let gradient = |method, k| {
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
        let input_product = |g: &Tensor<2>| {
            black_box(g.clone().matmul(w.clone().transpose()));
        };
        let input_rows = |k| {
            black_box(input_gradient(g.clone(), w.clone(), k, 0, 0));
        };
        let ks = [m, m / 2, m / 4, m / 8, m / 16, m / 32];
        let times = interleaved(
            &device,
            common.repeats,
            &mut [
                &mut || product(&x, &g),
                &mut || product(&some_x, &some_g),
                &mut gradient(Method::Systematic, k),
                &mut gradient(Method::TopK(Memory::Balanced { decay: 0.9 }), k),
                &mut || input_product(&some_g),
                &mut || input_rows(k),
                &mut || {
                    black_box(gradient_noise(x.clone(), g.clone(), w.clone(), ks));
                },
                &mut || product(&half_x, &half_g),
                &mut gradient(Method::Systematic, half),
                &mut || input_product(&half_g),
                &mut || input_rows(half),
            ],
        )?;
        let [
            exact,
            some,
            read,
            fold_in,
            some_dx,
            input_rows,
            measured,
            half_product,
            half_read,
            half_dx,
            half_input_rows,
        ] = times[..]
        else {
            bail!("eleven sides were timed");
        };
        let rate = 2.0 * (m * n * p) as f64 / (exact * 1e6);
        let cost = |ms: f64, product: f64| (ms - product) * 1e6 * rate / (m * (n + p)) as f64;
        let [read, input_rows] = [cost(read, some), cost(input_rows, some_dx)];
        let [half_read, half_input_rows] = [
            cost(half_read, half_product),
            cost(half_input_rows, half_dx),
        ];
        // The cost of copying rows is taken to be a + b K.
        let by_copies = |some: f64, half: f64| (half - some) / (1.0 / 2.0 - 1.0 / 8.0);
        let row = Row {
            m,
            n,
            p,
            rate,
            read,
            fold_in: cost(fold_in, some),
            input_rows,
            copy: by_copies(read, half_read),
            input_copy: by_copies(input_rows, half_input_rows),
            measure: measured / exact,
            // The time of a product of K rows is taken to be a + b K.
            write: (some - exact / 8.0) / (1.0 - 1.0 / 8.0) * 1e6 * rate / (n * p) as f64,
        };
        println!(
            "{m:>5} {n:>5} {p:>5} {rate:>8.0} {:>8.0} {:>8.0} {:>10.0} {:>6.0} {:>6.0} {:>6.0} \
             {:>7.2}",
            row.read, row.fold_in, row.input_rows, row.copy, row.input_copy, row.write, row.measure
        );
        rows.push(row);
    }
    common.save(&rows)
}
