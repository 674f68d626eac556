//! How K changes from step to step.

use std::f64::consts::PI;

use super::noise_scale;
use crate::config::{AopConfig, OuterProducts, Schedule};

/// What the schedule of a layer needs to know of the steps before.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Progress {
    /// The number of gradients computed so far.
    pub(crate) step: u64,
    /// K of the last of them.
    pub(crate) k: usize,
    /// K as a share of the rows, once [`OuterProducts::Share`] has adjusted it.
    pub(crate) ratio: Option<f64>,
    /// K as a share of the rows, once [`OuterProducts::Auto`] has chosen it.
    pub(crate) chosen: Option<f64>,
    /// The rows of the gradient of the input as a share, once [`InputGradient::Auto`](crate::InputGradient::Auto) has
    /// chosen it.
    pub(crate) input_chosen: Option<f64>,
}

/// K for the next gradient of a batch of `rows` rows; `rows` is the exact gradient.
pub(crate) fn k(config: &AopConfig, progress: &Progress, rows: usize) -> usize {
    let last = target(config, progress, rows);
    let from_all = |share: f64| last + ((rows - last) as f64 * share).round() as usize;
    // The share of the way from M to K that is done, after the exact steps.
    let done = |exact_steps: usize, steps: usize| {
        let since = progress.step.checked_sub(exact_steps as u64);
        since.map(|since| (since as f64 / steps as f64).min(1.0))
    };
    match config.schedule {
        Schedule::Constant { exact_steps } if progress.step < exact_steps as u64 => rows,
        Schedule::Constant { .. } => last,
        Schedule::Linear { exact_steps, steps } => match done(exact_steps, steps) {
            None => rows,
            Some(done) => from_all(1.0 - done),
        },
        Schedule::Cosine { exact_steps, steps } => match done(exact_steps, steps) {
            None => rows,
            Some(done) => from_all(0.5 + 0.5 * (PI * done).cos()),
        },
    }
}

/// K when the schedule has run out.
pub(crate) fn target(config: &AopConfig, progress: &Progress, rows: usize) -> usize {
    match (config.outer_products, progress.ratio) {
        (OuterProducts::Auto, _) if config.chooses_k() => {
            noise_scale::k_of(progress.chosen.unwrap_or(1.0), rows)
        }
        (OuterProducts::Share { .. }, Some(ratio)) => {
            // Up, so that K does not stay below its target where the next row would reach it; with all rows there
            // would be nothing to measure.
            let k = (ratio * rows as f64 - 1e-6).ceil() as usize;
            k.clamp(1, (rows - 1).max(1))
        }
        (other, _) => other.first_k(rows).min(rows),
    }
}

/// The rows of the gradient of the input at this step.
pub(crate) fn input_rows(config: &AopConfig, progress: &Progress, rows: usize) -> usize {
    match config.input_gradient {
        _ if is_exact_for_now(config, progress, rows) => rows,
        _ if config.chooses_input_rows() => {
            noise_scale::k_of(progress.input_chosen.unwrap_or(1.0), rows)
        }
        fixed => fixed.fixed_k(rows),
    }
}

/// Whether the schedule takes all rows at this step, and fewer later: fewer outer products, or fewer rows of
/// the gradient of the input.
pub(crate) fn is_exact_for_now(config: &AopConfig, progress: &Progress, rows: usize) -> bool {
    let (exact_steps, falls) = match config.schedule {
        Schedule::Constant { exact_steps } => (exact_steps, false),
        Schedule::Linear { exact_steps, .. } | Schedule::Cosine { exact_steps, .. } => {
            (exact_steps, true)
        }
    };
    progress.step < exact_steps as u64
        || falls && target(config, progress, rows) < rows && k(config, progress, rows) >= rows
}

/// Whether the step measures the share of its rows, to be read `interval` steps later.
pub(crate) fn measures_share(config: &AopConfig, step: u64) -> bool {
    match config.outer_products {
        OuterProducts::Share { interval, .. } => step.is_multiple_of(interval as u64),
        _ => false,
    }
}

