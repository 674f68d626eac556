use burn::tensor::{Device, Tensor};

/// The rows left out so far, in gradient units: `m^X`, shape `[rows, d_input]`, and `m^G`, shape
/// `[rows, d_output]`, and the number of steps that each holds something of, shape `[rows, 1]`; all
/// without autodiff.
#[derive(Debug, Clone)]
pub(crate) struct RowTensors {
    pub(crate) input: Tensor<2>,
    pub(crate) grad: Tensor<2>,
    pub(crate) age: Tensor<2>,
}

impl RowTensors {
    pub(crate) fn to_device(&self, device: &Device) -> Self {
        Self {
            input: self.input.clone().to_device(device),
            grad: self.grad.clone().to_device(device),
            age: self.age.clone().to_device(device),
        }
    }
}
