//! What a step of a layer is to do, and what it leaves behind. The state is not locked in between.

use super::AopLayer;
use crate::{
    config::{AopConfig, Method},
    rows::{Candidates, random::stream},
    state::{
        choice::{FIGURES, Figures, Shares, k_of, measured_ks},
        device::{DeviceState, Progress, StateHandle},
        reading::Reading,
        rows::Rows,
        watch::StepReport,
    },
};

/// One backward pass of a layer that counts its steps.
pub(super) struct LayerStep<'a> {
    pub(super) layer: &'a AopLayer,
    pub(super) state: StateHandle,
    /// How often this clone of the layer has been mapped.
    pub(super) maps: u64,
    pub(super) rows: usize,
    /// Whether the gradient of the input is asked for.
    pub(super) with_input: bool,
}

/// What a step is to do.
pub(super) struct Plan {
    /// The number of steps before this one.
    pub(super) step: u64,
    /// The numbers of rows for the gradients of weight and input.
    pub(super) k: usize,
    pub(super) input_rows: usize,
    /// The K for which the noise of each gradient is measured, if it is.
    pub(super) measures: Option<Candidates>,
    pub(super) measures_input: Option<Candidates>,
    /// Whether the gradient is compared with the exact one.
    pub(super) compares: bool,
    /// The set of rows that the step works with.
    pub(super) memory: Option<Rows>,
}

/// What a step leaves behind.
#[derive(Default)]
pub(super) struct Outcome {
    pub(super) memory: Option<Rows>,
    pub(super) figures: Option<Reading<FIGURES>>,
    pub(super) input_figures: Option<Reading<FIGURES>>,
    pub(super) error: Option<Reading<2>>,
}

/// A batch with fewer rows tells too little of its noise.
const LEAST_ROWS: usize = 16;

