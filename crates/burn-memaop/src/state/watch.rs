//! Who asks a layer for more than its gradient, and what there is to tell. This is not saved.

use super::reading::Reading;

#[derive(Debug, Clone, Default)]
pub(crate) struct Watch {
    pub(crate) is_on: bool,
    /// One of so many gradients is compared with the exact one.
    pub(crate) error_interval: Option<u64>,
    /// The last step, if nobody has been told of it.
    pub(crate) report: Option<StepReport>,
}

impl Watch {
    pub(crate) fn compares(&self, step: u64) -> bool {
        let interval = self.error_interval;
        interval.is_some_and(|interval| step.is_multiple_of(interval))
    }

    /// The same watchers, with nothing to tell.
    pub(crate) fn renewed(&self) -> Self {
        Self {
            report: None,
            ..self.clone()
        }
    }
}

/// A step, for a report.
#[derive(Debug, Clone)]
pub(crate) struct StepReport {
    pub(crate) step: u64,
    pub(crate) k: usize,
    pub(crate) rows: usize,
    /// The rows of the gradient of the input that were computed, if it was asked for.
    pub(crate) input_rows: Option<usize>,
    /// The noise-to-signal ratio by which K was chosen.
    pub(crate) noise: Option<f64>,
    /// The distance from the exact gradient, and the norm of that.
    pub(crate) error: Option<Reading<2>>,
}
