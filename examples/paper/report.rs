use std::{collections::BTreeMap, fmt::Write, fs, path::Path};

use anyhow::{Context, Result};
use memaop_examples::{
    chart::{self, Chart, Panel},
    statistics::mean_and_error,
};
use serde::Deserialize;

use crate::{
    data::Dataset,
    experiment::{MemoryName, PolicyName, Setting},
    series::Series,
};

/// The published results, by the names of the series.
#[derive(Debug, Default, Deserialize)]
#[serde(transparent)]
pub struct Reference(BTreeMap<String, Published>);

#[derive(Debug, Deserialize)]
struct Published {
    loss_val: PublishedLoss,
}

#[derive(Debug, Deserialize)]
struct PublishedLoss {
    mean_curve: Vec<f64>,
    final_runs: Vec<f64>,
}

impl Reference {
    pub fn load(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{}", path.display()))
    }

    /// The published mean validation loss after each epoch.
    #[cfg(test)]
    pub fn mean_curve(&self, setting: &Setting) -> Option<&[f64]> {
        Some(&self.0.get(&setting.name())?.loss_val.mean_curve)
    }

    /// The mean of the final validation losses and its standard error.
    pub fn final_loss_val(&self, setting: &Setting) -> Option<(f64, f64)> {
        Some(mean_and_error(
            &self.0.get(&setting.name())?.loss_val.final_runs,
        ))
    }
}

/// How many combined standard errors `ours` lies above `published`.
pub fn distance(ours: (f64, f64), published: (f64, f64)) -> f64 {
    (ours.0 - published.0) / ours.1.hypot(published.1)
}

/// A Markdown table of the final validation losses of all series.
pub fn table(series: &[Series], reference: &Reference) -> Result<String> {
    let mut table = String::from(
        "| data | K | policy | memory | runs | ours | published | difference | accuracy |\n\
         |---|---|---|---|---|---|---|---|---|\n",
    );
    for series in series {
        let setting = &series.setting;
        let ours = mean_and_error(&series.final_loss_val());
        let published = reference.final_loss_val(setting);
        let number = |(mean, error): (f64, f64)| format!("{mean:.4} ± {error:.4}");
        let accuracy = series.acc_val.as_ref().map(|runs| {
            let last: Vec<_> = runs.iter().filter_map(|run| run.last().copied()).collect();
            format!("{:.2} %", 100.0 * mean_and_error(&last).0)
        });
        let memory = match setting.memory {
            MemoryName::None => "none",
            MemoryName::Published => "published",
            MemoryName::Balanced => "balanced",
        };
        writeln!(
            table,
            "| {} | {} | {} | {memory} | {} | {} | {} | {} | {} |",
            setting.dataset.name(),
            setting.k,
            setting.policy.name(),
            series.runs,
            number(ours),
            published.map_or("-".into(), number),
            published.map_or("-".into(), |published| {
                format!("{:+.1}", distance(ours, published))
            }),
            accuracy.unwrap_or("-".into()),
        )?;
    }
    Ok(table)
}

/// Draws the validation loss by epoch for each experiment and K. Published curves are dashed.
pub fn figures(series: &[Series], reference: &Reference, folder: &Path) -> Result<()> {
    for dataset in [Dataset::Energy, Dataset::Mnist] {
        for k in dataset.ks() {
            let of_figure = |series: &&Series| {
                let setting = &series.setting;
                setting.dataset == dataset
                    && (setting.k == k || setting.policy == PolicyName::Exact)
            };
            figure(
                dataset,
                k,
                series.iter().filter(of_figure),
                reference,
                folder,
            )?;
        }
    }
    Ok(())
}

fn figure<'a>(
    dataset: Dataset,
    k: usize,
    series: impl Iterator<Item = &'a Series>,
    reference: &Reference,
    folder: &Path,
) -> Result<()> {
    // Name, values, color, dashed.
    let mut lines: Vec<(Option<String>, Vec<f64>, usize, bool)> = Vec::new();
    for (color, series) in series.enumerate() {
        let setting = &series.setting;
        let memory = match setting.memory {
            MemoryName::None => "",
            MemoryName::Published => " with memory",
            MemoryName::Balanced => " with balanced memory",
        };
        let name = format!("{}{memory}", setting.policy.name());
        lines.push((Some(name), mean_curve(&series.loss_val), color, false));
        if let Some(published) = reference.0.get(&setting.name()) {
            let curve = published.loss_val.mean_curve.clone();
            lines.push((None, curve, color, true));
        }
    }
    if lines.is_empty() {
        return Ok(());
    }
    let lines: Vec<_> = lines
        .iter()
        .map(|(name, values, color, dashed)| chart::Series {
            name: name.as_deref(),
            dashed: *dashed,
            ..chart::Series::new("", chart::numbered(values), *color)
        })
        .collect();
    let title = format!(
        "{}: validation loss, K = {k} of {} (dashed: published)",
        match dataset {
            Dataset::Energy => "Energy",
            Dataset::Mnist => "MNIST",
        },
        dataset.batch()
    );
    let charts = [Panel::Lines(Chart {
        title: &title,
        x: "epoch",
        y: "validation loss",
        logarithmic: dataset == Dataset::Energy,
        x_label: chart::number,
        series: &lines,
    })];
    let path = folder.join(format!("{}-k{k}.svg", dataset.name()));
    chart::save(&charts, &path)
}

fn mean_curve(runs: &[Vec<f64>]) -> Vec<f64> {
    let epochs = runs.iter().map(Vec::len).min().unwrap_or(0);
    let mean = |epoch| runs.iter().map(|run| run[epoch]).sum::<f64>() / runs.len() as f64;
    (0..epochs).map(mean).collect()
}
