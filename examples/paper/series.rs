use std::{path::Path, sync::Mutex, time::Instant};

use anyhow::Result;
use memaop_examples::parallel;
use serde::{Deserialize, Serialize};

use crate::{
    data::Data,
    experiment::{Curves, Setting, run},
};

/// The result of a series, as it is written to JSON. Curves are indexed by run and epoch.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
pub struct Series {
    #[serde(flatten)]
    pub setting: Setting,
    pub runs: usize,
    pub epochs: usize,
    /// The seed of the first run; run r has `seed + r`.
    pub seed: u64,
    /// The time of all runs together.
    pub seconds: f64,
    pub loss: Vec<Vec<f64>>,
    pub loss_val: Vec<Vec<f64>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acc_val: Option<Vec<Vec<f64>>>,
}

impl Series {
    /// The validation loss of every run after its last epoch.
    pub fn final_loss_val(&self) -> Vec<f64> {
        let last = |curve: &Vec<f64>| curve.last().copied().unwrap_or(f64::NAN);
        self.loss_val.iter().map(last).collect()
    }
}

/// The file of results: `{"series": [...]}`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Results {
    pub series: Vec<Series>,
}

impl Results {
    pub fn save(&self, path: &Path) -> Result<()> {
        parallel::write(path, &serde_json::to_string(self)?)
    }
}

/// How often, how long and with which seeds a series is run.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    pub runs: usize,
    pub epochs: usize,
    pub seed: u64,
}

struct Progress {
    missing: Vec<usize>,
    curves: Vec<Vec<Option<Curves>>>,
    seconds: Vec<f64>,
}

/// Runs every series on all cores. `finished` gets a series as soon as its last run is done.
pub fn run_all(
    work: &[(&Data, Setting, Plan)],
    finished: impl Fn(Series) -> Result<()> + Sync,
) -> Result<()> {
    let steps = |data: &Data| (data.train.len() / data.dataset.batch()) as u64;
    let total = work
        .iter()
        .map(|(data, _, plan)| steps(data) * (plan.epochs * plan.runs) as u64);
    let bar = parallel::progress_bar(total.sum())?;

    let jobs: Vec<_> = work
        .iter()
        .enumerate()
        .flat_map(|(series, (_, _, plan))| (0..plan.runs).map(move |run| (series, run)))
        .collect();
    let progress = Mutex::new(Progress {
        missing: work.iter().map(|(_, _, plan)| plan.runs).collect(),
        curves: work
            .iter()
            .map(|(_, _, plan)| vec![None; plan.runs])
            .collect(),
        seconds: vec![0.0; work.len()],
    });
    parallel::for_each(&jobs, |&(index, number)| {
        let (data, setting, plan) = &work[index];
        let start = Instant::now();
        let seed = plan.seed + number as u64;
        let curves = run(data, setting, plan.epochs, seed, || bar.inc(steps(data)));

        let mut progress = progress.lock().expect("no run panics");
        progress.curves[index][number] = Some(curves);
        progress.seconds[index] += start.elapsed().as_secs_f64();
        progress.missing[index] -= 1;
        if progress.missing[index] > 0 {
            return Ok(());
        }
        let curves = std::mem::take(&mut progress.curves[index]);
        let seconds = progress.seconds[index];
        drop(progress);
        finished(collect(*setting, *plan, seconds, curves))
    })?;
    bar.finish();
    Ok(())
}

fn collect(setting: Setting, plan: Plan, seconds: f64, curves: Vec<Option<Curves>>) -> Series {
    let curves: Vec<_> = curves.into_iter().flatten().collect();
    let accuracy: Vec<_> = curves.iter().map(|curves| curves.acc_val.clone()).collect();
    Series {
        setting,
        runs: plan.runs,
        epochs: plan.epochs,
        seed: plan.seed,
        seconds,
        loss: curves.iter().map(|curves| curves.loss.clone()).collect(),
        loss_val: curves
            .iter()
            .map(|curves| curves.loss_val.clone())
            .collect(),
        acc_val: (!accuracy.iter().all(Vec::is_empty)).then_some(accuracy),
    }
}
