//! Metrics for the dashboard and the logs of burn-train, and checkpoints that survive a kill.
//!
//! A model's training output carries an [`AopReport`], and one adaptor hands it to all metrics:
//!
//! ```
//! use burn::{
//!     nn::loss::{MseLoss, Reduction},
//!     prelude::*,
//!     tensor::ExecutionError,
//!     train::{ItemLazy, TrainOutput, TrainStep, metric::{Adaptor, LossInput}},
//! };
//! use burn_memaop::{AopObserver, AopReport, MemAopLinear};
//!
//! #[derive(Module, Debug)]
//! struct Model {
//!     layer: MemAopLinear,
//! }
//!
//! struct Output {
//!     loss: Tensor<1>,
//!     aop: AopReport,
//! }
//!
//! impl TrainStep for Model {
//!     type Input = (Tensor<2>, Tensor<2>);
//!     type Output = Output;
//!
//!     fn step(&self, (input, target): Self::Input) -> TrainOutput<Output> {
//!         let loss = MseLoss::new().forward(self.layer.forward(input), target, Reduction::Mean);
//!         let grads = loss.backward();
//!         let aop = AopObserver::new().observe(self); // after the backward pass
//!         TrainOutput::new(self, grads, Output { loss, aop })
//!     }
//! }
//!
//! impl Adaptor<AopReport> for Output {
//!     fn adapt(&self) -> AopReport {
//!         self.aop.clone()
//!     }
//! }
//!
//! impl Adaptor<LossInput> for Output {
//!     fn adapt(&self) -> LossInput {
//!         LossInput::new(self.loss.clone())
//!     }
//! }
//!
//! impl ItemLazy for Output {
//!     fn sync(self) -> Result<Self, ExecutionError> {
//!         Ok(Self { loss: self.loss.without_autodiff(), aop: self.aop.sync()? })
//!     }
//! }
//! ```
//!
//! ```text
//! SupervisedTraining::new(..)
//!     .metric_train_numeric(AopMetric::new(AopFigure::RowsUsed))
//!     .metric_train_numeric(AopMetric::new(AopFigure::SavedFlops).of_layer("layer"))
//! ```

mod checkpoint;
mod loader;
mod metric;

pub use checkpoint::{AtomicFileCheckpointer, Checkpoints, CheckpointsError};
pub use loader::resume_loader;
pub use metric::{AopFigure, AopMetric};

use burn::{tensor::ExecutionError, train::ItemLazy};

use crate::model::observe::AopReport;

impl ItemLazy for AopReport {
    /// Measurements are already on their way to the host.
    fn sync(self) -> Result<Self, ExecutionError> {
        Ok(self)
    }
}
