use std::{
    fs,
    path::{Path, PathBuf},
    sync::Mutex,
};

use anyhow::{Context, Result};
use memaop_examples::parallel;
use serde::{Deserialize, Serialize};

use crate::{
    setting::Setting,
    training::{self, Data, Run},
};

/// A setting and its runs, one for each seed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    pub runs: Vec<Run>,
    #[serde(flatten)]
    pub setting: Setting,
}

impl Outcome {
    /// The test accuracy of each run after its last epoch.
    pub fn final_accuracy(&self) -> Vec<f64> {
        let last = |run: &Run| run.test_accuracy.last().copied().unwrap_or(f64::NAN);
        self.runs.iter().map(last).collect()
    }
}

/// Runs every setting with every seed, on all cores. If there is a folder, each run is written to a
/// file there as soon as it is done, and runs that are there already are not repeated.
pub fn run(
    data: &Data,
    settings: &[Setting],
    seeds: &[u64],
    folder: Option<&Path>,
) -> Result<Vec<Outcome>> {
    if let Some(folder) = folder {
        fs::create_dir_all(folder).with_context(|| format!("{}", folder.display()))?;
    }
    let file = |setting: &Setting, seed: u64| -> Option<PathBuf> {
        Some(folder?.join(format!("{}-seed-{seed}.json", setting.slug())))
    };
    let finished = |setting: &Setting, seed| -> Option<Run> {
        let text = fs::read_to_string(file(setting, seed)?).ok()?;
        let outcome: Outcome = serde_json::from_str(&text).ok()?;
        let [run] = <[Run; 1]>::try_from(outcome.runs).ok()?;
        (outcome.setting == *setting && run.seed == seed).then_some(run)
    };

    let mut done = Vec::new();
    let mut missing = Vec::new();
    // The order is seed by seed, so that an interrupted grid has a run of every setting.
    for &seed in seeds {
        for (index, setting) in settings.iter().enumerate() {
            match finished(setting, seed) {
                Some(run) => done.push((index, run)),
                None => missing.push((index, seed)),
            }
        }
    }
    let steps = |setting: &Setting| (data.train.len() / setting.batch) as u64;
    let total = missing.iter().map(|&(index, _)| {
        let setting = &settings[index];
        steps(setting) * setting.epochs as u64
    });
    let bar = parallel::progress_bar(total.sum())?;
    let done = Mutex::new(done);
    parallel::for_each(&missing, |&(index, seed)| {
        let setting = &settings[index];
        let run = training::run(data, setting, seed, || bar.inc(steps(setting)));
        if let Some(path) = file(setting, seed) {
            let outcome = Outcome {
                runs: vec![run.clone()],
                setting: setting.clone(),
            };
            parallel::write(&path, &serde_json::to_string(&outcome)?)?;
        }
        done.lock().expect("no run panics").push((index, run));
        Ok(())
    })?;
    bar.finish();

    let mut outcomes: Vec<_> = settings
        .iter()
        .map(|setting| Outcome {
            runs: Vec::new(),
            setting: setting.clone(),
        })
        .collect();
    for (index, run) in done.into_inner().expect("no run panics") {
        outcomes[index].runs.push(run);
    }
    for outcome in &mut outcomes {
        outcome.runs.sort_by_key(|run| run.seed);
    }
    Ok(outcomes)
}
