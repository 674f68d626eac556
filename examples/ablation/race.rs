//! How long trainings take to an accuracy. All of one seed take turns, a part of an epoch each, so that
//! their times compare.

use std::{fmt::Write, path::PathBuf};

use anyhow::{Result, ensure};
use clap::Args;
use memaop_examples::{
    InputGradientOptions, MemoryOption, MemoryPrecisionOption, PolicyOption, parallel,
    statistics::{confidence, mean_and_error},
};

use crate::{
    setting::{Optimizer, Setting},
    training::{Data, Training},
};

/// Turns, and so tests, in an epoch.
const TURNS: usize = 5;

#[derive(Args, Debug)]
pub struct Race {
    /// The share of test images to recognise
    #[arg(long, default_value_t = 0.97)]
    target: f64,
    #[arg(long, value_enum, default_value_t = Optimizer::Sgd)]
    optimizer: Optimizer,
    /// Batch sizes, each with the learning rate at its place in --lr
    #[arg(long, value_delimiter = ',', default_value = "128,256,512")]
    batch: Vec<usize>,
    /// Learning rates, one for each batch size
    #[arg(long, value_delimiter = ',', default_value = "0.1,0.2,0.3")]
    lr: Vec<f64>,
    /// Units in the hidden layers
    #[arg(long, value_delimiter = ',', default_value = "512,512")]
    widths: Vec<usize>,
    /// Epochs after which a training gives up
    #[arg(long, default_value_t = 10)]
    epochs: usize,
    /// Outer products in a step as a share of the batch
    #[arg(long, default_value_t = 0.125)]
    k_ratio: f64,
    /// Rows of the gradient of the input, where not all are computed
    #[arg(long, default_value_t = 0.25)]
    dx_ratio: f64,
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// A folder with the four IDX files of MNIST in mnist/, plain or .gz
    #[arg(long, default_value = "data")]
    data: PathBuf,
    /// Writes the table to this file
    #[arg(long)]
    out: Option<PathBuf>,
}

/// A training's way to the target.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Finish {
    seconds: f64,
    epochs: f64,
}

impl Race {
    pub fn run(&self) -> Result<()> {
        ensure!(
            self.target > 0.0 && self.target < 1.0,
            "--target must be in (0, 1), but got {}",
            self.target
        );
        ensure!(
            self.batch.len() == self.lr.len(),
            "--lr must have a learning rate for each --batch, but got {} for {}",
            self.lr.len(),
            self.batch.len()
        );
        ensure!(self.seeds > 0, "--seeds must be at least 1, but got 0");
        let data = Data::load(&self.data)?;
        let settings = self.settings();
        for setting in &settings {
            setting.validate(data.train.len())?;
        }
        let bar = parallel::progress_bar(self.seeds * (self.epochs * TURNS) as u64)?;
        let mut finishes = vec![Vec::new(); settings.len()];
        for seed in 0..self.seeds {
            let race = self.race(&data, &settings, seed, || bar.inc(1));
            for (finishes, finish) in finishes.iter_mut().zip(race) {
                finishes.extend(finish);
            }
        }
        bar.finish();
        let table = table(&settings, &finishes, self);
        println!("{table}");
        match &self.out {
            None => Ok(()),
            Some(path) => parallel::write(path, &table),
        }
    }

    /// For each batch size the exact training first.
    fn settings(&self) -> Vec<Setting> {
        let all = InputGradientOptions::default();
        let largest = InputGradientOptions {
            dx_ratio: Some(self.dx_ratio),
            dx_sampled: false,
        };
        let sampled = InputGradientOptions {
            dx_sampled: true,
            ..largest
        };
        let methods = [
            (PolicyOption::Systematic, MemoryOption::None, all),
            (PolicyOption::Systematic, MemoryOption::None, largest),
            (PolicyOption::Systematic, MemoryOption::None, sampled),
            (PolicyOption::TopK, MemoryOption::Balanced, sampled),
        ];
        let pairs = self.batch.iter().zip(&self.lr);
        let settings = pairs.flat_map(|(&batch, &lr)| {
            let approximate = methods.map(|(policy, memory, input_gradient)| Setting {
                optimizer: self.optimizer,
                lr,
                momentum: 0.0,
                batch,
                widths: self.widths.clone(),
                epochs: self.epochs,
                k_ratio: self.k_ratio,
                policy,
                memory,
                decay: memory.default_decay(),
                memory_precision: MemoryPrecisionOption::Full,
                input_gradient,
                cost_rule: true,
                exact_steps: 0,
            });
            [approximate[0].exact()].into_iter().chain(approximate)
        });
        settings.collect()
    }

