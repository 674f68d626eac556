//! A numeric metric over [reports](AopReport): a figure of one layer, or of all layers of a model.

use std::sync::Arc;

use burn::{
    tensor::TensorReadError,
    train::metric::{
        Metric, MetricAttributes, MetricMetadata, MetricName, Numeric, NumericAttributes,
        NumericEntry, SerializedEntry,
        state::{FormatOptions, NumericMetricState},
    },
};

use crate::model::observe::{AopReport, LayerReport};

/// What an [`AopMetric`] shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AopFigure {
    /// The rows of the batch that the weight gradients used, in per cent, over all layers.
    RowsUsed,
    /// The floating-point operations that were saved in the backward passes of the layers, for
    /// weight and input together, in per cent.
    SavedFlops,
    /// The [noise-to-signal ratio](LayerReport::noise) of the gradient by which
    /// [`OuterProducts::Auto`](crate::OuterProducts::Auto) chose K: the geometric mean over the
    /// layers that choose.
    Noise,
    /// What training takes, [relative to exact training with its best
    /// batch](LayerReport::to_best_batch): the mean over the layers, weighed by their operations. Above
    /// 1, exact steps are better.
    ToBestBatch,
    /// The [relative error](LayerReport::error) of the gradient, in per cent: the mean over the
    /// layers. It has a value at steps that are [compared](crate::AopObserver::with_error).
    Error,
}

/// The properties of a figure that no step changes.
struct Shape {
    title: &'static str,
    unit: &'static str,
    higher_is_better: bool,
    description: &'static str,
}

impl AopFigure {
    fn shape(self) -> Shape {
        let (title, unit, higher_is_better, description) = match self {
            Self::RowsUsed => (
                "Rows used",
                "%",
                false,
                "Rows of the batch that the weight gradients used",
            ),
            Self::SavedFlops => (
                "Backward FLOPs saved",
                "%",
                true,
                "Operations of the layers' backward pass that were not computed",
            ),
            Self::Noise => (
                "Gradient noise to signal",
                "",
                false,
                "Variance of the gradient of a batch, relative to the square of the true gradient",
            ),
            Self::ToBestBatch => (
                "Time to exact, best batch",
                "",
                false,
                "Time to the same progress, relative to exact steps; both choose their batch",
            ),
            Self::Error => (
                "Gradient error",
                "%",
                false,
                "Distance of the gradient from the exact one, relative to the exact one",
            ),
        };
        Shape {
            title,
            unit,
            higher_is_better,
            description,
        }
    }

    /// The figure of these layers, if one of them has it at this step.
    fn of(self, layers: &[&LayerReport]) -> Option<f64> {
        let per_cent = |part: f64, all: f64| (all > 0.0).then(|| 100.0 * part / all);
        let sum = |figure: fn(&LayerReport) -> f64| layers.iter().map(|layer| figure(layer)).sum();
        match self {
            Self::RowsUsed => per_cent(
                sum(|layer| layer.outer_products as f64),
                sum(|layer| layer.rows as f64),
            ),
            Self::SavedFlops => {
                per_cent(sum(LayerReport::saved_flops), sum(LayerReport::exact_flops))
            }
            Self::Noise => {
                let noise = layers.iter().filter_map(|layer| layer.noise);
                mean_of(noise.map(f64::ln)).map(f64::exp)
            }
            Self::ToBestBatch => LayerReport::mean_to_best_batch(layers.iter().copied()),
            Self::Error => {
                let errors = layers.iter().filter_map(|layer| layer.error());
                mean_of(errors).map(|error| 100.0 * error)
            }
        }
    }
}

fn mean_of(figures: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = figures.fold((0.0, 0), |(sum, count), figure| (sum + figure, count + 1));
    (count > 0).then(|| sum / f64::from(count))
}

/// A metric of burn-train: a figure of the layers of a model, and its average over an epoch.
#[derive(Clone)]
pub struct AopMetric {
    figure: AopFigure,
    name: MetricName,
    layer: Option<String>,
    state: NumericMetricState,
    /// Whether the last step had a value.
    has_value: bool,
    /// What the dashboard shows until the next value.
    shown: String,
}

impl AopMetric {
    /// A figure of all layers of the model.
    pub fn new(figure: AopFigure) -> Self {
        Self {
            figure,
            name: Arc::new(figure.shape().title.to_string()),
            layer: None,
            state: NumericMetricState::new(),
            has_value: false,
            shown: SerializedEntry::not_available(None).formatted,
        }
    }

    /// The figure of the layer that these fields of the model lead to, separated by dots.
    pub fn of_layer(self, layer: &str) -> Self {
        Self {
            name: Arc::new(format!("{} ({layer})", self.figure.shape().title)),
            layer: Some(layer.to_string()),
            ..self
        }
    }

    fn format(&self) -> FormatOptions {
        let format = FormatOptions::new(self.name.clone()).precision(3);
        match self.figure.shape().unit {
            "" => format,
            unit => format.unit(unit),
        }
    }
}

impl Metric for AopMetric {
    type Input = AopReport;

    fn name(&self) -> MetricName {
        self.name.clone()
    }

    fn description(&self) -> Option<String> {
        Some(self.figure.shape().description.to_string())
    }

    fn attributes(&self) -> MetricAttributes {
        let Shape {
            unit,
            higher_is_better,
            ..
        } = self.figure.shape();
        NumericAttributes {
            unit: (!unit.is_empty()).then(|| unit.to_string()),
            higher_is_better,
        }
        .into()
    }

    fn update(
        &mut self,
        report: &AopReport,
        _metadata: &MetricMetadata,
    ) -> Result<SerializedEntry, TensorReadError> {
        let meant = |layer: &&LayerReport| match &self.layer {
            None => true,
            Some(name) => *name == layer.name,
        };
        let layers: Vec<_> = report.layers.iter().filter(meant).collect();
        let figure = self.figure.of(&layers);
        self.has_value = figure.is_some();
        let Some(figure) = figure else {
            let unlogged = SerializedEntry::NOT_AVAILABLE.to_string();
            return Ok(SerializedEntry::new(self.shown.clone(), unlogged));
        };
        self.state.update(figure, 1);
        let entry = self.state.compute_update(self.format());
        self.shown.clone_from(&entry.formatted);
        Ok(entry)
    }

    fn compute(&mut self) -> Result<SerializedEntry, TensorReadError> {
        Ok(self.state.compute_final(self.format()))
    }

    fn clear(&mut self) {
        self.state.reset();
        self.has_value = false;
    }
}

impl Numeric for AopMetric {
    fn value(&self) -> Option<NumericEntry> {
        self.has_value.then(|| self.state.current_value())
    }

    fn running_value(&self) -> Option<NumericEntry> {
        self.has_value.then(|| self.state.running_value())
    }

    fn final_value(&self) -> NumericEntry {
        self.state.final_value()
    }
}
