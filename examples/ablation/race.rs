//! The time that trainings take to an accuracy, or to the last loss of exact training. Those of a
//! seed take turns, a part of an epoch each, so that their times can be compared.

use std::{fmt::Write, path::PathBuf};

use anyhow::{Result, ensure};
use clap::Args;
use memaop_examples::{
    InputGradientOptions, KRatio, MemoryOption, PolicyOption, StoredInputOption, parallel,
    statistics::{confidence, mean_and_error},
};
use serde::Serialize;

use crate::{
    setting::{Optimizer, Setting},
    training::{Data, Tested, Training},
};

/// The number of turns in an epoch. Each ends with a test.
const TURNS: usize = 5;

#[derive(Args, Debug)]
pub struct Race {
    /// Share of the test images to recognise
    #[arg(long, default_value_t = 0.97)]
    target: f64,
    /// Races to the last test loss of exact training at the same batch size, in place of --target
    #[arg(long, conflicts_with = "target")]
    final_loss: bool,
    #[arg(long, value_enum, default_value_t = Optimizer::Sgd)]
    optimizer: Optimizer,
    /// Batch sizes, each with the learning rate at its place in --lr
    #[arg(long, value_delimiter = ',', default_value = "128,256,512")]
    batch: Vec<usize>,
    /// Learning rates, one for each batch size
    #[arg(long, value_delimiter = ',', default_value = "0.1,0.2,0.3")]
    lr: Vec<f64>,
    /// Units in each hidden layer
    #[arg(long, value_delimiter = ',', default_value = "512,512")]
    widths: Vec<usize>,
    /// Epochs after which a training gives up
    #[arg(long, default_value_t = 10)]
    epochs: usize,
    /// K as a share of the batch, or auto; each value is a training of its own
    #[arg(long, value_delimiter = ',', default_value = "auto")]
    k_ratio: Vec<KRatio>,
    /// Also trains with these shares of the rows of the gradient of the input, or auto
    #[arg(long, value_delimiter = ',')]
    dx_ratio: Vec<KRatio>,
    /// Also trains by top-K with the balanced memory, where K is fixed
    #[arg(long)]
    topk: bool,
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// Folder with the four IDX files of MNIST in mnist/, plain or .gz
    #[arg(long, default_value = "data")]
    data: PathBuf,
    /// File for the table
    #[arg(long)]
    out: Option<PathBuf>,
    /// File for the course of every training, as JSON
    #[arg(long)]
    json: Option<PathBuf>,
}

/// The course of a training, with a value for each turn.
#[derive(Debug, Clone, Serialize)]
struct Course {
    #[serde(flatten)]
    setting: Setting,
    seed: u64,
    /// The time of training until the test, without tests.
    seconds: Vec<f64>,
    accuracy: Vec<f64>,
    loss: Vec<f64>,
    /// K of each layer at the last step of a turn; 0 for layers that are exact by the cost rule.
    k: Vec<Vec<usize>>,
}

/// The time and the epochs that a training takes to the target.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Finish {
    seconds: f64,
    epochs: f64,
}

