use burn::{
    tensor::ExecutionError,
    train::{
        ClassificationOutput, ItemLazy,
        metric::{AccuracyInput, Adaptor, LossInput},
    },
};
use burn_memaop::AopReport;

/// The output of a training step, for the metrics of Burn and of burn-memaop.
pub struct Observed {
    /// The output of the classifier.
    pub output: ClassificationOutput,
    /// The report of the layers after the backward pass.
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
