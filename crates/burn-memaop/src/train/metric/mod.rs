//! Numeric metrics over [reports](AopReport): of one layer, or over all layers of the model.

use std::sync::Arc;

use burn::{
    tensor::TensorReadError,
    train::metric::{
        MetricAttributes, MetricName, NumericAttributes, NumericEntry, SerializedEntry,
        state::{FormatOptions, NumericMetricState},
    },
};

use crate::{AopReport, LayerReport};

mod cosine;
mod error;
mod memory;
mod oldest;
mod outer_products;
mod saved_flops;
mod share;

pub use cosine::AopCosineMetric;
pub use error::AopErrorMetric;
pub use memory::AopMemoryMetric;
pub use oldest::AopOldestMetric;
pub use outer_products::AopOuterProductsMetric;
pub use saved_flops::AopSavedFlopsMetric;
pub use share::AopShareMetric;

/// What all metrics have: a name, perhaps a layer, and the average so far.
#[derive(Clone)]
struct Average {
    title: &'static str,
    unit: &'static str,
    higher_is_better: bool,
    name: MetricName,
    layer: Option<String>,
    state: NumericMetricState,
    measured: bool,
    /// What the dashboard shows until the next figure.
    shown: String,
}

impl Average {
    fn new(title: &'static str, unit: &'static str, higher_is_better: bool) -> Self {
        Self {
            title,
            unit,
            higher_is_better,
            name: Arc::new(title.to_string()),
            layer: None,
            state: NumericMetricState::new(),
            measured: false,
            shown: SerializedEntry::not_available(None).formatted,
        }
    }

    fn of_layer(self, layer: &str) -> Self {
        Self {
            name: Arc::new(format!("{} ({layer})", self.title)),
            layer: Some(layer.to_string()),
            ..self
        }
    }

    /// Takes the figure of the layers that are meant, if they have one at this step.
    fn update(
        &mut self,
        report: &AopReport,
        figure: impl FnOnce(&[&LayerReport]) -> Result<Option<f64>, TensorReadError>,
    ) -> Result<SerializedEntry, TensorReadError> {
        let meant = |layer: &&LayerReport| match &self.layer {
            None => true,
            Some(name) => *name == layer.name,
        };
        let layers: Vec<_> = report.layers.iter().filter(meant).collect();
        let figure = figure(&layers)?;
        self.measured = figure.is_some();
        let Some(figure) = figure else {
            let unlogged = SerializedEntry::NOT_AVAILABLE.to_string();
            return Ok(SerializedEntry::new(self.shown.clone(), unlogged));
        };
        self.state.update(figure, 1);
        let entry = self.state.compute_update(self.format());
        self.shown.clone_from(&entry.formatted);
        Ok(entry)
    }

    fn compute(&self) -> SerializedEntry {
        self.state.compute_final(self.format())
    }

    fn format(&self) -> FormatOptions {
        let format = FormatOptions::new(self.name.clone()).precision(3);
        match self.unit {
            "" => format,
            unit => format.unit(unit),
        }
    }

    fn clear(&mut self) {
        self.state.reset();
        self.measured = false;
    }

    fn attributes(&self) -> MetricAttributes {
        NumericAttributes {
            unit: (!self.unit.is_empty()).then(|| self.unit.to_string()),
            higher_is_better: self.higher_is_better,
        }
        .into()
    }

    fn value(&self) -> Option<NumericEntry> {
        self.measured.then(|| self.state.current_value())
    }

    fn running_value(&self) -> Option<NumericEntry> {
        self.measured.then(|| self.state.running_value())
    }
}

/// The mean of a measured figure over the layers that have it.
fn mean(
    layers: &[&LayerReport],
    figure: impl Fn(&crate::Measured) -> Option<f64>,
) -> Result<Option<f64>, TensorReadError> {
    let mut figures = Vec::new();
    for layer in layers {
        let measured = layer.measured()?;
        figures.extend(measured.as_ref().and_then(&figure));
    }
    let count = figures.len() as f64;
    Ok((count > 0.0).then(|| figures.iter().sum::<f64>() / count))
}

/// Implements a metric that holds an [`Average`] and has a function `figure`.
macro_rules! numeric_metric {
    ($metric:ident, $title:literal, $unit:literal, higher_is_better: $better:literal, $description:literal) => {
        impl Default for $metric {
            fn default() -> Self {
                Self::new()
            }
        }

        impl $metric {
            /// Over all layers of the model.
            pub fn new() -> Self {
                Self($crate::train::metric::Average::new($title, $unit, $better))
            }

            /// Of one layer: the fields of the model that lead to it, separated by dots.
            pub fn of_layer(self, layer: &str) -> Self {
                Self(self.0.of_layer(layer))
            }
        }

        impl burn::train::metric::Metric for $metric {
            type Input = $crate::AopReport;

            fn name(&self) -> burn::train::metric::MetricName {
                self.0.name.clone()
            }

            fn description(&self) -> Option<String> {
                Some($description.to_string())
            }

            fn attributes(&self) -> burn::train::metric::MetricAttributes {
                self.0.attributes()
            }

            fn update(
                &mut self,
                report: &$crate::AopReport,
                _metadata: &burn::train::metric::MetricMetadata,
            ) -> Result<burn::train::metric::SerializedEntry, burn::tensor::TensorReadError> {
                self.0.update(report, Self::figure)
            }

            fn compute(
                &mut self,
            ) -> Result<burn::train::metric::SerializedEntry, burn::tensor::TensorReadError> {
                Ok(self.0.compute())
            }

            fn clear(&mut self) {
                self.0.clear();
            }
        }

        impl burn::train::metric::Numeric for $metric {
            fn value(&self) -> Option<burn::train::metric::NumericEntry> {
                self.0.value()
            }

            fn running_value(&self) -> Option<burn::train::metric::NumericEntry> {
                self.0.running_value()
            }

            fn final_value(&self) -> burn::train::metric::NumericEntry {
                self.0.state.final_value()
            }
        }
    };
}
use numeric_metric;