    /// When each training reached the target, if it did.
    fn race(
        &self,
        data: &Data,
        settings: &[Setting],
        seed: u64,
        after_turn: impl Fn(),
    ) -> Vec<Option<Finish>> {
        let mut runners: Vec<_> = settings
            .iter()
            .map(|setting| (Training::new(data, setting, seed), 0.0, 0.0, None))
            .collect();
        for turn in 0..self.epochs * TURNS {
            for ((training, seconds, accuracy, finish), setting) in runners.iter_mut().zip(settings)
            {
                if finish.is_some() {
                    continue;
                }
                let steps = data.train.len() / setting.batch;
                // The parts of an epoch are equal but for one step.
                let part = turn % TURNS;
                let steps = (part + 1) * steps / TURNS - part * steps / TURNS;
                let before = (*seconds, *accuracy);
                *seconds += training.advance(steps);
                *accuracy = training.test_accuracy();
                if *accuracy >= self.target {
                    // Between two tests, on the line.
                    let way = (self.target - before.1) / (*accuracy - before.1);
                    *finish = Some(Finish {
                        seconds: before.0 + way * (*seconds - before.0),
                        epochs: (turn as f64 + way) / TURNS as f64,
                    });
                }
            }
            after_turn();
        }
        runners.into_iter().map(|runner| runner.3).collect()
    }
}

/// A Markdown table with 95 % intervals; ratios are those of the same seed at the batch size at which exact
/// training is fastest.
fn table(settings: &[Setting], finishes: &[Vec<Finish>], race: &Race) -> String {
    let seconds = |finishes: &[Finish]| -> Vec<f64> {
        finishes.iter().map(|finish| finish.seconds).collect()
    };
    let interval = |values: &[f64]| {
        let width = confidence(values).unwrap_or(f64::NAN);
        format!("{:.2} ± {width:.2}", mean_and_error(values).0)
    };
    let all = |finishes: &[Finish]| finishes.len() == race.seeds as usize;
    let exact = settings.iter().zip(finishes);
    let exact = exact.filter(|(setting, finishes)| setting.is_exact() && all(finishes));
    let best = exact
        .map(|(_, finishes)| seconds(finishes))
        .min_by(|a, b| mean_and_error(a).0.total_cmp(&mean_and_error(b).0));
    let mut table = format!(
        "Seconds and epochs to {} %, {:?}, hidden {:?}, K/M {}, {} seeds\n\n\
         | batch | learning rate | method | seconds | epochs | to the best exact |\n\
         |---|---|---|---|---|---|\n",
        100.0 * race.target,
        race.optimizer,
        race.widths,
        race.k_ratio,
        race.seeds
    );
    for (setting, finishes) in settings.iter().zip(finishes) {
        let _ = write!(
            table,
            "| {} | {} | {} | ",
            setting.batch,
            setting.lr,
            setting.method()
        );
        let _ = match all(finishes) {
            false => writeln!(
                table,
                "{} of {} reached it in {} epochs | | |",
                finishes.len(),
                race.seeds,
                race.epochs
            ),
            true => {
                let seconds = seconds(finishes);
                let epochs: Vec<_> = finishes.iter().map(|finish| finish.epochs).collect();
                let ratios = best.iter().flatten().zip(&seconds);
                let ratios: Vec<_> = ratios.map(|(best, seconds)| seconds / best).collect();
                let [seconds, epochs, ratios] = [seconds, epochs, ratios].map(|v| interval(&v));
                writeln!(table, "{seconds} | {epochs} | {ratios} |")
            }
        };
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Cli, Command, tests::data};
    use clap::Parser;

    fn parse(options: &str) -> Race {
        let words = ["ablation", "race"].into_iter();
        let cli = Cli::try_parse_from(words.chain(options.split_whitespace())).unwrap();
        match cli.command {
            Some(Command::Race(race)) => race,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn all_reach_a_target_that_is_easy_and_none_one_that_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let data = data(folder.path());
        let small = "--batch 32,16 --widths 256 --k-ratio 0.25 --seeds 1 --target 0.9";
        let race = parse(&format!("{small} --lr 0.1,0.1 --epochs 4"));
        let settings = race.settings();
        let finishes: Vec<Vec<_>> = race
            .race(&data, &settings, 0, || ())
            .into_iter()
            .map(|finish| finish.into_iter().collect())
            .collect();
        assert_eq!(finishes.len(), 10);
        for finish in finishes.iter().flatten() {
            assert!(finish.epochs > 0.0 && finish.epochs <= 4.0 && finish.seconds > 0.0);
        }
        let table = table(&settings, &finishes, &race);
        assert!(!table.contains("reached it"), "{table}");
        assert!(table.contains("| 16 | 0.1 | exact |"), "{table}");

        let race = parse(&format!("{small} --lr 1e-6,1e-6 --epochs 1"));
        assert_eq!(race.race(&data, &race.settings(), 0, || ()), [None; 10]);
    }

    #[test]
    fn bad_values_are_named() {
        let error = parse("--target 97").run().unwrap_err().to_string();
        assert_eq!(error, "--target must be in (0, 1), but got 97");
        let error = parse("--batch 128").run().unwrap_err().to_string();
        assert!(error.contains("but got 3 for 1"), "{error}");
    }
}
