//! Handwritten digits, learned twice from the same initial weights: with `burn::nn::Linear` and
//! with `MemAopLinear`.
//!
//! ```text
//! cargo quickstart
//! ```

mod data;
mod model;
mod training;

use std::{fs, path::PathBuf};

use anyhow::{Context, Result};
use burn::tensor::Device;
use burn_memaop::AopConfig;
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use memaop_examples::{
    AopOptions, Backend,
    chart::{self, Chart, Series},
};
use serde::Serialize;

use crate::{
    data::Digits,
    model::Mlp,
    training::{Run, Settings, Training},
};

/// Learns handwritten digits with Linear and with MemAopLinear, in turns
#[derive(Parser, Debug)]
struct Options {
    #[command(flatten)]
    aop: AopOptions,
    /// Passes over the training images
    #[arg(long, default_value_t = 100)]
    epochs: usize,
    /// Images in a batch
    #[arg(long, default_value_t = 128)]
    batch: usize,
    /// Units in each of the two hidden layers
    #[arg(long, default_value_t = 512)]
    width: usize,
    /// Learning rate of SGD
    #[arg(long, default_value_t = 0.1)]
    lr: f64,
    /// Seed of the initial weights, of the order of the images and of the draws of rows
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[arg(long, value_enum, default_value_t = Backend::Flex)]
    backend: Backend,
    /// File for the table, as JSON
    #[arg(long)]
    json: Option<PathBuf>,
    /// File for the loss curves, .svg or .png
    #[arg(long, default_value = "quickstart.svg")]
    chart: PathBuf,
}

#[derive(Serialize)]
struct Report<'a> {
    runs: &'a [Run],
}

fn main() -> Result<()> {
    let options = Options::parse();
    let device = options.backend.device()?;
    let aop = options.aop.config(options.seed)?;
    let settings = Settings {
        epochs: options.epochs,
        batch: options.batch,
        width: options.width,
        lr: options.lr,
        seed: options.seed,
    };
    settings.validate()?;

    let runs = compare(&settings, aop, &device)?;
    print_table(&runs);
    if let Some(path) = &options.json {
        let report = serde_json::to_string_pretty(&Report { runs: &runs })?;
        fs::write(path, report).with_context(|| format!("--json {}", path.display()))?;
    }
    draw(&runs, &options.chart)?;
    println!("\nLoss curves: {}", options.chart.display());
    Ok(())
}

/// Trains both models from the same weights and on the same batches. They take turns, a step each.
fn compare(settings: &Settings, aop: AopConfig, device: &Device) -> Result<[Run; 2]> {
    let digits = Digits::load();
    device.seed(settings.seed);
    let linear = Mlp::new(settings.width, &device.clone().autodiff());
    let memaop = linear.clone().with_memaop(aop);

    let autodiff = device.clone().autodiff();
    let mut linear = Training::new("linear", linear, settings.lr, &autodiff);
    let mut memaop = Training::new("memaop", memaop, settings.lr, &autodiff);

    let steps = settings.epochs * digits.batches(settings.batch);
    let style = ProgressStyle::with_template("{wide_bar} {percent:>3} % {eta:>4} left")?;
    let bar = ProgressBar::new(steps as u64).with_style(style);
    for epoch in 0..settings.epochs as u64 {
        // Epochs of trainings with different seeds have different seeds too.
        let seed = settings.seed << 32 | epoch;
        for batch in digits.epoch(settings.batch, seed, &autodiff) {
            linear.step(&batch)?;
            memaop.step(&batch)?;
            bar.inc(1);
        }
        linear.end_epoch();
        memaop.end_epoch();
    }
    bar.finish();
    let test = || digits.test(device);
    Ok([linear.finish(test()), memaop.finish(test())])
}

fn print_table(runs: &[Run]) {
    println!(
        "{:<8} {:>15} {:>10} {:>16} {:>9}",
        "layer", "test accuracy", "loss", "outer products", "ms/step"
    );
    for run in runs {
        println!(
            "{:<8} {:>13.2} % {:>10.5} {:>16} {:>9.3}",
            run.layer,
            100.0 * run.test_accuracy,
            run.loss,
            run.outer_products,
            run.step_ms
        );
    }
}

/// Draws loss against epochs and against time. Times can be compared, because runs take turns.
fn draw(runs: &[Run], path: &std::path::Path) -> Result<()> {
    let series = |points: fn(&Run) -> Vec<(f64, f64)>| -> Vec<_> {
        let runs = runs.iter().enumerate();
        runs.map(|(color, run)| Series::new(run.layer, points(run), color))
            .collect()
    };
    let by_epoch = series(|run| chart::numbered(&run.losses));
    let by_time = series(|run| {
        let losses = run.losses.iter().copied();
        run.seconds.iter().copied().zip(losses).collect()
    });
    let chart = |x, series| Chart {
        title: "Digits: training loss",
        x,
        y: "loss",
        logarithmic: true,
        x_label: chart::number,
        series,
    };
    let charts = [
        chart("epoch", &by_epoch[..]),
        chart("seconds of training", &by_time[..]),
    ];
    chart::save(&charts, path).context("--chart")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fewer rows are used, and at most 1.5 points of accuracy are lost.
    #[test]
    fn fewer_outer_products_learn_as_well() {
        let device = Device::flex();
        // The defaults, but every layer uses fewer rows.
        let aop = AopConfig::new().with_cost_rule(false);
        let mut difference = 0.0;
        for seed in 0..3 {
            let settings = Settings {
                epochs: 40,
                batch: 128,
                width: 128,
                lr: 0.1,
                seed,
            };
            let [linear, memaop] = compare(&settings, aop, &device).unwrap();
            assert!(linear.test_accuracy > 0.9, "{}", linear.test_accuracy);
            let share = memaop.outer_products as f64 / linear.outer_products as f64;
            assert!(share < 0.9, "{share}");
            difference += (linear.test_accuracy - memaop.test_accuracy) / 3.0;
        }
        assert!(difference <= 0.015, "{difference}");
    }
}
