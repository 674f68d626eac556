//! Who reaches an accuracy first, if exact training may take a smaller batch: trainings that take
//! the same time, each at the best of three learning rates, which fall to zero by a cosine. Those of
//! a seed take turns, so that their times can be compared.

use std::{
    fmt::Write,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use memaop_examples::{
    InputGradientOptions, KRatio, PolicyOption, parallel,
    statistics::{confidence, mean_and_error},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    setting::{Optimizer, Setting},
    study,
    training::{Data, Tested, Training},
};

/// The number of parts of a training. Each ends with a test.
const TURNS: usize = 15;
/// The batch whose epochs `--budget` counts.
const BUDGET_BATCH: usize = 128;
/// The turns and steps by which the time of a step is measured.
const CALIBRATION: [usize; 2] = [10, 40];
/// Learning rates, as multiples of the first guess for a batch.
const FACTORS: [f64; 3] = [0.5, 1.0, 2.0];
/// The seed of the trainings that choose the learning rates.
const RATE_SEED: u64 = 1000;

#[derive(Args, Debug)]
pub struct Race {
    /// Share of the test images to recognise
    #[arg(long, default_value_t = 0.97)]
    target: f64,
    /// Optimizers, each with a race of its own
    #[arg(long, value_enum, value_delimiter = ',', default_value = "sgd,adam")]
    optimizer: Vec<Optimizer>,
    /// Batch sizes of exact training; 128, whose epochs are the budget, must be among them
    #[arg(long, value_delimiter = ',', default_value = "32,64,128,512")]
    exact_batch: Vec<usize>,
    /// Batch sizes of training on some of the rows
    #[arg(long, value_delimiter = ',', default_value = "128,512")]
    batch: Vec<usize>,
    /// K as a share of the batch, or auto; each value is a training of its own
    #[arg(long, value_delimiter = ',', default_value = "auto,0.125")]
    k_ratio: Vec<KRatio>,
    /// Also trains with these shares of the rows of the gradient of the input, or auto
    #[arg(long, value_delimiter = ',', default_value = "auto")]
    dx_ratio: Vec<KRatio>,
    /// Units in each hidden layer
    #[arg(long, value_delimiter = ',', default_value = "512,512")]
    widths: Vec<usize>,
    /// The time of every training: that of so many epochs of exact training with batch 128
    #[arg(long, default_value_t = 3)]
    budget: usize,
    #[arg(long, default_value_t = 5)]
    seeds: u64,
    /// Folder with the four IDX files of MNIST in mnist/, plain or .gz
    #[arg(long, default_value = "data")]
    data: PathBuf,
    /// Folder for all courses and the table; a repeated call runs only what is missing there
    #[arg(long)]
    out: PathBuf,
}

/// A training of so many steps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Entry {
    #[serde(flatten)]
    setting: Setting,
    steps: usize,
}

/// The course of a training, with a value for each turn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Course {
    #[serde(flatten)]
    entry: Entry,
    seed: u64,
    /// The time of training until the test, without tests.
    seconds: Vec<f64>,
    accuracy: Vec<f64>,
    /// None where it is not a number.
    loss: Vec<Option<f64>>,
    /// The variance that drawn rows add at the last step of a turn, relative to that of the batch:
    /// the mean over the layers, weighed by their operations.
    added: Vec<Option<f64>>,
}

/// The time and the steps that a training takes to the target.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Finish {
    seconds: f64,
    steps: f64,
}

impl Course {
    /// When the accuracy first reached the target, interpolated between two tests.
    fn finish(&self, target: f64) -> Option<Finish> {
        let turn = self.accuracy.iter().position(|&value| value >= target)?;
        let before = |values: &[f64]| match turn {
            0 => 0.0,
            turn => values[turn - 1],
        };
        let (first, last) = (before(&self.accuracy), self.accuracy[turn]);
        let way = (target - first) / (last - first);
        let seconds = before(&self.seconds);
        Some(Finish {
            seconds: seconds + way * (self.seconds[turn] - seconds),
            steps: (turn as f64 + way) / TURNS as f64 * self.entry.steps as f64,
        })
    }

    fn last_accuracy(&self) -> f64 {
        *self.accuracy.last().expect("a training has turns")
    }

