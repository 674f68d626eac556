use std::path::PathBuf;

use anyhow::{Result, ensure};
use burn::tensor::Device;
use burn_memaop::{AopConfig, OuterProducts};
use clap::Args;
use memaop_examples::{
    check, parallel,
    statistics::{confidence, mean_and_error},
};
use memaop_mnist::{Items, MnistBatch, loader};
use serde::Serialize;

use crate::{
    Options,
    model::Exact,
    training::{Train, Training},
};

/// The number of images that are tested at a time.
const TEST_BATCH: usize = 1000;
const NAMES: [&str; 3] = ["Burn's modules", "K = M", "as set"];

#[derive(Args, Debug)]
pub struct Race {
    /// Share of the test images to recognise
    #[arg(long, default_value_t = 0.985)]
    target: f64,
    #[arg(long, default_value_t = 3)]
    seeds: usize,
    /// Steps from one test to the next
    #[arg(long, default_value_t = 50)]
    every: usize,
    /// File for the course of every training, as JSON
    #[arg(long)]
    json: Option<PathBuf>,
}

/// The course of a training, with a value for each test.
#[derive(Debug, Clone, Serialize)]
struct Course {
    name: &'static str,
    seed: u64,
    batch: usize,
    /// The time of training until the test, without tests.
    seconds: Vec<f64>,
    accuracy: Vec<f64>,
}

impl Course {
    /// The time at which the target was first reached, interpolated between two tests.
    fn finish(&self, target: f64) -> Option<f64> {
        let index = self.accuracy.iter().position(|&value| value >= target)?;
        let before = index.checked_sub(1);
        let [start, low] = before.map_or([0.0, 0.0], |before| {
            [self.seconds[before], self.accuracy[before]]
        });
        let way = (target - low) / (self.accuracy[index] - low);
        Some(start + way * (self.seconds[index] - start))
    }

    fn last(&self) -> f64 {
        self.accuracy.last().copied().unwrap_or(f64::NAN)
    }

    fn time(&self) -> f64 {
        self.seconds.last().copied().unwrap_or(f64::NAN)
    }
}

impl Race {
    /// Trains with every seed. The trainings of one seed take turns, a step each.
    pub fn run(
        &self,
        options: &Options,
        aop: AopConfig,
        device: &Device,
        [train, test]: [Items; 2],
    ) -> Result<()> {
        ensure!(
            self.target > 0.0 && self.target < 1.0,
            "--target must be in (0, 1), but got {}",
            self.target
        );
        check::at_least_one(&[("every", self.every), ("seeds", self.seeds)])?;
        let test = loader(test, TEST_BATCH, None, device);
        let test: Vec<_> = test.iter().collect::<Result<_, _>>()?;
        let mut courses = Vec::new();
        for seed in options.adam.mnist.seed..options.adam.mnist.seed + self.seeds as u64 {
            courses.extend(self.seed(
                options,
                aop.with_seed(seed << 32),
                device,
                train.clone(),
                &test,
                seed,
            )?);
            print!("{}", self.table(&courses));
        }
        if let Some(path) = &self.json {
            parallel::write(path, &serde_json::to_string(&courses)?)?;
        }
        Ok(())
    }

    fn seed(
        &self,
        options: &Options,
        aop: AopConfig,
        device: &Device,
        train: Items,
        test: &[MnistBatch],
        seed: u64,
    ) -> Result<Vec<Course>> {
        device.seed(seed);
        let autodiff = device.clone().autodiff();
        let exact = Exact::new(&autodiff);
        let all = aop.with_outer_products(OuterProducts::All);
        let lr = options.adam.lr;
        let mut trainings: [Box<dyn Train>; 3] = [
            Box::new(Training::new(exact.clone(), lr)),
            Box::new(Training::new(exact.clone().with_memaop(all), lr)),
            Box::new(Training::new(exact.with_memaop(aop), lr)),
        ];
        let mut courses = NAMES.map(|name| Course {
            name,
            seed,
            batch: options.adam.batch,
            seconds: Vec::new(),
            accuracy: Vec::new(),
        });
        let mut seconds = [0.0; 3];
        let train = loader(train, options.adam.batch, Some(seed), &autodiff);
        let epochs = (0..options.epochs).flat_map(|_| train.iter());
        let mut batches = epochs.enumerate().peekable();
        while let Some((index, batch)) = batches.next() {
            let batch = batch?;
            for turn in 0..3 {
                let which = (index + turn) % 3;
                seconds[which] += trainings[which].step(batch.clone());
            }
            if (index + 1) % self.every == 0 || batches.peek().is_none() {
                for ((course, training), seconds) in courses.iter_mut().zip(&trainings).zip(seconds)
                {
                    course.seconds.push(seconds);
                    course.accuracy.push(training.accuracy(test));
                }
            }
        }
        Ok(courses.into())
    }

    /// A Markdown table with 95 % intervals.
    fn table(&self, courses: &[Course]) -> String {
        let of = |name| courses.iter().filter(move |course| course.name == name);
        let mut table = format!(
            "\n| | accuracy, % | minus Burn's | time to Burn's | seconds to {} % | to Burn's |\n\
             |---|---|---|---|---|---|\n",
            100.0 * self.target
        );
        for name in NAMES {
            let pairs = || of(name).zip(of(NAMES[0]));
            let accuracy: Vec<_> = of(name).map(|course| 100.0 * course.last()).collect();
            let points: Vec<_> = pairs()
                .map(|(a, b)| 100.0 * (a.last() - b.last()))
                .collect();
            let times: Vec<_> = pairs().map(|(a, b)| a.time() / b.time()).collect();
            let finish = |course: &Course| course.finish(self.target);
            let seconds: Vec<_> = of(name).filter_map(finish).collect();
            let ratios: Vec<_> = pairs()
                .filter_map(|(a, b)| Some(finish(a)? / finish(b)?))
                .collect();
            let missed = match of(name).count() - seconds.len() {
                0 => String::new(),
                missed => format!(" ({missed} missed it)"),
            };
            let row = [
                interval(&accuracy, 2),
                interval(&points, 2),
                interval(&times, 3),
                interval(&seconds, 1) + &missed,
                interval(&ratios, 3),
            ];
            table += &format!("| {name} | {} |\n", row.join(" | "));
        }
        table
    }
}

fn interval(values: &[f64], digits: usize) -> String {
    let (mean, _) = mean_and_error(values);
    match confidence(values) {
        _ if values.is_empty() => "-".into(),
        None => format!("{mean:.digits$}"),
        Some(width) => format!("{mean:.digits$} ± {width:.digits$}"),
    }
}
