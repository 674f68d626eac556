use std::{fmt::Write, path::Path};

use anyhow::Result;
use memaop_examples::{
    chart::{self, Chart, Panel, Series},
    statistics::{confidence, mean_and_error},
};
use serde::Serialize;

use crate::training::Run;

/// A method and its runs, one for each seed.
#[derive(Serialize)]
pub struct Method {
    pub name: String,
    pub runs: Vec<Run>,
}

impl Method {
    pub fn new(name: String) -> Self {
        Self {
            name,
            runs: Vec::new(),
        }
    }

    fn of_each(&self, value: impl Fn(&Run) -> f64) -> Vec<f64> {
        self.runs.iter().map(value).collect()
    }

    /// The means over all runs, with a point for each validation.
    fn curve(&self, x: impl Fn(&Run, usize) -> f64) -> Vec<(f64, f64)> {
        let points = self.runs.first().map_or(0, |run| run.steps.len());
        let mean = |value: &dyn Fn(&Run) -> f64| mean_and_error(&self.of_each(value)).0;
        (0..points)
            .map(|i| (mean(&|run| x(run, i)), mean(&|run| run.validation_loss[i])))
            .collect()
    }
}

impl Run {
    fn total_seconds(&self) -> f64 {
        self.seconds.last().copied().unwrap_or(f64::NAN)
    }

    fn final_loss(&self) -> f64 {
        self.validation_loss.last().copied().unwrap_or(f64::NAN)
    }

    /// The loss after some time, interpolated between the validations before and after it.
    fn loss_after(&self, seconds: f64) -> f64 {
        let after = self.seconds.partition_point(|&time| time < seconds);
        match after {
            0 => self.validation_loss[0],
            after if after == self.seconds.len() => self.final_loss(),
            after => {
                let (from, to) = (self.seconds[after - 1], self.seconds[after]);
                let [before, then] = [after - 1, after].map(|i| self.validation_loss[i]);
                before + (then - before) * (seconds - from) / (to - from)
            }
        }
    }
}

pub fn heading(seed: u64, methods: &[Method]) {
    print!("\nvalidation loss, seed {seed}\n{:>6}", "step");
    for method in methods {
        print!("  {:>16}", method.name);
    }
    println!();
}

pub fn line(step: usize, losses: Vec<f64>) {
    print!("{step:>6}");
    for loss in losses {
        print!("  {loss:>16.4}");
    }
    println!();
}

/// A Markdown table of losses with 95 % confidence intervals: after equal steps, and after the time
/// that the fastest method took with the same seed.
pub fn table(methods: &[Method]) -> String {
    let least = |seed: usize| {
        let totals = methods
            .iter()
            .map(|method| method.runs[seed].total_seconds());
        totals.fold(f64::INFINITY, f64::min)
    };
    let value = |values: &[f64]| match confidence(values) {
        None => format!("{:.3}", mean_and_error(values).0),
        Some(width) => format!("{:.3} ± {width:.3}", mean_and_error(values).0),
    };
    let mut table = String::from(
        "| method | loss, equal steps | minus exact | loss, equal time | ms per step | to exact |\n\
         |---|---|---|---|---|---|\n",
    );
    let Some(exact) = methods.first() else {
        return table;
    };
    for method in methods {
        let losses = method.of_each(Run::final_loss);
        let exact_losses = exact.of_each(Run::final_loss);
        let differences = losses
            .iter()
            .zip(exact_losses)
            .map(|(ours, exact)| ours - exact);
        let timed = (0..).zip(&method.runs);
        let timed = timed.map(|(seed, run)| run.loss_after(least(seed)));
        let ratios = method.runs.iter().zip(&exact.runs);
        let ratios = ratios.map(|(ours, exact)| ours.step_ms / exact.step_ms);
        let _ = writeln!(
            table,
            "| {} | {} | {} | {} | {:.1} | {:.3} |",
            method.name,
            value(&losses),
            value(&differences.collect::<Vec<_>>()),
            value(&timed.collect::<Vec<_>>()),
            mean_and_error(&method.of_each(|run| run.step_ms)).0,
            mean_and_error(&ratios.collect::<Vec<_>>()).0
        );
    }
    table
}

/// Draws the validation loss against steps, and against their time.
pub fn figure(methods: &[Method], path: &Path) -> Result<()> {
    let lines = |value: &dyn Fn(&Run, usize) -> f64| -> Vec<_> {
        let methods = methods.iter().enumerate();
        methods
            .map(|(color, method)| Series {
                dashed: color == 0,
                ..Series::new(&method.name, method.curve(value), color)
            })
            .collect()
    };
    let by_step = lines(&|run, i| run.steps[i] as f64);
    let by_time = lines(&|run, i| run.seconds[i]);
    let chart = |x, series| Chart {
        title: "Validation loss, nats per character",
        x,
        y: "loss",
        logarithmic: false,
        x_label: chart::number,
        series,
    };
    let charts = [
        Panel::Lines(chart("steps", &by_step)),
        Panel::Lines(chart("seconds of training", &by_time)),
    ];
    chart::save(&charts, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_at_a_time_lie_on_the_line_between_validations() {
        let run = Run {
            seed: 0,
            steps: vec![10, 20, 30],
            validation_loss: vec![4.0, 3.0, 1.0],
            added_noise: vec![None; 3],
            seconds: vec![1.0, 2.0, 4.0],
            step_ms: 100.0,
        };
        let found = [0.5, 1.0, 1.5, 3.0, 4.0, 9.0].map(|seconds| run.loss_after(seconds));
        assert_eq!(found, [4.0, 4.0, 3.5, 2.0, 1.0, 1.0]);
    }
}