    /// The mean of the variance that was added.
    fn mean_added(&self) -> f64 {
        let added: Vec<_> = self.added.iter().flatten().copied().collect();
        match added.is_empty() {
            true => 0.0,
            false => mean_and_error(&added).0,
        }
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
            self.exact_batch.contains(&BUDGET_BATCH),
            "--exact-batch must contain {BUDGET_BATCH}, but got {:?}",
            self.exact_batch
        );
        ensure!(self.budget > 0, "--budget must be at least 1, but got 0");
        ensure!(self.seeds > 0, "--seeds must be at least 1, but got 0");
        let data = Data::load(&self.data)?;
        fs::create_dir_all(&self.out).with_context(|| format!("{}", self.out.display()))?;
        let mut tables = String::new();
        for &optimizer in &self.optimizer {
            tables += &self.table(optimizer, &self.courses(&data, optimizer)?);
        }
        println!("{tables}");
        parallel::write(&self.out.join("table.md"), &tables)
    }

    /// The courses of all seeds, each seed a file.
    fn courses(&self, data: &Data, optimizer: Optimizer) -> Result<Vec<Vec<Course>>> {
        let settings = self.settings(optimizer);
        for setting in &settings {
            setting.validate(data.train.len())?;
        }
        let name = format!("{optimizer:?}").to_lowercase();
        let file = |part: &str| self.out.join(format!("{name}-{part}.json"));
        let stages = 1 + FACTORS.len() as u64 + self.seeds;
        let bar = parallel::progress_bar(stages)?;
        let path = file("steps");
        let entries = resumed(&path, || self.entries(data, &settings))?;
        let saved = entries.iter().map(|entry| &entry.setting);
        ensure!(
            saved.eq(&settings),
            "{}: it is of a race with other options; choose another --out",
            path.display()
        );
        bar.inc(1);
        let mut trials: Vec<Vec<Course>> = Vec::new();
        for factor in FACTORS {
            let entries = entries.iter().cloned().map(|mut entry| {
                entry.setting.lr *= factor;
                entry
            });
            let entries: Vec<_> = entries.collect();
            let race = || Ok(race(data, &entries, RATE_SEED));
            trials.push(resumed(&file(&format!("rate-{factor}")), race)?);
            bar.inc(1);
        }
        let best = (0..entries.len()).map(|index| {
            let key = |course: &Course| match course.finish(self.target) {
                // Of one setting all steps take the same time, and steps do not vary from run to run.
                Some(finish) => (finish.steps, 0.0),
                None => (f64::INFINITY, -course.last_accuracy()),
            };
            let trials = trials.iter().map(|courses| &courses[index]);
            let best = trials.min_by(|a, b| key(a).partial_cmp(&key(b)).expect("numbers"));
            best.expect("three rates").entry.clone()
        });
        let best: Vec<_> = best.collect();
        let seeds = (0..self.seeds).map(|seed| {
            let courses = resumed(&file(&format!("seed-{seed}")), || {
                Ok(race(data, &best, seed))
            });
            bar.inc(1);
            courses
        });
        let courses = seeds.collect();
        bar.finish();
        courses
    }

    /// The settings of all trainings, with a first guess of their learning rates.
    fn settings(&self, optimizer: Optimizer) -> Vec<Setting> {
        let guess = match optimizer {
            Optimizer::Sgd => 0.4,
            Optimizer::Adam => 1e-3,
        };
        let exact = |batch: usize| {
            let lr = guess * (batch as f64 / BUDGET_BATCH as f64).sqrt();
            let hidden = self.widths.len();
            Setting {
                widths: self.widths.clone(),
                policy: PolicyOption::Systematic,
                ..study::exact((optimizer, lr, 0.0, batch, hidden, self.budget))
            }
        };
        let mut settings: Vec<_> = self.exact_batch.iter().map(|&batch| exact(batch)).collect();
        let dx = self.dx_ratio.iter().copied().map(Some);
        let dx: Vec<_> = [None].into_iter().chain(dx).collect();
        for &batch in &self.batch {
            for &k_ratio in &self.k_ratio {
                settings.extend(dx.iter().map(|&dx_ratio| Setting {
                    k_ratio,
                    input_gradient: InputGradientOptions { dx_ratio },
                    ..exact(batch)
                }));
            }
        }
        settings
    }

    /// The steps that each setting takes in the budget, by the time of its steps, taken in turns.
    fn entries(&self, data: &Data, settings: &[Setting]) -> Result<Vec<Entry>> {
        let [turns, steps] = CALIBRATION;
        let mut trainings: Vec<_> = settings
            .iter()
            .map(|setting| Training::new(data, setting, RATE_SEED))
            .collect();
        let mut times = vec![Vec::new(); settings.len()];
        for _ in 0..turns {
            for (training, times) in trainings.iter_mut().zip(&mut times) {
                times.push(training.advance(steps) / steps as f64);
            }
        }
        // A layer that chooses K takes more rows at first, so the first half does not count.
        let of = |times: &Vec<f64>| {
            let mut times = times[turns / 2..].to_vec();
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        };
        let times: Vec<f64> = times.iter().map(of).collect();
        let mut exact = settings.iter().zip(&times);
        let unit = exact.find(|(setting, _)| setting.is_exact() && setting.batch == BUDGET_BATCH);
        let (_, unit) = unit.expect("it is among the exact batches");
        let budget = (self.budget * (data.train.len() / BUDGET_BATCH)) as f64 * unit;
        let entries = settings.iter().zip(&times).map(|(setting, time)| Entry {
            setting: setting.clone(),
            steps: ((budget / time) as usize).max(TURNS),
        });
        Ok(entries.collect())
    }

    /// A Markdown table with 95 % intervals.
    fn table(&self, optimizer: Optimizer, seeds: &[Vec<Course>]) -> String {
        let all = 0..seeds[0].len();
        let of = |index: usize| seeds.iter().map(move |courses| &courses[index]);
        let finishes = |index| -> Vec<Finish> {
            of(index)
                .filter_map(|course| course.finish(self.target))
                .collect()
        };
        let exact = |index: &usize| seeds[0][*index].entry.setting.is_exact();
        let reached = |index: &usize| finishes(*index).len() == seeds.len();
        let fastest = all.clone().filter(exact).filter(reached);
        let seconds = |index: &usize| {
            let seconds: Vec<_> = finishes(*index).iter().map(|it| it.seconds).collect();
            mean_and_error(&seconds).0
        };
        let best = fastest.min_by(|a, b| seconds(a).total_cmp(&seconds(b)));
        let interval = |values: &[f64], digits: usize| match confidence(values) {
            Some(width) => format!("{:.digits$} ± {width:.digits$}", mean_and_error(values).0),
            None => format!("{:.digits$}", mean_and_error(values).0),
        };
        let mut table = format!(
            "{optimizer:?}, {} % of the test images, {} seeds\n\n\
             | batch | method | K | rate | seconds | steps | to the best exact | accuracy, % | f | R | f (1 + R) |\n\
             |---|---|---|---|---|---|---|---|---|---|---|\n",
            100.0 * self.target,
            seeds.len()
        );
        for index in all {
            let setting = &seeds[0][index].entry.setting;
            let (batch, method, k, lr) =
                (setting.batch, setting.method(), setting.k_ratio, setting.lr);
            let found = finishes(index);
            let values =
                |value: fn(&Finish) -> f64| -> Vec<f64> { found.iter().map(value).collect() };
            let ratios = best.map(|best| {
                let pairs = of(index).zip(of(best)).filter_map(|(course, best)| {
                    let [course, best] = [course, best].map(|course| course.finish(self.target));
                    Some(course?.seconds / best?.seconds)
                });
                pairs.collect::<Vec<_>>()
            });
            let accuracy: Vec<_> = of(index)
                .map(|course| 100.0 * course.last_accuracy())
                .collect();
            let step = |index: usize| {
                let times = of(index).map(|course| {
                    course.seconds.last().copied().unwrap_or(0.0) / course.entry.steps as f64
                });
                mean_and_error(&times.collect::<Vec<_>>()).0
            };
            let same_batch = (0..seeds[0].len())
                .filter(exact)
                .find(|&other| seeds[0][other].entry.setting.batch == batch);
            let theory = same_batch.filter(|_| !exact(&index)).map(|same| {
                let f = step(index) / step(same);
                let added = of(index).map(Course::mean_added).collect::<Vec<_>>();
                let added = mean_and_error(&added).0;
                format!("{f:.2} | {added:.2} | {:.2}", f * (1.0 + added))
            });
            let reached = match found.len() == seeds.len() {
                true => format!(
                    "{} | {} | {}",
                    interval(&values(|finish| finish.seconds), 2),
                    interval(&values(|finish| finish.steps), 0),
                    ratios
                        .map(|ratios| interval(&ratios, 2))
                        .unwrap_or_default(),
                ),
                false => format!("{} of {} reached it | | ", found.len(), seeds.len()),
            };
            let _ = writeln!(
                table,
                "| {batch} | {method} | {k} | {lr:.2e} | {reached} | {} | {} |",
                interval(&accuracy, 2),
                theory.unwrap_or_else(|| " | | ".to_string()),
            );
        }
        table + "\n"
    }
}

