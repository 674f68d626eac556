use std::{fs, path::Path};

use burn_memaop::Memory;
use clap::Parser;
use memaop_examples::{KRatio, MemoryOption, PolicyOption, mnist::PIXELS};
use serde_json::Value;

use crate::{
    Cli, grid, report,
    setting::Setting,
    study,
    training::{Data, Run},
};

/// Data like MNIST with few images. Each class has white rows of its own.
pub fn data(folder: &Path) -> Data {
    fs::create_dir_all(folder.join("mnist")).unwrap();
    for (prefix, count) in [("train", 320), ("t10k", 100)] {
        let mut images = Vec::new();
        let mut labels = Vec::new();
        for index in 0..count {
            let class = index % 10;
            let rows = (0..PIXELS).map(|pixel| u8::from(pixel / 56 == class) * 255);
            images.extend(rows);
            labels.push(class as u8);
        }
        let header = |dimensions: &[usize]| {
            let magic = 0x0800 + dimensions.len();
            let numbers = [magic].into_iter().chain(dimensions.iter().copied());
            numbers
                .flat_map(|n| (n as u32).to_be_bytes())
                .collect::<Vec<u8>>()
        };
        let write = |name: &str, dimensions: &[usize], bytes: &[u8]| {
            let content = [header(dimensions), bytes.to_vec()].concat();
            fs::write(folder.join(format!("mnist/{prefix}-{name}")), content).unwrap();
        };
        write("images-idx3-ubyte", &[count, 28, 28], &images);
        write("labels-idx1-ubyte", &[count], &labels);
    }
    Data::load(folder).unwrap()
}

fn settings(options: &str) -> Vec<Setting> {
    let options = ["ablation"].into_iter().chain(options.split_whitespace());
    Cli::try_parse_from(options)
        .unwrap()
        .grid
        .settings()
        .unwrap()
}

#[test]
fn lists_span_a_grid_without_what_does_not_go_together() {
    let all = settings("--policy topk,systematic --memory none,balanced --k-ratio 1,0.5,0.25");
    let methods: Vec<_> = all.iter().map(|s| (s.method(), s.k_ratio)).collect();
    let expected = [
        ("exact", 1.0),
        ("topk", 0.5),
        ("topk", 0.25),
        ("topk, balanced 0.9", 0.5),
        ("topk, balanced 0.9", 0.25),
        ("systematic", 0.5),
        ("systematic", 0.25),
    ];
    let expected = expected.map(|(name, k)| (name.to_string(), KRatio::Of(k)));
    assert_eq!(methods, expected);

    let [setting] = <[Setting; 1]>::try_from(settings("--policy wta")).unwrap();
    assert_eq!(setting.memory, MemoryOption::None);
    let [setting] = <[Setting; 1]>::try_from(settings("--decay 0.5")).unwrap();
    assert_eq!(
        setting.aop(0).unwrap().method.memory(),
        Memory::Balanced { decay: 0.5 }
    );

    let wrong = settings("--policy systematic --memory balanced");
    let error = wrong[0].validate(60_000).unwrap_err().to_string();
    assert!(
        error.contains("--policy systematic weighs what it chooses"),
        "{error}"
    );
    let error = settings("--batch 0")[0].validate(60_000).unwrap_err();
    assert_eq!(
        error.to_string(),
        "--batch must be from 1 to 60000, but got 0"
    );
}

#[test]
fn the_study_has_an_exact_layer_beside_every_setting_and_files_of_their_own() {
    let settings = study::settings();
    let mut names: Vec<_> = settings.iter().map(Setting::slug).collect();
    for setting in &settings {
        setting.validate(60_000).unwrap();
        assert!(settings.contains(&setting.exact()), "{}", setting.slug());
    }
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), settings.len());
}

#[test]
fn of_each_method_the_best_learning_rate_is_reported() {
    let outcome = |index: usize, accuracy: f64| grid::Outcome {
        runs: vec![Run {
            seed: 0,
            test_accuracy: vec![accuracy],
            train_seconds: vec![1.0],
        }],
        setting: study::tuned()[index].clone(),
    };
    // Exact training and a chosen K, at half, one and two times the learning rate.
    let accuracies = [
        (0, 0.5),
        (6, 0.9),
        (12, 0.7),
        (1, 0.8),
        (7, 0.6),
        (13, 0.95),
    ];
    let outcomes = accuracies.map(|(index, accuracy)| outcome(index, accuracy));
    let table = report::tuned_table(&outcomes);
    assert!(table.contains("| exact | M | 0.1 | 90.00 |"), "{table}");
    assert!(
        table.contains("| systematic | auto | 0.2 | 95.00 | 5.00 |"),
        "{table}"
    );
    assert_eq!(table.matches("exact | M").count(), 1);
}

#[test]
fn a_grid_learns_is_written_and_goes_on_where_it_was_interrupted() {
    let folder = tempfile::tempdir().unwrap();
    let data = data(folder.path());
    let out = folder.path().join("runs");
    let settings = settings(
        "--batch 32 --widths 32 --k-ratio 1,0.25 --policy systematic --epochs 4 --no-cost-rule",
    );
    let outcomes = grid::run(&data, &settings, &[0, 1], Some(&out)).unwrap();
    assert_eq!(outcomes.len(), 2);
    for outcome in &outcomes {
        let accuracy = outcome.final_accuracy();
        assert_eq!(accuracy.len(), 2);
        assert!(
            accuracy.iter().all(|&accuracy| accuracy > 0.9),
            "{accuracy:?}"
        );
    }
    let json: Value = serde_json::to_value(&outcomes[1]).unwrap();
    assert_eq!(json["policy"], "systematic");
    assert_eq!(json["memory"], "none");
    assert_eq!(json["k_ratio"], 0.25);
    assert_eq!(json["runs"][1]["seed"], 1);
    assert_eq!(
        json["runs"][1]["test_accuracy"].as_array().unwrap().len(),
        4
    );
    assert_eq!(
        json["runs"][1]["train_seconds"].as_array().unwrap().len(),
        4
    );

    // A run that is there is taken as it is. One whose file is broken is repeated.
    let kept = out.join(format!("{}-seed-0.json", settings[0].slug()));
    let text = fs::read_to_string(&kept).unwrap();
    let mut marked: Value = serde_json::from_str(&text).unwrap();
    marked["runs"][0]["test_accuracy"] = vec![0.125; 4].into();
    fs::write(&kept, marked.to_string()).unwrap();
    let broken = out.join(format!("{}-seed-1.json", settings[0].slug()));
    fs::write(&broken, &text[..40]).unwrap();
    let again = grid::run(&data, &settings, &[0, 1], Some(&out)).unwrap();
    assert_eq!(again[0].final_accuracy()[0], 0.125);
    assert_eq!(
        again[0].runs[1].test_accuracy,
        outcomes[0].runs[1].test_accuracy
    );
    for (again, before) in again[1].runs.iter().zip(&outcomes[1].runs) {
        assert_eq!(again.test_accuracy, before.test_accuracy);
    }

    let table = report::table(&outcomes);
    assert!(
        table.contains("| systematic, every layer | M/4 |"),
        "{table}"
    );
    report::figures(&outcomes, folder.path()).unwrap();
    assert!(folder.path().join("1-course.svg").exists());
}

#[test]
fn every_policy_has_a_name_that_is_its_option() {
    use clap::ValueEnum;
    for policy in PolicyOption::value_variants() {
        let option = policy.to_possible_value().unwrap();
        let json = serde_json::to_value(policy).unwrap();
        assert_eq!(json, option.get_name());
    }
}
