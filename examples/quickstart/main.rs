//! Handwritten digits, learned by a small transformer from the same initial weights: with Burn's
//! layers, with those of burn-memaop, and with these and inputs in 8 bits.
//!
//! ```text
//! cargo quickstart
//! cargo quickstart --perceptron
//! ```

mod data;
mod perceptron;
mod training;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use burn::{optim::AdamConfig, tensor::Device};
use burn_memaop::{AopConfig, StoredInput, summary, with_aop};
use clap::Parser;
use memaop_examples::{
    AopOptions, Backend,
    chart::{self, Bars, Chart, Panel, Series},
    check,
    memory::Counting,
};
use serde::Serialize;

use crate::{
    data::Digits,
    training::{Bytes, Classifier, ClassifierTraining, Run, Training, bytes, train_in_turns},
};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The transformer with Burn's layers.
mod burns {
    use crate::{
        Size,
        data::{CLASSES, PIXELS},
        training::Classifier,
    };

    include!("transformer.rs");
}

/// The same source, with burn-with-memaop under the name of Burn.
mod swapped {
    use swapped_burn as burn;

    use crate::{
        Size,
        data::{CLASSES, PIXELS},
        training::Classifier,
    };

    include!("transformer.rs");
}

/// Learns handwritten digits with Burn's layers and with those of burn-memaop, in turns
#[derive(Parser, Debug)]
struct Options {
    #[command(flatten)]
    aop: AopOptions,
    /// Compares perceptrons, which are too small to gain much, in place of transformers
    #[arg(long)]
    perceptron: bool,
    /// Passes over the training images [default: 5, perceptron 100]
    #[arg(long)]
    epochs: Option<usize>,
    /// Images in a batch [default: 16, perceptron 128]
    #[arg(long)]
    batch: Option<usize>,
    /// Width of a token, or units in each of the two hidden layers of the perceptron
    /// [default: 256, perceptron 512]
    #[arg(long)]
    width: Option<usize>,
    /// Heads of the transformer's attention
    #[arg(long, default_value_t = 4)]
    heads: usize,
    /// Blocks of the transformer
    #[arg(long, default_value_t = 1)]
    blocks: usize,
    /// Learning rate of Adam, or of SGD for the perceptron [default: 0.001, perceptron 0.1]
    #[arg(long)]
    lr: Option<f64>,
    /// Seed of the initial weights, of the order of the images and of the draws of rows
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[arg(long, value_enum, default_value_t = Backend::Flex)]
    backend: Backend,
    /// File for the table, as JSON
    #[arg(long)]
    json: Option<PathBuf>,
    /// File for the picture, .svg
    #[arg(long, default_value = "quickstart.svg")]
    chart: PathBuf,
}

/// The settings of both kinds of models.
pub struct Settings {
    pub epochs: usize,
    pub batch: usize,
    pub width: usize,
    pub lr: f64,
    pub seed: u64,
}

impl Settings {
    fn of(options: &Options) -> Result<Self> {
        let (epochs, batch, width, lr) = match options.perceptron {
            true => (100, 128, 512, 0.1),
            false => (5, 16, 256, 1e-3),
        };
        let settings = Self {
            epochs: options.epochs.unwrap_or(epochs),
            batch: options.batch.unwrap_or(batch),
            width: options.width.unwrap_or(width),
            lr: options.lr.unwrap_or(lr),
            seed: options.seed,
        };
        let train = Digits::load().train_len();
        check::at_least_one(&[
            ("epochs", settings.epochs),
            ("width", settings.width),
            ("blocks", options.blocks),
        ])?;
        if !options.perceptron {
            check::heads(settings.width, options.heads)?;
        }
        ensure!(
            (1..=train).contains(&settings.batch),
            "--batch must be from 1 to {train}, but got {}",
            settings.batch
        );
        check::positive("lr", settings.lr)?;
        Ok(settings)
    }
}

/// The size of a transformer.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    pub width: usize,
    pub heads: usize,
    pub blocks: usize,
}

#[derive(Serialize)]
struct Report<'a> {
    runs: &'a [Run],
    /// Empty for perceptrons, and where the backend allocates by itself.
    bytes: &'a [Bytes],
}

fn main() -> Result<()> {
    let options = Options::parse();
    let settings = Settings::of(&options)?;
    let device = options.backend.device()?;
    let aop = options.aop.config(options.seed)?;
    let (runs, bytes) = match options.perceptron {
        true => {
            let runs = perceptron::compare(&settings, aop, &device)?;
            perceptron::print_table(&runs);
            (runs, Vec::new())
        }
        false => {
            let size = Size {
                width: settings.width,
                heads: options.heads,
                blocks: options.blocks,
            };
            // LibTorch and CubeCL's CPU runtime allocate by themselves.
            let counts = matches!(options.backend, Backend::Flex | Backend::Ndarray);
            let (runs, bytes) = compare(&settings, size, aop, counts, &device)?;
            print_table(&runs, &bytes);
            (runs, bytes)
        }
    };
    if let Some(path) = &options.json {
        let report = Report {
            runs: &runs,
            bytes: &bytes,
        };
        let report = serde_json::to_string_pretty(&report)?;
        fs::write(path, report).with_context(|| format!("--json {}", path.display()))?;
    }
    draw(&runs, &bytes, &options.chart)?;
    println!("\nPicture: {}", options.chart.display());
    Ok(())
}

type Make<'a> = Box<dyn Fn() -> Box<dyn Training> + 'a>;

