//! A perceptron with `burn::nn::Linear` and with `MemAopLinear`. It is too small to gain much, and
//! shows that fewer outer products learn as well.

mod model;

use anyhow::Result;
use burn::{
    optim::SgdConfig,
    tensor::{Device, Tensor},
};
use burn_memaop::AopConfig;

use self::model::{Dense, Mlp};
use crate::{
    Settings,
    data::Digits,
    training::{Classifier, ClassifierTraining, Run, train_in_turns},
};

impl<L: Dense> Classifier for Mlp<L> {
    fn scores(&self, images: Tensor<2>) -> Tensor<2> {
        self.forward(images)
    }

    fn outer_products(&self, rows: usize) -> usize {
        self.outer_products(rows)
    }
}

/// Trains both models from the same weights and on the same batches.
pub fn compare(settings: &Settings, aop: AopConfig, device: &Device) -> Result<Vec<Run>> {
    device.seed(settings.seed);
    let autodiff = device.clone().autodiff();
    let linear = Mlp::new(settings.width, &autodiff);
    let memaop = linear.clone().with_memaop(aop);
    println!("{}", burn_memaop::summary(&memaop));
    let sgd = || SgdConfig::new().init();
    let lr = settings.lr;
    train_in_turns(
        vec![
            Box::new(ClassifierTraining::new(
                "Burn's",
                linear,
                sgd(),
                lr,
                &autodiff,
            )),
            Box::new(ClassifierTraining::new(
                "burn-memaop",
                memaop,
                sgd(),
                lr,
                &autodiff,
            )),
        ],
        &Digits::load(),
        [settings.epochs, settings.batch],
        settings.seed,
        device,
    )
}

pub fn print_table(runs: &[Run]) {
    println!(
        "{:<12} {:>15} {:>10} {:>16} {:>9}",
        "layers", "test accuracy", "loss", "outer products", "ms/step"
    );
    for run in runs {
        println!(
            "{:<12} {:>13.2} % {:>10.5} {:>16} {:>9.3}",
            run.name,
            100.0 * run.test_accuracy,
            run.loss,
            run.outer_products,
            run.step_ms
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fewer rows are used, and at most 1.5 points of accuracy are lost.
    #[test]
    fn fewer_outer_products_learn_as_well() {
        let alone = crate::tests::ALONE.lock();
        let _alone = alone.unwrap_or_else(|broken| broken.into_inner());
        let device = Device::flex();
        // The defaults, but every layer uses fewer rows.
        let aop = AopConfig::new().with_cost_rule(false);
        let mut difference = 0.0;
        for seed in 0..3 {
            let settings = Settings {
                epochs: 40,
                batch: 128,
                width: 128,
                lr: 0.1,
                seed,
            };
            let runs = compare(&settings, aop, &device).unwrap();
            let (linear, memaop) = (&runs[0], &runs[1]);
            assert!(linear.test_accuracy > 0.9, "{}", linear.test_accuracy);
            let share = memaop.outer_products as f64 / linear.outer_products as f64;
            assert!(share < 0.9, "{share}");
            difference += (linear.test_accuracy - memaop.test_accuracy) / 3.0;
        }
        assert!(difference <= 0.015, "{difference}");
    }
}