impl LayerStep<'_> {
    /// Counts the step and plans it.
    ///
    /// The state must not stay locked while the step computes. On CPUs the step computes on a pool
    /// of threads, which may take up another step of the same layer in the meantime.
    pub(super) fn plan(&self) -> Plan {
        let config = &self.layer.config;
        let mut state = self.state.lock();
        let step = state.count_step(self.maps);
        let measures = self.measures(&state, step);
        if measures && (state.reading.is_some() || state.input_reading.is_some()) {
            let readings = [state.reading.take(), state.input_reading.take()];
            // The lock is released while the device is waited for.
            drop(state);
            let figures = readings.map(|reading| reading.map(|reading| reading.read()));
            state = self.state.lock();
            self.choose(&mut state, figures);
        }

        let k = k_at(config, &state.progress, step, self.rows);
        let input_rows = input_rows_at(config, &state.progress, step, self.rows);
        state.progress.k = k;
        let noise = state.noise.noise().filter(|_| self.is_measured(&state));
        let shares = Shares {
            weight: self.share(k),
            input: self.share(input_rows),
        };
        let added_noise = match config.method {
            Method::Systematic => state.noise.added_at(shares),
            _ => None,
        };
        let watch = &mut state.watch;
        watch.report = Some(StepReport {
            step,
            k,
            rows: self.rows,
            input_rows: self.with_input.then_some(input_rows),
            noise,
            added_noise,
            time: self.layer.time.relative(shares),
            error: None,
        });
        let compares = watch.compares(step) && k < self.rows;
        Plan {
            step,
            k,
            input_rows,
            measures: measures.then(|| measured_ks(self.rows, k)),
            measures_input: (measures && self.chooses_input_rows())
                .then(|| measured_ks(self.rows, self.rows)),
            compares,
            memory: match k < self.rows {
                true => state.take_rows(),
                false => None,
            },
        }
    }

    /// Notes what a step has left behind.
    pub(super) fn note(&self, step: u64, outcome: Outcome) {
        let mut state = self.state.lock();
        state.put_back(outcome.memory);
        let replace = |place: &mut Option<_>, reading: Option<_>| {
            reading.and_then(|reading| place.replace(reading))
        };
        // The drop of a reading may wait for the device, so it comes after the lock is released.
        let _replaced = (
            replace(&mut state.reading, outcome.figures),
            replace(&mut state.input_reading, outcome.input_figures),
        );
        if let Some(report) = state.watch.report.as_mut()
            && report.step == step
        {
            report.error = outcome.error;
        }
        drop(state);
    }

    fn chooses(&self) -> bool {
        self.layer.config.chooses_k() || self.chooses_input_rows()
    }

    fn chooses_input_rows(&self) -> bool {
        self.layer.config.chooses_input_rows() && self.with_input
    }

    /// Whether the noise of the layer is measured: to choose by it, or to tell an observer.
    fn is_measured(&self, state: &DeviceState) -> bool {
        let config = &self.layer.config;
        let is_told = state.watch.is_on && config.method == Method::Systematic;
        self.chooses() || is_told && config.outer_products.fixed_k(self.rows) < self.rows
    }

    fn share(&self, rows: usize) -> f64 {
        rows as f64 / self.rows as f64
    }

    /// Whether this step measures its noise. It does not while an earlier measurement is late.
    fn measures(&self, state: &DeviceState, step: u64) -> bool {
        let seed = self.layer.config.seed;
        let readings = [&state.reading, &state.input_reading];
        self.is_measured(state)
            && self.rows >= LEAST_ROWS
            && (self.layer.time).measures(step, &state.noise, |interval| stream(seed, interval))
            && !readings.into_iter().flatten().any(Reading::is_late)
    }

    /// Adds the last measurement, and chooses K and the rows of the gradient of the input.
    fn choose(&self, state: &mut DeviceState, figures: [Option<Figures>; 2]) {
        let (config, time) = (&self.layer.config, &self.layer.time);
        let DeviceState {
            noise, progress, ..
        } = state;
        let [figures, input_figures] = figures;
        if let Some(figures) = input_figures {
            noise.add_input(figures);
        }
        let Some(figures) = figures else {
            return;
        };
        noise.add(figures);
        let mut present = Shares {
            weight: match config.chooses_k() {
                true => progress.chosen.unwrap_or(1.0),
                false => self.share(config.outer_products.fixed_k(self.rows).min(self.rows)),
            },
            input: match config.chooses_input_rows() {
                true => progress.input_chosen.unwrap_or(1.0),
                false => self.share(config.fixed_input_rows(self.rows)),
            },
        };
        if config.chooses_k() {
            present.weight = noise.choose(present, self.rows, time);
            progress.chosen = Some(present.weight);
        }
        if self.chooses_input_rows() {
            present.input = noise.choose_input(present, self.rows, time);
            progress.input_chosen = Some(present.input);
        }
    }
}

/// K for a step with a batch of `rows` rows. If K is `rows`, the gradient is exact.
fn k_at(config: &AopConfig, progress: &Progress, step: u64, rows: usize) -> usize {
    if step < config.exact_steps as u64 {
        return rows;
    }
    match config.chooses_k() {
        true => k_of(progress.chosen.unwrap_or(1.0), rows),
        false => config.outer_products.fixed_k(rows).min(rows),
    }
}

/// The number of rows of the gradient of the input.
fn input_rows_at(config: &AopConfig, progress: &Progress, step: u64, rows: usize) -> usize {
    if step < config.exact_steps as u64 {
        return rows;
    }
    match config.chooses_input_rows() {
        true => k_of(progress.input_chosen.unwrap_or(1.0), rows),
        false => config.fixed_input_rows(rows),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Memory, OuterProducts};

    #[test]
    fn exact_steps_take_all_rows() {
        let at = |outer_products, step| {
            let config = AopConfig::new()
                .with_outer_products(outer_products)
                .with_input_gradient(OuterProducts::Ratio(0.5))
                .with_exact_steps(3);
            let progress = Progress {
                chosen: Some(0.25),
                ..Progress::default()
            };
            (
                k_at(&config, &progress, step, 100),
                input_rows_at(&config, &progress, step, 100),
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
        assert_eq!(k_at(&AopConfig::new(), &progress, 0, 100), 100);
        let other = AopConfig::new().with_method(Method::TopK(Memory::None));
        assert_eq!(k_at(&other, &progress, 0, 100), 13);
    }
}
