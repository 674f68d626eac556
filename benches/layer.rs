//! Times the weight gradient of one layer, and both of its passes, exact and approximate.
//!
//! ```text
//! cargo bench --bench layer -- --m 4096 --n 1024 --p 1024 --k 512 --policy topk --memory balanced
//! ```

use std::hint::black_box;

use anyhow::{Result, bail, ensure};
use burn::{
    nn::LinearConfig,
    tensor::{Device, Tensor},
};
use burn_memaop::{
    MemAopLinear, OuterProducts,
    op::{AopStep, weight_gradient},
};
use clap::Parser;
use memaop_examples::bench::{
    Buffers, Common, Method, Observed, Precision, interleaved, observe, random,
};
use memaop_examples::{Backend, MemoryOption, PolicyOption};
use serde::Serialize;

/// Times one layer, exact and approximate; without sizes, several layers
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
    /// Number K of rows that are used [default: M/4, M/8 and M/16]
    #[arg(long, requires = "m")]
    k: Option<usize>,
    /// Policy [default: topk with balanced memory, topk without memory, and systematic]
    #[arg(long, value_enum)]
    policy: Option<PolicyOption>,
    #[arg(long, value_enum, requires = "policy")]
    memory: Option<MemoryOption>,
}

const GPU_SIZES: [(usize, usize, usize); 3] =
    [(4096, 1024, 1024), (16384, 1024, 4096), (8192, 4096, 4096)];

const SIZES: [(usize, usize, usize); 5] = [
    (64, 784, 10),
    (512, 784, 512),
    (1024, 1024, 1024),
    (4096, 1024, 1024),
    (2048, 4096, 1024),
];

#[derive(Serialize)]
struct Row {
    backend: Backend,
    dtype: Precision,
    m: usize,
    n: usize,
    p: usize,
    k: usize,
    policy: PolicyOption,
    memory: MemoryOption,
    /// Whether the layer is exact by the cost rule.
    exact_by_rule: bool,
    exact_dw_ms: f64,
    aop_dw_ms: f64,
    exact_step_ms: f64,
    aop_step_ms: f64,
    limit_dw_ms: f64,
    dw_ratio: f64,
    step_ratio: f64,
    limit_ratio: f64,
    /// The measured bandwidth of copying, reads and writes together.
    copy_gb_per_s: f64,
    /// The kernels and read-backs of one weight gradient, product included.
    exact_dw: Option<Observed>,
    aop_dw: Option<Observed>,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let device = options.common.device()?;
    let sizes = match (options.m, options.n, options.p) {
        (Some(m), Some(n), Some(p)) => vec![(m, n, p)],
        _ if options.common.backend.is_cpu() => SIZES.to_vec(),
        _ => GPU_SIZES.to_vec(),
    };

    println!(
        "{:>5} {:>5} {:>5} {:>5}  {:<20} {:>9} {:>9} {:>9} {:>6} {:>6} {:>9} {:>9} {:>6}",
        "M",
        "N",
        "P",
        "K",
        "method",
        "exact dW",
        "aop dW",
        "limit dW",
        "ratio",
        "limit",
        "exact",
        "aop",
        "ratio"
    );
    let mut rows = Vec::new();
    for (m, n, p) in sizes {
        ensure!(
            m > 1 && n > 0 && p > 0,
            "--m must be at least 2, --n and --p at least 1"
        );
        let ks = match options.k {
            Some(k) => vec![k],
            None => vec![m / 4, m / 8, m / 16],
        };
        for k in ks {
            ensure!(
                (1..m).contains(&k),
                "--k must be from 1 to below {m}, but got {k}"
            );
            for method in Method::selected(options.policy, options.memory) {
                let row = measure(&options.common, &device, (m, n, p), k, method)?;
                print(&row, method);
                rows.push(row);
            }
        }
    }
    println!("\nTimes are in milliseconds. limit: product of K rows, and a pass at copy speed.");
    println!("*: the layer is exact by the cost rule, which --no-cost-rule turns off.");
    if rows.iter().any(|row| row.aop_dw.is_some()) {
        println!("At the end: kernels and read-backs of one weight gradient, exact; aop.");
    }
    options.common.save(&rows)
}

