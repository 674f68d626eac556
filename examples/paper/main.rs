//! Both experiments of the Mem-AOP-GD paper (Hernandez, Rini, Duman, 2021).
//!
//! ```text
//! cargo paper --dataset energy --policy topk --memory published --k 9 --data DIR
//! cargo paper all --data DIR --reference FILE --out DIR
//! ```

mod data;
mod experiment;
mod report;
mod series;
#[cfg(test)]
mod tests;

use std::{
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand};
use memaop_examples::{parallel, statistics::mean_and_error};

use crate::{
    data::{Data, Dataset},
    experiment::{MemoryName, PolicyName, Setting},
    report::Reference,
    series::{Plan, Results, Series, run_all},
};

/// Repeats the experiments of the Mem-AOP-GD paper
#[derive(Parser, Debug)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    one: One,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Runs all 38 series, for a table and figures; a repeated call runs only missing ones
    All(All),
}

/// One series
#[derive(Args, Debug)]
struct One {
    // These are options in type only, because a subcommand does without them.
    #[arg(long, value_enum, required = true)]
    dataset: Option<Dataset>,
    #[arg(long, value_enum, required = true)]
    policy: Option<PolicyName>,
    #[arg(long, value_enum, default_value = "none")]
    memory: MemoryName,
    /// Number K of rows that a step uses; not needed with --policy exact
    #[arg(long)]
    k: Option<usize>,
    #[command(flatten)]
    common: Common,
    /// File for the curves of all runs, as JSON
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Args, Debug)]
struct All {
    #[command(flatten)]
    common: Common,
    /// Runs the series of this experiment alone
    #[arg(long, value_enum)]
    dataset: Option<Dataset>,
    /// File with the published results to compare with
    #[arg(long)]
    reference: Option<PathBuf>,
    /// Folder for results, table and figures
    #[arg(long)]
    out: PathBuf,
}

#[derive(Args, Debug)]
struct Common {
    #[arg(long, default_value_t = 10)]
    runs: usize,
    /// Number of epochs [default: that of the paper]
    #[arg(long)]
    epochs: Option<usize>,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Folder with energy/energy_efficiency.csv and the four IDX files of MNIST in mnist/
    #[arg(long)]
    data: Option<PathBuf>,
}

impl Common {
    fn plan(&self, dataset: Dataset) -> Result<Plan> {
        ensure!(self.runs > 0, "--runs must be at least 1, but got 0");
        let epochs = self.epochs.unwrap_or(dataset.epochs());
        ensure!(epochs > 0, "--epochs must be at least 1, but got 0");
        Ok(Plan {
            runs: self.runs,
            epochs,
            seed: self.seed,
        })
    }
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    match cli.command {
        Some(Command::All(all)) => run_paper(&all),
        None => run_one(&cli.one),
    }
}

fn run_one(options: &One) -> Result<()> {
    let (Some(dataset), Some(policy)) = (options.dataset, options.policy) else {
        unreachable!("the parser requires both");
    };
    let setting = Setting {
        dataset,
        policy,
        memory: options.memory,
        k: match policy {
            PolicyName::Exact => dataset.batch(),
            _ => options.k.context("--k is missing")?,
        },
    };
    setting.validate()?;
    let plan = options.common.plan(dataset)?;
    let data = Data::load(dataset, options.common.data.as_deref())?;

    run_all(&[(&data, setting, plan)], |series| {
        print_summary(&series);
        match &options.json {
            None => Ok(()),
            Some(path) => Results {
                series: vec![series],
            }
            .save(path),
        }
    })
}

fn print_summary(series: &Series) {
    let (mean, error) = mean_and_error(&series.final_loss_val());
    println!(
        "{}: final validation loss {mean:.4} ± {error:.4}, {} runs of {} epochs, {:.1} s a run",
        series.setting.name(),
        series.runs,
        series.epochs,
        series.seconds / series.runs as f64
    );
}

fn run_paper(options: &All) -> Result<()> {
    let start = Instant::now();
    let reference = match &options.reference {
        Some(path) => Reference::load(path)?,
        None => Reference::default(),
    };
    let finished = options.out.join("series");
    fs::create_dir_all(&finished).with_context(|| format!("{}", finished.display()))?;
    let file = |setting: &Setting| finished.join(format!("{}.json", setting.name()));

    let datasets = match options.dataset {
        Some(dataset) => vec![dataset],
        None => vec![Dataset::Energy, Dataset::Mnist],
    };
    let mut settings = Vec::new();
    let mut data = Vec::new();
    for &dataset in &datasets {
        let plan = options.common.plan(dataset)?;
        let of_dataset = Setting::all(dataset).into_iter();
        settings.extend(of_dataset.map(|setting| (setting, plan)));
        data.push(Data::load(dataset, options.common.data.as_deref())?);
    }
    let missing: Vec<_> = settings
        .iter()
        .filter(|(setting, plan)| load_finished(&file(setting), setting, plan).is_none())
        .map(|&(setting, plan)| {
            let data = data.iter().find(|data| data.dataset == setting.dataset);
            (data.expect("loaded above"), setting, plan)
        })
        .collect();
    println!(
        "{} of {} series are missing and will be run",
        missing.len(),
        settings.len()
    );
    run_all(&missing, |series| {
        parallel::write(&file(&series.setting), &serde_json::to_string(&series)?)
    })?;

    let series = settings
        .iter()
        .map(|(setting, plan)| {
            load_finished(&file(setting), setting, plan)
                .with_context(|| format!("{} cannot be read back", file(setting).display()))
        })
        .collect::<Result<Vec<_>>>()?;
    let table = report::table(&series, &reference)?;
    println!("\n{table}");
    parallel::write(&options.out.join("table.md"), &table)?;
    report::figures(&series, &reference, &options.out)?;
    Results { series }.save(&options.out.join("results.json"))?;
    println!(
        "The results are in {}. Missing series took {:.0} s.",
        options.out.display(),
        start.elapsed().as_secs_f64()
    );
    Ok(())
}

/// The series that an earlier call has finished with the same plan, if there is one.
fn load_finished(path: &Path, setting: &Setting, plan: &Plan) -> Option<Series> {
    let series: Series = serde_json::from_str(&fs::read_to_string(path).ok()?).ok()?;
    let same = series.setting == *setting
        && (series.runs, series.epochs, series.seed) == (plan.runs, plan.epochs, plan.seed);
    same.then_some(series)
}