impl Course {
    /// When values first reached a target from below, interpolated between two tests.
    fn finish(&self, values: impl Iterator<Item = f64>, target: f64) -> Option<Finish> {
        let mut before = (0.0, f64::NAN);
        for (turn, (&seconds, value)) in self.seconds.iter().zip(values).enumerate() {
            if value >= target {
                let way = match before.1.is_nan() {
                    true => 1.0,
                    false => (target - before.1) / (value - before.1),
                };
                return Some(Finish {
                    seconds: before.0 + way * (seconds - before.0),
                    epochs: (turn as f64 + way) / TURNS as f64,
                });
            }
            before = (seconds, value);
        }
        None
    }
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
        let seeds = (0..self.seeds).map(|seed| self.race(&data, &settings, seed, || bar.inc(1)));
        let races: Vec<Vec<Course>> = seeds.collect();
        bar.finish();
        let table = self.table(&settings, &races);
        println!("{table}");
        if let Some(path) = &self.json {
            parallel::write(path, &serde_json::to_string(&races.concat())?)?;
        }
        match &self.out {
            None => Ok(()),
            Some(path) => parallel::write(path, &table),
        }
    }

    /// The settings of all trainings; those of a batch size begin with the exact one.
    fn settings(&self) -> Vec<Setting> {
        let mut methods = Vec::new();
        for &k_ratio in &self.k_ratio {
            let all = InputGradientOptions::default();
            methods.push((k_ratio, PolicyOption::Systematic, all));
            methods.extend(self.dx_ratio.iter().map(|&dx_ratio| {
                let input_gradient = InputGradientOptions {
                    dx_ratio: Some(dx_ratio),
                };
                (k_ratio, PolicyOption::Systematic, input_gradient)
            }));
            if self.topk && k_ratio.goes_with(PolicyOption::TopK) {
                methods.push((k_ratio, PolicyOption::TopK, all));
            }
        }
        let pairs = self.batch.iter().zip(&self.lr);
        let settings = pairs.flat_map(|(&batch, &lr)| {
            let exact = Setting {
                optimizer: self.optimizer,
                lr,
                momentum: 0.0,
                batch,
                widths: self.widths.clone(),
                epochs: self.epochs,
                k_ratio: KRatio::ALL,
                policy: PolicyOption::TopK,
                memory: MemoryOption::None,
                decay: 1.0,
                stored_input: StoredInputOption::Full,
                input_gradient: InputGradientOptions::default(),
                cost_rule: true,
                exact_steps: 0,
            };
            let approximate = methods.iter().map(|&(k_ratio, policy, input_gradient)| {
                let memory = policy.usual_memory();
                Setting {
                    k_ratio,
                    policy,
                    memory,
                    decay: memory.default_decay(),
                    input_gradient,
                    ..exact.clone()
                }
            });
            let approximate: Vec<_> = approximate.collect();
            [exact].into_iter().chain(approximate)
        });
        settings.collect()
    }

    /// The course of each training, up to the target or the last epoch.
    fn race(
        &self,
        data: &Data,
        settings: &[Setting],
        seed: u64,
        after_turn: impl Fn(),
    ) -> Vec<Course> {
        let runner = |setting| {
            let course = Course {
                setting: Setting::clone(setting),
                seed,
                seconds: Vec::new(),
                accuracy: Vec::new(),
                loss: Vec::new(),
                k: Vec::new(),
            };
            (Training::new(data, setting, seed), course)
        };
        let mut runners: Vec<_> = settings.iter().map(runner).collect();
        for turn in 0..self.epochs * TURNS {
            for (training, course) in &mut runners {
                let reached = course
                    .accuracy
                    .last()
                    .is_some_and(|&last| last >= self.target);
                if reached && !self.final_loss {
                    continue;
                }
                let steps = data.train.len() / course.setting.batch;
                // The parts of an epoch differ by one step at most.
                let part = turn % TURNS;
                let steps = (part + 1) * steps / TURNS - part * steps / TURNS;
                let before = course.seconds.last().copied().unwrap_or(0.0);
                course.seconds.push(before + training.advance(steps));
                let Tested { accuracy, loss } = training.test();
                course.accuracy.push(accuracy);
                course.loss.push(loss);
                course.k.push(training.ks());
            }
            after_turn();
        }
        runners.into_iter().map(|(_, course)| course).collect()
    }

    /// When each training of a seed reached the target; none if it did not.
    fn finishes(&self, courses: &[Course]) -> Vec<Option<Finish>> {
        let finish = |course: &Course| {
            if !self.final_loss {
                return course.finish(course.accuracy.iter().copied(), self.target);
            }
            let mut others = courses.iter();
            let exact = others.find(|other| {
                other.setting.is_exact() && other.setting.batch == course.setting.batch
            })?;
            let target = -exact.loss.last()?;
            course.finish(course.loss.iter().map(|loss| -loss), target)
        };
        courses.iter().map(finish).collect()
    }

    /// A Markdown table with 95 % intervals. Ratios are to exact training with the same seed, at
    /// the same batch size and at the one at which it is fastest.
    fn table(&self, settings: &[Setting], races: &[Vec<Course>]) -> String {
        let by_seed: Vec<_> = races.iter().map(|courses| self.finishes(courses)).collect();
        let finishes: Vec<Vec<Finish>> = (0..settings.len())
            .map(|index| by_seed.iter().filter_map(|seed| seed[index]).collect())
            .collect();
        let all = |finishes: &[Finish]| finishes.len() == races.len();
        let of = |finishes: &[Finish], value: fn(&Finish) -> f64| -> Vec<f64> {
            finishes.iter().map(value).collect()
        };
        let seconds = |finishes: &[Finish]| of(finishes, |finish| finish.seconds);
        let exact = |batch: Option<usize>| {
            let exact = settings
                .iter()
                .zip(&finishes)
                .filter(|(setting, finishes)| {
                    let meant = batch.is_none_or(|batch| setting.batch == batch);
                    setting.is_exact() && meant && all(finishes)
                });
            exact
                .map(|(_, finishes)| seconds(finishes))
                .min_by(|a, b| mean_and_error(a).0.total_cmp(&mean_and_error(b).0))
        };
        let interval = |values: &[f64]| match (values, confidence(values)) {
            ([], _) => String::new(),
            (_, None) => format!("{:.2}", mean_and_error(values).0),
            (_, Some(width)) => format!("{:.2} ± {width:.2}", mean_and_error(values).0),
        };
        let target = match self.final_loss {
            true => format!("the loss of exact training after {} epochs", self.epochs),
            false => format!("{} %", 100.0 * self.target),
        };
        let mut table = format!(
            "Seconds and epochs to {target}, {:?}, hidden {:?}, {} seeds\n\n\
             | batch | learning rate | method | K | seconds | epochs | to exact | to the best exact |\n\
             |---|---|---|---|---|---|---|---|\n",
            self.optimizer,
            self.widths,
            races.len()
        );
        for (setting, finishes) in settings.iter().zip(&finishes) {
            let (batch, lr) = (setting.batch, setting.lr);
            let (method, k) = (setting.method(), setting.k_ratio);
            let _ = write!(table, "| {batch} | {lr} | {method} | {k} | ");
            if !all(finishes) {
                let (reached, all) = (finishes.len(), races.len());
                let _ = writeln!(
                    table,
                    "{reached} of {all} reached it in {} epochs | | | |",
                    self.epochs
                );
                continue;
            }
            let seconds = seconds(finishes);
            let to = |exact: Option<Vec<f64>>| -> Vec<f64> {
                let pairs = exact.iter().flatten().zip(&seconds);
                pairs.map(|(exact, seconds)| seconds / exact).collect()
            };
            let epochs = of(finishes, |finish| finish.epochs);
            let cells = [&seconds, &epochs, &to(exact(Some(batch))), &to(exact(None))];
            let cells = cells.map(|values| interval(values));
            let _ = writeln!(table, "{} |", cells.join(" | "));
        }
        table
    }
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

    /// Settings without the cost rule, whose decisions for layers so small depend on the processor.
    fn every_layer(race: &Race) -> Vec<Setting> {
        let mut settings = race.settings();
        let approximate = settings.iter_mut().filter(|setting| !setting.is_exact());
        approximate.for_each(|setting| setting.cost_rule = false);
        settings
    }

    #[test]
    fn all_reach_a_target_that_is_easy_and_none_one_that_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let data = data(folder.path());
        let small = "--batch 32,16 --widths 256 --k-ratio 0.25,auto --seeds 1 --target 0.9";
        let race = parse(&format!(
            "{small} --lr 0.1,0.1 --epochs 4 --dx-ratio 0.25 --topk"
        ));
        let settings = every_layer(&race);
        let courses = race.race(&data, &settings, 0, || ());
        let finishes = race.finishes(&courses);
        assert_eq!(finishes.len(), 12);
        for finish in &finishes {
            let finish = finish.expect("the target is easy");
            assert!(finish.epochs > 0.0 && finish.epochs <= 4.0 && finish.seconds > 0.0);
        }
        let table = race.table(&settings, &[courses]);
        assert!(!table.contains("reached it"), "{table}");
        assert!(table.contains("| 16 | 0.1 | exact | M |"), "{table}");
        assert!(
            table.contains("| 16 | 0.1 | systematic, every layer | auto |"),
            "{table}"
        );

        let race = parse(&format!("{small} --lr 1e-6,1e-6 --epochs 1"));
        let courses = race.race(&data, &every_layer(&race), 0, || ());
        assert_eq!(race.finishes(&courses), [None; 6]);
    }

    #[test]
    fn exact_training_reaches_its_own_loss_at_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let data = data(folder.path());
        let race = parse("--final-loss --batch 32 --lr 0.1 --widths 32 --epochs 2 --k-ratio auto");
        let courses = race.race(&data, &every_layer(&race), 0, || ());
        assert!(courses[1].k.concat().iter().any(|&k| k > 0 && k < 32));
        assert!(courses.iter().all(|course| course.loss.len() == 2 * TURNS));
        let [exact, _] = race.finishes(&courses)[..] else {
            panic!("two trainings");
        };
        let exact = exact.unwrap();
        assert!(exact.epochs <= 2.0 && exact.epochs > 1.5, "{exact:?}");
    }

    #[test]
    fn a_finish_is_on_the_line_between_two_tests() {
        let course = Course {
            setting: parse("").settings().remove(0),
            seed: 0,
            seconds: vec![1.0, 2.0, 4.0],
            accuracy: vec![0.5, 0.6, 0.8],
            loss: Vec::new(),
            k: Vec::new(),
        };
        let finish = |target| {
            let finish = course.finish(course.accuracy.iter().copied(), target);
            finish.map(|finish| (finish.seconds, finish.epochs * TURNS as f64))
        };
        let (seconds, turns) = finish(0.7).unwrap();
        assert!((seconds - 3.0).abs() < 1e-9 && (turns - 2.5).abs() < 1e-9);
        assert_eq!(finish(0.4), Some((1.0, 1.0)));
        assert_eq!(finish(0.9), None);
    }

    #[test]
    fn bad_values_are_named() {
        let error = parse("--target 97").run().unwrap_err().to_string();
        assert_eq!(error, "--target must be in (0, 1), but got 97");
        let error = parse("--batch 128").run().unwrap_err().to_string();
        assert!(error.contains("but got 3 for 1"), "{error}");
    }
}
