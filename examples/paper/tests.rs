//! These tests compare short versions of both experiments with points of the published curves. They
//! need the data in the folder that the variable `MEMAOP_DATA` names, or in `../shared/data` beside
//! the project, and the published results in `../reference` from there. Without them the tests are
//! skipped with a message.

use std::{env, path::PathBuf};

use memaop_examples::statistics::mean_and_error;

use crate::{
    data::{Data, Dataset},
    experiment::{MemoryName, PolicyName, Setting, run},
    report::{Reference, distance},
};

fn folder() -> Option<PathBuf> {
    let beside = || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data"));
    let folder = env::var_os("MEMAOP_DATA").map_or_else(beside, PathBuf::from);
    let found = folder.join("energy/energy_efficiency.csv").exists()
        && folder.join("mnist").exists()
        && reference(&folder).exists();
    if !found {
        eprintln!("skipped: no data in {}", folder.display());
    }
    found.then_some(folder)
}

fn reference(folder: &std::path::Path) -> PathBuf {
    folder.join("../reference/published_results.json")
}

/// Asserts that the mean of our runs after `epochs` epochs is within `tolerance`, relatively, of
/// the published curve, which is a mean of 10 runs.
fn assert_on_the_curve(
    dataset: Dataset,
    cases: &[(PolicyName, MemoryName, usize)],
    epochs: usize,
    runs: u64,
    tolerance: f64,
) {
    let Some(folder) = folder() else { return };
    let data = Data::load(dataset, Some(&folder)).unwrap();
    let reference = Reference::load(&reference(&folder)).unwrap();
    for &(policy, memory, k) in cases {
        let setting = Setting {
            dataset,
            policy,
            memory,
            k,
        };
        let last: Vec<f64> = (0..runs)
            .map(|seed| {
                *run(&data, &setting, epochs, seed, || {})
                    .loss_val
                    .last()
                    .unwrap()
            })
            .collect();
        let (mean, _) = mean_and_error(&last);
        let published = reference.mean_curve(&setting).unwrap()[epochs - 1];
        let error = (mean / published - 1.0).abs();
        assert!(
            error < tolerance,
            "{}: {mean}, published {published}",
            setting.name()
        );
    }
}

#[test]
fn energy_follows_the_published_curves() {
    use MemoryName::{None, Published};
    use PolicyName::{Exact, RandK, TopK, WeightedK};
    let cases = [
        (Exact, None, 144),
        (TopK, Published, 18),
        (TopK, None, 18),
        (RandK, None, 18),
        (WeightedK, Published, 18),
    ];
    assert_on_the_curve(Dataset::Energy, &cases, 20, 10, 0.1);
}

#[test]
fn mnist_follows_the_published_curves() {
    use MemoryName::{None, Published};
    use PolicyName::{Exact, TopK};
    let cases = [(Exact, None, 64), (TopK, Published, 32), (TopK, None, 16)];
    assert_on_the_curve(Dataset::Mnist, &cases, 1, 2, 0.05);
}

#[test]
fn energy_data_is_prepared_as_in_the_paper() {
    let Some(folder) = folder() else { return };
    let data = Data::load(Dataset::Energy, Some(&folder)).unwrap();
    let rows = &data.train;
    assert_eq!(
        (rows.width, rows.len(), data.validation.len()),
        (16, 576, 192)
    );
    for column in 0..6 {
        let values: Vec<f64> = (0..rows.len())
            .map(|row| f64::from(rows.inputs[row * 16 + column]))
            .collect();
        let (mean, _) = mean_and_error(&values);
        let variance = values.iter().map(|value| value * value).sum::<f64>() / 576.0;
        assert!(mean.abs() < 1e-5 && (variance - 1.0).abs() < 1e-4);
    }
    for row in rows.inputs.chunks(16) {
        assert_eq!(row[6..10].iter().sum::<f32>(), 1.0);
        assert_eq!(row[10..].iter().sum::<f32>(), 1.0);
    }
}

#[test]
fn there_are_38_series() {
    let count = |dataset| Setting::all(dataset).len();
    assert_eq!(count(Dataset::Energy) + count(Dataset::Mnist), 38);
    assert_eq!(Setting::exact(Dataset::Energy).name(), "energy-exact-k144");
}

#[test]
fn statistics() {
    let (mean, error) = mean_and_error(&[1.0, 2.0, 3.0, 4.0]);
    assert_eq!(mean, 2.5);
    assert!((error - (5.0f64 / 12.0).sqrt()).abs() < 1e-12);
    assert_eq!(distance((3.0, 3.0), (8.0, 4.0)), -1.0);
}