fn print(row: &Row, method: Method) {
    println!(
        "{:>5} {:>5} {:>5} {:>5}  {:<20} {:>9.3} {:>9.3} {:>9.3} {:>6.3} {:>6.2} {:>9.3} {:>9.3} \
         {:>6.3}{}{}",
        row.m,
        row.n,
        row.p,
        row.k,
        method.name(),
        row.exact_dw_ms,
        row.aop_dw_ms,
        row.limit_dw_ms,
        row.dw_ratio,
        row.limit_ratio,
        row.exact_step_ms,
        row.aop_step_ms,
        row.step_ratio,
        if row.exact_by_rule { " *" } else { "" },
        match (row.exact_dw, row.aop_dw) {
            (Some(exact), Some(aop)) => format!("  {exact}; {aop}"),
            _ => String::new(),
        }
    );
}

fn measure(
    common: &Common,
    device: &Device,
    (m, n, p): (usize, usize, usize),
    k: usize,
    method: Method,
) -> Result<Row> {
    let config = method.config(OuterProducts::Count(k), common)?;
    let autodiff = device.clone().autodiff();
    let linear = common.dtype.cast(LinearConfig::new(n, p).init(&autodiff));
    let layer = MemAopLinear::from_linear(linear.clone(), config);
    let exact_by_rule = layer.is_exact(m, &autodiff);

    let random = |rows, columns| random(rows, columns, device, common.dtype);
    let (x, g) = (random(m, n), random(m, p));
    let chosen = (random(k, n), random(k, p));
    let product = |x: &Tensor<2>, g: &Tensor<2>| {
        black_box(x.clone().transpose().matmul(g.clone()));
    };
    let mut exact_dw = || product(&x, &g);
    let mut limit_dw = || product(&chosen.0, &chosen.1);

    let mut memory = None;
    let mut step = 0;
    let mut aop_dw = || {
        if exact_by_rule {
            return product(&x, &g);
        }
        let settings = AopStep {
            k,
            method: config.method,
            seed: config.seed,
            step,
        };
        step += 1;
        let gradient = weight_gradient(x.clone(), g.clone(), memory.take(), settings);
        memory = gradient.memory;
        black_box(gradient.weight);
    };

    // A step includes dX. The gradient from above is ones, so only the layer is timed.
    let input = x.clone().autodiff();
    let mut exact_step = || {
        let input = input.clone().require_grad();
        black_box(linear.forward(input).backward());
    };
    let mut aop_step = || {
        let input = input.clone().require_grad();
        black_box(layer.forward(input).backward());
    };

    let mut buffers = Buffers::new(common.backend, m * (n + p), device, common.dtype);
    let mut copy = || buffers.copy();

    let times = interleaved(
        device,
        common.repeats,
        &mut [
            &mut exact_dw,
            &mut aop_dw,
            &mut limit_dw,
            &mut copy,
            &mut exact_step,
            &mut aop_step,
        ],
    )?;
    let exact_dw = observe(device, exact_dw)?;
    let aop_dw = observe(device, aop_dw)?;
    let [
        exact_dw_ms,
        aop_dw_ms,
        product_ms,
        copy_ms,
        exact_step_ms,
        aop_step_ms,
    ] = times[..]
    else {
        bail!("six sides were timed");
    };
    // A copy reads and writes as many bytes as the batch has. Without a memory the pass reads the
    // batch. With one it also reads and writes the memory, which can have wider values.
    let value_bytes = common.dtype.dtype().size() as f64;
    let wider = size_of::<f32>() as f64 / value_bytes;
    let passes = match method.memory {
        MemoryOption::None => 1.0,
        _ => 1.0 + 2.0 * wider,
    };
    let limit_dw_ms = product_ms + passes * copy_ms / 2.0;
    Ok(Row {
        backend: common.backend,
        dtype: common.dtype,
        m,
        n,
        p,
        k,
        policy: method.policy,
        memory: method.memory,
        exact_by_rule,
        exact_dw_ms,
        aop_dw_ms,
        exact_step_ms,
        aop_step_ms,
        limit_dw_ms,
        dw_ratio: aop_dw_ms / exact_dw_ms,
        step_ratio: aop_step_ms / exact_step_ms,
        limit_ratio: aop_dw_ms / limit_dw_ms,
        copy_gb_per_s: 2.0 * value_bytes * (m * (n + p)) as f64 / copy_ms / 1e6,
        exact_dw,
        aop_dw,
    })
}
