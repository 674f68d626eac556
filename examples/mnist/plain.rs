use std::collections::HashMap;

use burn::train::{
    logger::{EvaluationProgressLogger, TrainingProgressLogger},
    metric::{MetricDefinition, MetricEntry, MetricId},
    renderer::{
        EvaluationName, MetricState, MetricsRenderer, MetricsRendererEvaluation,
        MetricsRendererTraining,
    },
};

/// Prints a line for each epoch of training and validation, and needs no terminal.
#[derive(Default)]
pub struct PlainRenderer {
    names: Vec<(MetricId, String)>,
    latest: HashMap<MetricId, String>,
    split: String,
    epoch: usize,
    epochs: usize,
}

impl PlainRenderer {
    fn update(&mut self, state: MetricState) {
        let (MetricState::Generic(entry) | MetricState::Numeric(entry, _)) = state;
        let MetricEntry {
            metric_id,
            serialized_entry,
        } = entry;
        self.latest.insert(metric_id, serialized_entry.formatted);
    }
}

impl MetricsRendererTraining for PlainRenderer {
    fn update_train(&mut self, state: MetricState) {
        self.update(state);
    }

    fn update_valid(&mut self, state: MetricState) {
        self.update(state);
    }
}

impl TrainingProgressLogger for PlainRenderer {
    fn start(&mut self, epochs: usize, epoch: usize, _items: Option<usize>, _label: Option<&str>) {
        self.epochs = epochs;
        self.epoch = epoch.max(1);
    }

    fn update_epoch(&mut self, epoch: usize) {
        self.epoch = epoch + 1;
    }

    fn start_split(&mut self, split: &str, _items: usize) {
        self.split = split.to_string();
        self.latest.clear();
    }

    fn update_split(&mut self, _items: usize) {}

    fn end_split(&mut self) {
        let metrics = self.names.iter().filter_map(|(id, name)| {
            let value = self.latest.get(id)?;
            Some(format!("{name}: {value}"))
        });
        let metrics: Vec<_> = metrics.collect();
        println!(
            "epoch {}/{}, {}: {}",
            self.epoch,
            self.epochs,
            self.split,
            metrics.join("; ")
        );
    }

    fn end(&mut self) {}

    fn log_event_training(&mut self, _event: String) {}
}

impl MetricsRenderer for PlainRenderer {
    fn manual_close(&mut self) {}

    fn register_metric(&mut self, metric: MetricDefinition) {
        self.names.push((metric.metric_id, metric.name.to_string()));
    }
}

// The examples do not evaluate after training.
impl MetricsRendererEvaluation for PlainRenderer {
    fn update_test(&mut self, _name: EvaluationName, _state: MetricState) {}
}

impl EvaluationProgressLogger for PlainRenderer {
    fn start_global_progress(&mut self, _tests: usize) {}

    fn start_test(&mut self, _name: &str, _items: usize) {}

    fn update_test_progress(&mut self, _items: usize) {}

    fn end_test(&mut self) {}

    fn end_global_progress(&mut self) {}

    fn log_event_evaluation(&mut self, _event: String) {}
}
