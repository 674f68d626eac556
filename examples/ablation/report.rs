use std::{fmt::Write, path::Path};

use anyhow::Result;
use memaop_examples::{
    chart::{Chart, Series},
    statistics::{confidence, mean_and_error},
};

use crate::grid::Outcome;

/// Outcomes that differ in nothing but the approximation.
struct Regime<'a> {
    name: String,
    outcomes: Vec<&'a Outcome>,
}

impl<'a> Regime<'a> {
    fn all(outcomes: &'a [Outcome]) -> Vec<Self> {
        let mut regimes: Vec<Self> = Vec::new();
        for outcome in outcomes {
            let name = outcome.setting.regime();
            match regimes.iter_mut().find(|regime| regime.name == name) {
                Some(regime) => regime.outcomes.push(outcome),
                None => regimes.push(Self {
                    name,
                    outcomes: vec![outcome],
                }),
            }
        }
        regimes
    }

    fn exact(&self) -> Option<&'a Outcome> {
        let mut outcomes = self.outcomes.iter().copied();
        outcomes.find(|outcome| outcome.setting.is_exact())
    }

    /// The outcomes of each method, in the order of first appearance, by falling K.
    fn methods(&self) -> Vec<(String, Vec<&'a Outcome>)> {
        let mut methods: Vec<(String, Vec<&Outcome>)> = Vec::new();
        for &outcome in &self.outcomes {
            let name = outcome.setting.method();
            match methods.iter_mut().find(|method| method.0 == name) {
                Some(method) => method.1.push(outcome),
                None => methods.push((name, vec![outcome])),
            }
        }
        for (_, outcomes) in &mut methods {
            outcomes.sort_by(|a, b| b.setting.k_ratio.total_cmp(&a.setting.k_ratio));
        }
        methods
    }
}

fn percent(values: &[f64]) -> String {
    let mean = 100.0 * mean_and_error(values).0;
    match confidence(values) {
        None => format!("{mean:.2}"),
        Some(width) => format!("{mean:.2} ± {:.2}", 100.0 * width),
    }
}

/// A Markdown table for each regime: the test accuracy after the last epoch in per cent, with the
/// 95 % confidence interval of the mean, and what it lacks of the exact layer's, seed by seed.
pub fn table(outcomes: &[Outcome]) -> String {
    let mut table = String::new();
    for regime in Regime::all(outcomes) {
        let exact = regime.exact().map(Outcome::final_accuracy);
        let _ = writeln!(table, "\n{}\n", regime.name);
        table += "| method | K | accuracy, % | minus exact | seconds |\n|---|---|---|---|---|\n";
        for (method, outcomes) in regime.methods() {
            for outcome in outcomes {
                let setting = &outcome.setting;
                let k = match setting.is_exact() {
                    true => "M".to_string(),
                    false => format!("M/{}", (1e2 / setting.k_ratio).round() / 1e2),
                };
                let accuracy = outcome.final_accuracy();
                let difference = match &exact {
                    Some(exact) if !setting.is_exact() && exact.len() == accuracy.len() => {
                        let pairs = accuracy.iter().zip(exact);
                        percent(&pairs.map(|(ours, exact)| ours - exact).collect::<Vec<_>>())
                    }
                    _ => String::new(),
                };
                let seconds: Vec<f64> = outcome
                    .runs
                    .iter()
                    .map(|run| run.train_seconds.iter().sum())
                    .collect();
                let _ = writeln!(
                    table,
                    "| {method} | {k} | {} | {difference} | {:.1} |",
                    percent(&accuracy),
                    mean_and_error(&seconds).0
                );
            }
        }
    }
    table
}

/// Two figures for each regime: accuracy against K, and against the time spent on training.
pub fn figures(outcomes: &[Outcome], folder: &Path) -> Result<()> {
    for (number, regime) in Regime::all(outcomes).iter().enumerate() {
        let file = |kind: &str| folder.join(format!("{}-{kind}.svg", number + 1));
        against_k(regime, &file("k"))?;
        against_time(regime, &file("time"))?;
    }
    Ok(())
}

fn against_k(regime: &Regime, path: &Path) -> Result<()> {
    let mean = |outcome: &Outcome| 100.0 * mean_and_error(&outcome.final_accuracy()).0;
    let sparsity = |outcome: &Outcome| -outcome.setting.k_ratio.log2();
    let methods = regime.methods();
    let farthest = regime.outcomes.iter().map(|outcome| sparsity(outcome));
    let farthest = farthest.fold(0.0, f64::max);
    let series: Vec<_> = methods
        .iter()
        .enumerate()
        .map(|(color, (name, outcomes))| Series {
            name,
            points: match regime.exact() {
                // The exact layer is a line from end to end.
                Some(exact) if name == "exact" => vec![(0.0, mean(exact)), (farthest, mean(exact))],
                _ => outcomes.iter().map(|o| (sparsity(o), mean(o))).collect(),
            },
            color,
            dashed: name == "exact",
        })
        .collect();
    Chart {
        title: &regime.name,
        x: "log2(M / K)",
        y: "test accuracy, %",
        logarithmic: false,
        series: &series,
    }
    .save(path)
}

/// Of each method, the K nearest to M/8.
fn against_time(regime: &Regime, path: &Path) -> Result<()> {
    let curve = |outcome: &Outcome| -> Vec<(f64, f64)> {
        let runs = outcome.runs.len() as f64;
        let mut seconds = 0.0;
        (0..outcome.setting.epochs)
            .map(|epoch| {
                let mean = |value: &dyn Fn(usize) -> f64| {
                    (0..outcome.runs.len()).map(value).sum::<f64>() / runs
                };
                seconds += mean(&|run| outcome.runs[run].train_seconds[epoch]);
                let accuracy = mean(&|run| outcome.runs[run].test_accuracy[epoch]);
                (seconds, 100.0 * accuracy)
            })
            .collect()
    };
    let methods = regime.methods();
    let series: Vec<_> = methods
        .iter()
        .enumerate()
        .filter_map(|(color, (name, outcomes))| {
            let distance = |outcome: &Outcome| (outcome.setting.k_ratio.log2() + 3.0).abs();
            let nearest = outcomes
                .iter()
                .min_by(|a, b| distance(a).total_cmp(&distance(b)))?;
            Some(Series {
                name,
                points: curve(nearest),
                color,
                dashed: name == "exact",
            })
        })
        .collect();
    let title = format!("{}, K = M/8", regime.name);
    Chart {
        title: &title,
        x: "seconds of training on one core",
        y: "test accuracy, %",
        logarithmic: false,
        series: &series,
    }
    .save(path)
}
