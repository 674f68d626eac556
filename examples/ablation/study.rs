//! The settings of the studies in `docs/results.md`.

use memaop_examples::{
    InputGradientOptions, KRatio,
    MemoryOption::{self, Balanced, None, Published},
    PolicyOption::{
        self, Bernoulli, ColumnRow, RandK, ScaledRandK, Systematic, TopK, WeightedK, WinnerTakeAll,
    },
    StoredInputOption,
};

use crate::setting::{
    Optimizer::{self, Adam, Sgd},
    Setting,
};

/// A policy, its memory and decay, and the values of M / K as exponents of 2.
type Method = (PolicyOption, MemoryOption, f64, &'static [i32]);

const COMPARED: &[Method] = &[
    (TopK, Balanced, 0.9, &[2, 3, 4, 5]),
    (Systematic, None, 1.0, &[2, 3, 4, 5]),
    (TopK, None, 1.0, &[3, 4]),
    (TopK, Published, 1.0, &[3]),
    (TopK, Balanced, 1.0, &[4]),
    (TopK, Balanced, 0.7, &[4]),
    (WeightedK, Balanced, 0.9, &[3]),
    (RandK, Balanced, 0.9, &[3]),
    (RandK, Published, 1.0, &[3]),
    (Bernoulli, None, 1.0, &[4]),
    (ColumnRow, None, 1.0, &[4]),
    (WinnerTakeAll, None, 1.0, &[4]),
    (ScaledRandK, None, 1.0, &[4]),
];

const FEW: &[Method] = &[
    (TopK, Balanced, 0.9, &[3, 4]),
    (Systematic, None, 1.0, &[3, 4]),
    (TopK, None, 1.0, &[4]),
    (TopK, Published, 1.0, &[4]),
];

/// Optimizer, learning rate, momentum, batch, hidden layers of 512 units, epochs.
type Regime = (Optimizer, f64, f64, usize, usize, usize);

const REGIMES: &[(Regime, &[Method])] = &[
    ((Sgd, 0.1, 0.0, 128, 2, 3), COMPARED),
    ((Adam, 1e-3, 0.0, 128, 2, 3), COMPARED),
    ((Sgd, 0.3, 0.0, 512, 2, 5), COMPARED),
    ((Adam, 1e-3, 0.0, 512, 2, 5), COMPARED),
    ((Sgd, 0.02, 0.9, 128, 2, 3), FEW),
    ((Sgd, 0.1, 0.0, 128, 4, 3), FEW),
];

/// The methods that have learning rates of their own.
const TUNED: &[(PolicyOption, MemoryOption, f64, KRatio)] = &[
    (Systematic, None, 1.0, KRatio::AUTO),
    (Systematic, None, 1.0, KRatio::Of(0.25)),
    (Systematic, None, 1.0, KRatio::Of(0.125)),
    (Systematic, None, 1.0, KRatio::Of(0.0625)),
    (TopK, Balanced, 0.9, KRatio::Of(0.125)),
];
/// The learning rates, as multiples of that of the regime.
const FACTORS: [f64; 3] = [0.5, 1.0, 2.0];

/// The first four regimes with three learning rates for each method.
pub fn tuned() -> Vec<Setting> {
    let mut settings = Vec::new();
    for &(regime, _) in &REGIMES[..4] {
        for factor in FACTORS {
            let mut exact = exact(regime);
            exact.lr *= factor;
            let methods = TUNED
                .iter()
                .map(|&(policy, memory, decay, k_ratio)| Setting {
                    k_ratio,
                    policy,
                    memory,
                    decay,
                    ..exact.clone()
                });
            settings.extend([exact.clone()].into_iter().chain(methods));
        }
    }
    settings
}

pub fn settings() -> Vec<Setting> {
    let mut settings = Vec::new();
    for &(regime, methods) in REGIMES {
        let exact = exact(regime);
        settings.push(exact.clone());
        for &(policy, memory, decay, exponents) in methods {
            settings.extend(exponents.iter().map(|&exponent| Setting {
                k_ratio: KRatio::Of(0.5f64.powi(exponent)),
                policy,
                memory,
                decay,
                ..exact.clone()
            }));
        }
    }
    settings
}

pub fn exact((optimizer, lr, momentum, batch, hidden, epochs): Regime) -> Setting {
    Setting {
        optimizer,
        lr,
        momentum,
        batch,
        widths: vec![512; hidden],
        epochs,
        k_ratio: KRatio::ALL,
        policy: TopK,
        memory: None,
        decay: 1.0,
        stored_input: StoredInputOption::Full,
        input_gradient: InputGradientOptions::default(),
        cost_rule: true,
        exact_steps: 0,
    }
}
