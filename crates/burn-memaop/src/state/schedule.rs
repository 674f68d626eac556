//! The rows that a step takes.

use super::noise_scale;
use crate::config::AopConfig;

/// What the choice of rows needs to know of the steps before.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Progress {
    /// The number of gradients computed so far.
    pub(crate) step: u64,
    /// K of the last of them.
    pub(crate) k: usize,
    /// K as a share of the rows, once [`OuterProducts::Auto`](crate::OuterProducts::Auto) has chosen it.
    pub(crate) chosen: Option<f64>,
    /// The rows of the gradient of the input as a share, once the layer has chosen it.
    pub(crate) input_chosen: Option<f64>,
}

/// K for the next gradient of a batch of `rows` rows; `rows` is the exact gradient.
pub(crate) fn k(config: &AopConfig, progress: &Progress, rows: usize) -> usize {
    match progress.step < config.exact_steps as u64 {
        true => rows,
        false => later_k(config, progress, rows),
    }
}

/// K after the exact steps.
pub(crate) fn later_k(config: &AopConfig, progress: &Progress, rows: usize) -> usize {
    match config.chooses_k() {
        true => noise_scale::k_of(progress.chosen.unwrap_or(1.0), rows),
        false => config.outer_products.fixed_k(rows).min(rows),
    }
}

/// The rows of the gradient of the input at this step.
pub(crate) fn input_rows(config: &AopConfig, progress: &Progress, rows: usize) -> usize {
    if progress.step < config.exact_steps as u64 {
        return rows;
    }
    match config.chooses_input_rows() {
        true => noise_scale::k_of(progress.input_chosen.unwrap_or(1.0), rows),
        false => config.fixed_input_rows(rows),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Memory, Method, OuterProducts};

    #[test]
    fn exact_steps_take_all_rows() {
        let at = |outer_products, step| {
            let config = AopConfig::new()
                .with_outer_products(outer_products)
                .with_input_gradient(OuterProducts::Ratio(0.5))
                .with_exact_steps(3);
            let progress = Progress {
                step,
                chosen: Some(0.25),
                ..Progress::default()
            };
            (
                k(&config, &progress, 100),
                input_rows(&config, &progress, 100),
            )
        };
        assert_eq!(at(OuterProducts::Count(20), 2), (100, 100));
        assert_eq!(at(OuterProducts::Count(20), 3), (20, 50));
        assert_eq!(at(OuterProducts::Count(200), 3), (100, 50));
        assert_eq!(at(OuterProducts::Auto, 2), (100, 100));
        assert_eq!(at(OuterProducts::Auto, 3), (25, 50));
        assert_eq!(at(OuterProducts::All, 3), (100, 50));
    }

    #[test]
    fn a_layer_that_has_not_chosen_takes_all_rows_and_methods_that_never_choose_an_eighth() {
        let progress = Progress::default();
        assert_eq!(k(&AopConfig::new(), &progress, 100), 100);
        let other = AopConfig::new().with_method(Method::TopK(Memory::None));
        assert_eq!(k(&other, &progress, 100), 13);
    }
}
