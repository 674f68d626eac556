//! Losses by time, and a picture of them.

use std::{
    fs,
    path::Path,
    sync::{Arc, Mutex},
    time::Instant,
};

use anyhow::{Context, Result};
use burn::{
    tensor::TensorReadError,
    train::metric::{
        LossInput, LossMetric, Metric, MetricAttributes, MetricMetadata, MetricName, Numeric,
        NumericEntry, SerializedEntry,
    },
};
use memaop_examples::chart::{self, Chart, Panel, Series};
use serde::Deserialize;

/// Seconds and losses.
pub type Points = Vec<(f64, f64)>;

/// Burn's metric of losses, which also notes the seconds since the start of the training.
#[derive(Clone)]
pub struct TimedLoss {
    metric: LossMetric,
    /// Whether the mean over the batches of an epoch is noted, and not each value.
    means: bool,
    start: Instant,
    noted: Arc<Mutex<Points>>,
}

impl TimedLoss {
    pub fn new(means: bool) -> Self {
        Self {
            metric: LossMetric::new(),
            means,
            start: Instant::now(),
            noted: Arc::default(),
        }
    }

    pub fn noted(&self) -> Points {
        self.noted.lock().expect("no metric panics").clone()
    }

    fn note(&self, entry: NumericEntry) {
        let mut noted = self.noted.lock().expect("no metric panics");
        noted.push((self.start.elapsed().as_secs_f64(), entry.current()));
    }
}

impl Metric for TimedLoss {
    type Input = LossInput;

    fn update(
        &mut self,
        loss: &LossInput,
        metadata: &MetricMetadata,
    ) -> Result<SerializedEntry, TensorReadError> {
        let shown = self.metric.update(loss, metadata)?;
        if let (false, Some(value)) = (self.means, self.metric.value()) {
            self.note(value);
        }
        Ok(shown)
    }

    fn compute(&mut self) -> Result<SerializedEntry, TensorReadError> {
        if self.means {
            self.note(self.metric.final_value());
        }
        self.metric.compute()
    }

    fn clear(&mut self) {
        self.metric.clear();
    }

    fn name(&self) -> MetricName {
        self.metric.name()
    }

    fn attributes(&self) -> MetricAttributes {
        self.metric.attributes()
    }
}

impl Numeric for TimedLoss {
    fn value(&self) -> Option<NumericEntry> {
        self.metric.value()
    }

    fn running_value(&self) -> Option<NumericEntry> {
        self.metric.running_value()
    }

    fn final_value(&self) -> NumericEntry {
        self.metric.final_value()
    }
}

/// The losses of a training.
#[derive(Deserialize)]
pub struct Run {
    #[serde(skip)]
    pub name: String,
    #[serde(rename = "train_losses")]
    pub train: Points,
    #[serde(rename = "test_losses")]
    pub test: Points,
}

impl Run {
    /// The losses that a training wrote to its folder. Its name is that of the folder.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("result.json");
        let name = || path.display().to_string();
        let text = fs::read_to_string(&path).with_context(name)?;
        let run: Self = serde_json::from_str(&text).with_context(name)?;
        let folder = folder.file_name().unwrap_or(folder.as_os_str());
        Ok(Self {
            name: folder.to_string_lossy().into_owned(),
            ..run
        })
    }
}

/// The number of training losses that are averaged for a point of the picture.
const WINDOW: usize = 20;

/// Draws the losses of trainings, those of the test dashed.
pub fn draw(runs: &[Run], path: &Path) -> Result<()> {
    let averaged = |losses: &Points| -> Points {
        let chunks = losses.chunks(WINDOW);
        let mean = |chunk: &[(f64, f64)]| {
            let sum: f64 = chunk.iter().map(|(_, loss)| loss).sum();
            (chunk[chunk.len() - 1].0, sum / chunk.len() as f64)
        };
        chunks.map(mean).collect()
    };
    let lines = runs.iter().enumerate().flat_map(|(color, run)| {
        let train = Series::new(&run.name, averaged(&run.train), color);
        let test = Series {
            name: None,
            dashed: true,
            ..Series::new(&run.name, run.test.clone(), color)
        };
        [train, test]
    });
    let chart = Panel::Lines(Chart {
        title: "Loss by time, dashed: of the test after each epoch",
        x: "seconds",
        y: "loss",
        logarithmic: false,
        x_label: chart::number,
        series: &lines.collect::<Vec<_>>(),
    });
    chart::save(&[chart], path).with_context(|| path.display().to_string())
}
