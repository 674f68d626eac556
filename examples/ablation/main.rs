//! MNIST with a perceptron, trained with every combination of the given policies, memories and K.
//!
//! ```text
//! cargo ablation --policy topk --memory balanced --k-ratio 0.125,1 --data DIR
//! ```

mod grid;
mod race;
mod report;
mod setting;
mod study;
#[cfg(test)]
mod tests;
mod training;

use std::path::PathBuf;

use anyhow::{Result, bail, ensure};
use clap::{Args, Parser, Subcommand};
use memaop_examples::{
    InputGradientOptions, KRatio, MemoryOption, PolicyOption, StoredInputOption, parallel,
};

use crate::{
    race::Race,
    setting::{Optimizer, Setting},
    training::Data,
};

/// Compares policies, memories and K, for a perceptron on MNIST
#[derive(Parser, Debug)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    grid: Grid,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Runs the grid of docs/results.md; a repeated call with --out runs only what is missing
    Study(Study),
    /// Runs the methods that are recommended, each with three learning rates
    Tuned(Study),
    /// Measures the time to an accuracy at several batch sizes, with all trainings in turns
    Race(Race),
}

/// Options with several values (separated by commas) span a grid.
#[derive(Args, Debug)]
struct Grid {
    #[arg(long, value_enum, default_value_t = Optimizer::Sgd)]
    optimizer: Optimizer,
    /// Learning rate
    #[arg(long, default_value_t = 0.1)]
    lr: f64,
    /// Momentum of SGD
    #[arg(long, default_value_t = 0.0)]
    momentum: f64,
    /// Images in a batch
    #[arg(long, default_value_t = 128)]
    batch: usize,
    /// Units in each hidden layer
    #[arg(long, value_delimiter = ',', default_value = "512,512")]
    widths: Vec<usize>,
    #[arg(long, default_value_t = 3)]
    epochs: usize,
    /// K as a share of the batch, or auto: the layer chooses it; 1 is the exact gradient
    #[arg(long, value_delimiter = ',', default_value = "0.125")]
    k_ratio: Vec<KRatio>,
    #[arg(long, value_enum, value_delimiter = ',', default_value = "topk")]
    policy: Vec<PolicyOption>,
    /// Memories of the rows left out [default: balanced, or none if the policy takes none]
    #[arg(long, value_enum, value_delimiter = ',')]
    memory: Vec<MemoryOption>,
    /// Factors by which the memory shrinks at each step [default: published 1, balanced 0.9]
    #[arg(long, value_delimiter = ',')]
    decay: Vec<f64>,
    #[command(flatten)]
    input_gradient: InputGradientOptions,
    /// How a layer keeps its input for the backward pass
    #[arg(long, value_enum, default_value_t)]
    stored_input: StoredInputOption,
    /// Approximates gradients even where exact ones take less time, as in the last layer
    #[arg(long)]
    no_cost_rule: bool,
    /// Number of first steps with exact gradients
    #[arg(long, default_value_t = 0)]
    exact_steps: usize,
    #[command(flatten)]
    common: Common,
    /// File for the runs, as JSON
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Args, Debug)]
struct Study {
    #[command(flatten)]
    common: Common,
}

#[derive(Args, Debug)]
struct Common {
    /// Number of seeds
    #[arg(long, default_value_t = 5)]
    seeds: u64,
    /// Folder with the four IDX files of MNIST in mnist/, plain or .gz
    #[arg(long, default_value = "data")]
    data: PathBuf,
    /// Folder for runs, table and figures; a repeated call runs only what is missing there
    #[arg(long)]
    out: Option<PathBuf>,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let (common, settings) = match &cli.command {
        None => (&cli.grid.common, cli.grid.settings()?),
        Some(Command::Study(study)) => (&study.common, study::settings()),
        Some(Command::Tuned(study)) => (&study.common, study::tuned()),
        Some(Command::Race(race)) => return race.run(),
    };
    ensure!(common.seeds > 0, "--seeds must be at least 1, but got 0");
    let data = Data::load(&common.data)?;
    for setting in &settings {
        setting.validate(data.train.len())?;
    }
    let seeds: Vec<_> = (0..common.seeds).collect();
    let runs = common.out.as_ref().map(|out| out.join("runs"));
    let outcomes = grid::run(&data, &settings, &seeds, runs.as_deref())?;

    let table = match &cli.command {
        Some(Command::Tuned(_)) => report::tuned_table(&outcomes),
        _ => report::table(&outcomes),
    };
    println!("{table}");
    if let Some(path) = &cli.grid.json {
        let text = match &outcomes[..] {
            [outcome] => serde_json::to_string(outcome)?,
            outcomes => serde_json::to_string(outcomes)?,
        };
        parallel::write(path, &text)?;
    }
    if let Some(out) = &common.out {
        parallel::write(&out.join("table.md"), &table)?;
        report::figures(&outcomes, out)?;
    }
    Ok(())
}

impl Grid {
    fn settings(&self) -> Result<Vec<Setting>> {
        let mut settings: Vec<Setting> = Vec::new();
        for &policy in &self.policy {
            let memories = match &self.memory[..] {
                [] => vec![policy.usual_memory()],
                memories => memories.to_vec(),
            };
            for memory in memories {
                let decays = match &self.decay[..] {
                    decays if memory == MemoryOption::None || decays.is_empty() => {
                        vec![memory.default_decay()]
                    }
                    decays => decays.to_vec(),
                };
                for (decay, &k_ratio) in decays
                    .iter()
                    .flat_map(|&decay| self.k_ratio.iter().map(move |k_ratio| (decay, k_ratio)))
                {
                    let setting = self.setting(policy, memory, decay, k_ratio);
                    let setting = match setting.is_exact() {
                        true => setting.exact(),
                        false => setting,
                    };
                    // A grid leaves out memories that a policy does not take.
                    let invalid = !policy.takes_memory()
                        && memory != MemoryOption::None
                        && self.memory.len() > 1;
                    if !invalid && !settings.contains(&setting) {
                        settings.push(setting);
                    }
                }
            }
        }
        if settings.is_empty() {
            bail!("--policy, --memory and --k-ratio leave nothing to run");
        }
        Ok(settings)
    }

    fn setting(
        &self,
        policy: PolicyOption,
        memory: MemoryOption,
        decay: f64,
        k_ratio: KRatio,
    ) -> Setting {
        Setting {
            optimizer: self.optimizer,
            lr: self.lr,
            momentum: self.momentum,
            batch: self.batch,
            widths: self.widths.clone(),
            epochs: self.epochs,
            k_ratio,
            policy,
            memory,
            decay,
            stored_input: self.stored_input,
            input_gradient: self.input_gradient,
            cost_rule: !self.no_cost_rule,
            exact_steps: self.exact_steps,
        }
    }
}
