//! Who asks a layer for more than its gradient, and what there is to tell. Not saved.

use std::sync::Arc;

use super::measurement::Measurement;

/// Which gradients of a layer are measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Intervals {
    /// One of so many.
    pub(crate) measured: u64,
    /// And one of so many compared with the exact one too.
    pub(crate) exact: Option<u64>,
}

/// That a gradient is measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Due {
    pub(crate) exact: bool,
}

impl Intervals {
    pub(crate) fn due(&self, step: u64) -> Option<Due> {
        let exact = self.exact.is_some_and(|n| step.is_multiple_of(n));
        (exact || step.is_multiple_of(self.measured)).then_some(Due { exact })
    }
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Watch {
    pub(crate) intervals: Option<Intervals>,
    /// The last gradient, if nobody has been told of it.
    pub(crate) seen: Option<Seen>,
}

impl Watch {
    /// The same watchers, with nothing to tell.
    pub(crate) fn renewed(&self) -> Self {
        Self {
            seen: None,
            ..self.clone()
        }
    }
}

/// A gradient, for a report.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) step: u64,
    pub(crate) k: usize,
    pub(crate) rows: usize,
    /// The rows of the gradient of the input that were computed, if it was asked for.
    pub(crate) input_rows: Option<usize>,
    /// The noise-to-signal ratio by which K was chosen.
    pub(crate) noise: Option<f64>,
    pub(crate) measurement: Option<Arc<Measurement>>,
}