/// What a file holds from an earlier call, or else what `work` makes.
fn resumed<T: Serialize + DeserializeOwned>(
    file: &Path,
    work: impl FnOnce() -> Result<T>,
) -> Result<T> {
    if let Ok(text) = fs::read_to_string(file) {
        return serde_json::from_str(&text).with_context(|| format!("{}", file.display()));
    }
    let made = work()?;
    parallel::write(file, &serde_json::to_string(&made)?)?;
    Ok(made)
}

/// The courses of trainings that take turns.
fn race(data: &Data, entries: &[Entry], seed: u64) -> Vec<Course> {
    let start = entries.iter().map(|entry| {
        let training = Training::new(data, &entry.setting, seed).falling(entry.steps);
        let course = Course {
            entry: entry.clone(),
            seed,
            seconds: Vec::new(),
            accuracy: Vec::new(),
            loss: Vec::new(),
            added: Vec::new(),
        };
        (training, course)
    });
    let mut runners: Vec<_> = start.collect();
    for turn in 0..TURNS {
        for (training, course) in &mut runners {
            // The parts of a training differ by one step at most.
            let steps = course.entry.steps;
            let steps = (turn + 1) * steps / TURNS - turn * steps / TURNS;
            let before = course.seconds.last().copied().unwrap_or(0.0);
            course.seconds.push(before + training.advance(steps));
            let Tested { accuracy, loss } = training.test();
            course.accuracy.push(accuracy);
            course.loss.push(loss.is_finite().then_some(loss));
            course.added.push(training.added_noise());
        }
    }
    runners.into_iter().map(|(_, course)| course).collect()
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
    fn a_race_is_resumed_and_has_a_row_for_each_training() {
        let folder = tempfile::tempdir().unwrap();
        let mnist = tempfile::tempdir().unwrap();
        let data = data(mnist.path());
        let out = folder.path().display();
        let options = format!(
            "--out {out} --widths 64 --seeds 2 --budget 2 --target 0.5 --exact-batch 32,128 \
             --batch 128 --optimizer sgd"
        );
        let race = parse(&options);
        let courses = race.courses(&data, Optimizer::Sgd).unwrap();
        assert_eq!((courses.len(), courses[0].len()), (2, 6));
        assert_eq!(courses[0][0].seconds.len(), TURNS);
        let losses = |seeds: &[Vec<Course>]| -> Vec<f64> {
            let courses = seeds.iter().flatten();
            courses
                .flat_map(|it| it.loss.iter().flatten().copied())
                .collect()
        };
        // The text of a number need not have all of its digits.
        let again = race.courses(&data, Optimizer::Sgd).unwrap();
        for (again, loss) in losses(&again).iter().zip(losses(&courses)) {
            assert!((again - loss).abs() < 1e-12);
        }
        let table = race.table(Optimizer::Sgd, &courses);
        assert_eq!(table.lines().count(), 4 + 6 + 1, "{table}");
        for row in ["| 32 | exact | M |", "| 128 | systematic, dX auto | M/8 |"] {
            assert!(table.contains(row), "{table}");
        }
        let other = parse(&options.replace("--widths 64", "--widths 32"));
        let error = other.courses(&data, Optimizer::Sgd).unwrap_err();
        assert!(
            error.to_string().contains("choose another --out"),
            "{error}"
        );
    }

    #[test]
    fn a_finish_is_on_the_line_between_two_tests() {
        let setting = parse("--out x").settings(Optimizer::Sgd).remove(0);
        let course = Course {
            entry: Entry {
                setting,
                steps: 10 * TURNS,
            },
            seed: 0,
            seconds: vec![1.0, 2.0, 4.0],
            accuracy: vec![0.5, 0.6, 0.8],
            loss: Vec::new(),
            added: Vec::new(),
        };
        let finish = |target| course.finish(target).map(|it| (it.seconds, it.steps));
        let (seconds, steps) = finish(0.7).unwrap();
        assert!((seconds - 3.0).abs() < 1e-9 && (steps - 25.0).abs() < 1e-9);
        assert_eq!(finish(0.25), Some((0.5, 5.0)));
        assert_eq!(finish(0.9), None);
    }

    #[test]
    fn bad_values_are_named() {
        let error = parse("--out x --target 97").run().unwrap_err().to_string();
        assert_eq!(error, "--target must be in (0, 1), but got 97");
        let error = parse("--out x --exact-batch 64").run().unwrap_err();
        assert!(error.to_string().contains("must contain 128"), "{error}");
    }
}
