use std::{fmt::Write, path::Path};

use anyhow::Result;
use memaop_examples::{
    KRatio,
    chart::{self, Chart, Panel, Series},
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

    /// The outcomes of each method by falling K. Methods are in the order of their first outcome.
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
            // An outcome without a fixed K comes last.
            let order =
                |outcome: &Outcome| outcome.setting.k_ratio.divisor().unwrap_or(f64::INFINITY);
            outcomes.sort_by(|a, b| order(a).total_cmp(&order(b)));
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

/// A Markdown table for each regime: the test accuracy after the last epoch in per cent, and its
/// difference to exact training, seed by seed, both with 95 % confidence intervals.
pub fn table(outcomes: &[Outcome]) -> String {
    let mut table = String::new();
    for regime in Regime::all(outcomes) {
        let exact = regime.exact().map(Outcome::final_accuracy);
        let _ = writeln!(table, "\n{}\n", regime.name);
        table += "| method | K | accuracy, % | minus exact | seconds |\n|---|---|---|---|---|\n";
        for (method, outcomes) in regime.methods() {
            for outcome in outcomes {
                let setting = &outcome.setting;
                let k = setting.k_ratio;
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

/// A Markdown table for each regime: each method at the learning rate with its highest mean
/// accuracy, and the difference to exact training at its own best learning rate.
pub fn tuned_table(outcomes: &[Outcome]) -> String {
    let mean = |outcome: &Outcome| mean_and_error(&outcome.final_accuracy()).0;
    let mut regimes: Vec<(String, Vec<&Outcome>)> = Vec::new();
    for outcome in outcomes {
        let name = outcome.setting.tuned_regime();
        let index = regimes.iter().position(|regime| regime.0 == name);
        let index = index.unwrap_or_else(|| {
            regimes.push((name, Vec::new()));
            regimes.len() - 1
        });
        let best = &mut regimes[index].1;
        let same = |other: &&mut &Outcome| {
            let (a, b) = (&outcome.setting, &other.setting);
            (a.method(), a.k_ratio) == (b.method(), b.k_ratio)
        };
        match best.iter_mut().find(same) {
            Some(other) if mean(other) < mean(outcome) => *other = outcome,
            Some(_) => {}
            None => best.push(outcome),
        }
    }
    let mut table = String::new();
    for (name, best) in regimes {
        let _ = writeln!(
            table,
            "\n{name}\n\n| method | K | learning rate | accuracy, % | minus exact |\n|---|---|---|---|---|"
        );
        let exact = best.iter().find(|outcome| outcome.setting.is_exact());
        let exact = exact.map(|outcome| outcome.final_accuracy());
        for outcome in best {
            let setting = &outcome.setting;
            let accuracy = outcome.final_accuracy();
            let difference = match &exact {
                Some(exact) if !setting.is_exact() => {
                    let pairs = accuracy.iter().zip(exact);
                    percent(&pairs.map(|(ours, exact)| ours - exact).collect::<Vec<_>>())
                }
                _ => String::new(),
            };
            let _ = writeln!(
                table,
                "| {} | {} | {} | {} | {difference} |",
                setting.method(),
                setting.k_ratio,
                setting.lr,
                percent(&accuracy)
            );
        }
    }
    table
}

/// The methods that `docs/results.md` recommends. Others are drawn in grey.
const RECOMMENDED: [&str; 2] = ["systematic", "topk, balanced 0.9"];
const AUTO: &str = "systematic, K chosen by the layer";

/// Draws two figures for each regime: the difference to exact training by K, and accuracy by epoch.
pub fn figures(outcomes: &[Outcome], folder: &Path) -> Result<()> {
    for (number, regime) in Regime::all(outcomes).iter().enumerate() {
        let file = |kind: &str| folder.join(format!("{}-{kind}.svg", number + 1));
        against_k(regime, &file("k"))?;
        courses(regime, &file("course"))?;
    }
    Ok(())
}

/// Draws the difference to exact training by K, seed by seed, with 95 % intervals.
fn against_k(regime: &Regime, path: &Path) -> Result<()> {
    let Some(exact) = regime.exact().map(Outcome::final_accuracy) else {
        return Ok(());
    };
    let points = |outcome: &Outcome| -> (f64, f64) {
        let accuracy = outcome.final_accuracy();
        let differences = accuracy.iter().zip(&exact).map(|(a, b)| 100.0 * (a - b));
        let differences: Vec<_> = differences.collect();
        let width = confidence(&differences).unwrap_or(0.0);
        (mean_and_error(&differences).0, width)
    };
    let place = |outcome: &Outcome| outcome.setting.k_ratio.divisor().map(f64::log2);
    let methods = regime.methods();
    let places = regime.outcomes.iter().copied().filter_map(place);
    let places: Vec<_> = places.filter(|&place| place > 0.0).collect();
    let first = places.iter().copied().fold(f64::INFINITY, f64::min);
    let last = places.iter().copied().fold(0.0, f64::max);
    if places.is_empty() {
        return Ok(());
    }

    let mut series = Vec::new();
    for (name, outcomes) in &methods {
        let color = RECOMMENDED
            .iter()
            .position(|recommended| recommended == name);
        let fixed: Vec<_> = outcomes
            .iter()
            .filter(|outcome| place(outcome).is_some())
            .collect();
        if name != "exact" && !fixed.is_empty() {
            let found: Vec<_> = fixed.iter().map(|outcome| points(outcome)).collect();
            let places = fixed.iter().filter_map(|outcome| place(outcome));
            series.push(Series {
                name: color.map(|_| name.as_str()),
                points: places.zip(found.iter().map(|point| point.0)).collect(),
                intervals: match color {
                    Some(_) => found.iter().map(|point| point.1).collect(),
                    None => Vec::new(),
                },
                color,
                dashed: false,
            });
        }
        let auto = outcomes.iter().find(|outcome| place(outcome).is_none());
        if let Some(auto) = auto.filter(|_| name == "systematic") {
            let (mean, width) = points(auto);
            series.push(Series {
                intervals: vec![width; 2],
                dashed: true,
                ..Series::new(AUTO, vec![(first, mean), (last, mean)], 3)
            });
        }
    }
    series.push(Series {
        color: None,
        ..Series::new("exact", vec![(first, 0.0), (last, 0.0)], 0)
    });
    let chart = Chart {
        title: &regime.name,
        x: "K",
        y: "test accuracy minus exact, points",
        logarithmic: false,
        x_label: |place| match place.fract().abs() < 1e-6 {
            true => format!("M/{}", 2f64.powf(place)),
            false => String::new(),
        },
        series: &series,
    };
    chart::save(&[Panel::Lines(chart)], path)
}

/// Draws test accuracy by epoch: of exact training, of K that the layer chooses, and of each method
/// that is recommended at the K nearest to M/8.
fn courses(regime: &Regime, path: &Path) -> Result<()> {
    let curve = |outcome: &Outcome| -> Vec<f64> {
        let of_epoch = |epoch: usize| -> Vec<f64> {
            let runs = outcome.runs.iter();
            runs.map(|run| 100.0 * run.test_accuracy[epoch]).collect()
        };
        let epochs = 0..outcome.setting.epochs;
        epochs
            .map(|epoch| mean_and_error(&of_epoch(epoch)).0)
            .collect()
    };
    let mut drawn: Vec<(String, &Outcome)> = Vec::new();
    for (name, outcomes) in regime.methods() {
        let auto = outcomes
            .iter()
            .find(|outcome| outcome.setting.k_ratio == KRatio::AUTO);
        let fixed = outcomes.iter().filter_map(|outcome| {
            let distance = (outcome.setting.k_ratio.divisor()?.log2() - 3.0).abs();
            Some((distance, outcome))
        });
        let nearest = fixed.min_by(|a, b| a.0.total_cmp(&b.0));
        match nearest {
            Some((_, outcome)) if name == "exact" => drawn.push((name, outcome)),
            Some((_, outcome)) if RECOMMENDED.contains(&name.as_str()) => {
                let name = format!("{name}, {}", outcome.setting.k_ratio);
                drawn.push((name, outcome));
            }
            _ => {}
        }
        drawn.extend(auto.map(|outcome| (AUTO.to_string(), *outcome)));
    }
    let series: Vec<_> = (drawn.iter().enumerate())
        .map(|(color, (name, outcome))| Series::new(name, chart::numbered(&curve(outcome)), color))
        .collect();
    let chart = Chart {
        title: &regime.name,
        x: "epoch",
        y: "test accuracy, %",
        logarithmic: false,
        x_label: chart::number,
        series: &series,
    };
    chart::save(&[Panel::Lines(chart)], path)
}