/// K as a share of the rows for which the chosen ones are expected to carry the share `target`,
/// after they carried `share` with K at `ratio`.
///
/// Takes the rows that are left out to carry `(1 - ratio)^a`, with the a that fits the
/// measurement: 1 for rows chosen blindly, more the better they are chosen.
pub(crate) fn adapt(ratio: f64, share: f64, target: f64) -> f64 {
    // A share of nothing, or of rows that are all zero, says nothing.
    if !(share > 0.0 && share.is_finite()) {
        return ratio;
    }
    // So that one measurement at an end does not move K without bounds.
    let share = share.min(1.0 - 1e-6);
    let a = (-share).ln_1p() / (-ratio).ln_1p();
    -((-target).ln_1p() / a).exp_m1()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(schedule: Schedule) -> AopConfig {
        AopConfig::new()
            .with_outer_products(OuterProducts::Count(20))
            .with_schedule(schedule)
    }

    fn ks(config: &AopConfig, steps: &[u64]) -> Vec<usize> {
        let at = |&step| {
            k(
                config,
                &Progress {
                    step,
                    ..Progress::default()
                },
                100,
            )
        };
        steps.iter().map(at).collect()
    }

    #[test]
    fn schedules_go_from_all_rows_to_k() {
        let constant = config(Schedule::Constant { exact_steps: 3 });
        assert_eq!(ks(&constant, &[0, 2, 3, 1000]), [100, 100, 20, 20]);
        let linear = config(Schedule::Linear {
            exact_steps: 10,
            steps: 8,
        });
        assert_eq!(
            ks(&linear, &[0, 9, 10, 12, 14, 18, 19]),
            [100, 100, 100, 80, 60, 20, 20]
        );
        let cosine = config(Schedule::Cosine {
            exact_steps: 10,
            steps: 4,
        });
        assert_eq!(
            ks(&cosine, &[9, 10, 11, 12, 13, 14, 15]),
            [100, 100, 88, 60, 32, 20, 20]
        );
    }

    #[test]
    fn a_k_that_holds_a_share_stays_between_1_and_all_but_one_row() {
        let config = AopConfig::new().with_outer_products(OuterProducts::Share {
            share: 0.5,
            interval: 5,
        });
        let at = |ratio, rows| {
            let progress = Progress {
                step: 7,
                ratio,
                ..Progress::default()
            };
            k(&config, &progress, rows)
        };
        assert_eq!(at(None, 100), 50);
        assert_eq!((at(Some(0.333), 100), at(Some(0.33), 100)), (34, 33));
        assert_eq!((at(Some(0.0), 100), at(Some(1.0), 100)), (1, 99));
        assert_eq!((at(None, 10), at(None, 1)), (5, 1));
        let steps = (0..12).filter(|&step| measures_share(&config, step));
        assert_eq!(steps.collect::<Vec<_>>(), [0, 5, 10]);
    }

    #[test]
    fn a_chosen_k_is_exact_until_the_first_choice_and_the_end_of_a_schedule() {
        let at = |schedule, chosen, step| {
            let progress = Progress {
                step,
                chosen,
                ..Progress::default()
            };
            let config = AopConfig::new().with_schedule(schedule);
            let k = k(&config, &progress, 100);
            (k, is_exact_for_now(&config, &progress, 100))
        };
        let constant = Schedule::Constant { exact_steps: 3 };
        assert_eq!(at(constant, Some(0.25), 2), (100, true));
        assert_eq!(at(constant, Some(0.25), 3), (25, false));
        // All rows by choice, not by the schedule: the gradient of the input goes its own way.
        assert_eq!(at(constant, None, 3), (100, false));
        assert_eq!(at(constant, Some(1.0), 3), (100, false));
        let linear = Schedule::Linear {
            exact_steps: 0,
            steps: 10,
        };
        assert_eq!(at(linear, Some(0.5), 0), (100, true));
        assert_eq!(at(linear, Some(0.5), 5), (75, false));
        assert_eq!(at(linear, Some(0.5), 10), (50, false));
        // Methods that the rule does not hold for.
        let other =
            AopConfig::new().with_method(crate::config::Method::TopK(crate::config::Memory::None));
        assert_eq!(k(&other, &Progress::default(), 100), 13);
    }

    #[test]
    fn adapting_finds_the_ratio_of_the_target() {
        // The share of the largest of rows that fall off: not of the form that `adapt` assumes.
        let rows: Vec<f64> = (0..1000)
            .map(|i| (-f64::from(i) / 150.0).exp() + 0.02)
            .collect();
        let total: f64 = rows.iter().sum();
        let share = |ratio: f64| {
            let k = (ratio * 1000.0).round() as usize;
            rows[..k].iter().sum::<f64>() / total
        };
        for target in [0.3, 0.8, 0.99] {
            for start in [0.001, 0.25, 0.999] {
                let mut ratio = start;
                for _ in 0..20 {
                    ratio = adapt(ratio, share(ratio), target).clamp(0.001, 0.999);
                }
                assert!(
                    (share(ratio) - target).abs() < 0.01,
                    "{target} {start}: {ratio}"
                );
            }
        }
        assert_eq!(adapt(0.3, f64::NAN, 0.5), 0.3);
        assert_eq!(adapt(0.3, 0.0, 0.5), 0.3);
    }
}
