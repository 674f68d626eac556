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
    let model = Net::new(auto, Some(AopObserver::new(2)), &device);
    let training = training(folder.path(), loader(BATCH * 25, false))
        .metric_train_numeric(AopMetric::new(AopFigure::Noise))
        .metric_train_numeric(AopMetric::new(AopFigure::Noise).of_layer("first"))
        .num_epochs(1);
    finished(training.launch(Learner::new(model, SgdConfig::new().init(), 1e-3)));
    // The first measurement is read at the second, which is at step 5 at the latest.
    for name in ["AOP noise", "AOP noise (first)"] {
        let noise = logged(folder.path(), name);
        assert!((20..25).contains(&noise.len()), "{name}: {}", noise.len());
        assert!(noise.iter().all(|&noise| noise > 0.0), "{noise:?}");
    }
}

#[test]
fn metrics_log_a_value_for_each_step_that_has_one() {
    let folder = tempfile::tempdir().unwrap();
    let device = Device::flex().autodiff();
    let observer = AopObserver::new(2).with_exact(3);
    let model = Net::new(aop(), Some(observer), &device);
    // So that the first step is measured.
    observer.observe(&model);
    let training = training(folder.path(), loader(BATCH * STEPS, false))
        .metric_train_numeric(AopMetric::new(AopFigure::Share))
        .metric_train_numeric(AopMetric::new(AopFigure::Share).of_layer("second"))
        .metric_train_numeric(AopMetric::new(AopFigure::Memory))
        .metric_train_numeric(AopMetric::new(AopFigure::Oldest))
        .metric_train_numeric(AopMetric::new(AopFigure::OuterProducts))
        .metric_train_numeric(AopMetric::new(AopFigure::SavedFlops))
        .metric_train_numeric(
            AopMetric::new(AopFigure::SavedFlops).of_layer("nothing of that name"),
        )
        .metric_train_numeric(AopMetric::new(AopFigure::Error))
        .metric_train_numeric(AopMetric::new(AopFigure::Cosine))
        .num_epochs(1);
    finished(training.launch(Learner::new(model, SgdConfig::new().init(), 1e-3)));

    let logged = |metric| logged(folder.path(), metric);
    // Two layers of K = 4; 12 of 16 rows left out of all operations of the first layer (6 x 24), of which
    // nothing asks for the gradient of the input, and of half of those of the second (24 x 2).
    assert_eq!(logged("AOP outer products"), [8.0; STEPS]);
    assert_eq!(logged("AOP saved"), [60.0; STEPS]);
    // Steps 0, 2, 3 (as it is compared) and 4; 0 and 3 are compared.
    let share = logged("AOP share");
    assert_eq!(share.len(), 4);
    assert!(
        share.iter().all(|&share| share > 25.0 && share < 100.0),
        "{share:?}"
    );
    assert_eq!(logged("AOP share (second)").len(), 4);
    assert_eq!(logged("AOP memory").len(), 4);
    assert_eq!(logged("AOP oldest row"), [1.0, 3.0, 4.0, 5.0]);
    let (error, cosine) = (logged("AOP error"), logged("AOP cosine"));
    assert_eq!((error.len(), cosine.len()), (2, 2));
    assert!(error.iter().all(|&error| error > 0.0), "{error:?}");
    assert!(cosine.iter().all(|cosine| cosine.abs() < 1.0), "{cosine:?}");
    assert!(logged("AOP saved (nothing of that name)").is_empty());
}
