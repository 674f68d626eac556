use burn::{
    tensor::ExecutionError,
    train::{
        ClassificationOutput, ItemLazy,
        metric::{AccuracyInput, Adaptor, LossInput},
    },
};
use burn_memaop::AopReport;

/// What Burn's metrics want, and what the layers report.
pub struct Observed {
    /// Of the classifier.
    pub output: ClassificationOutput,
    /// After the backward pass.
    pub aop: AopReport,
}

impl ItemLazy for Observed {
    fn sync(self) -> Result<Self, ExecutionError> {
        Ok(Self {
            output: self.output.sync()?,
            aop: self.aop.sync()?,
        })
    }
}

/// The one adaptor that all metrics of burn-memaop need.
impl Adaptor<AopReport> for Observed {
    fn adapt(&self) -> AopReport {
        self.aop.clone()
    }
}

impl Adaptor<AccuracyInput> for Observed {
    fn adapt(&self) -> AccuracyInput {
        self.output.adapt()
    }
}

impl Adaptor<LossInput> for Observed {
    fn adapt(&self) -> LossInput {
        self.output.adapt()
    }
}
