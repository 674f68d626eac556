//! The metrics in a training, as its logs show them.

use std::{fs, path::Path};

use burn::{optim::SgdConfig, tensor::Device, train::Learner};
use burn_memaop::{
    AopConfig, AopObserver,
    train::{AopFigure, AopMetric},
};

use crate::support::{BATCH, Net, aop, finished, loader, training};

const STEPS: usize = 6;

/// The values that were logged in the first epoch, without the one of the whole epoch.
fn logged(folder: &Path, metric: &str) -> Vec<f64> {
    let name = format!("{metric}.log");
    let file = folder
        .join("train")
        .join("epoch-1")
        .join(name.replace(' ', "_"));
    let text = fs::read_to_string(&file).unwrap_or_else(|error| {
        let listed = fs::read_dir(folder.join("train").join("epoch-1"));
        let listed: Vec<_> = listed.unwrap().map(|entry| entry.unwrap().path()).collect();
        panic!("{}: {error}; there are {listed:?}", file.display())
    });
    let steps = text.lines().filter(|line| !line.contains("final"));
    steps
        .filter_map(|line| line.split(',').next()?.parse().ok())
        .collect()
}

#[test]
fn the_noise_is_logged_once_it_is_known() {
    let folder = tempfile::tempdir().unwrap();
    let device = Device::flex().autodiff();
    let auto = AopConfig::new().with_cost_rule(false);
    let model = Net::new(auto, Some(AopObserver::new()), &device);
    let training = training(folder.path(), loader(BATCH * 25, false))
        .metric_train_numeric(AopMetric::new(AopFigure::Noise))
        .metric_train_numeric(AopMetric::new(AopFigure::Noise).of_layer("first"))
        .num_epochs(1);
    finished(training.launch(Learner::new(model, SgdConfig::new().init(), 1e-3)));
    // The first measurement is read at the second, which is at step 5 at the latest.
    for name in [
        "Gradient noise to signal",
        "Gradient noise to signal (first)",
    ] {
        let noise = logged(folder.path(), name);
        assert!((20..25).contains(&noise.len()), "{name}: {}", noise.len());
        assert!(noise.iter().all(|&noise| noise > 0.0), "{noise:?}");
    }
}

#[test]
fn metrics_log_a_value_for_each_step_that_has_one() {
    let folder = tempfile::tempdir().unwrap();
    let device = Device::flex().autodiff();
    let observer = AopObserver::new().with_error(3);
    let model = Net::new(aop(), Some(observer), &device);
    // So that the first step is compared.
    observer.observe(&model);
    let training = training(folder.path(), loader(BATCH * STEPS, false))
        .metric_train_numeric(AopMetric::new(AopFigure::RowsUsed))
        .metric_train_numeric(AopMetric::new(AopFigure::RowsUsed).of_layer("second"))
        .metric_train_numeric(AopMetric::new(AopFigure::SavedFlops))
        .metric_train_numeric(
            AopMetric::new(AopFigure::SavedFlops).of_layer("nothing of that name"),
        )
        .metric_train_numeric(AopMetric::new(AopFigure::Error))
        .num_epochs(1);
    finished(training.launch(Learner::new(model, SgdConfig::new().init(), 1e-3)));

    let logged = |metric| logged(folder.path(), metric);
    // Two layers with 4 of 16 rows; 12 rows left out of all operations of the first layer (6 x 24), of which
    // nothing asks for the gradient of the input, and of half of those of the second (24 x 2).
    assert_eq!(logged("Rows used"), [25.0; STEPS]);
    assert_eq!(logged("Rows used (second)"), [25.0; STEPS]);
    assert_eq!(logged("Backward FLOPs saved"), [60.0; STEPS]);
    // Steps 0 and 3 are compared.
    let error = logged("Gradient error");
    assert_eq!(error.len(), 2);
    assert!(error.iter().all(|&error| error > 0.0), "{error:?}");
    assert!(logged("Backward FLOPs saved (nothing of that name)").is_empty());
}
