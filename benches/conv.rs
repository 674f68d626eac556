//! Times one convolution, forward alone and with backward: Burn's layer, and that of this crate
//! with all rows and with some.
//!
//! ```text
//! cargo bench --bench conv
//! cargo bench --bench conv -- --images 32 --channels 128,128 --size 16 --kernel 3 --k-ratio 0.125
//! ```

use std::hint::black_box;

use anyhow::{Result, bail, ensure};
use burn::{
    nn::{PaddingConfig2d, conv::Conv2dConfig},
    tensor::{Distribution, Tensor},
};
use burn_memaop::{AopConfig, MemAopConv2d, OuterProducts};
use clap::Parser;
use memaop_examples::Backend;
use memaop_examples::bench::{Common, Observed, Precision, interleaved, observe};
use serde::Serialize;

/// Times one convolution, exact and approximate; without sizes, several convolutions
#[derive(Parser, Debug)]
struct Options {
    #[command(flatten)]
    common: Common,
    #[arg(long, requires_all = ["channels", "size"])]
    images: Option<usize>,
    /// Channels of input and output
    #[arg(long, value_delimiter = ',', requires = "images")]
    channels: Vec<usize>,
    /// Height and width of the images
    #[arg(long, requires = "images")]
    size: Option<usize>,
    /// Height and width of the kernel; images are padded by half of it
    #[arg(long, requires = "images", default_value_t = 3)]
    kernel: usize,
    #[arg(long, requires = "images", default_value_t = 1)]
    stride: usize,
    #[arg(long, requires = "images", default_value_t = 1)]
    groups: usize,
    /// K as a share of the rows
    #[arg(long, default_value_t = 0.125)]
    k_ratio: f64,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct Sizes {
    images: usize,
    inputs: usize,
    outputs: usize,
    size: usize,
    kernel: usize,
    stride: usize,
    groups: usize,
}

/// The images, channels of input and output, size, kernel, stride and groups.
const SIZES: [[usize; 7]; 16] = [
    [64, 1, 32, 28, 3, 1, 1],
    [64, 3, 64, 32, 3, 1, 1],
    [64, 3, 8, 32, 3, 1, 1],
    [64, 1, 16, 28, 3, 1, 1],
    [64, 16, 16, 28, 3, 1, 1],
    [64, 32, 64, 28, 3, 1, 1],
    [64, 64, 64, 32, 3, 1, 1],
    [32, 128, 128, 16, 3, 1, 1],
    [64, 256, 256, 7, 3, 1, 1],
    [32, 64, 128, 16, 3, 2, 1],
    [32, 64, 256, 16, 1, 1, 1],
    [64, 32, 32, 14, 5, 1, 1],
    [32, 64, 64, 16, 3, 1, 8],
    [32, 64, 64, 16, 3, 1, 64],
    [32, 64, 128, 16, 3, 1, 64],
    [1, 64, 64, 56, 3, 1, 1],
];

#[derive(Serialize)]
struct Row {
    backend: Backend,
    dtype: Precision,
    #[serde(flatten)]
    sizes: Sizes,
    k_ratio: f64,
    /// Whether the layer is exact by the cost rule.
    exact_by_rule: bool,
    burn_forward_ms: f64,
    forward_ms: f64,
    /// The time of forward and backward.
    burn_step_ms: f64,
    exact_step_ms: f64,
    aop_step_ms: f64,
    /// The kernels and read-backs of a step.
    exact_step: Option<Observed>,
    aop_step: Option<Observed>,
}

fn main() -> Result<()> {
    let options = Options::parse();
    ensure!(
        options.k_ratio > 0.0 && options.k_ratio <= 1.0,
        "--k-ratio must be in (0, 1], but got {}",
        options.k_ratio
    );
    ensure!(
        options.channels.is_empty() || options.channels.len() == 2,
        "--channels must be two numbers, of input and output, but got {:?}",
        options.channels
    );
    let sizes = match (options.images, &options.channels[..], options.size) {
        (Some(images), &[inputs, outputs], Some(size)) => vec![Sizes {
            images,
            inputs,
            outputs,
            size,
            kernel: options.kernel,
            stride: options.stride,
            groups: options.groups,
        }],
        _ => SIZES.map(Sizes::from).to_vec(),
    };
    println!(
        "{:<34} {:>8} {:>8} {:>9} {:>9} {:>9} {:>6} {:>6}",
        "images, channels, size", "forward", "ours", "step", "K = M", "K < M", "K = M", "K < M"
    );
    let mut rows = Vec::new();
    for sizes in sizes {
        let row = measure(&options, sizes)?;
        print(&row);
        rows.push(row);
    }
    println!("\nTimes are in milliseconds, and ratios are those of steps to Burn's.");
    println!("*: the layer is exact by the cost rule, which --no-cost-rule turns off.");
    options.common.save(&rows)
}

impl From<[usize; 7]> for Sizes {
    fn from([images, inputs, outputs, size, kernel, stride, groups]: [usize; 7]) -> Self {
        Self {
            images,
            inputs,
            outputs,
            size,
            kernel,
            stride,
            groups,
        }
    }
}

fn print(row: &Row) {
    let Sizes {
        images,
        inputs,
        outputs,
        size,
        kernel,
        stride,
        groups,
    } = row.sizes;
    let name = format!("{images}, {inputs}-{outputs}, {size} ({kernel}, /{stride}, {groups})");
    println!(
        "{name:<34} {:>8.2} {:>8.2} {:>9.2} {:>9.2} {:>9.2} {:>6.2} {:>6.2}{}{}",
        row.burn_forward_ms,
        row.forward_ms,
        row.burn_step_ms,
        row.exact_step_ms,
        row.aop_step_ms,
        row.exact_step_ms / row.burn_step_ms,
        row.aop_step_ms / row.burn_step_ms,
        if row.exact_by_rule { " *" } else { "" },
        match (row.exact_step, row.aop_step) {
            (Some(exact), Some(aop)) => format!("  {exact}; {aop}"),
            _ => String::new(),
        }
    );
}

fn measure(options: &Options, sizes: Sizes) -> Result<Row> {
    let common = &options.common;
    let device = common.device()?;
    let autodiff = device.clone().autodiff();
    let half = sizes.kernel / 2;
    let config = Conv2dConfig::new([sizes.inputs, sizes.outputs], [sizes.kernel; 2])
        .with_stride([sizes.stride; 2])
        .with_groups(sizes.groups)
        .with_padding(PaddingConfig2d::Explicit(half, half, half, half));
    let conv = common.dtype.cast(config.init(&autodiff));
    let layer = |ratio, rule| {
        let aop = AopConfig::new()
            .with_outer_products(OuterProducts::Ratio(ratio))
            .with_cost_rule(rule);
        MemAopConv2d::from_conv2d(conv.clone(), aop)
    };
    let exact = layer(1.0, true);
    let aop = layer(options.k_ratio, !common.no_cost_rule);

    let shape = [sizes.images, sizes.inputs, sizes.size, sizes.size];
    let exact_by_rule = options.k_ratio < 1.0 && aop.is_exact(shape, &autodiff);
    let normal = Distribution::Normal(0.0, 1.0);
    let images = Tensor::<4>::random(shape, normal, &device).cast(common.dtype.dtype());
    let input = || images.clone().autodiff().require_grad();

    // A step includes dX. The gradient from above is ones, so only the layer is timed.
    let mut burn_forward = || {
        black_box(conv.forward(input()));
    };
    let mut forward = || {
        black_box(exact.forward(input()));
    };
    let mut burn_step = || {
        black_box(conv.forward(input()).backward());
    };
    let mut exact_step = || {
        black_box(exact.forward(input()).backward());
    };
    let mut aop_step = || {
        black_box(aop.forward(input()).backward());
    };
    let times = interleaved(
        &device,
        common.repeats,
        &mut [
            &mut burn_forward,
            &mut forward,
            &mut burn_step,
            &mut exact_step,
            &mut aop_step,
        ],
    )?;
    let exact_step = observe(&device, exact_step)?;
    let aop_step = observe(&device, aop_step)?;
    let [
        burn_forward_ms,
        forward_ms,
        burn_step_ms,
        exact_step_ms,
        aop_step_ms,
    ] = times[..]
    else {
        bail!("five sides were timed");
    };
    Ok(Row {
        backend: common.backend,
        dtype: common.dtype,
        sizes,
        k_ratio: options.k_ratio,
        exact_by_rule,
        burn_forward_ms,
        forward_ms,
        burn_step_ms,
        exact_step_ms,
        aop_step_ms,
        exact_step,
        aop_step,
    })
}