/// Trains transformers from the same weights and on the same batches, and counts their bytes.
fn compare(
    settings: &Settings,
    size: Size,
    aop: AopConfig,
    counts: bool,
    device: &Device,
) -> Result<(Vec<Run>, Vec<Bytes>)> {
    let autodiff = device.clone().autodiff();
    let swapped = || {
        device.seed(settings.seed);
        swapped::Transformer::new(size, &autodiff)
    };
    let with = |aop: AopConfig| {
        with_aop(swapped(), |_, own| {
            aop.with_seed(aop.seed.wrapping_add(own.seed))
        })
    };
    let small = aop.with_stored_input(StoredInput::Int8);
    println!("{}", summary(&with(aop)));

    let makes: [Make<'_>; 3] = [
        Box::new(|| {
            device.seed(settings.seed);
            let model = burns::Transformer::new(size, &autodiff);
            training("Burn's layers", model, settings, &autodiff)
        }),
        Box::new(|| training("burn-memaop", with(aop), settings, &autodiff)),
        Box::new(|| training("burn-memaop, 8 bits", with(small), settings, &autodiff)),
    ];
    let digits = Digits::load();
    let batch = digits.epoch(settings.batch, 0, &autodiff).swap_remove(0);
    let bytes: Result<Vec<_>> = match counts {
        true => makes.iter().map(|make| bytes(make, &batch)).collect(),
        false => Ok(Vec::new()),
    };
    let runs = train_in_turns(
        makes.iter().map(|make| make()).collect(),
        &digits,
        [settings.epochs, settings.batch],
        settings.seed,
        device,
    )?;
    Ok((runs, bytes?))
}

fn training<M: Classifier>(
    name: &'static str,
    model: M,
    settings: &Settings,
    device: &Device,
) -> Box<dyn Training> {
    // Weights are drawn when they are first read, and must be drawn alike.
    drop(model.valid());
    let adam = AdamConfig::new().init();
    Box::new(ClassifierTraining::new(
        name,
        model,
        adam,
        settings.lr,
        device,
    ))
}

const MIB: f64 = 1024.0 * 1024.0;

/// Each figure is followed by its ratio to that of Burn's layers.
fn print_table(runs: &[Run], bytes: &[Bytes]) {
    let of_memory = match bytes.is_empty() {
        true => String::new(),
        false => format!(
            "{:>10} {:>5} {:>10} {:>5} ",
            "kept, MiB", "", "peak, MiB", ""
        ),
    };
    println!(
        "{:<20} {:>9} {:>5} {of_memory}{:>14} {:>8}",
        "layers", "ms/step", "", "test accuracy", "loss"
    );
    for (index, run) in runs.iter().enumerate() {
        print!(
            "{:<20} {:>9.1} {:>5.2} ",
            run.name,
            run.step_ms,
            run.step_ms / runs[0].step_ms
        );
        if let Some(row) = bytes.get(index) {
            for (value, first) in [(row.kept, bytes[0].kept), (row.peak, bytes[0].peak)] {
                let (value, first) = (value as f64 / MIB, first as f64 / MIB);
                print!("{value:>10.1} {:>5.2} ", value / first);
            }
        }
        println!("{:>12.2} % {:>8.4}", 100.0 * run.test_accuracy, run.loss);
    }
    if !bytes.is_empty() {
        println!(
            "\nkept: between the passes of a step. peak: of a step, with weights and Adam's moments."
        );
    }
}

/// Draws the loss by time, and the bytes as bars. Times can be compared, because runs take turns.
fn draw(runs: &[Run], bytes: &[Bytes], path: &Path) -> Result<()> {
    let lines: Vec<_> = (runs.iter().enumerate())
        .map(|(color, run)| Series::new(run.name, run.losses.clone(), color))
        .collect();
    let mut panels = vec![Panel::Lines(Chart {
        title: "Digits: training loss by time",
        x: "seconds of training",
        y: "loss",
        logarithmic: false,
        x_label: chart::number,
        series: &lines,
    })];
    let bars = |figure: fn(&Bytes) -> usize| -> Vec<_> {
        let figures = bytes.iter().map(|row| figure(row) as f64 / MIB);
        runs.iter().map(|run| run.name).zip(figures).collect()
    };
    let (kept, peak) = (bars(|row| row.kept), bars(|row| row.peak));
    if !bytes.is_empty() {
        for (title, bars) in [
            ("Memory kept between the passes", &kept),
            ("Peak memory of a step", &peak),
        ] {
            let unit = "MiB";
            panels.push(Panel::Bars(Bars { title, unit, bars }));
        }
    }
    chart::save(&panels, path).context("--chart")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Held by a test, because all threads share the count of bytes and the random numbers.
    pub static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());

    /// The three trainings begin with the same loss and end near to each other. Steps of burn-memaop
    /// need less memory, and with 8 bits they keep less.
    #[test]
    fn transformers_learn_alike_in_less_memory() {
        let _alone = ALONE.lock().unwrap_or_else(|broken| broken.into_inner());
        let settings = Settings {
            epochs: 2,
            batch: 64,
            width: 32,
            lr: 1e-3,
            seed: 0,
        };
        let size = Size {
            width: 32,
            heads: 2,
            blocks: 1,
        };
        let device = Device::flex();
        let (runs, bytes) = compare(&settings, size, AopConfig::new(), true, &device).unwrap();
        for run in &runs[1..] {
            for ((_, ours), (_, burns)) in run.losses.iter().zip(&runs[0].losses) {
                assert!(
                    (ours - burns).abs() < 0.02 * burns,
                    "{}: {ours} {burns}",
                    run.name
                );
            }
        }
        let [burns, ours, small] = [0, 1, 2].map(|side| bytes[side].kept as f64);
        assert!(ours < 1.01 * burns, "{ours} {burns}");
        assert!(bytes[1].peak < bytes[0].peak);
        assert!(small < 0.8 * burns, "{small} {burns}");
    }
}
