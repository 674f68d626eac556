//! A numeric metric over [reports](AopReport): a figure of one layer, or of all layers of the model.

use std::sync::Arc;

use burn::{
    tensor::TensorReadError,
    train::metric::{
        Metric, MetricAttributes, MetricMetadata, MetricName, Numeric, NumericAttributes,
        NumericEntry, SerializedEntry,
        state::{FormatOptions, NumericMetricState},
    },
};

use crate::{
    model::observe::{AopReport, LayerReport},
    state::measurement::Measured,
};

/// What an [`AopMetric`] shows.
///
/// Figures that need a measurement have a value at measured steps
/// ([`AopObserver::new`](crate::AopObserver::new)), those that compare with the exact gradient at compared ones
/// ([`AopObserver::with_exact`](crate::AopObserver::with_exact)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AopFigure {
    /// The share of the sum of all `|x^| |g^|` that the evaluated rows carry, in per cent: the mean over the
    /// layers. Measured.
    Share,
    /// What is left in the memory against what is applied ([`Measured::memory`]): the mean over the layers that
    /// have a memory. Measured.
    Memory,
    /// The age of the oldest pending row: the most steps that a position of the memory holds something of, the
    /// largest of the layers. Measured.
    Oldest,
    /// The outer products evaluated in a step, K: the sum over the layers.
    OuterProducts,
    /// The noise-to-signal ratio of the gradient by which [`OuterProducts::Auto`](crate::OuterProducts::Auto) chose K
    /// ([`LayerReport::noise`]): the geometric mean over the layers that choose.
    Noise,
    /// The floating-point operations that are saved of the backward passes of the layers, of weight and input
    /// together, in per cent.
    SavedFlops,
    /// The relative error of the approximate gradient, `|approximate - exact| / |exact|`: the mean over the
    /// layers. Compared.
    Error,
    /// The cosine between the approximate gradient and the exact one: the mean over the layers. Compared.
    Cosine,
}

/// What is fixed of a figure.
struct Shape {
    title: &'static str,
    unit: &'static str,
    higher_is_better: bool,
    description: &'static str,
}

impl AopFigure {
    fn shape(self) -> Shape {
        let (title, unit, higher_is_better, description) = match self {
            Self::Share => (
                "AOP share",
                "%",
                true,
                "Share of the score mass that the evaluated rows carry",
            ),
            Self::Memory => (
                "AOP memory",
                "",
                false,
                "Norm of what is left in the memory against that of the gradient",
            ),
            Self::Oldest => (
                "AOP oldest row",
                "steps",
                false,
                "The most steps that a position of the memory has been waiting",
            ),
            Self::OuterProducts => (
                "AOP outer products",
                "",
                false,
                "Outer products evaluated in a step",
            ),
            Self::Noise => (
                "AOP noise",
                "",
                false,
                "Variance of the gradient of a batch against the square of the true gradient",
            ),
            Self::SavedFlops => (
                "AOP saved",
                "%",
                true,
                "Share of the FLOPs of the layers' backward pass that is not computed",
            ),
            Self::Error => (
                "AOP error",
                "",
                false,
                "Distance of the gradient from the exact one, relative to the exact one",
            ),
            Self::Cosine => (
                "AOP cosine",
                "",
                true,
                "Cosine between the gradient and the exact one",
            ),
        };
        Shape {
            title,
            unit,
            higher_is_better,
            description,
        }
    }

    /// Over the layers that are meant; none where no layer has it at this step.
    fn of(self, layers: &[&LayerReport]) -> Result<Option<f64>, TensorReadError> {
        match self {
            Self::Share => Ok(mean(layers, |measured| measured.share)?.map(|share| 100.0 * share)),
            Self::Memory => mean(layers, |measured| measured.memory),
            Self::Error => mean(layers, |measured| measured.error),
            Self::Cosine => mean(layers, |measured| measured.cosine),
            Self::Oldest => {
                let ages = figures(layers, |measured| measured.oldest)?;
                Ok(ages.into_iter().reduce(f64::max))
            }
            Self::OuterProducts => {
                let evaluated = layers.iter().map(|layer| layer.outer_products as f64);
                Ok(evaluated.reduce(|sum, evaluated| sum + evaluated))
            }
            Self::Noise => {
                let noise = layers.iter().filter_map(|layer| layer.noise);
                Ok(mean_of(noise.map(f64::ln)).map(f64::exp))
            }
            Self::SavedFlops => {
                let exact: f64 = layers.iter().map(|layer| layer.exact_flops()).sum();
                let saved: f64 = layers.iter().map(|layer| layer.saved_flops()).sum();
                Ok((exact > 0.0).then(|| 100.0 * saved / exact))
            }
        }
    }
}

fn figures(
    layers: &[&LayerReport],
    figure: impl Fn(&Measured) -> Option<f64>,
) -> Result<Vec<f64>, TensorReadError> {
    let mut figures = Vec::new();
    for layer in layers {
        figures.extend(layer.measured()?.as_ref().and_then(&figure));
    }
    Ok(figures)
}

fn mean(
    layers: &[&LayerReport],
    figure: impl Fn(&Measured) -> Option<f64>,
) -> Result<Option<f64>, TensorReadError> {
    Ok(mean_of(figures(layers, figure)?.into_iter()))
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
    /// What the dashboard shows until the next one.
    shown: String,
}

impl AopMetric {
    /// Over all layers of the model.
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

    /// Of one layer: the fields of the model that lead to it, separated by dots.
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
        let figure = self.figure.of(&layers)?;
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
