//! What an observer asks of a layer, and what the layer reports. Records do not hold this.

use super::reading::Reading;

#[derive(Debug, Clone, Default)]
pub(crate) struct Watch {
    pub(crate) is_on: bool,
    /// One gradient in this many is compared with the exact one.
    pub(crate) error_interval: Option<u64>,
    /// The last step, if no observer has been told of it.
    pub(crate) report: Option<StepReport>,
}

impl Watch {
    pub(crate) fn compares(&self, step: u64) -> bool {
        let interval = self.error_interval;
        interval.is_some_and(|interval| step.is_multiple_of(interval))
    }

    /// The same observers, with nothing to report.
    pub(crate) fn renewed(&self) -> Self {
        Self {
            report: None,
            ..self.clone()
        }
    }
}

/// What is reported of a step.
#[derive(Debug, Clone)]
pub(crate) struct StepReport {
    pub(crate) step: u64,
    pub(crate) k: usize,
    pub(crate) rows: usize,
    /// The rows of the gradient of the input that were computed, if it was asked for.
    pub(crate) input_rows: Option<usize>,
    /// The noise-to-signal ratio by which K was chosen.
    pub(crate) noise: Option<f64>,
    /// The variance that drawing rows adds, relative to that of the batch.
    pub(crate) added_noise: Option<f64>,
    /// The time of the step by the cost rule, relative to an exact one.
    pub(crate) time: f64,
    /// The distance from the exact gradient, and the norm of the exact gradient.
    pub(crate) error: Option<Reading<2>>,
}
